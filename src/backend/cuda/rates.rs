//! What this card reaches: the rates that a step is measured against.

use std::time::Instant;

use cudarc::driver::result;
use half::bf16;

use super::cublas::{ALONE_BYTES, Cublas, Products, matmul, plain};
use super::managed::Pinned;
use super::ops::gemm::Out;
use super::{Cuda, driver_error};
use crate::error::Result;

/// Launches of one timing, and timings.
const LAUNCHES: usize = 10;
const TIMINGS: usize = 9;

impl Cuda {
    /// Median seconds of one call of `f`, after a warm-up.
    fn seconds(&self, mut f: impl FnMut() -> Result<()>) -> Result<f64> {
        let mut times = Vec::with_capacity(TIMINGS);
        for timing in 0..=TIMINGS {
            self.synchronize()?;
            let start = Instant::now();
            for _ in 0..LAUNCHES {
                f()?;
            }
            self.synchronize()?;
            if timing > 0 {
                times.push(start.elapsed().as_secs_f64() / LAUNCHES as f64);
            }
        }
        times.sort_by(f64::total_cmp);
        Ok(times[TIMINGS / 2])
    }

    /// FLOP/s of the product (m, k) · (n, k)ᵀ of 16-bit matrices, by cuBLAS where it is there,
    /// else by ours. Buffers of its own.
    pub fn gemm_rate(&self, m: usize, n: usize, k: usize) -> Result<f64> {
        self.rate_of((m, n, k), true)
    }

    /// FLOP/s of a product, or of that of a (k, n) matrix as it lies.
    fn rate_of(&self, (m, n, k): (usize, usize, usize), b_transposed: bool) -> Result<f64> {
        // Values that vary: multiplying zeros draws less power and runs faster than weights do.
        let values = |len: usize| -> Vec<bf16> {
            let word = |i: usize| (i as u32).wrapping_mul(0x9e37_79b9) >> 8;
            (0..len).map(|i| bf16::from_f32(word(i) as f32 / (1 << 24) as f32 - 0.5)).collect()
        };
        let (a, b) = (self.upload(&values(m * k))?, self.upload(&values(n * k))?);
        let mut c = self.zeros::<bf16>(m * n)?;
        // Before a model is prepared cuBLAS is not open yet.
        let lent = match (&self.cublas, self.has_cublas()) {
            (None, true) => Some(Cublas::open(self, self.allocate(ALONE_BYTES)?)?),
            _ => None,
        };
        let product = || {
            let g = plain(Out::Bf16(c.view_mut()), (a.view(), k), (b.view(), b_transposed), (m, n, k));
            match &lent {
                Some(cublas) => cublas.product(self, &g),
                None => matmul(self, Products::Cublas, g),
            }
        };
        Ok(2.0 * (m * n) as f64 * k as f64 / self.seconds(product)?)
    }

    /// Bytes a second, read and write counted, of the best of nine device-to-device copies of 512 MiB, which no cache holds.
    pub fn copy_rate(&mut self) -> Result<f64> {
        const BYTES: usize = 512 << 20;
        let (mut to, mut from) = (self.allocate_alone::<u8>(BYTES)?, self.allocate_alone::<u8>(BYTES)?);
        self.zero(from.view_mut())?;
        let mut best = f64::INFINITY;
        for _ in 0..=TIMINGS {
            best = best.min(self.time_once(&mut |cuda| cuda.copy(to.view_mut(), from.view()))?);
        }
        // The driver has the memory back when it has waited.
        drop((to, from));
        self.synchronize()?;
        Ok(2.0 * BYTES as f64 / best)
    }

    /// FLOP/s of the best of five large 16-bit products: those of a step's forward and of its backward.
    pub fn product_rate(&self) -> Result<f64> {
        let shapes = [
            ((8192, 4096, 4096), true),
            ((4096, 28_672, 4096), true),
            ((8192, 8192, 8192), true),
            ((8192, 4096, 14_336), false),
            ((2048, 4096, 28_672), false),
        ];
        let rates = shapes.map(|(shape, b_transposed)| self.rate_of(shape, b_transposed));
        rates.into_iter().try_fold(0.0, |best: f64, rate| Ok(best.max(rate?)))
    }

    /// Bytes a second from pinned host memory to the device. Buffers of its own, beside the arena.
    pub fn upload_rate(&self) -> Result<f64> {
        const BYTES: usize = 256 << 20;
        let mut to = self.allocate_alone::<u8>(BYTES)?;
        let mut from = Pinned::new(self, BYTES)?;
        let address = self.ptr_mut(&to.view_mut())? as u64;
        let copy = || {
            // SAFETY: both have BYTES bytes, and outlive the copies: `seconds` waits for them.
            unsafe { result::memcpy_htod_async(address, from.bytes_mut(), self.stream.cu_stream()) }
                .map_err(|e| driver_error("cuMemcpyHtoDAsync", e))
        };
        Ok(BYTES as f64 / self.seconds(copy)?)
    }
}
