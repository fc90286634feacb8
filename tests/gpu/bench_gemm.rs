//! `gpu --bench`: time of gemm and nf4_gemm by number of tokens, on the gate projection of Mistral-7B (14336 x 4096) with
//! a pair of rank 16, forward (b or W as (n, k)) and backward ((k, n)). Each line has the rate of the products.

use std::time::Instant;

use half::bf16;
use halfbyte::Error;
use halfbyte::backend::cuda::Cuda;
use halfbyte::backend::cuda::ops::gemm::{Gemm, Out, Pair, gemm};
use halfbyte::backend::cuda::ops::nf4::Absmax;
use halfbyte::backend::cuda::ops::nf4_gemm::{Direction, Nf4Gemm, Nf4Weight, nf4_gemm};
use halfbyte::nf4::{BLOCK, NESTED_BLOCK, QuantType};
use libtest_mimic::{Failed, Measurement, Trial};

/// (n, k) of the weight.
const WEIGHT: (usize, usize) = (14_336, 4096);
const RANK: usize = 16;

pub fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for t in [16, 64, 256, 512, 2048, 8192] {
        for direction in [Direction::Forward, Direction::Backward] {
            let name = |op| format!("bench/{op}/{direction:?}/{t}");
            trials.push(Trial::bench(name("gemm"), move |test_mode| dense(test_mode, t, direction)));
            trials.push(Trial::bench(name("nf4_gemm"), move |test_mode| packed(test_mode, t, direction)));
        }
    }
    trials
}

/// Median over 7 rounds of launches that fill 50 ms, after one such round to warm up.
fn measure(
    cuda: &Cuda,
    test_mode: bool,
    name: &str,
    t: usize,
    mut op: impl FnMut() -> Result<(), Error>,
) -> Result<Option<Measurement>, Failed> {
    let mut round = |count: usize| -> Result<f64, Error> {
        cuda.synchronize()?;
        let start = Instant::now();
        (0..count).try_for_each(|_| op())?;
        cuda.synchronize()?;
        Ok(start.elapsed().as_secs_f64() / count as f64)
    };
    round(2)?;
    if test_mode {
        return Ok(None);
    }
    let count = (0.05 / round(10)?).clamp(10.0, 1000.0) as usize;
    round(count)?;
    let mut times = (0..7).map(|_| round(count)).collect::<Result<Vec<_>, _>>()?;
    times.sort_by(f64::total_cmp);
    let (low, median, high) = (times[0], times[3], times[6]);
    let (n, k) = WEIGHT;
    let flops = 2.0 * t as f64 * (n * k + RANK * n.max(k)) as f64;
    println!(
        "{name}, {t} tokens: {:.1} us (rounds {:.1} to {:.1}), {:.0} TFLOP/s",
        median * 1e6,
        low * 1e6,
        high * 1e6,
        flops / median / 1e12
    );
    Ok(Some(Measurement { avg: (median * 1e9) as u64, variance: ((high - low) * 1e9) as u64 }))
}

/// Values around zero: the power that a GPU draws, and so its clock, depends on them.
fn noise(n: usize, scale: f32) -> Vec<bf16> {
    let value = |i: usize| ((i as u32).wrapping_mul(0x9e37_79b9) >> 8) as f32 / (1 << 24) as f32 - 0.5;
    (0..n).map(|i| bf16::from_f32(scale * value(i))).collect()
}

/// (columns of c, depth of the sum)
fn sizes(direction: Direction) -> (usize, usize) {
    if direction == Direction::Forward { WEIGHT } else { (WEIGHT.1, WEIGHT.0) }
}

fn dense(test_mode: bool, t: usize, direction: Direction) -> Result<Option<Measurement>, Failed> {
    let cuda = Cuda::open(0)?;
    let (cols, depth) = sizes(direction);
    let b_transposed = direction == Direction::Forward;
    let (a, b) = (cuda.upload(&noise(t * depth, 2.0))?, cuda.upload(&noise(cols * depth, 0.1))?);
    let (a2, b2) = (cuda.upload(&noise(t * RANK, 2.0))?, cuda.upload(&noise(cols * RANK, 0.1))?);
    let mut c = cuda.zeros::<bf16>(t * cols)?;
    measure(&cuda, test_mode, &format!("gemm, {direction:?}"), t, || {
        let ldb = if b_transposed { RANK } else { cols };
        let op = Gemm {
            c: Out::Bf16(c.view_mut()),
            ldc: cols,
            a: a.view(),
            lda: depth,
            b: b.view(),
            ldb: WEIGHT.1,
            b_transposed,
            pair: Some(Pair { a: a2.view(), lda: RANK, b: b2.view(), ldb, k: RANK }),
            bias: None,
            alpha: 1.0,
            accumulate: false,
            m: t,
            n: cols,
            k: depth,
        };
        gemm(&cuda, op)
    })
}

fn packed(test_mode: bool, t: usize, direction: Direction) -> Result<Option<Measurement>, Failed> {
    let cuda = Cuda::open(0)?;
    let (n, k) = WEIGHT;
    let (cols, depth) = sizes(direction);
    let blocks = n * k / BLOCK;
    let bytes: Vec<u8> = (0..n * k / 2).map(|i| ((i as u32).wrapping_mul(0x9e37_79b9) >> 24) as u8).collect();
    let weight = cuda.upload(&bytes)?;
    let codes = cuda.upload(&bytes[..blocks])?;
    let nested_absmax = cuda.upload(&vec![0.01f32; blocks.div_ceil(NESTED_BLOCK)])?;
    let offset = cuda.upload(&[0.05f32])?;
    let a = cuda.upload(&noise(t * depth, 2.0))?;
    let (a2, b2) = (cuda.upload(&noise(t * RANK, 2.0))?, cuda.upload(&noise(cols * RANK, 0.1))?);
    let mut c = cuda.zeros::<bf16>(t * cols)?;
    measure(&cuda, test_mode, &format!("nf4_gemm, {direction:?}"), t, || {
        let ldb = if direction == Direction::Forward { RANK } else { cols };
        let absmax = Absmax::Double { codes: codes.view(), nested_absmax: nested_absmax.view(), offset: offset.view() };
        let op = Nf4Gemm {
            c: c.view_mut(),
            ldc: cols,
            a: a.view(),
            lda: depth,
            w: Nf4Weight { packed: weight.view(), absmax, quant_type: QuantType::Nf4, n, k },
            direction,
            pair: Some(Pair { a: a2.view(), lda: RANK, b: b2.view(), ldb, k: RANK }),
            bias: None,
            accumulate: false,
            m: t,
        };
        nf4_gemm(&cuda, op)
    })
}
