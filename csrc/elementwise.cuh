// What the memory-bound kernels share: eight bf16 as one 16-byte vector, sums over a CTA in a fixed order, copied rows.
#pragma once

#include "common.cuh"

using bf16 = __nv_bfloat16;

// Elements of a 16-byte vector of bf16.
constexpr unsigned PER_VECTOR = 8;

struct Floats8 {
    float at[PER_VECTOR];
};

// Exact: a bf16 is the high half of its f32. The lower half of a word is the earlier element.
__device__ __forceinline__ Floats8 widen(const uint4 &v) {
    const uint32_t word[4] = {v.x, v.y, v.z, v.w};
    Floats8 f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        f.at[2 * i] = __uint_as_float(word[i] << 16);
        f.at[2 * i + 1] = __uint_as_float(word[i] & 0xffff0000u);
    }
    return f;
}

// Rounds to nearest even.
__device__ __forceinline__ uint4 narrow(const Floats8 &f) {
    uint32_t word[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(f.at[2 * i], f.at[2 * i + 1]);
        word[i] = reinterpret_cast<const uint32_t &>(pair);
    }
    return make_uint4(word[0], word[1], word[2], word[3]);
}

// From here on the compiler knows nothing of v. Without it eight f32 would be kept across a barrier instead of one vector.
__device__ __forceinline__ void forget(uint4 &v) { asm volatile("" : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)); }

__device__ __forceinline__ uint4 zero_vector() { return make_uint4(0, 0, 0, 0); }

// Over WIDTH neighbouring lanes; every lane gets the same sum. All lanes of the warp must take part.
template <int WIDTH, typename T> __device__ __forceinline__ T lanes_sum(T x) {
#pragma unroll
    for (int d = WIDTH / 2; d > 0; d /= 2) x += __shfl_xor_sync(FULL_WARP, x, d);
    return x;
}

// Over the CTA (whole warps), the same in every run; all threads get it. `of_warp` has room for one value a warp and
// belongs to this call alone: there is no barrier behind its last read.
template <typename T> __device__ __forceinline__ T cta_sum(T x, T *of_warp) {
    x = lanes_sum<32>(x);
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = x;
    __syncthreads();
    T sum = 0;
    for (unsigned w = 0; w < blockDim.x / 32; ++w) sum += of_warp[w];
    return sum;
}

// Threads of a CTA that copies a row, and vectors that each has in flight.
constexpr unsigned COPY_THREADS = 128;
constexpr unsigned COPY_DEPTH = 4;

// A CTA's copy of a row of c elements; zeros where `from` is null. VECTORS: c is a multiple of 8, both 16-byte aligned.
template <bool VECTORS> __device__ __forceinline__ void copy_row(bf16 *to, const bf16 *from, unsigned c) {
    if constexpr (VECTORS) {
        const unsigned count = c / PER_VECTOR;
        const uint4 *in = reinterpret_cast<const uint4 *>(from);
        uint4 *out = reinterpret_cast<uint4 *>(to);
        for (unsigned first = threadIdx.x; first < count; first += COPY_THREADS * COPY_DEPTH) {
            uint4 v[COPY_DEPTH];
#pragma unroll
            for (unsigned u = 0; u < COPY_DEPTH; ++u) {
                const unsigned i = first + u * COPY_THREADS;
                v[u] = in != nullptr && i < count ? __ldg(in + i) : zero_vector();
            }
#pragma unroll
            for (unsigned u = 0; u < COPY_DEPTH; ++u) {
                const unsigned i = first + u * COPY_THREADS;
                if (i < count) out[i] = v[u];
            }
        }
    } else {
        for (unsigned i = threadIdx.x; i < c; i += COPY_THREADS) to[i] = from != nullptr ? from[i] : bf16(0.0f);
    }
}

// Most rows, tokens or CTAs of a launch.
constexpr uint64_t MAX_GRID = 0x7fffffff;
