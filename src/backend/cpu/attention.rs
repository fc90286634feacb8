//! attention: causal inside each sequence, sliding window, grouped-query.
//!
//! Forward goes by tiles: up to [`ROWS`] queries of one head against all keys that any of them sees. The scores of a
//! tile exist in full, so the softmax is the plain one, and its log-sum-exp is kept. Backward takes one head of one
//! sequence as a task, makes the probabilities of each tile again from the log-sum-exp, and leaves dk and dv per query
//! head; a last pass over the tokens adds the heads of a group in order and lays everything out as dqkv.

use rayon::prelude::*;

use super::gemm::{Mat, MatMut, Threads, Write, gemm};
use super::math::{dot, exp, exp_sum, max, simd};
use super::{Cpu, Scratch, at_least, check_heads, check_sequences, grown, rows_per_task, with_tile};
use crate::backend::{AttentionBackward, AttentionForward, Heads};
use crate::error::Result;

/// Queries of a tile: enough for an efficient product, few enough that the masked half of the diagonal costs little.
pub(super) const ROWS: usize = 64;

/// One query head over its keys: row i of q is at `q[i * q_stride..]`, keys and values are `kv_stride` apart.
#[derive(Clone, Copy)]
pub(super) struct View<'a> {
    pub q: &'a [f32],
    pub q_stride: usize,
    pub k: &'a [f32],
    pub v: &'a [f32],
    pub kv_stride: usize,
}

/// Queries `row .. row + rows` of a view, at the positions `pos .. pos + rows` of its keys.
#[derive(Clone, Copy)]
pub(super) struct Tile {
    pub row: usize,
    pub pos: usize,
    pub rows: usize,
}

impl Tile {
    /// First key that any query sees, and how many from there on.
    fn keys(self, heads: Heads) -> (usize, usize) {
        let first = first_key(self.pos, heads);
        (first, self.pos + self.rows - first)
    }

    /// Scratch of the scores.
    pub(super) fn scores(self, heads: Heads) -> usize {
        self.rows * self.keys(heads).1
    }
}

/// The first key that the query at `pos` sees.
fn first_key(pos: usize, heads: Heads) -> usize {
    heads.window.map_or(0, |w| (pos + 1).saturating_sub(w))
}

impl View<'_> {
    /// Head `head` of a sequence that starts at token `start` of qkv (T, (H+2G)*D).
    fn of(qkv: &[f32], start: usize, head: usize, heads: Heads) -> View<'_> {
        let (width, g) = (heads.qkv(), head / (heads.h / heads.g));
        let at = |part: usize| &qkv[start * width + part * heads.d..];
        View { q: at(head), q_stride: width, k: at(heads.h + g), v: at(heads.h + heads.g + g), kv_stride: width }
    }

    /// scores (rows, keys) = scale * q kᵀ, unmasked.
    fn scores(&self, tile: Tile, heads: Heads, scores: &mut [f32]) {
        let (first, keys) = tile.keys(heads);
        let q = Mat::rows(&self.q[tile.row * self.q_stride..], self.q_stride);
        let k = Mat::rows(&self.k[first * self.kv_stride..], self.kv_stride);
        gemm(Threads::One, (tile.rows, keys, heads.d), heads.scale(), q, k.t(), Write::Set, MatMut::rows(scores, keys));
    }

    /// o (rows, D) = softmax(scores) v, lse (rows). `scores` is scratch of [`Tile::scores`] elements.
    pub(super) fn forward(&self, tile: Tile, heads: Heads, scores: &mut [f32], o: &mut [f32], lse: &mut [f32]) {
        let (first, keys) = tile.keys(heads);
        self.scores(tile, heads, scores);
        simd(
            #[inline(always)]
            || {
                for (i, (row, lse)) in scores.chunks_exact_mut(keys).zip(lse.iter_mut()).enumerate() {
                    let pos = tile.pos + i;
                    let (from, to) = (first_key(pos, heads) - first, pos + 1 - first);
                    row[..from].fill(0.0);
                    row[to..].fill(0.0);
                    let top = max(&row[from..to]);
                    let sum = exp_sum(&mut row[from..to], top);
                    *lse = top + sum.ln();
                    let factor = 1.0 / sum;
                    for p in &mut row[from..to] {
                        *p *= factor;
                    }
                }
            },
        );
        let v = Mat::rows(&self.v[first * self.kv_stride..], self.kv_stride);
        let p = Mat::rows(scores, keys);
        gemm(Threads::One, (tile.rows, heads.d, keys), 1.0, p, v, Write::Set, MatMut::rows(o, heads.d));
    }
}

/// Splits `buffer`, whose tokens take `width` elements each, into pieces of the given numbers of tokens.
fn split(mut buffer: &mut [f32], width: usize, tokens: impl Iterator<Item = usize>) -> Vec<&mut [f32]> {
    tokens
        .map(|n| {
            let (piece, rest) = std::mem::take(&mut buffer).split_at_mut(n * width);
            buffer = rest;
            piece
        })
        .collect()
}

