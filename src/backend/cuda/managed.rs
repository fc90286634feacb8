//! Memory that the host and the device share: managed by the driver, which moves its pages, or pinned on the host.

use std::ffi::c_void;
use std::fmt;
use std::ptr::NonNull;
use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaStream, result, sys};

use super::memory::ViewMut;
use super::{Cuda, driver_error};
use crate::error::{Error, Result};

/// Where the optimizer's state lives between steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placement {
    /// Managed, preferred on the device: leaves only under pressure.
    Device,
    /// Managed, preferred on the host: windows of it travel to the device and back in every step.
    Host,
    /// Pinned on the host; the kernel reads and writes it over PCIe. For systems whose managed memory cannot page on
    /// demand.
    Pinned,
}

impl Placement {
    const NAMES: [(&'static str, Self); 3] = [("device", Self::Device), ("host", Self::Host), ("pinned", Self::Pinned)];

    /// What the environment variable `HALFBYTE_OPTIMIZER_STATE` names, if it is set.
    pub fn forced() -> Result<Option<Self>> {
        match std::env::var("HALFBYTE_OPTIMIZER_STATE").as_deref() {
            Err(_) | Ok("") => Ok(None),
            Ok(name) => match Self::NAMES.iter().find(|(known, _)| *known == name) {
                Some(&(_, placement)) => Ok(Some(placement)),
                None => Err(Error::flag("HALFBYTE_OPTIMIZER_STATE", format!("{name:?}"), "device, host or pinned")),
            },
        }
    }

    /// Where a state of `bytes` goes: as forced; else as `wanted`; but pinned where managed memory cannot page on demand,
    /// and where the card has less free than `bytes`.
    pub fn pick(cuda: &Cuda, wanted: Self, bytes: usize) -> Result<Self> {
        if let Some(forced) = Self::forced()? {
            return Ok(forced);
        }
        let fits = || Ok::<_, Error>(check_managed(bytes, cuda.memory()?.0).is_ok());
        Ok(if wanted != Self::Pinned && pages_on_demand(cuda)? && fits()? { wanted } else { Self::Pinned })
    }
}

impl fmt::Display for Placement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Device => "managed, preferred on the device",
            Self::Host => "managed, preferred on the host",
            Self::Pinned => "pinned on the host",
        })
    }
}

/// Whether host and device may use managed memory at the same time, which paging needs.
pub fn pages_on_demand(cuda: &Cuda) -> Result<bool> {
    let attribute = sys::CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_CONCURRENT_MANAGED_ACCESS;
    let value = cuda.context.attribute(attribute).map_err(|e| driver_error("cuDeviceGetAttribute", e))?;
    Ok(value != 0)
}

/// Never is more managed memory asked for than the card has free: on some systems that hangs the GPU.
pub fn check_managed(bytes: usize, free: usize) -> Result<()> {
    if bytes <= free {
        return Ok(());
    }
    Err(Error::Cuda {
        op: "managed memory".into(),
        detail: format!(
            "{bytes} bytes of optimizer state, {free} are free on the GPU; a smaller memory budget for the rest, \
             optim = \"paged_adamw_8bit\" or HALFBYTE_OPTIMIZER_STATE=pinned make it fit"
        ),
    })
}

/// One allocation that the device can address wherever it lies.
pub struct Region {
    address: u64,
    bytes: usize,
    placement: Placement,
    stream: Arc<CudaStream>,
    /// Where it is pinned.
    pinned: Option<Pinned>,
}

impl Region {
    /// `bytes` of zeros.
    pub fn new(cuda: &Cuda, bytes: usize, placement: Placement) -> Result<Self> {
        let size = bytes.max(1);
        let stream = cuda.stream.clone();
        if placement == Placement::Pinned {
            let mut pinned = Pinned::new(cuda, size)?;
            pinned.bytes_mut().fill(0);
            return Ok(Self { address: pinned.address(), bytes, placement, stream, pinned: Some(pinned) });
        }
        check_managed(size, cuda.memory()?.0)?;
        if !pages_on_demand(cuda)? {
            let detail = "this system's managed memory cannot page on demand: HALFBYTE_OPTIMIZER_STATE=pinned".into();
            return Err(Error::Cuda { op: "managed memory".into(), detail });
        }
        cuda.calls.allocation();
        // SAFETY: the bytes are set below, before anyone can read them.
        let address = unsafe { result::malloc_managed(size, sys::CUmemAttach_flags::CU_MEM_ATTACH_GLOBAL) };
        let address = address.map_err(|e| driver_error(format!("cuMemAllocManaged of {size} bytes"), e))?;
        let region = Self { address, bytes, placement, stream, pinned: None };
        region.advise(sys::CUmem_advise::CU_MEM_ADVISE_SET_PREFERRED_LOCATION, region.home(cuda))?;
        // Pages at home on the host then stay mapped on the device: a window that did not come in time is read over PCIe.
        region.advise(sys::CUmem_advise::CU_MEM_ADVISE_SET_ACCESSED_BY, device(cuda))?;
        region.prefetch(0..size, region.home(cuda), &region.stream)?;
        // SAFETY: `size` bytes of live managed memory, written in stream order behind the prefetch.
        unsafe { result::memset_d8_async(address, 0, size, region.stream.cu_stream()) }
            .map_err(|e| driver_error("cuMemsetD8Async", e))?;
        Ok(region)
    }

    pub fn placement(&self) -> Placement {
        self.placement
    }

    /// Number of bytes.
    pub fn len(&self) -> usize {
        self.bytes
    }

    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Where its pages belong.
    pub(super) fn home(&self, cuda: &Cuda) -> sys::CUmemLocation {
        match self.placement {
            Placement::Device => device(cuda),
            Placement::Host | Placement::Pinned => host(),
        }
    }

