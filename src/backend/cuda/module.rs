//! Kernels that come as machine code at run time, beside those linked in: the candidates of `halfbyte bench`.

use std::ffi::{CString, c_int, c_void};
use std::sync::Arc;

use bytemuck::Pod;
use cudarc::driver::{CudaContext, DriverError, result, sys};
use serde::Serialize;

use super::memory::Buffer;
use super::{Cuda, driver_error};
use crate::error::{Error, Result};

/// Loaded machine code.
pub struct Module {
    handle: sys::CUmodule,
    context: Arc<CudaContext>,
}

// SAFETY: the handle is a token for the driver, whose calls any thread may make.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Sync for Module {}

impl Drop for Module {
    fn drop(&mut self) {
        // Its kernels may still run. What goes wrong here has gone wrong before and was told then.
        let _ = self.context.bind_to_thread().and_then(|()| self.context.synchronize());
        // SAFETY: the handle came from the driver, and nothing uses it from now on.
        let _ = unsafe { result::module::unload(self.handle) };
    }
}

/// A kernel of a [`Module`].
#[derive(Clone)]
pub struct Function {
    handle: sys::CUfunction,
    module: Arc<Module>,
}

// SAFETY: as for `Module`, which lives as long as this.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

/// What the compiler gave a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Attributes {
    /// Of a thread.
    pub registers: u32,
    /// Bytes of a thread in local memory: registers spilt, and arrays that have no register.
    pub local_bytes: u32,
    /// Bytes of a block, those asked for at the launch apart.
    pub static_shared_bytes: u32,
    /// That a block can have, by its registers.
    pub most_threads: u32,
}

/// What the card gives a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// Bytes of shared memory of a block at most.
    pub shared_bytes: u32,
    /// Threads of a multiprocessor at most.
    pub threads: u32,
}

/// A parameter of a kernel: the address of a buffer, or a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Param {
    /// A smaller number lies in the first bytes.
    bits: [u8; 8],
    size: usize,
}

impl Param {
    /// Bytes that a kernel declares for it.
    pub fn size(self) -> usize {
        self.size
    }
}

impl From<u64> for Param {
    fn from(value: u64) -> Self {
        Self { bits: value.to_ne_bytes(), size: 8 }
    }
}

impl From<f32> for Param {
    fn from(value: f32) -> Self {
        let mut bits = [0; 8];
        bits[..4].copy_from_slice(&value.to_ne_bytes());
        Self { bits, size: 4 }
    }
}

impl Cuda {
    /// Loads a cubin for this card.
    pub fn load_module(&self, cubin: &[u8]) -> Result<Arc<Module>> {
        // The driver reads as far as the ELF header says.
        if cubin.len() < 64 || !cubin.starts_with(b"\x7fELF") {
            return Err(Error::Cuda { op: "cuModuleLoadData".into(), detail: "the code is no cubin".into() });
        }
        self.bind()?;
        // SAFETY: a whole ELF file, as a compiler left it; the driver has copied it when it returns.
        let handle = unsafe { result::module::load_data(cubin.as_ptr().cast::<c_void>()) };
        let handle = handle.map_err(|e| driver_error("cuModuleLoadData", e))?;
        Ok(Arc::new(Module { handle, context: self.context.clone() }))
    }

    /// The kernel of this name; None if the module has none.
    pub fn function(&self, module: &Arc<Module>, name: &str) -> Result<Option<Function>> {
        let Ok(name) = CString::new(name) else { return Ok(None) };
        self.bind()?;
        // SAFETY: the module is loaded, and is kept by the function.
        match unsafe { result::module::get_function(module.handle, name) } {
            Ok(handle) => Ok(Some(Function { handle, module: module.clone() })),
            Err(DriverError(sys::CUresult::CUDA_ERROR_NOT_FOUND)) => Ok(None),
            Err(error) => Err(driver_error("cuModuleGetFunction", error)),
        }
    }

