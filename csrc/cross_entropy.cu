// cross_entropy over a chunk of target tokens, and what moves rows in and out of the chunk: gather_rows, scatter_rows,
// add_loss.
//
// One CTA a row, two passes. The first finds the maximum and the sum of exponentials together, from the right end of the
// row to the left, so that the second, which must run from the left, starts with what the cache holds.
//
// The gradient replaces the logits in place: bf16 element j of a row lies in bytes 2j and 2j+1, where f32 element j/2 was.
// The CTA goes through the row from left to right in chunks [j0, j1). It loads a chunk into registers, waits until all
// threads have theirs, then stores it: into bytes [2*j0, 2*j1), that is over f32 elements below j1/2, all loaded. The
// loads of the next chunk (bytes from 4*j1 on) may run beside these stores: bytes below 2*j1 are none of theirs.

#include <cfloat>

#include "elementwise.cuh"

namespace {

constexpr unsigned THREADS = 512;
constexpr unsigned WARPS = THREADS / 32;
constexpr unsigned CHUNK = THREADS * PER_VECTOR; // logits that the CTA holds at a time

__device__ __forceinline__ float cta_max(float x, float *of_warp) {
    x = lanes_max<32>(x);
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = x;
    __syncthreads();
    float largest = of_warp[0];
#pragma unroll
    for (unsigned w = 1; w < WARPS; ++w) largest = fmaxf(largest, of_warp[w]);
    return largest;
}

// Eight logits of the chunk at `start`, `missing` behind the end of the row. Vectors are eight neighbours of a thread,
// single ones are eight at a distance of THREADS: each load of a warp is contiguous.
template <bool VECTORS>
__device__ __forceinline__ Floats8 load_logits(const float *z, unsigned start, unsigned v, float missing) {
    Floats8 f;
    if constexpr (VECTORS) {
        const unsigned i = start + threadIdx.x * PER_VECTOR;
        if (i < v) {
            const float4 a = *reinterpret_cast<const float4 *>(z + i), b = *reinterpret_cast<const float4 *>(z + i + 4);
            return {{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}};
        }
#pragma unroll
        for (unsigned j = 0; j < PER_VECTOR; ++j) f.at[j] = missing;
    } else {
#pragma unroll
        for (unsigned j = 0; j < PER_VECTOR; ++j) {
            const unsigned i = start + j * THREADS + threadIdx.x;
            f.at[j] = i < v ? z[i] : missing;
        }
    }
    return f;
}

// Where element j of load_logits came from.
template <bool VECTORS> __device__ __forceinline__ unsigned column(unsigned start, unsigned j) {
    return VECTORS ? start + threadIdx.x * PER_VECTOR + j : start + j * THREADS + threadIdx.x;
}

template <bool VECTORS> __device__ __forceinline__ void store_gradient(bf16 *g, unsigned start, unsigned v, const Floats8 &f) {
    if constexpr (VECTORS) {
        const unsigned i = start + threadIdx.x * PER_VECTOR;
        if (i < v) *reinterpret_cast<uint4 *>(g + i) = narrow(f);
    } else {
#pragma unroll
        for (unsigned j = 0; j < PER_VECTOR; ++j)
            if (column<false>(start, j) < v) g[column<false>(start, j)] = from_f32<bf16>(f.at[j]);
    }
}

// z and g are the same memory: neither is __restrict__.
template <bool VECTORS>
__global__ void __launch_bounds__(THREADS, 1)
cross_entropy_kernel(float *logits, float *__restrict__ row_loss, const int32_t *__restrict__ ids,
                     const float *__restrict__ scale_at, bool gradient, unsigned v) {
    __shared__ float max_of_warp[WARPS], sum_of_warp[WARPS];
    float *z = logits + size_t(blockIdx.x) * v;
    bf16 *g = reinterpret_cast<bf16 *>(z);
    const int32_t id = ids[blockIdx.x];
    if (id < 0 || unsigned(id) >= v) { // the whole CTA: no target here
        if (threadIdx.x == 0) row_loss[blockIdx.x] = 0.0f;
        if (gradient)
            for (unsigned start = 0; start < v; start += CHUNK) store_gradient<VECTORS>(g, start, v, Floats8{});
        return;
    }

    const unsigned last = (v - 1) / CHUNK * CHUNK;
    float top = -FLT_MAX, sum = 0.0f; // this thread's maximum, and its sum of e^(z - top)
    Floats8 next = load_logits<VECTORS>(z, last, v, -FLT_MAX);
    for (unsigned start = last;; start -= CHUNK) {
        const Floats8 f = next;
        if (start != 0) next = load_logits<VECTORS>(z, start - CHUNK, v, -FLT_MAX);
        float higher = top;
#pragma unroll
        for (unsigned j = 0; j < PER_VECTOR; ++j) higher = fmaxf(higher, f.at[j]);
        sum *= __expf(top - higher);
        top = higher;
#pragma unroll
        for (unsigned j = 0; j < PER_VECTOR; ++j)
            if (column<VECTORS>(start, j) < v) sum += __expf(f.at[j] - top);
        if (start == 0) break;
    }
    const float all_top = cta_max(top, max_of_warp);
    const float all_sum = cta_sum(sum * __expf(top - all_top), sum_of_warp);
    // Before the first barrier of the second pass, and so before any store to the row.
    if (threadIdx.x == 0) row_loss[blockIdx.x] = logf(all_sum) + (all_top - z[id]);
    if (!gradient) return;

    const float scale = *scale_at, factor = scale / all_sum;
    next = load_logits<VECTORS>(z, 0, v, 0.0f);
    for (unsigned start = 0; start < v; start += CHUNK) {
        Floats8 f = next;
        __syncthreads();
        next = load_logits<VECTORS>(z, start + CHUNK, v, 0.0f);
#pragma unroll
        for (unsigned j = 0; j < PER_VECTOR; ++j) {
            f.at[j] = factor * __expf(f.at[j] - all_top);
            if (column<VECTORS>(start, j) == unsigned(id)) f.at[j] -= scale;
        }
        store_gradient<VECTORS>(g, start, v, f);
    }
}

template <bool VECTORS>
__global__ void __launch_bounds__(COPY_THREADS, 1)
gather_rows_kernel(bf16 *__restrict__ out, const bf16 *__restrict__ x, const int32_t *__restrict__ rows, unsigned c,
                   uint64_t t) {
    const int32_t row = rows[blockIdx.x];
    const bool there = row >= 0 && uint64_t(row) < t;
    copy_row<VECTORS>(out + size_t(blockIdx.x) * c, there ? x + size_t(row) * c : nullptr, c);
}

template <bool VECTORS>
__global__ void __launch_bounds__(COPY_THREADS, 1)
scatter_rows_kernel(bf16 *__restrict__ dx, const bf16 *__restrict__ d_rows, const int32_t *__restrict__ rows, unsigned c,
                    uint64_t t) {
    const int32_t row = rows[blockIdx.x];
    if (row < 0 || uint64_t(row) >= t) return;
    copy_row<VECTORS>(dx + size_t(row) * c, d_rows + size_t(blockIdx.x) * c, c);
}

__global__ void __launch_bounds__(THREADS, 1)
add_loss_kernel(float *__restrict__ loss, const float *__restrict__ row_loss, const float *__restrict__ scale,
                uint64_t m) {
    __shared__ double of_warp[WARPS];
    double sum = 0.0;
    for (uint64_t i = threadIdx.x; i < m; i += THREADS) sum += row_loss[i];
    sum = cta_sum(sum, of_warp);
    if (threadIdx.x == 0) *loss = float(double(*loss) + double(*scale) * sum);
}

} // namespace

