//! Frozen weight matrices: kept as the checkpoint has them, widened to f32 a slice of rows at a time.

use std::ops::Range;

use rayon::prelude::*;

use super::math::simd;
use crate::error::{Error, Result};
use crate::nf4::{BLOCK, Quantized};
use crate::tensor::{Dtype, HostMatrix, HostTensor};

/// Elements that are widened at a time: 4 MB of f32, which stay in the last-level cache until they are multiplied. Small in
/// unit tests, which so cross its border.
const SLICE: usize = if cfg!(test) { 1 << 12 } else { 1 << 20 };

/// Elements of one task of widening, whole blocks of 64.
const TASK: usize = 128 * BLOCK;

/// A frozen matrix (N, K).
#[derive(Debug)]
pub struct Matrix {
    pub(super) n: usize,
    pub(super) k: usize,
    data: Data,
}

#[derive(Debug)]
enum Data {
    /// f32, bf16 or f16; may lie in a mapped file.
    Dense(HostTensor),
    /// 4 bits, with the absmax of each block after double quantisation is undone.
    Quantized { q: Quantized, absmax: Vec<f32> },
}

impl Matrix {
    pub(super) fn new(w: &HostMatrix) -> Result<Self> {
        let shape = match w {
            HostMatrix::Dense(t) | HostMatrix::Quantize(t, _) => &t.shape,
            HostMatrix::Quantized(q) => &q.shape,
        };
        let &[n, k] = shape.as_slice() else {
            return Err(Error::Shape { op: "upload", argument: "w (dimensions)", found: shape.len(), expected: 2 });
        };
        let data = match w.clone().quantized()? {
            HostMatrix::Dense(t) | HostMatrix::Quantize(t, _) => Data::Dense(t),
            HostMatrix::Quantized(q) => Data::Quantized { absmax: q.decoded_absmax(), q },
        };
        Ok(Self { n, k, data })
    }

    /// Rows in each slice of a product over this matrix; a multiple of 64, so that slices start on whole blocks.
    pub(super) fn slice_rows(&self) -> usize {
        (SLICE / self.k.max(1)).next_multiple_of(BLOCK)
    }

    /// Rows `rows` in f32 into `out` (rows, K), by all threads.
    pub(super) fn widen(&self, rows: Range<usize>, out: &mut [f32]) {
        let start = rows.start * self.k;
        debug_assert_eq!(out.len(), rows.len() * self.k);
        out.par_chunks_mut(TASK).enumerate().for_each(|(i, out)| self.widen_range(start + i * TASK, out));
    }

    /// Elements `start .. start + out.len()` in f32, by this thread.
    pub(super) fn widen_range(&self, start: usize, out: &mut [f32]) {
        match &self.data {
            Data::Dense(t) if t.dtype == Dtype::Bf16 => {
                let bytes = &t.bytes()[2 * start..2 * (start + out.len())];
                simd(
                    #[inline(always)]
                    || {
                        for (out, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                            *out = f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16);
                        }
                    },
                );
            }
            Data::Dense(t) => t.widen(start, out),
            Data::Quantized { q, absmax } => q.dequantize_range_with(absmax, start, out),
        }
    }
}
