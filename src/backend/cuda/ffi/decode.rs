//! csrc/decode.cu.

use std::ffi::c_void;

use half::bf16;

use super::nf4::{Nf4Absmax, QuantType};
use super::{Status, Stream};

/// As MATVEC_MAX_PARTS of csrc/decode.cu.
pub const MATVEC_MAX_PARTS: usize = 3;

/// The weight is `w` or, if that is null, the 4-bit one.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct MatvecPart {
    pub packed: *const u8,
    pub absmax: Nf4Absmax,
    pub w: *const bf16,
    pub h: *const bf16,
    pub b: *const bf16,
    pub bias: *const bf16,
    pub y: i32,
    pub n: i32,
    pub r: i32,
    pub quant_type: QuantType,
}

#[repr(C)]
pub struct Matvec {
    pub y: *mut c_void,
    pub x: *const bf16,
    pub ldy: u64,
    pub ldh: u64,
    pub parts: [MatvecPart; MATVEC_MAX_PARTS],
    pub count: i32,
    pub t: i32,
    pub k: i32,
    pub y_is_f32: i32,
}

#[repr(C)]
pub struct AttentionDecode {
    pub o: *mut bf16,
    pub k: *mut bf16,
    pub v: *mut bf16,
    pub qkv: *const bf16,
    pub positions: *const i32,
    pub scratch: *mut f32,
    pub t: i32,
    pub capacity: i32,
    pub h: i32,
    pub g: i32,
    pub d: i32,
    /// 0: none
    pub window: i32,
    pub splits: i32,
    pub scale: f32,
}

// The same numbers stand in static_asserts of csrc/decode.cu.
const _: () = assert!(size_of::<MatvecPart>() == 88);
const _: () = assert!(size_of::<Matvec>() == 312);
const _: () = assert!(size_of::<AttentionDecode>() == 80);

unsafe extern "C" {
    pub fn matvec(args: *const Matvec, stream: Stream) -> Status;
    pub fn attention_decode(args: *const AttentionDecode, stream: Stream) -> Status;
}
