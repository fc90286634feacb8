// Attention for every card from sm_80 on: mma.sync, cp.async, at most 99 KiB of shared memory. Formulas, shapes and
// guarantees are in attention.cuh; attention_backward.cu has the backward, attention_sm90.cu the same op for Hopper.
//
// Scores and probabilities never leave the registers: the accumulator of q kᵀ has, packed to bf16, the layout of the next
// product's first operand. Head sizes are padded with zeros to 64, 128 or 256 in shared memory.

#include "attention_tile.cuh"

namespace {

constexpr int FORWARD_KEYS = 64; // keys of a tile

// One CTA a tile of 64 * M queries of one head, 16 * M of them a warp; keys in tiles of 64, the last first. The copy of v
// runs under q kᵀ, that of the next k under the softmax and p v.
template <int D, int M> struct Forward {
    static constexpr int ROWS = 64 * M;
    static constexpr int KV_BYTES = FORWARD_KEYS * D * 2;
    static constexpr int SHARED = ROWS * D * 2 + 2 * KV_BYTES;
    static constexpr int MIN_CTAS = D == 256 ? 1 : D == 128 ? 3 : 2;
    static_assert(SHARED <= MAX_SHARED_BYTES, "one CTA on a consumer card");
};

template <int D, int M>
__global__ void __launch_bounds__(128, Forward<D, M>::MIN_CTAS)
attention_forward_kernel(const AttentionForward a, int max_tiles) {
    using Shape = Forward<D, M>;
    constexpr int ROWS = Shape::ROWS, KEYS = FORWARD_KEYS;
    extern __shared__ __align__(1024) uint8_t shared[];

    // The late tiles of a sequence see the most keys: they start first.
    const int head = int(blockIdx.x) % a.h;
    const SequenceTile at = find_tile<ROWS>(a.cu_seqlens, a.b, max_tiles - 1 - int(blockIdx.x) / a.h);
    if (at.len == 0) return;
    const int warp = __shfl_sync(FULL_WARP, int(threadIdx.x) / 32, 0), lane = threadIdx.x % 32;
    const int g = lane / 4, i = lane % 4;
    const int first_row = at.tile * ROWS, warp_row = first_row + warp * 16 * M;

    const int width = (a.h + 2 * a.g) * a.d;
    const bf16 *tokens = a.qkv + at.start * int64_t(width);
    const bf16 *k = tokens + (a.h + head / (a.h / a.g)) * a.d;
    const uint32_t q_tile = shared_address(shared), k_tile = q_tile + ROWS * D * 2, v_tile = k_tile + Shape::KV_BYTES;
    const uint32_t q_lane = q_tile + warp * 16 * M * 128 + lane_offset_a(lane);
    const uint32_t k_lane = k_tile + lane_offset_b(lane), v_lane = v_tile + lane_offset_a(lane);

    const int last = (min(first_row + ROWS, at.len) - 1) / KEYS;
    const int first = max(first_row - a.window + 1, 0) / KEYS;
    load_tile<ROWS, D, 128>(q_tile, tokens + int64_t(first_row) * width + head * a.d, width, at.len - first_row, a.d);
    k += int64_t(last) * KEYS * width;
    load_tile<KEYS, D, 128>(k_tile, k, width, at.len - last * KEYS, a.d);
    cp_async_commit();

    const float factor = a.scale * LOG2E;
    float o[M][D / 8][4] = {};
    float top[M][2]; // running maximum of factor * score, of rows g and g + 8
    float sum[M][2]; // this lane's part of the sum of exp2(factor * score - top)
#pragma unroll
    for (int m = 0; m < M; ++m)
        top[m][0] = top[m][1] = -INFINITY, sum[m][0] = sum[m][1] = 0.0f;

    for (int tile = last; tile >= first; --tile) {
        const int key0 = tile * KEYS, row0 = in_loop(warp_row);
        // Whether any row of this warp sees any key of the tile.
        const bool active = row0 < at.len && key0 < row0 + 16 * M && key0 + KEYS - 1 > row0 - a.window;
        float s[M][KEYS / 8][4] = {};


        cp_async_wait<0>();
        __syncthreads(); // k is there, and all are done with the last v
        load_tile<KEYS, D, 128>(v_tile, k + a.g * a.d, width, at.len - key0, a.d);
        cp_async_commit();
        if (active) {
#pragma unroll
            for (int c = 0; c < D / 16; ++c) {
                uint32_t qa[M][4];
#pragma unroll
                for (int m = 0; m < M; ++m) ldmatrix_x4(qa[m], block_address<ROWS>(q_lane, 16 * m, c));
#pragma unroll
                for (int n = 0; n < KEYS / 16; ++n) {
                    uint32_t kb[4];
                    ldmatrix_x4(kb, block_address<KEYS>(k_lane, 16 * n, c));
#pragma unroll
                    for (int m = 0; m < M; ++m) {
                        mma_bf16(s[m][2 * n], qa[m], kb[0], kb[1]);
                        mma_bf16(s[m][2 * n + 1], qa[m], kb[2], kb[3]);
                    }
                }
            }
            if (key0 + KEYS - 1 > row0 || key0 <= row0 + 16 * M - 1 - a.window) {
#pragma unroll
                for (int m = 0; m < M; ++m)
#pragma unroll
                    for (int j = 0; j < KEYS / 8; ++j)
#pragma unroll
                        for (int e = 0; e < 4; ++e)
                            if (!sees(row0 + 16 * m + g + e / 2 * 8, key0 + 8 * j + 2 * i + e % 2, a.window))
                                s[m][j][e] = -INFINITY;
            }
        }

        cp_async_wait<0>();
        __syncthreads(); // v is there, and all are done with k
        if (tile > first) {
            k -= KEYS * width;
            load_tile<KEYS, D, 128>(k_tile, k, width, KEYS, a.d);
            cp_async_commit();
        }
        if (!active) continue;
        uint32_t p[M][KEYS / 16][4];
#pragma unroll
        for (int m = 0; m < M; ++m) {
            float shrink[2];
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                float most = -INFINITY;
#pragma unroll
                for (int j = 0; j < KEYS / 8; ++j) most = fmaxf(most, fmaxf(s[m][j][2 * r], s[m][j][2 * r + 1]));
                most = fmaxf(top[m][r], __fmul_rn(lanes_max<4>(most), factor));
                // A row that has seen no key yet: exp2(-inf - 0) = 0.
                const float shift = most == -INFINITY ? 0.0f : most;
                shrink[r] = exp2_approx(top[m][r] - shift);
                top[m][r] = most;
                float part = 0.0f;
#pragma unroll
                for (int j = 0; j < KEYS / 8; ++j) {
                    const float p0 = exp2_approx(fmaf(s[m][j][2 * r], factor, -shift));
                    const float p1 = exp2_approx(fmaf(s[m][j][2 * r + 1], factor, -shift));
                    part += p0 + p1;
                    p[m][j / 2][j % 2 * 2 + r] = pack_bf16(p0, p1);
                }
                sum[m][r] = fmaf(sum[m][r], shrink[r], part);
            }
            // Most tiles raise no row's maximum.
            if (__any_sync(FULL_WARP, shrink[0] != 1.0f || shrink[1] != 1.0f)) {
#pragma unroll
                for (int j = 0; j < D / 8; ++j) {
                    o[m][j][0] *= shrink[0], o[m][j][1] *= shrink[0];
                    o[m][j][2] *= shrink[1], o[m][j][3] *= shrink[1];
                }
            }
        }
#pragma unroll
        for (int c = 0; c < KEYS / 16; ++c)
#pragma unroll
            for (int n = 0; n < D / 16; ++n) {
                uint32_t vb[4];
                ldmatrix_x4_trans(vb, block_address<KEYS>(v_lane, 16 * c, n));
#pragma unroll
                for (int m = 0; m < M; ++m) {
                    mma_bf16(o[m][2 * n], p[m][c], vb[0], vb[1]);
                    mma_bf16(o[m][2 * n + 1], p[m][c], vb[2], vb[3]);
                }
            }
    }

#pragma unroll
    for (int m = 0; m < M; ++m) {
        float inverse[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float all = sum[m][r];
            all += __shfl_xor_sync(FULL_WARP, all, 1);
            all += __shfl_xor_sync(FULL_WARP, all, 2);
            inverse[r] = 1.0f / all;
            const int row = warp_row + 16 * m + g + 8 * r;
            if (i == 0 && row < at.len)
                a.lse[size_t(head) * a.t + at.start + row] = top[m][r] * LN2 + logf(all);
        }
        const int stride = a.h * a.d;
        bf16 *to = a.o + int64_t(at.start + warp_row + 16 * m) * stride + head * a.d;
        // Into this warp's own rows of q.
        store_block<ROWS, D>(shared, warp * 16 * M + 16 * m, 0, o[m], inverse[0], inverse[1], to, stride,
                             at.len - warp_row - 16 * m, a.d);
    }
}

