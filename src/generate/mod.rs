//! Generation: prompt into the KV cache, then a token at a time, streamed as text.

pub mod sampling;
pub mod stream;

pub use sampling::Sampling;
