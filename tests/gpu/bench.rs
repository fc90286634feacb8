//! `gpu --bench`: time of the nf4 kernels on a 14336 x 4096 weight, beside a plain copy on the same card. Each line has
//! the bytes that the op must move and the bandwidth that this makes; two sets of buffers alternate.

use std::time::Instant;

use half::bf16;
use halfbyte::Error;
use halfbyte::backend::cuda::Cuda;
use halfbyte::backend::cuda::ops::nf4::{
    self as ops, Absmax, Nf4Dequantize, Nf4DoubleQuantize, Nf4Quantize, Output, Source,
};
use halfbyte::nf4::{BLOCK, NESTED_BLOCK, QuantType};
use libtest_mimic::{Failed, Measurement, Trial};

const N: usize = 14_336 * 4096;

pub fn trials() -> Vec<Trial> {
    vec![
        Trial::bench("bench/copy", copy),
        Trial::bench("bench/nf4_dequantize_double_bf16", dequantize),
        Trial::bench("bench/nf4_quantize_double_bf16", quantize),
    ]
}

/// Median over 11 rounds of 100 launches of `op`, after a warm-up.
fn measure(
    cuda: &Cuda,
    test_mode: bool,
    name: &str,
    bytes: usize,
    mut op: impl FnMut(usize) -> Result<(), Error>,
) -> Result<Option<Measurement>, Failed> {
    let mut round = |count: usize| -> Result<f64, Error> {
        cuda.synchronize()?;
        let start = Instant::now();
        (0..count).try_for_each(&mut op)?;
        cuda.synchronize()?;
        Ok(start.elapsed().as_secs_f64() / count as f64)
    };
    round(2)?;
    if test_mode {
        return Ok(None);
    }
    round(50)?;
    let mut times = (0..11).map(|_| round(100)).collect::<Result<Vec<_>, _>>()?;
    times.sort_by(f64::total_cmp);
    let median = times[times.len() / 2];
    println!(
        "{name}: {:.1} us (rounds {:.1} to {:.1}), {:.1} MB, {:.0} GB/s",
        median * 1e6,
        times[0] * 1e6,
        times[times.len() - 1] * 1e6,
        bytes as f64 / 1e6,
        bytes as f64 / median / 1e9
    );
    let spread = (times[times.len() - 1] - times[0]) * 1e9;
    Ok(Some(Measurement { avg: (median * 1e9) as u64, variance: spread as u64 }))
}

/// A weight of plausible values, and its 4-bit form.
fn weight() -> Vec<bf16> {
    let value = |i: usize| ((i as u32).wrapping_mul(0x9e37_79b9) >> 8) as f32 / (1 << 24) as f32 - 0.5;
    (0..N).map(|i| bf16::from_f32(0.04 * value(i) * (1.0 + (i / BLOCK % 17) as f32))).collect()
}

fn copy(test_mode: bool) -> Result<Option<Measurement>, Failed> {
    let cuda = Cuda::open(0)?;
    let from = [cuda.upload(&weight())?, cuda.upload(&weight())?];
    let mut to = [cuda.zeros::<bf16>(N)?, cuda.zeros::<bf16>(N)?];
    measure(&cuda, test_mode, "copy", 4 * N, |i| cuda.copy(to[i % 2].view_mut(), from[i % 2].view()))
}

fn quantize(test_mode: bool) -> Result<Option<Measurement>, Failed> {
    let cuda = Cuda::open(0)?;
    let blocks = N / BLOCK;
    let x = [cuda.upload(&weight())?, cuda.upload(&weight())?];
    let mut packed = cuda.zeros(N / 2)?;
    let (mut absmax, mut codes) = (cuda.zeros(blocks)?, cuda.zeros(blocks)?);
    let (mut nested_absmax, mut offset) = (cuda.zeros(blocks.div_ceil(NESTED_BLOCK))?, cuda.zeros(1)?);
    let mut scratch = cuda.zeros(ops::DOUBLE_QUANTIZE_SCRATCH)?;
    let bytes = 2 * N + N / 2 + blocks;
    measure(&cuda, test_mode, "nf4_quantize, double, from bf16", bytes, |i| {
        let (packed, x) = (packed.view_mut(), Source::Bf16(x[i % 2].view()));
        ops::nf4_quantize(&cuda, Nf4Quantize { packed, absmax: absmax.view_mut(), x, quant_type: QuantType::Nf4 })?;
        let (codes, nested_absmax, offset) = (codes.view_mut(), nested_absmax.view_mut(), offset.view_mut());
        let (scratch, absmax) = (scratch.view_mut(), absmax.view());
        ops::nf4_double_quantize(&cuda, Nf4DoubleQuantize { codes, nested_absmax, offset, scratch, absmax })
    })
}

fn dequantize(test_mode: bool) -> Result<Option<Measurement>, Failed> {
    let cuda = Cuda::open(0)?;
    let blocks = N / BLOCK;
    let byte = |i: usize| ((i as u32).wrapping_mul(0x9e37_79b9) >> 13) as u8;
    let packed: Vec<u8> = (0..N / 2).map(byte).collect();
    let packed = [cuda.upload(&packed)?, cuda.upload(&packed)?];
    let codes: Vec<u8> = (0..blocks).map(byte).collect();
    let codes = [cuda.upload(&codes)?, cuda.upload(&codes)?];
    let nested_absmax = cuda.upload(&vec![0.01f32; blocks.div_ceil(NESTED_BLOCK)])?;
    let offset = cuda.upload(&[0.02f32])?;
    let mut out = [cuda.zeros::<bf16>(N)?, cuda.zeros::<bf16>(N)?];
    let bytes = N / 2 + blocks + 4 * blocks.div_ceil(NESTED_BLOCK) + 2 * N;
    measure(&cuda, test_mode, "nf4_dequantize, double, to bf16", bytes, |i| {
        let absmax =
            Absmax::Double { codes: codes[i % 2].view(), nested_absmax: nested_absmax.view(), offset: offset.view() };
        let (out, packed) = (Output::Bf16(out[i % 2].view_mut()), packed[i % 2].view());
        ops::nf4_dequantize(&cuda, Nf4Dequantize { out, packed, absmax, quant_type: QuantType::Nf4 })
    })
}
