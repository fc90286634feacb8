//! rope: each pair (x_i, x_{i+D/2}) of a query or key head turned by positions[t] * inv_freq[i].

use rayon::prelude::*;

use super::math::simd;
use super::{Cpu, at_least, check_heads, rows_per_task};
use crate::backend::Rope;
use crate::error::Result;

/// Sines and cosines of the last call. A step asks for the same ones in every layer, forward and backward.
#[derive(Default)]
pub(super) struct Table {
    positions: Vec<i32>,
    inv_freq: Vec<f32>,
    /// (T, 2, D/2): cosines, then sines.
    cos_sin: Vec<f32>,
}

impl Table {
    fn fill(&mut self, positions: &[i32], inv_freq: &[f32]) -> &[f32] {
        let half = inv_freq.len();
        // A NaN frequency is unequal to itself and only costs the cache.
        if self.positions != positions || self.inv_freq != inv_freq {
            self.positions.clear();
            self.positions.extend_from_slice(positions);
            self.inv_freq.clear();
            self.inv_freq.extend_from_slice(inv_freq);
            self.cos_sin.resize(positions.len() * 2 * half, 0.0);
            self.cos_sin.par_chunks_exact_mut((2 * half).max(1)).zip(positions).with_min_len(16).for_each(
                |(row, p)| {
                    let (cos, sin) = row.split_at_mut(half);
                    for i in 0..half {
                        let angle = *p as f32 * inv_freq[i];
                        (sin[i], cos[i]) = angle.sin_cos();
                    }
                },
            );
        }
        &self.cos_sin
    }
}

/// `sign` 1 turns forward, -1 back.
pub(super) fn rotate(op: &'static str, table: &mut Table, a: Rope<Cpu>, sign: f32) -> Result<()> {
    let (t, heads, half) = (a.t, a.heads, a.heads.d / 2);
    check_heads(op, heads)?;
    let width = heads.qkv();
    at_least(op, "qkv", a.qkv.len(), t * width)?;
    at_least(op, "positions", a.positions.len(), t)?;
    at_least(op, "inv_freq", a.inv_freq.len(), half)?;
    if half == 0 || t == 0 {
        return Ok(());
    }
    let table = table.fill(&a.positions[..t], &a.inv_freq[..half]);
    let rows = rows_per_task(width);
    let tasks = a.qkv[..t * width].par_chunks_mut(rows * width).zip(table.par_chunks(rows * 2 * half));
    tasks.for_each(|(qkv, table)| {
        simd(
            #[inline(always)]
            || {
                for (row, angles) in qkv.chunks_exact_mut(width).zip(table.chunks_exact(2 * half)) {
                    let (cos, sin) = angles.split_at(half);
                    for head in row[..(heads.h + heads.g) * heads.d].chunks_exact_mut(heads.d) {
                        let (x0, x1) = head.split_at_mut(half);
                        for i in 0..half {
                            let (c, s) = (cos[i], sign * sin[i]);
                            let (p, q) = (x0[i], x1[i]);
                            x0[i] = p * c - q * s;
                            x1[i] = q * c + p * s;
                        }
                    }
                }
            },
        );
    });
    Ok(())
}
