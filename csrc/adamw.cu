// AdamW over the flat vector of all P trainable weights, moments in 32 or in 8 bits: one launch for all tensors, or one
// for each window of a state that travels. Every product, sum, root and quotient is rounded by itself, as on the host: no
// contraction, so that the CPU backend and every placement of the state give the same bits.

#include "nf4.cuh"

namespace {

constexpr int THREADS = 256;
constexpr int PER_THREAD = 4; // weights of a thread, one 16-byte vector of f32
constexpr int WARPS = THREADS / 32;
constexpr int MOMENT_BLOCK = 256; // weights that share an absmax of 8-bit moments; a warp takes one block
constexpr int PER_LANE = MOMENT_BLOCK / 32;
constexpr uint32_t M_ZERO = 127; // the code of 0 in the signed map

// bitsandbytes' unsigned dynamic 8-bit code, as it ships it (NF4_DYNAMIC_CODE is the signed one).
__device__ const float DYNAMIC_UNSIGNED_CODE[256] = {
    0.0f, 3.2500003e-07f, 7.75e-07f, 2.1249998e-06f, 4.3749997e-06f, 6.625e-06f, 8.874999e-06f, 1.5624999e-05f,
    2.6875001e-05f, 3.8125e-05f, 4.9374998e-05f, 6.0625003e-05f, 7.1875e-05f, 8.312499e-05f, 9.4375e-05f, 0.000128125f,
    0.000184375f, 0.00024062501f, 0.00029687502f, 0.00035312498f, 0.00040937503f, 0.00046562502f, 0.00052187504f, 0.000578125f,
    0.000634375f, 0.00069062505f, 0.000746875f, 0.0008031251f, 0.00085937505f, 0.000915625f, 0.00097187504f, 0.001140625f,
    0.001421875f, 0.001703125f, 0.001984375f, 0.002265625f, 0.0025468748f, 0.002828125f, 0.0031093748f, 0.0033906251f,
    0.003671875f, 0.003953125f, 0.0042343745f, 0.004515625f, 0.0047968747f, 0.005078125f, 0.005359375f, 0.0056406246f,
    0.005921875f, 0.0062031248f, 0.006484375f, 0.0067656254f, 0.0070468746f, 0.007328125f, 0.0076093744f, 0.007890625f,
    0.008171875f, 0.008453124f, 0.008734375f, 0.009015624f, 0.0092968745f, 0.009578126f, 0.009859375f, 0.010703126f,
    0.012109376f, 0.013515624f, 0.014921876f, 0.016328124f, 0.017734377f, 0.019140625f, 0.020546874f, 0.021953126f,
    0.023359375f, 0.024765624f, 0.026171876f, 0.027578129f, 0.028984373f, 0.030390626f, 0.031796873f, 0.033203125f,
    0.034609374f, 0.036015626f, 0.03742188f, 0.038828123f, 0.040234376f, 0.041640624f, 0.043046873f, 0.044453125f,
    0.045859374f, 0.047265626f, 0.04867187f, 0.050078124f, 0.051484372f, 0.052890625f, 0.054296877f, 0.05570313f,
    0.057109382f, 0.058515627f, 0.059921872f, 0.061328124f, 0.06273438f, 0.06414063f, 0.06554688f, 0.06695312f,
    0.068359375f, 0.06976563f, 0.07117188f, 0.072578125f, 0.07398438f, 0.07539063f, 0.07679688f, 0.07820313f,
    0.07960938f, 0.081015624f, 0.08242188f, 0.08382813f, 0.085234374f, 0.086640626f, 0.08804687f, 0.08945312f,
    0.090859376f, 0.09226563f, 0.09367188f, 0.095078126f, 0.09648438f, 0.09789063f, 0.099296875f, 0.103515625f,
    0.11054687f, 0.11757813f, 0.12460937f, 0.13164061f, 0.13867188f, 0.14570314f, 0.15273437f, 0.15976563f,
    0.16679686f, 0.17382812f, 0.18085939f, 0.18789062f, 0.19492188f, 0.20195311f, 0.20898438f, 0.21601564f,
    0.22304687f, 0.23007813f, 0.23710936f, 0.24414062f, 0.25117186f, 0.25820312f, 0.26523438f, 0.2722656f,
    0.27929688f, 0.28632814f, 0.29335937f, 0.3003906f, 0.30742186f, 0.31445312f, 0.3214844f, 0.32851562f,
    0.33554685f, 0.3425781f, 0.34960938f, 0.35664064f, 0.36367187f, 0.3707031f, 0.37773436f, 0.38476562f,
    0.3917969f, 0.39882812f, 0.40585935f, 0.4128906f, 0.41992188f, 0.42695314f, 0.43398437f, 0.4410156f,
    0.44804686f, 0.45507812f, 0.4621094f, 0.46914062f, 0.47617185f, 0.4832031f, 0.49023438f, 0.4972656f,
    0.5042969f, 0.5113281f, 0.51835936f, 0.5253906f, 0.5324218f, 0.53945315f, 0.54648435f, 0.5535157f,
    0.5605469f, 0.56757814f, 0.5746094f, 0.5816406f, 0.5886719f, 0.5957031f, 0.6027344f, 0.60976565f,
    0.61679685f, 0.6238282f, 0.6308594f, 0.63789064f, 0.6449219f, 0.6519531f, 0.6589844f, 0.6660156f,
    0.6730469f, 0.68007815f, 0.68710935f, 0.6941407f, 0.7011719f, 0.70820314f, 0.7152344f, 0.7222656f,
    0.7292969f, 0.7363281f, 0.7433594f, 0.75039065f, 0.75742185f, 0.7644532f, 0.7714844f, 0.7785156f,
    0.7855469f, 0.7925781f, 0.7996094f, 0.8066406f, 0.8136718f, 0.82070315f, 0.82773435f, 0.8347657f,
    0.8417969f, 0.8488281f, 0.8558594f, 0.8628906f, 0.8699219f, 0.8769531f, 0.8839843f, 0.89101565f,
    0.89804685f, 0.9050782f, 0.9121094f, 0.9191406f, 0.9261719f, 0.9332031f, 0.9402344f, 0.9472656f,
    0.9542968f, 0.96132815f, 0.96835935f, 0.9753907f, 0.9824219f, 0.9894531f, 0.9964844f, 1.0f
};

// A parameter group: weights from `start` up to the start of the next.
struct Group {
    uint64_t start;
    float decay; // 1 - lr * weight_decay
    float rate;  // lr / (1 - beta1^step)
};
static_assert(sizeof(Group) == 16, "as in src/backend/cuda/ffi/adamw.rs");

// A tensor of the adapter: weights from `start` on, blocks from `block` on.
struct Tensor {
    uint64_t start;
    uint64_t block;
};
static_assert(sizeof(Tensor) == 16, "as in src/backend/cuda/ffi/adamw.rs");

struct Factors {
    const float *norm;   // (1) norm of the gradients
    const Group *groups; // (group_count) by rising start, the first 0
    uint32_t group_count;
    float beta1;
    float beta2;
    float eps;
    float bias2_root;    // sqrt(1 - beta2^step)
    float max_grad_norm; // <= 0: no clipping
};

__device__ __forceinline__ bool is_finite(float x) { return (__float_as_uint(x) & 0x7f800000u) != 0x7f800000u; }

__device__ __forceinline__ float clip_of(const Factors &f, float norm) {
    if (!(f.max_grad_norm > 0.0f)) return 1.0f;
    return fminf(__fdiv_rn(f.max_grad_norm, __fadd_rn(norm, 1e-6f)), 1.0f);
}

// The last of `count` entries that does not start behind weight i.
__device__ __forceinline__ uint32_t group_of(const Group *groups, uint32_t count, uint64_t i) {
    uint32_t low = 0, high = count - 1;
    while (low < high) {
        const uint32_t middle = (low + high + 1) / 2;
        if (groups[middle].start <= i) low = middle;
        else high = middle - 1;
    }
    return low;
}

// Steps on to the group of weight i, which does not lie before that of the last call.
struct GroupCursor {
    const Group *groups;
    uint32_t count;
    uint32_t at;
    uint64_t next; // where the group ends
    float decay, rate;

