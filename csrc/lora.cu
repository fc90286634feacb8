// LoRA's skinny products. x, dy (T, thousands) are read once, the ranks are few: all of it is bound by memory.
//
// The tall matrix goes through the tensor cores tile by tile (lora.cuh: sweep). Sums that several CTAs share are written
// to the scratch as f32 partial sums and added up in a fixed order by a second kernel. How the work is split follows from
// the shapes alone: the same bits in every run and on every card.

#include "lora_spread.cuh"

namespace {

using namespace lora;

// ---- sums of the partial sums ------------------------------------------------------------------------------------

// One strip of rows: h or dh.
struct RowSum {
    uint64_t at; // (splits, T, count)
    int32_t splits, first, count, pad;
};
struct RowSums {
    LoraGroup group;
    RowSum of[MAX_STRIPS];
    bf16 *out; // (T, R)
    const float *partial;
    float factor;
    int32_t t;
};

// out[t, first + j] = bf16(scale * factor * sum over the splits)
__global__ void __launch_bounds__(LORA_THREADS) row_sum_kernel(const __grid_constant__ RowSums a) {
    const RowSum &s = a.of[blockIdx.y];
    const size_t n = size_t(a.t) * s.count, e = blockIdx.x * size_t(LORA_THREADS) + threadIdx.x;
    if (e >= n) return;
    const float *from = a.partial + s.at + e;
    float sum = 0.0f;
#pragma unroll 8
    for (int split = 0; split < s.splits; ++split) sum += from[split * n];
    const int j = s.first + int(e % s.count);
    const float scale = a.group.parts[part_of(a.group, j)].scale;
    a.out[e / s.count * a.group.r + j] = __float2bfloat16_rn(sum * (scale * a.factor));
}

// One strip of columns: ranks of dA (j, w), or of dB (w, j).
struct ColSum {
    uint64_t at; // (splits, count, width) for A, (splits, width, count) for B
    float factor;
    int32_t splits, first, count, width;
    int32_t is_a;
};
constexpr int MAX_COL_SUMS = 2 * MAX_STRIPS;
struct ColSums {
    LoraGroup group;
    ColSum of[MAX_COL_SUMS];
    float *out; // (P)
    const float *partial;
};

// out += factor * sum over the splits
__global__ void __launch_bounds__(LORA_THREADS) col_sum_kernel(const __grid_constant__ ColSums a) {
    const ColSum &s = a.of[blockIdx.y];
    const size_t n = size_t(s.width) * s.count, e = blockIdx.x * size_t(LORA_THREADS) + threadIdx.x;
    if (e >= n) return;
    const float *from = a.partial + s.at + e;
    float sum = 0.0f;
#pragma unroll 8
    for (int split = 0; split < s.splits; ++split) sum += from[split * n];
    const int j = s.first + int(s.is_a ? e / s.width : e % s.count);
    const LoraPart &part = a.group.parts[part_of(a.group, j)];
    const size_t to = s.is_a ? part.a + size_t(j - part.h) * s.width + e % s.width
                             : part.b + e / s.count * part.r + (j - part.h);
    a.out[to] += s.factor * sum;
}

// ---- how a sweep is split -----------------------------------------------------------------------------------------

// A sweep being put together, and where its partial sums end.
struct Plan {
    Sweep sweep{};
    int strips = 0;
    int widest = 0;
    uint64_t used; // floats of the scratch
    int most_chunks = 1, splits = 1;

    Plan(const LoraGroup &group, const bf16 *s, uint64_t ld, int t, float *scratch, uint64_t used) : used(used) {
        sweep.group = group;
        sweep.s = s;
        sweep.ld = ld;
        sweep.t = t;
        sweep.partial = scratch;
        sweep.s_aligned = is_aligned(s, 16) && ld % 8 == 0;
    }

    void add(int col, int width, int first, int count) {
        sweep.strips[strips++] = Strip{col, width, first, count, 0, 0, 0, 0};
        sweep.s_aligned = sweep.s_aligned && col % 8 == 0;
        widest = width > widest ? width : widest;
    }

    // The ranks of one part, `most` a strip.
    void add_part(int col, int width, const LoraPart &part, int most) {
        for (int j = 0; j < part.r; j += most) add(col, width, part.h + j, part.r - j < most ? part.r - j : most);
    }

