// embedding    x[t,:] = table[tokens[t],:].  One CTA a row.

#include "elementwise.cuh"

namespace {

template <bool VECTORS>
__global__ void __launch_bounds__(COPY_THREADS, 1)
embedding_kernel(bf16 *__restrict__ x, const int32_t *__restrict__ tokens, const bf16 *__restrict__ table, unsigned c,
                 uint64_t v) {
    const int32_t token = tokens[blockIdx.x];
    const bool known = token >= 0 && uint64_t(token) < v;
    copy_row<VECTORS>(x + size_t(blockIdx.x) * c, known ? table + size_t(token) * c : nullptr, c);
}

} // namespace

// embedding    x[t,:] = table[tokens[t],:];  a row of zeros where the token is not in 0..V.
//
//   x       (T, C)  bf16  =
//   tokens  (T)     i32
//   table   (V, C)  bf16
//
// Moved bits: exact. Floor: 4*T*C bytes (repeated tokens come from the cache).
// Fast where C is a multiple of 8 and x and table are 16-byte aligned, right for all else.
struct Embedding {
    bf16 *x;
    const int32_t *tokens;
    const bf16 *table;
    uint64_t t;
    uint64_t c;
    uint64_t v;
};
static_assert(sizeof(Embedding) == 48, "as in src/backend/cuda/ffi/embedding.rs");

HALFBYTE_API cudaError_t embedding(const Embedding *args, cudaStream_t stream) {
    const Embedding &a = *args;
    if (a.t == 0 || a.c == 0) return cudaSuccess;
    if (a.t > MAX_GRID || a.c > MAX_GRID) return cudaErrorInvalidValue;
    const bool vectors = a.c % PER_VECTOR == 0 && is_aligned(a.x, 16) && is_aligned(a.table, 16);
    const auto kernel = vectors ? embedding_kernel<true> : embedding_kernel<false>;
    kernel<<<unsigned(a.t), COPY_THREADS, 0, stream>>>(a.x, a.tokens, a.table, unsigned(a.c), a.v);
    return cudaGetLastError();
}