    __device__ __forceinline__ void load() {
        decay = groups[at].decay;
        rate = groups[at].rate;
        next = at + 1 < count ? groups[at + 1].start : ~uint64_t(0);
    }
    __device__ __forceinline__ GroupCursor(const Factors &f, uint64_t i)
        : groups(f.groups), count(f.group_count), at(group_of(f.groups, f.group_count, i)) {
        load();
    }
    __device__ __forceinline__ void move_to(uint64_t i) {
        while (i >= next) {
            ++at;
            load();
        }
    }
};

__device__ __forceinline__ void new_moments(const Factors &f, float clip, float g, float &m, float &v) {
    g = __fmul_rn(g, clip);
    m = __fadd_rn(__fmul_rn(f.beta1, m), __fmul_rn(__fsub_rn(1.0f, f.beta1), g));
    v = __fadd_rn(__fmul_rn(f.beta2, v), __fmul_rn(__fmul_rn(__fsub_rn(1.0f, f.beta2), g), g));
}

__device__ __forceinline__ float new_weight(const Factors &f, float w, float m, float v, float decay, float rate) {
    const float root = __fadd_rn(__fdiv_rn(__fsqrt_rn(v), f.bias2_root), f.eps);
    return __fsub_rn(__fmul_rn(w, decay), __fmul_rn(rate, __fdiv_rn(m, root)));
}

__global__ void __launch_bounds__(THREADS)
adamw_32bit_kernel(float *__restrict__ master, float *__restrict__ m, float *__restrict__ v,
                   __nv_bfloat16 *__restrict__ lora, const float *__restrict__ grads, Factors f, uint64_t begin,
                   uint64_t end) {
    const uint64_t first = begin + (uint64_t(blockIdx.x) * THREADS + threadIdx.x) * PER_THREAD;
    const float norm = *f.norm;
    if (first >= end || !is_finite(norm)) return;
    const float clip = clip_of(f, norm);
    const bool whole = first + PER_THREAD <= end;
    const int count = whole ? PER_THREAD : int(end - first);

    alignas(16) float w[PER_THREAD], a[PER_THREAD], b[PER_THREAD], g[PER_THREAD];
    if (whole) {
        *reinterpret_cast<float4 *>(w) = *reinterpret_cast<const float4 *>(master + first);
        *reinterpret_cast<float4 *>(a) = *reinterpret_cast<const float4 *>(m + first);
        *reinterpret_cast<float4 *>(b) = *reinterpret_cast<const float4 *>(v + first);
        *reinterpret_cast<float4 *>(g) = *reinterpret_cast<const float4 *>(grads + first);
    } else {
#pragma unroll
        for (int j = 0; j < PER_THREAD; ++j) {
            const bool there = j < count;
            w[j] = there ? master[first + j] : 0.0f;
            a[j] = there ? m[first + j] : 0.0f;
            b[j] = there ? v[first + j] : 0.0f;
            g[j] = there ? grads[first + j] : 0.0f;
        }
    }

    GroupCursor group(f, first);
#pragma unroll
    for (int j = 0; j < PER_THREAD; ++j) {
        if (j < count) group.move_to(first + j);
        new_moments(f, clip, g[j], a[j], b[j]);
        w[j] = new_weight(f, w[j], a[j], b[j], group.decay, group.rate);
    }

    if (whole) {
        *reinterpret_cast<float4 *>(master + first) = *reinterpret_cast<const float4 *>(w);
        *reinterpret_cast<float4 *>(m + first) = *reinterpret_cast<const float4 *>(a);
        *reinterpret_cast<float4 *>(v + first) = *reinterpret_cast<const float4 *>(b);
        alignas(8) __nv_bfloat162 pairs[2] = {__floats2bfloat162_rn(w[0], w[1]), __floats2bfloat162_rn(w[2], w[3])};
        *reinterpret_cast<uint2 *>(lora + first) = *reinterpret_cast<const uint2 *>(pairs);
    } else {
#pragma unroll
        for (int j = 0; j < PER_THREAD; ++j) {
            if (j >= count) continue;
            master[first + j] = w[j];
            m[first + j] = a[j];
            v[first + j] = b[j];
            lora[first + j] = __float2bfloat16_rn(w[j]);
        }
    }
}

// Number of the 255 midpoints that lie below s.
__device__ __forceinline__ uint32_t nearest_code(const float *midpoint, float s) {
    uint32_t code = 0;
#pragma unroll
    for (uint32_t step = 128; step > 0; step /= 2)
        if (s > midpoint[code + step - 1]) code += step;
    return code;
}

// x as a share of the largest magnitude of its block; 0 in a block of zeros.
__device__ __forceinline__ float share(float x, float absmax) { return absmax > 0.0f ? __fdiv_rn(x, absmax) : 0.0f; }

// A block of 256 weights a warp; lane l holds weights l, l + 32, ...
__global__ void __launch_bounds__(THREADS)
adamw_8bit_kernel(float *__restrict__ master, uint8_t *__restrict__ m, uint8_t *__restrict__ v,
                  float *__restrict__ m_absmax, float *__restrict__ v_absmax, __nv_bfloat16 *__restrict__ lora,
                  const float *__restrict__ grads, Factors f, const Tensor *__restrict__ tensors,
                  uint32_t tensor_count, uint64_t p, uint64_t block_begin, uint64_t block_end) {
    static_assert(THREADS == 256, "one thread a code");
    __shared__ float m_value[256], v_value[256], m_midpoint[256], v_midpoint[256];
    const int t = threadIdx.x;
    m_value[t] = NF4_DYNAMIC_CODE[t];
    v_value[t] = DYNAMIC_UNSIGNED_CODE[t];
    m_midpoint[t] = t < 255 ? (NF4_DYNAMIC_CODE[t] + NF4_DYNAMIC_CODE[t + 1]) * 0.5f : 0.0f;
    v_midpoint[t] = t < 255 ? (DYNAMIC_UNSIGNED_CODE[t] + DYNAMIC_UNSIGNED_CODE[t + 1]) * 0.5f : 0.0f;
    __syncthreads();

    const uint64_t block = block_begin + uint64_t(blockIdx.x) * WARPS + t / 32;
    const float norm = *f.norm;
    if (block >= block_end || !is_finite(norm)) return; // the whole warp
    const float clip = clip_of(f, norm);

    uint32_t low = 0, high = tensor_count - 1; // the last tensor that does not start behind this block
    while (low < high) {
        const uint32_t middle = (low + high + 1) / 2;
        if (tensors[middle].block <= block) low = middle;
        else high = middle - 1;
    }
    const uint64_t start = tensors[low].start + (block - tensors[low].block) * MOMENT_BLOCK;
    const uint64_t tensor_end = low + 1 < tensor_count ? tensors[low + 1].start : p;
    const int count = tensor_end - start < MOMENT_BLOCK ? int(tensor_end - start) : MOMENT_BLOCK;

    const float old_m_absmax = m_absmax[block], old_v_absmax = v_absmax[block];
    const int lane = t % 32;
    float a[PER_LANE], b[PER_LANE];
    float m_largest = 0.0f, v_largest = 0.0f;
    GroupCursor group(f, start);
#pragma unroll
    for (int j = 0; j < PER_LANE; ++j) {
        const int k = lane + 32 * j;
        a[j] = 0.0f;
        b[j] = 0.0f;
        if (k < count) {
            const uint64_t i = start + k;
            a[j] = __fmul_rn(m_value[m[i]], old_m_absmax);
            b[j] = __fmul_rn(v_value[v[i]], old_v_absmax);
            new_moments(f, clip, grads[i], a[j], b[j]);
            group.move_to(i);
            const float w = new_weight(f, master[i], a[j], b[j], group.decay, group.rate);
            master[i] = w;
            lora[i] = __float2bfloat16_rn(w);
        }
        m_largest = fmaxf(m_largest, fabsf(a[j]));
        v_largest = fmaxf(v_largest, fabsf(b[j]));
    }
    __syncwarp(); // every lane has read the absmax
    m_largest = lanes_max<32>(m_largest);
    v_largest = lanes_max<32>(v_largest);
    if (lane == 0) {
        m_absmax[block] = m_largest;
        v_absmax[block] = v_largest;
    }
#pragma unroll
    for (int j = 0; j < PER_LANE; ++j) {
        const int k = lane + 32 * j;
        if (k >= count) continue;
        const float s = share(a[j], m_largest);
        const uint32_t code = nearest_code(m_midpoint, s);
        // What is negative keeps its sign, as in bitsandbytes.
        m[start + k] = uint8_t(code == M_ZERO && s < 0.0f ? code - 1 : code);
        v[start + k] = uint8_t(nearest_code(v_midpoint, share(b[j], v_largest)));
    }
}

} // namespace