// cross_entropy    row_loss = logsumexp(z) - z[id];  where `gradient`: (softmax(z) - onehot(id)) * scale replaces z.
//
//   logits    (m, V)  f32   in: z; out: the gradient in bf16, row i at byte i*4*V (row stride 2*V elements of bf16),
//                           the upper half of each row is left with what lies there. Without `gradient` nothing is written.
//   row_loss  (m)     f32   =
//   ids       (m)     i32   outside 0..V: no target, row_loss 0 and a gradient of zeros
//   scale     (1)     f32   read only for the gradient
//
// In f32, sums in an order that V decides: the same bits in every run. Floor: 6*m*V bytes with gradient, 4*m*V without; the
// second pass reads the row again, from the L2 cache as far as it holds the rows in flight.
// Fast where V is a multiple of 8 and logits 16-byte aligned, right for all else.
struct CrossEntropy {
    float *logits;
    float *row_loss;
    const int32_t *ids;
    const float *scale;
    uint64_t m;
    uint64_t v;
    uint32_t gradient;
    uint32_t unused;
};
static_assert(sizeof(CrossEntropy) == 56, "as in src/backend/cuda/ffi/cross_entropy.rs");

HALFBYTE_API cudaError_t cross_entropy(const CrossEntropy *args, cudaStream_t stream) {
    const CrossEntropy &a = *args;
    if (a.m == 0) return cudaSuccess;
    if (a.v == 0 || a.m > MAX_GRID || a.v > MAX_GRID) return cudaErrorInvalidValue;
    const auto kernel = a.v % PER_VECTOR == 0 && is_aligned(a.logits, 16) ? cross_entropy_kernel<true>
                                                                           : cross_entropy_kernel<false>;
    kernel<<<unsigned(a.m), THREADS, 0, stream>>>(a.logits, a.row_loss, a.ids, a.scale, a.gradient != 0, unsigned(a.v));
    return cudaGetLastError();
}