pub(super) fn forward(s: &mut Scratch, a: AttentionForward<Cpu>) -> Result<()> {
    let op = "attention_forward";
    let (t, heads) = (a.batch.t, a.heads);
    let (h, d) = (heads.h, heads.d);
    check_heads(op, heads)?;
    at_least(op, "heads.d", d, 1)?;
    at_least(op, "o", a.o.len(), t * h * d)?;
    at_least(op, "lse", a.lse.len(), h * t)?;
    at_least(op, "qkv", a.qkv.len(), t * heads.qkv())?;
    check_sequences(op, a.batch)?;
    if t == 0 || h == 0 {
        return Ok(());
    }
    let cu = &a.batch.cu_seqlens[..=a.batch.b];
    // (first token of the sequence, tile), the same for every head.
    let tiles: Vec<(usize, Tile)> = cu
        .windows(2)
        .flat_map(|w| {
            let (start, len) = (w[0] as usize, (w[1] - w[0]) as usize);
            (0..len).step_by(ROWS).map(move |pos| (start, Tile { row: pos, pos, rows: ROWS.min(len - pos) }))
        })
        .collect();
    let sizes = || (0..h).flat_map(|_| tiles.iter().map(|(_, tile)| tile.rows));
    let o_pieces = split(grown(&mut s.heads, h * t * d), d, sizes());
    let lse_pieces = split(&mut a.lse[..h * t], 1, sizes());
    let qkv = &a.qkv[..t * heads.qkv()];
    let (per_head, threads) = (&tiles, &s.tiles);
    // One task at a time, the long tiles at the ends of sequences first, so that the last task is a short one.
    let mut tasks: Vec<_> = o_pieces.into_iter().zip(lse_pieces).enumerate().collect();
    tasks.reverse();
    tasks.into_par_iter().with_max_len(1).for_each(|(i, (o, lse))| {
        let (start, tile) = per_head[i % per_head.len()];
        let view = View::of(qkv, start, i / per_head.len(), heads);
        with_tile(threads, tile.scores(heads), |scores| view.forward(tile, heads, scores, o, lse));
    });
    lay_out(&mut a.o[..t * h * d], &s.heads, t, heads);
    Ok(())
}

/// out (T, H*D) = by_head (H, T, D)
pub(super) fn lay_out(out: &mut [f32], by_head: &[f32], t: usize, heads: Heads) {
    let (h, d) = (heads.h, heads.d);
    out.par_chunks_exact_mut(h * d).enumerate().with_min_len(rows_per_task(h * d)).for_each(|(token, row)| {
        for (head, x) in row.chunks_exact_mut(d).enumerate() {
            x.copy_from_slice(&by_head[(head * t + token) * d..][..d]);
        }
    });
}

/// What backward writes for one head of one sequence; all (len, D) but delta (len).
struct Gradients<'a> {
    dq: &'a mut [f32],
    dk: &'a mut [f32],
    dv: &'a mut [f32],
    delta: &'a mut [f32],
}

