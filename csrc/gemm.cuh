// The main loop that gemm.cu and nf4_gemm.cu share: c = alpha * (a·op(b) + a2·op(b2)) + bias + c, bf16 in, f32 sums.
//
// A CTA makes a BM x BN tile of c. Tiles of a and b, 64 deep, come through shared memory in a ring of STAGES (cp.async,
// two tiles ahead), swizzled so that neither their stores nor ldmatrix meet bank conflicts. Copies, decoding and the
// fragments of the next 16 columns are free of branches, so that they run between the tensor-core instructions of the
// last 16. The pair's tiles follow those of the main product in the same ring. The order of the sum over k is the same
// for every tile shape, source and card, so the bits are, too.
#pragma once

#include "mma.cuh"

constexpr int GEMM_BK = 64;          // depth of a tile: rows of 128 bytes
constexpr int GEMM_RASTER_ROWS = 8; // tile rows walked together, so that their b tiles are read from L2

template <int BM_, int BN_, int WARPS_M_, int WARPS_N_, int STAGES_> struct GemmTile {
    static constexpr int BM = BM_, BN = BN_, WARPS_M = WARPS_M_, WARPS_N = WARPS_N_, STAGES = STAGES_;
    static constexpr int THREADS = 32 * WARPS_M * WARPS_N;
    static constexpr int WM = BM / WARPS_M, WN = BN / WARPS_N; // a warp's part of the tile
    static constexpr uint32_t A_BYTES = BM * GEMM_BK * 2, B_BYTES = BN * GEMM_BK * 2, STAGE_BYTES = A_BYTES + B_BYTES;
    static constexpr int PITCH = BN + 8; // of the finished tile, in f32: rows eight banks apart
    static constexpr size_t RING_BYTES = size_t(STAGES) * STAGE_BYTES;
    static_assert(size_t(BM) * PITCH * 4 <= RING_BYTES, "the finished tile takes the place of the ring");
    static_assert(WM % 16 == 0 && WN % 16 == 0 && BN % 64 == 0, "whole fragments and panels");
};
using GemmLarge = GemmTile<128, 128, 2, 4, 3>;
using GemmSmall = GemmTile<64, 64, 2, 2, 3>;

// One product: a (m, k), and b as (n, k) or (k, n). k = 0: none.
struct GemmProduct {
    const bf16 *a, *b;
    int64_t lda, ldb;
    int k;
};

struct GemmParams {
    void *c;
    int64_t ldc;
    GemmProduct main, pair;
    const bf16 *bias; // (n) or null
    float alpha;
    int m, n;
    bool accumulate, c_f32;
    bool c_vectors; // rows of c start at 16 bytes
};

__device__ __forceinline__ int clamp_to_8(int x) { return min(max(x, 0), 8); }

// 8 elements to shared memory, of which the first `valid` are read and the rest are zeros. ALIGNED: all or none.
template <bool ALIGNED>
__device__ __forceinline__ void gemm_copy8(unsigned char *to, const bf16 *from, int valid, bool wanted) {
    if constexpr (ALIGNED) {
        cp_async16_if(shared_address(to), from, valid > 0, wanted);
    } else if (wanted) {
        Vec8<bf16> v;
#pragma unroll
        for (int j = 0; j < 8; ++j) v.at[j] = j < valid ? from[j] : __ushort_as_bfloat16(0);
        *reinterpret_cast<Vec8<bf16> *>(to) = v;
    }
}

