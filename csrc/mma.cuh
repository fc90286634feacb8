// Warp-level building blocks of the tensor-core kernels: cp.async, ldmatrix, mma.sync, and the swizzled tile. All of it
// runs from sm_80 on.
#pragma once

#include "common.cuh"

using bf16 = __nv_bfloat16;

__device__ __forceinline__ uint32_t shared_address(const void *p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Copies 16 bytes to shared memory past L1, or writes 16 zero bytes where `valid` is false (`from` is then not read).
__device__ __forceinline__ void cp_async16(uint32_t to_shared, const void *from, bool valid) {
    const int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to_shared), "l"(from), "r"(bytes) : "memory");
}

// The same, but nothing happens unless `wanted`. Neither condition costs a branch.
__device__ __forceinline__ void cp_async16_if(uint32_t to_shared, const void *from, bool valid, bool wanted) {
    asm volatile("{\n.reg .pred w, z;\nsetp.ne.s32 w, %3, 0;\nsetp.eq.s32 z, %2, 0;\n"
                 "@w cp.async.cg.shared.global [%0], [%1], 16, z;\n}\n" ::"r"(to_shared),
                 "l"(from), "r"(int(valid)), "r"(int(wanted))
                 : "memory");
}

// Writes 16 bytes to shared memory if `wanted`, without a branch: what was computed for it overlaps with what follows.
__device__ __forceinline__ void store_shared16(uint32_t to_shared, const uint32_t (&v)[4], bool wanted) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.s32 p, %5, 0;\n"
                 "@p st.shared.v4.b32 [%0], {%1, %2, %3, %4};\n}\n" ::"r"(to_shared),
                 "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]), "r"(int(wanted))
                 : "memory");
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Waits until at most N of this thread's groups are under way. A barrier must follow before other threads read.
template <int N> __device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;\n" ::"n"(N) : "memory");
}

// Four 8x8 matrices of 16-bit elements; lane l names the row (16 bytes, in shared memory) l % 8 of matrix l / 8.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
}

// The same, each matrix transposed.
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
}

// c (16x8, f32) += a (16x16) b (16x8), both bf16. With g = lane / 4 and i = lane % 4:
//   a[0]: (g, 2i..)  a[1]: (g+8, 2i..)  a[2]: (g, 2i+8..)  a[3]: (g+8, 2i+8..)     two columns each, the lower in the low half
//   b[0]: (2i.., g)  b[1]: (2i+8.., g)                                             two rows each
//   c[0], c[1]: (g, 2i), (g, 2i+1)  c[2], c[3]: (g+8, 2i), (g+8, 2i+1)
__device__ __forceinline__ void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two f32 rounded to bf16; `low` goes to the low half.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
    __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<uint32_t *>(&v);
}

// Byte offset of the 16-byte chunk `chunk` of row `row` in a tile whose rows are 128 bytes (64 bf16): the chunk number is
// XORed with the row's low 3 bits, so that eight rows of one column lie in eight different bank groups. It is also the
// 128-byte swizzle of TMA and wgmma where the tile starts at a multiple of 1024 bytes.
__device__ __forceinline__ uint32_t swizzle128(int row, int chunk) {
    return static_cast<uint32_t>(row * 128 + ((chunk ^ (row & 7)) << 4));
}