    // Strips over x: all ranks together, or with dropout each part for itself, as each has masks of its own.
    void add_x(int k, bool dropout) {
        for (int j = 0; !dropout && j < sweep.group.r; j += 64)
            add(0, k, j, sweep.group.r - j < 64 ? sweep.group.r - j : 64);
        for (int p = 0; dropout && p < sweep.group.count; ++p) add_part(0, k, sweep.group.parts[p], 64);
    }

    void meet(const bf16 *h) {
        sweep.h = h;
        sweep.h_aligned = is_aligned(h, 16) && sweep.group.r % 8 == 0;
        for (int s = 0; s < strips; ++s) sweep.h_aligned = sweep.h_aligned && sweep.strips[s].first % 8 == 0;
    }

    void multiply(bool by_b, int k) {
        sweep.m_aligned = is_aligned(sweep.group.lora, 16) && (by_b || k % 8 == 0);
        for (int p = 0; p < sweep.group.count; ++p) {
            const LoraPart &part = sweep.group.parts[p];
            sweep.m_aligned = sweep.m_aligned && (by_b ? part.b % 8 == 0 && part.r % 8 == 0 : part.a % 8 == 0);
        }
    }

    void split_columns(int chunk_w) {
        sweep.chunk_w = chunk_w;
        for (int s = 0; s < strips; ++s) {
            sweep.strips[s].chunks = ceil_div(sweep.strips[s].width, chunk_w);
            most_chunks = sweep.strips[s].chunks > most_chunks ? sweep.strips[s].chunks : most_chunks;
        }
    }

    int all_chunks() const {
        int all = 0;
        for (int s = 0; s < strips; ++s) all += sweep.strips[s].chunks;
        return all;
    }

    // Between `least` and CTAS CTAs, but no more than one for 4 tiles of rows where that makes `least`: each chunk of
    // rows costs partial sums.
    void split_rows(int least) {
        const int tiles = ceil_div(sweep.t, TILE_T), all = all_chunks();
        const int low = clamp(least / all, 1, tiles), high = clamp(CTAS / all, 1, tiles);
        const int chunks = clamp(tiles / 4, low, high);
        sweep.chunk_t = ceil_div(tiles, chunks) * TILE_T;
        splits = ceil_div(sweep.t, sweep.chunk_t);
    }

    void one_tile_of_rows() {
        sweep.chunk_t = TILE_T;
        splits = ceil_div(sweep.t, TILE_T);
    }

    void place_rows(RowSums &sums, int &n) {
        for (int s = 0; s < strips; ++s) {
            Strip &strip = sweep.strips[s];
            strip.rows_at = used;
            sums.of[n++] = RowSum{used, strip.chunks, strip.first, strip.count, 0};
            used += uint64_t(strip.chunks) * sweep.t * strip.count;
        }
    }

    void place_cols(ColSums &sums, int &n, bool is_a, float factor) {
        sweep.rank_major = is_a;
        for (int s = 0; s < strips; ++s) {
            Strip &strip = sweep.strips[s];
            strip.cols_at = used;
            sums.of[n++] = ColSum{used, factor, splits, strip.first, strip.count, strip.width, is_a};
            used += uint64_t(splits) * strip.width * strip.count;
        }
    }

