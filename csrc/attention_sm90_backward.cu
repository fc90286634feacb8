// Attention backward on Hopper with wgmma, for heads of 64 and 128: dk, dv in one kernel, dq in another, no atomics.

#include "attention_sm90.cuh"
#include "cluster.cuh"

namespace {

constexpr int COLS = 64; // keys of a tile for dq, queries of a tile for dk, dv
constexpr int STAGES = 3;

// Where fewer CTAs than this, about one for each SM of an H100, would compute dk and dv, each group is split.
constexpr size_t SPLIT_BELOW = 160;

struct Maps {
    CUtensorMap qkv_rows, qkv_cols, do_rows, do_cols; // boxes of ROWS rows, of COLS
};

// A warp's own lse and delta of a tile of queries, twice: those in use, those of the next tile.
constexpr uint32_t WARP_VALUES = 2 * 2 * COLS;

__host__ __device__ constexpr size_t backward_shared(int d) {
    return ALIGNMENT + 2 * tile_bytes(ROWS, d) + 2 * STAGES * tile_bytes(COLS, d) + 8 * WARP_VALUES * 4 +
           (1 + 2 * STAGES) * 8;
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

__device__ __forceinline__ float2 unpack_bf16(uint32_t x) {
    return {__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u)};
}

// Rows of f32 sums that other CTAs read: eight words of padding put the rows of a warp's write in different banks.
template <int D> constexpr uint32_t SUM_ROW_BYTES = (D + 8) * 4;

// Lays a thread's share of 64 rows down as f32.
template <int D> __device__ __forceinline__ void stage_sums(uint8_t *sums, const float (&d)[D / 2], int warp) {
    const int lane = threadIdx.x % 32, row = warp * 16 + lane / 4;
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
    for (int i = cluster_rank() * 256 + threadIdx.x - 128; i < ROWS * CHUNKS; i += ctas * 256) {
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

template <int D>
__global__ void __launch_bounds__(THREADS, 1)
attention_dq_sm90_kernel(const __grid_constant__ Maps maps, const AttentionBackward a) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    constexpr int KEYS = COLS;
    constexpr uint32_t TILE = tile_bytes(KEYS, D);
    extern __shared__ uint8_t shared[];
    const uint32_t q_tile = first_tile(shared_address(shared));
    const uint32_t do_tile = q_tile + tile_bytes(ROWS, D);
    const uint32_t k_tiles = do_tile + tile_bytes(ROWS, D), v_tiles = k_tiles + STAGES * TILE;
    const uint32_t rows_full = v_tiles + STAGES * TILE, full = rows_full + 8, empty = full + 8 * STAGES;

    const int head = blockIdx.x % a.h, kv = head / (a.h / a.g);
    const SequenceTile place = find_tile<ROWS>(a.cu_seqlens, a.b, blockIdx.x / a.h);
    if (place.len == 0) return;
    const int q0 = (ceil_div(place.len, ROWS) - 1 - place.tile) * ROWS; // the longest first
    const int begin = max(0, q0 - a.window + 1) / KEYS;
    const int end = ceil_div(min(q0 + ROWS, place.len), KEYS);

    if (threadIdx.x == 0) {
        barrier_init(rows_full, 1);
        for (int s = 0; s < STAGES; ++s) {
            barrier_init(full + 8 * s, 1);
            barrier_init(empty + 8 * s, 8);
        }
        barrier_init_fence();
    }
    __syncthreads();

    if (threadIdx.x < 128) {
        registers_down<56>();
        if (threadIdx.x == 0) {
            barrier_expect(rows_full, 2 * tile_bytes(ROWS, D));
            copy_tile<ROWS, D>(q_tile, &maps.qkv_rows, head * D, place.start + q0, rows_full);
            copy_tile<ROWS, D>(do_tile, &maps.do_rows, head * D, place.start + q0, rows_full);
            int stage = 0, parity = 0;
            for (int j = begin; j < end; ++j) {
                const uint32_t arrived = full + 8 * stage;
                const int row = place.start + j * KEYS;
                barrier_wait(empty + 8 * stage, parity ^ 1);
                barrier_expect(arrived, 2 * TILE);
                copy_tile<KEYS, D>(k_tiles + stage * TILE, &maps.qkv_cols, (a.h + kv) * D, row, arrived);
                copy_tile<KEYS, D>(v_tiles + stage * TILE, &maps.qkv_cols, (a.h + a.g + kv) * D, row, arrived);
                if (++stage == STAGES) stage = 0, parity ^= 1;
            }
        }
    } else {
        registers_up<224>();
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 - 4;
        const int warp_row = q0 + warp * 16;
        const uint32_t own = warp / 4 * (64 * 128);
        const float c = a.scale * LOG2_E;
        const bool tells = lane == 0; // for its warp

        float shift[2], delta[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = warp_row + lane / 4 + 8 * half;
            const size_t at = size_t(head) * a.t + place.start + row;
            shift[half] = row < place.len ? a.lse[at] * LOG2_E : 0.0f;
            delta[half] = row < place.len ? a.delta[at] : 0.0f;
        }

        float s[KEYS / 2] = {}, dp[KEYS / 2] = {}, dq[D / 2] = {};
        int stage = 0, parity = 0, last = -1, j = begin;
        barrier_wait(rows_full, 0);
        do { // at least once
            const uint32_t k_tile = k_tiles + stage * TILE, v_tile = v_tiles + stage * TILE;
            barrier_wait(full + 8 * stage, parity);
            pin(s);
            pin(dp);
            wgmma_fence();
            product_nt<D>(s, q_tile + own, k_tile);
            wgmma_commit();
            product_nt<D>(dp, do_tile + own, v_tile);
            wgmma_commit();

            wgmma_wait<1>();
            pin(s);
            if (last >= 0 && tells) barrier_arrive(empty + 8 * last); // the last tile's product with k is done, too
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
            last = stage;
            if (++stage == STAGES) stage = 0, parity ^= 1;
        } while (++j < end);
        wgmma_wait<0>();
        pin(dq);
        named_sync(1 + warp / 4, 128); // all of the warpgroup's products have read q
        const size_t ld = size_t(a.h + 2 * a.g) * D;
        store_rows<D>(a.dqkv + (place.start + q0) * ld + head * D, ld, place.len - q0,
                      shared + (q_tile - shared_address(shared)), dq, a.scale, a.scale, warp);
    }
#else
    __trap();
#endif
}

// Rows of the products are keys here, so that probabilities come out transposed, as dv = pᵀ d_o and dk = dsᵀ q take
// them. SPLIT: the CTAs of a cluster share the query heads of a group out among themselves, and add up what they found.
template <int D, bool SPLIT>
__global__ void __launch_bounds__(THREADS, 1)
attention_dkv_sm90_kernel(const __grid_constant__ Maps maps, const AttentionBackward a) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    constexpr int QUERIES = COLS;
    constexpr uint32_t TILE = tile_bytes(QUERIES, D);
    extern __shared__ uint8_t shared[];
    const uint32_t k_tile = first_tile(shared_address(shared));
    const uint32_t v_tile = k_tile + tile_bytes(ROWS, D);
    const uint32_t q_tiles = v_tile + tile_bytes(ROWS, D), do_tiles = q_tiles + STAGES * TILE;
    const uint32_t values = do_tiles + STAGES * TILE; // WARP_VALUES of each warp that multiplies
    const uint32_t rows_full = values + 8 * WARP_VALUES * 4, full = rows_full + 8, empty = full + 8 * STAGES;

    const int ctas = SPLIT ? cluster_ctas() : 1, rank = SPLIT ? cluster_rank() : 0, unit = blockIdx.x / ctas;
    const int kv = unit % a.g, group = a.h / a.g;
    const int first_head = kv * group + group / ctas * rank, last_head = first_head + group / ctas - 1;
    const SequenceTile place = find_tile<ROWS>(a.cu_seqlens, a.b, unit / a.g);
    if (place.len == 0) return;
    const int k0 = place.tile * ROWS; // the first keys are seen by most queries
    const int begin = k0 / QUERIES;
    const int end = ceil_div(min(place.len, k0 + ROWS - 1 + a.window), QUERIES);

    if (threadIdx.x == 0) {
        barrier_init(rows_full, 1);
        for (int s = 0; s < STAGES; ++s) {
            barrier_init(full + 8 * s, 1);
            barrier_init(empty + 8 * s, 8);
        }
        barrier_init_fence();
    }
    __syncthreads();

    const size_t ld = size_t(a.h + 2 * a.g) * D;
    bf16 *row0 = a.dqkv + (place.start + k0) * ld + kv * D;
    uint8_t *tiles = shared + (k_tile - shared_address(shared));
    constexpr uint32_t SUM_BYTES = ROWS * SUM_ROW_BYTES<D>;
    static_assert(ALIGNMENT + 2 * SUM_BYTES <= backward_shared(D), "both fit where the tiles were");
    if (threadIdx.x < 128) {
        registers_down<40>();
        if (threadIdx.x == 0) {
            barrier_expect(rows_full, 2 * tile_bytes(ROWS, D));
            copy_tile<ROWS, D>(k_tile, &maps.qkv_rows, (a.h + kv) * D, place.start + k0, rows_full);
            copy_tile<ROWS, D>(v_tile, &maps.qkv_rows, (a.h + a.g + kv) * D, place.start + k0, rows_full);
            int stage = 0, parity = 0;
            for (int head = first_head; head <= last_head; ++head)
                for (int tile = begin; tile < end; ++tile) {
                    const uint32_t arrived = full + 8 * stage;
                    const int row = place.start + tile * QUERIES;
                    barrier_wait(empty + 8 * stage, parity ^ 1);
                    barrier_expect(arrived, 2 * TILE);
                    copy_tile<QUERIES, D>(q_tiles + stage * TILE, &maps.qkv_cols, head * D, row, arrived);
                    copy_tile<QUERIES, D>(do_tiles + stage * TILE, &maps.do_cols, head * D, row, arrived);
                    if (++stage == STAGES) stage = 0, parity ^= 1;
                }
        }
        if (SPLIT) {
            __syncwarp();
            cluster_sync();
            cluster_sync();
        }
    } else {
        registers_up<232>();
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 - 4;
        const int warp_row = k0 + warp * 16;
        const uint32_t own = warp / 4 * (64 * 128);
        const float c = a.scale * LOG2_E;
        const bool tells = lane == 0; // for its warp

        float s[QUERIES / 2] = {}, dp[QUERIES / 2] = {}, dk[D / 2] = {}, dv[D / 2] = {};
        int stage = 0, parity = 0, last = -1;
        int head = first_head, tile = begin, left = (end - begin) * (last_head - first_head + 1);

        // A lane fetches lse and delta of two queries one tile ahead; its warp alone reads what it lays down.
        float *own_values = reinterpret_cast<float *>(shared + (values - shared_address(shared))) + warp * WARP_VALUES;
        float fetched[4];
        const auto fetch = [&] {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int row = tile * QUERIES + i * 32 + lane;
                const size_t at = size_t(head) * a.t + place.start + row;
                fetched[i] = row < place.len ? a.lse[at] : 0.0f;
                fetched[2 + i] = row < place.len ? a.delta[at] : 0.0f;
            }
        };
        const auto lay_down = [&](int half) {
            float *to = own_values + half * 2 * QUERIES + lane;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                to[i * 32] = fetched[i] * LOG2_E;
                to[QUERIES + i * 32] = fetched[2 + i];
            }
            __syncwarp();
        };
        fetch();
        lay_down(left % 2);
        barrier_wait(rows_full, 0);
        do { // at least once
            const uint32_t q_tile = q_tiles + stage * TILE, do_tile = do_tiles + stage * TILE;
            barrier_wait(full + 8 * stage, parity);
            pin(s);
            pin(dp);
            wgmma_fence();
            product_nt<D>(s, k_tile + own, q_tile);
            wgmma_commit();
            product_nt<D>(dp, v_tile + own, do_tile);
            wgmma_commit();

            const int query0 = tile * QUERIES;
            const float2 *shift = reinterpret_cast<const float2 *>(own_values) + left % 2 * QUERIES + lane % 4;
            const float2 *delta = shift + QUERIES / 2;
            if (++tile == end) tile = begin, ++head;
            if (left > 1) fetch();
            wgmma_wait<1>();
            pin(s);
            if (last >= 0 && tells) barrier_arrive(empty + 8 * last); // the last tile's product with q is done, too
#pragma unroll
            for (int n = 0; n < QUERIES / 8; ++n) {
                const float2 x = shift[4 * n];
                s[4 * n] = exp2_fast(fmaf(s[4 * n], c, -x.x));
                s[4 * n + 1] = exp2_fast(fmaf(s[4 * n + 1], c, -x.y));
                s[4 * n + 2] = exp2_fast(fmaf(s[4 * n + 2], c, -x.x));
                s[4 * n + 3] = exp2_fast(fmaf(s[4 * n + 3], c, -x.y));
            }
            mask_queries(s, query0, warp_row, a.window, place.len, 0.0f);
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
                // p as it was rounded: its f32 would take registers that there are not.
                const float2 p0 = unpack_bf16(p[n / 2][n % 2 * 2]), p8 = unpack_bf16(p[n / 2][n % 2 * 2 + 1]);
                dp[4 * n] = p0.x * (dp[4 * n] - x.x);
                dp[4 * n + 1] = p0.y * (dp[4 * n + 1] - x.y);
                dp[4 * n + 2] = p8.x * (dp[4 * n + 2] - x.x);
                dp[4 * n + 3] = p8.y * (dp[4 * n + 3] - x.y);
            }
            uint32_t ds[QUERIES / 16][4];
            pack(ds, dp);
            pin(dk);
            wgmma_fence();
            product_nn(dk, ds, q_tile);
            wgmma_commit();
            lay_down((left - 1) % 2);
            wgmma_wait<0>();
            last = stage;
            if (++stage == STAGES) stage = 0, parity ^= 1;
        } while (--left > 0);
        wgmma_wait<0>();
        pin(dk);
        pin(dv);
        if (SPLIT) {
            named_sync(1, 256); // the sums lie where both warpgroups' tiles were
            stage_sums<D>(tiles, dk, warp);
            stage_sums<D>(tiles + SUM_BYTES, dv, warp);
            cluster_sync();
            store_cluster_sums<D>(row0 + a.h * D, ld, place.len - k0, k_tile, a.scale);
            store_cluster_sums<D>(row0 + (a.h + a.g) * D, ld, place.len - k0, k_tile + SUM_BYTES, 1.0f);
            cluster_sync(); // a CTA must not be gone while others read from it
        } else {
            named_sync(1 + warp / 4, 128); // all of the warpgroup's products have read k and v
            store_rows<D>(row0 + a.h * D, ld, place.len - k0, tiles, dk, a.scale, a.scale, warp);
            store_rows<D>(row0 + (a.h + a.g) * D, ld, place.len - k0, tiles + tile_bytes(ROWS, D), dv, 1.0f, 1.0f,
                          warp);
        }
    }
