// From the ranks to the columns: y += h Bᵀ and dx += dh A, of lora.cu.
#pragma once

#include "lora.cuh"

namespace lora {

constexpr int SPREAD_RANKS = 128; // of the slice of A or B that a CTA keeps in shared memory

// Ranks of one part, at column `at` of the slice.
struct Piece {
    int32_t part, first, count, at;
};
constexpr int MAX_PIECES = LORA_MAX_PARTS * (LORA_MAX_RANK / SPREAD_RANKS);

// out (T, ld) += sum over the pieces of drop'(h_p M_p): y by B, or dx by A.
struct Spread {
    LoraGroup group;
    LoraDropout dropout;
    Piece pieces[MAX_PIECES];
    int32_t count; // of pieces
    bool resident; // the slices of all pieces lie in shared memory together
    bool out_aligned, m_aligned, h_aligned;
    bf16 *out;
    const bf16 *h; // (T, R)
    uint64_t ld;
    int32_t t, k;
    int32_t chunk_t; // rows of a CTA
    int32_t ranks;   // columns of the slice
};

// grid (chunks of 128 columns, chunks of rows, parts if BY_B). A CTA keeps its slice of M, as (column, rank), and walks
// down its rows. The slice's rows are permuted so that a lane's sums are of 8 neighbouring columns: row
// 32*q + 8*j + 2*i + e holds column 32*q + 8*i + 2*j + e.
template <bool BY_B> __global__ void __launch_bounds__(LORA_THREADS, 2) spread_kernel(const __grid_constant__ Spread a) {
    extern __shared__ __align__(128) char shared[];
    const LoraGroup &group = a.group;
    const LoraPart &own = group.parts[BY_B ? blockIdx.z : 0];
    const int width = BY_B ? own.n : a.k, first_col = BY_B ? own.y : 0;
    const int w0 = blockIdx.x * TILE_W;
    if (w0 >= width) return;
    const int t_first = blockIdx.y * a.chunk_t, t_end = min(t_first + a.chunk_t, a.t);

    const int pitch = a.ranks * 2 + 16; // bytes: an odd number of 16, so that ldmatrix meets no bank twice
    char *slice = shared, *tall = shared + TILE_W * pitch;
    const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
    const int g = lane / 4, i = lane % 4, row16 = (warp % 4) * 16, half = warp / 4;

    const auto mine = [&](const Piece &p) { return !BY_B || p.part == int(blockIdx.z); };
    const auto load_slice = [&](const Piece &p) {
        const LoraPart &part = group.parts[p.part];
        const int padded = ceil_div(p.count, 16) * 16;
        if constexpr (BY_B) {
            for (int n = tid; n < TILE_W * (padded / 8); n += LORA_THREADS) {
                const int row = n / (padded / 8), chunk = n % (padded / 8);
                const int col = row / 32 * 32 + row % 8 / 2 * 8 + row / 8 % 4 * 2 + row % 2;
                const int valid = w0 + col < width ? p.count - 8 * chunk : 0;
                const bf16 *from = group.lora + part.b + size_t(w0 + col) * part.r + (p.first + 8 * chunk);
                load8(slice + row * pitch + (p.at + 8 * chunk) * 2, from, valid, a.m_aligned);
            }
        } else {
            for (int n = tid; n < padded * (TILE_W / 8); n += LORA_THREADS) {
                const int rank = n / (TILE_W / 8), col = n % (TILE_W / 8) * 8;
                const bf16 *from = group.lora + part.a + size_t(p.first + rank) * a.k + (w0 + col);
                const int valid = rank < p.count ? width - (w0 + col) : 0;
                Vec8<bf16> v;
                if (a.m_aligned && valid >= 8) {
                    v = load_vec8(from);
                } else {
#pragma unroll
                    for (int e = 0; e < 8; ++e) v.at[e] = e < valid ? from[e] : __float2bfloat16_rn(0.0f);
                }
#pragma unroll
                for (int e = 0; e < 8; ++e) {
                    const int row = col / 32 * 32 + e / 2 * 8 + col / 8 % 4 * 2 + e % 2;
                    *reinterpret_cast<bf16 *>(slice + row * pitch + (p.at + rank) * 2) = v.at[e];
                }
            }
        }
    };
    const auto load_tall = [&](const Piece &p, int t0) {
        const int chunks = ceil_div(p.count, 16) * 2;
        for (int n = tid; n < TILE_T * chunks; n += LORA_THREADS) {
            const int row = n / chunks, chunk = n % chunks;
            const int valid = t0 + row < a.t ? p.count - 8 * chunk : 0;
            const bf16 *from = a.h + size_t(t0 + row) * group.r + (group.parts[p.part].h + p.first + 8 * chunk);
            load8(tall + row * pitch + (p.at + 8 * chunk) * 2, from, valid, a.h_aligned);
        }
    };

    const uint32_t slice_at = shared_address(slice), tall_at = shared_address(tall);
    const bool dropout = !BY_B && a.dropout.step != nullptr;
    const uint32_t number = dropout ? __ldg(a.dropout.step) : 0;
    if (a.resident)
        for (int p = 0; p < a.count; ++p)
            if (mine(a.pieces[p])) load_slice(a.pieces[p]);

    for (int t0 = t_first; t0 < t_end; t0 += TILE_T) {
        // What is there already: lane's row g or g + 8, its 8 columns of two groups of 32.
        Vec8<bf16> old[2][2];
#pragma unroll
        for (int q = 0; q < 2; ++q)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int t = t0 + row16 + g + 8 * r, w = w0 + half * 64 + q * 32 + 8 * i;
                const bf16 *from = a.out + size_t(t) * a.ld + (first_col + w);
                if (t < a.t && w + 8 <= width && a.out_aligned) old[q][r] = load_vec8(from);
            }

        float sum[8][4] = {};
        if (a.resident) {
            __syncthreads(); // all are done with the tile before
            for (int p = 0; p < a.count; ++p)
                if (mine(a.pieces[p])) load_tall(a.pieces[p], t0);
            cp_async_commit();
            cp_async_wait<0>();
            __syncthreads();
        }
        for (int p = 0; p < a.count; ++p) {
            const Piece &piece = a.pieces[p];
            if (!mine(piece)) continue;
            if (!a.resident) {
                __syncthreads();
                load_slice(piece);
                load_tall(piece, t0);
                cp_async_commit();
                cp_async_wait<0>();
                __syncthreads();
            }
            // 32 columns at a time: the masks need the product of each part for itself.
#pragma unroll
            for (int q = 0; q < 2; ++q) {
                float product[4][4] = {};
                for (int k = 0; k < piece.count; k += 16) {
                    const int col = (piece.at + k) * 2; // bytes
                    uint32_t av[4];
                    ldmatrix_x4(av, tall_at + (row16 + lane % 16) * pitch + col + lane / 16 * 16);
#pragma unroll
                    for (int n = 0; n < 2; ++n) {
                        uint32_t bv[4];
                        const int row = half * 64 + q * 32 + n * 16 + lane % 8 + lane / 16 * 8;
                        ldmatrix_x4(bv, slice_at + row * pitch + col + lane / 8 % 2 * 16);
                        mma_bf16(product[2 * n], av, bv[0], bv[1]);
                        mma_bf16(product[2 * n + 1], av, bv[2], bv[3]);
                    }
                }
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    uint32_t keep = 0xff;
                    if (dropout) {
                        const int t = t0 + row16 + g + 8 * r, w = w0 + half * 64 + q * 32 + 8 * i;
                        const uint64_t index = uint64_t(t) * a.k + uint64_t(w);
                        keep = dropout_keep8(a.dropout, number, group.parts[piece.part].site, index, a.k % 4 == 0);
                    }
#pragma unroll
                    for (int e = 0; e < 8; ++e) {
                        const int c = r * 2 + e % 2;
                        sum[q * 4 + e / 2][c] += keep >> e & 1 ? product[e / 2][c] : 0.0f;
                    }
                }
            }
        }

