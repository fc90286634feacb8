//! Which GPUs are there, and which of them this build can use. Needs no GPU and no driver to answer.

use std::ffi::{CStr, c_int};

use cudarc::driver::{DriverError, result, sys};

use super::ffi;
use super::ffi::nvml::{Clock, Nvml};
use crate::error::{Error, Result};

/// What the kernels were compiled for ("sm_80,sm_90a,compute_90"), from build.rs.
pub const KERNEL_ARCHS: &str = env!("HALFBYTE_KERNEL_ARCHS");

/// The NVIDIA driver and the GPUs it shows, in its order.
#[derive(Clone, Debug)]
pub struct Driver {
    /// The newest CUDA it can run: (13, 0).
    pub version: (u32, u32),
    /// Why this build cannot use it, if it is too old.
    pub too_old: Option<String>,
    pub devices: Vec<Device>,
}

/// One GPU.
#[derive(Clone, Debug)]
pub struct Device {
    pub ordinal: usize,
    pub name: String,
    /// (9, 0) for an H100.
    pub compute_capability: (u32, u32),
    /// Bytes of device memory.
    pub memory: usize,
    /// Number of multiprocessors.
    pub multiprocessors: u32,
    /// Why this build cannot use it, if there are no kernels for it.
    pub unsupported: Option<String>,
}

impl Driver {
    /// Asks the driver. [`Error::Unavailable`] if there is none, or if it shows no GPU.
    pub fn discover() -> Result<Self> {
        let unavailable = |why: String| Error::Unavailable { what: "CUDA".into(), why };
        // SAFETY: opens libcuda.so and closes it again; NVIDIA's library does nothing on loading that we rely on.
        if !unsafe { sys::is_culib_present() } {
            return Err(unavailable("no NVIDIA driver is installed (libcuda.so is not to be found)".into()));
        }
        result::init().map_err(|e| unavailable(why_not(e.0 as c_int, || describe(e))))?;
        let mut version: c_int = 0;
        // SAFETY: writes one int; the library is loaded, see above.
        let answer = unsafe { sys::cuDriverGetVersion(&mut version) };
        answer.result().map_err(|e| super::driver_error("cuDriverGetVersion", e))?;
        let version = split_version(version);
        // Within one major version of CUDA, older drivers run newer runtimes.
        let wanted = split_version(ffi::runtime_version()?).0;
        let too_old = (version.0 < wanted).then(|| {
            format!("the NVIDIA driver runs CUDA {}.{} at most, this build needs {wanted}.0", version.0, version.1)
        });
        let count = result::device::get_count().map_err(|e| super::driver_error("cuDeviceGetCount", e))?;
        let devices = (0..count).map(Device::read).collect::<Result<Vec<_>, _>>();
        let devices = devices.map_err(|e| super::driver_error("cuDeviceGetAttribute", e))?;
        Ok(Self { version, too_old, devices })
    }
}

impl Device {
    fn read(ordinal: c_int) -> Result<Self, DriverError> {
        use sys::CUdevice_attribute_enum as Attribute;
        let device = result::device::get(ordinal)?;
        // SAFETY: `device` is a valid handle, the driver gave it to us just now.
        let attribute = |which| unsafe { result::device::get_attribute(device, which) }.map(|n| n.unsigned_abs());
        let compute_capability = (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        );
        let (major, minor) = compute_capability;
        let unsupported = (!has_kernels(KERNEL_ARCHS, compute_capability)).then(|| {
            format!("it has compute capability {major}.{minor}, the kernels of this build are for {KERNEL_ARCHS}")
        });
        Ok(Self {
            ordinal: ordinal.unsigned_abs() as usize,
            name: result::device::get_name(device)?,
            compute_capability,
            // SAFETY: `device` is a valid handle, see above.
            memory: unsafe { result::device::total_mem(device) }?,
            multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            unsupported,
        })
    }
}

/// What NVML says of a GPU at this moment: None of what it does not tell, all of it where there is no NVML.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reading {
    /// Version of the driver, "580.159.04".
    pub driver: Option<String>,
    pub sm_mhz: Option<u32>,
    pub memory_mhz: Option<u32>,
}

impl Reading {
    /// Of the GPU that the CUDA driver numbers so; NVML numbers them otherwise, and knows no `CUDA_VISIBLE_DEVICES`.
    pub fn of(ordinal: usize) -> Self {
        let Some(nvml) = Nvml::get() else { return Self::default() };
        let bus_id = bus_id(ordinal);
        let clock = |clock| nvml.clock(CStr::from_bytes_until_nul(&bus_id?).ok()?, clock);
        Self { driver: nvml.driver_version(), sm_mhz: clock(Clock::Sm), memory_mhz: clock(Clock::Memory) }
    }
}

