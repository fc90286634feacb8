// The product with a 4-bit weight, decoded on its way to the tensor cores: its bf16 form never lies in device memory.
// The main loop is gemm.cuh's; here is the source of its b tiles.

#include "gemm.cuh"
#include "nf4.cuh"

struct Nf4GemmWeight {
    const uint8_t *packed;
    Nf4Absmax absmax;
    QuantType quant_type;
    int n, k;
};

namespace {

// The share of a thread: half a block, 32 weights. A tile is panels of rows of 64 weights: forward one panel of BN rows
// (n), backward BN / 64 panels of 64 rows (n), side by side along k.
template <bool FORWARD> struct Share {
    int row, col; // in the tile; col is where the half block starts

    __device__ Share() {
        const int r = threadIdx.x / 2;
        row = FORWARD ? r : r % GEMM_BK;
        col = (FORWARD ? 0 : r / GEMM_BK * NF4_BLOCK) + threadIdx.x % 2 * 32;
    }

    // The place in the tile of its 8 weights number `part`.
    __device__ __forceinline__ unsigned char *at(unsigned char *tile, int part) const {
        return tile + col / NF4_BLOCK * (GEMM_BK * 128) + swizzle128(row, col % NF4_BLOCK / 8 + part);
    }
};

// Where k is a multiple of 64: a row of the tile is one block. A thread rounds the 16 values that its block can take to
// bf16, keeps their low and their high bytes in four registers each, and picks bytes by code (PRMT), four weights at a
// time. Packed weights and absmax are fetched into registers two tiles ahead.
template <bool FORWARD> class Nf4Source {
  public:
    static constexpr bool DECODES = true;
    static constexpr size_t SHARED_BYTES = (16 + 256) * sizeof(float);
    static constexpr int CTAS = 1;
    using Params = Nf4GemmWeight;

    __device__ Nf4Source(const Params &w, unsigned char *shared, int n0) : w(w) {
        book = reinterpret_cast<float *>(shared);
        dynamic = book + 16;
        if (threadIdx.x < 16) book[threadIdx.x] = NF4_CODE_BOOK[int(w.quant_type)][threadIdx.x];
        for (int i = threadIdx.x; i < 256; i += blockDim.x) dynamic[i] = NF4_DYNAMIC_CODE[i];
        __syncthreads();
        offset = w.absmax.absmax ? 0.0f : __ldg(w.absmax.offset);
        n = share.row + (FORWARD ? n0 : 0);
        const int k = share.col + (FORWARD ? 0 : n0);
        inside = FORWARD ? n < w.n : k < w.k;
        first = int64_t(n) * w.k + k;
    }

    __device__ __forceinline__ void fetch(int tile) {
        next = make_uint4(0, 0, 0, 0);
        next_code = -1;
        next_absmax = 0.0f;
        if (!inside || (FORWARD ? tile * GEMM_BK >= w.k : tile * GEMM_BK + n >= w.n)) return;
        const int64_t at = first + int64_t(tile) * GEMM_BK * (FORWARD ? 1 : w.k), block = at / NF4_BLOCK;
        next = __ldg(reinterpret_cast<const uint4 *>(w.packed + at / 2));
        if (w.absmax.absmax) {
            next_absmax = __ldg(w.absmax.absmax + block);
        } else {
            next_code = __ldg(w.absmax.codes + block);
            next_absmax = __ldg(w.absmax.nested_absmax + block / NF4_NESTED_BLOCK);
        }
    }

    __device__ __forceinline__ void start() {
        word[0] = next.x, word[1] = next.y, word[2] = next.z, word[3] = next.w;
        // As nf4_absmax: a rounded product and a rounded sum.
        const float absmax =
            next_code < 0 ? next_absmax : __fadd_rn(__fmul_rn(dynamic[next_code], next_absmax), offset);
#pragma unroll
        for (int q = 0; q < 4; ++q) {
            const float4 v = reinterpret_cast<const float4 *>(book)[q];
            const uint32_t a = pack_bf16(__fmul_rn(v.x, absmax), __fmul_rn(v.y, absmax));
            const uint32_t b = pack_bf16(__fmul_rn(v.z, absmax), __fmul_rn(v.w, absmax));
            low[q] = __byte_perm(a, b, 0x6420);
            high[q] = __byte_perm(a, b, 0x7531);
        }
    }

    __device__ __forceinline__ void decode(unsigned char *tile, int part, bool wanted) const {
        // Of each nibble the lower 3 bits pick among 8 values, twice, and the upper bit picks one of the two.
        const uint32_t lower = word[part] & 0x77777777u, upper = (word[part] >> 1 & 0x44444444u) | 0x32103210u;
        uint32_t out[4];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const uint32_t l = four_bytes(low, lower >> 16 * h, upper >> 16 * h);
            const uint32_t u = four_bytes(high, lower >> 16 * h, upper >> 16 * h);
            // A byte holds its first weight in the upper nibble.
            out[2 * h] = __byte_perm(l, u, 0x4051);
            out[2 * h + 1] = __byte_perm(l, u, 0x6273);
        }
        store_shared16(shared_address(share.at(tile, part)), out, wanted);
    }

  private:
    __device__ static __forceinline__ uint32_t four_bytes(const uint32_t (&table)[4], uint32_t lower, uint32_t upper) {
        return __byte_perm(__byte_perm(table[0], table[1], lower), __byte_perm(table[2], table[3], lower), upper);
    }

