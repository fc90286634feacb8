// What attention.cu and attention_backward.cu share: swizzled tiles of any size, the mask, the limits of a launch.
#pragma once

#include "attention.cuh"
#include "mma.cuh"

constexpr float LOG2E = 1.4426950408889634f;
constexpr float LN2 = 0.6931471805599453f;

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

// What the kernels can do, and count in 32 bits.
template <typename Args> inline bool fits(const Args &a) {
    return a.h > 0 && a.g > 0 && a.h % a.g == 0 && a.b > 0 && a.window > 0 && a.d % 8 == 0 && a.d >= 16 && a.d <= 256 &&
           int64_t(a.t + 64 * int64_t(a.b)) * a.h <= INT32_MAX;
}

inline cudaError_t allow_shared(const void *kernel, int bytes) {
    return bytes <= 48 * 1024 ? cudaSuccess
                              : cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}
