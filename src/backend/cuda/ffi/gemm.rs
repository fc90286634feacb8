//! csrc/gemm.cu.