pub(super) fn backward(s: &mut Scratch, a: AttentionBackward<Cpu>) -> Result<()> {
    let op = "attention_backward";
    let (t, heads) = (a.batch.t, a.heads);
    let (h, d, width) = (heads.h, heads.d, heads.qkv());
    check_heads(op, heads)?;
    at_least(op, "heads.d", d, 1)?;
    at_least(op, "dqkv", a.dqkv.len(), t * width)?;
    at_least(op, "delta", a.delta.len(), h * t)?;
    at_least(op, "d_o", a.d_o.len(), t * h * d)?;
    at_least(op, "o", a.o.len(), t * h * d)?;
    at_least(op, "lse", a.lse.len(), h * t)?;
    at_least(op, "qkv", a.qkv.len(), t * width)?;
    check_sequences(op, a.batch)?;
    if t == 0 || h == 0 {
        return Ok(());
    }
    let cu = &a.batch.cu_seqlens[..=a.batch.b];
    let (b, qkv) = (a.batch.b, &a.qkv[..t * width]);
    let sizes = || (0..h).flat_map(|_| cu.windows(2).map(|w| (w[1] - w[0]) as usize));
    let (dk, dv) = grown(&mut s.d_kv, 2 * h * t * d).split_at_mut(h * t * d);
    let pieces = split(grown(&mut s.heads, h * t * d), d, sizes())
        .into_iter()
        .zip(split(dk, d, sizes()))
        .zip(split(dv, d, sizes()))
        .zip(split(&mut a.delta[..h * t], 1, sizes()));
    let tasks: Vec<_> =
        pieces.enumerate().map(|(i, (((dq, dk), dv), delta))| (i, Gradients { dq, dk, dv, delta })).collect();
    let threads = &s.tiles;
    let (d_o, o, lse) = (&a.d_o[..t * h * d], &a.o[..t * h * d], &a.lse[..h * t]);
    tasks.into_par_iter().with_max_len(1).for_each(|(i, gradients)| {
        let (head, start, len) = (i / b, cu[i % b] as usize, (cu[i % b + 1] - cu[i % b]) as usize);
        let at = start * h * d + head * d;
        let view = View::of(qkv, start, head, heads);
        let lse = &lse[head * t + start..][..len];
        with_tile(threads, 2 * ROWS.min(len) * len, |scratch| {
            head_backward(view, heads, &d_o[at..], &o[at..], lse, gradients, scratch);
        });
    });
    let (by_q, by_k, by_v) = (&s.heads, &s.d_kv[..h * t * d], &s.d_kv[h * t * d..2 * h * t * d]);
    let group = h / heads.g;
    let rows = a.dqkv[..t * width].par_chunks_exact_mut(width).enumerate().with_min_len(rows_per_task(width));
    rows.for_each(|(token, row)| {
        let of = |head: usize| (head * t + token) * d..(head * t + token + 1) * d;
        let (dq, rest) = row.split_at_mut(h * d);
        let (dk, dv) = rest.split_at_mut(heads.g * d);
        for (head, dq) in dq.chunks_exact_mut(d).enumerate() {
            dq.copy_from_slice(&by_q[of(head)]);
        }
        for (out, by_head) in [(dk, by_k), (dv, by_v)] {
            for (g, out) in out.chunks_exact_mut(d).enumerate() {
                out.copy_from_slice(&by_head[of(g * group)]);
                for head in g * group + 1..(g + 1) * group {
                    out.iter_mut().zip(&by_head[of(head)]).for_each(|(sum, x)| *sum += x);
                }
            }
        }
    });
    Ok(())
}

/// Backward of one head of one sequence. `d_o` and `o` start at its first token and head; tokens are H*D apart.
fn head_backward(view: View, heads: Heads, d_o: &[f32], o: &[f32], lse: &[f32], out: Gradients, scratch: &mut [f32]) {
    let (len, d, stride) = (lse.len(), heads.d, heads.h * heads.d);
    let Gradients { dq, dk, dv, delta } = out;
    simd(
        #[inline(always)]
        || {
            for (i, delta) in delta.iter_mut().enumerate() {
                *delta = dot(&d_o[i * stride..][..d], &o[i * stride..][..d]);
            }
        },
    );
    dk.fill(0.0);
    dv.fill(0.0);
    for pos in (0..len).step_by(ROWS) {
        let tile = Tile { row: pos, pos, rows: ROWS.min(len - pos) };
        let (rows, (first, keys)) = (tile.rows, tile.keys(heads));
        let (p, ds) = scratch.split_at_mut(rows * keys);
        let ds = &mut ds[..rows * keys];
        let at_keys = first * d..(first + keys) * d;
        let d_o = Mat::rows(&d_o[pos * stride..], stride);
        let q = Mat::rows(&view.q[pos * view.q_stride..], view.q_stride);
        let k = Mat::rows(&view.k[first * view.kv_stride..], view.kv_stride);
        let v = Mat::rows(&view.v[first * view.kv_stride..], view.kv_stride);

        view.scores(tile, heads, p);
        // dp, where ds will be
        gemm(Threads::One, (rows, keys, d), 1.0, d_o, v.t(), Write::Set, MatMut::rows(ds, keys));
        simd(
            #[inline(always)]
            || {
                for (i, (p, ds)) in p.chunks_exact_mut(keys).zip(ds.chunks_exact_mut(keys)).enumerate() {
                    let (lse, delta, scale) = (lse[pos + i], delta[pos + i], heads.scale());
                    let (from, to) = (first_key(pos + i, heads) - first, pos + i + 1 - first);
                    for masked in [0..from, to..keys] {
                        p[masked.clone()].fill(0.0);
                        ds[masked].fill(0.0);
                    }
                    for (p, ds) in p[from..to].iter_mut().zip(&mut ds[from..to]) {
                        *p = exp(*p - lse);
                        *ds = *p * (*ds - delta) * scale;
                    }
                }
            },
        );
        let (p, ds) = (Mat::rows(p, keys), Mat::rows(ds, keys));
        gemm(Threads::One, (keys, d, rows), 1.0, p.t(), d_o, Write::Add, MatMut::rows(&mut dv[at_keys.clone()], d));
        gemm(Threads::One, (rows, d, keys), 1.0, ds, k, Write::Set, MatMut::rows(&mut dq[pos * d..], d));
        gemm(Threads::One, (keys, d, rows), 1.0, ds.t(), q, Write::Add, MatMut::rows(&mut dk[at_keys], d));
    }
}