// adamw_32bit    For weights i in begin .. end, with clip = min(1, max_grad_norm / (norm + 1e-6)):
//   g = clip * grads[i];  m[i] = beta1 * m[i] + (1 - beta1) * g;  v[i] = beta2 * v[i] + (1 - beta2) * g * g
//   master[i] = master[i] * decay - rate * m[i] / (sqrt(v[i]) / bias2_root + eps);  lora[i] = bf16(master[i])
//
//   master, m, v  (P)  f32   in place; device, managed or pinned host memory
//   lora          (P)  bf16  =
//   grads         (P)  f32
//   norm          (1)  f32   on the device: nothing at all is written where it is not finite
//   groups        sorted by start, the first at 0: `decay` = 1 - lr * weight_decay, `rate` = lr / (1 - beta1^step)
//
// master, m, v, grads 16-byte and lora 8-byte aligned, begin a multiple of 4. No atomics; the same bits in every run, for
// every cut into windows. Floor: 30 bytes a weight.
struct Adamw32bit {
    float *master;
    float *m;
    float *v;
    __nv_bfloat16 *lora;
    const float *grads;
    Factors factors;
    uint64_t begin;
    uint64_t end;
};
static_assert(sizeof(Factors) == 40, "as in src/backend/cuda/ffi/adamw.rs");
static_assert(sizeof(Adamw32bit) == 96, "as in src/backend/cuda/ffi/adamw.rs");

