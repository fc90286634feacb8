// bias_rows    y[t,:] = bias.  What a GEMM without a bias of its own adds to.  One CTA a row.

#include "elementwise.cuh"

namespace {

template <bool VECTORS>
__global__ void __launch_bounds__(COPY_THREADS, 1)
bias_rows_kernel(bf16 *__restrict__ y, const bf16 *__restrict__ bias, unsigned n, uint64_t ld) {
    copy_row<VECTORS>(y + blockIdx.x * ld, bias, n);
}

} // namespace

// bias_rows    y[t,:] = bias.
//
//   y     (T, N)  bf16  =  rows `ld` elements apart
//   bias  (N)     bf16
//
// Moved bits: exact. Floor: 2*T*N bytes.
// Fast where N and ld are multiples of 8 and y and bias are 16-byte aligned, right for all else.
struct BiasRows {
    bf16 *y;
    const bf16 *bias;
    uint64_t t;
    uint64_t n;
    uint64_t ld;
};
static_assert(sizeof(BiasRows) == 40, "as in src/backend/cuda/ffi/bias.rs");

HALFBYTE_API cudaError_t bias_rows(const BiasRows *args, cudaStream_t stream) {
    const BiasRows &a = *args;
    if (a.t == 0 || a.n == 0) return cudaSuccess;
    if (a.t > MAX_GRID || a.n > MAX_GRID) return cudaErrorInvalidValue;
    const bool vectors =
        a.n % PER_VECTOR == 0 && a.ld % PER_VECTOR == 0 && is_aligned(a.y, 16) && is_aligned(a.bias, 16);
    const auto kernel = vectors ? bias_rows_kernel<true> : bias_rows_kernel<false>;
    kernel<<<unsigned(a.t), COPY_THREADS, 0, stream>>>(a.y, a.bias, unsigned(a.n), a.ld);
    return cudaGetLastError();
}