    template <bool ROWS, bool COLS, bool M_IS_B, int RT, int NW> cudaError_t launch(cudaStream_t stream) const {
        constexpr int bytes = SweepShared<ROWS, COLS, RT>::BYTES;
        const auto kernel = sweep_kernel<ROWS, COLS, M_IS_B, RT, NW>;
        const cudaError_t set = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
        if (set != cudaSuccess) return set;
        const dim3 grid(strips, most_chunks, splits);
        kernel<<<grid, LORA_THREADS, bytes, stream>>>(sweep);
        return cudaGetLastError();
    }
};

// Columns of a CTA that sums rows alone: enough CTAs, but not below 256 columns, as each chunk costs partial sums.
int rows_chunk(int t, int width) {
    const int chunks = clamp(CTAS / ceil_div(t, TILE_T), 1, ceil_div(width, 256));
    return ceil_div(ceil_div(width, chunks), TILE_W) * TILE_W;
}

cudaError_t launch_row_sums(const RowSums &a, int n, cudaStream_t stream) {
    int count = 0;
    for (int s = 0; s < n; ++s) count = a.of[s].count > count ? a.of[s].count : count;
    const dim3 grid(unsigned(ceil_div<size_t>(size_t(a.t) * count, LORA_THREADS)), n);
    row_sum_kernel<<<grid, LORA_THREADS, 0, stream>>>(a);
    return cudaGetLastError();
}

cudaError_t launch_col_sums(const ColSums &a, int n, cudaStream_t stream) {
    size_t most = 0;
    for (int s = 0; s < n; ++s) {
        const size_t of = size_t(a.of[s].width) * a.of[s].count;
        most = of > most ? of : most;
    }
    const dim3 grid(unsigned(ceil_div<size_t>(most, LORA_THREADS)), n);
    col_sum_kernel<<<grid, LORA_THREADS, 0, stream>>>(a);
    return cudaGetLastError();
}

// ---- few tokens ---------------------------------------------------------------------------------------------------

constexpr int FEW = 8; // tokens

struct Few {
    LoraGroup group;
    bf16 *h;       // (t, R)
    const bf16 *x; // (t, K)
    int32_t t, k;
    bool aligned;
};

// h of a handful of tokens without dropout: bound by the launch and by reading A. One CTA a column of h.
__global__ void __launch_bounds__(LORA_THREADS) few_kernel(const __grid_constant__ Few a) {
    __shared__ float of_warp[LORA_THREADS / 32][FEW];
    const int j = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const LoraPart &part = a.group.parts[part_of(a.group, j)];
    const bf16 *row = a.group.lora + part.a + size_t(j - part.h) * a.k;
    const auto load = [&](const bf16 *from, int k) {
        if (a.aligned) return load_vec8(from + k);
        Vec8<bf16> v;
#pragma unroll
        for (int e = 0; e < 8; ++e) v.at[e] = k + e < a.k ? from[k + e] : __float2bfloat16_rn(0.0f);
        return v;
    };
    float sum[FEW] = {};
    for (int k = threadIdx.x * 8; k < a.k; k += LORA_THREADS * 8) {
        const Vec8<bf16> w = load(row, k);
#pragma unroll
        for (int t = 0; t < FEW; ++t) {
            if (t < a.t) {
                const Vec8<bf16> x = load(a.x + size_t(t) * a.k, k);
#pragma unroll
                for (int e = 0; e < 8; ++e) sum[t] += to_f32(w.at[e]) * to_f32(x.at[e]);
            }
        }
    }
#pragma unroll
    for (int t = 0; t < FEW; ++t) {
#pragma unroll
        for (int d = 16; d > 0; d /= 2) sum[t] += __shfl_xor_sync(FULL_WARP, sum[t], d);
        if (lane == 0) of_warp[warp][t] = sum[t];
    }
    __syncthreads();
    if (int(threadIdx.x) < a.t) {
        float total = 0.0f;
#pragma unroll
        for (int w = 0; w < LORA_THREADS / 32; ++w) total += of_warp[w][threadIdx.x];
        a.h[threadIdx.x * a.group.r + j] = __float2bfloat16_rn(total * part.scale);
    }
}

// `whole`: the parts fill the columns of h in order. Otherwise they may be some of a group.
bool is_sound(const LoraGroup &g, bool whole) {
    int r = 0;
    for (int p = 0; p < g.count && p < LORA_MAX_PARTS; ++p) {
        const LoraPart &part = g.parts[p];
        if (part.r < 1 || part.r > LORA_MAX_RANK || part.h < 0 || part.h + part.r > g.r) return false;
        if (whole && part.h != r) return false;
        r += part.r;
    }
    return g.count >= 1 && g.count <= LORA_MAX_PARTS && (!whole || g.r == r);
}

} // namespace

// lora_forward    h[t, part p] = scale_p * dropout_p(x) A_pᵀ
//
//   h        (T, R)  bf16  =  of all parts side by side
//   x        (T, K)  bf16
//   lora     (P)     bf16  A_p (r, K) at parts[p].a
//   scratch          f32   lora_scratch of ops/lora.rs
//
// f32 sums, one rounding. 1 / (1 - p) of dropout is applied to the sum. Two launches, one for 8 tokens or fewer. Floor: 2*T*K bytes; with dropout x
// is read once for each part, all but once from L2, and the masks cost about 17 instructions an element and part.
struct LoraForward {
    LoraGroup group;
    LoraDropout dropout;
    bf16 *h;
    const bf16 *x;
    float *scratch;
    uint64_t scratch_len;
    int32_t t, k;
};
static_assert(sizeof(LoraForward) == 200, "as in src/backend/cuda/ffi/lora.rs");

