// RMSNorm: forward with the residual add fused, backward, and both over each head of q and k (head_norm).
//
// One CTA a row, which stays in registers between the sum and the product: every byte moves once. w comes from the cache.

#include "elementwise.cuh"

namespace {

constexpr unsigned THREADS = 256;
constexpr unsigned ROW_THREADS = 512; // most of a CTA that holds a row
constexpr unsigned MAX_VECTORS = 4;   // a thread's share of the longest such row, C = 16,384

// V vectors a thread, the row's vector v * blockDim.x + threadIdx.x each.
template <unsigned V, bool RESIDUAL>
__global__ void __launch_bounds__(V < MAX_VECTORS ? THREADS : ROW_THREADS, 1)
rmsnorm_forward_kernel(uint4 *__restrict__ y, float *__restrict__ rstd, const uint4 *__restrict__ x,
                       const uint4 *__restrict__ delta, uint4 *__restrict__ s, const uint4 *__restrict__ w,
                       unsigned vectors, float inverse_c, float eps) {
    __shared__ float of_warp[ROW_THREADS / 32];
    const size_t row = size_t(blockIdx.x) * vectors;
    uint4 in[V], add[V], gain[V];
#pragma unroll
    for (unsigned v = 0; v < V; ++v) {
        const unsigned i = v * blockDim.x + threadIdx.x;
        in[v] = i < vectors ? __ldg(x + row + i) : zero_vector();
        if constexpr (RESIDUAL) add[v] = i < vectors ? __ldg(delta + row + i) : zero_vector();
    }
#pragma unroll
    for (unsigned v = 0; v < V; ++v) {
        const unsigned i = v * blockDim.x + threadIdx.x;
        gain[v] = i < vectors ? __ldg(w + i) : zero_vector();
    }
    float sum = 0.0f;
#pragma unroll
    for (unsigned v = 0; v < V; ++v) {
        Floats8 f = widen(in[v]);
        if constexpr (RESIDUAL) {
            const unsigned i = v * blockDim.x + threadIdx.x;
            const Floats8 d = widen(add[v]);
#pragma unroll
            for (unsigned j = 0; j < PER_VECTOR; ++j) f.at[j] += d.at[j];
            in[v] = narrow(f);
            if (i < vectors) s[row + i] = in[v];
            f = widen(in[v]); // the rounded s is what is normed
        }
#pragma unroll
        for (unsigned j = 0; j < PER_VECTOR; ++j) sum = fmaf(f.at[j], f.at[j], sum);
    }
    const float r = rsqrtf(cta_sum(sum, of_warp) * inverse_c + eps);
#pragma unroll
    for (unsigned v = 0; v < V; ++v) {
        const unsigned i = v * blockDim.x + threadIdx.x;
        Floats8 f = widen(in[v]);
        const Floats8 g = widen(gain[v]);
#pragma unroll
        for (unsigned j = 0; j < PER_VECTOR; ++j) f.at[j] = r * f.at[j] * g.at[j];
        if (i < vectors) y[row + i] = narrow(f);
    }
    if (threadIdx.x == 0) rstd[blockIdx.x] = r;
}

// Any C, any alignment: the row is read twice. s is read back by the thread that wrote it.
template <bool RESIDUAL>
__global__ void __launch_bounds__(THREADS, 1)
rmsnorm_forward_any_kernel(bf16 *__restrict__ y, float *__restrict__ rstd, const bf16 *__restrict__ x,
                           const bf16 *__restrict__ delta, bf16 *s, const bf16 *__restrict__ w, unsigned c,
                           float inverse_c, float eps) {
    __shared__ float of_warp[THREADS / 32];
    const size_t row = size_t(blockIdx.x) * c;
    float sum = 0.0f;
    for (unsigned i = threadIdx.x; i < c; i += THREADS) {
        float f = to_f32(x[row + i]);
        if constexpr (RESIDUAL) {
            const bf16 rounded = from_f32<bf16>(f + to_f32(delta[row + i]));
            s[row + i] = rounded;
            f = to_f32(rounded);
        }
        sum = fmaf(f, f, sum);
    }
    const float r = rsqrtf(cta_sum(sum, of_warp) * inverse_c + eps);
    for (unsigned i = threadIdx.x; i < c; i += THREADS) {
        const float f = to_f32(RESIDUAL ? s[row + i] : x[row + i]);
        y[row + i] = from_f32<bf16>(r * f * to_f32(w[i]));
    }
    if (threadIdx.x == 0) rstd[blockIdx.x] = r;
}

template <unsigned V>
__global__ void __launch_bounds__(V < MAX_VECTORS ? THREADS : ROW_THREADS, 1)
rmsnorm_backward_kernel(uint4 *__restrict__ dx, const uint4 *__restrict__ dy, const uint4 *__restrict__ x,
                        const uint4 *__restrict__ w, const float *__restrict__ rstd, unsigned vectors, float inverse_c) {
    __shared__ float of_warp[ROW_THREADS / 32];
    const size_t row = size_t(blockIdx.x) * vectors;
    uint4 grad[V], in[V], sink[V];
#pragma unroll
    for (unsigned v = 0; v < V; ++v) {
        const unsigned i = v * blockDim.x + threadIdx.x;
        const bool there = i < vectors;
        grad[v] = there ? __ldg(dy + row + i) : zero_vector();
        in[v] = there ? __ldg(x + row + i) : zero_vector();
        sink[v] = there ? dx[row + i] : zero_vector();
    }
    const float r = __ldg(rstd + blockIdx.x);
    float sum = 0.0f;
#pragma unroll
    for (unsigned v = 0; v < V; ++v) {
        const unsigned i = v * blockDim.x + threadIdx.x;
        const Floats8 d = widen(grad[v]), f = widen(in[v]), g = widen(i < vectors ? __ldg(w + i) : zero_vector());
#pragma unroll
        for (unsigned j = 0; j < PER_VECTOR; ++j) sum = fmaf(d.at[j] * g.at[j], f.at[j], sum);
    }
    const float coefficient = r * r * r * (cta_sum(sum, of_warp) * inverse_c);
#pragma unroll
    for (unsigned v = 0; v < V; ++v) {
        const unsigned i = v * blockDim.x + threadIdx.x;
        forget(grad[v]), forget(in[v]);
        const Floats8 d = widen(grad[v]), f = widen(in[v]), g = widen(i < vectors ? __ldg(w + i) : zero_vector());
        Floats8 out = widen(sink[v]);
#pragma unroll
        for (unsigned j = 0; j < PER_VECTOR; ++j) out.at[j] += r * d.at[j] * g.at[j] - coefficient * f.at[j];
        if (i < vectors) dx[row + i] = narrow(out);
    }
}

__global__ void __launch_bounds__(THREADS, 1)
rmsnorm_backward_any_kernel(bf16 *__restrict__ dx, const bf16 *__restrict__ dy, const bf16 *__restrict__ x,
                            const bf16 *__restrict__ w, const float *__restrict__ rstd, unsigned c, float inverse_c) {
    __shared__ float of_warp[THREADS / 32];
    const size_t row = size_t(blockIdx.x) * c;
    const float r = rstd[blockIdx.x];
    float sum = 0.0f;
    for (unsigned i = threadIdx.x; i < c; i += THREADS)
        sum = fmaf(to_f32(dy[row + i]) * to_f32(w[i]), to_f32(x[row + i]), sum);
    const float coefficient = r * r * r * (cta_sum(sum, of_warp) * inverse_c);
    for (unsigned i = threadIdx.x; i < c; i += THREADS) {
        const float d = r * to_f32(dy[row + i]) * to_f32(w[i]) - coefficient * to_f32(x[row + i]);
        dx[row + i] = from_f32<bf16>(to_f32(dx[row + i]) + d);
    }
}

// ---- over heads: WIDTH lanes a head, one vector a lane -----------------------------------------------------------------

constexpr unsigned HEADS_A_THREAD = 4; // independent loads in flight

// How a row of qkv divides: H query heads, G key heads, G value heads.
struct HeadRow {
    unsigned h, g, d;
};

// Heads lie one behind another in all of qkv, so that head n of the launch starts at n * D.
template <unsigned WIDTH>
__global__ void __launch_bounds__(THREADS, 1)
head_norm_forward_kernel(uint4 *__restrict__ y, float *__restrict__ rstd, const uint4 *__restrict__ x,
                         const uint4 *__restrict__ q_w, const uint4 *__restrict__ k_w, unsigned total, HeadRow at,
                         float inverse_d, float eps) {
    constexpr unsigned GROUPS = THREADS / WIDTH;
    const unsigned lane = threadIdx.x % WIDTH, group = threadIdx.x / WIDTH;
    const unsigned vectors = at.d / PER_VECTOR, heads = at.h + 2 * at.g, normed = at.h + at.g;
    const unsigned first = blockIdx.x * (GROUPS * HEADS_A_THREAD) + group;
    const bool inside = lane < vectors;
    uint4 in[HEADS_A_THREAD];
#pragma unroll
    for (unsigned u = 0; u < HEADS_A_THREAD; ++u) {
        const unsigned n = first + u * GROUPS;
        in[u] = inside && n < total ? __ldg(x + size_t(n) * vectors + lane) : zero_vector();
    }
    const Floats8 q_gain = widen(inside ? __ldg(q_w + lane) : zero_vector());
    const Floats8 k_gain = widen(inside ? __ldg(k_w + lane) : zero_vector());
#pragma unroll
    for (unsigned u = 0; u < HEADS_A_THREAD; ++u) {
        const unsigned n = first + u * GROUPS;
        const unsigned t = n / heads, head = n % heads;
        Floats8 f = widen(in[u]);
        float sum = 0.0f;
#pragma unroll
        for (unsigned j = 0; j < PER_VECTOR; ++j) sum = fmaf(f.at[j], f.at[j], sum);
        const float r = rsqrtf(lanes_sum<WIDTH>(sum) * inverse_d + eps);
        if (n >= total) continue; // the sum above needed all lanes; in a later round n is larger still
        if (head < normed) {
#pragma unroll
            for (unsigned j = 0; j < PER_VECTOR; ++j)
                f.at[j] = r * f.at[j] * (head < at.h ? q_gain.at[j] : k_gain.at[j]);
            in[u] = narrow(f);
            if (lane == 0) rstd[size_t(t) * normed + head] = r;
        }
        if (inside) y[size_t(n) * vectors + lane] = in[u];
    }
}

// Value heads keep their gradient: only heads of q and k are counted, `total` = T * (H + G).
template <unsigned WIDTH>
__global__ void __launch_bounds__(THREADS, 1)
head_norm_backward_kernel(uint4 *__restrict__ dqkv, const uint4 *__restrict__ x, const float *__restrict__ rstd,
                          const uint4 *__restrict__ q_w, const uint4 *__restrict__ k_w, unsigned total, HeadRow at,
                          float inverse_d) {
    constexpr unsigned GROUPS = THREADS / WIDTH;
    const unsigned lane = threadIdx.x % WIDTH, group = threadIdx.x / WIDTH;
    const unsigned vectors = at.d / PER_VECTOR, heads = at.h + 2 * at.g, normed = at.h + at.g;
    const unsigned first = blockIdx.x * (GROUPS * HEADS_A_THREAD) + group;
    const bool inside = lane < vectors;
    uint4 grad[HEADS_A_THREAD], in[HEADS_A_THREAD];
    float r[HEADS_A_THREAD];
#pragma unroll
    for (unsigned u = 0; u < HEADS_A_THREAD; ++u) {
        const unsigned n = first + u * GROUPS;
        const size_t place = (size_t(n / normed) * heads + n % normed) * vectors + lane;
        const bool there = inside && n < total;
        grad[u] = there ? dqkv[place] : zero_vector();
        in[u] = there ? __ldg(x + place) : zero_vector();
        r[u] = n < total ? __ldg(rstd + n) : 0.0f;
    }
    const Floats8 q_gain = widen(inside ? __ldg(q_w + lane) : zero_vector());
    const Floats8 k_gain = widen(inside ? __ldg(k_w + lane) : zero_vector());
#pragma unroll
    for (unsigned u = 0; u < HEADS_A_THREAD; ++u) {
        const unsigned n = first + u * GROUPS;
        const unsigned head = n % normed;
        Floats8 d = widen(grad[u]);
        const Floats8 f = widen(in[u]);
        float sum = 0.0f;
#pragma unroll
        for (unsigned j = 0; j < PER_VECTOR; ++j) {
            d.at[j] *= head < at.h ? q_gain.at[j] : k_gain.at[j];
            sum = fmaf(d.at[j], f.at[j], sum);
        }
        const float coefficient = r[u] * r[u] * r[u] * (lanes_sum<WIDTH>(sum) * inverse_d);
#pragma unroll
        for (unsigned j = 0; j < PER_VECTOR; ++j) d.at[j] = r[u] * d.at[j] - coefficient * f.at[j];
        if (inside && n < total) dqkv[(size_t(n / normed) * heads + head) * vectors + lane] = narrow(d);
    }
}

// Any D, any alignment: one warp a head.
__global__ void __launch_bounds__(THREADS, 1)
head_norm_forward_any_kernel(bf16 *__restrict__ y, float *__restrict__ rstd, const bf16 *__restrict__ x,
                             const bf16 *__restrict__ q_w, const bf16 *__restrict__ k_w, unsigned total, HeadRow at,
                             float inverse_d, float eps) {
    const unsigned lane = threadIdx.x % 32, n = blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
    if (n >= total) return; // a whole warp
    const unsigned heads = at.h + 2 * at.g, normed = at.h + at.g, head = n % heads;
    const size_t start = size_t(n) * at.d;
    if (head >= normed) {
        for (unsigned i = lane; i < at.d; i += 32) y[start + i] = x[start + i];
        return;
    }
    float sum = 0.0f;
    for (unsigned i = lane; i < at.d; i += 32) sum = fmaf(to_f32(x[start + i]), to_f32(x[start + i]), sum);
    const float r = rsqrtf(lanes_sum<32>(sum) * inverse_d + eps);
    const bf16 *w = head < at.h ? q_w : k_w;
    for (unsigned i = lane; i < at.d; i += 32) y[start + i] = from_f32<bf16>(r * to_f32(x[start + i]) * to_f32(w[i]));
    if (lane == 0) rstd[size_t(n / heads) * normed + head] = r;
}

__global__ void __launch_bounds__(THREADS, 1)
head_norm_backward_any_kernel(bf16 *__restrict__ dqkv, const bf16 *__restrict__ x, const float *__restrict__ rstd,
                              const bf16 *__restrict__ q_w, const bf16 *__restrict__ k_w, unsigned total, HeadRow at,
                              float inverse_d) {
    const unsigned lane = threadIdx.x % 32, n = blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
    if (n >= total) return; // a whole warp
    const unsigned heads = at.h + 2 * at.g, normed = at.h + at.g, head = n % normed;
    const size_t start = (size_t(n / normed) * heads + head) * at.d;
    const bf16 *w = head < at.h ? q_w : k_w;
    const float r = rstd[n];
    float sum = 0.0f;
    for (unsigned i = lane; i < at.d; i += 32)
        sum = fmaf(to_f32(dqkv[start + i]) * to_f32(w[i]), to_f32(x[start + i]), sum);
    const float coefficient = r * r * r * (lanes_sum<32>(sum) * inverse_d);
    for (unsigned i = lane; i < at.d; i += 32) {
        const float d = to_f32(dqkv[start + i]) * to_f32(w[i]);
        dqkv[start + i] = from_f32<bf16>(r * d - coefficient * to_f32(x[start + i]));
    }
}

// Vectors a thread for a row of `vectors`: the least power of two that THREADS threads manage with, or the most with more
// threads; 0 where those are too few too.
unsigned vectors_a_thread(uint64_t vectors) {
    for (unsigned v = 1; v <= MAX_VECTORS; v *= 2)
        if (vectors <= uint64_t(v) * THREADS) return v;
    return vectors <= uint64_t(MAX_VECTORS) * ROW_THREADS ? MAX_VECTORS : 0;
}

// Whole warps that hold a row of `vectors`, v each thread.
unsigned threads_for(unsigned vectors, unsigned v) { return ceil_div(ceil_div(vectors, v), 32u) * 32; }

const uint4 *as_vectors(const bf16 *p) { return reinterpret_cast<const uint4 *>(p); }
uint4 *as_vectors(bf16 *p) { return reinterpret_cast<uint4 *>(p); }

} // namespace

