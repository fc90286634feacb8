//! grad_norm and adamw over the flat vector of trainable weights.

use rayon::prelude::*;

use super::math::{dot, simd};
use super::{Cpu, Scratch, TASK, at_least, exactly, grown};
use crate::backend::adamw::{Blocks, M_ZERO, MOMENT_BLOCK, StepFactors, sorted_groups};
use crate::backend::{Adamw, Moment, NewOptimizer, OptimizerState};
use crate::error::{Error, Result};
use crate::nf4::codebook::{DYNAMIC, DYNAMIC_UNSIGNED, dynamic_code, dynamic_unsigned_code};

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

/// Master weights and moments, and how the weights fall into blocks of 8-bit moments.
#[derive(Debug)]
pub struct Optimizer {
    pub(super) state: OptimizerState,
    blocks: Blocks,
}

impl Optimizer {
    pub(super) fn new(of: NewOptimizer) -> Result<Self> {
        Ok(Self { state: OptimizerState::new(of)?, blocks: Blocks::new(of.init.len(), of.tensors)? })
    }
}

/// What all weights of a step share.
#[derive(Clone, Copy)]
struct Factors {
    clip: f32,
    b1: f32,
    b2: f32,
    eps: f32,
    bias2_root: f32,
}

impl Factors {
    /// The new moments of a weight with gradient `g`.
    #[inline(always)]
    fn moments(&self, m: f32, v: f32, g: f32) -> (f32, f32) {
        let g = g * self.clip;
        (self.b1 * m + (1.0 - self.b1) * g, self.b2 * v + (1.0 - self.b2) * g * g)
    }

    /// The new value of a weight.
    #[inline(always)]
    fn update(&self, w: f32, m: f32, v: f32, decay: f32, rate: f32) -> f32 {
        w * decay - rate * (m / (v.sqrt() / self.bias2_root + self.eps))
    }
}

/// A parameter group: its first weight, what its weights are multiplied by, and the factor of their update.
struct Group {
    start: usize,
    decay: f32,
    rate: f32,
}

pub(super) fn adamw(a: Adamw<Cpu>) -> Result<()> {
    let op = "adamw";
    let OptimizerState { master, m, v } = &mut a.state.state;
    let p = master.len();
    at_least(op, "lora", a.lora.len(), p)?;
    at_least(op, "grads", a.grads.len(), p)?;
    at_least(op, "norm", a.norm.len(), 1)?;
    at_least(op, "step", a.step as usize, 1)?;
    let sorted = sorted_groups(a.groups, p)?;
    let norm = a.norm[0];
    if !norm.is_finite() {
        return Ok(());
    }
    let step = StepFactors::new(a.beta1, a.beta2, a.step);
    let factors = Factors {
        clip: if a.max_grad_norm > 0.0 { (a.max_grad_norm / (norm + 1e-6)).min(1.0) } else { 1.0 },
        b1: a.beta1,
        b2: a.beta2,
        eps: a.eps,
        bias2_root: step.bias2_root,
    };
    let groups: Vec<Group> = (sorted.iter())
        .map(|g| {
            let (decay, rate) = step.of_group(g);
            Group { start: g.range.start, decay, rate }
        })
        .collect();
    let (lora, grads) = (&mut a.lora[..p], &a.grads[..p]);
    match (m, v) {
        (Moment::F32(m), Moment::F32(v)) => {
            exactly(op, "m", m.len(), p)?;
            exactly(op, "v", v.len(), p)?;
            in_32_bits(factors, &groups, master, [m, v], lora, grads);
        }
        (Moment::U8 { codes: m, absmax: m_absmax }, Moment::U8 { codes: v, absmax: v_absmax }) => {
            exactly(op, "m", m.len(), p)?;
            exactly(op, "v", v.len(), p)?;
            exactly(op, "m.absmax", m_absmax.len(), a.state.blocks.count())?;
            exactly(op, "v.absmax", v_absmax.len(), a.state.blocks.count())?;
            let starts = a.state.blocks.starts();
            for (tensor, &(start, first)) in starts.iter().enumerate() {
                let (end, last) = starts.get(tensor + 1).map_or((p, a.state.blocks.count()), |&next| next);
                let (at, blocks) = (start..end, first..last);
                let tasks = (master[at.clone()].par_chunks_mut(MOMENT_BLOCK))
                    .zip(m[at.clone()].par_chunks_mut(MOMENT_BLOCK).zip(&mut m_absmax[blocks.clone()]))
                    .zip(v[at.clone()].par_chunks_mut(MOMENT_BLOCK).zip(&mut v_absmax[blocks]))
                    .zip(lora[at.clone()].par_chunks_mut(MOMENT_BLOCK))
                    .zip(grads[at].par_chunks(MOMENT_BLOCK))
                    .enumerate();
                tasks.for_each(|(block, ((((w, m), v), working), g))| {
                    in_8_bits(factors, &groups, start + block * MOMENT_BLOCK, w, m, v, working, g);
                });
            }
        }
        _ => return Err(Error::Shape { op, argument: "moments (bits)", found: 8, expected: 32 }),
    }
    Ok(())
}

