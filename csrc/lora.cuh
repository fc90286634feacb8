// The pieces of lora.cu: projections that share an input, tiles in shared memory, and the sweep over a tall matrix.
#pragma once

#include "mma.cuh"
#include "philox.cuh"

constexpr int LORA_MAX_PARTS = 3;
constexpr int LORA_MAX_RANK = 256; // of a part
constexpr int LORA_THREADS = 256;

// One projection. A (r, K) and B (n, r) lie at `a` and `b` of the flat vector, at any element.
struct LoraPart {
    uint64_t a, b;
    int32_t r;
    float scale;
    uint32_t site;
    int32_t y; // first column in y and dy
    int32_t n;
    int32_t h; // first column in h and dh
};
static_assert(sizeof(LoraPart) == 40, "as in src/backend/cuda/ffi/lora.rs");

// Projections that read the same x.
struct LoraGroup {
    LoraPart parts[LORA_MAX_PARTS];
    const bf16 *lora; // (P)
    int32_t count;    // of parts, 1..=3
    int32_t r;        // columns of h and dh
};
static_assert(sizeof(LoraGroup) == 136, "as in src/backend/cuda/ffi/lora.rs");

namespace lora {

// The part whose columns of h hold column j; the parts lie side by side.
__host__ __device__ __forceinline__ int part_of(const LoraGroup &g, int j) {
    int p = 0;
    for (int q = 1; q < LORA_MAX_PARTS; ++q)
        if (q < g.count && j >= g.parts[q].h) p = q;
    return p;
}

// Byte offset of 16-byte chunk `chunk` in row `row` of a tile with CHUNKS chunks a row: any eight neighbouring rows of
// one column lie in eight different bank groups.
template <int CHUNKS> __device__ __forceinline__ uint32_t tile_offset(int row, int chunk) {
    static_assert(CHUNKS == 2 || CHUNKS == 4 || CHUNKS == 8 || CHUNKS == 16, "a power of two");
    const int phase = CHUNKS >= 8 ? row & 7 : (row / (8 / CHUNKS)) & (CHUNKS - 1);
    return uint32_t(row * (CHUNKS * 16) + ((chunk ^ phase) << 4));
}

// Eight elements to shared memory, those from `valid` on as zeros. Asynchronous where all are there and `aligned`.
__device__ __forceinline__ void load8(char *to, const bf16 *from, int valid, bool aligned) {
    if (aligned && valid >= 8) {
        cp_async16(shared_address(to), from, true);
        return;
    }
#pragma unroll 1 // little code: it stands wherever tiles are loaded
    for (int e = 0; e < 8; ++e) reinterpret_cast<bf16 *>(to)[e] = e < valid ? from[e] : __float2bfloat16_rn(0.0f);
}

inline int clamp(int x, int low, int high) { return x < low ? low : x > high ? high : x; }

constexpr int CTAS = 256; // about as many as a sweep is split into: two on each SM of a large card

constexpr int TILE_T = 64;  // rows of a tile of the tall matrix
constexpr int TILE_W = 128; // its columns

// Columns of the tall matrix, and the ranks (columns of h) that they meet.
struct Strip {
    int32_t col, width;   // first column, number of columns
    int32_t first, count; // first rank, number of ranks: at most RT
    int32_t chunks;       // CTAs along the columns
    int32_t pad;
    uint64_t rows_at, cols_at; // where the partial sums lie in the scratch
};
constexpr int MAX_STRIPS = LORA_MAX_PARTS * (LORA_MAX_RANK / 64);

// The tall matrix S (T, W), x or dy, read once, tile by tile. M is A (by ranks) or B (by columns).
//   ROWS:  rows(t, j) = sum_w S[t,w] M[w,j]   over the columns of a CTA: one partial sum for each chunk of columns
//   COLS:  cols(w, j) = sum_t S[t,w] H[t,j]   over the rows of a CTA: one partial sum for each chunk of rows
struct Sweep {
    LoraGroup group;
    LoraDropout dropout; // of S, by the site of the strip's part; a strip then holds one part
    Strip strips[MAX_STRIPS];
    const bf16 *s;
    const bf16 *h; // (T, R)
    float *partial;
    uint64_t ld; // of S
    int32_t t;
    int32_t chunk_w, chunk_t; // columns and rows of a CTA: multiples of TILE_W and TILE_T
    bool s_aligned, m_aligned, h_aligned;
    bool rank_major; // cols as (j, w), as A lies; else (w, j), as B lies
};

template <bool ROWS, bool COLS, int RT> struct SweepShared {
    static constexpr int STAGES = ROWS ? 3 : 4;
    static constexpr int S = TILE_T * TILE_W * 2;
    static constexpr int M = ROWS ? RT * TILE_W * 2 : 0;
    static constexpr int H = COLS ? TILE_T * RT * 2 : 0;
    static constexpr int STAGE = S + M + H;
    static constexpr int SUM = TILE_T * RT * 4; // ROWS alone flushes once, into a stage that nobody needs then
    static constexpr int BYTES = STAGES * STAGE + (ROWS && COLS ? SUM : 0);
    static_assert(BYTES <= int(MAX_SHARED_BYTES), "must run on consumer cards");
    static_assert(!ROWS || SUM <= STAGE || COLS, "the sum fits a stage");
};

// grid (strips, chunks of columns, chunks of rows): the strips of one tile run side by side and share it in L2.
// ROWS alone: one tile of rows, any number of columns. COLS: at most NW tiles of columns, any number of rows.
template <bool ROWS, bool COLS, bool M_IS_B, int RT, int NW>
__global__ void __launch_bounds__(LORA_THREADS, ROWS && COLS && RT == 32 ? 1 : 2) sweep_kernel(const __grid_constant__ Sweep a) {
    using Shared = SweepShared<ROWS, COLS, RT>;
    constexpr int STAGES = Shared::STAGES;
    constexpr int RC = RT / 8; // chunks of a row of ranks
    extern __shared__ __align__(128) char shared[];

    const Strip &strip = a.strips[blockIdx.x];
    if (int(blockIdx.y) >= strip.chunks) return;
    const LoraGroup &group = a.group;
    const int count = strip.count, live = ceil_div(count, 16), width = strip.width;
    const LoraPart &part = group.parts[part_of(group, strip.first)];

    const int w_first = blockIdx.y * a.chunk_w, w_end = min(w_first + a.chunk_w, width);
    const int t_first = blockIdx.z * a.chunk_t, t_end = min(t_first + a.chunk_t, a.t);
    const int w_tiles = ceil_div(w_end - w_first, TILE_W), t_tiles = ceil_div(t_end - t_first, TILE_T);
    const int steps = w_tiles * t_tiles;

    const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
    const int g = lane / 4, i = lane % 4;

    // Tiles are loaded in the order in which they are used: these are the first row and column of the next.
    int next_t = t_first, next_w = w_first;
    const bf16 *own = a.s + size_t(tid / 16) * a.ld + (strip.col + tid % 16 * 8);
    const auto load = [&](int step) {
        char *to = shared + step % STAGES * Shared::STAGE;
        const int t0 = next_t, w0 = next_w;
        next_w += TILE_W;
        if (next_w >= w_end) {
            next_w = w_first;
            next_t += TILE_T;
        }
        const bf16 *from = own + size_t(t0) * a.ld + w0;
        const uint32_t at = tile_offset<16>(tid / 16, tid % 16);
        if (a.s_aligned && t0 + TILE_T <= a.t && w0 + TILE_W <= width) {
#pragma unroll
            for (int n = 0; n < TILE_T / 16; ++n)
                cp_async16(shared_address(to + at + n * 16 * TILE_W * 2), from + n * 16 * a.ld, true);
        } else {
#pragma unroll 1
            for (int n = 0; n < TILE_T / 16; ++n) {
                const int valid = t0 + tid / 16 + n * 16 < a.t ? width - (w0 + tid % 16 * 8) : 0;
                load8(to + at + n * 16 * TILE_W * 2, from + n * 16 * a.ld, valid, a.s_aligned);
            }
        }
        to += Shared::S;
        if constexpr (ROWS && !M_IS_B) { // (rank, column)
            for (int n = 0; n < live; ++n) {
                const int row = tid / 16 + n * 16, chunk = tid % 16, j = strip.first + row;
                const LoraPart &of = group.parts[part_of(group, j)];
                const int valid = row < count ? width - (w0 + 8 * chunk) : 0;
                const bf16 *rank = group.lora + of.a + size_t(row < count ? j - of.h : 0) * a.ld;
                load8(to + tile_offset<16>(row, chunk), rank + (w0 + 8 * chunk), valid, a.m_aligned);
            }
        }
        if constexpr (ROWS && M_IS_B) { // (column, rank)
#pragma unroll
            for (int n = 0; n < TILE_W * RC / LORA_THREADS; ++n) {
                const int row = (tid + n * LORA_THREADS) / RC, chunk = tid % RC;
                const int valid = w0 + row < width ? count - 8 * chunk : 0;
                const bf16 *rank = group.lora + part.b + size_t(w0 + row) * part.r + (strip.first - part.h + 8 * chunk);
                if (chunk < live * 2) load8(to + tile_offset<RC>(row, chunk), rank, valid, a.m_aligned);
            }
        }
        to += Shared::M;
        if constexpr (COLS) { // (row, rank)
#pragma unroll
            for (int n = 0; n < ceil_div(TILE_T * RC, LORA_THREADS); ++n) {
                const int row = (tid + n * LORA_THREADS) / RC, chunk = tid % RC;
                const int valid = t0 + row < a.t ? count - 8 * chunk : 0;
                const bf16 *rank = a.h + size_t(t0 + row) * group.r + (strip.first + 8 * chunk);
                if (row < TILE_T && chunk < live * 2)
                    load8(to + tile_offset<RC>(row, chunk), rank, valid, a.h_aligned);
            }
        }
    };

    // The warp's 16 rows and 64 of 128 columns of each tile for ROWS, its 16 columns and all rows for COLS.
    const int row16 = (warp % 4) * 16, half = warp / 4;
    float rows[ROWS ? RT / 8 : 1][4] = {};
    float cols[COLS ? NW : 1][RT / 8][4] = {};

    const auto compute_rows = [&](uint32_t s, uint32_t m) {
#pragma unroll
        for (int kk = 0; kk < 4; ++kk) {
            const int chunk = half * 8 + kk * 2;
            uint32_t av[4];
            ldmatrix_x4(av, s + tile_offset<16>(row16 + lane % 16, chunk + lane / 16));
#pragma unroll
            for (int n = 0; n < RT / 16; ++n) {
                if (n < live) {
                    uint32_t bv[4];
                    if constexpr (M_IS_B)
                        ldmatrix_x4_trans(bv, m + tile_offset<RC>(chunk * 8 + lane % 16, n * 2 + lane / 16));
                    else
                        ldmatrix_x4(bv, m + tile_offset<16>(n * 16 + lane % 8 + lane / 16 * 8, chunk + lane / 8 % 2));
                    mma_bf16(rows[2 * n], av, bv[0], bv[1]);
                    mma_bf16(rows[2 * n + 1], av, bv[2], bv[3]);
                }
            }
        }
    };
    const auto compute_cols = [&](float (&sum)[RT / 8][4], uint32_t s, uint32_t h) {
#pragma unroll
        for (int kk = 0; kk < TILE_T / 16; ++kk) {
            uint32_t av[4];
            ldmatrix_x4_trans(av, s + tile_offset<16>(kk * 16 + lane % 8 + lane / 16 * 8, warp * 2 + lane / 8 % 2));
#pragma unroll
            for (int n = 0; n < RT / 16; ++n) {
                if (n < live) {
                    uint32_t bv[4];
                    ldmatrix_x4_trans(bv, h + tile_offset<RC>(kk * 16 + lane % 16, n * 2 + lane / 16));
                    mma_bf16(sum[2 * n], av, bv[0], bv[1]);
                    mma_bf16(sum[2 * n + 1], av, bv[2], bv[3]);
                }
            }
        }
    };

    // Waits for a step's tiles, begins to load those of a later one, drops out.
    const auto arrive = [&](int step) {
        cp_async_wait<STAGES - 2>();
        __syncthreads(); // the tiles are there for all, and all are done with the step before, whose stage is next
        if (step + STAGES - 1 < steps) load(step + STAGES - 1);
        cp_async_commit();
        if constexpr (!(ROWS && COLS)) {
            if (a.dropout.step != nullptr) {
                char *tile = shared + step % STAGES * Shared::STAGE;
                const int t0 = t_first + step / w_tiles * TILE_T, w0 = w_first + step % w_tiles * TILE_W;
                const uint32_t number = __ldg(a.dropout.step);
                for (int n = tid; n < TILE_T * TILE_W / 8; n += LORA_THREADS) {
                    const int row = n / 16, chunk = n % 16;
                    const uint64_t index = uint64_t(t0 + row) * a.ld + uint64_t(w0 + 8 * chunk);
                    const uint32_t keep = dropout_keep8(a.dropout, number, part.site, index, a.ld % 4 == 0);
                    uint4 *at = reinterpret_cast<uint4 *>(tile + tile_offset<16>(row, chunk));
                    *at = dropout_zero(*at, keep);
                }
                __syncthreads();
            }
        }
    };

    // rows of one tile: the two halves of the columns added up, then to the scratch.
    const auto flush_rows = [&](int t0) {
        float *sum = reinterpret_cast<float *>(shared + (COLS ? STAGES * Shared::STAGE : 0));
        if constexpr (!COLS) __syncthreads(); // the stage it lies in has been read by all
        if (half == 1) {
#pragma unroll
            for (int n = 0; n < RT / 8; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) sum[(n * 4 + e) * 128 + (warp % 4) * 32 + lane] = rows[n][e];
        }
        __syncthreads();
        if (half == 0) {
            float *to = a.partial + strip.rows_at + (size_t(blockIdx.y) * a.t) * count;
#pragma unroll
            for (int n = 0; n < RT / 8; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const int t = t0 + row16 + g + e / 2 * 8, j = n * 8 + 2 * i + e % 2;
                    const float total = rows[n][e] + sum[(n * 4 + e) * 128 + warp * 32 + lane];
                    if (t < a.t && j < count) to[size_t(t) * count + j] = total;
                }
        }
#pragma unroll
        for (int n = 0; n < RT / 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) rows[n][e] = 0.0f;
    };

#pragma unroll
    for (int s = 0; s < STAGES - 1; ++s) {
        if (s < steps) load(s);
        cp_async_commit();
    }
    const uint32_t base = shared_address(shared);
    int step = 0;
    for (int tile = 0; tile < t_tiles; ++tile) {
        if constexpr (COLS) {
#pragma unroll
            for (int w = 0; w < NW; ++w) {
                if (w < w_tiles) {
                    arrive(step);
                    const uint32_t stage = base + step % STAGES * Shared::STAGE;
                    if constexpr (ROWS) compute_rows(stage, stage + Shared::S);
                    compute_cols(cols[w], stage, stage + Shared::S + Shared::M);
                    ++step;
                }
            }
        } else {
            for (int w = 0; w < w_tiles; ++w, ++step) {
                arrive(step);
                const uint32_t stage = base + step % STAGES * Shared::STAGE;
                compute_rows(stage, stage + Shared::S);
            }
        }
        if constexpr (ROWS) flush_rows(t_first + tile * TILE_T);
    }

    if constexpr (COLS) {
        float *to = a.partial + strip.cols_at + size_t(blockIdx.z) * width * count;
        const size_t by_w = a.rank_major ? 1 : count, by_j = a.rank_major ? width : 1;
#pragma unroll
        for (int w = 0; w < NW; ++w)
#pragma unroll
            for (int n = 0; n < RT / 8; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const int at = w_first + w * TILE_W + warp * 16 + g + e / 2 * 8, j = n * 8 + 2 * i + e % 2;
                    if (w < w_tiles && at < width && j < count) to[at * by_w + j * by_j] = cols[w][n][e];
                }
    }
}

} // namespace lora
