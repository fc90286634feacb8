//! The C side, declared: a few calls of the CUDA runtime, and the launchers of csrc/*.cu, a module for each .cu file. The
//! only extern blocks of the project. Each launcher's contract is the comment above it in its .cu file.

pub mod adamw;
pub mod attention;
pub mod bias;
pub mod cross_entropy;
pub mod decode;
pub mod embedding;
pub mod gemm;
pub mod grad_norm;
pub mod load;
pub mod lora;
pub mod nf4;
pub mod nf4_gemm;
pub mod nvml;
pub mod nvtx;
pub mod rmsnorm;
pub mod rope;
pub mod swiglu;

use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::OnceLock;

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
    fn cudaDeviceSynchronize() -> Status;
    fn cudaProfilerStart() -> Status;
    fn cudaProfilerStop() -> Status;
    fn cudaGetErrorName(status: Status) -> *const c_char;
    fn cudaGetErrorString(status: Status) -> *const c_char;
}

impl Status {
    /// [`Error::Cuda`] with the runtime's own words, unless it is cudaSuccess. Under `HALFBYTE_SYNC=1` waits for the GPU
    /// first, so that a fault inside a kernel is found at the launch that it belongs to.
    pub fn check(self, op: &'static str) -> Result<()> {
        let mut status = self;
        if status.0 == 0 && synchronous() {
            // SAFETY: waits for the work of the current context.
            status = unsafe { cudaDeviceSynchronize() };
        }
        if status.0 == 0 {
            return Ok(());
        }
        Err(Error::Cuda { op: op.into(), detail: with_hint(status.0, status.words()) })
    }

    /// The runtime's name and words for it.
    fn words(self) -> String {
        // SAFETY: both return a static, NUL-terminated string for any value.
        let (name, words) =
            unsafe { (CStr::from_ptr(cudaGetErrorName(self)), CStr::from_ptr(cudaGetErrorString(self))) };
        format!("{}: {}", name.to_string_lossy(), words.to_string_lossy())
    }
}

/// Whether `HALFBYTE_SYNC=1` asks to wait for the GPU after every launch. Graphs cannot be recorded then.
pub fn synchronous() -> bool {
    static SYNC: OnceLock<bool> = OnceLock::new();
    *SYNC.get_or_init(|| std::env::var("HALFBYTE_SYNC").is_ok_and(|value| !matches!(value.as_str(), "" | "0")))
}

/// A fault inside a kernel shows at some later call: what is said of it then names the wrong op. `code` is cudaError_t or
/// CUresult, which number these faults alike.
pub fn with_hint(code: c_int, detail: String) -> String {
    // From cudaErrorIllegalAddress to cudaErrorLaunchFailure, and cudaErrorECCUncorrectable.
    let sticky = matches!(code, 214 | 700..=702 | 710 | 714..=719);
    let hint = "this launch or one before it; HALFBYTE_SYNC=1 waits after each and names it";
    if sticky && !synchronous() { format!("{detail} ({hint})") } else { detail }
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
/// Errors: the runtime's number for what is wrong, and its words.
pub fn set_device(ordinal: c_int) -> Result<(), (c_int, String)> {
    // SAFETY: takes a number, and answers with an error to one that is no GPU's.
    let status = unsafe { cudaSetDevice(ordinal) };
    if status.0 == 0 { Ok(()) } else { Err((status.0, status.words())) }
}

/// Begins or ends the range that a profiler looks at which was told to wait for one; without a profiler nothing happens.
pub fn profiler(on: bool) -> Result<()> {
    // SAFETY: neither takes an argument; they concern the current context.
    match on {
        true => unsafe { cudaProfilerStart() }.check("cudaProfilerStart"),
        false => unsafe { cudaProfilerStop() }.check("cudaProfilerStop"),
    }
}
