// Attention forward on Hopper with wgmma, for heads of 64 and 128.
//
// The two warpgroups that multiply take turns: while one's products run, the other does its softmax.

#include "attention_sm90.cuh"

namespace {

constexpr int KEYS = 128; // of a key tile
constexpr int KV_STAGES = 2;

constexpr size_t forward_shared(int d) {
    return ALIGNMENT + tile_bytes(ROWS, d) + 2 * KV_STAGES * tile_bytes(KEYS, d) + (1 + 4 * KV_STAGES) * 8;
}

template <int D>
__global__ void __launch_bounds__(THREADS, 1)
attention_forward_sm90_kernel(const __grid_constant__ CUtensorMap qkv, const AttentionForward a) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    constexpr uint32_t TILE = tile_bytes(KEYS, D);
    extern __shared__ uint8_t shared[];
    const uint32_t q_tile = first_tile(shared_address(shared));
    const uint32_t k_tiles = q_tile + tile_bytes(ROWS, D), v_tiles = k_tiles + KV_STAGES * TILE;
    // Barriers: q has come; then of each stage: k has come, v has come, k may be overwritten, v may be.
    const uint32_t q_full = v_tiles + KV_STAGES * TILE, k_full = q_full + 8, v_full = k_full + 8 * KV_STAGES;
    const uint32_t k_empty = v_full + 8 * KV_STAGES, v_empty = k_empty + 8 * KV_STAGES;

    const int head = blockIdx.x % a.h, kv = head / (a.h / a.g);
    const SequenceTile place = find_tile<ROWS>(a.cu_seqlens, a.b, blockIdx.x / a.h);
    if (place.len == 0) return;
    const int q0 = (ceil_div(place.len, ROWS) - 1 - place.tile) * ROWS; // the longest first
    const int begin = max(0, q0 - a.window + 1) / KEYS;
    const int end = ceil_div(min(q0 + ROWS, place.len), KEYS);

    if (threadIdx.x == 0) {
        barrier_init(q_full, 1);
        for (int s = 0; s < KV_STAGES; ++s) {
            barrier_init(k_full + 8 * s, 1);
            barrier_init(v_full + 8 * s, 1);
            barrier_init(k_empty + 8 * s, 8);
            barrier_init(v_empty + 8 * s, 8);
        }
        barrier_init_fence();
    }
    __syncthreads();