// A thread's part in the copies of one matrix's tiles, a 16-byte chunk a pass. K_MAJOR: rows run along k, the tile is
// [WIDTH][64]; else they run along the other dimension (m or n), and the tile is WIDTH / 64 panels of [64][64].
template <bool K_MAJOR, int WIDTH, int THREADS> class GemmCopy {
    static constexpr int CHUNKS = K_MAJOR ? 8 : WIDTH / 8;   // of a row
    static constexpr int ROWS = THREADS / CHUNKS;            // of a pass
    static constexpr int PASSES = (K_MAJOR ? WIDTH : GEMM_BK) / ROWS; // of a tile
    static_assert(PASSES % 4 == 0 && ROWS % 8 == 0, "four equal parts, the same swizzle in each pass");
    const bf16 *from;
    int64_t step;    // elements from a pass to the next
    int wide;        // K_MAJOR: rows left of the matrix from this thread's first on; else elements of its chunk
    uint32_t offset; // of its first chunk in the tile

  public:
    // Before the first tile of a matrix whose other dimension is `size` long; the tiles start at `first` there.
    __device__ __forceinline__ void aim(const bf16 *x, int64_t ld, int first, int size) {
        const int row = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS;
        from = x + (K_MAJOR ? first + row : row) * ld + (K_MAJOR ? 0 : first) + chunk * 8;
        step = ROWS * ld;
        wide = K_MAJOR ? size - first - row : clamp_to_8(size - first - chunk * 8);
        offset = chunk / 8 * (GEMM_BK * 128) + swizzle128(row, chunk % 8);
    }

    // Quarter `part` of a tile, from 0 to 3 in order, if it is `wanted`. `k_left`: columns of k from the tile on.
    template <bool ALIGNED>
    __device__ __forceinline__ void quarter(unsigned char *tile, int part, int k_left, bool wanted) {
        const int row = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS;
#pragma unroll
        for (int i = part * PASSES / 4; i < (part + 1) * PASSES / 4; ++i) {
            const int valid = K_MAJOR ? (i * ROWS < wide ? clamp_to_8(k_left - chunk * 8) : 0)
                                      : (i * ROWS < k_left - row ? wide : 0);
            gemm_copy8<ALIGNED>(tile + offset + i * ROWS * 128, from, valid, wanted);
            from += K_MAJOR && i == PASSES - 1 ? GEMM_BK - (PASSES - 1) * step : step;
        }
    }
};

// The copies of a CTA's tiles, in order: those of the main product, then the pair's.
template <class Tile, bool K_MAJOR, bool ALIGNED, bool MAIN_B> class GemmCopies {
    GemmCopy<true, Tile::BM, Tile::THREADS> a;
    GemmCopy<K_MAJOR, Tile::BN, Tile::THREADS> b;
    int to_main, to_end; // tiles left
    int k_left;

  public:
    __device__ __forceinline__ GemmCopies(const GemmParams &p, int m0, int n0) {
        to_main = ceil_div(p.main.k, GEMM_BK);
        to_end = to_main + ceil_div(p.pair.k, GEMM_BK);
        k_left = p.main.k;
        a.aim(p.main.a, p.main.lda, m0, p.m);
        b.aim(p.main.b, p.main.ldb, n0, p.n);
    }

    // To be called before each tile.
    __device__ __forceinline__ void next(const GemmParams &p, int m0, int n0) {
        if (to_main != 0) return;
        k_left = p.pair.k;
        a.aim(p.pair.a, p.pair.lda, m0, p.m);
        b.aim(p.pair.b, p.pair.ldb, n0, p.n);
    }

    // Quarter `i` of the tile, from 0 to 3 in order; nothing where there is none. The last ends the tile.
    __device__ __forceinline__ void quarter(unsigned char *stage, int i) {
        a.template quarter<ALIGNED>(stage, i, k_left, to_end > 0);
        b.template quarter<ALIGNED>(stage + Tile::A_BYTES, i, k_left, to_end > 0 && (MAIN_B || to_main <= 0));
        if (i < 3) return;
        cp_async_commit();
        --to_main;
        --to_end;
        k_left -= GEMM_BK;
    }
};

// Where the main product's b comes from: memory, in bf16. See nf4_gemm.cu for sources that make it up.
struct Bf16Source {
    static constexpr bool DECODES = false;
    static constexpr size_t SHARED_BYTES = 0;
    static constexpr int CTAS = 1; // of an SM, what the registers must allow
    struct Params {};
    __device__ Bf16Source(const Params &, unsigned char *, int) {}
    __device__ void fetch(int) {}                  // asks for this thread's share of a tile
    __device__ void start() {}                     // what was fetched is decoded next
    __device__ void decode(unsigned char *, int, bool) {} // a quarter of it, to its place in the tile if wanted
};

