//! What this machine reaches: the rates that its ops are measured against.

use std::time::Instant;

use rayon::prelude::*;

use super::Cpu;
use super::gemm::{Mat, MatMut, Threads, Write, gemm};

const TIMINGS: usize = 5;

impl Cpu {
    /// Seconds of the best of a few calls of `f` inside the pool.
    fn best(&mut self, mut f: impl FnMut() + Send) -> f64 {
        let mut best = f64::INFINITY;
        for _ in 0..=TIMINGS {
            let start = Instant::now();
            match &self.pool {
                Some(pool) => pool.install(&mut f),
                None => f(),
            }
            best = best.min(start.elapsed().as_secs_f64());
        }
        best
    }

    /// Bytes a second, read and write counted, of a copy of 256 MiB by all threads.
    pub fn copy_rate(&mut self) -> f64 {
        let from = vec![1f32; 64 << 20];
        let mut to = vec![0f32; from.len()];
        let bytes = 8.0 * from.len() as f64;
        let copy =
            || to.par_chunks_mut(1 << 18).zip(from.par_chunks(1 << 18)).for_each(|(to, from)| to.copy_from_slice(from));
        bytes / self.best(copy)
    }

    /// FLOP/s of an f32 product of 1024³.
    pub fn product_rate(&mut self) -> f64 {
        let n = 1024;
        let (a, b, mut c) = (vec![0.5f32; n * n], vec![0.25f32; n * n], vec![0f32; n * n]);
        let product = || {
            let (a, b) = (Mat::rows(&a, n), Mat::rows(&b, n));
            gemm(Threads::All, (n, n, n), 1.0, a, b, Write::Set, MatMut::rows(&mut c, n));
        };
        2.0 * (n * n * n) as f64 / self.best(product)
    }
}