HALFBYTE_API cudaError_t lora_forward(const LoraForward *args, cudaStream_t stream) {
    const LoraForward &a = *args;
    if (a.t == 0) return cudaSuccess;
    if (!is_sound(a.group, true)) return cudaErrorInvalidValue;
    const bool dropout = a.dropout.step != nullptr;
    if (a.t <= FEW && !dropout) {
        Few few{a.group, a.h, a.x, a.t, a.k, a.k % 8 == 0 && is_aligned(a.x, 16) && is_aligned(a.group.lora, 16)};
        for (int p = 0; p < a.group.count; ++p) few.aligned = few.aligned && a.group.parts[p].a % 8 == 0;
        few_kernel<<<a.group.r, LORA_THREADS, 0, stream>>>(few);
        return cudaGetLastError();
    }
    Plan plan(a.group, a.x, a.k, a.t, a.scratch, 0);
    plan.sweep.dropout = a.dropout;
    plan.add_x(a.k, dropout);
    plan.multiply(false, a.k);
    plan.split_columns(rows_chunk(a.t, a.k));
    plan.one_tile_of_rows();
    RowSums sums{a.group, {}, a.h, a.scratch, dropout ? a.dropout.inverse : 1.0f, a.t};
    int n = 0;
    plan.place_rows(sums, n);
    if (plan.used > a.scratch_len) return cudaErrorInvalidValue;
    const cudaError_t swept = plan.launch<true, false, false, 64, 1>(stream);
    return swept != cudaSuccess ? swept : launch_row_sums(sums, n, stream);
}

// lora_expand    y[t, part p] += h_p B_pᵀ
//
//   y     (T, N)  bf16  +=  columns parts[p].y .. + n
//   h     (T, R)  bf16      scaled already; the parts may be some of those that it holds
//   lora  (P)     bf16      B_p (n, r) at parts[p].b
//
// f32 sums, one rounding of y. Floor: 4 bytes an element of y.
struct LoraExpand {
    LoraGroup group;
    bf16 *y;
    const bf16 *h;
    int32_t t, n;
};
static_assert(sizeof(LoraExpand) == 160, "as in src/backend/cuda/ffi/lora.rs");

HALFBYTE_API cudaError_t lora_expand(const LoraExpand *args, cudaStream_t stream) {
    const LoraExpand &a = *args;
    if (a.t == 0) return cudaSuccess;
    if (!is_sound(a.group, false)) return cudaErrorInvalidValue;
    Spread spread{};
    spread.group = a.group;
    spread.out = a.y;
    spread.h = a.h;
    spread.ld = uint64_t(a.n);
    spread.t = a.t;
    int widest = 0;
    for (int p = 0; p < a.group.count; ++p) widest = a.group.parts[p].n > widest ? a.group.parts[p].n : widest;
    return launch_spread<true>(spread, widest, stream);
}

// lora_backward    dh_p = scale_p * dy_p B_p;  dB_p += dy_pᵀ h_p;  dA_p += dh_pᵀ dropout_p(x)
//
//   dh       (T, R)  bf16  =
//   d_lora   (P)     f32   +=  where A and B lie in `lora`
//   dy       (T, N)  bf16      columns parts[p].y .. + n
//   x        (T, K)  bf16
//   h        (T, R)  bf16      of the forward
//   lora     (P)     bf16
//   scratch          f32       lora_scratch of ops/lora.rs
//
// Parts of rank 32 or less take dh and dB from one read of dy, others read it twice. dA uses dh as rounded to bf16.
// Four launches (two more where a part has a rank above 32). Floor: 2*T*N + 2*T*K bytes.
struct LoraBackward {
    LoraGroup group;
    LoraDropout dropout;
    bf16 *dh;
    float *d_lora;
    const bf16 *dy, *x, *h;
    float *scratch;
    uint64_t scratch_len;
    int32_t t, k, n, pad;
};
static_assert(sizeof(LoraBackward) == 232, "as in src/backend/cuda/ffi/lora.rs");

