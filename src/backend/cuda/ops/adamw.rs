//! csrc/adamw.cu behind checks.

use std::ops::Range;

use half::bf16;

pub use super::ffi::adamw::{Group, Tensor};
use super::{at_least, exactly, ffi};
use crate::backend::cuda::Cuda;
use crate::backend::cuda::memory::{View, ViewMut};
use crate::error::{Error, Result};

/// The window of [`Adamw32bit`] begins at a multiple of this.
pub const WINDOW_ALIGN: usize = 4;

/// What an update needs besides the state.
pub struct Factors<'a> {
    /// (P)
    pub grads: View<'a, f32>,
    /// (1) of grad_norm
    pub norm: View<'a, f32>,
    /// Sorted by start, the first at 0.
    pub groups: View<'a, Group>,
    pub beta1: f32,
    pub beta2: f32,
    pub eps: f32,
    /// sqrt(1 - beta2^step)
    pub bias2_root: f32,
    /// <= 0: no clipping
    pub max_grad_norm: f32,
}

/// An update of weights `window` of all P, with moments in f32.
pub struct Adamw32bit<'a> {
    /// (P) in place
    pub master: ViewMut<'a, f32>,
    /// (P) in place
    pub m: ViewMut<'a, f32>,
    /// (P) in place
    pub v: ViewMut<'a, f32>,
    /// (P) = master, rounded
    pub lora: ViewMut<'a, bf16>,
    pub factors: Factors<'a>,
    pub window: Range<usize>,
}

/// An update of blocks `window` of all, with moments in 8 bits.
pub struct Adamw8bit<'a> {
    /// (P) in place
    pub master: ViewMut<'a, f32>,
    /// (P) codes, in place
    pub m: ViewMut<'a, u8>,
    pub v: ViewMut<'a, u8>,
    /// (blocks) in place
    pub m_absmax: ViewMut<'a, f32>,
    pub v_absmax: ViewMut<'a, f32>,
    /// (P) = master, rounded
    pub lora: ViewMut<'a, bf16>,
    pub factors: Factors<'a>,
    /// First weight and first block of each tensor, by `Blocks::starts`.
    pub tensors: View<'a, Tensor>,
    pub window: Range<usize>,
}

fn factors(cuda: &Cuda, op: &'static str, f: &Factors, p: usize) -> Result<(*const f32, ffi::adamw::Factors)> {
    at_least(op, "grads", f.grads.len(), p)?;
    at_least(op, "norm", f.norm.len(), 1)?;
    at_least(op, "groups", f.groups.len(), 1)?;
    let factors = ffi::adamw::Factors {
        norm: cuda.ptr(&f.norm)?,
        groups: cuda.ptr(&f.groups)?,
        group_count: f.groups.len() as u32,
        beta1: f.beta1,
        beta2: f.beta2,
        eps: f.eps,
        bias2_root: f.bias2_root,
        max_grad_norm: f.max_grad_norm,
    };
    Ok((cuda.ptr(&f.grads)?, factors))
}

fn check_window(op: &'static str, window: &Range<usize>, len: usize) -> Result<()> {
    at_least(op, "window (end)", len, window.end)?;
    at_least(op, "window", window.end, window.start)
}

pub fn adamw_32bit(cuda: &Cuda, a: Adamw32bit) -> Result<()> {
    const OP: &str = "adamw_32bit";
    let p = a.master.len();
    exactly(OP, "m", a.m.len(), p)?;
    exactly(OP, "v", a.v.len(), p)?;
    at_least(OP, "lora", a.lora.len(), p)?;
    check_window(OP, &a.window, p)?;
    exactly(OP, "window (multiple of 4)", a.window.start % WINDOW_ALIGN, 0)?;
    let (grads, factors) = factors(cuda, OP, &a.factors, p)?;
    let args = ffi::adamw::Adamw32bit {
        master: cuda.ptr_mut(&a.master)?,
        m: cuda.ptr_mut(&a.m)?,
        v: cuda.ptr_mut(&a.v)?,
        lora: cuda.ptr_mut(&a.lora)?,
        grads,
        factors,
        begin: a.window.start as u64,
        end: a.window.end as u64,
    };
    // SAFETY: `args` lives through the call. The window lies inside the buffers (checked above), which outlive the kernel:
    // freeing is ordered behind it. The groups are sorted and begin at 0 (the caller), so every weight has one.
    unsafe { ffi::adamw::adamw_32bit(&args, cuda.stream_for_launch()?) }.check(OP)
}

pub fn adamw_8bit(cuda: &Cuda, a: Adamw8bit) -> Result<()> {
    const OP: &str = "adamw_8bit";
    let (p, blocks) = (a.master.len(), a.m_absmax.len());
    exactly(OP, "m", a.m.len(), p)?;
    exactly(OP, "v", a.v.len(), p)?;
    exactly(OP, "v_absmax", a.v_absmax.len(), blocks)?;
    at_least(OP, "lora", a.lora.len(), p)?;
    check_window(OP, &a.window, blocks)?;
    let (grads, factors) = factors(cuda, OP, &a.factors, p)?;
    if a.window.is_empty() {
        return Ok(());
    }
    at_least(OP, "tensors", a.tensors.len(), 1)?;
    let tensor_count = u32::try_from(a.tensors.len());
    let tensor_count = tensor_count.map_err(|_| Error::Shape {
        op: OP,
        argument: "tensors",
        found: a.tensors.len(),
        expected: u32::MAX as usize,
    })?;
    let args = ffi::adamw::Adamw8bit {
        master: cuda.ptr_mut(&a.master)?,
        m: cuda.ptr_mut(&a.m)?,
        v: cuda.ptr_mut(&a.v)?,
        m_absmax: cuda.ptr_mut(&a.m_absmax)?,
        v_absmax: cuda.ptr_mut(&a.v_absmax)?,
        lora: cuda.ptr_mut(&a.lora)?,
        grads,
        factors,
        tensors: cuda.ptr(&a.tensors)?,
        p: p as u64,
        block_begin: a.window.start as u64,
        block_end: a.window.end as u64,
        tensor_count,
    };
    // SAFETY: as in adamw_32bit; `tensors` are those that the P weights and the blocks were counted by (the caller).
    unsafe { ffi::adamw::adamw_8bit(&args, cuda.stream_for_launch()?) }.check(OP)
}
