//! The frame of a step: its parts by name, what decides whether it can be replayed, what memory is for.

use super::Heads;

/// A part of a step, for the timeline of a profiler and for the place in an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Optimizer step, from 1.
    Step(u64),
    Forward,
    Backward,
    Layer(usize),
    /// Forward of a layer again, for backward.
    Recompute(usize),
    Head,
    Optimizer,
    Decode,
}

/// What decides which ops a micro-step launches, and on what.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct StepKey {
    /// A number of the model in this process (of decoding: of the cache): they do not share buffers.
    pub model: u64,
    /// [`Batch::number`](super::Batch::number); of decoding: 0.
    pub batch: u64,
    pub kind: StepKind,
    /// T, B and M as [`Batch`](super::Batch) holds them, padded; of decoding: T, 1, 1.
    pub t: usize,
    pub b: usize,
    pub m: usize,
    /// Bits of p and the seed of [`Dropout`](super::Dropout).
    pub dropout: Option<(u32, u64)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum StepKind {
    Train,
    Loss,
    Decode,
}

/// What memory is for: the rows of the plan's table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Item {
    /// Token embedding and lm_head, norms of the model.
    Embedding,
    /// Frozen projections, norms and biases of the layers.
    Weights,
    /// Working copy of the adapter.
    Adapter,
    /// f32 gradients of the adapter.
    Gradients,
    /// Layer inputs and what else is kept for backward.
    Activations,
    /// Buffers that every layer uses in turn.
    Scratch,
    /// Scratch of the ops: dequantised slices, logits of a chunk, partial sums.
    Workspace,
    /// Tokens, positions, targets.
    Batch,
    KvCache,
    Optimizer,
}

/// The sizes that the scratch of the ops follows from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// T: the most tokens of a micro-batch.
    pub t: usize,
    /// C and V of the model.
    pub c: usize,
    pub v: usize,
    /// Most elements N*K of one 4-bit projection, and of all 4-bit projections of a group.
    pub part: usize,
    pub group: usize,
    /// Widest N and K of a group of projections, and its widest R.
    pub n: usize,
    pub k: usize,
    pub r: usize,
    /// P
    pub trainable: usize,
    pub heads: Option<Heads>,
    /// Whether backward runs, and whether dropout does.
    pub train: bool,
    pub dropout: bool,
}
