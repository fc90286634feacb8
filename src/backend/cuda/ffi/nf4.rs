//! csrc/nf4.cu.

use std::ffi::c_void;

use half::bf16;

use super::{Dtype, Status, Stream};

/// As csrc/nf4.cuh numbers them.
#[repr(i32)]
#[derive(Clone, Copy)]
pub enum QuantType {
    Nf4 = 0,
    Fp4 = 1,
}

#[repr(C)]
pub struct Nf4Quantize {
    pub packed: *mut u8,
    pub absmax: *mut f32,
    pub x: *const c_void,
    pub n: u64,
    pub x_dtype: Dtype,
    pub quant_type: QuantType,
}

#[repr(C)]
pub struct Nf4DoubleQuantize {
    pub codes: *mut u8,
    pub nested_absmax: *mut f32,
    pub offset: *mut f32,
    pub partial: *mut f64,
    pub absmax: *const f32,
    pub blocks: u64,
}

/// `absmax` or, if that is null, the other three.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Nf4Absmax {
    pub absmax: *const f32,
    pub codes: *const u8,
    pub nested_absmax: *const f32,
    pub offset: *const f32,
}

#[repr(C)]
pub struct Nf4Dequantize {
    pub out: *mut c_void,
    pub packed: *const u8,
    pub absmax: Nf4Absmax,
    pub n: u64,
    pub out_dtype: Dtype,
    pub quant_type: QuantType,
}

#[repr(C)]
pub struct Nf4DequantizeRange {
    pub out: *mut bf16,
    pub packed: *const u8,
    pub absmax: Nf4Absmax,
    pub first: u64,
    pub n: u64,
    pub quant_type: QuantType,
}

// The same numbers stand in static_asserts of csrc/nf4.cu.
const _: () = assert!(size_of::<Nf4Quantize>() == 40);
const _: () = assert!(size_of::<Nf4DoubleQuantize>() == 48);
const _: () = assert!(size_of::<Nf4Dequantize>() == 64);
const _: () = assert!(size_of::<Nf4DequantizeRange>() == 72);

unsafe extern "C" {
    pub fn nf4_quantize(args: *const Nf4Quantize, stream: Stream) -> Status;
    pub fn nf4_double_quantize(args: *const Nf4DoubleQuantize, stream: Stream) -> Status;
    pub fn nf4_dequantize(args: *const Nf4Dequantize, stream: Stream) -> Status;
    pub fn nf4_dequantize_range(args: *const Nf4DequantizeRange, stream: Stream) -> Status;
}