    if (threadIdx.x < 128) {
        registers_down<24>();
        if (threadIdx.x == 0) {
            const auto copy = [&](uint32_t tile, int part, int row, uint32_t barrier) {
                barrier_expect(barrier, TILE);
                copy_tile<KEYS, D>(tile, &qkv, part * D, place.start + row, barrier);
            };
            copy(q_tile, head, q0, q_full);
            int stage = 0, parity = 0;
            for (int j = begin; j < end; ++j) {
                barrier_wait(k_empty + 8 * stage, parity ^ 1);
                copy(k_tiles + stage * TILE, a.h + kv, j * KEYS, k_full + 8 * stage);
                barrier_wait(v_empty + 8 * stage, parity ^ 1);
                copy(v_tiles + stage * TILE, a.h + a.g + kv, j * KEYS, v_full + 8 * stage);
                if (++stage == KV_STAGES) stage = 0, parity ^= 1;
            }
        }
    } else {
        registers_up<240>();
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 - 4, own = warp / 4;
        const int warp_row = q0 + warp * 16;
        const uint32_t own_q = q_tile + own * (64 * 128);
        const float c = a.scale * LOG2_E;
        const bool tells = lane == 0; // for its warp

        float s[KEYS / 2] = {}, o[D / 2] = {};
        uint32_t p[KEYS / 16][4];
        float top[2] = {-INFINITY, -INFINITY}, sum[2] = {}, rescale[2];
        int k_stage = 0, k_parity = 0, v_stage = 0, v_parity = 0;
        const auto next_k = [&] {
            if (tells) barrier_arrive(k_empty + 8 * k_stage);
            if (++k_stage == KV_STAGES) k_stage = 0, k_parity ^= 1;
        };

        // The first warpgroup begins.
        if (own == 1) named_arrive(1, 256);

        barrier_wait(q_full, 0);
        barrier_wait(k_full, 0);
        named_sync(1 + own, 256);
        pin(s);
        wgmma_fence();
        product_nt<D>(s, own_q, k_tiles);
        wgmma_commit();
        named_arrive(2 - own, 256);
        wgmma_wait<0>();
        pin(s);
        next_k();
        mask_keys(s, begin * KEYS, warp_row, a.window, -INFINITY);
        softmax_tile(s, top, sum, rescale, c);

        const auto rescale_o = [&] {
            pin(o);
#pragma unroll
            for (int n = 0; n < D / 2; ++n) o[n] *= rescale[n % 4 / 2];
            pin(o);
        };
        for (int j = begin; j + 1 < end; ++j) {
            wgmma_wait<0>();
            pack(p, s);
            if (j > begin) {
                if (tells) barrier_arrive(v_empty + 8 * v_stage);
                if (++v_stage == KV_STAGES) v_stage = 0, v_parity ^= 1;
            }
            barrier_wait(k_full + 8 * k_stage, k_parity);
            barrier_wait(v_full + 8 * v_stage, v_parity);
            named_sync(1 + own, 256);
            pin(s);
            wgmma_fence();
            product_nt<D>(s, own_q, k_tiles + k_stage * TILE);
            wgmma_commit();
            rescale_o();
            wgmma_fence();
            product_nn(o, p, v_tiles + v_stage * TILE);
            wgmma_commit();
            named_arrive(2 - own, 256);

            wgmma_wait<1>();
            pin(s);
            next_k();
            mask_keys(s, (j + 1) * KEYS, warp_row, a.window, -INFINITY);
            softmax_tile(s, top, sum, rescale, c);
        }
        wgmma_wait<0>();
        pack(p, s);
        rescale_o();
        if (end - begin > 1)
            if (++v_stage == KV_STAGES) v_stage = 0, v_parity ^= 1;
        barrier_wait(v_full + 8 * v_stage, v_parity);
        pin(o);
        wgmma_fence();
        product_nn(o, p, v_tiles + v_stage * TILE);
        wgmma_commit();
        wgmma_wait<0>();
        pin(o);

#pragma unroll
        for (int half = 0; half < 2; ++half) sum[half] = quad_sum(sum[half]);
        if (lane % 4 == 0) {
            float *lse = a.lse + size_t(head) * a.t + place.start;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = warp_row + lane / 4 + 8 * half;
                if (row < place.len) lse[row] = top[half] * a.scale + logf(sum[half]);
            }
        }
        named_sync(3 + own, 128); // all of the warpgroup's products have read q
        const size_t ld_o = size_t(a.h) * D;
        store_rows<D>(a.o + (place.start + q0) * ld_o + head * D, ld_o, place.len - q0,
                      shared + (q_tile - shared_address(shared)), o, 1.0f / sum[0], 1.0f / sum[1], warp);
    }
#else
    __trap();
#endif
}

template <int D> cudaError_t forward(const AttentionForward &a, cudaStream_t stream) {
    CUtensorMap qkv;
    const int columns = (a.h + 2 * a.g) * D;
    const cudaError_t status = tensor_map(&qkv, a.qkv, a.t, columns, columns, KEYS);
    if (status != cudaSuccess) return status;
    const size_t ctas = size_t(attention_max_tiles(a.t, a.b, ROWS)) * a.h;
    return launch(attention_forward_sm90_kernel<D>, ctas, forward_shared(D), 1, stream, qkv, a);
}

} // namespace

// attention_forward_sm90, attention_backward_sm90    as attention_forward and attention_backward of attention.cu, for
// d = 64 or 128 on a Hopper card. No atomics: the same bits in every run.
//
// Products: 4 T² H D / 2 operations forward, 3.5 times as many backward (scores and dp are computed for dq and again
// for dk, dv).
HALFBYTE_API cudaError_t attention_forward_sm90(const AttentionForward *args, cudaStream_t stream) {
    const AttentionForward &a = *args;
    if (a.t == 0) return cudaSuccess;
    const cudaError_t status = check_device();
    if (status != cudaSuccess) return status;
    if (!is_aligned(a.qkv, 16) || !is_aligned(a.o, 16)) return cudaErrorMisalignedAddress;
    switch (a.d) {
    case 64: return forward<64>(a, stream);
    case 128: return forward<128>(a, stream);
    default: return cudaErrorInvalidValue;
    }
}
