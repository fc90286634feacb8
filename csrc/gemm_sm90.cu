// The bf16 matrix product on Hopper: tensor copies (TMA) by one thread, wgmma by two warpgroups, a persistent grid.
//
// A CTA makes tiles of c of 128 rows and BN columns, 64 rows to a warpgroup, from stages of 64 k. Two CTAs of a cluster
// work on tiles one above the other and share b: each copies half of it to both. Tiles run down strips of GROUP tiles
// of rows, so that what is in work at one time reads few rows of a and b.

#include "gemm_args.cuh"
#include "tma.cuh"
#include "wgmma.cuh"

namespace {

constexpr int BM = 128, BK = 64;
constexpr int THREADS = 384; // a warpgroup that copies, two that multiply
constexpr int CLUSTER = 2;
constexpr int GROUP = 16;
constexpr uint32_t A_BYTES = BM * BK * 2;
constexpr uint32_t STAGING_BYTES = 16 * 128; // a warp: 16 rows of 64 columns of c
constexpr uint32_t ALIGNMENT = 1024;

__host__ __device__ constexpr int stages(int bn) { return bn == 256 ? 4 : bn == 192 ? 5 : 6; }
constexpr uint32_t shared_bytes(int bn) {
    return ALIGNMENT + stages(bn) * (A_BYTES + bn * BK * 2) + 8 * STAGING_BYTES + 2 * stages(bn) * 8;
}

struct Maps {
    CUtensorMap a, b, a2, b2;
};

struct Problem {
    void *c;
    const bf16 *bias;
    int64_t ldc;
    int32_t m, n;
    int32_t k_tiles, k_tiles_all; // of the main product, of both
    int32_t last_steps;           // steps of 16 k in the last of them
    int32_t group;                // tiles of rows in a strip, a multiple of CLUSTER
    int32_t tiles_m, tiles_n;     // tiles_m a multiple of CLUSTER
    float alpha;
    int32_t accumulate, c_f32;
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// Adds to 64 columns of sums, as a warp holds 16 rows of them, the rest of the formula, and writes them as bf16. `row`
// and `column` are of the warp's first element.
template <bool ACCUMULATE>
__device__ __forceinline__ void store_bf16(const Problem &p, const float *d, int row, int column, uint8_t *staging) {
    const int lane = threadIdx.x % 32, g = lane / 4, i = lane % 4;
    const int r0 = lane / 8, chunk = lane % 8; // of 16-byte accesses to c: rows r0, r0 + 4..
    bf16 *c = static_cast<bf16 *>(p.c) + row * p.ldc + column + r0 * p.ldc + chunk * 8;
    const int rows = chunk * 8 < p.n - column ? p.m - row - r0 : 0; // n is a multiple of 8
    if (ACCUMULATE) {
#pragma unroll
        for (int r = 0; r < 16; r += 4)
            if (r < rows)
                *reinterpret_cast<uint4 *>(staging + swizzle128(r0 + r, chunk)) =
                    *reinterpret_cast<const uint4 *>(c + r * p.ldc);
        __syncwarp();
    }
#pragma unroll
    for (int n = 0; n < 8; ++n) {
        float2 bias = {0.0f, 0.0f};
        if (p.bias && n * 8 < p.n - column)
            bias = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162 *>(p.bias + column + n * 8 + 2 * i));
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            uint32_t *at = reinterpret_cast<uint32_t *>(staging + swizzle128(g + 8 * half, n) + 4 * i);
            float x = fmaf(d[4 * n + 2 * half], p.alpha, bias.x), y = fmaf(d[4 * n + 2 * half + 1], p.alpha, bias.y);
            if (ACCUMULATE) {
                const float2 old = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162 *>(at));
                x += old.x;
                y += old.y;
            }
            *at = pack_bf16(x, y);
        }
    }
    __syncwarp();
#pragma unroll
    for (int r = 0; r < 16; r += 4)
        if (r < rows)
            *reinterpret_cast<uint4 *>(c + r * p.ldc) =
                *reinterpret_cast<const uint4 *>(staging + swizzle128(r0 + r, chunk));
    __syncwarp(); // before the next 64 columns are staged
}

