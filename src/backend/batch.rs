//! A micro-batch: sequences laid end to end, on the host and on the device.
//!
//! Between sequences there is no padding. A backend with a granularity gets T, M and B rounded up behind the last of them,
//! so that few shapes occur and launches can be replayed: T by a sequence of its own that has no targets, M by rows of -1,
//! B by empty sequences. They change nothing in the results of the others.

use std::sync::atomic::{AtomicU64, Ordering};

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
    /// A number of this batch in this process: no two share buffers.
    pub number: u64,
    /// (T) token ids.
    pub tokens: B::I32,
    /// (T) position of each token inside its sequence.
    pub positions: B::I32,
    /// (B+1) offsets of the sequences; those of empty ones at the end are T.
    pub cu_seqlens: B::I32,
    /// (M) rows of the target tokens, in order; -1 where M was rounded up.
    pub target_rows: B::I32,
    /// (M) their targets; [`IGNORE`] where M was rounded up.
    pub target_ids: B::I32,
    /// (1) factor of every token's loss and gradient: 1 / target tokens of the optimizer step.
    pub scale: B::F32,
    /// T, B and M, rounded up to what the backend wants.
    pub t: usize,
    pub b: usize,
    pub m: usize,
    /// Tokens of each sequence, what was rounded up among them; on the host.
    pub lengths: Vec<usize>,
    /// Tokens the buffers were made for.
    pub capacity: usize,
}

impl<B: Backend> Batch<B> {
    /// Buffers for `capacity` tokens, rounded up to the backend's granularity.
    pub fn new(backend: &mut B, capacity: usize) -> Result<Self> {
        static NUMBERS: AtomicU64 = AtomicU64::new(0);
        let capacity = capacity.next_multiple_of(backend.granularity());
        Ok(Self {
            number: NUMBERS.fetch_add(1, Ordering::Relaxed),
            tokens: backend.alloc_i32(capacity)?,
            positions: backend.alloc_i32(capacity)?,
            cu_seqlens: backend.alloc_i32(capacity + 1)?,
            target_rows: backend.alloc_i32(capacity)?,
            target_ids: backend.alloc_i32(capacity)?,
            scale: backend.alloc_f32(1)?,
            t: 0,
            b: 0,
            m: 0,
            lengths: vec![],
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
        let padded = Padded::new(host, backend.granularity(), self.capacity);
        (self.t, self.b, self.m) = (padded.tokens.len(), padded.cu_seqlens.len() - 1, padded.target_rows.len());
        self.lengths.clear();
        self.lengths.extend(padded.cu_seqlens.windows(2).map(|w| (w[1] - w[0]) as usize));
        backend.write_i32(&mut self.tokens, &padded.tokens)?;
        backend.write_i32(&mut self.positions, &padded.positions)?;
        backend.write_i32(&mut self.cu_seqlens, &padded.cu_seqlens)?;
        backend.write_i32(&mut self.target_rows, &padded.target_rows)?;
        backend.write_i32(&mut self.target_ids, &padded.target_ids)?;
        backend.write_f32(&mut self.scale, &[scale])
    }
}

/// What [`Batch::fill`] writes.
#[derive(Debug, PartialEq)]
struct Padded {
    tokens: Vec<i32>,
    positions: Vec<i32>,
    cu_seqlens: Vec<i32>,
    target_rows: Vec<i32>,
    target_ids: Vec<i32>,
}

impl Padded {
    fn new(host: &HostBatch, granularity: usize, capacity: usize) -> Self {
        let round = |n: usize| n.next_multiple_of(granularity).min(capacity).max(n);
        let (mut tokens, mut cu_seqlens) = (host.tokens.clone(), host.cu_seqlens.clone());
        let t = round(tokens.len());
        if t > tokens.len() {
            tokens.resize(t, 0);
            cu_seqlens.push(t as i32);
        }
        let positions = cu_seqlens.windows(2).flat_map(|w| 0..w[1] - w[0]).collect();
        let b = cu_seqlens.len() - 1;
        if granularity > 1 && b > 0 {
            cu_seqlens.resize(b.next_power_of_two().min(capacity).max(b) + 1, t as i32);
        }
        let targets = host.targets.iter().enumerate().filter(|&(_, &id)| id != IGNORE);
        let (mut target_rows, mut target_ids): (Vec<i32>, Vec<i32>) =
            targets.map(|(row, &id)| (row as i32, id)).unzip();
        let m = round(target_rows.len());
        target_rows.resize(m, -1);
        target_ids.resize(m, IGNORE);
        Self { tokens, positions, cu_seqlens, target_rows, target_ids }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn two_sequences() -> HostBatch {
        HostBatch { tokens: vec![5, 6, 7, 8, 9], targets: vec![6, IGNORE, 8, 9, IGNORE], cu_seqlens: vec![0, 2, 5] }
    }

    #[test]
    fn without_a_granularity_nothing_is_added() {
        let padded = Padded::new(&two_sequences(), 1, 100);
        let expected = Padded {
            tokens: vec![5, 6, 7, 8, 9],
            positions: vec![0, 1, 0, 1, 2],
            cu_seqlens: vec![0, 2, 5],
            target_rows: vec![0, 2, 3],
            target_ids: vec![6, 8, 9],
        };
        assert_eq!(padded, expected);
    }

    #[test]
    fn padding_is_a_sequence_of_its_own_without_targets() {
        let padded = Padded::new(&two_sequences(), 8, 16);
        let expected = Padded {
            tokens: vec![5, 6, 7, 8, 9, 0, 0, 0],
            positions: vec![0, 1, 0, 1, 2, 0, 1, 2],
            cu_seqlens: vec![0, 2, 5, 8, 8],
            target_rows: vec![0, 2, 3, -1, -1, -1, -1, -1],
            target_ids: vec![6, 8, 9, IGNORE, IGNORE, IGNORE, IGNORE, IGNORE],
        };
        assert_eq!(padded, expected);
    }

    #[test]
    fn padding_stays_inside_the_buffers() {
        for (granularity, capacity) in [(64, 5), (4, 6), (64, 64)] {
            let padded = Padded::new(&two_sequences(), granularity, capacity);
            assert!(
                padded.tokens.len() <= capacity && padded.target_rows.len() <= capacity,
                "{granularity} {capacity}"
            );
            assert!(padded.cu_seqlens.len() <= capacity + 1, "{granularity} {capacity}");
            assert_eq!(padded.cu_seqlens.last(), Some(&(padded.tokens.len() as i32)));
            assert_eq!(padded.positions.len(), padded.tokens.len());
        }
    }

    #[test]
    fn no_targets_stay_no_targets_and_no_tokens_no_tokens() {
        let silent = HostBatch { targets: vec![IGNORE; 5], ..two_sequences() };
        assert_eq!(Padded::new(&silent, 64, 64).target_rows.len(), 0);
        let empty = HostBatch { cu_seqlens: vec![0], ..HostBatch::default() };
        let padded = Padded::new(&empty, 64, 64);
        assert_eq!((padded.tokens.len(), padded.cu_seqlens.len()), (0, 1));
    }
}
