//! rmsnorm (residual add fused) and head_norm, its cousin over each head of q and k.

use rayon::prelude::*;

use super::math::{dot, dot3, simd};
use super::{Cpu, at_least, check_heads, rows_per_task};
use crate::backend::{HeadNormBackward, HeadNormForward, RmsNormBackward, RmsNormForward};
use crate::error::Result;

/// y = r * x * w; returns r = 1 / sqrt(mean(x^2) + eps).
#[inline(always)]
fn norm(y: &mut [f32], x: &[f32], w: &[f32], eps: f32) -> f32 {
    let r = 1.0 / (dot(x, x) / x.len() as f32 + eps).sqrt();
    for ((y, x), w) in y.iter_mut().zip(x).zip(w) {
        *y = r * x * w;
    }
    r
}

pub(super) fn rmsnorm_forward(a: RmsNormForward<Cpu>) -> Result<()> {
    let op = "rmsnorm_forward";
    let (t, c) = (a.t, a.c);
    let n = t * c;
    at_least(op, "c", c, 1)?;
    at_least(op, "y", a.y.len(), n)?;
    at_least(op, "rstd", a.rstd.len(), t)?;
    at_least(op, "x", a.x.len(), n)?;
    at_least(op, "w", a.w.len(), c)?;
    if let Some((delta, s)) = &a.residual {
        at_least(op, "delta", delta.len(), n)?;
        at_least(op, "s", s.len(), n)?;
    }
    let (w, eps, rows) = (&a.w[..c], a.eps, rows_per_task(c));
    let tasks = (a.y[..n].par_chunks_mut(rows * c)).zip(a.rstd[..t].par_chunks_mut(rows));
    let tasks = tasks.zip(a.x[..n].par_chunks(rows * c));
    match a.residual {
        None => tasks.for_each(|((y, rstd), x)| {
            simd(
                #[inline(always)]
                || {
                    for ((y, r), x) in y.chunks_exact_mut(c).zip(rstd).zip(x.chunks_exact(c)) {
                        *r = norm(y, x, w, eps);
                    }
                },
            );
        }),
        Some((delta, s)) => {
            let tasks = tasks.zip(delta[..n].par_chunks(rows * c)).zip(s[..n].par_chunks_mut(rows * c));
            tasks.for_each(|((((y, rstd), x), delta), s)| {
                simd(
                    #[inline(always)]
                    || {
                        let inputs = x.chunks_exact(c).zip(delta.chunks_exact(c));
                        let outputs = y.chunks_exact_mut(c).zip(rstd).zip(s.chunks_exact_mut(c));
                        for (((y, r), s), (x, delta)) in outputs.zip(inputs) {
                            for ((s, x), d) in s.iter_mut().zip(x).zip(delta) {
                                *s = x + d;
                            }
                            *r = norm(y, s, w, eps);
                        }
                    },
                );
            });
        }
    }
    Ok(())
}

pub(super) fn rmsnorm_backward(a: RmsNormBackward<Cpu>) -> Result<()> {
    let op = "rmsnorm_backward";
    let (t, c) = (a.t, a.c);
    let n = t * c;
    at_least(op, "c", c, 1)?;
    at_least(op, "dx", a.dx.len(), n)?;
    at_least(op, "dy", a.dy.len(), n)?;
    at_least(op, "x", a.x.len(), n)?;
    at_least(op, "w", a.w.len(), c)?;
    at_least(op, "rstd", a.rstd.len(), t)?;
    let (w, rows) = (&a.w[..c], rows_per_task(c));
    let tasks = (a.dx[..n].par_chunks_mut(rows * c))
        .zip(a.dy[..n].par_chunks(rows * c))
        .zip(a.x[..n].par_chunks(rows * c))
        .zip(a.rstd[..t].par_chunks(rows));
    tasks.for_each(|(((dx, dy), x), rstd)| {
        simd(
            #[inline(always)]
            || {
                let rows = dx.chunks_exact_mut(c).zip(dy.chunks_exact(c)).zip(x.chunks_exact(c)).zip(rstd);
                for (((dx, dy), x), &r) in rows {
                    let coef = r * r * r * (dot3(dy, w, x) / c as f32);
                    for i in 0..c {
                        dx[i] += r * dy[i] * w[i] - coef * x[i];
                    }
                }
            },
        );
    });
    Ok(())
}

