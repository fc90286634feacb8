//! halfbyte: QLoRA fine-tuning from one native binary. See `docs/architecture.md`.

pub mod backend;
pub mod checkpoint;
pub mod data;
pub mod error;
pub mod generate;
pub mod model;
pub mod nf4;
pub mod rng;
pub mod tensor;
pub mod train;

pub use error::{Error, Result};
