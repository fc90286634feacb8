// Bulk tensor copies of Hopper (sm_90a) and what they need: mbarriers, tensor maps.
#pragma once

#include <cuda.h> // CUtensorMap; nothing of the driver is linked

#include "cluster.cuh"
#include "mma.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

__device__ __forceinline__ void barrier_init(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(barrier), "r"(arrivals) : "memory");
}

// After the inits, before the barrier that other threads, CTAs and copies meet them behind.
__device__ __forceinline__ void barrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
}

// Arrives once, and announces bytes that copies will bring in this phase.
__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(barrier) : "memory");
}

// At the same place in the shared memory of CTA `rank` of the cluster. It tells that products have read what a copy may
// now overwrite, and publishes no writes: a release for the cluster would cost a fence of the whole GPU.
__device__ __forceinline__ void barrier_arrive_at(uint32_t barrier, uint32_t rank) {
    asm volatile("{\n.reg .b32 there;\n"
                 "mapa.shared::cluster.u32 there, %0, %1;\n"
                 "mbarrier.arrive.shared::cluster.b64 _, [there];\n}\n" ::"r"(barrier),
                 "r"(rank)
                 : "memory");
}

// Waits for the end of the phase of this parity. A barrier starts in phase 0; the phase before it counts as over.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, int parity) {
    asm volatile("{\n.reg .pred done;\n"
                 "again:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra again;\n}\n" ::"r"(barrier),
                 "r"(parity)
                 : "memory");
}

// A box of a matrix, from column x and row y on, to shared memory (of every CTA in `ctas`, at the same place, where
// MULTICAST); its bytes count on the barrier there. Elements outside the matrix become zeros.
template <bool MULTICAST>
__device__ __forceinline__ void copy_box(uint32_t to, const CUtensorMap *map, int x, int y, uint32_t barrier,
                                         uint16_t ctas) {
    if (MULTICAST)
        asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
                     "[%0], [%1, {%2, %3}], [%4], %5;\n" ::"r"(to),
                     "l"(map), "r"(x), "r"(y), "r"(barrier), "h"(ctas)
                     : "memory");
    else
        asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
                     "[%0], [%1, {%2, %3}], [%4];\n" ::"r"(to),
                     "l"(map), "r"(x), "r"(y), "r"(barrier)
                     : "memory");
}

// Gives registers back, or asks for more, for the whole warpgroup; the kernel needs __launch_bounds__(threads, 1).
template <int N> __device__ __forceinline__ void registers_down() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(N));
}
template <int N> __device__ __forceinline__ void registers_up() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(N));
}

#endif // __CUDA_ARCH_FEAT_SM90_ALL

// The map of a bf16 matrix (rows, columns; rows ld elements apart) that is copied in boxes of `box_rows` rows and 64
// columns, swizzled as swizzle128. The base and the rows start at multiples of 16 bytes.
inline cudaError_t tensor_map(CUtensorMap *map, const bf16 *base, uint64_t rows, uint64_t columns, uint64_t ld,
                              uint32_t box_rows) {
    // The driver is not linked: its function is looked up once.
    static decltype(&cuTensorMapEncodeTiled) const encode = [] {
        void *found = nullptr;
        cudaDriverEntryPointQueryResult result;
        const cudaError_t status =
            cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
        const bool ok = status == cudaSuccess && result == cudaDriverEntryPointSuccess;
        return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(ok ? found : nullptr);
    }();
    if (!encode) return cudaErrorSymbolNotFound;
    const cuuint64_t size[2] = {columns, rows}, stride[1] = {ld * sizeof(bf16)};
    const cuuint32_t box[2] = {64, box_rows}, step[2] = {1, 1};
    const CUresult status =
        encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<bf16 *>(base), size, stride, box, step,
               CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
               CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return status == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}