HALFBYTE_API cudaError_t adamw_32bit(const Adamw32bit *args, cudaStream_t stream) {
    const Adamw32bit &a = *args;
    if (a.begin >= a.end) return cudaSuccess;
    if (a.factors.group_count == 0) return cudaErrorInvalidValue;
    if (!is_aligned(a.master, 16) || !is_aligned(a.m, 16) || !is_aligned(a.v, 16) || !is_aligned(a.grads, 16) ||
        !is_aligned(a.lora, 8) || a.begin % PER_THREAD != 0)
        return cudaErrorMisalignedAddress;
    const unsigned ctas = unsigned(ceil_div<uint64_t>(a.end - a.begin, THREADS * PER_THREAD));
    adamw_32bit_kernel<<<ctas, THREADS, 0, stream>>>(a.master, a.m, a.v, a.lora, a.grads, a.factors, a.begin, a.end);
    return cudaGetLastError();
}

// adamw_8bit    The same with moments in 8 bits, for blocks block_begin .. block_end: a moment is value(code) * absmax of
//   its block of 256, blocks start anew with each tensor. The weights move by the fresh moments; then absmax = the largest
//   magnitude of the block, code = number of midpoints of the map below moment / absmax. Maps: bitsandbytes' dynamic ones,
//   signed for m (what is negative keeps its sign), unsigned for v.
//
//   master              (P)       f32  in place
//   m, v                (P)       u8   in place
//   m_absmax, v_absmax  (blocks)  f32  in place
//   tensors             sorted: first weight and first block of each
//
// Others as in adamw_32bit. Floor: 18 bytes a weight, and 16 a block.
struct Adamw8bit {
    float *master;
    uint8_t *m;
    uint8_t *v;
    float *m_absmax;
    float *v_absmax;
    __nv_bfloat16 *lora;
    const float *grads;
    Factors factors;
    const Tensor *tensors;
    uint64_t p;
    uint64_t block_begin;
    uint64_t block_end;
    uint32_t tensor_count;
};
static_assert(sizeof(Adamw8bit) == 136, "as in src/backend/cuda/ffi/adamw.rs");

HALFBYTE_API cudaError_t adamw_8bit(const Adamw8bit *args, cudaStream_t stream) {
    const Adamw8bit &a = *args;
    if (a.block_begin >= a.block_end) return cudaSuccess;
    if (a.factors.group_count == 0 || a.tensor_count == 0) return cudaErrorInvalidValue;
    const unsigned ctas = unsigned(ceil_div<uint64_t>(a.block_end - a.block_begin, WARPS));
    adamw_8bit_kernel<<<ctas, THREADS, 0, stream>>>(a.master, a.m, a.v, a.m_absmax, a.v_absmax, a.lora, a.grads,
                                                    a.factors, a.tensors, a.tensor_count, a.p, a.block_begin,
                                                    a.block_end);
    return cudaGetLastError();
}
