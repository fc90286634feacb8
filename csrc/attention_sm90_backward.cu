// Attention backward on Hopper with wgmma, for heads of 64 and 128: dk, dv in one kernel, dq in another, no atomics.

#include "attention_sm90.cuh"
#include "cluster.cuh"

namespace {

constexpr int COLS = 64; // keys of a tile for dq, queries of a tile for dk, dv

// Where fewer CTAs than this, about one for each SM of an H100, would compute dk and dv, each group is split.
constexpr size_t SPLIT_BELOW = 160;

// Of the tiles in shared memory. With three, a tile's last product may still run while the next tile's first ones start: the
// copies that are then issued go where the tile before it was.
constexpr int STAGES = 3;
constexpr int SPLIT_STAGES = 2; // of dk, dv by a cluster: it lacks the registers for three

__host__ __device__ constexpr size_t dq_shared(int d, int stages) {
    return ALIGNMENT + 2 * tile_bytes(ROWS, d) + 2 * stages * tile_bytes(COLS, d);
}
__host__ __device__ constexpr size_t dkv_shared(int d, int stages) { return dq_shared(d, stages) + 2 * stages * COLS * sizeof(float); }

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

template <int D, int STAGES>
__global__ void __launch_bounds__(THREADS, 1) attention_dq_sm90_kernel(const AttentionBackward a) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    constexpr int KEYS = COLS;
    constexpr uint32_t TILE = tile_bytes(KEYS, D);
    extern __shared__ uint8_t shared[];
    const uint32_t q_tile = first_tile(shared_address(shared));
    const uint32_t do_tile = q_tile + tile_bytes(ROWS, D);
    const uint32_t k_tiles = do_tile + tile_bytes(ROWS, D), v_tiles = k_tiles + STAGES * TILE;

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

    const auto load = [&](int stage, int j) {
        load_tile<KEYS, D>(k_tiles + stage * TILE, in.k + j * KEYS * in.ld, in.ld, place.len - j * KEYS);
        load_tile<KEYS, D>(v_tiles + stage * TILE, in.v + j * KEYS * in.ld, in.ld, place.len - j * KEYS);
    };
    load_tile<ROWS, D>(q_tile, in.q + q0 * in.ld, in.ld, place.len - q0);
    load_tile<ROWS, D>(do_tile, a.d_o + (place.start + q0) * ld_o + head * D, ld_o, place.len - q0);
    load(0, begin);
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
    int stage = 0, j = begin;
    do { // at least once
        const uint32_t k_tile = k_tiles + stage * TILE, v_tile = v_tiles + stage * TILE;
        const int next = stage + 1 < STAGES ? stage + 1 : 0;
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
        if (j + 1 < end) load(next, j + 1);
        cp_async_commit();

        wgmma_wait<1>();
        pin(s);
#pragma unroll
        for (int n = 0; n < KEYS / 2; ++n) s[n] = exp2_fast(fmaf(s[n], c, -shift[n % 4 / 2]));
        mask_keys(s, j * KEYS, warp_row, a.window, 0.0f);
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
        wgmma_wait<STAGES == 2 ? 0 : 1>();
        stage = next;
    } while (++j < end);
    wgmma_wait<0>();
    pin(dq);
    __syncthreads(); // the other warpgroup may still read q
    store_rows<D>(a.dqkv + (place.start + q0) * in.ld + head * D, in.ld, place.len - q0,
                  shared + (q_tile - shared_address(shared)), dq, a.scale, a.scale);
#else
    __trap();
#endif
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// Rows of f32 sums that other CTAs read: eight words of padding put the rows of a warp's write in different banks.
template <int D> constexpr uint32_t SUM_ROW_BYTES = (D + 8) * 4;

// Lays a thread's share of 64 rows down as f32.
template <int D> __device__ __forceinline__ void stage_sums(uint8_t *sums, const float (&d)[D / 2]) {
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;
    uint8_t *at = sums + row * SUM_ROW_BYTES<D> + lane % 4 * 8;
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
        *reinterpret_cast<float2 *>(at + n * 32) = make_float2(d[4 * n], d[4 * n + 1]);
        *reinterpret_cast<float2 *>(at + 8 * SUM_ROW_BYTES<D> + n * 32) = make_float2(d[4 * n + 2], d[4 * n + 3]);
    }
}