    /// What this card has for a kernel.
    pub fn room(&self) -> Result<Room> {
        use sys::CUdevice_attribute_enum as Attribute;
        let ask = |attribute| {
            let value = self.context.attribute(attribute).map_err(|e| driver_error("cuDeviceGetAttribute", e))?;
            Ok::<_, Error>(value.unsigned_abs())
        };
        Ok(Room {
            shared_bytes: ask(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
            threads: ask(Attribute::CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR)?,
        })
    }

    /// A buffer as a parameter. The kernel may write it.
    pub fn param<T: Pod>(&self, buffer: &mut Buffer<T>) -> Result<Param> {
        Ok(Param::from(self.ptr_mut(&buffer.view_mut())? as u64))
    }

    /// Launches a kernel behind all that was launched before.
    ///
    /// # Safety
    /// The kernel takes exactly `params`, and touches nothing but the buffers among them, inside their bounds.
    pub unsafe fn launch(
        &self,
        function: &Function,
        grid: [u32; 3],
        block: [u32; 3],
        shared: u32,
        params: &[Param],
    ) -> Result<()> {
        self.bind()?;
        let mut addresses: Vec<*mut c_void> =
            params.iter().map(|p| p.bits.as_ptr().cast_mut().cast::<c_void>()).collect();
        let (grid, block) = ((grid[0], grid[1], grid[2]), (block[0], block[1], block[2]));
        let stream = self.stream.cu_stream();
        // SAFETY: function and stream are live; the driver has copied the parameters when it returns. The rest is the
        // caller's word.
        let launched = unsafe { result::launch_kernel(function.handle, grid, block, shared, stream, &mut addresses) };
        launched.map_err(|e| driver_error("cuLaunchKernel", e))?;
        if self.sync_each { self.synchronize() } else { Ok(()) }
    }
}

impl Function {
    fn bind(&self) -> Result<()> {
        self.module.context.bind_to_thread().map_err(|e| driver_error("cuCtxSetCurrent", e))
    }

    /// What the compiler gave it.
    pub fn attributes(&self) -> Result<Attributes> {
        self.bind()?;
        attributes(self.handle)
    }

    /// Bytes of each parameter, in order. None where the driver is too old to tell (before CUDA 12.4).
    pub fn parameters(&self) -> Result<Option<Vec<usize>>> {
        // More than the 4 KiB of parameters that a kernel has at least could name.
        const MOST: usize = 4096;
        if driver_version()? < 12_040 {
            return Ok(None);
        }
        self.bind()?;
        let mut sizes = vec![];
        while sizes.len() < MOST {
            let (mut offset, mut size) = (0usize, 0usize);
            // SAFETY: writes two sizes; the function is live.
            let asked = unsafe { sys::cuFuncGetParamInfo(self.handle, sizes.len(), &raw mut offset, &raw mut size) };
            match asked.result() {
                Ok(()) => sizes.push(size),
                // There are no more.
                Err(DriverError(sys::CUresult::CUDA_ERROR_INVALID_VALUE)) => break,
                Err(error) => return Err(driver_error("cuFuncGetParamInfo", error)),
            }
        }
        Ok(Some(sizes))
    }

    /// Lets launches ask for this much dynamic shared memory; without it, 48 KiB with the static are the most.
    pub fn allow_shared(&self, bytes: u32) -> Result<()> {
        use sys::CUfunction_attribute_enum as Attribute;
        self.bind()?;
        let attribute = Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        let bytes = c_int::try_from(bytes).unwrap_or(c_int::MAX);
        // SAFETY: the function is live.
        let set = unsafe { sys::cuFuncSetAttribute(self.handle, attribute, bytes) };
        set.result().map_err(|e| driver_error("cuFuncSetAttribute", e))
    }
}

/// What the compiler gave a kernel of the context that is bound.
pub(super) fn attributes(function: sys::CUfunction) -> Result<Attributes> {
    use sys::CUfunction_attribute_enum as Attribute;
    let ask = |attribute| {
        let mut value: c_int = 0;
        // SAFETY: writes one int; the function is live.
        let asked = unsafe { sys::cuFuncGetAttribute(&raw mut value, attribute, function) };
        asked.result().map_err(|e| driver_error("cuFuncGetAttribute", e))?;
        Ok::<_, Error>(value.unsigned_abs())
    };
    Ok(Attributes {
        registers: ask(Attribute::CU_FUNC_ATTRIBUTE_NUM_REGS)?,
        local_bytes: ask(Attribute::CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES)?,
        static_shared_bytes: ask(Attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)?,
        most_threads: ask(Attribute::CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK)?,
    })
}

/// Blocks of so many threads and so much dynamic shared memory that one multiprocessor runs at a time.
pub(super) fn blocks_per_multiprocessor(function: sys::CUfunction, threads: u32, shared: u32) -> Result<u32> {
    let mut blocks: c_int = 0;
    let threads = c_int::try_from(threads).unwrap_or(c_int::MAX);
    // SAFETY: writes one int; the function is live.
    let asked = unsafe {
        sys::cuOccupancyMaxActiveBlocksPerMultiprocessor(&raw mut blocks, function, threads, shared as usize)
    };
    asked.result().map_err(|e| driver_error("cuOccupancyMaxActiveBlocksPerMultiprocessor", e))?;
    Ok(blocks.unsigned_abs())
}

/// 1000 * major + 10 * minor of the CUDA that the driver has.
pub(super) fn driver_version() -> Result<c_int> {
    let mut version: c_int = 0;
    // SAFETY: writes one int.
    let asked = unsafe { sys::cuDriverGetVersion(&raw mut version) };
    asked.result().map_err(|e| driver_error("cuDriverGetVersion", e))?;
    Ok(version)
}
