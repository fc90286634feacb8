//! nf4_quantize and nf4_dequantize on a 14336 x 4096 weight, double-quantised; two sets of buffers alternate.

use half::bf16;
use halfbyte::Error;
use halfbyte::backend::cuda::ops::nf4::{
    self as ops, Absmax, Nf4Dequantize, Nf4DoubleQuantize, Nf4Quantize, Output, Source,
};
use halfbyte::nf4::{BLOCK, NESTED_BLOCK, QuantType};
use libtest_mimic::Trial;

use super::{Bench, C, F, Row, bench};

const N: usize = F * C;
const SHAPE: &str = "14336x4096 double bf16";

pub fn trials() -> Vec<Trial> {
    vec![bench("nf4_dequantize", dequantize), bench("nf4_quantize", quantize)]
}

fn quantize(b: &mut Bench) -> Result<(), Error> {
    let blocks = N / BLOCK;
    let x = [b.activations(N, 0.02)?, b.activations(N, 0.02)?];
    let mut packed = b.cuda.zeros(N / 2)?;
    let (mut absmax, mut codes) = (b.cuda.zeros(blocks)?, b.cuda.zeros(blocks)?);
    let (mut nested_absmax, mut offset) = (b.cuda.zeros(blocks.div_ceil(NESTED_BLOCK))?, b.cuda.zeros(1)?);
    let mut scratch = b.cuda.zeros(ops::DOUBLE_QUANTIZE_SCRATCH)?;
    let bytes = 2 * N + N / 2 + blocks;
    let row = Row { op: "nf4_quantize", shape: SHAPE, implementation: "own", bytes, flops: 0.0 };
    b.row(row, |cuda, i| {
        let (packed, x) = (packed.view_mut(), Source::Bf16(x[i % 2].view()));
        ops::nf4_quantize(cuda, Nf4Quantize { packed, absmax: absmax.view_mut(), x, quant_type: QuantType::Nf4 })?;
        let (codes, nested_absmax, offset) = (codes.view_mut(), nested_absmax.view_mut(), offset.view_mut());
        let (scratch, absmax) = (scratch.view_mut(), absmax.view());
        ops::nf4_double_quantize(cuda, Nf4DoubleQuantize { codes, nested_absmax, offset, scratch, absmax })
    })
}

fn dequantize(b: &mut Bench) -> Result<(), Error> {
    let blocks = N / BLOCK;
    let packed = [b.bytes(N / 2)?, b.bytes(N / 2)?];
    let codes = [b.bytes(blocks)?, b.bytes(blocks)?];
    let nested_absmax = b.cuda.upload(&vec![0.01f32; blocks.div_ceil(NESTED_BLOCK)])?;
    let offset = b.cuda.upload(&[0.02f32])?;
    let mut out = [b.cuda.zeros::<bf16>(N)?, b.cuda.zeros::<bf16>(N)?];
    let bytes = N / 2 + blocks + 4 * blocks.div_ceil(NESTED_BLOCK) + 2 * N;
    let row = Row { op: "nf4_dequantize", shape: SHAPE, implementation: "own", bytes, flops: 0.0 };
    b.row(row, |cuda, i| {
        let (codes, nested_absmax) = (codes[i % 2].view(), nested_absmax.view());
        let absmax = Absmax::Double { codes, nested_absmax, offset: offset.view() };
        let (out, packed) = (Output::Bf16(out[i % 2].view_mut()), packed[i % 2].view());
        ops::nf4_dequantize(cuda, Nf4Dequantize { out, packed, absmax, quant_type: QuantType::Nf4 })
    })
}
