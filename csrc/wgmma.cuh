// Warpgroup matrix products of Hopper (sm_90a): shared-memory descriptors, wgmma.mma_async for bf16 with f32 sums,
// fences.
//
// A tile of R rows and C columns (C a multiple of 64) lies in shared memory as C / 64 panels, one behind the other,
// each of R rows of 128 bytes under swizzle128 (mma.cuh); R is a multiple of 8 and the tile starts at a multiple of
// 1024 bytes. Either index of a tile can be the one that a product sums over.
#pragma once

#include "mma.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// Of an operand that is summed over its columns (K-major): 16 columns from `address` on, which points into the first 8
// rows of those wanted, at a multiple of 32 bytes within the 128. Groups of 8 rows are 1024 bytes apart; the leading
// offset is not used.
__device__ __forceinline__ uint64_t descriptor_k_major(uint32_t address) {
    return uint64_t((address & 0x3ffff) >> 4) | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

// Of an operand that is summed over its rows (MN-major): 16 rows from `address` on, a multiple of 1024 bytes. Panels of
// 64 columns are `panel_bytes` apart (the leading offset), groups of 8 rows 1024.
__device__ __forceinline__ uint64_t descriptor_mn_major(uint32_t address, uint32_t panel_bytes) {
    return uint64_t((address & 0x3ffff) >> 4) | uint64_t(panel_bytes >> 4) << 16 | uint64_t(1024 >> 4) << 32 |
           uint64_t(1) << 62;
}

// Before the first product after registers of its sums or of A were written.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }

// Waits until at most N of the warpgroup's groups are under way.
template <int N> __device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(N) : "memory");
}

// Makes this thread's writes to shared memory visible to wgmma. A barrier must follow before other threads' products.
__device__ __forceinline__ void fence_for_wgmma() { asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory"); }

// The compiler must not move a use of these registers past this point: what a product writes is not known to it as
// such.
template <int N> __device__ __forceinline__ void pin(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// 32 registers as operands of an asm statement.
#define SUMS4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SUMS32(i) \
    SUMS4(i), SUMS4(i + 4), SUMS4(i + 8), SUMS4(i + 12), SUMS4(i + 16), SUMS4(i + 20), SUMS4(i + 24), SUMS4(i + 28)

// d (64 x N) = a (64 x 16) b (16 x N), or += where `accumulate` is not 0. N is twice the length of d. Sums of warp w of
// the warpgroup, with g = lane / 4 and i = lane % 4:
//   d[4n], d[4n+1]: row 16w+g, columns 8n+2i, 8n+2i+1    d[4n+2], d[4n+3]: row 16w+g+8, the same columns
// wgmma_shared_a: a (64 rows) K-major in shared memory, b (N rows) too, or MN-major (16 rows, N columns).
// wgmma_register_a: a in registers, laid out as of mma_bf16 (rows 16w..), so that sums 8k..8k+7 of one product, rounded
// and packed in pairs, are A of columns 16k..16k+15 of the next; b (16 rows, N columns) MN-major in shared memory.

template <bool MN_MAJOR_B = false>
__device__ __forceinline__ void wgmma_shared_a(float (&d)[32], uint64_t a, uint64_t b, int accumulate) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
                 "%32, %33, p, 1, 1, 0, %35;\n}\n"
                 : SUMS32(0)
                 : "l"(a), "l"(b), "r"(accumulate), "n"(int(MN_MAJOR_B)));
}

template <bool MN_MAJOR_B = false>
__device__ __forceinline__ void wgmma_shared_a(float (&d)[64], uint64_t a, uint64_t b, int accumulate) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
                 "%64, %65, p, 1, 1, 0, %67;\n}\n"
                 : SUMS32(0), SUMS32(32)
                 : "l"(a), "l"(b), "r"(accumulate), "n"(int(MN_MAJOR_B)));
}

template <bool MN_MAJOR_B = false>
__device__ __forceinline__ void wgmma_shared_a(float (&d)[96], uint64_t a, uint64_t b, int accumulate) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %98, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n192k16.f32.bf16.bf16 "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
                 "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
                 "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95}, "
                 "%96, %97, p, 1, 1, 0, %99;\n}\n"
                 : SUMS32(0), SUMS32(32), SUMS32(64)
                 : "l"(a), "l"(b), "r"(accumulate), "n"(int(MN_MAJOR_B)));
}

template <bool MN_MAJOR_B = false>
__device__ __forceinline__ void wgmma_shared_a(float (&d)[128], uint64_t a, uint64_t b, int accumulate) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
                 "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
                 "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
                 "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
                 "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "
                 "%128, %129, p, 1, 1, 0, %131;\n}\n"
                 : SUMS32(0), SUMS32(32), SUMS32(64), SUMS32(96)
                 : "l"(a), "l"(b), "r"(accumulate), "n"(int(MN_MAJOR_B)));
}

__device__ __forceinline__ void wgmma_register_a(float (&d)[32], const uint32_t (&a)[4], uint64_t b, int accumulate) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
                 "{%32, %33, %34, %35}, %36, p, 1, 1, 1;\n}\n"
                 : SUMS32(0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
}

__device__ __forceinline__ void wgmma_register_a(float (&d)[64], const uint32_t (&a)[4], uint64_t b, int accumulate) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
                 "{%64, %65, %66, %67}, %68, p, 1, 1, 1;\n}\n"
                 : SUMS32(0), SUMS32(32)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
}

#undef SUMS32
#undef SUMS4

#endif // __CUDA_ARCH_FEAT_SM90_ALL