    const Params &w;
    float *book, *dynamic; // in shared memory: the code book, and the code of double quantisation
    Share<FORWARD> share;
    float offset;
    int n;         // row of w in tile 0
    bool inside;   // whether this thread's rows (forward) or columns (backward) exist
    int64_t first; // flat index of its first weight in tile 0
    uint4 next;
    int next_code; // -1: next_absmax is the absmax
    float next_absmax;
    uint32_t word[4], low[4], high[4];
};

// For any k, where blocks straddle rows and rows start inside bytes: a weight at a time.
template <bool FORWARD> class Nf4AnySource {
  public:
    static constexpr bool DECODES = true;
    static constexpr size_t SHARED_BYTES = 0;
    static constexpr int CTAS = 1;
    using Params = Nf4GemmWeight;

    __device__ Nf4AnySource(const Params &w, unsigned char *, int n0) : w(w), n0(n0) {}
    __device__ void fetch(int) {}
    __device__ void start() { ++tile; }

    __device__ __forceinline__ void decode(unsigned char *to, int part, bool wanted) const {
        if (!wanted) return;
        const int n = share.row + (FORWARD ? n0 : tile * GEMM_BK);
        const int k = share.col + 8 * part + (FORWARD ? tile * GEMM_BK : n0);
        uint32_t *out = reinterpret_cast<uint32_t *>(share.at(to, part));
#pragma unroll 1
        for (int j = 0; j < 4; ++j) out[j] = pack_bf16(value(n, k + 2 * j), value(n, k + 2 * j + 1));
    }

  private:
    __device__ __forceinline__ float value(int n, int k) const {
        if (n >= w.n || k >= w.k) return 0.0f;
        const int64_t at = int64_t(n) * w.k + k, block = at / NF4_BLOCK;
        const uint32_t code = __ldg(w.packed + at / 2) >> (at % 2 == 0 ? 4 : 0) & 15u;
        const float absmax = w.absmax.absmax ? nf4_absmax<false>(w.absmax, block) : nf4_absmax<true>(w.absmax, block);
        return __fmul_rn(NF4_CODE_BOOK[int(w.quant_type)][code], absmax);
    }

    const Params &w;
    int n0, tile = -1;
    Share<FORWARD> share;
};

} // namespace

// nf4_gemm    forward   c = a·Wᵀ + a2·b2ᵀ + bias + c      backward   c = a·W + a2·b2 + bias + c
//
//   c       (m, n) forward, (m, k) backward   bf16  =, or += where `accumulate`; rows ldc apart
//   a       (m, k) forward, (m, n) backward   bf16, rows lda apart
//   W       (n, k) in 4 bits: packed (ceil(n k / 2)) u8, absmax: see Nf4Absmax. Decoded to the bits of nf4_dequantize
//   a2      (m, k2)                           bf16, rows lda2 apart; k2 = 0: no second product
//   b2      (n, k2) forward, (k2, k) backward bf16, rows ldb2 apart
//   bias    (n) forward, (k) backward         bf16 or null
//
// The bits of gemm on the dequantised weight: the same sums in the same order. No atomics. Fast where k is a multiple
// of 64 and the rows of a, a2, b2 start at 16 bytes and have multiples of 8 elements. m = 0: no launch.
// Floor: 2 m (n k + k2 * columns of c) flops; a weight is decoded once for each 128 rows of c, in 3.4 instructions.
struct Nf4Gemm {
    __nv_bfloat16 *c;
    const __nv_bfloat16 *a;
    const uint8_t *packed;
    Nf4Absmax absmax;
    const __nv_bfloat16 *a2, *b2, *bias;
    int64_t ldc, lda, lda2, ldb2;
    int32_t m, n, k, k2;
    int32_t accumulate, backward;
    QuantType quant_type;
    int32_t unused;
};
static_assert(sizeof(Nf4Gemm) == 144, "as in src/backend/cuda/ffi/nf4_gemm.rs");

HALFBYTE_API cudaError_t nf4_gemm(const Nf4Gemm *args, cudaStream_t stream) {
    const Nf4Gemm &g = *args;
    if (g.m == 0) return cudaSuccess;
    GemmParams p{};
    p.c = g.c;
    p.ldc = g.ldc;
    p.main = {g.a, nullptr, g.lda, 0, g.backward ? g.n : g.k};
    p.pair = {g.a2, g.b2, g.lda2, g.ldb2, g.k2};
    p.bias = g.bias;
    p.alpha = 1.0f;
    p.m = g.m;
    p.n = g.backward ? g.k : g.n;
    p.accumulate = g.accumulate != 0;
    p.c_f32 = false;
    p.c_vectors = is_aligned(g.c, 16) && g.ldc % 8 == 0;
    const Nf4GemmWeight w{g.packed, g.absmax, g.quant_type, g.n, g.k};
    const bool aligned = gemm_aligned(p.main, 0) && gemm_aligned(p.pair, g.backward ? g.k : g.k2) &&
                         g.k % NF4_BLOCK == 0 && is_aligned(g.packed, 16);
    return g.backward ? gemm_dispatch<Nf4Source<false>, Nf4AnySource<false>, false>(p, w, aligned, stream)
                      : gemm_dispatch<Nf4Source<true>, Nf4AnySource<true>, true>(p, w, aligned, stream);
}
