//! The C side, declared: a few calls of the CUDA runtime, and the launchers of csrc/*.cu, a module for each .cu file. The
//! only extern blocks of the project. Each launcher's contract is the comment above it in its .cu file.

pub mod adamw;
pub mod attention;
pub mod cross_entropy;
pub mod decode;
pub mod embedding;
pub mod gemm;
pub mod grad_norm;
pub mod lora;
pub mod nf4;
pub mod nf4_gemm;
pub mod rmsnorm;
pub mod rope;
pub mod swiglu;

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

unsafe extern "C" {
    fn cudaRuntimeGetVersion(version: *mut c_int) -> Status;
    fn cudaSetDevice(device: c_int) -> Status;
    fn cudaGetErrorName(status: Status) -> *const c_char;
    fn cudaGetErrorString(status: Status) -> *const c_char;
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
