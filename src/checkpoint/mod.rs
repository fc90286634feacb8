//! Everything that touches a file of weights: Hugging Face directories, 4-bit directories of bitsandbytes, PEFT
//! adapters, merged models, training state.
//!
//! Readers check every claim of a file before they use it and answer with file, place, found, expected. Writers go
//! through [`atomic`]: what they make is complete or not there.

pub mod atomic;
pub mod config;
pub mod dir;
mod json;
pub mod merge;
mod names;
mod output;
pub mod peft;
pub mod quantized;
pub mod random;
pub mod safetensors_file;
mod safetensors_write;
pub mod state;
#[cfg(test)]
mod tests;

pub use crate::nf4::QuantConfig;
pub use dir::{ModelDir, TensorInfo, Weights};
pub use safetensors_file::SafeTensors;
