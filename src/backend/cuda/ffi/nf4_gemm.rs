//! csrc/nf4_gemm.cu.