#else
    __trap();
#endif
}

template <int D> cudaError_t maps_of(const AttentionBackward &a, Maps &maps) {
    const int columns = (a.h + 2 * a.g) * D;
    cudaError_t status = tensor_map(&maps.qkv_rows, a.qkv, a.t, columns, columns, ROWS);
    if (status == cudaSuccess) status = tensor_map(&maps.qkv_cols, a.qkv, a.t, columns, columns, COLS);
    if (status == cudaSuccess) status = tensor_map(&maps.do_rows, a.d_o, a.t, a.h * D, a.h * D, ROWS);
    if (status == cudaSuccess) status = tensor_map(&maps.do_cols, a.d_o, a.t, a.h * D, a.h * D, COLS);
    return status;
}

// CTAs that share a group of query heads out: as many as divide it, up to the 8 that any cluster may have.
int split_of(int group) {
    int ctas = group < 8 ? group : 8;
    while (group % ctas != 0) --ctas;
    return ctas;
}

template <int D> cudaError_t launch_dkv(const AttentionBackward &a, const Maps &maps, bool split, cudaStream_t stream) {
    const size_t units = size_t(attention_max_tiles(a.t, a.b, ROWS)) * a.g;
    const int ctas = split ? split_of(a.h / a.g) : 1;
    const auto kernel = ctas > 1 ? attention_dkv_sm90_kernel<D, true> : attention_dkv_sm90_kernel<D, false>;
    return launch(kernel, units * ctas, backward_shared(D), ctas, stream, maps, a);
}

template <int D> cudaError_t backward(const AttentionBackward &a, cudaStream_t stream) {
    const size_t tiles = attention_max_tiles(a.t, a.b, ROWS), rows = size_t(a.t) * a.h;
    Maps maps;
    cudaError_t status = maps_of<D>(a, maps);
    if (status == cudaSuccess)
        status = launch(attention_delta_sm90_kernel<D>, ceil_div<size_t>(rows * (D / 8), THREADS), 0, 1, stream, a);
    if (status == cudaSuccess) status = launch_dkv<D>(a, maps, tiles * a.g < SPLIT_BELOW, stream);
    if (status == cudaSuccess)
        status = launch(attention_dq_sm90_kernel<D>, tiles * a.h, backward_shared(D), 1, stream, maps, a);
    return status;
}

} // namespace

// attention_forward_sm90, attention_backward_sm90    as attention_forward and attention_backward of attention.cu, for
// d = 64 or 128 on a Hopper card. No atomics: the same bits in every run.
//
// Products: 4 T² H D / 2 operations forward, 3.5 times as many backward (scores and dp are computed for dq and again
// for dk, dv).
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
