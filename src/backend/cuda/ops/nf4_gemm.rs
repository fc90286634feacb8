//! csrc/nf4_gemm.cu behind checks.
