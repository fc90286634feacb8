// Philox4x32-10 (Salmon et al., SC 2011) and the rule of LoRA dropout, number for number as src/rng.rs and
// backend::Dropout have them: element i = t*K + k of projection `site` is kept where number step * 2^32 + i of the
// sequence (Dropout, site) of `seed` is >= p.
#pragma once

#include "common.cuh"

// rng::Stream::Dropout.
constexpr uint32_t PHILOX_STREAM_DROPOUT = 3;

__device__ __forceinline__ uint4 philox(uint4 c, uint32_t key0, uint32_t key1) {
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const uint64_t p0 = uint64_t(c.x) * 0xD2511F53u, p1 = uint64_t(c.z) * 0xCD9E8D57u;
        c = make_uint4(uint32_t(p1 >> 32) ^ c.y ^ key0, uint32_t(p1), uint32_t(p0 >> 32) ^ c.w ^ key1, uint32_t(p0));
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return c;
}

// Dropout of one launch. `step` null: none.
struct LoraDropout {
    const uint32_t *step; // (1) on the device: number of the micro-batch
    uint64_t seed;
    uint32_t threshold; // a 32-bit word is kept where it is >= this: ceil(p * 2^24) * 2^8
    float inverse;      // 1 / (1 - p)
};
static_assert(sizeof(LoraDropout) == 24, "as in src/backend/cuda/ffi/lora.rs");

// Bit e is set where element `index` + e is kept, e < 8. `quads`: index is a multiple of 4, so that two blocks serve.
__device__ __forceinline__ uint32_t dropout_keep8(const LoraDropout &d, uint32_t step, uint32_t site, uint64_t index,
                                                  bool quads) {
    const uint32_t key0 = uint32_t(d.seed), key1 = uint32_t(d.seed >> 32);
    const uint64_t number = (uint64_t(step) << 32) + index;
    uint32_t keep = 0;
    if (quads) {
#pragma unroll
        for (int b = 0; b < 2; ++b) {
            const uint64_t block = number / 4 + b;
            const uint4 w = philox(make_uint4(uint32_t(block), uint32_t(block >> 32), site, PHILOX_STREAM_DROPOUT), key0, key1);
            keep |= (uint32_t(w.x >= d.threshold) | uint32_t(w.y >= d.threshold) << 1 | uint32_t(w.z >= d.threshold) << 2 |
                     uint32_t(w.w >= d.threshold) << 3)
                    << (4 * b);
        }
    } else {
#pragma unroll 1
        for (int e = 0; e < 8; ++e) {
            const uint64_t block = (number + e) / 4;
            const uint4 w = philox(make_uint4(uint32_t(block), uint32_t(block >> 32), site, PHILOX_STREAM_DROPOUT), key0, key1);
            const int at = int((number + e) % 4);
            const uint32_t word = at == 0 ? w.x : at == 1 ? w.y : at == 2 ? w.z : w.w;
            keep |= uint32_t(word >= d.threshold) << e;
        }
    }
    return keep;
}

// Zeroes the dropped ones of eight bf16; `keep` as dropout_keep8 gives it.
__device__ __forceinline__ uint4 dropout_zero(uint4 v, uint32_t keep) {
    const auto pair = [keep](uint32_t word, int e) {
        return word & ((keep >> e & 1 ? 0x0000ffffu : 0u) | (keep >> e & 2 ? 0xffff0000u : 0u));
    };
    return make_uint4(pair(v.x, 0), pair(v.y, 2), pair(v.z, 4), pair(v.w, 6));
}
