// rope: each pair (x_i, x_{i+D/2}) of a query or key head turned by positions[t] * inv_freq[i].
//
// A CTA takes a few tokens. It has its first vectors on their way from memory, then computes each angle of its tokens once
// into shared memory, then turns all heads by them.

#include "elementwise.cuh"

namespace {

constexpr unsigned THREADS = 256;
constexpr unsigned ANGLES = 256; // of a CTA: its tokens times D/2
constexpr unsigned DEPTH = 4;    // pairs of vectors a thread has in flight

// Sine and cosine of any finite angle to about 1 ulp. The angle is reduced in f64: pi/2 as a sum of two, so that the rest
// is right to 2^-40 for every product of a 32-bit position. (CUDA's sincosf keeps a table in local memory for angles
// beyond 105,615, which contexts of 131,072 tokens reach.)
__device__ __forceinline__ void sine_cosine(float angle, float &sine, float &cosine) {
    constexpr double TWO_BY_PI = 0x1.45f306dc9c883p-1;
    constexpr double HALF_PI = 0x1.921fb54442d18p+0, HALF_PI_REST = 0x1.1a62633145c07p-54;
    const double turns = rint(double(angle) * TWO_BY_PI);
    const float x = float(fma(-turns, HALF_PI_REST, fma(-turns, HALF_PI, double(angle))));
    const float z = x * x;
    // Taylor sums on |x| <= pi/4, to x^9 and x^10: the rest is below 2^-27.
    const float s =
        fmaf(x * z, fmaf(z, fmaf(z, fmaf(z, 1.0f / 362880, -1.0f / 5040), 1.0f / 120), -1.0f / 6), x);
    const float c = fmaf(
        z, fmaf(z, fmaf(z, fmaf(z, fmaf(z, -1.0f / 3628800, 1.0f / 40320), -1.0f / 720), 1.0f / 24), -0.5f), 1.0f);
    const long long quarter = __double2ll_rn(turns);
    sine = quarter & 1 ? c : s;
    cosine = quarter & 1 ? s : c;
    if (quarter & 2) sine = -sine;
    if ((quarter + 1) & 2) cosine = -cosine;
}

__device__ __forceinline__ void turn(float &a, float &b, float sine, float cosine) {
    const float x = a, y = b;
    a = x * cosine - y * sine;
    b = y * cosine + x * sine;
}

struct RopeShape {
    unsigned t;
    unsigned heads; // that turn: H + G
    unsigned d;
    unsigned width; // of a row: (H + 2G) * D
    float sign;     // -1 turns back
};

// D is a multiple of 16 and at most 2 * ANGLES; `tokens` a CTA, at most ANGLES / (D/2).
__global__ void __launch_bounds__(THREADS, 1)
rope_kernel(bf16 *__restrict__ qkv, const int32_t *__restrict__ positions, const float *__restrict__ inv_freq,
            RopeShape at, unsigned tokens) {
    __shared__ __align__(16) float sines[ANGLES], cosines[ANGLES];
    const unsigned half = at.d / 2, parts = half / PER_VECTOR;
    const unsigned of_token = at.heads * parts; // pairs of vectors
    const unsigned first_token = blockIdx.x * tokens;
    const unsigned here = min(tokens, at.t - first_token);
    const unsigned pairs = here * of_token;

    // Pair n: a vector of the first half of a head, and the one D/2 behind it.
    const auto place = [&](unsigned n) {
        const unsigned token = n / of_token, rest = n % of_token;
        return qkv + size_t(first_token + token) * at.width + rest / parts * at.d + rest % parts * PER_VECTOR;
    };
    uint4 low[DEPTH], high[DEPTH];
    const auto load = [&](unsigned start) {
#pragma unroll
        for (unsigned u = 0; u < DEPTH; ++u) {
            const unsigned n = start + u * THREADS;
            if (n < pairs) {
                const bf16 *p = place(n);
                low[u] = *reinterpret_cast<const uint4 *>(p);
                high[u] = *reinterpret_cast<const uint4 *>(p + half);
            }
        }
    };
    load(threadIdx.x);

    for (unsigned i = threadIdx.x; i < here * half; i += THREADS) {
        const float angle = float(positions[first_token + i / half]) * inv_freq[i % half];
        sine_cosine(angle, sines[i], cosines[i]);
        sines[i] *= at.sign;
    }
    __syncthreads();

    for (unsigned start = threadIdx.x; start < pairs; start += DEPTH * THREADS) {
        if (start != threadIdx.x) load(start);
#pragma unroll
        for (unsigned u = 0; u < DEPTH; ++u) {
            const unsigned n = start + u * THREADS;
            if (n >= pairs) break;
            const unsigned angle = n / of_token * half + n % of_token % parts * PER_VECTOR;
            Floats8 a = widen(low[u]), b = widen(high[u]);
#pragma unroll
            for (unsigned j = 0; j < PER_VECTOR; ++j) turn(a.at[j], b.at[j], sines[angle + j], cosines[angle + j]);
            bf16 *p = place(n);
            *reinterpret_cast<uint4 *>(p) = narrow(a);
            *reinterpret_cast<uint4 *>(p + half) = narrow(b);
        }
    }
}

// Any even D, any alignment: a thread takes one angle of one token through all heads.
__global__ void __launch_bounds__(THREADS, 1)
rope_any_kernel(bf16 *__restrict__ qkv, const int32_t *__restrict__ positions, const float *__restrict__ inv_freq,
                RopeShape at) {
    const unsigned half = at.d / 2;
    const size_t n = size_t(blockIdx.x) * THREADS + threadIdx.x;
    const size_t token = n / half;
    const unsigned i = unsigned(n % half);
    if (token >= at.t) return;
    float sine, cosine;
    sine_cosine(float(positions[token]) * inv_freq[i], sine, cosine);
    bf16 *p = qkv + token * at.width + i;
    for (unsigned head = 0; head < at.heads; ++head, p += at.d) {
        float a = to_f32(p[0]), b = to_f32(p[half]);
        turn(a, b, at.sign * sine, cosine);
        p[0] = from_f32<bf16>(a);
        p[half] = from_f32<bf16>(b);
    }
}

} // namespace

