// Attention backward on Hopper with wgmma, for heads of 64 and 128: dk, dv in one kernel, dq in another, no atomics.

#include "attention_sm90.cuh"

namespace {

constexpr int COLS = 64; // keys of a tile for dq, queries of a tile for dk, dv

constexpr size_t dq_shared(int d) { return ALIGNMENT + 2 * tile_bytes(ROWS, d) + 4 * tile_bytes(COLS, d); }
constexpr size_t dkv_shared(int d) { return dq_shared(d) + 4 * COLS * sizeof(float); }

// delta (H, T) = sum over D of d_o * o. D / 8 lanes take a row.
template <int D> __global__ void __launch_bounds__(THREADS) attention_delta_sm90_kernel(const AttentionBackward a) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    constexpr int LANES = D / 8;
    const size_t row = (size_t(blockIdx.x) * THREADS + threadIdx.x) / LANES;
    float sum = 0.0f;
    if (row < size_t(a.t) * a.h) {
        const size_t at = row * D + threadIdx.x % LANES * 8;
        const Vec8<bf16> x = load_vec8(a.d_o + at), y = load_vec8(a.o + at);
#pragma unroll
        for (int i = 0; i < 8; ++i) sum = fmaf(to_f32(x.at[i]), to_f32(y.at[i]), sum);
    }
#pragma unroll
    for (int d = LANES / 2; d > 0; d /= 2) sum += __shfl_xor_sync(FULL_WARP, sum, d);
    if (row < size_t(a.t) * a.h && threadIdx.x % LANES == 0) a.delta[row % a.h * a.t + row / a.h] = sum;
#else
    __trap();
#endif
}

template <int D> __global__ void __launch_bounds__(THREADS, 1) attention_dq_sm90_kernel(const AttentionBackward a) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    constexpr int KEYS = COLS;
    constexpr uint32_t TILE = tile_bytes(KEYS, D);
    extern __shared__ uint8_t shared[];
    const uint32_t q_tile = first_tile(shared_address(shared));
    const uint32_t do_tile = q_tile + tile_bytes(ROWS, D);
    const uint32_t k_tiles = do_tile + tile_bytes(ROWS, D), v_tiles = k_tiles + 2 * TILE;

    const int head = blockIdx.x % a.h;
    const SequenceTile place = find_tile<ROWS>(a.cu_seqlens, a.b, blockIdx.x / a.h);
    if (place.len == 0) return;
    const int q0 = (ceil_div(place.len, ROWS) - 1 - place.tile) * ROWS;
    const int begin = max(0, q0 - a.window + 1) / KEYS;
    const int end = ceil_div(min(q0 + ROWS, place.len), KEYS);
    const Inputs in = inputs_of<D>(a.qkv, place.start, head, a.h, a.g);
    const size_t ld_o = size_t(a.h) * D;

    const int lane = threadIdx.x % 32;
    const int warp_row = q0 + threadIdx.x / 32 * 16;
    const uint32_t own = threadIdx.x / 128 * (64 * 128);
    const float c = a.scale * LOG2_E;

    const auto load = [&](int j) {
        const uint32_t stage = (j & 1) * TILE;
        load_tile<KEYS, D>(k_tiles + stage, in.k + j * KEYS * in.ld, in.ld, place.len - j * KEYS);
        load_tile<KEYS, D>(v_tiles + stage, in.v + j * KEYS * in.ld, in.ld, place.len - j * KEYS);
    };
    load_tile<ROWS, D>(q_tile, in.q + q0 * in.ld, in.ld, place.len - q0);
    load_tile<ROWS, D>(do_tile, a.d_o + (place.start + q0) * ld_o + head * D, ld_o, place.len - q0);
    load(begin);
    cp_async_commit();

    float shift[2], delta[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = warp_row + lane / 4 + 8 * half;
        const size_t at = size_t(head) * a.t + place.start + row;
        shift[half] = row < place.len ? a.lse[at] * LOG2_E : 0.0f;
        delta[half] = row < place.len ? a.delta[at] : 0.0f;
    }

    float s[KEYS / 2] = {}, dp[KEYS / 2] = {}, dq[D / 2] = {};
    for (int j = begin; j < end; ++j) {
        const uint32_t k_tile = k_tiles + (j & 1) * TILE, v_tile = v_tiles + (j & 1) * TILE;
        cp_async_wait<0>();
        fence_for_wgmma();
        __syncthreads();
        pin(s);
        pin(dp);
        wgmma_fence();
        product_nt<D>(s, q_tile + own, k_tile);
        wgmma_commit();
        product_nt<D>(dp, do_tile + own, v_tile);
        wgmma_commit();
        if (j + 1 < end) load(j + 1);
        cp_async_commit();

        wgmma_wait<1>();
        pin(s);
        mask_keys(s, j * KEYS, warp_row, a.window);
#pragma unroll
        for (int n = 0; n < KEYS / 2; ++n) s[n] = exp2_fast(fmaf(s[n], c, -shift[n % 4 / 2]));
        wgmma_wait<0>();
        pin(dp);
#pragma unroll
        for (int n = 0; n < KEYS / 2; ++n) dp[n] = s[n] * (dp[n] - delta[n % 4 / 2]);
        uint32_t ds[KEYS / 16][4];
        pack(ds, dp);
        pin(dq);
        wgmma_fence();
        product_nn(dq, ds, k_tile);
        wgmma_commit();
        wgmma_wait<0>();
        pin(dq);
    }
    __syncthreads(); // the other warpgroup may still read q
    store_rows<D>(a.dqkv + (place.start + q0) * in.ld + head * D, in.ld, place.len - q0,
                  shared + (q_tile - shared_address(shared)), dq, a.scale, a.scale);
