//! NVML, NVIDIA's library of management, opened at run time: it comes with the driver, and where it is missing nothing is
//! told. nvml.h has the contracts.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::ptr::null_mut;
use std::sync::OnceLock;

use libloading::Library;

/// nvmlDevice_t.
type Device = *mut c_void;

/// nvmlClockType_t.
#[derive(Clone, Copy)]
pub enum Clock {
    Sm = 1,
    Memory = 2,
}

/// The calls that are used.
pub struct Nvml {
    driver_version: unsafe extern "C" fn(*mut c_char, c_uint) -> c_int,
    device_of_bus: unsafe extern "C" fn(*const c_char, *mut Device) -> c_int,
    clock: unsafe extern "C" fn(Device, c_int, *mut c_uint) -> c_int,
    /// Whose code the calls are.
    _library: Library,
}

impl Nvml {
    /// NVML, opened by the first caller and open until the process ends; None where there is none that answers.
    pub fn get() -> Option<&'static Self> {
        static NVML: OnceLock<Option<Nvml>> = OnceLock::new();
        NVML.get_or_init(Self::open).as_ref()
    }

    fn open() -> Option<Self> {
        // SAFETY: NVIDIA's library of this name does nothing on loading that we rely on, and is never unloaded.
        let library = unsafe { Library::new("libnvidia-ml.so.1") }.ok()?;
        // SAFETY: the types are those of nvml.h, and `_library` keeps the code where it is.
        let nvml = unsafe {
            let initialize = *library.get::<unsafe extern "C" fn() -> c_int>(c"nvmlInit_v2").ok()?;
            if initialize() != 0 {
                return None;
            }
            Self {
                driver_version: *library.get(c"nvmlSystemGetDriverVersion").ok()?,
                device_of_bus: *library.get(c"nvmlDeviceGetHandleByPciBusId_v2").ok()?,
                clock: *library.get(c"nvmlDeviceGetClockInfo").ok()?,
                _library: library,
            }
        };
        Some(nvml)
    }

    /// The driver's version, "580.159.04".
    pub fn driver_version(&self) -> Option<String> {
        // NVML_SYSTEM_DRIVER_VERSION_BUFFER_SIZE
        let mut text = [0u8; 80];
        // SAFETY: writes at most as many bytes as are told, a zero last.
        let status = unsafe { (self.driver_version)(text.as_mut_ptr().cast(), text.len() as c_uint) };
        let text = CStr::from_bytes_until_nul(&text).ok()?;
        (status == 0).then(|| text.to_string_lossy().into_owned())
    }

    /// MHz of a clock now, of the GPU at this place of the PCI bus.
    pub fn clock(&self, bus_id: &CStr, clock: Clock) -> Option<u32> {
        let (mut device, mut mhz) = (null_mut(), 0);
        // SAFETY: reads a string that ends in zero, writes one handle.
        let found = unsafe { (self.device_of_bus)(bus_id.as_ptr(), &mut device) };
        // SAFETY: NVML has given the handle just now; writes one number.
        (found == 0 && unsafe { (self.clock)(device, clock as c_int, &mut mhz) } == 0).then_some(mhz)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_with_or_without_nvml_answers_without_a_fault() {
        let Some(nvml) = Nvml::get() else { return };
        assert!(nvml.driver_version().is_some_and(|v| !v.is_empty()));
        assert_eq!(nvml.clock(c"no such bus", Clock::Sm), None);
    }
}
