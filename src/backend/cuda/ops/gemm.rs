//! csrc/gemm.cu behind checks.
