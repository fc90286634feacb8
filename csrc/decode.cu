// Generation: linears of few tokens, bound by reading the weight once, and attention of new tokens over a cache.

#include "attention_decode.cuh"
#include "nf4.cuh"

// Of matvec, whose contract is at its launcher.
constexpr int MATVEC_MAX_PARTS = 3;
struct MatvecPart {
    const uint8_t *packed;
    Nf4Absmax absmax;
    const bf16 *w;
    const bf16 *h, *b;
    const bf16 *bias;
    int32_t y; // first column
    int32_t n, r;
    QuantType quant_type;
};
static_assert(sizeof(MatvecPart) == 88, "as in src/backend/cuda/ffi/decode.rs");
struct Matvec {
    void *y;
    const bf16 *x;
    uint64_t ldy, ldh;
    MatvecPart parts[MATVEC_MAX_PARTS];
    int32_t count;
    int32_t t, k;
    int32_t y_is_f32;
};
static_assert(sizeof(Matvec) == 312, "as in src/backend/cuda/ffi/decode.rs");

namespace {

constexpr int MAX_T = 8;
constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
constexpr int ROWS = 16; // of the weight, in one tensor-core product

__device__ __forceinline__ void store(const Matvec &a, const MatvecPart &part, int token, int row, float sum) {
    if (part.bias) sum += to_f32(part.bias[row]);
    const size_t at = token * a.ldy + (part.y + row);
    if (a.y_is_f32)
        static_cast<float *>(a.y)[at] = sum;
    else
        static_cast<bf16 *>(a.y)[at] = __float2bfloat16_rn(sum);
}

// What a lane holds of 16 rows and four blocks of 64: of its two rows, 16 weights of each block, and the absmax of one
// block, or its code and nested absmax.
struct Packed {
    uint2 raw[4][2];
    float absmax[2];
    uint8_t code[2];
};

// The tiles of the parts stand one behind the other: which part's is this, and which of them. A tile behind the last counts
// as the last part's.
struct Place {
    int part, tile;
};
__host__ __device__ __forceinline__ Place place(const Matvec &a, int tile) {
    Place p{0, tile};
    while (p.part + 1 < a.count && p.tile >= ceil_div(a.parts[p.part].n, ROWS)) p.tile -= ceil_div(a.parts[p.part++].n, ROWS);
    return p;
}

// 16 rows of the weight a CTA at a time, as the left operand of mma.sync; the tokens, padded to 8, are the right one. The
// warps share out the columns. Which column of the weight stands for which k of the product is free, so a lane's columns
// lie side by side in memory. grid-stride over the tiles of 16 rows.
//
// 4 bits: a byte looks up two values, rounded to bf16, in a table with one copy for each lane, so no bank is met twice.
// The sum over a block of 64 is scaled by its absmax in f32. The rounding of the 16 values weighs less than that of a
// dequantised bf16 weight (1.1e-3 against 1.7e-3 of its size).
template <bool NF4> __global__ void __launch_bounds__(THREADS, 2) matvec_kernel(const __grid_constant__ Matvec a) {
    extern __shared__ __align__(128) char shared[];
    __shared__ float sums[2][WARPS][ROWS * MAX_T];
    const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, g = lane / 4, i = lane % 4;
    const bool twice = a.parts[0].absmax.absmax == nullptr; // double quantisation

    // A step ahead, over the end of a tile too. What lies behind the weight's end is read as its end.
    const auto fetch = [&](int tile, int first) {
        Packed p;
        const Place at_tile = place(a, tile);
        const MatvecPart &part = a.parts[at_tile.part];
        const int blocks = a.k / NF4_BLOCK, own = min(first + i, blocks - 1);
#pragma unroll
        for (int s = 0; s < 2; ++s) {
            const size_t row = min(at_tile.tile * ROWS + g + 8 * s, part.n - 1);
            const uint8_t *w = part.packed + row * (a.k / 2) + i * 8;
#pragma unroll
            for (int b = 0; b < 4; ++b)
                p.raw[b][s] = __ldg(reinterpret_cast<const uint2 *>(w + min(first + b, blocks - 1) * (NF4_BLOCK / 2)));
            const size_t at = row * blocks + own;
            p.code[s] = twice ? __ldg(part.absmax.codes + at) : 0;
            p.absmax[s] = twice ? __ldg(part.absmax.nested_absmax + at / NF4_NESTED_BLOCK) : __ldg(part.absmax.absmax + at);
        }
        return p;
    };

    Packed ahead;
    if constexpr (NF4) ahead = fetch(blockIdx.x, warp * 4);

    // (256 bytes, 32 lanes) pairs of bf16, and the 256 values of an absmax code.
    uint32_t *table = reinterpret_cast<uint32_t *>(shared);
    float *dynamic = reinterpret_cast<float *>(shared + 256 * 32 * 4);
    if constexpr (NF4) {
        const float *book = NF4_CODE_BOOK[int(a.parts[0].quant_type)];
        const uint32_t pair = pack_bf16(book[tid / 16], book[tid % 16]); // high nibble first
        for (int c = 0; c < 32; ++c) table[tid * 32 + (c + tid) % 32] = pair;
        if (twice) dynamic[tid] = NF4_DYNAMIC_CODE[tid];
        static_assert(THREADS == 256, "a byte each");
        __syncthreads();
    }

    int tiles = 0, parity = 0;
    for (int p = 0; p < a.count; ++p) tiles += ceil_div(a.parts[p].n, ROWS);
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x, parity ^= 1) {
        // Rows and tokens behind the last are read as the last, and not stored.
        const Place at = place(a, tile);
        const MatvecPart &part = a.parts[at.part];
        const int low = min(at.tile * ROWS + g, part.n - 1), high = min(at.tile * ROWS + g + 8, part.n - 1);
        const bf16 *x = a.x + size_t(min(g, a.t - 1)) * a.k;
        float total[4] = {};

        // h Bᵀ: 16 ranks a product, the warps in turn. At any alignment.
        const bool pairs = (part.r | a.ldh) % 2 == 0 &&
                           (reinterpret_cast<uintptr_t>(part.b) | reinterpret_cast<uintptr_t>(part.h)) % 4 == 0;
#pragma unroll 1
        for (int first = warp * 16; first < part.r; first += WARPS * 16) {
            const auto pair = [&](const bf16 *row, int j) {
                if (pairs && j < part.r) return *reinterpret_cast<const uint32_t *>(row + j);
                return pack_bf16(j < part.r ? to_f32(row[j]) : 0.0f, j + 1 < part.r ? to_f32(row[j + 1]) : 0.0f);
            };
            const int j = first + 2 * i;
            const bf16 *b_low = part.b + size_t(low) * part.r, *b_high = part.b + size_t(high) * part.r;
            const bf16 *h = part.h + min(g, a.t - 1) * a.ldh;
            const uint32_t av[4] = {pair(b_low, j), pair(b_high, j), pair(b_low, j + 8), pair(b_high, j + 8)};
            mma_bf16(total, av, pair(h, j), pair(h, j + 8));
        }

        if constexpr (NF4) {
            const int blocks = a.k / NF4_BLOCK;
            const float offset = twice ? __ldg(part.absmax.offset) : 0.0f;
#pragma unroll 1
            for (int first = warp * 4; first < blocks; first += WARPS * 4) {
                const Packed now = ahead;
                const bool last = first + WARPS * 4 >= blocks;
                ahead = fetch(last ? tile + gridDim.x : tile, last ? warp * 4 : first + WARPS * 4);
                // Lane i of four has the absmax of block `first + i`. Behind the last block it is 0.
                float scale[2];
#pragma unroll
                for (int s = 0; s < 2; ++s) {
                    scale[s] = twice ? __fadd_rn(__fmul_rn(dynamic[now.code[s]], now.absmax[s]), offset) : now.absmax[s];
                    if (first + i >= blocks) scale[s] = 0.0f;
                }
#pragma unroll
                for (int b = 0; b < 4; ++b) {
                    const int block = min(first + b, blocks - 1);
                    const uint4 *tokens = reinterpret_cast<const uint4 *>(x + block * NF4_BLOCK + i * 16);
                    const uint4 xs[2] = {__ldg(tokens), __ldg(tokens + 1)};
                    float sum[4] = {};
#pragma unroll
                    for (int m = 0; m < 4; ++m) {
                        const uint32_t word_low = m < 2 ? now.raw[b][0].x : now.raw[b][0].y;
                        const uint32_t word_high = m < 2 ? now.raw[b][1].x : now.raw[b][1].y;
                        const int shift = m % 2 * 16;
                        const auto look_up = [&](uint32_t word, int by) { return table[(word >> by & 255) * 32 + lane]; };
                        const uint32_t av[4] = {look_up(word_low, shift), look_up(word_high, shift),
                                                look_up(word_low, shift + 8), look_up(word_high, shift + 8)};
                        const uint4 v = xs[m / 2];
                        mma_bf16(sum, av, m % 2 ? v.z : v.x, m % 2 ? v.w : v.y);
                    }
                    const int from = (lane & ~3) + b;
                    const float by_low = __shfl_sync(FULL_WARP, scale[0], from);
                    const float by_high = __shfl_sync(FULL_WARP, scale[1], from);
                    total[0] += by_low * sum[0];
                    total[1] += by_low * sum[1];
                    total[2] += by_high * sum[2];
                    total[3] += by_high * sum[3];
                }
            }
        } else {
            const bf16 *w_low = part.w + size_t(low) * a.k, *w_high = part.w + size_t(high) * a.k;
#pragma unroll 1
            for (int first = warp * 128; first < a.k; first += WARPS * 128) {
                uint4 raw[4][2], xs[4];
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    const int k = first + c * 32 + i * 8;
                    raw[c][0] = raw[c][1] = xs[c] = uint4{0, 0, 0, 0};
                    if (k < a.k) {
                        raw[c][0] = __ldg(reinterpret_cast<const uint4 *>(w_low + k));
                        raw[c][1] = __ldg(reinterpret_cast<const uint4 *>(w_high + k));
                        xs[c] = __ldg(reinterpret_cast<const uint4 *>(x + k));
                    }
                }
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    const uint32_t first_half[4] = {raw[c][0].x, raw[c][1].x, raw[c][0].y, raw[c][1].y};
                    mma_bf16(total, first_half, xs[c].x, xs[c].y);
                    const uint32_t second_half[4] = {raw[c][0].z, raw[c][1].z, raw[c][0].w, raw[c][1].w};
                    mma_bf16(total, second_half, xs[c].z, xs[c].w);
                }
            }
        }

        float *own = sums[parity][warp];
        own[g * MAX_T + 2 * i] = total[0];
        own[g * MAX_T + 2 * i + 1] = total[1];
        own[(g + 8) * MAX_T + 2 * i] = total[2];
        own[(g + 8) * MAX_T + 2 * i + 1] = total[3];
        __syncthreads(); // of the tile after: the sums are written to the other half
        if (tid < ROWS * MAX_T) {
            const int token = tid / ROWS, row = at.tile * ROWS + tid % ROWS;
            float sum = 0.0f;
#pragma unroll
            for (int w = 0; w < WARPS; ++w) sum += sums[parity][w][tid % ROWS * MAX_T + token];
            if (token < a.t && row < part.n) store(a, part, token, row, sum);
        }
    }
}

