//! The plan: every byte of a run before anything is allocated, and what each layer keeps, recomputes or sends to the host,
//! for the fastest step that fits. It needs no GPU.
//!
//! The bytes are counted, and the time predicted, by running the graph itself on a backend that does nothing else
//! ([`Meter`]).

pub mod card;
mod choose;
mod meter;
mod plan;
pub mod size;
#[cfg(test)]
mod tests;

pub use card::{CARDS, Card};
pub use choose::{Mode, default_budget, item_name, largest_batch, largest_length, plan};
pub use meter::{Meter, Work};
pub use plan::{Plan, Request, forward_bytes, measure};
pub use size::{parse_size, size};

use crate::backend::OptimKind;
use crate::backend::adamw::MOMENT_BLOCK;

/// What a process takes of a card beside the arena: context, kernels, events, records of micro-steps.
pub const CONTEXT: usize = 512 << 20;
/// Left free of what a card has free, where no budget is named.
pub const MARGIN: usize = 256 << 20;

/// Bytes of AdamW's state: f32 master weights, and two moments in f32 or in 8 bits with an absmax for each block.
pub fn optimizer_bytes(kind: OptimKind, tensors: &[usize]) -> usize {
    let weights: usize = tensors.iter().sum();
    match kind {
        OptimKind::AdamwTorch | OptimKind::PagedAdamw32bit => 12 * weights,
        OptimKind::PagedAdamw8bit => {
            6 * weights + 8 * tensors.iter().map(|len| len.div_ceil(MOMENT_BLOCK)).sum::<usize>()
        }
    }
}