// rmsnorm_forward    s = x + delta (where there is one, else s = x), r = 1/sqrt(mean_c(s^2) + eps), y = r*s*w.
//
//   y      (T, C)  bf16  =
//   rstd   (T)     f32   = r
//   x      (T, C)  bf16
//   delta  (T, C)  bf16  or null
//   s      (T, C)  bf16  = : s rounded, which is what is normed, so that a norm of the stored s gives the same bits;
//                        null without delta
//   w      (C)     bf16
//
// Sums in f32 in an order that C decides: the same bits in every run. Floor: 4*T*C bytes, 8*T*C with delta.
// Fast where C is a multiple of 8 up to 16,384 and all is 16-byte aligned, right for all else.
struct RmsNormForward {
    bf16 *y;
    float *rstd;
    const bf16 *x;
    const bf16 *delta;
    bf16 *s;
    const bf16 *w;
    uint64_t t;
    uint64_t c;
    float eps;
};
static_assert(sizeof(RmsNormForward) == 72, "as in src/backend/cuda/ffi/rmsnorm.rs");

template <unsigned V> static void launch_forward(const RmsNormForward &a, cudaStream_t stream) {
    const auto kernel = a.delta ? rmsnorm_forward_kernel<V, true> : rmsnorm_forward_kernel<V, false>;
    const unsigned vectors = unsigned(a.c / PER_VECTOR);
    kernel<<<unsigned(a.t), threads_for(vectors, V), 0, stream>>>(as_vectors(a.y), a.rstd, as_vectors(a.x),
                                                                  as_vectors(a.delta), as_vectors(a.s), as_vectors(a.w),
                                                                  vectors, 1.0f / float(a.c), a.eps);
}