// Any k and any alignment: a warp a row of the first part.
__global__ void __launch_bounds__(THREADS) matvec_any_kernel(const __grid_constant__ Matvec a) {
    const MatvecPart &part = a.parts[0];
    const int row = blockIdx.x * WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= part.n) return;
    float total[MAX_T] = {};
    const float *book = NF4_CODE_BOOK[int(a.parts[0].quant_type)];
    for (int k = lane; k < a.k; k += 32) {
        const size_t e = size_t(row) * a.k + k;
        float w;
        if (part.w) {
            w = to_f32(part.w[e]);
        } else {
            const float absmax = part.absmax.absmax ? nf4_absmax<false>(part.absmax, e / NF4_BLOCK)
                                                     : nf4_absmax<true>(part.absmax, e / NF4_BLOCK);
            w = book[part.packed[e / 2] >> (e % 2 ? 0 : 4) & 15] * absmax;
        }
#pragma unroll
        for (int token = 0; token < MAX_T; ++token)
            if (token < a.t) total[token] += w * to_f32(a.x[size_t(token) * a.k + k]);
    }
    for (int j = lane; j < part.r; j += 32) {
        const float b = to_f32(part.b[size_t(row) * part.r + j]);
#pragma unroll
        for (int token = 0; token < MAX_T; ++token)
            if (token < a.t) total[token] += b * to_f32(part.h[token * a.ldh + j]);
    }
