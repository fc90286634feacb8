// Backward of attention for every card from sm_80 on, beside the forward in attention.cu.

#include "attention_tile.cuh"

namespace {

constexpr int FIXED_ROWS = 64; // rows of a CTA's own tile
constexpr int DELTA_THREADS = 256;

// delta[h,t] = sum_d(d_o * o). `lanes` neighbouring lanes a row, 8 elements each: the power of two that covers D.
__global__ void __launch_bounds__(DELTA_THREADS) attention_delta_kernel(const AttentionBackward a, int lanes) {
    const unsigned row = (blockIdx.x * DELTA_THREADS + threadIdx.x) / lanes; // token * H + head
    const int column = int(threadIdx.x % lanes) * 8;
    const bool exists = row < unsigned(a.t) * a.h;
    float sum = 0.0f;
    if (exists && column < a.d) {
        const Vec8<bf16> x = load_vec8(a.d_o + size_t(row) * a.d + column);
        const Vec8<bf16> y = load_vec8(a.o + size_t(row) * a.d + column);
#pragma unroll
        for (int j = 0; j < 8; ++j) sum = fmaf(to_f32(x.at[j]), to_f32(y.at[j]), sum);
    }
    for (int d = lanes / 2; d > 0; d /= 2) sum += __shfl_xor_sync(FULL_WARP, sum, d);
    if (exists && column == 0) a.delta[size_t(row % a.h) * a.t + row / a.h] = sum;
}

// dk, dv and dq are the same loop with the roles exchanged. A CTA holds 64 rows of two tensors (KV: k and v of one KV
// head; else q and d_o of one query head), 16 rows a warp, and runs through tiles of the other two (KV: q and d_o of each
// query head of the group; else k and v):
//
//   s = fixed0 stream0ᵀ    dp = fixed1 stream1ᵀ    ds = p * (dp - delta)    sum0 += ds stream0    KV: sum1 += p stream1
//
// sum0 is dk or dq, sum1 is dv. Where registers allow, the fixed rows stay in them. With SPLIT = 2 a second set of four
// warps takes half of the columns of the sums and computes s and dp again.
template <int D, bool KV> struct Backward {
    static constexpr int STREAM_ROWS = D == 64 ? 64 : D == 128 ? 32 : 16;
    static constexpr int SPLIT = KV && D == 256 ? 2 : 1;
    static constexpr int THREADS = 128 * SPLIT;
    static constexpr bool FIXED0_IN_REGISTERS = D == 64 || (D == 128 && !KV);
    static constexpr bool FIXED1_IN_REGISTERS = D <= 128;
    static constexpr int FIXED_BYTES = FIXED_ROWS * D * 2;
    static constexpr int STREAM_BYTES = STREAM_ROWS * D * 2;
    static constexpr int STAGE_BYTES = 2 * STREAM_BYTES + (KV ? 2 * STREAM_ROWS * 4 : 0);
    static constexpr int SHARED = (FIXED1_IN_REGISTERS ? 1 : 2) * FIXED_BYTES + 2 * STAGE_BYTES;
    static constexpr int MIN_CTAS = D == 256 ? 1 : 2;
    static_assert(SHARED <= MAX_SHARED_BYTES, "one CTA on a consumer card");
    static_assert(STAGE_BYTES % 128 == 0, "tiles start at multiples of 128 bytes");
};

// One operand a of the fixed rows: the 16 x 16 block `c`, from registers or from shared memory.
template <int D, bool IN_REGISTERS> struct FixedRows {
    uint32_t at;
    uint32_t blocks[IN_REGISTERS ? D / 16 : 1][4];

    __device__ __forceinline__ void init(uint32_t lane_address) {
        at = lane_address;
        if (IN_REGISTERS) {
#pragma unroll
            for (int c = 0; c < D / 16; ++c) ldmatrix_x4(blocks[IN_REGISTERS ? c : 0], block_address<FIXED_ROWS>(at, 0, c));
        }
    }
    __device__ __forceinline__ const uint32_t (&block(int c))[4] {
        if (IN_REGISTERS) return blocks[c];
        ldmatrix_x4(blocks[0], block_address<FIXED_ROWS>(at, 0, c));
        return blocks[0];
    }
};

// s (16 x ROWS) = fixed stream ᵀ
template <int D, int ROWS, bool IN_REGISTERS>
__device__ __forceinline__ void scores(float (&s)[ROWS / 8][4], FixedRows<D, IN_REGISTERS> &fixed, uint32_t stream) {
#pragma unroll
    for (int j = 0; j < ROWS / 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) s[j][e] = 0.0f;
#pragma unroll (IN_REGISTERS ? D / 16 : 4)
    for (int c = 0; c < D / 16; ++c) {
        const uint32_t(&fa)[4] = fixed.block(c);
#pragma unroll
        for (int n = 0; n < ROWS / 16; ++n) {
            uint32_t sb[4];
            ldmatrix_x4(sb, block_address<ROWS>(stream, 16 * n, c));
            mma_bf16(s[2 * n], fa, sb[0], sb[1]);
            mma_bf16(s[2 * n + 1], fa, sb[2], sb[3]);
        }
    }
}

// sum (16 x COLUMNS) += p (16 x ROWS) times the columns of `stream` from 16 * first16 on.
template <int ROWS, int COLUMNS>
__device__ __forceinline__ void accumulate(float (&sum)[COLUMNS / 8][4], const uint32_t (&p)[ROWS / 16][4],
                                           uint32_t stream, int first16) {
#pragma unroll
    for (int c = 0; c < ROWS / 16; ++c)
#pragma unroll
        for (int n = 0; n < COLUMNS / 16; ++n) {
            uint32_t sb[4];
            ldmatrix_x4_trans(sb, block_address<ROWS>(stream, 16 * c, first16 + n));
            mma_bf16(sum[2 * n], p[c], sb[0], sb[1]);
            mma_bf16(sum[2 * n + 1], p[c], sb[2], sb[3]);
        }
}

template <int D, bool KV>
__global__ void __launch_bounds__(Backward<D, KV>::THREADS, Backward<D, KV>::MIN_CTAS)
attention_backward_kernel(const AttentionBackward a, int max_tiles) {
    using Shape = Backward<D, KV>;
    constexpr int ROWS = Shape::STREAM_ROWS, THREADS = Shape::THREADS, COLUMNS = D / Shape::SPLIT;
    extern __shared__ __align__(1024) uint8_t shared[];

    // What sees most starts first: early keys, late queries.
    const int heads = KV ? a.g : a.h, head = int(blockIdx.x) % heads, order = int(blockIdx.x) / heads;
    const SequenceTile at = find_tile<FIXED_ROWS>(a.cu_seqlens, a.b, KV ? order : max_tiles - 1 - order);
    if (at.len == 0) return;
    const int warp = __shfl_sync(FULL_WARP, int(threadIdx.x) / 32, 0), lane = threadIdx.x % 32;
    const int g = lane / 4, i = lane % 4;
    const int fixed_row = at.tile * FIXED_ROWS, warp_row = fixed_row + warp % 4 * 16;

    const int group = a.h / a.g, kv_head = KV ? head : head / group, q_head = KV ? head * group : head;
    const int width = (a.h + 2 * a.g) * a.d, o_width = a.h * a.d;
    // Rows of one head from `row` of the sequence on: query head, KV head.
    const auto q_rows = [&](int n, int row) { return a.qkv + int64_t(at.start + row) * width + n * a.d; };
    const auto k_rows = [&](int n, int row) { return q_rows(a.h + n, row); };
    const auto v_rows = [&](int n, int row) { return q_rows(a.h + a.g + n, row); };
    const auto d_o_rows = [&](int n, int row) { return a.d_o + int64_t(at.start + row) * o_width + n * a.d; };

    const uint32_t fixed0_tile = shared_address(shared);
    const uint32_t stages = fixed0_tile + (Shape::SHARED - 2 * Shape::STAGE_BYTES);
    // A fixed1 that goes to registers passes through the stages.
    const uint32_t fixed1_tile = Shape::FIXED1_IN_REGISTERS ? stages : fixed0_tile + Shape::FIXED_BYTES;
    static_assert(!Shape::FIXED1_IN_REGISTERS || 2 * Shape::STAGE_BYTES >= Shape::FIXED_BYTES, "room for fixed1");

    load_tile<FIXED_ROWS, D, THREADS>(fixed0_tile, KV ? k_rows(kv_head, fixed_row) : q_rows(q_head, fixed_row), width,
                                      at.len - fixed_row, a.d);
    load_tile<FIXED_ROWS, D, THREADS>(fixed1_tile, KV ? v_rows(kv_head, fixed_row) : d_o_rows(q_head, fixed_row),
                                      KV ? width : o_width, at.len - fixed_row, a.d);
    cp_async_commit();
    float row_lse[2] = {}, row_delta[2] = {}; // of rows g and g + 8, where rows are queries
    if (!KV) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row = warp_row + g + 8 * r;
            if (row >= at.len) continue;
            const int stat = q_head * a.t + at.start + row;
            row_lse[r] = a.lse[stat] * LOG2E, row_delta[r] = a.delta[stat];
        }
    }
    cp_async_wait<0>();
    __syncthreads();
    FixedRows<D, Shape::FIXED0_IN_REGISTERS> fixed0;
    FixedRows<D, Shape::FIXED1_IN_REGISTERS> fixed1;
    const uint32_t fixed_lane = warp % 4 * 16 * 128 + lane_offset_a(lane);
    fixed0.init(fixed0_tile + fixed_lane);
    fixed1.init(fixed1_tile + fixed_lane);
    __syncthreads();

    // Tiles of the stream that any fixed row sees or is seen by.
    const int first = KV ? fixed_row / ROWS : max(fixed_row - a.window + 1, 0) / ROWS;
    const int last = (min(KV ? fixed_row + FIXED_ROWS - 1 + a.window : fixed_row + FIXED_ROWS, at.len) - 1) / ROWS;
    auto load_stage = [&](int stage, int tile, int member) {
        const uint32_t to = stages + stage;
        const int row = tile * ROWS, rows = at.len - row;
        const int n = q_head + member;
        load_tile<ROWS, D, THREADS>(to, KV ? q_rows(n, row) : k_rows(kv_head, row), width, rows, a.d);
        load_tile<ROWS, D, THREADS>(to + Shape::STREAM_BYTES, KV ? d_o_rows(n, row) : v_rows(kv_head, row),
                                    KV ? o_width : width, rows, a.d);
        if (KV && threadIdx.x < 2 * ROWS) {
            const int col = threadIdx.x % ROWS, stat = n * a.t + at.start + row + col;
            cp_async4(to + 2 * Shape::STREAM_BYTES + threadIdx.x * 4,
                      (int(threadIdx.x) < ROWS ? a.lse : a.delta) + stat, col < rows);
        }
        cp_async_commit();
    };

    const float factor = a.scale * LOG2E;
    float sum0[COLUMNS / 8][4] = {};
    float sum1[KV ? COLUMNS / 8 : 1][4] = {};
    const int first16 = Shape::SPLIT == 1 ? 0 : warp / 4 * (COLUMNS / 16);
    load_stage(0, first, 0);
    int stage = 0, next = first, member = 0; // what is loaded next: a tile, a query head of the group
    for (int tile = first; tile >= 0; tile = next) {
        cp_async_wait<0>();
        __syncthreads(); // this stage is there, and all are done with the other
        next = tile + 1;
        if (next > last) next = ++member < (KV ? group : 1) ? first : -1;
        if (next >= 0) load_stage(Shape::STAGE_BYTES - stage, next, member);

        const uint32_t stream0 = stages + stage, stream1 = stream0 + Shape::STREAM_BYTES;
        const float *stats =
            reinterpret_cast<const float *>(shared + (stream1 - fixed0_tile + Shape::STREAM_BYTES));
        stage = Shape::STAGE_BYTES - stage;
        const int col0 = tile * ROWS, row0 = in_loop(warp_row);
        // Rows of this warp and columns of the tile, as the first and the last query and key.
        const int q_first = KV ? col0 : row0, q_last = q_first + (KV ? ROWS : 16) - 1;
        const int kv_first = KV ? row0 : col0, kv_last = kv_first + (KV ? 16 : ROWS) - 1;
        if (row0 >= at.len || kv_first > q_last || kv_last <= q_first - a.window) continue;

        float s[ROWS / 8][4], dp[ROWS / 8][4];
        scores<D, ROWS>(s, fixed0, stream0 + lane_offset_b(lane));
        scores<D, ROWS>(dp, fixed1, stream1 + lane_offset_b(lane));
        uint32_t p[ROWS / 16][4], ds[ROWS / 16][4];
        const bool edge = kv_last > q_first || kv_first <= q_last - a.window;
#pragma unroll
        for (int j = 0; j < ROWS / 8; ++j) {
            float col_lse[2] = {}, col_delta[2] = {};
            if (KV) {
                const float2 l = *reinterpret_cast<const float2 *>(stats + 8 * j + 2 * i);
                const float2 x = *reinterpret_cast<const float2 *>(stats + ROWS + 8 * j + 2 * i);
                col_lse[0] = l.x * LOG2E, col_lse[1] = l.y * LOG2E, col_delta[0] = x.x, col_delta[1] = x.y;
            }
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                float prob = exp2_approx(fmaf(s[j][e], factor, -(KV ? col_lse[e % 2] : row_lse[e / 2])));
                if (edge) {
                    const int row = row0 + g + e / 2 * 8, col = col0 + 8 * j + 2 * i + e % 2;
                    if (!sees(KV ? col : row, KV ? row : col, a.window)) prob = 0.0f;
                }
                s[j][e] = prob;
                dp[j][e] = prob * (dp[j][e] - (KV ? col_delta[e % 2] : row_delta[e / 2]));
            }
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                if (KV) p[j / 2][j % 2 * 2 + r] = pack_bf16(s[j][2 * r], s[j][2 * r + 1]);
                ds[j / 2][j % 2 * 2 + r] = pack_bf16(dp[j][2 * r], dp[j][2 * r + 1]);
            }
        }
        if constexpr (KV) accumulate<ROWS, COLUMNS>(sum1, p, stream1 + lane_offset_a(lane), first16);
        accumulate<ROWS, COLUMNS>(sum0, ds, stream0 + lane_offset_a(lane), first16);
    }

    __syncthreads(); // all are done with fixed0: its tile takes the results on their way out
    const int end_head = in_loop(int(blockIdx.x)) % heads;
    bf16 *to = a.dqkv + int64_t(at.start + warp_row) * width + 16 * first16;
    const int row = warp % 4 * 16, rows = at.len - warp_row, columns = a.d - 16 * first16;
    store_block<FIXED_ROWS, COLUMNS>(shared, row, 2 * first16, sum0, a.scale, a.scale,
                                     to + (KV ? a.h + end_head : end_head) * a.d, width, rows, columns);
    if constexpr (KV)
        store_block<FIXED_ROWS, COLUMNS>(shared, row, 2 * first16, sum1, 1.0f, 1.0f, to + (a.h + a.g + end_head) * a.d,
                                         width, rows, columns);
}

