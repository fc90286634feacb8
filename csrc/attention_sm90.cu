// Attention forward on Hopper with wgmma, for heads of 64 and 128.

#include "attention_sm90.cuh"

namespace {

constexpr int KEYS = 128; // of a key tile

constexpr size_t forward_shared(int d) { return ALIGNMENT + tile_bytes(ROWS, d) + 4 * tile_bytes(KEYS, d); }

template <int D> __global__ void __launch_bounds__(THREADS, 1) attention_forward_sm90_kernel(const AttentionForward a) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    constexpr uint32_t TILE = tile_bytes(KEYS, D);
    extern __shared__ uint8_t shared[];
    const uint32_t q_tile = first_tile(shared_address(shared));
    const uint32_t k_tiles = q_tile + tile_bytes(ROWS, D), v_tiles = k_tiles + 2 * TILE;

    const int head = blockIdx.x % a.h;
    const SequenceTile place = find_tile<ROWS>(a.cu_seqlens, a.b, blockIdx.x / a.h);
    if (place.len == 0) return;
    const int q0 = (ceil_div(place.len, ROWS) - 1 - place.tile) * ROWS; // the longest first
    const int begin = max(0, q0 - a.window + 1) / KEYS;
    const int end = ceil_div(min(q0 + ROWS, place.len), KEYS);
    const Inputs in = inputs_of<D>(a.qkv, place.start, head, a.h, a.g);

    const int lane = threadIdx.x % 32;
    const int warp_row = q0 + threadIdx.x / 32 * 16;
    const uint32_t own_q = q_tile + threadIdx.x / 128 * (64 * 128);
    const float c = a.scale * LOG2_E;

    const auto load_k = [&](int j) {
        load_tile<KEYS, D>(k_tiles + (j & 1) * TILE, in.k + j * KEYS * in.ld, in.ld, place.len - j * KEYS);
    };
    const auto load_v = [&](int j) {
        load_tile<KEYS, D>(v_tiles + (j & 1) * TILE, in.v + j * KEYS * in.ld, in.ld, place.len - j * KEYS);
    };

    float s[KEYS / 2] = {}, o[D / 2] = {};
    uint32_t p[KEYS / 16][4];
    float top[2] = {-INFINITY, -INFINITY}, sum[2] = {}, rescale[2];

    load_tile<ROWS, D>(q_tile, in.q + q0 * in.ld, in.ld, place.len - q0);
    load_k(begin);
    cp_async_commit();
    load_v(begin);
    if (begin + 1 < end) load_k(begin + 1);
    cp_async_commit();

    cp_async_wait<1>();
    fence_for_wgmma();
    __syncthreads();
    pin(s);
    wgmma_fence();
    product_nt<D>(s, own_q, k_tiles + (begin & 1) * TILE);
    wgmma_commit();
    wgmma_wait<0>();
    pin(s);
    mask_keys(s, begin * KEYS, warp_row, a.window, -INFINITY);
    softmax_tile(s, top, sum, rescale, c);

    // What a tile's probabilities wait for: the product of those before them, which still reads p and adds to o.
    const auto take_probabilities = [&] {
        wgmma_wait<0>();
        pin(o);
#pragma unroll
        for (int n = 0; n < D / 2; ++n) o[n] *= rescale[n % 4 / 2];
        pack(p, s);
    };

    // Scores of the next tile and the output of this one are computed together; the softmax of the former hides the latter,
    // whose end is awaited only in the next round.
    for (int j = begin; j + 1 < end; ++j) {
        take_probabilities();
        cp_async_wait<0>();
        fence_for_wgmma();
        __syncthreads();
        pin(s);
        pin(o);
        wgmma_fence();
        product_nt<D>(s, own_q, k_tiles + ((j + 1) & 1) * TILE);
        wgmma_commit();
        product_nn(o, p, v_tiles + (j & 1) * TILE);
        wgmma_commit();
        load_v(j + 1);
        if (j + 2 < end) load_k(j + 2);
        cp_async_commit();

        wgmma_wait<1>();
        pin(s);
        mask_keys(s, (j + 1) * KEYS, warp_row, a.window, -INFINITY);
        softmax_tile(s, top, sum, rescale, c);
    }

    take_probabilities();
    cp_async_wait<0>();
    fence_for_wgmma();
    __syncthreads();
    pin(o);
    wgmma_fence();
    product_nn(o, p, v_tiles + ((end - 1) & 1) * TILE);
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
    const size_t ld_o = size_t(a.h) * D;
    store_rows<D>(a.o + (place.start + q0) * ld_o + head * D, ld_o, place.len - q0,
                  shared + (q_tile - shared_address(shared)), o, 1.0f / sum[0], 1.0f / sum[1]);
#else
    __trap();
#endif
}

} // namespace

// attention_forward_sm90, attention_backward_sm90    as attention_forward and attention_backward of attention.cu, for
// d = 64 or 128 on a Hopper card. No atomics: the same bits in every run.
//
// Products: 4 T² H D / 2 operations forward, 3.5 times as many backward (scores and dp are computed for dq and again for
// dk, dv).
HALFBYTE_API cudaError_t attention_forward_sm90(const AttentionForward *args, cudaStream_t stream) {
    const AttentionForward &a = *args;
    if (a.t == 0) return cudaSuccess;
    const cudaError_t status = check_device();
    if (status != cudaSuccess) return status;
    if (!is_aligned(a.qkv, 16) || !is_aligned(a.o, 16)) return cudaErrorMisalignedAddress;
    const size_t ctas = size_t(attention_max_tiles(a.t, a.b, ROWS)) * a.h;
    switch (a.d) {
    case 64: return launch(attention_forward_sm90_kernel<64>, ctas, forward_shared(64), a, stream);
    case 128: return launch(attention_forward_sm90_kernel<128>, ctas, forward_shared(128), a, stream);
    default: return cudaErrorInvalidValue;
    }
}