__device__ __forceinline__ void store_f32(const Problem &p, const float *d, int row, int column) {
    const int lane = threadIdx.x % 32, g = lane / 4, i = lane % 4;
#pragma unroll
    for (int n = 0; n < 8; ++n) {
        const int at = column + n * 8 + 2 * i;
        if (at >= p.n) continue;
        const float2 bias = p.bias ? __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162 *>(p.bias + at))
                                   : make_float2(0.0f, 0.0f);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int r = row + g + 8 * half;
            if (r >= p.m) continue;
            float2 *c = reinterpret_cast<float2 *>(static_cast<float *>(p.c) + r * p.ldc + at);
            float x = fmaf(d[4 * n + 2 * half], p.alpha, bias.x), y = fmaf(d[4 * n + 2 * half + 1], p.alpha, bias.y);
            if (p.accumulate) {
                x += c->x;
                y += c->y;
            }
            *c = make_float2(x, y);
        }
    }
}

// The first row and column of a tile of c.
__device__ __forceinline__ int2 tile_at(const Problem &p, int bn, int index) {
    const int strip = index / (p.group * p.tiles_n), first = strip * p.group;
    const int height = min(p.group, p.tiles_m - first), rest = index - first * p.tiles_n;
    return {(first + rest % height) * BM, rest / height * bn};
}

#endif // __CUDA_ARCH_FEAT_SM90_ALL

