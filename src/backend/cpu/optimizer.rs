//! grad_norm and adamw over the flat vector of trainable weights.

use rayon::prelude::*;

use super::math::{dot, simd};
use super::{Cpu, Scratch, TASK, at_least, exactly, grown};
use crate::backend::Adamw;
use crate::error::{Error, Result};

/// Elements whose squares are summed in f32 before they join a sum in f64.
const RUN: usize = 256;

pub(super) fn grad_norm(s: &mut Scratch, norm: &mut [f32], grads: &[f32]) -> Result<()> {
    at_least("grad_norm", "norm", norm.len(), 1)?;
    let sums = grown(&mut s.sums, grads.len().div_ceil(TASK));
    sums.par_iter_mut().zip(grads.par_chunks(TASK)).for_each(|(sum, g)| {
        *sum = simd(
            #[inline(always)]
            || {
                let mut sum = 0.0f64;
                for g in g.chunks(RUN) {
                    sum += f64::from(dot(g, g));
                }
                sum
            },
        );
    });
    norm[0] = sums.iter().sum::<f64>().sqrt() as f32;
    Ok(())
}

pub(super) fn adamw(a: Adamw<Cpu>) -> Result<()> {
    let op = "adamw";
    let p = a.state.master.len();
    exactly(op, "m", a.state.m.len(), p)?;
    exactly(op, "v", a.state.v.len(), p)?;
    at_least(op, "lora", a.lora.len(), p)?;
    at_least(op, "grads", a.grads.len(), p)?;
    at_least(op, "norm", a.norm.len(), 1)?;
    at_least(op, "step", a.step as usize, 1)?;
    exactly(op, "groups (weights covered)", a.groups.iter().map(|g| g.range.len()).sum(), p)?;
    for (i, g) in a.groups.iter().enumerate() {
        at_least(op, "groups (end)", p, g.range.end)?;
        if a.groups[..i].iter().any(|o| o.range.start < g.range.end && g.range.start < o.range.end) {
            return Err(Error::Shape { op, argument: "groups (overlap)", found: g.range.start, expected: g.range.end });
        }
    }
    let norm = a.norm[0];
    if !norm.is_finite() {
        return Ok(());
    }
    let clip = if a.max_grad_norm > 0.0 { (a.max_grad_norm / (norm + 1e-6)).min(1.0) } else { 1.0 };
    let (b1, b2, eps) = (a.beta1, a.beta2, a.eps);
    // In f64, as PyTorch does it on the host: 1 - b2^t loses digits in f32.
    let power = |b: f32| 1.0 - f64::from(b).powf(a.step as f64);
    let (bias1, bias2_root) = (power(b1), power(b2).sqrt() as f32);
    for group in a.groups {
        let at = group.range.clone();
        let decay = (1.0 - f64::from(group.lr) * f64::from(group.weight_decay)) as f32;
        let rate = (f64::from(group.lr) / bias1) as f32;
        let tasks = (a.state.master[at.clone()].par_chunks_mut(TASK))
            .zip(a.state.m[at.clone()].par_chunks_mut(TASK))
            .zip(a.state.v[at.clone()].par_chunks_mut(TASK))
            .zip(a.lora[at.clone()].par_chunks_mut(TASK))
            .zip(a.grads[at].par_chunks(TASK));
        tasks.for_each(|((((w, m), v), working), g)| {
            simd(
                #[inline(always)]
                || {
                    for i in 0..w.len() {
                        let g = g[i] * clip;
                        m[i] = b1 * m[i] + (1.0 - b1) * g;
                        v[i] = b2 * v[i] + (1.0 - b2) * g * g;
                        w[i] = w[i] * decay - rate * (m[i] / (v[i].sqrt() / bias2_root + eps));
                        working[i] = w[i];
                    }
                },
            );
        });
    }
    Ok(())
}
