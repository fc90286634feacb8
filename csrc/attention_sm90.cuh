// What the kernels of attention_sm90.cu and attention_sm90_backward.cu share: tiles, products, masks.
//
// A CTA owns 128 queries of one head (forward, dq) or 128 keys of one KV head (dk, dv) and walks over the tiles of the
// other side in order. One warpgroup copies (TMA), two multiply, 64 of the rows each. A stage of tiles goes back and
// forth between them by two mbarriers, full and empty; the two that multiply do not wait for each other. Probabilities
// never leave registers: they come out of one product as sums and go into the next as its A operand.
//
// The last tile of a sequence holds rows of the next one. They count with a probability of exactly 0, so any finite
// values there change nothing; but 0 times NaN or infinity is NaN, so a sequence with such values spoils the one before
// it, too. (A training step with a NaN anywhere ends in an error.)
#pragma once

#include "attention.cuh"
#include "tma.cuh"
#include "wgmma.cuh"

constexpr int THREADS = 384;
constexpr int ROWS = 128; // of the tile that a CTA owns
constexpr float LOG2_E = 1.4426950408889634f;

// A tile in shared memory starts at a multiple of 1024 bytes; the CTA's first tile within the first ALIGNMENT bytes.
constexpr uint32_t ALIGNMENT = 1024;

__host__ __device__ constexpr uint32_t tile_bytes(int rows, int d) { return uint32_t(rows) * d * 2; }

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

__device__ __forceinline__ uint32_t first_tile(uint32_t shared) { return (shared + ALIGNMENT - 1) & ~(ALIGNMENT - 1); }

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Copies R rows of a head into a tile, by one thread; the bytes count on `barrier`. Rows behind the end of a sequence
// are those of the next one, or zeros: what comes of them is masked, or not stored.
template <int R, int D>
__device__ __forceinline__ void copy_tile(uint32_t tile, const CUtensorMap *map, int column, int row,
                                          uint32_t barrier) {
#pragma unroll
    for (int panel = 0; panel < D / 64; ++panel)
        copy_box<false>(tile + panel * (R * 128), map, column + panel * 64, row, barrier, 0);
}

// Waits until `threads` threads have come to barrier `id` of the CTA, or announced that they did.
__device__ __forceinline__ void named_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
}

// d (64 x N) = a bᵀ over D columns: 64 rows from `a` on of a tile of ROWS rows, and a tile of N rows.
template <int D, int HALF_N> __device__ __forceinline__ void product_nt(float (&d)[HALF_N], uint32_t a, uint32_t b) {
#pragma unroll
    for (int k = 0; k < D / 16; ++k)
        wgmma_shared_a(d, descriptor_k_major(a + (k / 4) * (ROWS * 128) + (k % 4) * 32),
                       descriptor_k_major(b + (k / 4) * (2 * HALF_N * 128) + (k % 4) * 32), k > 0);
}

// d (64 x D) += p (64 x 16 S) b: a tile of 16 S rows.
template <int S, int HALF_D>
__device__ __forceinline__ void product_nn(float (&d)[HALF_D], const uint32_t (&p)[S][4], uint32_t b) {
#pragma unroll
    for (int k = 0; k < S; ++k) wgmma_register_a(d, p[k], descriptor_mn_major(b + k * 2048, S * 16 * 128), 1);
}

template <int S> __device__ __forceinline__ void pack(uint32_t (&p)[S][4], const float (&s)[8 * S]) {
#pragma unroll
    for (int k = 0; k < S; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i) p[k][i] = pack_bf16(s[8 * k + 2 * i], s[8 * k + 2 * i + 1]);
}

// Rounds 64 rows of a warpgroup's sums, times the factor of the row, and writes them to rows below `valid` of `to` (row
// 0 of the CTA's tile), by way of a tile in shared memory that nobody reads any more. `warp`: of those that multiply.
template <int D>
__device__ __forceinline__ void store_rows(bf16 *to, size_t ld, int valid, uint8_t *tile, const float (&d)[D / 2],
                                           float factor0, float factor8, int warp) {
    const int lane = threadIdx.x % 32, first = warp * 16;
    const int row = first + lane / 4;
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
        uint8_t *at = tile + (n / 8) * (ROWS * 128) + swizzle128(row, n % 8) + 4 * (lane % 4);
        *reinterpret_cast<uint32_t *>(at) = pack_bf16(d[4 * n] * factor0, d[4 * n + 1] * factor0);
        *reinterpret_cast<uint32_t *>(at + 8 * 128) = pack_bf16(d[4 * n + 2] * factor8, d[4 * n + 3] * factor8);
    }
    __syncwarp(); // a warp reads back what it wrote itself
    constexpr int CHUNKS = D / 8;
