//! The scratch of the CUDA ops, as sizes: what [`Backend::prepare`](super::Backend::prepare) takes there and what the
//! memory plan counts, on any machine.

use super::{Heads, Needs};
use crate::nf4::BLOCK;

/// Token counts are padded to a multiple of this on the GPU.
pub const GRANULARITY: usize = 64;
/// A group of projections is dequantised whole, for one product, where it takes at most this many bytes in bf16.
const GROUP_BYTES: usize = 64 << 20;
/// Logits of one chunk of target tokens take at most this many bytes, and one multiple of [`GRANULARITY`] at least.
const LOGITS_BYTES: usize = 128 << 20;
/// The most target tokens of a chunk.
const LOGITS_ROWS: usize = 2048;
/// What cuBLAS gets: NVIDIA's advice for Hopper.
pub const CUBLAS_BYTES: usize = 32 << 20;
/// Rows of logits that [`Backend::head_logits`](super::Backend::head_logits) computes at a time.
const ROWS_AT_ONCE: usize = 64;

/// New tokens that attention over a cache takes at a time, and in a model made for training.
const DECODE_TOKENS: usize = 256;
const DECODE_TOKENS_IN_TRAINING: usize = 8;
/// f64 partial sums of grad_norm.
const GRAD_NORM_PARTIALS: usize = 1024;

/// f32 elements of partial sums that the LoRA products need at most for T = `t`, an input of `k`, an output of `n`, and a
/// sum of ranks `r`, or for smaller sizes: it rises with each argument.
pub fn lora_scratch(t: usize, k: usize, n: usize, r: usize) -> usize {
    // Bounds of what the launchers of csrc/lora.cu place, whatever the ranks of the parts.
    let tiles = t.div_ceil(64);
    let rows = |width: usize| r * t.max((256 * 64).min(t * width.div_ceil(256)));
    let cols = |width: usize| r * width.max((256 * 128).min(tiles * width));
    let shared = r.min(32);
    let fused_rows = t * (shared * n.div_ceil(if r <= 16 { 1024 } else { 512 }) + r);
    let fused_cols = shared * n + (256 * 128 * 128).min(tiles * n * shared);
    rows(k).max(rows(n) + cols(n) + fused_rows + fused_cols + cols(k))
}

/// Parts into which attention of `t` new tokens splits the cache. Many tokens fill the GPU by themselves.
pub fn attention_decode_splits(t: usize) -> usize {
    if t <= 8 { 32 } else { 4 }
}

/// f32 elements that attention of `t` new tokens over a cache, or of fewer, needs.
pub fn attention_decode_scratch(t: usize, heads: Heads) -> usize {
    let rows = (t * attention_decode_splits(t)).max(t.min(8) * attention_decode_splits(1));
    rows * heads.h * (heads.d + 2)
}

/// Elements of each scratch buffer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Workspace {
    /// bf16: a dequantised projection or group of them.
    pub weights: usize,
    /// Rows of a chunk of the head.
    pub head_rows: usize,
    /// f32 (head_rows, V).
    pub logits: usize,
    /// bf16 (head_rows, C): those rows of x.
    pub rows: usize,
    /// bf16 (head_rows, C): their gradient.
    pub d_rows: usize,
    /// f32 (T): the loss of each target.
    pub row_loss: usize,
    /// i32: rows of x that the host asks for.
    pub row_ids: usize,
    /// f32: partial sums of the LoRA products.
    pub lora: usize,
    /// f32: partial results of attention over a cache.
    pub decode: usize,
    /// f64: partial sums of squares.
    pub norm: usize,
    /// u32: the dropout step.
    pub step: usize,
    /// Bytes of cuBLAS.
    pub cublas: usize,
}

/// The scratch for models and micro-batches up to `needs`.
pub fn workspace(needs: &Needs) -> Workspace {
    let t = needs.t.next_multiple_of(GRANULARITY);
    let weights = if 2 * needs.group <= GROUP_BYTES { needs.group.max(needs.part) } else { needs.part };
    let fit = LOGITS_BYTES / (4 * needs.v.max(1)) / GRANULARITY * GRANULARITY;
    let head_rows = fit.clamp(GRANULARITY, LOGITS_ROWS).min(t.max(ROWS_AT_ONCE));
    let rows = head_rows * needs.c;
    let new_tokens = t.min(if needs.train { DECODE_TOKENS_IN_TRAINING } else { DECODE_TOKENS });
    let decode = needs.heads.map_or(0, |heads| attention_decode_scratch(new_tokens, heads));
    Workspace {
        weights: weights.next_multiple_of(BLOCK),
        head_rows,
        logits: head_rows * needs.v,
        rows,
        d_rows: if needs.train { rows } else { 0 },
        row_loss: t,
        row_ids: head_rows,
        lora: if needs.r > 0 { lora_scratch(t, needs.k, needs.n, needs.r) } else { 0 },
        decode,
        norm: if needs.train { GRAD_NORM_PARTIALS } else { 0 },
        step: 1,
        cublas: CUBLAS_BYTES,
    }
}