#else
    __trap();
#endif
}

// Rows of the products are keys here, so that probabilities come out transposed, as dv = pᵀ d_o and dk = dsᵀ q take them.
template <int D> __global__ void __launch_bounds__(THREADS, 1) attention_dkv_sm90_kernel(const AttentionBackward a) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    constexpr int QUERIES = COLS;
    constexpr uint32_t TILE = tile_bytes(QUERIES, D);
    extern __shared__ uint8_t shared[];
    const uint32_t k_tile = first_tile(shared_address(shared));
    const uint32_t v_tile = k_tile + tile_bytes(ROWS, D);
    const uint32_t q_tiles = v_tile + tile_bytes(ROWS, D), do_tiles = q_tiles + 2 * TILE;
    const uint32_t row_values = do_tiles + 2 * TILE; // a stage: lse, then delta

    const int kv = blockIdx.x % a.g, group = a.h / a.g;
    const SequenceTile place = find_tile<ROWS>(a.cu_seqlens, a.b, blockIdx.x / a.g);
    if (place.len == 0) return;
    const int k0 = place.tile * ROWS; // the first keys are seen by most queries
    const int begin = k0 / QUERIES;
    const int end = ceil_div(min(place.len, k0 + ROWS - 1 + a.window), QUERIES);
    const Inputs in = inputs_of<D>(a.qkv, place.start, kv * group, a.h, a.g);
    const size_t ld_o = size_t(a.h) * D;

    const int lane = threadIdx.x % 32;
    const int warp_row = k0 + threadIdx.x / 32 * 16;
    const uint32_t own = threadIdx.x / 128 * (64 * 128);
    const float c = a.scale * LOG2_E;

    // Tile `tile` of the group's query head `of`.
    const auto load = [&](int stage, int of, int tile) {
        const int q0 = tile * QUERIES, valid = place.len - q0, head = kv * group + of;
        load_tile<QUERIES, D>(q_tiles + stage * TILE, in.q + q0 * in.ld + of * D, in.ld, valid);
        load_tile<QUERIES, D>(do_tiles + stage * TILE, a.d_o + (place.start + q0) * ld_o + head * D, ld_o, valid);
        const int i = threadIdx.x % QUERIES;
        if (threadIdx.x < 2 * QUERIES) {
            const float *from = (threadIdx.x < QUERIES ? a.lse : a.delta) + size_t(head) * a.t + place.start + q0 + i;
            cp_async4(row_values + (stage * 2 * QUERIES + threadIdx.x) * 4, from, i < valid);
        }
    };
    load_tile<ROWS, D>(k_tile, in.k + k0 * in.ld, in.ld, place.len - k0);
    load_tile<ROWS, D>(v_tile, in.v + k0 * in.ld, in.ld, place.len - k0);
    load(0, 0, begin);
    cp_async_commit();

    float s[QUERIES / 2] = {}, dp[QUERIES / 2] = {}, dk[D / 2] = {}, dv[D / 2] = {};
    int stage = 0;
    for (int of = 0; of < group; ++of) {
        for (int tile = begin; tile < end; ++tile) {
            const uint32_t q_tile = q_tiles + stage * TILE, do_tile = do_tiles + stage * TILE;
            cp_async_wait<0>();
            fence_for_wgmma();
            __syncthreads();
            pin(s);
            pin(dp);
            wgmma_fence();
            product_nt<D>(s, k_tile + own, q_tile);
            wgmma_commit();
            product_nt<D>(dp, v_tile + own, do_tile);
            wgmma_commit();
            if (tile + 1 < end) load(stage ^ 1, of, tile + 1);
            else if (of + 1 < group) load(stage ^ 1, of + 1, begin);
            cp_async_commit();

            // Rows behind the end of the sequence are zeros in q, d_o, lse and delta: they add nothing.
            const float2 *lse = reinterpret_cast<const float2 *>(shared + (row_values - shared_address(shared))) +
                                stage * QUERIES + lane % 4;
            const float2 *delta = lse + QUERIES / 2;
            wgmma_wait<1>();
            pin(s);
            mask_queries(s, tile * QUERIES, warp_row, a.window);
#pragma unroll
            for (int n = 0; n < QUERIES / 8; ++n) {
                const float2 x = lse[4 * n];
                const float shift0 = x.x * LOG2_E, shift1 = x.y * LOG2_E;
                s[4 * n] = exp2_fast(fmaf(s[4 * n], c, -shift0));
                s[4 * n + 1] = exp2_fast(fmaf(s[4 * n + 1], c, -shift1));
                s[4 * n + 2] = exp2_fast(fmaf(s[4 * n + 2], c, -shift0));
                s[4 * n + 3] = exp2_fast(fmaf(s[4 * n + 3], c, -shift1));
            }
            uint32_t p[QUERIES / 16][4];
            pack(p, s);
            pin(dv);
            wgmma_fence();
            product_nn(dv, p, do_tile);
            wgmma_commit();

            wgmma_wait<1>();
            pin(dp);
#pragma unroll
            for (int n = 0; n < QUERIES / 8; ++n) {
                const float2 x = delta[4 * n];
                dp[4 * n] = s[4 * n] * (dp[4 * n] - x.x);
                dp[4 * n + 1] = s[4 * n + 1] * (dp[4 * n + 1] - x.y);
                dp[4 * n + 2] = s[4 * n + 2] * (dp[4 * n + 2] - x.x);
                dp[4 * n + 3] = s[4 * n + 3] * (dp[4 * n + 3] - x.y);
            }
            uint32_t ds[QUERIES / 16][4];
            pack(ds, dp);
            pin(dk);
            wgmma_fence();
            product_nn(dk, ds, q_tile);
            wgmma_commit();
            wgmma_wait<0>();
            pin(dk);
            pin(dv);
            stage ^= 1;
        }
    }
    __syncthreads(); // the other warpgroup may still read k and v
    bf16 *row0 = a.dqkv + (place.start + k0) * in.ld + kv * D;
    uint8_t *tiles = shared + (k_tile - shared_address(shared));
    store_rows<D>(row0 + a.h * D, in.ld, place.len - k0, tiles, dk, a.scale, a.scale);
    store_rows<D>(row0 + (a.h + a.g) * D, in.ld, place.len - k0, tiles + tile_bytes(ROWS, D), dv, 1.0f, 1.0f);