// B_MN: b is (k, n), and its tile BN / 64 panels of 64 k and 64 columns; else (n, k), one panel of BN rows and 64 k.
template <int BN, bool B_MN>
__global__ void __launch_bounds__(THREADS, 1) gemm_sm90_kernel(const __grid_constant__ Maps maps, const Problem p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    constexpr int STAGES = stages(BN);
    constexpr uint32_t B_BYTES = BN * BK * 2, STAGE_BYTES = A_BYTES + B_BYTES;
    extern __shared__ uint8_t shared[];
    const uint32_t base = (shared_address(shared) + ALIGNMENT - 1) & ~(ALIGNMENT - 1);
    const uint32_t staging = base + STAGES * STAGE_BYTES;
    const uint32_t full = staging + 8 * STAGING_BYTES, empty = full + STAGES * 8;

    const uint32_t rank = cluster_rank();
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; ++s) {
            barrier_init(full + 8 * s, 1);
            barrier_init(empty + 8 * s, 2 * CLUSTER); // the warpgroups that read what this CTA's copies write
        }
        barrier_init_fence();
    }
    cluster_sync();

    const int first = blockIdx.x / CLUSTER, step = gridDim.x / CLUSTER;
    const int tiles = p.tiles_m * p.tiles_n / CLUSTER;
    int stage = 0, parity = 0;
    if (threadIdx.x < 128) {
        registers_down<40>();
        if (threadIdx.x == 0) {
            constexpr uint16_t ALL = (1 << CLUSTER) - 1;
            for (int t = first; t < tiles; t += step) {
                const int2 at = tile_at(p, BN, t * CLUSTER + rank);
                for (int kt = 0; kt < p.k_tiles_all; ++kt) {
                    const bool pair = kt >= p.k_tiles;
                    const int k = (pair ? kt - p.k_tiles : kt) * BK;
                    const CUtensorMap *map_b = pair ? &maps.b2 : &maps.b;
                    const uint32_t a = base + stage * STAGE_BYTES, b = a + A_BYTES, arrived = full + 8 * stage;
                    barrier_wait(empty + 8 * stage, parity ^ 1);
                    barrier_expect(arrived, STAGE_BYTES);
                    copy_box<false>(a, pair ? &maps.a2 : &maps.a, k, at.x, arrived, 0);
                    if (B_MN) {
                        const int row = rank * (BK / CLUSTER);
#pragma unroll
                        for (int i = 0; i < BN / 64; ++i)
                            copy_box<true>(b + (i * BK + row) * 128, map_b, at.y + i * 64, k + row, arrived, ALL);
                    } else {
                        const int row = rank * (BN / CLUSTER);
                        copy_box<true>(b + row * 128, map_b, k, at.y + row, arrived, ALL);
                    }
                    if (++stage == STAGES) stage = 0, parity ^= 1;
                }
            }
        }
    } else {
        registers_up<232>();
        const int warp = threadIdx.x / 32 - 4, half = warp / 4;
        uint8_t *own_staging = shared + (staging - shared_address(shared)) + warp * STAGING_BYTES;
        // The thread that tells both CTAs that this warpgroup is done with a stage: one thread a CTA.
        const int tells = threadIdx.x % 128;
        float d[BN / 2] = {};
        for (int t = first; t < tiles; t += step) {
            const auto product = [&](int k, int accumulate) {
                const uint32_t a = base + stage * STAGE_BYTES + half * (64 * 128);
                const uint32_t b = base + stage * STAGE_BYTES + A_BYTES;
                const uint64_t of_b =
                    B_MN ? descriptor_mn_major(b + k * 2048, BK * 128) : descriptor_k_major(b + k * 32);
                wgmma_shared_a<B_MN>(d, descriptor_k_major(a + k * 32), of_b, accumulate);
            };
            int last = -1;
            // The products of a stage are awaited, and the stage given back, when those of the next are on their way.
            const auto finish = [&] {
                wgmma_commit();
                wgmma_wait<1>();
                if (last >= 0 && tells < CLUSTER) barrier_arrive_at(empty + 8 * last, tells);
                last = stage;
                if (++stage == STAGES) stage = 0, parity ^= 1;
            };
            for (int kt = 0; kt + 1 < p.k_tiles_all; ++kt) {
                barrier_wait(full + 8 * stage, parity);
                wgmma_fence();
#pragma unroll
                for (int k = 0; k < BK / 16; ++k) product(k, kt + k);
                finish();
            }
            barrier_wait(full + 8 * stage, parity);
#pragma unroll 1
            for (int k = 0; k + 1 < p.last_steps; ++k) {
                wgmma_fence();
                product(k, p.k_tiles_all - 1 + k);
            }
            wgmma_fence();
            product(p.last_steps - 1, p.k_tiles_all + p.last_steps - 2);
            finish();
            wgmma_wait<0>();
            pin(d);
            if (tells < CLUSTER) barrier_arrive_at(empty + 8 * last, tells);

            const int2 at = tile_at(p, BN, t * CLUSTER + rank);
            const int row = at.x + warp * 16;
#pragma unroll
            for (int q = 0; q < BN / 64; ++q) {
                if (row >= p.m || at.y + q * 64 >= p.n) continue;
                if (p.c_f32) store_f32(p, d + q * 32, row, at.y + q * 64);
                else if (p.accumulate) store_bf16<true>(p, d + q * 32, row, at.y + q * 64, own_staging);
                else store_bf16<false>(p, d + q * 32, row, at.y + q * 64, own_staging);
            }
        }
    }
    __syncwarp();
    cluster_sync(); // a CTA must not be gone while the other still writes to it
#else
    __trap();
#endif
}