// rope_forward     for i < D/2: a = positions[t] * inv_freq[i] in f32;
//                  (x_i, x_{i+D/2}) -> (x_i cos a - x_{i+D/2} sin a, x_{i+D/2} cos a + x_i sin a) in query and key heads
// rope_backward    the same by -a: the inverse turn of their gradients
//
//   qkv        (T, (H+2G)*D)  bf16  in place; v is left alone
//   positions  (T)            i32
//   inv_freq   (D/2)          f32
//
// D even. No sums: the same bits in every run. Floor: 4*T*(H+G)*D bytes.
// Fast where D is a multiple of 16 up to 512 and qkv is 16-byte aligned, right for all else.
struct Rope {
    bf16 *qkv;
    const int32_t *positions;
    const float *inv_freq;
    uint64_t t;
    uint32_t h;
    uint32_t g;
    uint32_t d;
    uint32_t unused;
};
static_assert(sizeof(Rope) == 48, "as in src/backend/cuda/ffi/rope.rs");

static cudaError_t launch(const Rope &a, float sign, cudaStream_t stream) {
    const uint64_t heads = uint64_t(a.h) + a.g, width = (heads + a.g) * a.d;
    if (a.t == 0 || heads == 0 || a.d == 0) return cudaSuccess;
    if (a.d % 2 != 0 || a.t > MAX_GRID || width > MAX_GRID) return cudaErrorInvalidValue;
    const RopeShape at{unsigned(a.t), unsigned(heads), a.d, unsigned(width), sign};
    const unsigned half = a.d / 2;
    if (half % PER_VECTOR == 0 && half <= ANGLES && is_aligned(a.qkv, 16)) {
        const unsigned tokens = ANGLES / half;
        rope_kernel<<<ceil_div(at.t, tokens), THREADS, 0, stream>>>(a.qkv, a.positions, a.inv_freq, at, tokens);
    } else {
        const uint64_t ctas = ceil_div<uint64_t>(a.t * half, THREADS);
        if (ctas > MAX_GRID) return cudaErrorInvalidValue;
        rope_any_kernel<<<unsigned(ctas), THREADS, 0, stream>>>(a.qkv, a.positions, a.inv_freq, at);
    }
    return cudaGetLastError();
}

HALFBYTE_API cudaError_t rope_forward(const Rope *args, cudaStream_t stream) { return launch(*args, 1.0f, stream); }

HALFBYTE_API cudaError_t rope_backward(const Rope *args, cudaStream_t stream) { return launch(*args, -1.0f, stream); }
