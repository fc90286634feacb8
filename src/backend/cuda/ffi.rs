//! The C side, declared: launchers of csrc/*.cu and a few calls of the CUDA runtime. The only extern block of the project.
//! Each launcher's contract is the comment above it in its .cu file.

use std::ffi::{CStr, c_char, c_int, c_void};

use crate::error::{Error, Result};

/// cudaError_t.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub struct Status(c_int);

/// cudaStream_t, which is the driver's CUstream.
pub type Stream = *mut c_void;

/// As csrc/common.cuh numbers them.
#[repr(i32)]
#[derive(Clone, Copy)]
pub enum Dtype {
    F32 = 0,
    Bf16 = 1,
    F16 = 2,
}

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

// The same numbers stand in static_asserts of csrc/nf4.cu.
const _: () = assert!(size_of::<Nf4Quantize>() == 40);
const _: () = assert!(size_of::<Nf4DoubleQuantize>() == 48);
const _: () = assert!(size_of::<Nf4Dequantize>() == 64);

unsafe extern "C" {
    fn cudaRuntimeGetVersion(version: *mut c_int) -> Status;
    fn cudaSetDevice(device: c_int) -> Status;
    fn cudaGetErrorName(status: Status) -> *const c_char;
    fn cudaGetErrorString(status: Status) -> *const c_char;

    pub fn nf4_quantize(args: *const Nf4Quantize, stream: Stream) -> Status;
    pub fn nf4_double_quantize(args: *const Nf4DoubleQuantize, stream: Stream) -> Status;
    pub fn nf4_dequantize(args: *const Nf4Dequantize, stream: Stream) -> Status;
}

impl Status {
    /// [`Error::Cuda`] with the runtime's own words, unless it is cudaSuccess.
    pub fn check(self, op: &'static str) -> Result<()> {
        if self.0 == 0 {
            return Ok(());
        }
        // SAFETY: both return a static, NUL-terminated string for any value.
        let (name, words) =
            unsafe { (CStr::from_ptr(cudaGetErrorName(self)), CStr::from_ptr(cudaGetErrorString(self))) };
        Err(Error::Cuda { op: op.into(), detail: format!("{}: {}", name.to_string_lossy(), words.to_string_lossy()) })
    }
}

/// The CUDA runtime that is linked in, as 1000 * major + 10 * minor. Works without a driver.
pub fn runtime_version() -> Result<c_int> {
    let mut version = 0;
    // SAFETY: writes one int.
    unsafe { cudaRuntimeGetVersion(&mut version) }.check("cudaRuntimeGetVersion")?;
    Ok(version)
}

/// Starts the runtime on a GPU and makes its primary context current. The runtime then holds that context until the
/// process ends, and with it the kernels that it loaded there.
pub fn set_device(ordinal: c_int) -> Result<()> {
    // SAFETY: takes a number, and answers with an error to one that is no GPU's.
    unsafe { cudaSetDevice(ordinal) }.check("cudaSetDevice")
}