// Adds up, in order of rank, what the CTAs of the cluster staged, each CTA its share of the rows; rounds and writes it.
template <int D>
__device__ __forceinline__ void store_cluster_sums(bf16 *to, size_t ld, int valid, uint32_t sums, float factor) {
    constexpr int CHUNKS = D / 8;
    const uint32_t ctas = cluster_ctas();
    for (int i = cluster_rank() * THREADS + threadIdx.x; i < ROWS * CHUNKS; i += ctas * THREADS) {
        const int row = i / CHUNKS, chunk = i % CHUNKS;
        if (row >= valid) break;
        float x[8] = {};
        for (uint32_t rank = 0; rank < ctas; ++rank) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const float4 y = cluster_load(sums + row * SUM_ROW_BYTES<D> + chunk * 32 + j * 16, rank);
                x[4 * j] += y.x;
                x[4 * j + 1] += y.y;
                x[4 * j + 2] += y.z;
                x[4 * j + 3] += y.w;
            }
        }
        uint4 packed;
        packed.x = pack_bf16(x[0] * factor, x[1] * factor);
        packed.y = pack_bf16(x[2] * factor, x[3] * factor);
        packed.z = pack_bf16(x[4] * factor, x[5] * factor);
        packed.w = pack_bf16(x[6] * factor, x[7] * factor);
        *reinterpret_cast<uint4 *>(to + row * ld + chunk * 8) = packed;
    }
}

#endif // __CUDA_ARCH_FEAT_SM90_ALL