HALFBYTE_API cudaError_t lora_backward(const LoraBackward *args, cudaStream_t stream) {
    const LoraBackward &a = *args;
    if (a.t == 0) return cudaSuccess;
    if (!is_sound(a.group, true)) return cudaErrorInvalidValue;
    constexpr int FUSED = 32; // the highest rank for which dh and dB share a read of dy
    int rank = 0;             // the highest of those
    Plan fused(a.group, a.dy, a.n, a.t, a.scratch, 0);
    for (int p = 0; p < a.group.count; ++p) {
        const LoraPart &part = a.group.parts[p];
        if (part.r > FUSED) continue;
        fused.add_part(part.y, part.n, part, FUSED);
        rank = part.r > rank ? part.r : rank;
    }
    RowSums row_sums{a.group, {}, a.dh, a.scratch, 1.0f, a.t};
    ColSums col_sums{a.group, {}, a.d_lora, a.scratch};
    int n_rows = 0, n_cols = 0;
    uint64_t used = 0;
    if (fused.strips > 0) {
        fused.multiply(true, a.k);
        fused.meet(a.h);
        fused.split_columns(rank <= 16 ? 8 * TILE_W : 4 * TILE_W);
        fused.split_rows(96);
        fused.place_rows(row_sums, n_rows);
        fused.place_cols(col_sums, n_cols, false, 1.0f);
        used = fused.used;
    }

    // Ranks above: dh, then dB.
    Plan rows(a.group, a.dy, a.n, a.t, a.scratch, used);
    for (int p = 0; p < a.group.count; ++p)
        if (a.group.parts[p].r > FUSED) rows.add_part(a.group.parts[p].y, a.group.parts[p].n, a.group.parts[p], 64);
    Plan cols = rows;
    if (rows.strips > 0) {
        rows.multiply(true, a.k);
        rows.split_columns(rows_chunk(a.t, rows.widest));
        rows.one_tile_of_rows();
        rows.place_rows(row_sums, n_rows);
        cols.used = rows.used;
        cols.meet(a.h);
        cols.split_columns(TILE_W);
        cols.split_rows(128);
        cols.place_cols(col_sums, n_cols, false, 1.0f);
        used = cols.used;
    }

    const bool dropout = a.dropout.step != nullptr;
    Plan over_x(a.group, a.x, a.k, a.t, a.scratch, used);
    over_x.sweep.dropout = a.dropout;
    over_x.add_x(a.k, dropout);
    over_x.meet(a.dh);
    over_x.split_columns(TILE_W);
    over_x.split_rows(128);
    over_x.place_cols(col_sums, n_cols, true, dropout ? a.dropout.inverse : 1.0f);
    if (over_x.used > a.scratch_len) return cudaErrorInvalidValue;

    cudaError_t status = cudaSuccess;
    if (fused.strips > 0)
        status = rank <= 16 ? fused.launch<true, true, true, 16, 8>(stream) : fused.launch<true, true, true, 32, 4>(stream);
    if (status == cudaSuccess && rows.strips > 0) status = rows.launch<true, false, true, 64, 1>(stream);
    if (status == cudaSuccess && rows.strips > 0) status = cols.launch<false, true, false, 64, 1>(stream);
    if (status == cudaSuccess) status = launch_row_sums(row_sums, n_rows, stream);
    if (status == cudaSuccess) status = over_x.launch<false, true, false, 64, 1>(stream);
    return status == cudaSuccess ? launch_col_sums(col_sums, n_cols, stream) : status;
}

// lora_backward_x    dx += sum_p dropout'_p(dh_p A_p)
//
//   dx    (T, K)  bf16  +=
//   dh    (T, R)  bf16        the parts may be some of those that it holds
//   lora  (P)     bf16  A_p (r, K) at parts[p].a
//
// The sum over the parts is in f32, with one rounding of dx. Floor: 4*T*K bytes.
struct LoraBackwardX {
    LoraGroup group;
    LoraDropout dropout;
    bf16 *dx;
    const bf16 *dh;
    int32_t t, k;
};
static_assert(sizeof(LoraBackwardX) == 184, "as in src/backend/cuda/ffi/lora.rs");

HALFBYTE_API cudaError_t lora_backward_x(const LoraBackwardX *args, cudaStream_t stream) {
    const LoraBackwardX &a = *args;
    if (a.t == 0) return cudaSuccess;
    if (!is_sound(a.group, false)) return cudaErrorInvalidValue;
    Spread spread{};
    spread.group = a.group;
    spread.dropout = a.dropout;
    spread.out = a.dx;
    spread.h = a.dh;
    spread.ld = uint64_t(a.k);
    spread.t = a.t;
    spread.k = a.k;
    return launch_spread<false>(spread, a.k, stream);
}