        const float factor = dropout ? a.dropout.inverse : 1.0f;
#pragma unroll
        for (int q = 0; q < 2; ++q)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int t = t0 + row16 + g + 8 * r, w = w0 + half * 64 + q * 32 + 8 * i;
                if (t >= a.t) continue;
                bf16 *to = a.out + size_t(t) * a.ld + (first_col + w);
                if (w + 8 <= width && a.out_aligned) {
                    Vec8<bf16> v;
#pragma unroll
                    for (int e = 0; e < 8; ++e)
                        v.at[e] = __float2bfloat16_rn(to_f32(old[q][r].at[e]) + factor * sum[q * 4 + e / 2][r * 2 + e % 2]);
                    store_vec8(to, v);
                } else {
#pragma unroll
                    for (int e = 0; e < 8; ++e)
                        if (w + e < width)
                            to[e] = __float2bfloat16_rn(to_f32(to[e]) + factor * sum[q * 4 + e / 2][r * 2 + e % 2]);
                }
            }
    }
}

template <bool BY_B> cudaError_t launch_spread(Spread &a, int widest, cudaStream_t stream) {
    // All ranks of the slice at once where they fit: for B one part's, for A those of all.
    int at = 0, most = 0;
    for (int p = 0; p < a.group.count; ++p) {
        const int padded = ceil_div(a.group.parts[p].r, 16) * 16;
        at += padded;
        most = padded > most ? padded : most;
    }
    const int resident = BY_B ? most : at;
    a.resident = resident <= SPREAD_RANKS;
    a.ranks = a.resident ? resident : SPREAD_RANKS;
    at = 0;
    for (int p = 0; p < a.group.count; ++p) {
        const LoraPart &part = a.group.parts[p];
        const int padded = ceil_div(part.r, 16) * 16;
        if (a.resident) {
            a.pieces[a.count++] = Piece{p, 0, part.r, BY_B ? 0 : at};
            at += padded;
        } else {
            for (int j = 0; j < part.r; j += SPREAD_RANKS)
                a.pieces[a.count++] = Piece{p, j, part.r - j < SPREAD_RANKS ? part.r - j : SPREAD_RANKS, 0};
        }
        const bool aligned = BY_B ? part.b % 8 == 0 && part.r % 8 == 0 : part.a % 8 == 0 && a.k % 8 == 0;
        a.m_aligned = (p == 0 || a.m_aligned) && aligned && is_aligned(a.group.lora, 16);
        a.h_aligned = (p == 0 || a.h_aligned) && part.h % 8 == 0 && a.group.r % 8 == 0 && is_aligned(a.h, 16);
        a.out_aligned = (p == 0 || a.out_aligned) && is_aligned(a.out, 16) && a.ld % 8 == 0 && (!BY_B || part.y % 8 == 0);
    }
    const int chunks = ceil_div(widest, TILE_W), tiles = ceil_div(a.t, TILE_T);
    a.chunk_t = ceil_div(tiles, clamp(4 * CTAS / chunks, 1, tiles)) * TILE_T;
    constexpr int most_bytes = (TILE_W + TILE_T) * (SPREAD_RANKS * 2 + 16);
    static_assert(most_bytes <= int(MAX_SHARED_BYTES), "must run on consumer cards");
    const int bytes = (TILE_W + TILE_T) * (a.ranks * 2 + 16);
    const auto kernel = spread_kernel<BY_B>;
    const cudaError_t set = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most_bytes);
    if (set != cudaSuccess) return set;
    const dim3 grid(chunks, ceil_div(a.t, a.chunk_t), BY_B ? a.group.count : 1);
    kernel<<<grid, LORA_THREADS, bytes, stream>>>(a);
    return cudaGetLastError();
}

} // namespace lora
