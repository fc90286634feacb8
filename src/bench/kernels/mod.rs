//! The table of kernels: every op at the shapes of 1B, 7B and 13B models, each way it can run, checked against the host,
//! timed, and set beside what the card does at best. [`case`] is the vocabulary, [`ops`] has the ops, the rest is machinery
//! that knows none of them.

pub mod case;
pub mod check;
pub mod models;
pub mod ops;
#[cfg(feature = "cuda")]
pub mod set;
pub mod values;
