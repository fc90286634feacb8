// swiglu: y = silu(gate) * up, gate and up side by side in one row.

#include "elementwise.cuh"

namespace {

constexpr unsigned THREADS = 256;
constexpr unsigned DEPTH = 2; // vectors of each input that a thread has in flight
constexpr unsigned PER_CTA = THREADS * DEPTH;

// 1 / (1 + e^-x), to about 2^-17 at |x| = 88 and far better where it matters; 0 and 1 at the ends.
__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }

__device__ __forceinline__ float forward(float gate, float up) { return gate * sigmoid(gate) * up; }

// gate, up <- their gradients; silu'(g) = s + g s (1 - s)
__device__ __forceinline__ void backward(float &gate, float &up, float dy) {
    const float g = gate, s = sigmoid(g);
    gate = dy * up * s * (1.0f + g * (1.0f - s));
    up = dy * g * s;
}

// Vector n of y (T, F) is vector n % row of row n / row; gate_up's rows are twice as long.
__global__ void __launch_bounds__(THREADS, 1)
swiglu_forward_kernel(uint4 *__restrict__ y, const uint4 *__restrict__ gate_up, unsigned total, unsigned row) {
    const unsigned first = blockIdx.x * PER_CTA + threadIdx.x;
    uint4 gate[DEPTH], up[DEPTH];
#pragma unroll
    for (unsigned u = 0; u < DEPTH; ++u) {
        const unsigned n = first + u * THREADS;
        const uint4 *p = gate_up + size_t(n / row) * row + n;
        if (n < total) gate[u] = __ldg(p), up[u] = __ldg(p + row);
    }
#pragma unroll
    for (unsigned u = 0; u < DEPTH; ++u) {
        const unsigned n = first + u * THREADS;
        if (n >= total) break;
        Floats8 out = widen(gate[u]);
        const Floats8 b = widen(up[u]);
#pragma unroll
        for (unsigned j = 0; j < PER_VECTOR; ++j) out.at[j] = forward(out.at[j], b.at[j]);
        y[n] = narrow(out);
    }
}

__global__ void __launch_bounds__(THREADS, 1)
swiglu_backward_kernel(uint4 *__restrict__ gate_up, const uint4 *__restrict__ dy, unsigned total, unsigned row) {
    const unsigned first = blockIdx.x * PER_CTA + threadIdx.x;
    uint4 gate[DEPTH], up[DEPTH], grad[DEPTH];
#pragma unroll
    for (unsigned u = 0; u < DEPTH; ++u) {
        const unsigned n = first + u * THREADS;
        const uint4 *p = gate_up + size_t(n / row) * row + n;
        if (n < total) gate[u] = p[0], up[u] = p[row], grad[u] = __ldg(dy + n);
    }
#pragma unroll
    for (unsigned u = 0; u < DEPTH; ++u) {
        const unsigned n = first + u * THREADS;
        if (n >= total) break;
        Floats8 a = widen(gate[u]), b = widen(up[u]);
        const Floats8 d = widen(grad[u]);
#pragma unroll
        for (unsigned j = 0; j < PER_VECTOR; ++j) backward(a.at[j], b.at[j], d.at[j]);
        uint4 *p = gate_up + size_t(n / row) * row + n;
        p[0] = narrow(a);
        p[row] = narrow(b);
    }
}

// Any F, any alignment.
__global__ void __launch_bounds__(THREADS, 1)
swiglu_forward_any_kernel(bf16 *__restrict__ y, const bf16 *__restrict__ gate_up, uint64_t total, uint64_t f) {
    const uint64_t n = uint64_t(blockIdx.x) * THREADS + threadIdx.x;
    if (n >= total) return;
    const bf16 *p = gate_up + n / f * f + n;
    y[n] = from_f32<bf16>(forward(to_f32(p[0]), to_f32(p[f])));
}

