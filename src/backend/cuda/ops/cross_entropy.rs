//! csrc/cross_entropy.cu behind checks: the pieces of head_loss over one chunk of m target tokens.

use half::bf16;

use super::{at_least, ffi};
use crate::backend::cuda::Cuda;
use crate::backend::cuda::memory::{View, ViewMut};
use crate::error::Result;

/// Loss of each row of logits, and its gradient in place of the logits.
pub struct CrossEntropy<'a> {
    /// (m, V). Where `gradient`: out, as bf16, row i at byte i*4*V, which is a row stride of 2*V elements of bf16.
    pub logits: ViewMut<'a, f32>,
    /// (m) = logsumexp - z\[id\]; 0 where there is no target
    pub row_loss: ViewMut<'a, f32>,
    /// (m); outside 0..V: no target, the row's gradient is 0
    pub ids: View<'a, i32>,
    /// (1) factor of the gradient
    pub scale: View<'a, f32>,
    pub gradient: bool,
    pub m: usize,
    pub v: usize,
}

/// `out[i,:] = x[rows[i],:]`; zeros where the row is -1.
pub struct GatherRows<'a> {
    /// (m, C) =
    pub out: ViewMut<'a, bf16>,
    /// (T, C)
    pub x: View<'a, bf16>,
    /// (m)
    pub rows: View<'a, i32>,
    pub m: usize,
    pub c: usize,
    pub t: usize,
}

/// `dx[rows[i],:] = d_rows[i,:]`; a row of -1 is passed over, and none is named twice.
pub struct ScatterRows<'a> {
    /// (T, C) = : the named rows alone
    pub dx: ViewMut<'a, bf16>,
    /// (m, C)
    pub d_rows: View<'a, bf16>,
    /// (m)
    pub rows: View<'a, i32>,
    pub m: usize,
    pub c: usize,
    pub t: usize,
}

/// loss += scale * sum of row_loss, in f64 and a fixed order.
pub struct AddLoss<'a> {
    /// (1) +=
    pub loss: ViewMut<'a, f32>,
    /// (m)
    pub row_loss: View<'a, f32>,
    /// (1)
    pub scale: View<'a, f32>,
    pub m: usize,
}

pub fn cross_entropy(cuda: &Cuda, a: CrossEntropy) -> Result<()> {
    const OP: &str = "cross_entropy";
    at_least(OP, "v", a.v, 1)?;
    at_least(OP, "logits", a.logits.len(), a.m * a.v)?;
    at_least(OP, "row_loss", a.row_loss.len(), a.m)?;
    at_least(OP, "ids", a.ids.len(), a.m)?;
    at_least(OP, "scale", a.scale.len(), 1)?;
    let args = ffi::cross_entropy::CrossEntropy {
        logits: cuda.ptr_mut(&a.logits)?,
        row_loss: cuda.ptr_mut(&a.row_loss)?,
        ids: cuda.ptr(&a.ids)?,
        scale: cuda.ptr(&a.scale)?,
        m: a.m as u64,
        v: a.v as u64,
        gradient: u32::from(a.gradient),
        unused: 0,
    };
    // SAFETY: `args` lives through the call. The buffers have the sizes that the launcher's contract asks for (checked
    // above) and outlive the kernel: freeing is ordered behind it on the stream.
    unsafe { ffi::cross_entropy::cross_entropy(&args, cuda.stream_for_launch()?) }.check(OP)
}

pub fn gather_rows(cuda: &Cuda, a: GatherRows) -> Result<()> {
    const OP: &str = "gather_rows";
    at_least(OP, "c", a.c, 1)?;
    at_least(OP, "out", a.out.len(), a.m * a.c)?;
    at_least(OP, "x", a.x.len(), a.t * a.c)?;
    at_least(OP, "rows", a.rows.len(), a.m)?;
    let args = ffi::cross_entropy::MoveRows {
        to: cuda.ptr_mut(&a.out)?,
        from: cuda.ptr(&a.x)?,
        rows: cuda.ptr(&a.rows)?,
        m: a.m as u64,
        c: a.c as u64,
        t: a.t as u64,
    };
    // SAFETY: as in cross_entropy; a row outside 0..T is not read.
    unsafe { ffi::cross_entropy::gather_rows(&args, cuda.stream_for_launch()?) }.check(OP)
}

pub fn scatter_rows(cuda: &Cuda, a: ScatterRows) -> Result<()> {
    const OP: &str = "scatter_rows";
    at_least(OP, "c", a.c, 1)?;
    at_least(OP, "dx", a.dx.len(), a.t * a.c)?;
    at_least(OP, "d_rows", a.d_rows.len(), a.m * a.c)?;
    at_least(OP, "rows", a.rows.len(), a.m)?;
    let args = ffi::cross_entropy::MoveRows {
        to: cuda.ptr_mut(&a.dx)?,
        from: cuda.ptr(&a.d_rows)?,
        rows: cuda.ptr(&a.rows)?,
        m: a.m as u64,
        c: a.c as u64,
        t: a.t as u64,
    };
    // SAFETY: as in cross_entropy; a row outside 0..T is not written.
    unsafe { ffi::cross_entropy::scatter_rows(&args, cuda.stream_for_launch()?) }.check(OP)
}

pub fn add_loss(cuda: &Cuda, a: AddLoss) -> Result<()> {
    const OP: &str = "add_loss";
    at_least(OP, "loss", a.loss.len(), 1)?;
    at_least(OP, "row_loss", a.row_loss.len(), a.m)?;
    at_least(OP, "scale", a.scale.len(), 1)?;
    let args = ffi::cross_entropy::AddLoss {
        loss: cuda.ptr_mut(&a.loss)?,
        row_loss: cuda.ptr(&a.row_loss)?,
        scale: cuda.ptr(&a.scale)?,
        m: a.m as u64,
    };
    // SAFETY: as in cross_entropy.
    unsafe { ffi::cross_entropy::add_loss(&args, cuda.stream_for_launch()?) }.check(OP)
}
