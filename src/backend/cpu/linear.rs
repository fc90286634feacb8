//! linear: frozen projections side by side, each with its LoRA.
//!
//! W is widened a slice of rows at a time and multiplied at once. The A matrices of the parts are laid below each other,
//! so that h, dh·A and dA take one product for all parts; with dropout each part has a mask, and a product, of its own.

use rayon::prelude::*;

use super::gemm::{Mat, MatMut, Threads, Write, gemm};
use super::math::{dot, simd};
use super::{Cpu, Matrix, Scratch, TASK, at_least, grown, with_tile};
use crate::backend::shape::check_linear;
use crate::backend::{Dropout, Linear, LinearBackward, LinearForward, Lora};
use crate::error::Result;
use crate::rng::{Stream, philox};

fn check(op: &'static str, w: &Linear<Cpu>, lora: Option<usize>) -> Result<()> {
    check_linear(op, w, lora, |w| (w.n, w.k), Vec::len)
}

/// The parts that have LoRA: first column in y, first column in h, n, settings.
fn adapted(w: &Linear<Cpu>) -> impl Iterator<Item = (usize, usize, usize, &Lora)> {
    let (mut col, mut h) = (0, 0);
    w.parts.iter().filter_map(move |p| {
        let at = (col, h, p.n);
        col += p.n;
        h += p.lora.as_ref().map_or(0, |l| l.r);
        p.lora.as_ref().map(|l| (at.0, at.1, at.2, l))
    })
}

/// The A matrices of all parts below each other (R, K).
fn pack_a<'a>(packed: &'a mut Vec<f32>, w: &Linear<Cpu>, lora: &[f32]) -> &'a mut [f32] {
    let packed = grown(packed, w.r * w.k);
    for (_, h, _, l) in adapted(w) {
        packed[h * w.k..(h + l.r) * w.k].copy_from_slice(&lora[l.a..l.a + l.r * w.k]);
    }
    packed
}

/// Elements whose masks are made together: 16 Philox blocks of four, side by side in vector registers.
const MASKS: usize = 64;

/// What the elements `start .. start + 64` of a flat (T, K) tensor are multiplied by: 1 where kept, else 0.
#[inline(always)]
fn masks(d: Dropout, site: u32, start: usize) -> [f32; MASKS] {
    debug_assert!(start.is_multiple_of(4));
    let key = [d.seed as u32, (d.seed >> 32) as u32];
    let first = ((u64::from(d.step) << 32) + start as u64) / 4;
    let mut out = [0.0; MASKS];
    for (block, out) in out.chunks_exact_mut(4).enumerate() {
        let counter = first + block as u64;
        let words = philox([counter as u32, (counter >> 32) as u32, site, Stream::Dropout as u32], key);
        for (out, word) in out.iter_mut().zip(words) {
            let uniform = (word >> 8) as i32 as f32 * (1.0 / (1 << 24) as f32);
            *out = if uniform >= d.p { 1.0 } else { 0.0 };
        }
    }
    out
}

/// out = dropout(x)
fn drop_into(out: &mut [f32], x: &[f32], d: Dropout, site: u32) {
    out.par_chunks_mut(TASK).zip(x.par_chunks(TASK)).enumerate().for_each(|(task, (out, x))| {
        simd(
            #[inline(always)]
            || {
                for (i, (out, x)) in out.chunks_mut(MASKS).zip(x.chunks(MASKS)).enumerate() {
                    let masks = masks(d, site, task * TASK + i * MASKS);
                    for ((out, x), mask) in out.iter_mut().zip(x).zip(masks) {
                        *out = if mask > 0.0 { x / (1.0 - d.p) } else { 0.0 };
                    }
                }
            },
        );
    });
}

