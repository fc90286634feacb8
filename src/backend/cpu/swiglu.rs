//! swiglu: y = silu(gate) * up.

use rayon::prelude::*;

use super::math::{sigmoid, simd};
use super::{Cpu, at_least, rows_per_task};
use crate::backend::{SwigluBackward, SwigluForward};
use crate::error::Result;

pub(super) fn forward(a: SwigluForward<Cpu>) -> Result<()> {
    let (t, f) = (a.t, a.f);
    at_least("swiglu_forward", "f", f, 1)?;
    at_least("swiglu_forward", "y", a.y.len(), t * f)?;
    at_least("swiglu_forward", "gate_up", a.gate_up.len(), t * 2 * f)?;
    let rows = rows_per_task(f);
    let tasks = a.y[..t * f].par_chunks_mut(rows * f).zip(a.gate_up[..t * 2 * f].par_chunks(rows * 2 * f));
    tasks.for_each(|(y, gate_up)| {
        simd(
            #[inline(always)]
            || {
                for (y, gate_up) in y.chunks_exact_mut(f).zip(gate_up.chunks_exact(2 * f)) {
                    let (gate, up) = gate_up.split_at(f);
                    for ((y, g), u) in y.iter_mut().zip(gate).zip(up) {
                        *y = g * sigmoid(*g) * u;
                    }
                }
            },
        );
    });
    Ok(())
}

pub(super) fn backward(a: SwigluBackward<Cpu>) -> Result<()> {
    let (t, f) = (a.t, a.f);
    at_least("swiglu_backward", "f", f, 1)?;
    at_least("swiglu_backward", "gate_up", a.gate_up.len(), t * 2 * f)?;
    at_least("swiglu_backward", "dy", a.dy.len(), t * f)?;
    let rows = rows_per_task(f);
    let tasks = a.gate_up[..t * 2 * f].par_chunks_mut(rows * 2 * f).zip(a.dy[..t * f].par_chunks(rows * f));
    tasks.for_each(|(gate_up, dy)| {
        simd(
            #[inline(always)]
            || {
                for (gate_up, dy) in gate_up.chunks_exact_mut(2 * f).zip(dy.chunks_exact(f)) {
                    let (gate, up) = gate_up.split_at_mut(f);
                    for ((g, u), dy) in gate.iter_mut().zip(up).zip(dy) {
                        let (gate, up) = (*g, *u);
                        let s = sigmoid(gate);
                        // silu'(g) = s + g s (1 - s)
                        *g = dy * up * s * (1.0 + gate * (1.0 - s));
                        *u = dy * gate * s;
                    }
                }
            },
        );
    });
    Ok(())
}
