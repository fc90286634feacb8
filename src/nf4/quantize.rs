//! Encoding: absmax of each block, codes, packing, and the second quantisation of the absmax values.
//!
//! The rule that gives every byte of bitsandbytes: `s = x * (1 / absmax)` in f32, `code` = number of midpoints below `s`.
//! Work is split into runs of whole blocks, each written by one thread alone, and the offset is one sum in a fixed
//! order: the result does not depend on the number of threads.

use rayon::prelude::*;

use super::codebook::{Encoder, FP4_ENCODER, NF4_ENCODER, dynamic_code};
use super::{Absmax, BLOCK, NESTED_BLOCK, QuantType, Quantized};
use crate::tensor::HostTensor;

/// Blocks a task takes at a time: 64 Ki elements, so that reading, encoding and writing stay in the L2 cache.
const TASK: usize = 1024;

/// bitsandbytes divides by no less than this, so that a block of zeros gives zeros.
const SMALLEST_ABSMAX: f32 = 1e-38;

/// Quantise a tensor of any shape (blocks of 64 along the flattened elements). Multi-threaded, with the same result on
/// any number of threads. Values that are not finite are the caller's to refuse: here they only give meaningless codes.
pub fn quantize(source: &HostTensor, quant_type: QuantType, double_quant: bool) -> Quantized {
    let n = source.len();
    let mut packed = vec![0u8; n.div_ceil(2)];
    let mut absmax = vec![0f32; n.div_ceil(BLOCK)];
    let tasks = packed.par_chunks_mut(TASK * BLOCK / 2).zip(absmax.par_chunks_mut(TASK)).enumerate();
    tasks.for_each(|(task, (packed, absmax))| {
        let run = Run { source, start: task * TASK * BLOCK, packed, absmax };
        match quant_type {
            QuantType::Nf4 => pulp::Arch::new().dispatch(Encode::<true>(run)),
            QuantType::Fp4 => pulp::Arch::new().dispatch(Encode::<false>(run)),
        }
    });
    let absmax = if double_quant { quantize_absmax(&absmax) } else { Absmax::Plain(absmax) };
    Quantized { quant_type, shape: source.shape.clone(), source_dtype: source.dtype, packed, absmax }
}

/// A run of blocks of `source` from element `start` on, and where their codes and absmax go.
struct Run<'a> {
    source: &'a HostTensor,
    start: usize,
    packed: &'a mut [u8],
    absmax: &'a mut [f32],
}

struct Encode<'a, const IS_NF4: bool>(Run<'a>);

/// `dispatch` compiles `call` for the widest vectors that the processor has.
impl<const IS_NF4: bool> pulp::NullaryFnOnce for Encode<'_, IS_NF4> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Run { source, start, packed, absmax } = self.0;
        let encoder = if IS_NF4 { &NF4_ENCODER } else { &FP4_ENCODER };
        let n = source.len();
        // The elements behind the end are zeros: that gives the pad nibble of an odd size too (7 in NF4, 0 in FP4).
        let mut x = [0f32; BLOCK];
        for (i, (packed, absmax)) in packed.chunks_mut(BLOCK / 2).zip(absmax).enumerate() {
            let first = start + i * BLOCK;
            let count = BLOCK.min(n - first);
            x[count..].fill(0.0);
            source.widen(first, &mut x[..count]);
            let (m, bytes) = encode_block(&x, encoder);
            *absmax = m;
            packed.copy_from_slice(&bytes[..packed.len()]);
        }
    }
}

/// The absmax of a block, and its codes packed two to a byte.
#[inline(always)]
fn encode_block(x: &[f32; BLOCK], encoder: &Encoder) -> (f32, [u8; BLOCK / 2]) {
    // Magnitudes compare as integers do, and a maximum of integers vectorises.
    let mut bits = 0;
    for v in x {
        bits = bits.max(v.to_bits() & 0x7fff_ffff);
    }
    let absmax = f32::from_bits(bits);
    let inverse = 1.0 / absmax.max(SMALLEST_ABSMAX);
    let mut codes = [0i32; BLOCK];
    for (code, v) in codes.iter_mut().zip(x) {
        let s = v * inverse;
        *code = encoder.first;
        for (midpoint, step) in encoder.midpoints.iter().zip(&encoder.steps) {
            *code += if s > *midpoint { *step } else { 0 };
        }
    }
    let mut packed = [0u8; BLOCK / 2];
    for (byte, pair) in packed.iter_mut().zip(codes.chunks_exact(2)) {
        *byte = (pair[0] << 4 | pair[1]) as u8;
    }
    (absmax, packed)
}

/// Double quantisation: absmax less its mean, in the 8-bit dynamic code, one f32 scale for each 256.
pub(super) fn quantize_absmax(absmax: &[f32]) -> Absmax {
    let sum: f64 = absmax.iter().map(|&a| f64::from(a)).sum();
    let offset = if absmax.is_empty() { 0.0 } else { (sum / absmax.len() as f64) as f32 };
    let mut codes = vec![0u8; absmax.len()];
    let mut nested_absmax = vec![0f32; absmax.len().div_ceil(NESTED_BLOCK)];
    let groups = absmax.par_chunks(NESTED_BLOCK).zip(codes.par_chunks_mut(NESTED_BLOCK)).zip(&mut nested_absmax);
    groups.for_each(|((absmax, codes), nested)| {
        *nested = absmax.iter().fold(0f32, |m, a| m.max((a - offset).abs()));
        let inverse = 1.0 / nested.max(SMALLEST_ABSMAX);
        for (code, a) in codes.iter_mut().zip(absmax) {
            *code = dynamic_code((a - offset) * inverse);
        }
    });
    Absmax::Double { codes, nested_absmax, offset }
}