/// dx += dropout'(g), and g = dropout(x), with one mask for both.
fn drop_back(dx: Option<&mut [f32]>, g: &mut [f32], x: &[f32], d: Dropout, site: u32) {
    let Some(dx) = dx else { return drop_into(g, x, d, site) };
    let tasks = g.par_chunks_mut(TASK).zip(x.par_chunks(TASK)).zip(dx.par_chunks_mut(TASK)).enumerate();
    tasks.for_each(|(task, ((g, x), dx))| {
        simd(
            #[inline(always)]
            || {
                let chunks = g.chunks_mut(MASKS).zip(x.chunks(MASKS)).zip(dx.chunks_mut(MASKS));
                for (i, ((g, x), dx)) in chunks.enumerate() {
                    let masks = masks(d, site, task * TASK + i * MASKS);
                    for (((g, x), dx), mask) in g.iter_mut().zip(x).zip(dx).zip(masks) {
                        *dx += if mask > 0.0 { *g / (1.0 - d.p) } else { 0.0 };
                        *g = if mask > 0.0 { x / (1.0 - d.p) } else { 0.0 };
                    }
                }
            },
        );
    });
}

/// y (N) = W x for one token: bound by reading W, so rows are widened into a tile of each thread and used there.
pub(super) fn matvec(tiles: &[std::sync::Mutex<Vec<f32>>], y: &mut [f32], x: &[f32], w: &Matrix) {
    let rows = (8192 / w.k).max(1);
    y.par_chunks_mut(rows).enumerate().for_each(|(i, y)| {
        with_tile(tiles, y.len() * w.k, |tile| {
            w.widen_range(i * rows * w.k, tile);
            simd(
                #[inline(always)]
                || {
                    for (y, row) in y.iter_mut().zip(tile.chunks_exact(w.k)) {
                        *y = dot(row, x);
                    }
                },
            );
        });
    });
}

pub(super) fn forward(s: &mut Scratch, a: LinearForward<Cpu>) -> Result<()> {
    let op = "linear_forward";
    let (t, w) = (a.t, a.w);
    let (k, n, r) = (w.k, w.n, w.r);
    check(op, w, a.lora.map(Vec::len))?;
    at_least(op, "y", a.y.len(), t * n)?;
    at_least(op, "x", a.x.len(), t * k)?;
    if t == 0 {
        return Ok(());
    }
    let (y, x) = (&mut a.y[..t * n], &a.x[..t * k]);

    let mut col = 0;
    for part in &w.parts {
        if t == 1 {
            matvec(&s.tiles, &mut y[col..col + part.n], x, &part.w);
        } else {
            let step = part.w.slice_rows();
            for row in (0..part.n).step_by(step) {
                let rows = step.min(part.n - row);
                let slice = grown(&mut s.weights, rows * k);
                part.w.widen(row..row + rows, slice);
                let out = MatMut::rows(&mut y[col + row..], n);
                gemm(Threads::All, (t, rows, k), 1.0, Mat::rows(x, k), Mat::rows(slice, k).t(), Write::Set, out);
            }
        }
        col += part.n;
    }

    if let Some(lora) = a.lora.filter(|_| r > 0) {
        at_least(op, "h", a.h.len(), t * r)?;
        let h = &mut a.h[..t * r];
        match a.dropout.filter(|d| d.p > 0.0) {
            None => {
                let packed = pack_a(&mut s.lora_a, w, lora);
                let out = MatMut::rows(h, r);
                gemm(Threads::All, (t, r, k), 1.0, Mat::rows(x, k), Mat::rows(packed, k).t(), Write::Set, out);
            }
            Some(d) => {
                for (_, at, _, l) in adapted(w) {
                    let dropped = grown(&mut s.dropped, t * k);
                    drop_into(dropped, x, d, l.site);
                    let a_t = Mat::rows(&lora[l.a..], k).t();
                    let out = MatMut::rows(&mut h[at..], r);
                    gemm(Threads::All, (t, l.r, k), 1.0, Mat::rows(dropped, k), a_t, Write::Set, out);
                }
            }
        }
        for (col, at, n_part, l) in adapted(w) {
            let b_t = Mat::rows(&lora[l.b..], l.r).t();
            let out = MatMut::rows(&mut y[col..], n);
            gemm(Threads::All, (t, n_part, l.r), l.scale, Mat::rows(&h[at..], r), b_t, Write::Add, out);
        }
    }

    let mut col = 0;
    for part in &w.parts {
        if let Some(bias) = &part.bias {
            y.par_chunks_exact_mut(n).with_min_len(8).for_each(|row| {
                row[col..col + part.n].iter_mut().zip(bias).for_each(|(y, b)| *y += b);
            });
        }
        col += part.n;
    }
    Ok(())
}

