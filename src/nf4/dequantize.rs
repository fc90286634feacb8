//! Decoding: `value = code_book[code] * absmax[i / 64]`, one rounded f32 product.
//!
//! A byte holds two elements, so a table of 256 pairs gives both at one look-up. Ranges are decoded by the calling
//! thread alone, for callers that split the work themselves; [`Quantized::dequantize`] uses all threads.

use rayon::prelude::*;

use super::codebook::DYNAMIC;
use super::{Absmax, BLOCK, NESTED_BLOCK, Quantized};

impl Absmax {
    /// Number of blocks.
    pub fn len(&self) -> usize {
        match self {
            Self::Plain(values) => values.len(),
            Self::Double { codes, .. } => codes.len(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The absmax of block `i`. It can be negative under double quantisation: that is what the format says.
    #[inline(always)]
    pub fn get(&self, i: usize) -> f32 {
        match self {
            Self::Plain(values) => values[i],
            // A rounded product and a rounded sum: rustc never fuses the two, and a fused one would differ.
            Self::Double { codes, nested_absmax, offset } => {
                DYNAMIC[usize::from(codes[i])] * nested_absmax[i / NESTED_BLOCK] + offset
            }
        }
    }
}

impl Quantized {
    /// All elements in f32, row-major. Bit-exact with bitsandbytes' float32 dequantisation. Multi-threaded.
    pub fn dequantize(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.len()];
        let run = 1024 * BLOCK;
        out.par_chunks_mut(run).enumerate().for_each(|(i, out)| self.dequantize_range(i * run, out));
        out
    }

    /// (ceil(len / 64)) absmax of each block, double quantisation undone.
    pub fn decoded_absmax(&self) -> Vec<f32> {
        (0..self.absmax.len()).map(|i| self.absmax.get(i)).collect()
    }

    /// Rows `first .. first + rows` of a matrix (N, K) into `out` (rows, K). Single-threaded.
    /// Panics if `self` is not a matrix, or on rows that it does not have: the caller has checked.
    pub fn dequantize_rows(&self, first: usize, rows: usize, out: &mut [f32]) {
        assert_eq!(self.shape.len(), 2, "a matrix has two dimensions");
        assert_eq!(out.len(), rows * self.shape[1], "rows of the output");
        self.dequantize_range(first * self.shape[1], out);
    }

    /// Elements `start .. start + out.len()` of the flattened tensor. Single-threaded. Panics if they end behind the last.
    pub fn dequantize_range(&self, start: usize, out: &mut [f32]) {
        match &self.absmax {
            Absmax::Plain(absmax) => self.decode(start, out, |i| absmax[i]),
            double => self.decode(start, out, |i| double.get(i)),
        }
    }

    /// The same with absmax values decoded before, by [`Quantized::decoded_absmax`].
    pub fn dequantize_range_with(&self, absmax: &[f32], start: usize, out: &mut [f32]) {
        self.decode(start, out, |i| absmax[i]);
    }

    #[inline(always)]
    fn decode(&self, start: usize, out: &mut [f32], absmax: impl Fn(usize) -> f32) {
        let end = start + out.len();
        assert!(end <= self.len(), "elements {start}..{end} of {}", self.len());
        // Up to the first block border, then whole blocks, then what is left.
        let head = out.len().min(start.next_multiple_of(BLOCK) - start);
        let (head, rest) = out.split_at_mut(head);
        self.decode_part(start, head, &absmax);
        let first = (start + head.len()) / BLOCK;
        let pairs = self.quant_type.pairs();
        let mut blocks = rest.chunks_exact_mut(BLOCK);
        let packed = self.packed[first * BLOCK / 2..].chunks_exact(BLOCK / 2);
        for (i, (out, bytes)) in (&mut blocks).zip(packed).enumerate() {
            let absmax = absmax(first + i);
            for (out, &byte) in out.chunks_exact_mut(2).zip(bytes) {
                let [a, b] = pairs[usize::from(byte)];
                out[0] = a * absmax;
                out[1] = b * absmax;
            }
        }
        let tail = blocks.into_remainder();
        self.decode_part(end - tail.len(), tail, &absmax);
    }

    /// Elements of one block, one by one.
    fn decode_part(&self, start: usize, out: &mut [f32], absmax: impl Fn(usize) -> f32) {
        if out.is_empty() {
            return;
        }
        let absmax = absmax(start / BLOCK);
        let code_book = self.quant_type.code_book();
        for (i, out) in (start..).zip(out) {
            let code = self.packed[i / 2] >> (4 * (1 - i % 2)) & 15;
            *out = code_book[usize::from(code)] * absmax;
        }
    }
}