// gather_rows    out[i,:] = x[rows[i],:];  zeros where the row is not in 0..T.
//
//   out   (m, C)  bf16  =
//   x     (T, C)  bf16
//   rows  (m)     i32
//
// scatter_rows    dx[rows[i],:] = d_rows[i,:];  rows outside 0..T are passed over, no row is named twice.
//
//   dx      (T, C)  bf16  = : the named rows alone
//   d_rows  (m, C)  bf16
//   rows    (m)     i32
//
// Moved bits: exact. Floor: 4*m*C bytes each.
// Fast where C is a multiple of 8 and both matrices are 16-byte aligned, right for all else.
struct MoveRows {
    bf16 *to;
    const bf16 *from;
    const int32_t *rows;
    uint64_t m;
    uint64_t c;
    uint64_t t;
};
static_assert(sizeof(MoveRows) == 48, "as in src/backend/cuda/ffi/cross_entropy.rs");

static bool movable(const MoveRows &a) { return a.m <= MAX_GRID && a.c <= MAX_GRID; }

static bool in_vectors(const MoveRows &a) {
    return a.c % PER_VECTOR == 0 && is_aligned(a.to, 16) && is_aligned(a.from, 16);
}

HALFBYTE_API cudaError_t gather_rows(const MoveRows *args, cudaStream_t stream) {
    const MoveRows &a = *args;
    if (a.m == 0 || a.c == 0) return cudaSuccess;
    if (!movable(a)) return cudaErrorInvalidValue;
    const auto kernel = in_vectors(a) ? gather_rows_kernel<true> : gather_rows_kernel<false>;
    kernel<<<unsigned(a.m), COPY_THREADS, 0, stream>>>(a.to, a.from, a.rows, unsigned(a.c), a.t);
    return cudaGetLastError();
}

HALFBYTE_API cudaError_t scatter_rows(const MoveRows *args, cudaStream_t stream) {
    const MoveRows &a = *args;
    if (a.m == 0 || a.c == 0) return cudaSuccess;
    if (!movable(a)) return cudaErrorInvalidValue;
    const auto kernel = in_vectors(a) ? scatter_rows_kernel<true> : scatter_rows_kernel<false>;
    kernel<<<unsigned(a.m), COPY_THREADS, 0, stream>>>(a.to, a.from, a.rows, unsigned(a.c), a.t);
    return cudaGetLastError();
}

// add_loss    loss += scale * sum_i row_loss[i], the sum in f64 and in an order that m decides.
//
//   loss      (1)  f32  +=
//   row_loss  (m)  f32
//   scale     (1)  f32
//
// One CTA.
struct AddLoss {
    float *loss;
    const float *row_loss;
    const float *scale;
    uint64_t m;
};
static_assert(sizeof(AddLoss) == 32, "as in src/backend/cuda/ffi/cross_entropy.rs");

HALFBYTE_API cudaError_t add_loss(const AddLoss *args, cudaStream_t stream) {
    const AddLoss &a = *args;
    if (a.m == 0) return cudaSuccess;
    add_loss_kernel<<<1, THREADS, 0, stream>>>(a.loss, a.row_loss, a.scale, a.m);
    return cudaGetLastError();
}
