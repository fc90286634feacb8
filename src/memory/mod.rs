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
pub use choose::{MAX_TOKENS, Mode, default_budget, item_name, largest_batch, largest_length, plan, too_large};
pub use meter::{Meter, Work};
pub use plan::{Plan, Request, describe_layers, forward_bytes, measure};
pub use size::{parse_size, size};

use crate::backend::adamw::{MOMENT_BLOCK, StateLayout};
use crate::backend::workspace::CUBLAS_BYTES;
use crate::backend::{Backend, OptimKind};
use crate::error::{Error, Result};

/// What a process takes of a card beside the arena: context, kernels, events, records of micro-steps.
pub const CONTEXT: usize = 512 << 20;
/// Of that, what the driver counts from the first allocation to the end of the first steps: kernels and cuBLAS are loaded
/// when they first run, records of micro-steps are kept. Measured on an H100 (bench/results, driver_bytes less planned).
pub const LIBRARIES: usize = 112 << 20;
/// Left free of what a card has free, where no budget is named.
pub const MARGIN: usize = 256 << 20;

/// The device budget: as `text` says, else the default. Errors name `flag`: no size, or more than is `free`.
pub fn budget(flag: &str, text: Option<&str>, free: usize, card: &Card) -> Result<usize> {
    let Some(text) = text else { return Ok(default_budget(Some(free), card)) };
    let bytes = parse_size(flag, text)?;
    if bytes > free {
        let expected = format!("at most the {} that the GPU has free (another process may hold the rest)", size(free));
        return Err(Error::flag(flag, text, expected));
    }
    Ok(bytes)
}

/// Whether a model, its batch and its optimizer have taken exactly what was reserved for them: what the plan counted.
pub fn check<B: Backend>(backend: &B) -> Result<()> {
    let Some((used, reserved)) = backend.reserved() else { return Ok(()) };
    // Where cuBLAS is missing its workspace stays free.
    if used == reserved || used + CUBLAS_BYTES == reserved {
        return Ok(());
    }
    let detail = format!("{used} bytes were taken where the plan counted {reserved}: a fault of halfbyte");
    Err(Error::Cuda { op: "plan".into(), detail })
}

/// Bytes of host memory that are available; 16 GiB where the system does not tell.
pub fn host_memory() -> usize {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|rest| rest.split_whitespace().next()?.parse::<usize>().ok());
    kib.map_or(16 << 30, |kib| kib << 10)
}

/// Bytes of AdamW's state: f32 master weights, and two moments in f32 or in 8 bits with an absmax for each block.
pub fn optimizer_bytes(kind: OptimKind, tensors: &[usize]) -> usize {
    let blocks = tensors.iter().map(|len| len.div_ceil(MOMENT_BLOCK)).sum();
    StateLayout::new(kind, tensors.iter().sum(), blocks).bytes
}
