// A small part of NVIDIA's cuda_bf16.h, for machines that have NVRTC and no CUDA headers.
#pragma once

struct __align__(2) __nv_bfloat16 {
  unsigned short x;
};

struct __align__(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

__device__ __forceinline__ __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) {
  __nv_bfloat16 value;
  value.x = bits;
  return value;
}

__device__ __forceinline__ unsigned short __bfloat16_as_ushort(__nv_bfloat16 value) { return value.x; }

__device__ __forceinline__ float __bfloat162float(__nv_bfloat16 value) {
  return __uint_as_float(static_cast<unsigned>(value.x) << 16);
}

__device__ __forceinline__ __nv_bfloat16 __float2bfloat16(float value) {
  __nv_bfloat16 result;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.x) : "f"(value));
  return result;
}

__device__ __forceinline__ __nv_bfloat16 __float2bfloat16_rn(float value) { return __float2bfloat16(value); }

__device__ __forceinline__ float __low2float(__nv_bfloat162 value) { return __bfloat162float(value.x); }
__device__ __forceinline__ float __high2float(__nv_bfloat162 value) { return __bfloat162float(value.y); }

__device__ __forceinline__ float2 __bfloat1622float2(__nv_bfloat162 value) {
  return make_float2(__low2float(value), __high2float(value));
}

__device__ __forceinline__ __nv_bfloat162 __floats2bfloat162_rn(float low, float high) {
  __nv_bfloat162 result;
  result.x = __float2bfloat16(low);
  result.y = __float2bfloat16(high);
  return result;
}

__device__ __forceinline__ __nv_bfloat162 __float22bfloat162_rn(float2 value) {
  return __floats2bfloat162_rn(value.x, value.y);
}
