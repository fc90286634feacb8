// Dense weights on their way to the device: rounded to bf16, and looked at for NaN and infinities.

#include "common.cuh"

namespace {

constexpr int THREADS = 256;
constexpr int PER_THREAD = 8;
constexpr size_t PER_CTA = size_t(THREADS) * PER_THREAD;

// In the type of the file: a large f32 becomes infinite only in bf16.
__device__ __forceinline__ bool is_finite(float x) { return (__float_as_uint(x) & 0x7f800000u) != 0x7f800000u; }
__device__ __forceinline__ bool is_finite(__nv_bfloat16 x) { return (__bfloat16_as_ushort(x) & 0x7f80u) != 0x7f80u; }
__device__ __forceinline__ bool is_finite(__half x) { return (__half_as_ushort(x) & 0x7c00u) != 0x7c00u; }

template <typename T>
__global__ void __launch_bounds__(THREADS)
load_dense_kernel(__nv_bfloat16 *out, const T *x, uint32_t *__restrict__ bad, size_t n) {
    const size_t first = blockIdx.x * PER_CTA + threadIdx.x * PER_THREAD;
    const bool whole = first + PER_THREAD <= n;
    Vec8<T> v;
    if (whole) {
        v = load_vec8(x + first);
    } else {
#pragma unroll
        for (int j = 0; j < PER_THREAD; ++j) v.at[j] = first + j < n ? x[first + j] : T(0.0f);
    }
    bool fine = true;
#pragma unroll
    for (int j = 0; j < PER_THREAD; ++j) fine = fine && is_finite(v.at[j]);
    if (!fine) *bad = 1; // whoever writes writes the same
    if (out == nullptr) return;
    Vec8<__nv_bfloat16> rounded;
#pragma unroll
    for (int j = 0; j < PER_THREAD; ++j) rounded.at[j] = from_f32<__nv_bfloat16>(to_f32(v.at[j]));
    if (whole) {
        store_vec8(out + first, rounded);
    } else {
#pragma unroll
        for (int j = 0; j < PER_THREAD; ++j)
            if (first + j < n) out[first + j] = rounded.at[j];
    }
}

} // namespace

// load_dense    out[i] = bf16(x[i]), rounded to nearest even; *bad = 1 if any x[i] is NaN or infinite, else it stays.
//
//   out  (n)  bf16  =  or null: look at x alone
//   x    (n)  f32, bf16 or f16
//   bad  (1)  u32
//
// out and x 16-byte aligned. No atomics; the same bits in every run. Floor: n * (sizeof(x) + 2) bytes.
struct LoadDense {
    __nv_bfloat16 *out;
    const void *x;
    uint32_t *bad;
    uint64_t n;
    Dtype x_dtype;
};
static_assert(sizeof(LoadDense) == 40, "as in src/backend/cuda/ffi/load.rs");

template <typename T> static void launch_load(const LoadDense &a, cudaStream_t stream) {
    const unsigned ctas = unsigned(ceil_div<size_t>(a.n, PER_CTA));
    load_dense_kernel<<<ctas, THREADS, 0, stream>>>(a.out, static_cast<const T *>(a.x), a.bad, a.n);
}

HALFBYTE_API cudaError_t load_dense(const LoadDense *args, cudaStream_t stream) {
    const LoadDense &a = *args;
    if (a.n == 0) return cudaSuccess;
    if (!is_aligned(a.x, 16) || !is_aligned(a.out, 16)) return cudaErrorMisalignedAddress;
    switch (a.x_dtype) {
    case Dtype::F32: launch_load<float>(a, stream); break;
    case Dtype::Bf16: launch_load<__nv_bfloat16>(a, stream); break;
    case Dtype::F16: launch_load<__half>(a, stream); break;
    default: return cudaErrorInvalidValue;
    }
    return cudaGetLastError();
}