impl Workspace {
    fn sizes(&mut self) -> [&mut usize; 12] {
        let Self { weights, head_rows, logits, rows, d_rows, row_loss, row_ids, lora, decode, norm, step, cublas } =
            self;
        [weights, head_rows, logits, rows, d_rows, row_loss, row_ids, lora, decode, norm, step, cublas]
    }

    /// Whether each buffer is at least as large as in `other`.
    pub fn covers(mut self, mut other: Self) -> bool {
        self.sizes().iter().zip(other.sizes()).all(|(a, b)| **a >= *b)
    }

    /// The larger size of each buffer.
    pub fn max(mut self, mut other: Self) -> Self {
        for (a, b) in self.sizes().into_iter().zip(other.sizes()) {
            *a = (*a).max(*b);
        }
        self
    }

    /// Name and bytes of each buffer.
    pub fn items(&self) -> [(&'static str, usize); 11] {
        [
            ("dequantised weights", 2 * self.weights),
            ("logits of a chunk", 4 * self.logits),
            ("rows of the head", 2 * self.rows),
            ("their gradient", 2 * self.d_rows),
            ("loss of each target", 4 * self.row_loss),
            ("rows asked for", 4 * self.row_ids),
            ("partial sums of LoRA", 4 * self.lora),
            ("partial results of decoding", 4 * self.decode),
            ("partial sums of the norm", 8 * self.norm),
            ("dropout step", 4 * self.step),
            ("cuBLAS", self.cublas),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Mistral-7B with rank 16 on everything.
    fn mistral(t: usize) -> Needs {
        let heads = Some(Heads { h: 32, g: 8, d: 128, window: None });
        let (part, group, n, k) = (14_336 * 4096, 28_672 * 4096, 28_672, 14_336);
        Needs { t, c: 4096, v: 32_000, part, group, n, k, r: 48, trainable: 1, heads, train: true, dropout: false }
    }

    #[test]
    fn a_chunk_of_logits_is_whole_granules_and_keeps_to_its_bytes() {
        for (t, v) in [(1, 7), (64, 32_000), (8192, 32_000), (8192, 151_936), (100, 1_000_000_000)] {
            let w = workspace(&Needs { v, ..mistral(t) });
            assert!(w.head_rows.is_multiple_of(GRANULARITY) && w.head_rows <= LOGITS_ROWS, "{t} {v}: {}", w.head_rows);
            assert!(4 * w.logits <= LOGITS_BYTES || w.head_rows == GRANULARITY, "{t} {v}");
        }
        assert_eq!(workspace(&mistral(8192)).head_rows, 1024);
        assert_eq!(workspace(&mistral(512)).head_rows, 512);
    }

    #[test]
    fn weights_hold_a_projection_and_a_small_group() {
        assert_eq!(workspace(&mistral(64)).weights, 14_336 * 4096);
        let small = Needs { part: 1000, group: 3000, ..mistral(64) };
        assert_eq!(workspace(&small).weights, 3008);
        assert_eq!(workspace(&Needs { part: 0, group: 0, ..small }).weights, 0);
    }

    #[test]
    fn more_tokens_never_need_less() {
        let mut last = workspace(&mistral(1));
        for t in [2, 64, 65, 100, 512, 1000, 8192, 100_000] {
            let next = workspace(&mistral(t));
            assert!(next.covers(last), "{t}: {next:?} after {last:?}");
            assert_eq!((next.max(last), last.max(next)), (next, next));
            last = next;
        }
        assert!(!workspace(&mistral(64)).covers(last));
    }

    #[test]
    fn scratch_rises_with_each_argument() {
        let sizes = [1, 7, 16, 17, 33, 64, 130, 513, 1024, 1025, 4096, 14_336, 28_672];
        let ranks = [1, 16, 17, 32, 48, 64, 256, 768];
        for (i, &t) in sizes.iter().enumerate() {
            for &other in &sizes {
                for &r in &ranks {
                    let next = sizes[(i + 1).min(sizes.len() - 1)];
                    assert!(lora_scratch(next, other, other, r) >= lora_scratch(t, other, other, r));
                    assert!(lora_scratch(other, next, other, r) >= lora_scratch(other, t, other, r));
                    assert!(lora_scratch(other, other, next, r) >= lora_scratch(other, other, t, r));
                    assert!(lora_scratch(other, t, next, r + 1) >= lora_scratch(other, t, next, r));
                }
            }
        }
    }
}