#pragma unroll
    for (int token = 0; token < MAX_T; ++token) {
#pragma unroll
        for (int d = 16; d > 0; d /= 2) total[token] += __shfl_xor_sync(FULL_WARP, total[token], d);
        if (lane == 0 && token < a.t) store(a, part, token, row, total[token]);
    }
}

} // namespace

// matvec    y[:, part p] = x W_pᵀ (+ h_p B_pᵀ) (+ bias_p)    for at most 8 tokens, 1 to 3 parts that read the same x
//
//   y       (t, N)  bf16 or f32  =  rows ldy elements apart; part p from column `y` on
//   x       (t, k)  bf16
//   W       (n, k)  4 bits (packed, absmax: see nf4.cuh), or bf16 if `w` is there
//   h       (t, r)  bf16            rows ldh apart; scaled already; r = 0: none
//   b       (n, r)  bf16
//   bias    (n)     bf16            null: none
//
// f32 sums in one order. Fast where k is a multiple of 64 (4 bits) or of 8 (bf16) and the pointers are aligned; then one
// launch, if the parts are of one kind. Floor: the weights once.
HALFBYTE_API cudaError_t matvec(const Matvec *args, cudaStream_t stream) {
    const Matvec &a = *args;
    if (a.t == 0) return cudaSuccess;
    if (a.t > MAX_T || a.count < 1 || a.count > MATVEC_MAX_PARTS) return cudaErrorInvalidValue;
    bool bf16_fast = a.k % 8 == 0 && is_aligned(a.x, 16), nf4_fast = a.k % NF4_BLOCK == 0 && is_aligned(a.x, 16);
    int tiles = 0;
    for (int p = 0; p < a.count; ++p) {
        const MatvecPart &part = a.parts[p];
        const bool same = (part.absmax.absmax == nullptr) == (a.parts[0].absmax.absmax == nullptr) &&
                          part.quant_type == a.parts[0].quant_type;
        bf16_fast = bf16_fast && part.w && is_aligned(part.w, 16);
        nf4_fast = nf4_fast && !part.w && same && is_aligned(part.packed, 8);
        tiles += ceil_div(part.n, ROWS);
    }
    constexpr int TABLES = 256 * 32 * 4 + 256 * 4;
    if (bf16_fast) {
        matvec_kernel<false><<<tiles, THREADS, 0, stream>>>(a);
    } else if (nf4_fast) {
        // No more CTAs than large cards hold at a time: each fills its table first.
        const int ctas = tiles < 264 ? tiles : 264;
        matvec_kernel<true><<<ctas, THREADS, TABLES, stream>>>(a);
    } else if (a.count == 1) {
        const int ctas = ceil_div(a.parts[0].n, WARPS);
        matvec_any_kernel<<<ctas, THREADS, 0, stream>>>(a);
    } else {
        Matvec one = a;
        one.count = 1;
        for (int p = 0; p < a.count; ++p) {
            one.parts[0] = a.parts[p];
            const cudaError_t status = matvec(&one, stream);
            if (status != cudaSuccess) return status;
        }
    }
    return cudaGetLastError();
}

