// The kernels of attention_decode, whose contract is at its launcher in decode.cu.
#pragma once

#include "mma.cuh"

namespace attention_decode_kernels {

constexpr int HEADS = 16;     // query heads of one KV head that a CTA handles
constexpr int KEYS = 16;      // that a warp handles at a time
constexpr int ATTN_WARPS = 4; // of a CTA
constexpr int ATTN_THREADS = ATTN_WARPS * 32;

struct Decode {
    bf16 *o, *k, *v;
    const bf16 *qkv;
    const int32_t *positions;
    float *scratch; // (t, H, splits, D + 2): o not yet divided, maximum (base 2), sum
    int32_t t, capacity, h, g, d;
    int32_t window; // 0: none
    int32_t splits;
    float scale; // log2(e) / sqrt(D)
    bool aligned;
};

__device__ __forceinline__ void load8(char *to, const bf16 *from, int valid, bool aligned) {
    if (aligned && valid >= 8) {
        cp_async16(shared_address(to), from, true);
        return;
    }
    Vec8<bf16> v;
#pragma unroll
    for (int e = 0; e < 8; ++e) v.at[e] = e < valid ? from[e] : __float2bfloat16_rn(0.0f);
    *reinterpret_cast<uint4 *>(to) = *reinterpret_cast<uint4 *>(&v);
}

// New rows of k and v to the cache. grid (t).
__global__ void __launch_bounds__(ATTN_THREADS) append_kernel(const __grid_constant__ Decode a) {
    const int position = a.positions[blockIdx.x], width = a.g * a.d;
    if (position < 0 || position >= a.capacity) return;
    const bf16 *row = a.qkv + size_t(blockIdx.x) * (a.h + 2 * a.g) * a.d + a.h * a.d;
    for (int c = threadIdx.x; c < width; c += ATTN_THREADS) {
        a.k[size_t(position) * width + c] = row[c];
        a.v[size_t(position) * width + c] = row[width + c];
    }
}

template <int DP> struct DecodeShared {
    static constexpr int STAGES = DP <= 128 ? 2 : 1;
    static constexpr int ROW = DP * 2;
    static constexpr int Q = HEADS * ROW;
    static constexpr int STAGE = 2 * KEYS * ROW; // k, then v, of one warp
    static constexpr int BYTES = Q + ATTN_WARPS * STAGES * STAGE;
    static_assert(ATTN_WARPS * HEADS * DP * 4 <= ATTN_WARPS * STAGES * STAGE, "the warps' o take the place of the stages");
    static_assert(BYTES <= int(MAX_SHARED_BYTES), "must run on consumer cards");
};

// One new row, one KV head, up to 16 of its query heads: they are the 16 rows of the tensor-core products, so that the
// cache is read once for all of them. Runs of 16 keys go round the warps of all splits, so that the grid does not depend
// on how long the past is. grid (splits, G * ceil(H / G / 16), t).
template <int DP> __global__ void __launch_bounds__(ATTN_THREADS) attention_decode_kernel(const __grid_constant__ Decode a) {
    using Shared = DecodeShared<DP>;
    constexpr int CHUNKS = DP / 8, STAGES = Shared::STAGES;
    extern __shared__ __align__(128) char shared[];
    __shared__ float maxima[ATTN_WARPS][HEADS], lengths[ATTN_WARPS][HEADS];
    const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, g = lane / 4, i = lane % 4;

    const int group = a.h / a.g, parts = ceil_div(group, HEADS), token = blockIdx.z;
    const int kv = blockIdx.y / parts, head0 = kv * group + blockIdx.y % parts * HEADS;
    const int heads = min(HEADS, (kv + 1) * group - head0);
    const int width = a.g * a.d;
    const bf16 *row = a.qkv + size_t(token) * (a.h + 2 * a.g) * a.d;
    const bf16 *new_k = row + (a.h + kv) * a.d, *new_v = new_k + width;
    const int position = min(a.positions[token], a.capacity - 1);
    const int first = a.window > 0 ? max(0, position - a.window + 1) : 0;

    // Chunk `chunk` of a row of a tile: eight neighbouring rows lie in eight different bank groups.
    const auto offset = [](int r, int chunk) { return uint32_t(r * Shared::ROW + ((chunk ^ (r & 7)) << 4)); };

    for (int n = tid; n < HEADS * CHUNKS; n += ATTN_THREADS) {
        const int r = n / CHUNKS, chunk = n % CHUNKS;
        load8(shared + offset(r, chunk), row + (head0 + r) * a.d + 8 * chunk, r < heads ? a.d - 8 * chunk : 0, a.aligned);
    }
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();

    char *own = shared + Shared::Q + warp * STAGES * Shared::STAGE;
    // A single new row is read from qkv, as nothing has appended it; the warp that meets it appends it.
    const auto load = [&](int run, int stage) {
        for (int n = lane; n < KEYS * CHUNKS; n += 32) {
            const int r = n / CHUNKS, chunk = n % CHUNKS, key = run * KEYS + r;
            const int valid = key >= first && key <= position ? a.d - 8 * chunk : 0;
            const size_t at = size_t(key) * width + kv * a.d + 8 * chunk;
            const bool fresh = a.t == 1 && key == position;
            char *to = own + stage * Shared::STAGE + offset(r, chunk);
            load8(to, fresh ? new_k + 8 * chunk : a.k + at, valid, a.aligned);
            load8(to + KEYS * Shared::ROW, fresh ? new_v + 8 * chunk : a.v + at, valid, a.aligned);
            if (fresh)
                for (int e = 0; e < min(valid, 8); ++e) {
                    a.k[at + e] = new_k[8 * chunk + e];
                    a.v[at + e] = new_v[8 * chunk + e];
                }
        }
    };

    float o[DP / 8][4] = {};
    float largest[2] = {-INFINITY, -INFINITY}, length[2] = {0.0f, 0.0f};
    const int turns = a.splits * ATTN_WARPS, turn = blockIdx.x * ATTN_WARPS + warp;
    const int last = position < 0 ? -1 : position / KEYS;
    int run = first / KEYS + (turn + turns - first / KEYS % turns) % turns, stage = 0;
    if (run <= last) load(run, 0);
    cp_async_commit();
    for (; run <= last; run += turns) {
        if constexpr (STAGES == 2) {
            if (run + turns <= last) load(run + turns, stage ^ 1);
            cp_async_commit();
        }
        cp_async_wait<STAGES - 1>();
        __syncwarp();
        const uint32_t q_at = shared_address(shared), k_at = shared_address(own + stage * Shared::STAGE);
        const uint32_t v_at = k_at + KEYS * Shared::ROW;

        float s[2][4] = {};
#pragma unroll
        for (int c = 0; c < CHUNKS; c += 2) {
            uint32_t av[4], bv[4];
            ldmatrix_x4(av, q_at + offset(lane % 16, c + lane / 16));
            ldmatrix_x4(bv, k_at + offset(lane % 8 + lane / 16 * 8, c + lane / 8 % 2));
            mma_bf16(s[0], av, bv[0], bv[1]);
            mma_bf16(s[1], av, bv[2], bv[3]);
        }
        // Row g is s[.][0..2], row g + 8 s[.][2..4].
        float top[2] = {-INFINITY, -INFINITY};
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int key = run * KEYS + n * 8 + 2 * i + e % 2;
                s[n][e] = key >= first && key <= position ? s[n][e] * a.scale : -INFINITY;
                top[e / 2] = fmaxf(top[e / 2], s[n][e]);
            }
        float shrink[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            top[r] = lanes_max<4>(top[r]);
            const float now = fmaxf(largest[r], top[r]); // finite: a run holds at least one key that is seen
            shrink[r] = exp2f(largest[r] - now);
            largest[r] = now;
            length[r] *= shrink[r];
        }
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                s[n][e] = exp2f(s[n][e] - largest[e / 2]);
                length[e / 2] += s[n][e];
            }
#pragma unroll
        for (int n = 0; n < DP / 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) o[n][e] *= shrink[e / 2];
        const uint32_t pv[4] = {pack_bf16(s[0][0], s[0][1]), pack_bf16(s[0][2], s[0][3]), pack_bf16(s[1][0], s[1][1]),
                                pack_bf16(s[1][2], s[1][3])};
#pragma unroll
        for (int n = 0; n < DP / 16; ++n) {
            uint32_t bv[4];
            ldmatrix_x4_trans(bv, v_at + offset(lane % 16, n * 2 + lane / 16));
            mma_bf16(o[2 * n], pv, bv[0], bv[1]);
            mma_bf16(o[2 * n + 1], pv, bv[2], bv[3]);
        }
        __syncwarp(); // all lanes have read the stage
        if constexpr (STAGES == 2) {
            stage ^= 1;
        } else {
            if (run + turns <= last) load(run + turns, 0);
            cp_async_commit();
        }
    }

    // The four warps together, in order.
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int d = 1; d < 4; d *= 2) length[r] += __shfl_xor_sync(FULL_WARP, length[r], d);
    __syncthreads();
    float *all = reinterpret_cast<float *>(shared + Shared::Q);