template <int D, bool KV> cudaError_t launch_backward(const AttentionBackward &a, cudaStream_t stream) {
    using Shape = Backward<D, KV>;
    const auto kernel = attention_backward_kernel<D, KV>;
    const cudaError_t status = allow_shared(reinterpret_cast<const void *>(kernel), Shape::SHARED);
    if (status != cudaSuccess) return status;
    const int tiles = attention_max_tiles(a.t, a.b, FIXED_ROWS);
    kernel<<<unsigned(tiles) * (KV ? a.g : a.h), Shape::THREADS, Shape::SHARED, stream>>>(a, tiles);
    return cudaGetLastError();
}

cudaError_t launch_delta(const AttentionBackward &a, cudaStream_t stream) {
    int lanes = 2;
    while (lanes * 8 < a.d) lanes *= 2;
    const unsigned rows = unsigned(a.t) * a.h;
    attention_delta_kernel<<<ceil_div(rows, unsigned(DELTA_THREADS / lanes)), DELTA_THREADS, 0, stream>>>(a, lanes);
    return cudaGetLastError();
}

template <int D> cudaError_t launch_backwards(const AttentionBackward &a, cudaStream_t stream) {
    const cudaError_t status = launch_backward<D, true>(a, stream);
    return status == cudaSuccess ? launch_backward<D, false>(a, stream) : status;
}

} // namespace

// attention_backward    delta, dqkv: see attention.cuh. Delta first, then dk and dv by a CTA for each tile of keys of a KV
// head, and dq by one for each tile of queries of a head: no atomics. Floor: 10 * D * (pairs) * H flops; it spends 14, as
// both kernels compute s and dp.
HALFBYTE_API cudaError_t attention_backward(const AttentionBackward *args, cudaStream_t stream) {
    const AttentionBackward &a = *args;
    if (a.t == 0) return cudaSuccess;
    if (!fits(a)) return cudaErrorInvalidValue;
    if (!is_aligned(a.dqkv, 16) || !is_aligned(a.qkv, 16) || !is_aligned(a.d_o, 16) || !is_aligned(a.o, 16))
        return cudaErrorMisalignedAddress;
    const cudaError_t status = launch_delta(a, stream);
    if (status != cudaSuccess) return status;
    if (a.d <= 64) return launch_backwards<64>(a, stream);
    return a.d <= 128 ? launch_backwards<128>(a, stream) : launch_backwards<256>(a, stream);
}