fn in_32_bits(
    f: Factors,
    groups: &[Group],
    master: &mut [f32],
    [m, v]: [&mut [f32]; 2],
    lora: &mut [f32],
    grads: &[f32],
) {
    for (i, group) in groups.iter().enumerate() {
        let at = group.start..groups.get(i + 1).map_or(master.len(), |next| next.start);
        let tasks = (master[at.clone()].par_chunks_mut(TASK))
            .zip(m[at.clone()].par_chunks_mut(TASK))
            .zip(v[at.clone()].par_chunks_mut(TASK))
            .zip(lora[at.clone()].par_chunks_mut(TASK))
            .zip(grads[at].par_chunks(TASK));
        tasks.for_each(|((((w, m), v), working), g)| {
            simd(
                #[inline(always)]
                || {
                    for i in 0..w.len() {
                        (m[i], v[i]) = f.moments(m[i], v[i], g[i]);
                        w[i] = f.update(w[i], m[i], v[i], group.decay, group.rate);
                        working[i] = w[i];
                    }
                },
            );
        });
    }
}

/// One block, whose first weight is `start`. The weights are updated by the new moments before these are rounded to 8 bits.
#[expect(clippy::too_many_arguments, reason = "the slices of one block")]
fn in_8_bits(
    f: Factors,
    groups: &[Group],
    start: usize,
    w: &mut [f32],
    (m, m_absmax): (&mut [u8], &mut f32),
    (v, v_absmax): (&mut [u8], &mut f32),
    working: &mut [f32],
    g: &[f32],
) {
    let (mut new_m, mut new_v) = ([0f32; MOMENT_BLOCK], [0f32; MOMENT_BLOCK]);
    let mut group = groups.partition_point(|g| g.start <= start) - 1;
    for i in 0..w.len() {
        while groups.get(group + 1).is_some_and(|next| next.start <= start + i) {
            group += 1;
        }
        let (decay, rate) = (groups[group].decay, groups[group].rate);
        let old = (DYNAMIC[usize::from(m[i])] * *m_absmax, DYNAMIC_UNSIGNED[usize::from(v[i])] * *v_absmax);
        (new_m[i], new_v[i]) = f.moments(old.0, old.1, g[i]);
        w[i] = f.update(w[i], new_m[i], new_v[i], decay, rate);
        working[i] = w[i];
    }
    let largest = |x: &[f32]| x.iter().fold(0f32, |most, x| most.max(x.abs()));
    (*m_absmax, *v_absmax) = (largest(&new_m), largest(&new_v));
    let share = |x: f32, of: f32| if of > 0.0 { x / of } else { 0.0 };
    for i in 0..w.len() {
        m[i] = signed_code(share(new_m[i], *m_absmax));
        v[i] = dynamic_unsigned_code(share(new_v[i], *v_absmax));
    }
}

/// What is negative keeps its sign, as in bitsandbytes: it never becomes the code of 0.
fn signed_code(s: f32) -> u8 {
    let code = dynamic_code(s);
    if code == M_ZERO && s < 0.0 { code - 1 } else { code }
}
