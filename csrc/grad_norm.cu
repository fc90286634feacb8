// grad_norm: the L2 norm of all gradients, in two launches.

#include "elementwise.cuh"

namespace {

constexpr unsigned THREADS = 256;
constexpr unsigned DEPTH = 4;         // vectors of four f32 that a thread has in flight, summed in f32 before they join
constexpr unsigned MAX_PARTIALS = 1024; // CTAs of the first launch: one wave on large cards

// The four vectors at a time, then what is left one by one: `vectors` is n/4, or 0 where the address forbids vectors.
__global__ void __launch_bounds__(THREADS, 1)
sum_of_squares_kernel(double *__restrict__ partial, const float *__restrict__ grads, uint64_t vectors, uint64_t n) {
    __shared__ double of_warp[THREADS / 32];
    const float4 *in = reinterpret_cast<const float4 *>(grads);
    const uint64_t first = uint64_t(blockIdx.x) * (THREADS * DEPTH) + threadIdx.x;
    double total = 0.0;
    for (uint64_t i = first; i < vectors; i += uint64_t(gridDim.x) * (THREADS * DEPTH)) {
        float4 v[DEPTH];
#pragma unroll
        for (unsigned u = 0; u < DEPTH; ++u)
            v[u] = i + u * THREADS < vectors ? __ldg(in + i + u * THREADS) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        float sum = 0.0f;
#pragma unroll
        for (unsigned u = 0; u < DEPTH; ++u) {
            sum = fmaf(v[u].x, v[u].x, sum), sum = fmaf(v[u].y, v[u].y, sum);
            sum = fmaf(v[u].z, v[u].z, sum), sum = fmaf(v[u].w, v[u].w, sum);
        }
        total += sum;
    }
    const uint64_t thread = uint64_t(blockIdx.x) * THREADS + threadIdx.x;
    for (uint64_t i = 4 * vectors + thread; i < n; i += uint64_t(gridDim.x) * THREADS)
        total += double(grads[i] * grads[i]);
    total = cta_sum(total, of_warp);
    if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

__global__ void __launch_bounds__(THREADS, 1)
root_of_sum_kernel(float *__restrict__ norm, const double *__restrict__ partial, unsigned partials) {
    __shared__ double of_warp[THREADS / 32];
    double total = 0.0;
    for (unsigned i = threadIdx.x; i < partials; i += THREADS) total += partial[i];
    total = cta_sum(total, of_warp);
    if (threadIdx.x == 0) *norm = float(sqrt(total));
}

} // namespace

// grad_norm    norm = sqrt(sum_i grads[i]^2)
//
//   norm     (1)     f32  =
//   grads    (n)     f32
//   partial  (1024)  f64  scratch
//
// Sixteen squares at a time in f32, those in f64; the order follows from n alone: the same bits in every run and on every
// card. Two launches. Floor: 4*n bytes. Fast where grads is 16-byte aligned.
struct GradNorm {
    float *norm;
    const float *grads;
    double *partial;
    uint64_t n;
};
static_assert(sizeof(GradNorm) == 32, "as in src/backend/cuda/ffi/grad_norm.rs");

HALFBYTE_API cudaError_t grad_norm(const GradNorm *args, cudaStream_t stream) {
    const GradNorm &a = *args;
    const uint64_t wanted = ceil_div<uint64_t>(a.n, 4 * THREADS * DEPTH);
    const unsigned partials = unsigned(wanted < MAX_PARTIALS ? wanted : MAX_PARTIALS);
    if (partials > 0)
        sum_of_squares_kernel<<<partials, THREADS, 0, stream>>>(a.partial, a.grads, is_aligned(a.grads, 16) ? a.n / 4 : 0,
                                                                a.n);
    root_of_sum_kernel<<<1, THREADS, 0, stream>>>(a.norm, a.partial, partials);
    return cudaGetLastError();
}
