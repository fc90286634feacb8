// 4-bit quantisation and back, bit for bit as bitsandbytes does it (NF4 and FP4, blocks of 64). See nf4.cuh for the format.

#include "nf4.cuh"

namespace {

constexpr int THREADS = 256;
constexpr int PER_THREAD = 8; // elements a thread holds at a time: 8 lanes share a block of 64
constexpr size_t PER_CTA = size_t(THREADS) * PER_THREAD;

// Passes of a dequantising thread, all loads before the first store: one pass leaves too few loads in flight.
constexpr int PASSES = 4;

constexpr int SUM_MAX_CTAS = 256; // of nf4_absmax_sum; a CTA of nf4_double_quantize adds them up, one a thread

// Below this an absmax counts as this, so that a block of zeros stays zeros (bitsandbytes' clamp).
constexpr float TINY = 1e-38f;

// Number of the 15 midpoints that lie below s, by bisection. Lane l holds midpoint l % 16: no divergent memory reads.
__device__ __forceinline__ uint32_t rank_of(float s, float midpoint) {
    uint32_t rank = 0;
#pragma unroll
    for (uint32_t step = 8; step > 0; step /= 2)
        if (s > __shfl_sync(FULL_WARP, midpoint, rank + step - 1, 16)) rank += step;
    return rank;
}

template <QuantType Q> __device__ __forceinline__ uint32_t code_of_rank(uint32_t rank) {
    return Q == QuantType::Nf4 ? rank : uint32_t(FP4_CODE_OF_RANK >> (4 * rank)) & 15u;
}

template <typename T, QuantType Q>
__global__ void __launch_bounds__(THREADS)
nf4_quantize_kernel(uint8_t *__restrict__ packed, float *__restrict__ absmax, const T *__restrict__ x, size_t n) {
    const int lane = threadIdx.x % 16;
    const float *sorted = NF4_SORTED[int(Q)];
    const float midpoint = lane < 15 ? (sorted[lane] + sorted[lane + 1]) * 0.5f : 0.0f;

    const size_t first = blockIdx.x * PER_CTA + threadIdx.x * PER_THREAD;
    const bool whole = first + PER_THREAD <= n;
    float v[PER_THREAD];
    if (whole) {
        const Vec8<T> raw = load_vec8(x + first);
#pragma unroll
        for (int j = 0; j < PER_THREAD; ++j) v[j] = to_f32(raw.at[j]);
    } else {
#pragma unroll
        for (int j = 0; j < PER_THREAD; ++j) v[j] = first + j < n ? to_f32(x[first + j]) : 0.0f;
    }

    float largest = 0.0f;
#pragma unroll
    for (int j = 0; j < PER_THREAD; ++j) largest = fmaxf(largest, fabsf(v[j]));
    largest = lanes_max<NF4_BLOCK / PER_THREAD>(largest);
    const float inverse = __frcp_rn(fmaxf(largest, TINY));

    uint32_t word = 0;
#pragma unroll
    for (int j = 0; j < PER_THREAD; ++j)
        word |= code_of_rank<Q>(rank_of(__fmul_rn(v[j], inverse), midpoint)) << nf4_shift(j);

    if (whole) {
        reinterpret_cast<uint32_t *>(packed)[first / PER_THREAD] = word;
    } else {
        for (int b = 0; b < PER_THREAD / 2; ++b)
            if (first + 2 * b < n) packed[first / 2 + b] = uint8_t(word >> (8 * b));
    }
    if (first % NF4_BLOCK == 0 && first < n) absmax[first / NF4_BLOCK] = largest;
}

// Sum over the CTA, the same in every run; all threads get it.
__device__ double cta_sum(double x) {
    __shared__ double of_warp[THREADS / 32];
    x = warp_sum(x);
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = x;
    __syncthreads();
    double sum = 0.0;
#pragma unroll
    for (int w = 0; w < THREADS / 32; ++w) sum += of_warp[w];
    return sum;
}

__global__ void __launch_bounds__(THREADS)
nf4_absmax_sum_kernel(double *__restrict__ partial, const float *__restrict__ absmax, size_t blocks) {
    double sum = 0.0;
    for (size_t i = blockIdx.x * size_t(THREADS) + threadIdx.x; i < blocks; i += size_t(gridDim.x) * THREADS)
        sum += absmax[i];
    sum = cta_sum(sum);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// One CTA a nested block, one thread an absmax.
__global__ void __launch_bounds__(NF4_NESTED_BLOCK)
nf4_double_quantize_kernel(uint8_t *__restrict__ codes, float *__restrict__ nested_absmax, float *__restrict__ offset,
                           const double *__restrict__ partial, int partials, const float *__restrict__ absmax,
                           size_t blocks) {
    static_assert(NF4_NESTED_BLOCK == THREADS && SUM_MAX_CTAS <= THREADS, "one thread each");
    __shared__ float midpoint[NF4_NESTED_BLOCK];
    __shared__ float of_warp[THREADS / 32];
    const int t = threadIdx.x;
    midpoint[t] = t < 255 ? (NF4_DYNAMIC_CODE[t] + NF4_DYNAMIC_CODE[t + 1]) * 0.5f : 0.0f;

    const double sum = cta_sum(t < partials ? partial[t] : 0.0);
    const float mean = float(sum / double(blocks));
    const size_t i = size_t(blockIdx.x) * NF4_NESTED_BLOCK + t;
    const float d = i < blocks ? __fsub_rn(absmax[i], mean) : 0.0f;

    float largest = lanes_max<32>(fabsf(d));
    if (t % 32 == 0) of_warp[t / 32] = largest;
    __syncthreads();
#pragma unroll
    for (int w = 0; w < THREADS / 32; ++w) largest = fmaxf(largest, of_warp[w]);

    const float s = __fmul_rn(d, __frcp_rn(fmaxf(largest, TINY)));
    int code = 0; // number of the 255 midpoints below s
#pragma unroll
    for (int step = 128; step > 0; step /= 2)
        if (s > midpoint[code + step - 1]) code += step;

    if (i < blocks) codes[i] = uint8_t(code);
    if (t == 0) {
        nested_absmax[blockIdx.x] = largest;
        if (blockIdx.x == 0) *offset = mean;
    }
}

template <typename T, QuantType Q, bool DOUBLE>
__global__ void __launch_bounds__(THREADS)
nf4_dequantize_kernel(T *__restrict__ out, const uint8_t *__restrict__ packed, Nf4Absmax from, size_t first_block,
                      size_t n) {
    const float code = NF4_CODE_BOOK[int(Q)][threadIdx.x % 16];
    const size_t start = size_t(blockIdx.x) * (PER_CTA * PASSES) + threadIdx.x * PER_THREAD;

    uint32_t word[PASSES];
    float absmax[PASSES];
#pragma unroll
    for (int p = 0; p < PASSES; ++p) {
        const size_t first = start + p * PER_CTA;
        word[p] = 0;
        absmax[p] = 0.0f;
        if (first + PER_THREAD <= n) {
            word[p] = __ldg(reinterpret_cast<const uint32_t *>(packed) + first / PER_THREAD);
        } else {
            for (int b = 0; b < PER_THREAD / 2; ++b)
                if (first + 2 * b < n) word[p] |= uint32_t(packed[first / 2 + b]) << (8 * b);
        }
        if (first < n) absmax[p] = nf4_absmax<DOUBLE>(from, first_block + first / NF4_BLOCK);
    }
#pragma unroll
    for (int p = 0; p < PASSES; ++p) {
        const size_t first = start + p * PER_CTA;
        Vec8<T> v;
#pragma unroll
        for (int j = 0; j < PER_THREAD; ++j) {
            // The shuffle looks at the low 4 bits of the lane number alone.
            const float value = __shfl_sync(FULL_WARP, code, word[p] >> nf4_shift(j), 16);
            v.at[j] = from_f32<T>(__fmul_rn(value, absmax[p]));
        }
        if (first + PER_THREAD <= n) {
            store_vec8(out + first, v);
        } else {
#pragma unroll
            for (int j = 0; j < PER_THREAD; ++j)
                if (first + j < n) out[first + j] = v.at[j];
        }
    }
}

// For ranges that start inside a block: an element a thread.
template <bool DOUBLE>
__global__ void __launch_bounds__(THREADS)
nf4_dequantize_range_kernel(__nv_bfloat16 *__restrict__ out, const uint8_t *__restrict__ packed, Nf4Absmax from,
                            QuantType quant_type, size_t first, size_t n) {
    const size_t i = size_t(blockIdx.x) * THREADS + threadIdx.x;
    if (i >= n) return;
    const size_t at = first + i;
    const uint32_t code = packed[at / 2] >> (at % 2 == 0 ? 4 : 0) & 15u;
    const float absmax = nf4_absmax<DOUBLE>(from, at / NF4_BLOCK);
    out[i] = from_f32<__nv_bfloat16>(__fmul_rn(NF4_CODE_BOOK[int(quant_type)][code], absmax));
}

} // namespace

// nf4_quantize    absmax[b] = max |x[i]| over block b;  code = number of midpoints below x * (1 / absmax), in f32.
//
//   packed  (ceil(n / 2))   u8   =  the pad nibble of an odd n is the code of 0
//   absmax  (ceil(n / 64))  f32  =
//   x       (n)             f32, bf16 or f16; flattened row-major, finite
//
// A block of zeros gets the code of 0. x 16-byte and packed 4-byte aligned. No atomics: the same bits in every run.
// Floor: n * (sizeof(x) + 0.5 + 4 / 64) bytes.
struct Nf4Quantize {
    uint8_t *packed;
    float *absmax;
    const void *x;
    uint64_t n;
    Dtype x_dtype;
    QuantType quant_type;
};
static_assert(sizeof(Nf4Quantize) == 40, "as in src/backend/cuda/ffi.rs");

template <typename T> static void launch_quantize(const Nf4Quantize &a, cudaStream_t stream) {
    const auto kernel = a.quant_type == QuantType::Nf4 ? nf4_quantize_kernel<T, QuantType::Nf4>
                                                       : nf4_quantize_kernel<T, QuantType::Fp4>;
    const unsigned ctas = unsigned(ceil_div<size_t>(a.n, PER_CTA));
    kernel<<<ctas, THREADS, 0, stream>>>(a.packed, a.absmax, static_cast<const T *>(a.x), a.n);
}

HALFBYTE_API cudaError_t nf4_quantize(const Nf4Quantize *args, cudaStream_t stream) {
    const Nf4Quantize &a = *args;
    if (a.n == 0) return cudaSuccess;
    if (!is_aligned(a.x, 16) || !is_aligned(a.packed, 4)) return cudaErrorMisalignedAddress;
    switch (a.x_dtype) {
    case Dtype::F32: launch_quantize<float>(a, stream); break;
    case Dtype::Bf16: launch_quantize<__nv_bfloat16>(a, stream); break;
    case Dtype::F16: launch_quantize<__half>(a, stream); break;
    default: return cudaErrorInvalidValue;
    }
    return cudaGetLastError();
}

// nf4_double_quantize    offset = mean(absmax), summed in f64;  d = absmax - offset;  nested_absmax = max |d| over 256;
//                        code = number of midpoints of the dynamic code below d * (1 / nested_absmax), in f32.
//
//   codes          (blocks)              u8   =
//   nested_absmax  (ceil(blocks / 256))  f32  =
//   offset         (1)                   f32  =
//   partial        (256)                 f64  scratch
//   absmax         (blocks)              f32
//
// Two launches, none for 0 blocks. The sum has one order for a given number of blocks: the same bits in every run.
// Floor: 9 bytes a block (absmax is read twice).
struct Nf4DoubleQuantize {
    uint8_t *codes;
    float *nested_absmax;
    float *offset;
    double *partial;
    const float *absmax;
    uint64_t blocks;
};
static_assert(sizeof(Nf4DoubleQuantize) == 48, "as in src/backend/cuda/ffi.rs");

HALFBYTE_API cudaError_t nf4_double_quantize(const Nf4DoubleQuantize *args, cudaStream_t stream) {
    const Nf4DoubleQuantize &a = *args;
    if (a.blocks == 0) return cudaSuccess;
    const size_t wanted = ceil_div<size_t>(a.blocks, 8 * THREADS);
    const int partials = int(wanted < SUM_MAX_CTAS ? wanted : SUM_MAX_CTAS);
    nf4_absmax_sum_kernel<<<partials, THREADS, 0, stream>>>(a.partial, a.absmax, a.blocks);
    const unsigned ctas = unsigned(ceil_div<size_t>(a.blocks, NF4_NESTED_BLOCK));
    nf4_double_quantize_kernel<<<ctas, THREADS, 0, stream>>>(a.codes, a.nested_absmax, a.offset, a.partial, partials,
                                                             a.absmax, a.blocks);
    return cudaGetLastError();
}

// nf4_dequantize    out[i] = code_book[nibble i] * absmax[i / 64], a product in f32 and one rounding to out's type.
//
//   out     (n)            bf16 or f32  =
//   packed  (ceil(n / 2))  u8
//   absmax  see Nf4Absmax: f32, or in 8 bits with nested_absmax and offset
//
// out 16-byte and packed 4-byte aligned. Floor: n * (0.5 + sizeof(out) + 1 / 64) bytes, 4 / 64 if absmax is plain.
// 8 weights a thread, 16-byte stores; the code book lives in the lanes of the warp, a lookup is a shuffle.
struct Nf4Dequantize {
    void *out;
    const uint8_t *packed;
    Nf4Absmax absmax;
    uint64_t n;
    Dtype out_dtype;
    QuantType quant_type;
};
static_assert(sizeof(Nf4Dequantize) == 64, "as in src/backend/cuda/ffi.rs");

template <typename T, QuantType Q> static void launch_dequantize(const Nf4Dequantize &a, cudaStream_t stream) {
    const auto kernel = a.absmax.absmax ? nf4_dequantize_kernel<T, Q, false> : nf4_dequantize_kernel<T, Q, true>;
    const unsigned ctas = unsigned(ceil_div<size_t>(a.n, PER_CTA * PASSES));
    kernel<<<ctas, THREADS, 0, stream>>>(static_cast<T *>(a.out), a.packed, a.absmax, 0, a.n);
}

HALFBYTE_API cudaError_t nf4_dequantize(const Nf4Dequantize *args, cudaStream_t stream) {
    const Nf4Dequantize &a = *args;
    if (a.n == 0) return cudaSuccess;
    if (!is_aligned(a.out, 16) || !is_aligned(a.packed, 4)) return cudaErrorMisalignedAddress;
    const bool nf4 = a.quant_type == QuantType::Nf4;
    switch (a.out_dtype) {
    case Dtype::F32:
        nf4 ? launch_dequantize<float, QuantType::Nf4>(a, stream) : launch_dequantize<float, QuantType::Fp4>(a, stream);
        break;
    case Dtype::Bf16:
        nf4 ? launch_dequantize<__nv_bfloat16, QuantType::Nf4>(a, stream)
            : launch_dequantize<__nv_bfloat16, QuantType::Fp4>(a, stream);
        break;
    default: return cudaErrorInvalidValue;
    }
    return cudaGetLastError();
}

// nf4_dequantize_range    out[i] = element first + i of a 4-bit tensor, the bits of nf4_dequantize.
//
//   out     (n)                      bf16  =
//   packed  (ceil((first + n) / 2))  u8, of the whole tensor
//   absmax  of the whole tensor: see Nf4Absmax
//
// At full speed where `first` starts a block and out is 16-byte aligned. Floor: as nf4_dequantize.
struct Nf4DequantizeRange {
    __nv_bfloat16 *out;
    const uint8_t *packed;
    Nf4Absmax absmax;
    uint64_t first;
    uint64_t n;
    QuantType quant_type;
};
static_assert(sizeof(Nf4DequantizeRange) == 72, "as in src/backend/cuda/ffi/nf4.rs");

HALFBYTE_API cudaError_t nf4_dequantize_range(const Nf4DequantizeRange *args, cudaStream_t stream) {
    const Nf4DequantizeRange &a = *args;
    if (a.n == 0) return cudaSuccess;
    const bool plain = a.absmax.absmax != nullptr, nf4 = a.quant_type == QuantType::Nf4;
    if (a.first % NF4_BLOCK == 0 && is_aligned(a.out, 16) && is_aligned(a.packed, 4)) {
        using T = __nv_bfloat16;
        const auto kernel = plain ? (nf4 ? nf4_dequantize_kernel<T, QuantType::Nf4, false>
                                         : nf4_dequantize_kernel<T, QuantType::Fp4, false>)
                                  : (nf4 ? nf4_dequantize_kernel<T, QuantType::Nf4, true>
                                         : nf4_dequantize_kernel<T, QuantType::Fp4, true>);
        const unsigned ctas = unsigned(ceil_div<size_t>(a.n, PER_CTA * PASSES));
        kernel<<<ctas, THREADS, 0, stream>>>(a.out, a.packed + a.first / 2, a.absmax, a.first / NF4_BLOCK, a.n);
    } else {
        const auto kernel = plain ? nf4_dequantize_range_kernel<false> : nf4_dequantize_range_kernel<true>;
        const unsigned ctas = unsigned(ceil_div<size_t>(a.n, THREADS));
        kernel<<<ctas, THREADS, 0, stream>>>(a.out, a.packed, a.absmax, a.quant_type, a.first, a.n);
    }
    return cudaGetLastError();
}
