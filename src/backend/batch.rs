//! A micro-batch: sequences laid end to end, on the host and on the device. There is no padding.

use super::Backend;
use crate::error::Result;

/// One micro-batch in host memory: sequences laid end to end.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostBatch {
    /// (T) token ids.
    pub tokens: Vec<i32>,
    /// (T) the id that position t must predict, already shifted; -100 where there is none.
    pub targets: Vec<i32>,
    /// (B+1) where each sequence starts; first 0, last T, strictly rising.
    pub cu_seqlens: Vec<i32>,
}

/// transformers' and PyTorch's mark for "no target here".
pub const IGNORE: i32 = -100;

impl HostBatch {
    /// M, the number of target tokens.
    pub fn target_count(&self) -> usize {
        self.targets.iter().filter(|&&t| t != IGNORE).count()
    }

    /// Lays another batch behind this one.
    pub fn append(&mut self, other: &HostBatch) {
        if self.cu_seqlens.is_empty() {
            self.cu_seqlens.push(0);
        }
        let base = self.tokens.len() as i32;
        self.tokens.extend_from_slice(&other.tokens);
        self.targets.extend_from_slice(&other.targets);
        self.cu_seqlens.extend(other.cu_seqlens.iter().skip(1).map(|c| c + base));
    }
}

/// One micro-batch on the device. Allocated once for `capacity` tokens; [`Batch::fill`] changes only contents.
pub struct Batch<B: Backend> {
    /// (T) token ids.
    pub tokens: B::I32,
    /// (T) position of each token inside its sequence.
    pub positions: B::I32,
    /// (B+1) offsets of the sequences.
    pub cu_seqlens: B::I32,
    /// (M) rows of the target tokens, in order.
    pub target_rows: B::I32,
    /// (M) their targets.
    pub target_ids: B::I32,
    /// (1) factor of every token's loss and gradient: 1 / target tokens of the optimizer step.
    pub scale: B::F32,
    /// T, B and M as the host knows them.
    pub t: usize,
    pub b: usize,
    pub m: usize,
    /// Longest sequence.
    pub max_seqlen: usize,
    /// Tokens the buffers were made for.
    pub capacity: usize,
}

impl<B: Backend> Batch<B> {
    pub fn new(backend: &mut B, capacity: usize) -> Result<Self> {
        Ok(Self {
            tokens: backend.alloc_i32(capacity)?,
            positions: backend.alloc_i32(capacity)?,
            cu_seqlens: backend.alloc_i32(capacity + 1)?,
            target_rows: backend.alloc_i32(capacity)?,
            target_ids: backend.alloc_i32(capacity)?,
            scale: backend.alloc_f32(1)?,
            t: 0,
            b: 0,
            m: 0,
            max_seqlen: 0,
            capacity,
        })
    }

    /// Moves a micro-batch to the device. `scale` multiplies every token's loss and gradient.
    /// Panics if it has more than `capacity` tokens: the caller made the batch.
    pub fn fill(&mut self, backend: &mut B, host: &HostBatch, scale: f32) -> Result<()> {
        let t = host.tokens.len();
        assert!(t <= self.capacity, "a batch of {t} tokens in buffers for {}", self.capacity);
        assert_eq!(host.targets.len(), t, "a target for each token");
        assert_eq!(host.cu_seqlens.last().copied(), Some(t as i32), "cu_seqlens ends at T");
        let lengths = host.cu_seqlens.windows(2).map(|w| w[1] - w[0]);
        let positions: Vec<i32> = lengths.clone().flat_map(|n| 0..n).collect();
        let (rows, ids): (Vec<i32>, Vec<i32>) =
            host.targets.iter().enumerate().filter(|&(_, &id)| id != IGNORE).map(|(row, &id)| (row as i32, id)).unzip();
        (self.t, self.b, self.m) = (t, host.cu_seqlens.len() - 1, rows.len());
        self.max_seqlen = lengths.max().unwrap_or(0) as usize;
        backend.write_i32(&mut self.tokens, &host.tokens)?;
        backend.write_i32(&mut self.positions, &positions)?;
        backend.write_i32(&mut self.cu_seqlens, &host.cu_seqlens)?;
        backend.write_i32(&mut self.target_rows, &rows)?;
        backend.write_i32(&mut self.target_ids, &ids)?;
        backend.write_f32(&mut self.scale, &[scale])
    }
}
