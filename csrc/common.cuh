// What every kernel file shares: element types as the host numbers them, 16-byte vectors, warp reductions, launch sizes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// Every function that Rust calls. Objects are built with hidden visibility.
#define HALFBYTE_API extern "C" __attribute__((visibility("default")))

// As `ffi::Dtype` in src/backend/cuda/ffi.rs numbers them.
enum class Dtype : int32_t { F32 = 0, Bf16 = 1, F16 = 2 };

// The consumer path must run on cards with 100 KiB of shared memory an SM, 1 KiB of it the system's.
constexpr size_t MAX_SHARED_BYTES = 99 * 1024;

constexpr unsigned FULL_WARP = 0xffffffffu;

template <typename T> __host__ __device__ constexpr T ceil_div(T a, T b) { return (a + b - 1) / b; }

inline bool is_aligned(const void *p, size_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

// Eight elements of T, moved as 16-byte vectors: one for 2-byte types, two for f32.
template <typename T> struct alignas(16) Vec8 {
    T at[8];
};

template <typename T> __device__ __forceinline__ Vec8<T> load_vec8(const T *from) {
    Vec8<T> v;
#pragma unroll
    for (size_t i = 0; i < sizeof(v) / 16; ++i)
        reinterpret_cast<uint4 *>(&v)[i] = reinterpret_cast<const uint4 *>(from)[i];
    return v;
}

template <typename T> __device__ __forceinline__ void store_vec8(T *to, const Vec8<T> &v) {
#pragma unroll
    for (size_t i = 0; i < sizeof(v) / 16; ++i)
        reinterpret_cast<uint4 *>(to)[i] = reinterpret_cast<const uint4 *>(&v)[i];
}

__device__ __forceinline__ float to_f32(float x) { return x; }
__device__ __forceinline__ float to_f32(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_f32(__half x) { return __half2float(x); }

// Rounds to nearest even.
template <typename T> __device__ __forceinline__ T from_f32(float x);
template <> __device__ __forceinline__ float from_f32<float>(float x) { return x; }
template <> __device__ __forceinline__ __nv_bfloat16 from_f32<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

// Over WIDTH neighbouring lanes; every lane gets the result. All lanes of the warp must take part.
template <int WIDTH> __device__ __forceinline__ float lanes_max(float x) {
#pragma unroll
    for (int d = WIDTH / 2; d > 0; d /= 2) x = fmaxf(x, __shfl_xor_sync(FULL_WARP, x, d));
    return x;
}

// In the same order in every run and on every card.
__device__ __forceinline__ double warp_sum(double x) {
#pragma unroll
    for (int d = 16; d > 0; d /= 2) x += __shfl_xor_sync(FULL_WARP, x, d);
    return x;
}