__global__ void __launch_bounds__(THREADS, 1)
swiglu_backward_any_kernel(bf16 *__restrict__ gate_up, const bf16 *__restrict__ dy, uint64_t total, uint64_t f) {
    const uint64_t n = uint64_t(blockIdx.x) * THREADS + threadIdx.x;
    if (n >= total) return;
    bf16 *p = gate_up + n / f * f + n;
    float gate = to_f32(p[0]), up = to_f32(p[f]);
    backward(gate, up, to_f32(dy[n]));
    p[0] = from_f32<bf16>(gate);
    p[f] = from_f32<bf16>(up);
}

bool in_vectors(uint64_t total, uint64_t f, const bf16 *a, const bf16 *b) {
    return f % PER_VECTOR == 0 && total / PER_VECTOR < MAX_GRID - PER_CTA && is_aligned(a, 16) && is_aligned(b, 16);
}

} // namespace

// swiglu_forward    y = silu(gate) * up,  silu(g) = g / (1 + e^-g)
//
//   y        (T, F)   bf16  =
//   gate_up  (T, 2F)  bf16  gate, then up
//
// In f32, rounded once. No sums: the same bits in every run. Floor: 6*T*F bytes.
// Fast where F is a multiple of 8 and both are 16-byte aligned, right for all else.
struct SwigluForward {
    bf16 *y;
    const bf16 *gate_up;
    uint64_t t;
    uint64_t f;
};
static_assert(sizeof(SwigluForward) == 32, "as in src/backend/cuda/ffi/swiglu.rs");

HALFBYTE_API cudaError_t swiglu_forward(const SwigluForward *args, cudaStream_t stream) {
    const SwigluForward &a = *args;
    const uint64_t total = a.t * a.f;
    if (total == 0) return cudaSuccess;
    if (in_vectors(total, a.f, a.y, a.gate_up)) {
        const unsigned vectors = unsigned(total / PER_VECTOR);
        swiglu_forward_kernel<<<ceil_div(vectors, PER_CTA), THREADS, 0, stream>>>(
            reinterpret_cast<uint4 *>(a.y), reinterpret_cast<const uint4 *>(a.gate_up), vectors,
            unsigned(a.f / PER_VECTOR));
    } else {
        const uint64_t ctas = ceil_div<uint64_t>(total, THREADS);
        if (ctas > MAX_GRID) return cudaErrorInvalidValue;
        swiglu_forward_any_kernel<<<unsigned(ctas), THREADS, 0, stream>>>(a.y, a.gate_up, total, a.f);
    }
    return cudaGetLastError();
}

// swiglu_backward    dgate = dy * up * s * (1 + gate * (1 - s)),  dup = dy * gate * s,  s = 1 / (1 + e^-gate)
//
//   gate_up  (T, 2F)  bf16  in: gate, then up; out: their gradients
//   dy       (T, F)   bf16
//
// In f32, rounded once. No sums: the same bits in every run. Floor: 10*T*F bytes.
struct SwigluBackward {
    bf16 *gate_up;
    const bf16 *dy;
    uint64_t t;
    uint64_t f;
};
static_assert(sizeof(SwigluBackward) == 32, "as in src/backend/cuda/ffi/swiglu.rs");

HALFBYTE_API cudaError_t swiglu_backward(const SwigluBackward *args, cudaStream_t stream) {
    const SwigluBackward &a = *args;
    const uint64_t total = a.t * a.f;
    if (total == 0) return cudaSuccess;
    if (in_vectors(total, a.f, a.gate_up, a.dy)) {
        const unsigned vectors = unsigned(total / PER_VECTOR);
        swiglu_backward_kernel<<<ceil_div(vectors, PER_CTA), THREADS, 0, stream>>>(
            reinterpret_cast<uint4 *>(a.gate_up), reinterpret_cast<const uint4 *>(a.dy), vectors,
            unsigned(a.f / PER_VECTOR));
    } else {
        const uint64_t ctas = ceil_div<uint64_t>(total, THREADS);
        if (ctas > MAX_GRID) return cudaErrorInvalidValue;
        swiglu_backward_any_kernel<<<unsigned(ctas), THREADS, 0, stream>>>(a.gate_up, a.dy, total, a.f);
    }
    return cudaGetLastError();
}