HALFBYTE_API cudaError_t rmsnorm_forward(const RmsNormForward *args, cudaStream_t stream) {
    const RmsNormForward &a = *args;
    if (a.t == 0) return cudaSuccess;
    if (a.c == 0 || a.t > MAX_GRID || a.c > MAX_GRID || (a.delta == nullptr) != (a.s == nullptr))
        return cudaErrorInvalidValue;
    const bool aligned = a.c % PER_VECTOR == 0 && is_aligned(a.y, 16) && is_aligned(a.x, 16) && is_aligned(a.w, 16) &&
                         is_aligned(a.delta, 16) && is_aligned(a.s, 16);
    switch (aligned ? vectors_a_thread(a.c / PER_VECTOR) : 0) {
    case 1: launch_forward<1>(a, stream); break;
    case 2: launch_forward<2>(a, stream); break;
    case 4: launch_forward<4>(a, stream); break;
    default: {
        const auto kernel = a.delta ? rmsnorm_forward_any_kernel<true> : rmsnorm_forward_any_kernel<false>;
        kernel<<<unsigned(a.t), THREADS, 0, stream>>>(a.y, a.rstd, a.x, a.delta, a.s, a.w, unsigned(a.c),
                                                          1.0f / float(a.c), a.eps);
    }
    }
    return cudaGetLastError();
}

