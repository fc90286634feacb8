// Arguments of the attention ops, the same for both sets of kernels, and how a CTA finds its tile of a packed batch.
//
//   forward    o = softmax(scale * q kᵀ + mask) v        lse = log(sum_j exp(scale * q k_j)), natural
//   backward   delta = sum_d(d_o * o)   p = exp(scale * q kᵀ - lse)   ds = p * (d_o vᵀ - delta)
//              dv = pᵀ d_o   dk = scale * dsᵀ q   dq = scale * ds k
//
//   o, d_o      (T, H*D)         bf16  forward: o =
//   lse, delta  (H, T)           f32   forward: lse =;  backward: delta =
//   qkv, dqkv   (T, (H+2G)*D)    bf16  H query heads, G key heads, G value heads;  backward: dqkv =, every element
//   cu_seqlens  (B+1)            i32   first 0, never falling, last T; a sequence may be empty
//
// Causal inside each sequence: query i sees keys j with i - window < j <= i. window is in 1..=T. Query head n reads KV
// head n / (H/G). D is a multiple of 8 from 16 to 256. Pointers 16-byte aligned.
// p and ds are rounded to bf16 before their second product; sums are f32; no atomics: the same bits in every run.
#pragma once

#include "common.cuh"

struct AttentionForward {
    __nv_bfloat16 *o;
    float *lse;
    const __nv_bfloat16 *qkv;
    const int32_t *cu_seqlens;
    int32_t t, b, h, g, d, window;
    float scale;
};
static_assert(sizeof(AttentionForward) == 64, "as in src/backend/cuda/ffi/attention.rs");

struct AttentionBackward {
    __nv_bfloat16 *dqkv;
    float *delta;
    const __nv_bfloat16 *d_o;
    const __nv_bfloat16 *o;
    const float *lse;
    const __nv_bfloat16 *qkv;
    const int32_t *cu_seqlens;
    int32_t t, b, h, g, d, window;
    float scale;
};
static_assert(sizeof(AttentionBackward) == 88, "as in src/backend/cuda/ffi/attention.rs");

// Tiles of `rows` rows that a packed batch has at most: the sum of ceil(len / rows).
inline int attention_max_tiles(int t, int b, int rows) { return t / rows + b; }

// A tile of one sequence.
struct SequenceTile {
    int start; // first token of the sequence
    int len;   // its tokens; 0: there is no such tile
    int tile;  // number of the tile in the sequence
};

// Tile number `index` of all tiles of ROWS rows, counted through the sequences in order. A whole warp must call it; each
// lane looks at one sequence.
template <int ROWS> __device__ __forceinline__ SequenceTile find_tile(const int32_t *cu_seqlens, int b, int index) {
    const int lane = threadIdx.x % 32;
    for (int base = 0; base < b; base += 32) {
        const int i = base + lane;
        const int start = i < b ? cu_seqlens[i] : 0;
        const int len = i < b ? cu_seqlens[i + 1] - start : 0;
        const int tiles = ceil_div(len, ROWS);
        int up_to = tiles; // of this sequence and those before it in the warp
#pragma unroll
        for (int d = 1; d < 32; d *= 2) {
            const int before = __shfl_up_sync(FULL_WARP, up_to, d);
            if (lane >= d) up_to += before;
        }
        const unsigned behind = __ballot_sync(FULL_WARP, index < up_to);
        if (behind != 0) {
            const int owner = __ffs(int(behind)) - 1;
            const int first = __shfl_sync(FULL_WARP, up_to - tiles, owner);
            return {__shfl_sync(FULL_WARP, start, owner), __shfl_sync(FULL_WARP, len, owner), index - first};
        }
        index -= __shfl_sync(FULL_WARP, up_to, 31);
    }
    return {0, 0, 0};
}