// attention_decode    row i sits at p = positions[i]:  k_cache[p], v_cache[p] = its k and v;
//                     o[i, head] = softmax over keys j (p - window < j <= p) of (q k_j / sqrt(D)) v_j
//
//   o          (t, H*D)         bf16  =
//   k, v       (capacity, G*D)  bf16  rows positions[i] written
//   qkv        (t, (H+2G)*D)    bf16  rotated
//   positions  (t)              i32   on the device
//   scratch                     f32   (t, H, splits, D + 2)
//
// All rows of qkv are appended before any of them attends. The grid follows from t and the heads alone. Partial results of
// the splits are added up in order: the same bits in every run. Floor: the seen part of the cache, read once a row.
struct AttentionDecode {
    bf16 *o, *k, *v;
    const bf16 *qkv;
    const int32_t *positions;
    float *scratch;
    int32_t t, capacity, h, g, d;
    int32_t window; // 0: none
    int32_t splits;
    float scale; // 1 / sqrt(D)
};
static_assert(sizeof(AttentionDecode) == 80, "as in src/backend/cuda/ffi/decode.rs");

HALFBYTE_API cudaError_t attention_decode(const AttentionDecode *args, cudaStream_t stream) {
    const AttentionDecode &m = *args;
    if (m.t == 0) return cudaSuccess;
    if (m.d < 1 || m.d > 256 || m.g < 1 || m.h < m.g || m.h % m.g != 0 || m.splits < 1) return cudaErrorInvalidValue;
    const bool aligned = m.d % 8 == 0 && is_aligned(m.k, 16) && is_aligned(m.v, 16) && is_aligned(m.qkv, 16);
    using namespace attention_decode_kernels;
    const Decode a{m.o, m.k, m.v, m.qkv, m.positions, m.scratch, m.t, m.capacity, m.h, m.g, m.d, m.window, m.splits,
                   m.scale * 1.44269504f, aligned};
    if (a.t > 1) append_kernel<<<a.t, ATTN_THREADS, 0, stream>>>(a);
    return a.d <= 64 ? launch_decode<64>(a, stream) : a.d <= 128 ? launch_decode<128>(a, stream) : launch_decode<256>(a, stream);
}
