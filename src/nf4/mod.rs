//! 4-bit block quantisation as bitsandbytes does it: NF4 and FP4 code books, blocks of 64, double quantisation.

pub mod codebook;
mod dequantize;
mod quantize;
pub mod serialize;
#[cfg(test)]
mod tests;

pub use quantize::quantize;

use crate::tensor::Dtype;

/// Elements that share one absmax, along the flattened row-major tensor.
pub const BLOCK: usize = 64;
/// Absmax values that share one nested absmax under double quantisation.
pub const NESTED_BLOCK: usize = 256;

/// The 16-value code book, by its bitsandbytes name (`bnb_4bit_quant_type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum QuantType {
    Nf4,
    Fp4,
}

/// How to put 16/32-bit projections into 4 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QuantConfig {
    pub quant_type: QuantType,
    pub double_quant: bool,
}

/// One absmax per block of 64, as is or quantised again (`bnb_4bit_use_double_quant`).
#[derive(Clone, Debug, PartialEq)]
pub enum Absmax {
    /// f32, one per block.
    Plain(Vec<f32>),
    /// `absmax[i] = dynamic_code[codes[i]] * nested_absmax[i / 256] + offset`, a rounded product and a rounded sum.
    Double { codes: Vec<u8>, nested_absmax: Vec<f32>, offset: f32 },
}

/// A tensor in 4 bits. `packed` holds two elements a byte, the first in the high nibble.
#[derive(Clone, Debug, PartialEq)]
pub struct Quantized {
    pub quant_type: QuantType,
    pub shape: Vec<usize>,
    /// dtype of the tensor it was made from: what bitsandbytes dequantises to.
    pub source_dtype: Dtype,
    /// ceil(len / 2) bytes.
    pub packed: Vec<u8>,
    pub absmax: Absmax,
}

impl Quantized {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
