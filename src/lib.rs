//! halfbyte: QLoRA fine-tuning from one native binary.
//!
//! # The map
//!
//! | module | what | imports |
//! |---|---|---|
//! | [`train`] | the loop, its settings, schedule, metrics, checkpoints, resume | `model`, `data`, `checkpoint`, `memory` |
//! | [`memory`] | the plan: every byte, and what each layer keeps, before anything is allocated | `model`, `backend` |
//! | [`generate`] | KV cache and sampling | `model`, `data` |
//! | [`mod@bench`] | what `halfbyte bench` and `cargo bench` time | `model`, `checkpoint` |
//! | [`model`] | configuration, adapter, and the graph: forward beside backward | `backend` |
//! | [`backend`] | the op set, a device behind it: `cpu` (f32, the oracle), `cuda` (feature `cuda`) | `nf4` |
//! | [`checkpoint`] | everything that touches a file of weights | `nf4`, types of `model` and `backend` |
//! | [`data`] | JSONL rows, chat templates, loss mask, packing | types of `backend` |
//! | [`nf4`] | 4-bit blocks, double quantisation, the serialisation of bitsandbytes | |
//! | [`tensor`], [`rng`], [`names`], [`error`] | the ground | |
//!
//! The command line (`src/cli/`) belongs to the binary. `docs/architecture.md` tells the life of a training step.
//!
//! # The letters
//!
//! | | | | |
//! |---|---|---|---|
//! | `B` | sequences | `V` | vocabulary |
//! | `T` | tokens, all sequences laid end to end | `R` | LoRA rank |
//! | `C` | channels | `L` | layers |
//! | `H` | query heads | `N`, `K` | output and input width of a linear |
//! | `G` | KV heads | `M` | target tokens |
//! | `D` | head size | `P` | trainable weights |
//! | `F` | MLP width | `dx` | gradient of `x` |

pub mod backend;
pub mod bench;
pub mod checkpoint;
pub mod data;
pub mod error;
pub mod generate;
pub mod memory;
pub mod model;
pub mod names;
pub mod nf4;
pub mod rng;
pub mod tensor;
pub mod train;

pub use error::{Error, Result};