// Rows of the products are keys here, so that probabilities come out transposed, as dv = pᵀ d_o and dk = dsᵀ q take them.
// SPLIT: the CTAs of a cluster share the query heads of a group out among themselves, and add up what they found.
template <int D, int STAGES, bool SPLIT>
__global__ void __launch_bounds__(THREADS, 1) attention_dkv_sm90_kernel(const AttentionBackward a) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    constexpr int QUERIES = COLS;
    constexpr uint32_t TILE = tile_bytes(QUERIES, D);
    extern __shared__ uint8_t shared[];
    const uint32_t k_tile = first_tile(shared_address(shared));
    const uint32_t v_tile = k_tile + tile_bytes(ROWS, D);
    const uint32_t q_tiles = v_tile + tile_bytes(ROWS, D), do_tiles = q_tiles + STAGES * TILE;
    const uint32_t row_values = do_tiles + STAGES * TILE; // a stage: lse, then delta

    const int ctas = SPLIT ? cluster_ctas() : 1, rank = SPLIT ? cluster_rank() : 0, unit = blockIdx.x / ctas;
    const int kv = unit % a.g, group = a.h / a.g;
    const int first_of = group / ctas * rank, last_of = group / ctas * (rank + 1) - 1; // of the group's heads
    const SequenceTile place = find_tile<ROWS>(a.cu_seqlens, a.b, unit / a.g);
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
    load(0, first_of, begin);
    cp_async_commit();

    float s[QUERIES / 2] = {}, dp[QUERIES / 2] = {}, dk[D / 2] = {}, dv[D / 2] = {};
    int stage = 0;
    for (int of = first_of; of <= last_of; ++of) {
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
            const int next = stage + 1 < STAGES ? stage + 1 : 0;
            if (tile + 1 < end) load(next, of, tile + 1);
            else if (of < last_of) load(next, of + 1, begin);
            cp_async_commit();

            // Rows behind the end of the sequence are zeros in q, d_o, lse and delta: they add nothing.
            const float2 *lse = reinterpret_cast<const float2 *>(shared + (row_values - shared_address(shared))) +
                                stage * QUERIES + lane % 4;
            const float2 *delta = lse + QUERIES / 2;
            wgmma_wait<1>();
            pin(s);
#pragma unroll
            for (int n = 0; n < QUERIES / 8; ++n) {
                const float2 x = lse[4 * n];
                const float shift0 = x.x * LOG2_E, shift1 = x.y * LOG2_E;
                s[4 * n] = exp2_fast(fmaf(s[4 * n], c, -shift0));
                s[4 * n + 1] = exp2_fast(fmaf(s[4 * n + 1], c, -shift1));
                s[4 * n + 2] = exp2_fast(fmaf(s[4 * n + 2], c, -shift0));
                s[4 * n + 3] = exp2_fast(fmaf(s[4 * n + 3], c, -shift1));
            }
            mask_queries(s, tile * QUERIES, warp_row, a.window, 0.0f);
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
            wgmma_wait<STAGES == 2 ? 0 : 1>(); // dv, which frees the registers of p
            stage = next;
        }
    }
    wgmma_wait<0>();
    pin(dk);
    pin(dv);
    __syncthreads(); // the other warpgroup may still read k and v
    bf16 *row0 = a.dqkv + (place.start + k0) * in.ld + kv * D;
    uint8_t *tiles = shared + (k_tile - shared_address(shared));
    if (SPLIT) {
        constexpr uint32_t SUM_BYTES = ROWS * SUM_ROW_BYTES<D>;
        static_assert(ALIGNMENT + 2 * SUM_BYTES <= dkv_shared(D, ::STAGES), "both fit where the tiles were");
        stage_sums<D>(tiles, dk);
        stage_sums<D>(tiles + SUM_BYTES, dv);
        cluster_sync();
        store_cluster_sums<D>(row0 + a.h * D, in.ld, place.len - k0, k_tile, a.scale);
        store_cluster_sums<D>(row0 + (a.h + a.g) * D, in.ld, place.len - k0, k_tile + SUM_BYTES, 1.0f);
        cluster_sync(); // a CTA must not be gone while others read from it
        return;
    }
    store_rows<D>(row0 + a.h * D, in.ld, place.len - k0, tiles, dk, a.scale, a.scale);
    store_rows<D>(row0 + (a.h + a.g) * D, in.ld, place.len - k0, tiles + tile_bytes(ROWS, D), dv, 1.0f, 1.0f);
#else
    __trap();
#endif
}

// CTAs that share a group of query heads out: as many as divide it, up to the 8 that any cluster may have.
int split_of(int group) {
    int ctas = group < 8 ? group : 8;
    while (group % ctas != 0) --ctas;
    return ctas;
}

template <int D> cudaError_t launch_dkv(const AttentionBackward &a, bool split, cudaStream_t stream) {
    const size_t units = size_t(attention_max_tiles(a.t, a.b, ROWS)) * a.g;
    const int ctas = split_of(a.h / a.g);
    if (split && ctas > 1)
        return launch(attention_dkv_sm90_kernel<D, SPLIT_STAGES, true>, units * ctas, dkv_shared(D, STAGES), a, stream, ctas);
    return launch(attention_dkv_sm90_kernel<D, STAGES, false>, units, dkv_shared(D, STAGES), a, stream);
}

template <int D> cudaError_t backward(const AttentionBackward &a, cudaStream_t stream) {
    const size_t tiles = attention_max_tiles(a.t, a.b, ROWS), rows = size_t(a.t) * a.h;
    cudaError_t status =
        launch(attention_delta_sm90_kernel<D>, ceil_div<size_t>(rows * (D / 8), THREADS), 0, a, stream);
    if (status == cudaSuccess) status = launch_dkv<D>(a, tiles * a.g < SPLIT_BELOW, stream);
    if (status == cudaSuccess)
        status = launch(attention_dq_sm90_kernel<D, STAGES>, tiles * a.h, dq_shared(D, STAGES), a, stream);
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