// rmsnorm_backward    y = r*x*w,  r = 1/sqrt(mean_c(x^2) + eps)
//
//   dx[t,c] += r*dy[t,c]*w[c] - r^3 * x[t,c] * mean_c(dy*w*x)
//
//   dx    (T, C)  bf16  += : the residual stream already holds a gradient
//   dy    (T, C)  bf16
//   x     (T, C)  bf16  what the forward normed
//   w     (C)     bf16  frozen, hence no dw
//   rstd  (T)     f32   r, saved by rmsnorm_forward
//
// Sums in f32, order and speed as of the forward. Floor: 8*T*C bytes.
struct RmsNormBackward {
    bf16 *dx;
    const bf16 *dy;
    const bf16 *x;
    const bf16 *w;
    const float *rstd;
    uint64_t t;
    uint64_t c;
};
static_assert(sizeof(RmsNormBackward) == 56, "as in src/backend/cuda/ffi/rmsnorm.rs");

template <unsigned V> static void launch_backward(const RmsNormBackward &a, cudaStream_t stream) {
    const unsigned vectors = unsigned(a.c / PER_VECTOR);
    rmsnorm_backward_kernel<V><<<unsigned(a.t), threads_for(vectors, V), 0, stream>>>(
        as_vectors(a.dx), as_vectors(a.dy), as_vectors(a.x), as_vectors(a.w), a.rstd, vectors, 1.0f / float(a.c));
}

