//! Attention of new tokens over a cache of keys and values.

use rayon::prelude::*;

use super::attention::{ROWS, Tile, View};
use super::{Cpu, Scratch, at_least, check_heads, grown, with_tile};
use crate::backend::AttentionDecode;
use crate::error::Result;

pub(super) fn attention(s: &mut Scratch, a: AttentionDecode<Cpu>) -> Result<()> {
    let op = "attention_decode";
    let (t, past, heads) = (a.t, a.past, a.heads);
    let (h, d, width, kv) = (heads.h, heads.d, heads.qkv(), heads.g * heads.d);
    check_heads(op, heads)?;
    at_least(op, "heads.d", d, 1)?;
    at_least(op, "o", a.o.len(), t * h * d)?;
    at_least(op, "cache.k", a.cache.k.len(), (past + t) * kv)?;
    at_least(op, "cache.v", a.cache.v.len(), (past + t) * kv)?;
    at_least(op, "qkv", a.qkv.len(), t * width)?;
    if t == 0 || h == 0 {
        return Ok(());
    }
    for (i, row) in a.qkv[..t * width].chunks_exact(width).enumerate() {
        let at = (past + i) * kv..(past + i + 1) * kv;
        a.cache.k[at.clone()].copy_from_slice(&row[h * d..][..kv]);
        a.cache.v[at].copy_from_slice(&row[h * d + kv..][..kv]);
    }
    let (k, v, qkv) = (&a.cache.k[..(past + t) * kv], &a.cache.v[..(past + t) * kv], &a.qkv[..t * width]);
    let threads = &s.tiles;
    let by_head = grown(&mut s.heads, h * t * d);
    let tasks = by_head
        .par_chunks_mut(t * d)
        .enumerate()
        .flat_map(|(head, o)| o.par_chunks_mut(ROWS * d).enumerate().map(move |(tile, o)| (head, tile * ROWS, o)));
    tasks.for_each(|(head, row, o)| {
        let at = head / (h / heads.g) * d;
        let view = View { q: &qkv[head * d..], q_stride: width, k: &k[at..], v: &v[at..], kv_stride: kv };
        let tile = Tile { row, pos: past + row, rows: o.len() / d };
        let scores = tile.scores(heads);
        with_tile(threads, scores + tile.rows, |scratch| {
            let (scores, lse) = scratch.split_at_mut(scores);
            view.forward(tile, heads, scores, o, lse);
        });
    });
    super::attention::lay_out(&mut a.o[..t * h * d], by_head, t, heads);
    Ok(())
}
