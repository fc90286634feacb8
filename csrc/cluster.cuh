// Clusters of Hopper (sm_90a): CTAs that run at one time and read each other's shared memory.
#pragma once

#include "common.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

__device__ __forceinline__ uint32_t cluster_rank() {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;\n" : "=r"(rank));
    return rank;
}

__device__ __forceinline__ uint32_t cluster_ctas() {
    uint32_t count;
    asm volatile("mov.u32 %0, %%cluster_nctarank;\n" : "=r"(count));
    return count;
}

// A barrier of all threads of the cluster.
__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;\n" ::: "memory");
}

// From the shared memory of CTA `rank` of the cluster, at the place that `address` is here.
__device__ __forceinline__ float4 cluster_load(uint32_t address, uint32_t rank) {
    float4 x;
    asm volatile("{\n.reg .b32 there;\n"
                 "mapa.shared::cluster.u32 there, %4, %5;\n"
                 "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [there];\n}\n"
                 : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
                 : "r"(address), "r"(rank)
                 : "memory");
    return x;
}

#endif // __CUDA_ARCH_FEAT_SM90_ALL
