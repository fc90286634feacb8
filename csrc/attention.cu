// Attention for every card from sm_80 on: mma.sync, cp.async, at most 99 KiB of shared memory. Formulas, shapes and
// guarantees are in attention.cuh; attention_sm90.cu has the same ops for Hopper.
//
// Scores and probabilities never leave the registers: the accumulator of q kᵀ has, packed to bf16, the layout of the next
// product's first operand. Head sizes are padded with zeros to 64, 128 or 256 in shared memory.

#include "attention.cuh"
#include "mma.cuh"

namespace {

constexpr float LOG2E = 1.4426950408889634f;
constexpr float LN2 = 0.6931471805599453f;
constexpr int FORWARD_KEYS = 64; // keys of a tile of the forward
constexpr int FIXED_ROWS = 64;   // rows of a CTA's own tile in the backward
constexpr int DELTA_THREADS = 256;

// -inf gives 0; results below 2^-126 become 0.
__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// As cp_async16, of one f32.
__device__ __forceinline__ void cp_async4(uint32_t to_shared, const float *from, bool valid) {
    const int bytes = valid ? 4 : 0;
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n" ::"r"(to_shared), "l"(from), "r"(bytes) : "memory");
}

// A tile of ROWS rows in shared memory lies as panels of 64 columns, each swizzled; a chunk is 8 columns, 16 bytes.
template <int ROWS> __device__ __forceinline__ uint32_t tile_offset(int row, int chunk) {
    return uint32_t(chunk / 8 * ROWS * 128) + swizzle128(row, chunk % 8);
}

// Where a lane points ldmatrix in the 16x16 block at the top left of a tile, for an operand a or a transposed b (matrices
// 0 and 1 are the upper and lower left), and for a plain b (0 and 1 are the upper left and right).
__device__ __forceinline__ uint32_t lane_offset_a(int lane) { return swizzle128(lane % 16, lane / 16); }
__device__ __forceinline__ uint32_t lane_offset_b(int lane) { return swizzle128(lane / 16 * 8 + lane % 8, lane / 8 % 2); }

// The same for the block at (row, 16 * k16), row a multiple of 16; `at` = address of the tile + offset of the lane. Tiles
// start at multiples of 128 bytes, so that the swizzled chunk number is bits 4 to 6.
template <int ROWS> __device__ __forceinline__ uint32_t block_address(uint32_t at, int row, int k16) {
    return (at ^ uint32_t(k16 % 4 << 5)) + uint32_t(k16 / 4 * ROWS * 128 + row * 128);
}

// Keeps the compiler from computing before a loop what follows from x in it: that costs more registers than it saves time.
template <typename T> __device__ __forceinline__ T in_loop(T x) {
    asm volatile("" : "+r"(x));
    return x;
}

// Starts copying ROWS rows of d <= D elements, `stride` apart; zeros from row `rows` and column d on.
template <int ROWS, int D, int THREADS>
__device__ __forceinline__ void load_tile(uint32_t tile, const bf16 *from, int stride, int rows, int d) {
    constexpr int CHUNKS = D / 8, STEP = THREADS / CHUNKS; // rows of a pass
    static_assert(ROWS % STEP == 0, "whole passes");
    const int thread = in_loop(int(threadIdx.x)), row = thread / CHUNKS, chunk = thread % CHUNKS;
    from += row * stride + chunk * 8;
    rows = chunk * 8 < d ? rows - row : 0;
#pragma unroll
    for (int i = 0; i < ROWS; i += STEP, from += STEP * stride)
        cp_async16(tile + tile_offset<ROWS>(row + i, chunk), from, i < rows);
}

// Writes the warp's 16 x COLUMNS block of accumulators as bf16, its upper 8 rows times `upper`, the others times `lower`.
// It passes through the block at (row, chunk) of a tile that no other warp touches any more, for 16-byte stores. `rows`
// and `columns` of the block exist at `to`.
template <int ROWS, int COLUMNS>
__device__ __forceinline__ void store_block(uint8_t *tile, int row, int chunk, const float (&block)[COLUMNS / 8][4],
                                            float upper, float lower, bf16 *to, int stride, int rows, int columns) {
    const int lane = threadIdx.x % 32, g = lane / 4, i = lane % 4;
    __syncwarp();
#pragma unroll
    for (int j = 0; j < COLUMNS / 8; ++j) {
        uint8_t *at = tile + tile_offset<ROWS>(row + g, chunk + j) + 4 * i;
        *reinterpret_cast<uint32_t *>(at) = pack_bf16(block[j][0] * upper, block[j][1] * upper);
        *reinterpret_cast<uint32_t *>(at + 8 * 128) = pack_bf16(block[j][2] * lower, block[j][3] * lower);
    }
    __syncwarp();
#pragma unroll
    for (int n = lane; n < 16 * COLUMNS / 8; n += 32) {
        const int r = n / (COLUMNS / 8), c = n % (COLUMNS / 8);
        const uint4 v = *reinterpret_cast<const uint4 *>(tile + tile_offset<ROWS>(row + r, chunk + c));
        if (r < rows && c * 8 < columns) *reinterpret_cast<uint4 *>(to + int64_t(r) * stride + c * 8) = v;
    }
}

// Whether query q sees key kv; both count from the start of the sequence.
__device__ __forceinline__ bool sees(int q, int kv, int window) { return kv <= q && kv > q - window; }

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

// Grids must fit the kernels' 32-bit tile numbers.
template <typename Args> bool fits(const Args &a) {
    return a.h > 0 && a.g > 0 && a.h % a.g == 0 && a.b > 0 && a.window > 0 && a.d % 8 == 0 && a.d >= 16 && a.d <= 256 &&
           int64_t(a.t + 64 * int64_t(a.b)) * a.h <= INT32_MAX;
}

cudaError_t allow_shared(const void *kernel, int bytes) {
    return bytes <= 48 * 1024 ? cudaSuccess
                              : cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
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