// One warp's 16 columns of k: fragments of a (WM x 16) and of b (16 x WN).
template <class Tile> struct GemmFragments {
    static constexpr int MI = Tile::WM / 16, NI = Tile::WN / 16;
    uint32_t a[MI][4], b[NI][4];

    // `step` 0 to 3 of the tile; see mma.cuh for which lane names which row.
    template <bool K_MAJOR> __device__ __forceinline__ void load(uint32_t stage, int step) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        const int a_row = warp / Tile::WARPS_N * Tile::WM + lane % 16;
#pragma unroll
        for (int i = 0; i < MI; ++i) ldmatrix_x4(a[i], stage + swizzle128(a_row + 16 * i, 2 * step + lane / 16));
        const uint32_t b_tile = stage + Tile::A_BYTES;
        const int n = warp % Tile::WARPS_N * Tile::WN;
#pragma unroll
        for (int j = 0; j < NI; ++j) {
            if constexpr (K_MAJOR) {
                const int row = n + 16 * j + lane / 16 * 8 + lane % 8;
                ldmatrix_x4(b[j], b_tile + swizzle128(row, 2 * step + lane / 8 % 2));
            } else {
                const int chunk = n / 8 + 2 * j + lane / 16;
                const uint32_t panel = b_tile + chunk / 8 * (GEMM_BK * 128);
                ldmatrix_x4_trans(b[j], panel + swizzle128(16 * step + lane % 16, chunk % 8));
            }
        }
    }

    __device__ __forceinline__ void multiply(float (&acc)[MI][2 * NI][4]) const {
#pragma unroll
        for (int i = 0; i < MI; ++i)
#pragma unroll
            for (int j = 0; j < 2 * NI; ++j) mma_bf16(acc[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
    }
};

// The finished tile, through shared memory so that rows are read and written 16 bytes a thread.
template <class Tile>
__device__ __forceinline__ void gemm_finish(const GemmParams &p, unsigned char *shared,
                                            const float (&acc)[Tile::WM / 16][Tile::WN / 8][4], int m0, int n0) {
    float *tile = reinterpret_cast<float *>(shared);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int row = warp / Tile::WARPS_N * Tile::WM + lane / 4;
    const int col = warp % Tile::WARPS_N * Tile::WN + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < Tile::WM / 16; ++i) {
#pragma unroll
        for (int j = 0; j < Tile::WN / 8; ++j) {
            float *at = tile + (row + 16 * i) * Tile::PITCH + col + 8 * j;
            *reinterpret_cast<float2 *>(at) = make_float2(acc[i][j][0], acc[i][j][1]);
            *reinterpret_cast<float2 *>(at + 8 * Tile::PITCH) = make_float2(acc[i][j][2], acc[i][j][3]);
        }
    }
    __syncthreads();

    constexpr int CHUNKS = Tile::BN / 8;
    const int chunk = threadIdx.x % CHUNKS;
    const int valid = clamp_to_8(p.n - (n0 + chunk * 8));
    const bool vectors = p.c_vectors && valid == 8;
    float bias[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) bias[j] = p.bias && j < valid ? to_f32(p.bias[n0 + chunk * 8 + j]) : 0.0f;
    for (int r = threadIdx.x / CHUNKS; r < Tile::BM && m0 + r < p.m; r += Tile::THREADS / CHUNKS) {
        Vec8<float> v = load_vec8(tile + r * Tile::PITCH + chunk * 8);
#pragma unroll
        for (int j = 0; j < 8; ++j) v.at[j] = fmaf(p.alpha, v.at[j], bias[j]);
        const int64_t at = int64_t(m0 + r) * p.ldc + n0 + chunk * 8;
        if (p.c_f32) {
            float *c = static_cast<float *>(p.c) + at;
            if (vectors) {
                if (p.accumulate) {
                    const Vec8<float> old = load_vec8(c);
#pragma unroll
                    for (int j = 0; j < 8; ++j) v.at[j] += old.at[j];
                }
                store_vec8(c, v);
            } else {
#pragma unroll
                for (int j = 0; j < 8; ++j)
                    if (j < valid) c[j] = p.accumulate ? c[j] + v.at[j] : v.at[j];
            }
        } else {
            bf16 *c = static_cast<bf16 *>(p.c) + at;
            if (vectors) {
                if (p.accumulate) {
                    const Vec8<bf16> old = load_vec8(c);
#pragma unroll
                    for (int j = 0; j < 8; ++j) v.at[j] += to_f32(old.at[j]);
                }
                Vec8<bf16> out;
#pragma unroll
                for (int j = 0; j < 8; ++j) out.at[j] = from_f32<bf16>(v.at[j]);
                store_vec8(c, out);
            } else {
#pragma unroll
                for (int j = 0; j < 8; ++j)
                    if (j < valid) c[j] = from_f32<bf16>(p.accumulate ? to_f32(c[j]) + v.at[j] : v.at[j]);
            }
        }
    }
}