pub(super) fn head_norm_forward(a: HeadNormForward<Cpu>) -> Result<()> {
    let op = "head_norm_forward";
    let (t, heads, d) = (a.t, a.heads, a.heads.d);
    check_heads(op, heads)?;
    at_least(op, "heads.d", d, 1)?;
    let (width, normed) = (heads.qkv(), heads.h + heads.g);
    at_least(op, "y", a.y.len(), t * width)?;
    at_least(op, "rstd", a.rstd.len(), t * normed)?;
    at_least(op, "x", a.x.len(), t * width)?;
    at_least(op, "q_w", a.q_w.len(), d)?;
    at_least(op, "k_w", a.k_w.len(), d)?;
    let (q_w, k_w, eps, rows) = (&a.q_w[..d], &a.k_w[..d], a.eps, rows_per_task(width));
    let tasks = (a.y[..t * width].par_chunks_mut(rows * width))
        .zip(a.rstd[..t * normed].par_chunks_mut(rows * normed))
        .zip(a.x[..t * width].par_chunks(rows * width));
    tasks.for_each(|((y, rstd), x)| {
        simd(
            #[inline(always)]
            || {
                let rows = y.chunks_exact_mut(width).zip(rstd.chunks_exact_mut(normed)).zip(x.chunks_exact(width));
                for ((y, rstd), x) in rows {
                    for (head, r) in rstd.iter_mut().enumerate() {
                        let at = head * d..(head + 1) * d;
                        let w = if head < heads.h { q_w } else { k_w };
                        *r = norm(&mut y[at.clone()], &x[at], w, eps);
                    }
                    y[normed * d..].copy_from_slice(&x[normed * d..]);
                }
            },
        );
    });
    Ok(())
}

pub(super) fn head_norm_backward(a: HeadNormBackward<Cpu>) -> Result<()> {
    let op = "head_norm_backward";
    let (t, heads, d) = (a.t, a.heads, a.heads.d);
    check_heads(op, heads)?;
    at_least(op, "heads.d", d, 1)?;
    let (width, normed) = (heads.qkv(), heads.h + heads.g);
    at_least(op, "dqkv", a.dqkv.len(), t * width)?;
    at_least(op, "x", a.x.len(), t * width)?;
    at_least(op, "rstd", a.rstd.len(), t * normed)?;
    at_least(op, "q_w", a.q_w.len(), d)?;
    at_least(op, "k_w", a.k_w.len(), d)?;
    let (q_w, k_w, rows) = (&a.q_w[..d], &a.k_w[..d], rows_per_task(width));
    let tasks = (a.dqkv[..t * width].par_chunks_mut(rows * width))
        .zip(a.x[..t * width].par_chunks(rows * width))
        .zip(a.rstd[..t * normed].par_chunks(rows * normed));
    tasks.for_each(|((dqkv, x), rstd)| {
        simd(
            #[inline(always)]
            || {
                let rows = dqkv.chunks_exact_mut(width).zip(x.chunks_exact(width)).zip(rstd.chunks_exact(normed));
                for ((dqkv, x), rstd) in rows {
                    for (head, &r) in rstd.iter().enumerate() {
                        let at = head * d..(head + 1) * d;
                        let w = if head < heads.h { q_w } else { k_w };
                        let (dy, x) = (&mut dqkv[at.clone()], &x[at]);
                        let coef = r * r * r * (dot3(dy, w, x) / d as f32);
                        for i in 0..d {
                            dy[i] = r * dy[i] * w[i] - coef * x[i];
                        }
                    }
                }
            },
        );
    });
    Ok(())
}