HALFBYTE_API cudaError_t rmsnorm_backward(const RmsNormBackward *args, cudaStream_t stream) {
    const RmsNormBackward &a = *args;
    if (a.t == 0) return cudaSuccess;
    if (a.c == 0 || a.t > MAX_GRID || a.c > MAX_GRID) return cudaErrorInvalidValue;
    const bool aligned = a.c % PER_VECTOR == 0 && is_aligned(a.dx, 16) && is_aligned(a.dy, 16) && is_aligned(a.x, 16) &&
                         is_aligned(a.w, 16);
    switch (aligned ? vectors_a_thread(a.c / PER_VECTOR) : 0) {
    case 1: launch_backward<1>(a, stream); break;
    case 2: launch_backward<2>(a, stream); break;
    case 4: launch_backward<4>(a, stream); break;
    default:
        rmsnorm_backward_any_kernel<<<unsigned(a.t), THREADS, 0, stream>>>(a.dx, a.dy, a.x, a.w, a.rstd,
                                                                               unsigned(a.c), 1.0f / float(a.c));
    }
    return cudaGetLastError();
}

// head_norm_forward    y = x, but each query head is r*x*q_w and each key head r*x*k_w, r = 1/sqrt(mean_d(x^2) + eps).
//
//   y     (T, (H+2G)*D)  bf16  =
//   rstd  (T, H+G)       f32   = r of each head
//   x     (T, (H+2G)*D)  bf16
//   q_w   (D)            bf16
//   k_w   (D)            bf16
//
// Sums in f32 in a fixed order. Floor: 4*T*(H+2G)*D bytes.
// Fast where D is a multiple of 8 up to 256 and all is 16-byte aligned, right for all else.
struct HeadNormForward {
    bf16 *y;
    float *rstd;
    const bf16 *x;
    const bf16 *q_w;
    const bf16 *k_w;
    uint64_t t;
    uint32_t h;
    uint32_t g;
    uint32_t d;
    float eps;
};
static_assert(sizeof(HeadNormForward) == 64, "as in src/backend/cuda/ffi/rmsnorm.rs");

