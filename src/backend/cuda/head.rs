//! The head: logits of the target tokens alone, a chunk at a time, their loss and their gradient.

use super::Cuda;
use super::cublas::{matmul, plain};
use super::linear::{weight, widened};
use super::ops::cross_entropy::{self as ops, AddLoss, CrossEntropy, GatherRows, ScatterRows};
use super::ops::decode::{MATVEC_MAX_T, Matvec, matvec};
use super::ops::gemm::Out;
use super::scratch::Scratch;
use crate::backend::shape::{at_least, exactly};
use crate::backend::workspace::GRANULARITY;
use crate::backend::{HeadLogits, HeadLoss};
use crate::error::Result;

/// The most rows of the head whose logits fit the scratch.
fn chunk(op: &'static str, s: &Scratch, (c, v): (usize, usize)) -> Result<usize> {
    let rows = s.sizes.head_rows.min(s.logits.len() / v.max(1)).min(s.rows.len() / c.max(1));
    at_least(op, "scratch (logits)", s.logits.len(), v)?;
    at_least(op, "scratch (rows)", rows, 1)?;
    Ok(rows)
}

pub(super) fn loss(cuda: &Cuda, s: &mut Scratch, a: HeadLoss<Cuda>) -> Result<()> {
    let op = "head_loss";
    let (c, v, head, batch) = (a.c, a.v, a.head, a.batch);
    let (t, m) = (batch.t, batch.m);
    at_least(op, "c", c, 1)?;
    at_least(op, "v", v, 1)?;
    at_least(op, "x", a.x.len(), t * c)?;
    exactly(op, "head (v)", head.n, v)?;
    exactly(op, "head (c)", head.k, c)?;
    at_least(op, "batch.target_rows", batch.target_rows.len(), m)?;
    at_least(op, "batch.target_ids", batch.target_ids.len(), m)?;
    let mut dx = match a.dx {
        Some(dx) => {
            at_least(op, "dx", dx.len(), t * c)?;
            let mut dx = dx.range_mut(0..t * c);
            // Rows without a target get no gradient.
            cuda.zero(dx.reborrow())?;
            Some(dx)
        }
        None => None,
    };
    if m == 0 {
        return Ok(());
    }
    at_least(op, "scratch (loss of each target)", s.row_loss.len(), m)?;
    if dx.is_some() {
        at_least(op, "scratch (gradient of the rows)", s.d_rows.len(), s.rows.len())?;
    }
    // As few chunks as fit, of about one size.
    let most = chunk(op, s, (c, v))?;
    let rows_each = m.div_ceil(m.div_ceil(most)).next_multiple_of(GRANULARITY).min(most);
    let (x, scale, by) = (a.x.range(0..t * c), batch.scale.view(), cuda.products());
    let head = widened(cuda, op, head, s.weights.view_mut())?;
    for first in (0..m).step_by(rows_each) {
        let count = rows_each.min(m - first);
        let at = first..first + count;
        let (rows, ids) = (batch.target_rows.range(at.clone()), batch.target_ids.range(at.clone()));
        ops::gather_rows(cuda, GatherRows { out: s.rows.view_mut(), x, rows, m: count, c, t })?;
        let logits = Out::F32(s.logits.view_mut());
        matmul(cuda, by, plain(logits, (s.rows.view(), c), (head, true), (count, v, c)))?;
        let (logits, row_loss, gradient) = (s.logits.view_mut(), s.row_loss.range_mut(at), dx.is_some());
        ops::cross_entropy(cuda, CrossEntropy { logits, row_loss, ids, scale, gradient, m: count, v })?;
        let Some(dx) = &mut dx else { continue };
        // The gradient lies where the logits were: in bf16, each row at the start of its row of f32.
        let d_logits = (s.logits.view().as_bf16(), 2 * v);
        let d_rows = Out::Bf16(s.d_rows.view_mut());
        matmul(cuda, by, plain(d_rows, d_logits, (head, false), (count, c, v)))?;
        let (dx, d_rows) = (dx.reborrow(), s.d_rows.view());
        ops::scatter_rows(cuda, ScatterRows { dx, d_rows, rows, m: count, c, t })?;
    }
    let (loss, row_loss) = (a.loss.view_mut(), s.row_loss.range(0..m));
    ops::add_loss(cuda, AddLoss { loss, row_loss, scale, m })
}

pub(super) fn logits(cuda: &Cuda, s: &mut Scratch, a: HeadLogits<Cuda>) -> Result<()> {
    let op = "head_logits";
    let (c, v, m) = (a.c, a.v, a.rows.len());
    at_least(op, "c", c, 1)?;
    at_least(op, "v", v, 1)?;
    at_least(op, "logits", a.logits.len(), m * v)?;
    exactly(op, "head (v)", a.head.n, v)?;
    exactly(op, "head (c)", a.head.k, c)?;
    let t = a.x.len() / c;
    if let Some(&last) = a.rows.iter().max() {
        at_least(op, "x", a.x.len(), (last + 1) * c)?;
    }
    let most = s.sizes.head_rows.min(s.rows.len() / c).min(s.row_ids.len());
    at_least(op, "scratch (rows)", most, m.min(1))?;
    for (i, rows) in a.rows.chunks(most.max(1)).enumerate() {
        let count = rows.len();
        set_rows(cuda, s, rows)?;
        let (out, ids) = (s.rows.view_mut(), s.row_ids.range(0..count));
        ops::gather_rows(cuda, GatherRows { out, x: a.x.range(0..t * c), rows: ids, m: count, c, t })?;
        let first = i * most * v;
        let logits = Out::F32(a.logits.range_mut(first..first + count * v));
        let x = s.rows.view();
        if m <= MATVEC_MAX_T {
            let w = weight(a.head);
            matvec(cuda, Matvec { y: logits, ldy: v, x, w, h: None, bias: None, t: count })?;
        } else {
            let head = widened(cuda, op, a.head, s.weights.view_mut())?;
            matmul(cuda, cuda.products(), plain(logits, (x, c), (head, true), (count, v, c)))?;
        }
    }
    Ok(())
}

/// Puts the numbers of rows on the device: a few inside the commands, so that they may be recorded, more by a copy.
fn set_rows(cuda: &Cuda, s: &mut Scratch, rows: &[usize]) -> Result<()> {
    if rows.len() <= MATVEC_MAX_T {
        let first = cuda.ptr(&s.row_ids.view())? as u64;
        for (i, &row) in rows.iter().enumerate() {
            cuda.set_words(first + (i * size_of::<i32>()) as u64, row as u32)?;
        }
        return Ok(());
    }
    let rows: Vec<i32> = rows.iter().map(|&row| row as i32).collect();
    cuda.write(s.row_ids.view_mut(), &rows)
}