// K_MAJOR: b is (n, k), else (k, n). ALIGNED: every row of a and b starts at 16 bytes and has a multiple of 8 elements.
template <class Tile, class Source, bool K_MAJOR, bool ALIGNED>
__global__ void __launch_bounds__(Tile::THREADS, Source::CTAS)
gemm_kernel(const GemmParams p, const typename Source::Params w) {
    static_assert(Tile::RING_BYTES + Source::SHARED_BYTES <= MAX_SHARED_BYTES, "for cards with 100 KiB an SM");
    static_assert(!Source::DECODES || Tile::THREADS == 2 * Tile::BN, "half a block of 64 a thread and tile");
    extern __shared__ __align__(1024) unsigned char shared[];
    const int tiles_m = ceil_div(p.m, Tile::BM), tiles_n = ceil_div(p.n, Tile::BN);
    const int of_group = GEMM_RASTER_ROWS * tiles_n;
    const int first_m = int(blockIdx.x) / of_group * GEMM_RASTER_ROWS, in_group = int(blockIdx.x) % of_group;
    const int rows = min(tiles_m - first_m, GEMM_RASTER_ROWS);
    const int m0 = (first_m + in_group % rows) * Tile::BM, n0 = in_group / rows * Tile::BN;
    const int main_tiles = ceil_div(p.main.k, GEMM_BK), tiles = main_tiles + ceil_div(p.pair.k, GEMM_BK);

    float acc[Tile::WM / 16][Tile::WN / 8][4];
#pragma unroll
    for (auto &of_row : acc)
#pragma unroll
        for (auto &of_mma : of_row)
#pragma unroll
            for (float &x : of_mma) x = 0.0f;

    Source source(w, shared + Tile::RING_BYTES, n0);
    source.fetch(0);
    GemmCopies<Tile, K_MAJOR, ALIGNED, !Source::DECODES> copies(p, m0, n0);
#pragma unroll
    for (int t = 0; t < Tile::STAGES - 1; ++t) {
        copies.next(p, m0, n0);
#pragma unroll
        for (int i = 0; i < 4; ++i) copies.quarter(shared + t * Tile::STAGE_BYTES, i);
    }
    if constexpr (Source::DECODES) {
        source.start();
        source.fetch(1);
#pragma unroll
        for (int i = 0; i < 4; ++i) source.decode(shared + Tile::A_BYTES, i, true);
    }
    cp_async_wait<Tile::STAGES - 2>();
    __syncthreads();
    GemmFragments<Tile> f[2];
    f[0].template load<K_MAJOR>(shared_address(shared), 0);

    int stage = 0, free_stage = Tile::STAGES - 1;
    for (int t = 0; t < tiles; ++t) {
        // Here tile t is in its stage, its first fragments are in f[0], and everyone has read all of tile t - 1.
        const uint32_t from = shared_address(shared + stage * Tile::STAGE_BYTES);
        unsigned char *const to = shared + free_stage * Tile::STAGE_BYTES;
        free_stage = stage;
        stage = stage + 1 == Tile::STAGES ? 0 : stage + 1;
        const uint32_t next = shared_address(shared + stage * Tile::STAGE_BYTES);
        copies.next(p, m0, n0);
        unsigned char *const decoded = shared + stage * Tile::STAGE_BYTES + Tile::A_BYTES;
        if constexpr (Source::DECODES) {
            source.start();
            source.fetch(t + 2);
        }
        const int depth = t < main_tiles ? p.main.k - t * GEMM_BK : p.pair.k - (t - main_tiles) * GEMM_BK;
        if (depth > GEMM_BK - 16) {
#pragma unroll
            for (int step = 0; step < 3; ++step) {
                f[(step + 1) % 2].template load<K_MAJOR>(from, step + 1);
                f[step % 2].multiply(acc);
                copies.quarter(to, step);
                source.decode(decoded, step, t + 1 < main_tiles);
            }
            copies.quarter(to, 3);
            source.decode(decoded, 3, t + 1 < main_tiles);
        } else {
            // The last tile of a product: a rank of 16 takes a quarter of it. Nothing is decoded behind it.
            f[1] = f[0];
#pragma unroll 1
            for (int step = 1; 16 * step < depth; ++step) {
                f[1].multiply(acc);
                f[1].template load<K_MAJOR>(from, step);
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) copies.quarter(to, i);
        }
        // The last step's products run while the next tile's first fragments are read.
        cp_async_wait<Tile::STAGES - 2>();
        __syncthreads();
        if (t + 1 < tiles) f[0].template load<K_MAJOR>(next, 0);
        f[1].multiply(acc);
    }
    gemm_finish<Tile>(p, shared, acc, m0, n0);
}

