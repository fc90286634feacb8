// The bf16 matrix product of every card from sm_80 on. See gemm.cuh for how.

#include "gemm.cuh"
#include "gemm_args.cuh"

// See gemm_args.cuh for the contract.
HALFBYTE_API cudaError_t gemm(const Gemm *args, cudaStream_t stream) {
    const Gemm &g = *args;
    if (g.m == 0 || g.n == 0) return cudaSuccess;
    if (g.c_dtype != Dtype::F32 && g.c_dtype != Dtype::Bf16) return cudaErrorInvalidValue;
    const bool c_f32 = g.c_dtype == Dtype::F32;
    GemmParams p{};
    p.c = g.c;
    p.ldc = g.ldc;
    p.main = {g.a, g.b, g.lda, g.ldb, g.k};
    p.pair = {g.a2, g.b2, g.lda2, g.ldb2, g.k2};
    p.bias = g.bias;
    p.alpha = g.alpha;
    p.m = g.m;
    p.n = g.n;
    p.accumulate = g.accumulate != 0;
    p.c_f32 = c_f32;
    p.c_vectors = is_aligned(g.c, 16) && g.ldc % (c_f32 ? 4 : 8) == 0;
    const bool aligned = gemm_aligned(p.main, g.b_transposed ? g.k : g.n) &&
                         gemm_aligned(p.pair, g.b_transposed ? g.k2 : g.n);
    return g.b_transposed ? gemm_dispatch<Bf16Source, Bf16Source, true>(p, {}, aligned, stream)
                          : gemm_dispatch<Bf16Source, Bf16Source, false>(p, {}, aligned, stream);
}
