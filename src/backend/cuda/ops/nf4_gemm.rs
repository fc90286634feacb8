//! csrc/nf4_gemm.cu behind checks.

pub use super::nf4::Nf4Weight;