#pragma unroll
    for (int n = 0; n < DP / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) all[(warp * HEADS + g + e / 2 * 8) * DP + n * 8 + 2 * i + e % 2] = o[n][e];
    if (i == 0)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            maxima[warp][g + 8 * r] = largest[r];
            lengths[warp][g + 8 * r] = length[r];
        }
    __syncthreads();
    for (int n = tid; n < heads * a.d; n += ATTN_THREADS) {
        const int head = n / a.d, d = n % a.d;
        float top = -INFINITY, sum = 0.0f, total = 0.0f;
        for (int w = 0; w < ATTN_WARPS; ++w) top = fmaxf(top, maxima[w][head]);
        for (int w = 0; w < ATTN_WARPS; ++w) {
            const float by = maxima[w][head] == -INFINITY ? 0.0f : exp2f(maxima[w][head] - top);
            sum += by * all[(w * HEADS + head) * DP + d];
            total += by * lengths[w][head];
        }
        float *to = a.scratch + ((size_t(token) * a.h + head0 + head) * a.splits + blockIdx.x) * (a.d + 2);
        to[d] = sum;
        if (d == 0) {
            to[a.d] = top;
            to[a.d + 1] = total;
        }
    }
}

// The splits together, in order. grid (H, t).
__global__ void __launch_bounds__(ATTN_THREADS) attention_decode_sum_kernel(const __grid_constant__ Decode a) {
    const float *from = a.scratch + (size_t(blockIdx.y) * a.h + blockIdx.x) * a.splits * (a.d + 2);
    float top = -INFINITY, total = 0.0f;
    for (int s = 0; s < a.splits; ++s) top = fmaxf(top, from[s * (a.d + 2) + a.d]);
    for (int s = 0; s < a.splits; ++s) {
        const float m = from[s * (a.d + 2) + a.d];
        if (m != -INFINITY) total += exp2f(m - top) * from[s * (a.d + 2) + a.d + 1];
    }
    for (int d = threadIdx.x; d < a.d; d += ATTN_THREADS) {
        float sum = 0.0f;
        for (int s = 0; s < a.splits; ++s) {
            const float m = from[s * (a.d + 2) + a.d];
            if (m != -INFINITY) sum += exp2f(m - top) * from[s * (a.d + 2) + d];
        }
        a.o[(size_t(blockIdx.y) * a.h + blockIdx.x) * a.d + d] = __float2bfloat16_rn(total > 0.0f ? sum / total : 0.0f);
    }
}

template <int DP> cudaError_t launch_decode(const Decode &a, cudaStream_t stream) {
    constexpr int bytes = DecodeShared<DP>::BYTES;
    const auto kernel = attention_decode_kernel<DP>;
    const cudaError_t set = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (set != cudaSuccess) return set;
    const dim3 grid(a.splits, a.g * ceil_div(a.h / a.g, HEADS), a.t), sum_grid(a.h, a.t);
    kernel<<<grid, ATTN_THREADS, bytes, stream>>>(a);
    attention_decode_sum_kernel<<<sum_grid, ATTN_THREADS, 0, stream>>>(a);
    return cudaGetLastError();
}

} // namespace attention_decode_kernels
