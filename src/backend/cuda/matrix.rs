//! Frozen weight matrices in device memory, in the form that the checkpoint gave them.

use half::bf16;

use super::Cuda;
use super::memory::{ALIGNMENT, Buffer, View, ViewMut};
use super::ops::nf4::{self, Nf4Dequantize, Output};
use crate::error::{Error, Result};
use crate::nf4::QuantType;

/// A frozen matrix (N, K), row-major.
pub struct Matrix {
    pub n: usize,
    pub k: usize,
    pub data: Data,
}

/// What a [`Matrix`] is made of.
#[expect(clippy::large_enum_variant, reason = "a few hundred in a model")]
pub enum Data {
    /// (N, K)
    Bf16(Buffer<bf16>),
    /// Blocks of 64 along the flattened matrix.
    Nf4 {
        /// (ceil(N*K / 2))
        packed: Buffer<u8>,
        absmax: Absmax,
        quant_type: QuantType,
    },
}

/// Absmax of each block of 64, as is or quantised again.
pub enum Absmax {
    /// (blocks)
    Plain(Buffer<f32>),
    Double {
        /// (blocks)
        codes: Buffer<u8>,
        /// (ceil(blocks / 256))
        nested_absmax: Buffer<f32>,
        /// (1)
        offset: Buffer<f32>,
    },
}

impl Absmax {
    /// To read, as the ops take it.
    pub fn view(&self) -> nf4::Absmax<'_> {
        match self {
            Self::Plain(absmax) => nf4::Absmax::Plain(absmax.view()),
            Self::Double { codes, nested_absmax, offset } => {
                nf4::Absmax::Double { codes: codes.view(), nested_absmax: nested_absmax.view(), offset: offset.view() }
            }
        }
    }
}

impl Matrix {
    /// N*K.
    pub fn len(&self) -> usize {
        self.n * self.k
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Device memory that its buffers take.
    pub fn bytes(&self) -> usize {
        let sizes = match &self.data {
            Data::Bf16(w) => [2 * w.len(), 0, 0, 0],
            Data::Nf4 { packed, absmax: Absmax::Plain(absmax), .. } => [packed.len(), 4 * absmax.len(), 0, 0],
            Data::Nf4 { packed, absmax: Absmax::Double { codes, nested_absmax, offset }, .. } => {
                [packed.len(), codes.len(), 4 * nested_absmax.len(), 4 * offset.len()]
            }
        };
        sizes.into_iter().map(|bytes| bytes.next_multiple_of(ALIGNMENT)).sum()
    }

    /// Whether it is in 4 bits.
    pub fn is_quantized(&self) -> bool {
        matches!(self.data, Data::Nf4 { .. })
    }

    /// The elements, if it is in 16 bits.
    pub fn dense(&self) -> Option<View<'_, bf16>> {
        match &self.data {
            Data::Bf16(w) => Some(w.view()),
            Data::Nf4 { .. } => None,
        }
    }
}

/// The (N, K) of a tensor. [`Error::Shape`] unless it has two dimensions.
pub(super) fn dims(shape: &[usize]) -> Result<(usize, usize)> {
    match *shape {
        [n, k] => Ok((n, k)),
        _ => Err(Error::Shape { op: "upload", argument: "w (dimensions)", found: shape.len(), expected: 2 }),
    }
}

impl Cuda {
    /// out (N*K or more) = the matrix in bf16.
    pub fn widen_matrix(&self, out: ViewMut<bf16>, w: &Matrix) -> Result<()> {
        if out.len() < w.len() {
            return Err(Error::Shape { op: "nf4_dequantize", argument: "out", found: out.len(), expected: w.len() });
        }
        let out = out.into_range(0..w.len());
        match &w.data {
            Data::Bf16(dense) => self.copy(out, dense.range(0..w.len())),
            Data::Nf4 { packed, absmax, quant_type } => {
                let (packed, absmax, quant_type) = (packed.view(), absmax.view(), *quant_type);
                nf4::nf4_dequantize(self, Nf4Dequantize { out: Output::Bf16(out), packed, absmax, quant_type })
            }
        }
    }
}