#pragma unroll
    for (int i = 0; i < CHUNKS / 2; ++i) {
        const int r = first + (i * 32 + lane) / CHUNKS, chunk = lane % CHUNKS;
        const uint8_t *at = tile + (chunk / 8) * (ROWS * 128) + swizzle128(r, chunk % 8);
        if (r < valid) *reinterpret_cast<uint4 *>(to + r * ld + chunk * 8) = *reinterpret_cast<const uint4 *>(at);
    }
}

// What belongs to a warp's rows (queries) and to keys from `key0` on that they do not see becomes `hidden`.
template <int HALF_N>
__device__ __forceinline__ void mask_keys(float (&s)[HALF_N], int key0, int warp_row, int window, float hidden) {
    if (key0 + 2 * HALF_N - 1 <= warp_row && key0 > warp_row + 15 - window) return;
    const int row = warp_row + threadIdx.x % 32 / 4, key = key0 + threadIdx.x % 4 * 2;
#pragma unroll
    for (int n = 0; n < HALF_N; ++n) {
        const int j = key + n / 4 * 8 + n % 2, i = row + n % 4 / 2 * 8;
        if (j > i || j <= i - window) s[n] = hidden;
    }
}

// The same where rows are keys and columns, from `query0` on, queries.
template <int HALF_N>
__device__ __forceinline__ void mask_queries(float (&s)[HALF_N], int query0, int warp_row, int window, int len,
                                             float hidden) {
    const int last = query0 + 2 * HALF_N - 1;
    if (warp_row + 15 <= query0 && warp_row > last - window && last < len) return;
    const int row = warp_row + threadIdx.x % 32 / 4, query = query0 + threadIdx.x % 4 * 2;
#pragma unroll
    for (int n = 0; n < HALF_N; ++n) {
        const int i = query + n / 4 * 8 + n % 2, j = row + n % 4 / 2 * 8;
        if (j > i || j <= i - window || i >= len) s[n] = hidden;
    }
}

// One tile of the running softmax, for the two rows of the thread: s becomes exp2(c s - c top), `sum` takes it in, and
// `rescale` is what earlier sums must be multiplied by. `sum` is of this lane's columns alone.
template <int HALF_N>
__device__ __forceinline__ void softmax_tile(float (&s)[HALF_N], float (&top)[2], float (&sum)[2], float (&rescale)[2],
                                             float c) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float m0 = top[half], m1 = top[half];
#pragma unroll
        for (int n = 2 * half; n < HALF_N; n += 4) {
            m0 = fmaxf(m0, s[n]);
            m1 = fmaxf(m1, s[n + 1]);
        }
        const float m = lanes_max<4>(fmaxf(m0, m1));
        const float shift = m == -INFINITY ? 0.0f : m * c; // a row that saw no key yet
        rescale[half] = exp2_fast(top[half] * c - shift);
        top[half] = m;
        float sum0 = 0.0f, sum1 = 0.0f;
#pragma unroll
        for (int n = 2 * half; n < HALF_N; n += 4) {
            s[n] = exp2_fast(fmaf(s[n], c, -shift));
            s[n + 1] = exp2_fast(fmaf(s[n + 1], c, -shift));
            sum0 += s[n];
            sum1 += s[n + 1];
        }
        sum[half] = fmaf(sum[half], rescale[half], sum0 + sum1);
    }
}

__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(FULL_WARP, x, 1);
    return x + __shfl_xor_sync(FULL_WARP, x, 2);
}

#endif // __CUDA_ARCH_FEAT_SM90_ALL

// Hopper alone has the instructions, and only the code for sm_90a holds them.
inline cudaError_t check_device() {
    int device = 0, major = 0;
    cudaError_t status = cudaGetDevice(&device);
    if (status == cudaSuccess) status = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (status != cudaSuccess) return status;
    return major == 9 ? cudaSuccess : cudaErrorNoKernelImageForDevice;
}

// `cluster` CTAs to a cluster; the grid is a multiple of it.
template <typename... A>
cudaError_t launch(void (*kernel)(A...), size_t ctas, size_t shared_bytes, int cluster, cudaStream_t stream,
                   const A &...args) {
    if (ctas > 0x7fffffff) return cudaErrorInvalidValue;
    cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
    if (status != cudaSuccess) return status;
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = unsigned(cluster);
    attribute.val.clusterDim.y = 1;
    attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(unsigned(ctas));
    config.blockDim = dim3(THREADS);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = cluster > 1 ? 1 : 0;
    status = cudaLaunchKernelEx(&config, kernel, args...);
    return status == cudaSuccess ? cudaGetLastError() : status;
}