pub(super) fn backward(s: &mut Scratch, a: LinearBackward<Cpu>) -> Result<()> {
    let op = "linear_backward";
    let (t, w) = (a.t, a.w);
    let (k, n, r) = (w.k, w.n, w.r);
    check(op, w, Some(a.lora.len().min(a.d_lora.len())))?;
    at_least(op, "dy", a.dy.len(), t * n)?;
    at_least(op, "x", a.x.len(), t * k)?;
    at_least(op, "dh", a.dh.len(), t * r)?;
    at_least(op, "h", a.h.len(), t * r)?;
    if let Some(dx) = &a.dx {
        at_least(op, "dx", dx.len(), t * k)?;
    }
    if t == 0 {
        return Ok(());
    }
    let (dy, x) = (&a.dy[..t * n], &a.x[..t * k]);
    let mut dx = a.dx.map(|dx| &mut dx[..t * k]);

    if let Some(dx) = dx.as_deref_mut() {
        let (mut col, mut into) = (0, Write::Set);
        for part in &w.parts {
            let step = part.w.slice_rows();
            for row in (0..part.n).step_by(step) {
                let rows = step.min(part.n - row);
                let slice = grown(&mut s.weights, rows * k);
                part.w.widen(row..row + rows, slice);
                let (dy, out) = (Mat::rows(&dy[col + row..], n), MatMut::rows(dx, k));
                gemm(Threads::All, (t, k, rows), 1.0, dy, Mat::rows(slice, k), into, out);
                into = Write::Add;
            }
            col += part.n;
        }
    }

    if r == 0 {
        return Ok(());
    }
    let (h, dh, d_lora) = (&a.h[..t * r], &mut a.dh[..t * r], &mut a.d_lora[..]);
    for (col, at, n_part, l) in adapted(w) {
        let dy = Mat::rows(&dy[col..], n);
        let out = MatMut::rows(&mut dh[at..], r);
        gemm(Threads::All, (t, l.r, n_part), l.scale, dy, Mat::rows(&a.lora[l.b..], l.r), Write::Set, out);
        let d_b = MatMut::rows(&mut d_lora[l.b..l.b + n_part * l.r], l.r);
        gemm(Threads::All, (n_part, l.r, t), l.scale, dy.t(), Mat::rows(&h[at..], r), Write::Add, d_b);
    }
    match a.dropout.filter(|d| d.p > 0.0) {
        None => {
            let packed = pack_a(&mut s.lora_a, w, a.lora);
            if let Some(dx) = dx {
                let out = MatMut::rows(dx, k);
                gemm(Threads::All, (t, k, r), 1.0, Mat::rows(dh, r), Mat::rows(packed, k), Write::Add, out);
            }
            let d_a = grown(&mut s.d_lora_a, r * k);
            let out = MatMut::rows(d_a, k);
            gemm(Threads::All, (r, k, t), 1.0, Mat::rows(dh, r).t(), Mat::rows(x, k), Write::Set, out);
            for (_, at, _, l) in adapted(w) {
                let sum = d_lora[l.a..l.a + l.r * k].iter_mut();
                sum.zip(&d_a[at * k..]).for_each(|(sum, d)| *sum += d);
            }
        }
        Some(d) => {
            for (_, at, _, l) in adapted(w) {
                let dh = Mat::rows(&dh[at..], r);
                let dropped = grown(&mut s.dropped, t * k);
                if dx.is_some() {
                    let through = MatMut::rows(dropped, k);
                    gemm(Threads::All, (t, k, l.r), 1.0, dh, Mat::rows(&a.lora[l.a..], k), Write::Set, through);
                }
                drop_back(dx.as_deref_mut(), dropped, x, d, l.site);
                let d_a = MatMut::rows(&mut d_lora[l.a..l.a + l.r * k], k);
                gemm(Threads::All, (l.r, k, t), 1.0, dh.t(), Mat::rows(dropped, k), Write::Add, d_a);
            }
        }
    }
    Ok(())
}