HALFBYTE_API cudaError_t head_norm_forward(const HeadNormForward *args, cudaStream_t stream) {
    const HeadNormForward &a = *args;
    const uint64_t total = a.t * (uint64_t(a.h) + 2 * uint64_t(a.g));
    if (total == 0) return cudaSuccess;
    if (a.d == 0 || a.t > MAX_GRID || total > MAX_GRID) return cudaErrorInvalidValue;
    const HeadRow at{a.h, a.g, a.d};
    const float inverse_d = 1.0f / float(a.d);
    const bool aligned = a.d % PER_VECTOR == 0 && a.d <= 32 * PER_VECTOR && is_aligned(a.y, 16) && is_aligned(a.x, 16) &&
                         is_aligned(a.q_w, 16) && is_aligned(a.k_w, 16);
    if (aligned) {
        const unsigned width = a.d <= 64 ? 8 : a.d <= 128 ? 16 : 32;
        const auto kernel = width == 8    ? head_norm_forward_kernel<8>
                            : width == 16 ? head_norm_forward_kernel<16>
                                          : head_norm_forward_kernel<32>;
        const unsigned ctas = ceil_div(unsigned(total), THREADS / width * HEADS_A_THREAD);
        kernel<<<ctas, THREADS, 0, stream>>>(as_vectors(a.y), a.rstd, as_vectors(a.x), as_vectors(a.q_w),
                                                 as_vectors(a.k_w), unsigned(total), at, inverse_d, a.eps);
    } else {
        const unsigned ctas = ceil_div(unsigned(total), THREADS / 32);
        head_norm_forward_any_kernel<<<ctas, THREADS, 0, stream>>>(a.y, a.rstd, a.x, a.q_w, a.k_w, unsigned(total), at,
                                                                       inverse_d, a.eps);
    }
    return cudaGetLastError();
}