/// Where on the PCI bus a GPU sits, as text that ends in zero.
fn bus_id(ordinal: usize) -> Option<[u8; 32]> {
    // SAFETY: opens libcuda.so and closes it again, as in `Driver::discover`.
    if !unsafe { sys::is_culib_present() } {
        return None;
    }
    let device = result::device::get(c_int::try_from(ordinal).ok()?).ok()?;
    let mut text = [0u8; 32];
    // SAFETY: writes at most as many bytes as are told, a zero last; the driver has given `device` just now.
    let status = unsafe { sys::cuDeviceGetPCIBusId(text.as_mut_ptr().cast(), text.len() as c_int, device) };
    status.result().ok().map(|()| text)
}

/// The driver's name and words for an error.
pub(super) fn describe(error: DriverError) -> String {
    let text = |part: Result<&std::ffi::CStr, DriverError>| part.map(|c| c.to_string_lossy().into_owned()).ok();
    match (text(error.error_name()), text(error.error_string())) {
        (Some(name), Some(words)) => format!("{name}: {words}"),
        _ => format!("error {}", error.0 as u32),
    }
}

/// Why a GPU cannot be used when the driver (or the runtime, which numbers these errors alike) answers with `code`;
/// `words` are its own for any other.
pub(super) fn why_not(code: c_int, words: impl FnOnce() -> String) -> String {
    let why = match code {
        2 => "its memory is full: other processes use it (nvidia-smi shows them)",
        46 => {
            "another process has it for itself, or its compute mode is prohibited (nvidia-smi -q -d COMPUTE shows which)"
        }
        100 => "the NVIDIA driver shows no GPU (CUDA_VISIBLE_DEVICES hides those that it does not list)",
        802 => "the system is not ready: NVIDIA's fabric manager does not run yet",
        803 => "the NVIDIA driver's library and its kernel module are of different versions: a reboot mends that",
        _ => return format!("the NVIDIA driver says {}", words()),
    };
    why.into()
}

/// 13020 is 13.2.
fn split_version(version: c_int) -> (u32, u32) {
    let version = version.unsigned_abs();
    (version / 1000, version % 1000 / 10)
}

/// Whether one of `archs` runs on a GPU of this compute capability. sm_XY runs on the same major version from that minor
/// on, sm_XYa on exactly that one, and the PTX of compute_XY on that one and everything newer.
fn has_kernels(archs: &str, (major, minor): (u32, u32)) -> bool {
    archs.split(',').any(|arch| {
        let Some((kind, number)) = arch.split_once('_') else { return false };
        let digits = number.trim_end_matches(['a', 'f']);
        let Ok(digits_value) = digits.parse::<u32>() else { return false };
        let (arch_major, arch_minor) = (digits_value / 10, digits_value % 10);
        let exact = number.ends_with('a');
        match kind {
            _ if exact => (arch_major, arch_minor) == (major, minor),
            "sm" => arch_major == major && arch_minor <= minor,
            _ => (arch_major, arch_minor) <= (major, minor),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_run_on_their_own_generation_and_ptx_on_newer_ones() {
        let archs = "sm_80,sm_86,sm_89,sm_90a,sm_120,compute_90";
        for supported in [(8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1), (13, 0)] {
            assert!(has_kernels(archs, supported), "{supported:?}");
        }
        for unsupported in [(5, 2), (7, 0), (7, 5)] {
            assert!(!has_kernels(archs, unsupported), "{unsupported:?}");
        }
        assert!(!has_kernels("sm_90a", (10, 0)), "architecture-specific code does not carry forward");
        assert!(!has_kernels("sm_86", (8, 0)), "nor does newer code run on older cards");
    }

    #[test]
    fn a_gpu_that_is_not_there_has_no_clocks() {
        let reading = Reading::of(usize::MAX);
        assert_eq!((reading.sm_mhz, reading.memory_mhz), (None, None));
    }

    #[test]
    fn a_gpu_that_another_process_has_is_told_in_one_line() {
        let words = || "CUDA_ERROR_X: x".to_owned();
        for (code, part) in [(2, "memory is full"), (46, "another process"), (100, "shows no GPU"), (803, "reboot")] {
            let why = why_not(code, words);
            assert!(why.contains(part) && !why.contains('\n'), "{why}");
        }
        assert_eq!(why_not(999, words), "the NVIDIA driver says CUDA_ERROR_X: x");
    }

    #[test]
    fn a_machine_without_a_driver_is_a_clean_error_and_one_with_a_driver_has_a_version() {
        match Driver::discover() {
            Ok(driver) => assert!(driver.version.0 >= 10, "{driver:?}"),
            Err(error) => assert!(matches!(error, Error::Unavailable { .. }), "{error}"),
        }
    }
}