template <int D, int M> cudaError_t launch_forward(const AttentionForward &a, cudaStream_t stream) {
    using Shape = Forward<D, M>;
    const auto kernel = attention_forward_kernel<D, M>;
    const cudaError_t status = allow_shared(reinterpret_cast<const void *>(kernel), Shape::SHARED);
    if (status != cudaSuccess) return status;
    const int tiles = attention_max_tiles(a.t, a.b, Shape::ROWS);
    kernel<<<unsigned(tiles) * a.h, 128, Shape::SHARED, stream>>>(a, tiles);
    return cudaGetLastError();
}

} // namespace

// attention_forward    o, lse: see attention.cuh. The row of o is normalised in f32. Floor: 4 * D * (pairs that see each
// other) * H flops; exp2 with the scale folded in, the largest score of each row subtracted.
HALFBYTE_API cudaError_t attention_forward(const AttentionForward *args, cudaStream_t stream) {
    const AttentionForward &a = *args;
    if (a.t == 0) return cudaSuccess;
    if (!fits(a)) return cudaErrorInvalidValue;
    if (!is_aligned(a.o, 16) || !is_aligned(a.qkv, 16)) return cudaErrorMisalignedAddress;
    if (a.d <= 64) return launch_forward<64, 2>(a, stream);
    if (a.d > 128) return launch_forward<256, 1>(a, stream);
    return launch_forward<128, 1>(a, stream);
}