// head_norm_backward    of each query and key head: dqkv = r*dqkv*w - r^3 * x * mean_d(dqkv*w*x); value heads stay.
//
//   dqkv  (T, (H+2G)*D)  bf16  in: gradient of y; out: gradient of x
//   x     (T, (H+2G)*D)  bf16  input of the forward
//   rstd  (T, H+G)       f32
//   q_w   (D)            bf16  frozen, hence no gradient
//   k_w   (D)            bf16
//
// Sums in f32 in a fixed order. Floor: 6*T*(H+G)*D bytes.
struct HeadNormBackward {
    bf16 *dqkv;
    const bf16 *x;
    const float *rstd;
    const bf16 *q_w;
    const bf16 *k_w;
    uint64_t t;
    uint32_t h;
    uint32_t g;
    uint32_t d;
    uint32_t unused;
};
static_assert(sizeof(HeadNormBackward) == 64, "as in src/backend/cuda/ffi/rmsnorm.rs");

HALFBYTE_API cudaError_t head_norm_backward(const HeadNormBackward *args, cudaStream_t stream) {
    const HeadNormBackward &a = *args;
    const uint64_t total = a.t * (uint64_t(a.h) + uint64_t(a.g));
    if (total == 0) return cudaSuccess;
    if (a.d == 0 || a.t > MAX_GRID || total > MAX_GRID) return cudaErrorInvalidValue;
    const HeadRow at{a.h, a.g, a.d};
    const float inverse_d = 1.0f / float(a.d);
    const bool aligned = a.d % PER_VECTOR == 0 && a.d <= 32 * PER_VECTOR && is_aligned(a.dqkv, 16) &&
                         is_aligned(a.x, 16) && is_aligned(a.q_w, 16) && is_aligned(a.k_w, 16);
    if (aligned) {
        const unsigned width = a.d <= 64 ? 8 : a.d <= 128 ? 16 : 32;
        const auto kernel = width == 8    ? head_norm_backward_kernel<8>
                            : width == 16 ? head_norm_backward_kernel<16>
                                          : head_norm_backward_kernel<32>;
        const unsigned ctas = ceil_div(unsigned(total), THREADS / width * HEADS_A_THREAD);
        kernel<<<ctas, THREADS, 0, stream>>>(as_vectors(a.dqkv), as_vectors(a.x), a.rstd, as_vectors(a.q_w),
                                                 as_vectors(a.k_w), unsigned(total), at, inverse_d);
    } else {
        const unsigned ctas = ceil_div(unsigned(total), THREADS / 32);
        head_norm_backward_any_kernel<<<ctas, THREADS, 0, stream>>>(a.dqkv, a.x, a.rstd, a.q_w, a.k_w,
                                                                        unsigned(total), at, inverse_d);
    }
    return cudaGetLastError();
}
