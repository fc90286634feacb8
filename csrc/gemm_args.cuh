// Arguments of the matrix product, the same for gemm.cu and gemm_sm90.cu.
#pragma once

#include "mma.cuh"

// gemm    c = alpha * (a·op(b) + a2·op(b2)) + bias + c,  each term after the first where it is asked for.
//
//   c     (m, n)            bf16 or f32  =, or += where `accumulate`; rows ldc apart
//   a     (m, k)            bf16, rows lda apart
//   b     (n, k) or (k, n)  bf16, rows ldb apart: (n, k) where b_transposed
//   a2    (m, k2)           bf16, rows lda2 apart; k2 = 0: no second product
//   b2    (n, k2) or (k2, n), as b, rows ldb2 apart
//   bias  (n)               bf16 or null
//
// Sums in f32, one rounding, no atomics, no split of k: the same bits in every run, on every card, for every alignment.
// Fast where the rows of a, b, a2, b2 start at 16 bytes and have multiples of 8 elements; m is free, and n, too, where
// b is (n, k). m = 0 or n = 0: no launch.
// Floor: 2 m n (k + k2) flops.
struct Gemm {
    void *c;
    const bf16 *a, *b, *a2, *b2, *bias;
    int64_t ldc, lda, ldb, lda2, ldb2;
    int32_t m, n, k, k2;
    float alpha;
    int32_t accumulate, b_transposed;
    Dtype c_dtype;
};
static_assert(sizeof(Gemm) == 120, "as in src/backend/cuda/ffi/gemm.rs");