    /// `len` elements from byte `at` on, which overlap with no other view that is in use. Panics if they leave the region or
    /// `at` is not aligned for T.
    pub(super) fn view<T>(&self, at: usize, len: usize) -> ViewMut<'_, T> {
        assert!(
            at + len * size_of::<T>() <= self.bytes && at.is_multiple_of(align_of::<T>()),
            "{len} elements at {at}"
        );
        ViewMut::at(self.address + at as u64, len, &self.stream)
    }

    fn advise(&self, advice: sys::CUmem_advise, location: sys::CUmemLocation) -> Result<()> {
        // SAFETY: the whole of a live managed allocation.
        unsafe { result::mem_advise(self.address, self.bytes.max(1), advice, location) }
            .map_err(|e| driver_error("cuMemAdvise", e))
    }

    /// Begins to move the pages of these bytes, behind what `stream` has been given. Managed regions alone.
    pub(super) fn prefetch(
        &self,
        bytes: std::ops::Range<usize>,
        to: sys::CUmemLocation,
        stream: &CudaStream,
    ) -> Result<()> {
        if bytes.is_empty() || self.placement == Placement::Pinned {
            return Ok(());
        }
        debug_assert!(bytes.end <= self.bytes.max(1));
        let address = self.address + bytes.start as u64;
        // SAFETY: a part of a live managed allocation.
        unsafe { result::mem_prefetch_async(address, bytes.len(), to, stream.cu_stream()) }
            .map_err(|e| driver_error("cuMemPrefetchAsync", e))
    }

    /// Copies `from` to byte `at` on, and waits. Set-up alone.
    pub(super) fn write(&mut self, at: usize, from: &[u8]) -> Result<()> {
        assert!(at + from.len() <= self.bytes, "{} bytes at {at} of {}", from.len(), self.bytes);
        self.copy(self.address + at as u64, from.as_ptr() as u64, from.len())
    }

    /// to = the bytes from `at` on, behind all work launched before; waits for them. Checkpoints alone.
    pub(super) fn read(&self, at: usize, to: &mut [u8]) -> Result<()> {
        assert!(at + to.len() <= self.bytes, "{} bytes at {at} of {}", to.len(), self.bytes);
        self.copy(to.as_mut_ptr() as u64, self.address + at as u64, to.len())
    }

    fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<()> {
        let context = self.stream.context();
        context.bind_to_thread().map_err(|e| driver_error("cuCtxSetCurrent", e))?;
        if bytes > 0 {
            // SAFETY: both sides hold `bytes` bytes (the callers). One is host memory that outlives the copy, which is
            // waited for below; unified addressing tells the driver which.
            unsafe { sys::cuMemcpyAsync(to, from, bytes, self.stream.cu_stream()) }
                .result()
                .map_err(|e| driver_error("cuMemcpyAsync", e))?;
        }
        self.stream.synchronize().map_err(|e| driver_error("cuStreamSynchronize", e))
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        if self.pinned.is_some() {
            return;
        }
        // A kernel may still use it. An error that shows here was met, or will be, by whoever waits for results.
        let _ = self.stream.context().synchronize();
        // SAFETY: `address` came from malloc_managed and nothing uses it any more.
        let _ = unsafe { result::memory_free(self.address) };
    }
}

pub(super) fn device(cuda: &Cuda) -> sys::CUmemLocation {
    sys::CUmemLocation { type_: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE, id: cuda.context.cu_device() }
}

pub(super) fn host() -> sys::CUmemLocation {
    sys::CUmemLocation { type_: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_HOST, id: 0 }
}

/// Bytes of pinned host memory, which the device can address as well.
pub(super) struct Pinned {
    address: NonNull<u8>,
    len: usize,
    context: Arc<CudaContext>,
}

// SAFETY: a plain allocation that any thread may use.
unsafe impl Send for Pinned {}

impl Pinned {
    /// `len` bytes with whatever lies there.
    pub(super) fn new(cuda: &Cuda, len: usize) -> Result<Self> {
        cuda.bind()?;
        cuda.calls.allocation();
        // SAFETY: the bytes are only lent as u8 after the caller has filled them, or for filling.
        let address = unsafe { result::malloc_host(len.max(1), sys::CU_MEMHOSTALLOC_DEVICEMAP) };
        let address: *mut c_void =
            address.map_err(|e| driver_error(format!("pinning {len} bytes of host memory"), e))?;
        let null = || Error::Cuda { op: "pinning host memory".into(), detail: "the driver gave no address".into() };
        let address = NonNull::new(address.cast::<u8>()).ok_or_else(null)?;
        // SAFETY: the driver allocated `len` bytes there; zeros make them initialised.
        unsafe { address.as_ptr().write_bytes(0, len) };
        Ok(Self { address, len, context: cuda.context.clone() })
    }

    /// The same on the host and, by unified addressing, on the device.
    pub(super) fn address(&self) -> u64 {
        self.address.as_ptr() as u64
    }

    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: `len` initialised bytes that live as long as this. The caller waits for copies from or to them.
        unsafe { std::slice::from_raw_parts_mut(self.address.as_ptr(), self.len) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // As in Region.
        let _ = self.context.synchronize();
        // SAFETY: `address` came from malloc_host, and nothing uses it any more.
        let _ = unsafe { result::free_host(self.address.as_ptr().cast()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_managed_memory_than_is_free_is_refused() {
        check_managed(10, 10).unwrap();
        let error = check_managed(11, 10).unwrap_err();
        assert!(matches!(error, Error::Cuda { .. }) && error.to_string().contains("11 bytes"), "{error}");
    }
}