template <int BN, bool B_MN> cudaError_t launch(const Gemm &g, int group, int sms, cudaStream_t stream) {
    Maps maps;
    // A CTA copies its half of b.
    const auto map_b = [&](CUtensorMap *map, const bf16 *b, int k, int64_t ld) {
        return B_MN ? tensor_map(map, b, k, g.n, ld, BK / CLUSTER) : tensor_map(map, b, g.n, k, ld, BN / CLUSTER);
    };
    cudaError_t status = tensor_map(&maps.a, g.a, g.m, g.k, g.lda, BM);
    if (status == cudaSuccess) status = map_b(&maps.b, g.b, g.k, g.ldb);
    maps.a2 = maps.a;
    maps.b2 = maps.b;
    if (status == cudaSuccess && g.k2 > 0) status = tensor_map(&maps.a2, g.a2, g.m, g.k2, g.lda2, BM);
    if (status == cudaSuccess && g.k2 > 0) status = map_b(&maps.b2, g.b2, g.k2, g.ldb2);
    if (status != cudaSuccess) return status;

    Problem p{};
    p.c = g.c;
    p.bias = g.bias;
    p.ldc = g.ldc;
    p.m = g.m;
    p.n = g.n;
    p.k_tiles = ceil_div(g.k, BK);
    p.k_tiles_all = p.k_tiles + ceil_div(g.k2, BK);
    p.last_steps = ((g.k2 > 0 ? g.k2 : g.k) - 1) % BK / 16 + 1;
    p.tiles_m = ceil_div(g.m, BM * CLUSTER) * CLUSTER;
    p.tiles_n = ceil_div(g.n, BN);
    p.group = group;
    p.alpha = g.alpha;
    p.accumulate = g.accumulate;
    p.c_f32 = g.c_dtype == Dtype::F32;

    const auto kernel = gemm_sm90_kernel<BN, B_MN>;
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes(BN));
    if (status != cudaSuccess) return status;
    const int64_t tiles = int64_t(p.tiles_m) * p.tiles_n;
    if (tiles > 0x7fffffff) return cudaErrorInvalidValue;
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = CLUSTER;
    cluster.val.clusterDim.y = 1;
    cluster.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    const int64_t ctas = sms / CLUSTER * CLUSTER;
    config.gridDim = dim3(unsigned(tiles < ctas ? tiles : ctas));
    config.blockDim = dim3(THREADS);
    config.dynamicSmemBytes = shared_bytes(BN);
    config.stream = stream;
    config.attrs = &cluster;
    config.numAttrs = 1;
    status = cudaLaunchKernelEx(&config, kernel, maps, p);
    return status == cudaSuccess ? cudaGetLastError() : status;
}

cudaError_t launch_width(const Gemm &g, int bn, int sms, cudaStream_t stream, int group = GROUP) {
    const bool nt = g.b_transposed != 0;
    switch (bn) {
    case 256: return nt ? launch<256, false>(g, group, sms, stream) : launch<256, true>(g, group, sms, stream);
    case 192: return nt ? launch<192, false>(g, group, sms, stream) : launch<192, true>(g, group, sms, stream);
    default: return nt ? launch<128, false>(g, group, sms, stream) : launch<128, true>(g, group, sms, stream);
    }
}

bool rows_aligned(const bf16 *x, int64_t ld) { return is_aligned(x, 16) && ld % 8 == 0; }

} // namespace

// gemm_sm90    as gemm, on a Hopper card, where pointers and rows of a, b, a2, b2 and c start at 16 bytes and n is a
// multiple of 8; cudaErrorNotSupported otherwise. The order of the sum is wgmma's: not the bits of gemm, the same in
// every run.
HALFBYTE_API cudaError_t gemm_sm90(const Gemm *args, cudaStream_t stream) {
    const Gemm &g = *args;
    if (g.m == 0 || g.n == 0) return cudaSuccess;
    if (g.c_dtype != Dtype::F32 && g.c_dtype != Dtype::Bf16) return cudaErrorInvalidValue;
    const bool aligned = rows_aligned(g.a, g.lda) && rows_aligned(g.b, g.ldb) && is_aligned(g.c, 16) &&
                         g.ldc % 8 == 0 && g.n % 8 == 0 && is_aligned(g.bias, 4) &&
                         (g.k2 == 0 || (rows_aligned(g.a2, g.lda2) && rows_aligned(g.b2, g.ldb2)));
    if (!aligned) return cudaErrorNotSupported;
    int device = 0, major = 0, sms = 0;
    cudaError_t status = cudaGetDevice(&device);
    if (status == cudaSuccess) status = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (status == cudaSuccess) status = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
    if (status != cudaSuccess) return status;
    if (major != 9) return cudaErrorNoKernelImageForDevice;

    // The time of each width is its tiles in a row on one SM times its work; narrow tiles take a little more for
    // theirs.
    int best = 256;
    int64_t least = INT64_MAX;
    for (const int bn : {256, 192, 128}) {
        const int64_t tiles = int64_t(ceil_div(g.m, BM * CLUSTER)) * CLUSTER * ceil_div(g.n, bn);
        const int64_t time = ceil_div<int64_t>(tiles, sms / CLUSTER * CLUSTER) * (bn + 16);
        if (time < least) least = time, best = bn;
    }
    return launch_width(g, best, sms, stream);
}