#else
    __trap();
#endif
}

template <int D> cudaError_t backward(const AttentionBackward &a, cudaStream_t stream) {
    const size_t tiles = attention_max_tiles(a.t, a.b, ROWS);
    cudaError_t status =
        launch(attention_delta_sm90_kernel<D>, ceil_div<size_t>(size_t(a.t) * a.h * (D / 8), THREADS), 0, a, stream);
    if (status == cudaSuccess) status = launch(attention_dkv_sm90_kernel<D>, tiles * a.g, dkv_shared(D), a, stream);
    if (status == cudaSuccess) status = launch(attention_dq_sm90_kernel<D>, tiles * a.h, dq_shared(D), a, stream);
    return status;
}

} // namespace

// attention_forward_sm90, attention_backward_sm90    as attention_forward and attention_backward of attention.cu, for
// d = 64 or 128 on a Hopper card. No atomics: the same bits in every run.
//
// Products: 4 T² H D / 2 operations forward, 3.5 times as many backward (scores and dp are computed for dq and again for
// dk, dv).
HALFBYTE_API cudaError_t attention_backward_sm90(const AttentionBackward *args, cudaStream_t stream) {
    const AttentionBackward &a = *args;
    if (a.t == 0) return cudaSuccess;
    const cudaError_t status = check_device();
    if (status != cudaSuccess) return status;
    if (!is_aligned(a.qkv, 16) || !is_aligned(a.dqkv, 16) || !is_aligned(a.d_o, 16) || !is_aligned(a.o, 16))
        return cudaErrorMisalignedAddress;
    switch (a.d) {
    case 64: return backward<64>(a, stream);
    case 128: return backward<128>(a, stream);
    default: return cudaErrorInvalidValue;
    }
}
