//! embedding, head_loss and head_logits: the ops that are as wide as the vocabulary.

use rayon::prelude::*;

use super::gemm::{Mat, MatMut, Threads, Write, gemm};
use super::math::{exp_sum, max, simd};
use super::{Cpu, Scratch, at_least, exactly, grown};
use crate::backend::{Embedding, HeadLogits, HeadLoss};
use crate::error::{Error, Result};

/// Logits that exist at a time: 64 MB. Small in unit tests, which so cross its border.
const CHUNK: usize = if cfg!(test) { 1 << 14 } else { 16 << 20 };

/// An id or a row must lie below `limit`.
fn below(op: &'static str, argument: &'static str, ids: &[i32], limit: usize) -> Result<()> {
    match ids.iter().find(|&&id| usize::try_from(id).map_or(true, |id| id >= limit)) {
        Some(&id) => Err(Error::Shape { op, argument, found: id as usize, expected: limit }),
        None => Ok(()),
    }
}

pub(super) fn embedding(a: Embedding<Cpu>) -> Result<()> {
    let op = "embedding";
    let (t, c, table) = (a.t, a.c, a.table);
    at_least(op, "c", c, 1)?;
    at_least(op, "x", a.x.len(), t * c)?;
    at_least(op, "tokens", a.tokens.len(), t)?;
    exactly(op, "table (c)", table.k, c)?;
    below(op, "tokens (id below V)", &a.tokens[..t], table.n)?;
    let rows = a.x[..t * c].par_chunks_exact_mut(c).zip(&a.tokens[..t]).with_min_len(16);
    rows.for_each(|(x, &token)| table.widen_range(token as usize * c, x));
    Ok(())
}

/// Turns a row of logits into softmax - onehot, times scale; returns its loss, logsumexp - z[id].
///
/// The sum runs in f32 over 1024 logits at a time and in f64 over those.
fn row_loss(z: &mut [f32], id: usize, scale: f32, gradient: bool) -> f64 {
    simd(
        #[inline(always)]
        || {
            let target = z[id];
            let top = max(z);
            let mut sum = 0.0f64;
            for z in z.chunks_mut(1024) {
                sum += f64::from(exp_sum(z, top));
            }
            if gradient {
                let factor = (f64::from(scale) / sum) as f32;
                for z in z.iter_mut() {
                    *z *= factor;
                }
                z[id] -= scale;
            }
            sum.ln() + f64::from(top) - f64::from(target)
        },
    )
}

/// z (rows, V) = x (rows, C) · headᵀ
fn logits_of(weights: &mut Vec<f32>, z: &mut [f32], x: &[f32], head: &super::Matrix) {
    let (v, c) = (head.n, head.k);
    let m = x.len() / c;
    let step = head.slice_rows();
    for row in (0..v).step_by(step) {
        let rows = step.min(v - row);
        let slice = grown(weights, rows * c);
        head.widen(row..row + rows, slice);
        let out = MatMut::rows(&mut z[row..], v);
        gemm(Threads::All, (m, rows, c), 1.0, Mat::rows(x, c), Mat::rows(slice, c).t(), Write::Set, out);
    }
}

fn gather<'a>(rows: &'a mut Vec<f32>, x: &[f32], at: impl ExactSizeIterator<Item = usize>, c: usize) -> &'a [f32] {
    let out = grown(rows, at.len() * c);
    for (out, row) in out.chunks_exact_mut(c).zip(at) {
        out.copy_from_slice(&x[row * c..(row + 1) * c]);
    }
    out
}

pub(super) fn loss(s: &mut Scratch, a: HeadLoss<Cpu>) -> Result<()> {
    let op = "head_loss";
    let (c, v, head, batch) = (a.c, a.v, a.head, a.batch);
    let (t, m) = (batch.t, batch.m);
    at_least(op, "c", c, 1)?;
    at_least(op, "v", v, 1)?;
    at_least(op, "loss", a.loss.len(), 1)?;
    at_least(op, "x", a.x.len(), t * c)?;
    exactly(op, "head (v)", head.n, v)?;
    exactly(op, "head (c)", head.k, c)?;
    at_least(op, "batch.scale", batch.scale.len(), 1)?;
    at_least(op, "batch.target_rows", batch.target_rows.len(), m)?;
    at_least(op, "batch.target_ids", batch.target_ids.len(), m)?;
    let (target_rows, ids) = (&batch.target_rows[..m], &batch.target_ids[..m]);
    below(op, "batch.target_rows (row below T)", target_rows, t)?;
    below(op, "batch.target_ids (id below V)", ids, v)?;
    let mut dx = match a.dx {
        Some(dx) => {
            at_least(op, "dx", dx.len(), t * c)?;
            let dx = &mut dx[..t * c];
            dx.fill(0.0);
            Some(dx)
        }
        None => None,
    };
    let scale = batch.scale[0];
    if m == 0 {
        return Ok(());
    }
    // As few chunks as the budget allows, of about one size.
    let chunk = m.div_ceil(m.div_ceil((CHUNK / v).max(1)));
    let losses = grown(&mut s.sums, m);
    for first in (0..m).step_by(chunk) {
        let at = first..m.min(first + chunk);
        let count = at.len();
        let rows = &target_rows[at.clone()];
        let x = gather(&mut s.rows, a.x, rows.iter().map(|&r| r as usize), c);
        let z = grown(&mut s.logits, count * v);
        logits_of(&mut s.weights, z, x, head);
        z.par_chunks_exact_mut(v)
            .zip(&mut losses[at.clone()])
            .zip(&ids[at])
            .for_each(|((z, loss), &id)| *loss = row_loss(z, id as usize, scale, dx.is_some()));

        let Some(dx) = dx.as_deref_mut() else { continue };
        let d_rows = grown(&mut s.d_rows, count * c);
        let step = head.slice_rows();
        for row in (0..v).step_by(step) {
            let rows = step.min(v - row);
            let slice = grown(&mut s.weights, rows * c);
            head.widen(row..row + rows, slice);
            let into = if row == 0 { Write::Set } else { Write::Add };
            let (z, out) = (Mat::rows(&z[row..], v), MatMut::rows(d_rows, c));
            gemm(Threads::All, (count, c, rows), 1.0, z, Mat::rows(slice, c), into, out);
        }
        // Rows are distinct in a batch; should two be one, their gradients add up.
        for (d, &row) in d_rows.chunks_exact(c).zip(rows) {
            let to = row as usize * c..(row as usize + 1) * c;
            dx[to].iter_mut().zip(d).for_each(|(dx, d)| *dx += d);
        }
    }
    a.loss[0] += (f64::from(scale) * losses.iter().sum::<f64>()) as f32;
    Ok(())
}

pub(super) fn logits(s: &mut Scratch, a: HeadLogits<Cpu>) -> Result<()> {
    let op = "head_logits";
    let (c, v, head, m) = (a.c, a.v, a.head, a.rows.len());
    at_least(op, "c", c, 1)?;
    at_least(op, "v", v, 1)?;
    at_least(op, "logits", a.logits.len(), m * v)?;
    exactly(op, "head (v)", head.n, v)?;
    exactly(op, "head (c)", head.k, c)?;
    if let Some(&last) = a.rows.iter().max() {
        at_least(op, "x", a.x.len(), (last + 1) * c)?;
    }
    let x = gather(&mut s.rows, a.x, a.rows.iter().copied(), c);
    if m == 1 {
        super::linear::matvec(&s.tiles, &mut a.logits[..v], x, head);
    } else if m > 0 {
        logits_of(&mut s.weights, &mut a.logits[..m * v], x, head);
    }
    Ok(())
}