template <class Tile, class Source, bool K_MAJOR, bool ALIGNED>
cudaError_t gemm_launch(const GemmParams &p, const typename Source::Params &w, cudaStream_t stream) {
    const auto kernel = gemm_kernel<Tile, Source, K_MAJOR, ALIGNED>;
    constexpr int bytes = int(Tile::RING_BYTES + Source::SHARED_BYTES);
    const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (status != cudaSuccess) return status;
    const int64_t ctas = int64_t(ceil_div(p.m, Tile::BM)) * ceil_div(p.n, Tile::BN);
    if (ctas > INT32_MAX / GEMM_RASTER_ROWS) return cudaErrorInvalidValue;
    kernel<<<unsigned(ctas), Tile::THREADS, bytes, stream>>>(p, w);
    return cudaGetLastError();
}

// The time of all waves of a tile shape, in elements of c an SM.
template <class Tile> double gemm_waves(const GemmParams &p, int sms) {
    const int64_t tiles = int64_t(ceil_div(p.m, Tile::BM)) * ceil_div(p.n, Tile::BN);
    return double(ceil_div<int64_t>(tiles, sms)) * Tile::BM * Tile::BN;
}

// ALIGNED of one product; b's rows have `b_cols` elements (0: there is no b in memory).
inline bool gemm_aligned(const GemmProduct &q, int b_cols) {
    if (q.k == 0) return true;
    const bool a = is_aligned(q.a, 16) && q.lda % 8 == 0 && q.k % 8 == 0;
    return a && (b_cols == 0 || (is_aligned(q.b, 16) && q.ldb % 8 == 0 && b_cols % 8 == 0));
}

// Picks the tile by shape: small ones cost a sixth more, and pay where large ones leave SMs idle. AnySource is for what
// is not all `aligned`.
template <class Source, class AnySource, bool K_MAJOR>
cudaError_t gemm_dispatch(const GemmParams &p, const typename Source::Params &w, bool aligned, cudaStream_t stream) {
    if (!aligned) return gemm_launch<GemmSmall, AnySource, K_MAJOR, false>(p, w, stream);
    int device = 0, sms = 0;
    cudaError_t status = cudaGetDevice(&device);
    if (status == cudaSuccess) status = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
    if (status != cudaSuccess) return status;
    if (gemm_waves<GemmLarge>(p, sms) <= gemm_waves<GemmSmall>(p, sms) * 7 / 6)
        return gemm_launch<GemmLarge, Source, K_MAJOR, true>(p, w, stream);
    return gemm_launch<GemmSmall, Source, K_MAJOR, true>(p, w, stream);
}
