//! Buffers in device memory.

use std::marker::PhantomData;
use std::sync::Arc;

use bytemuck::Pod;
use cudarc::driver::{CudaSlice, DevicePtr, DevicePtrMut};

use super::{Cuda, driver_error};
use crate::error::{Error, Result};

/// `len` elements of T in the memory of one GPU, freed on drop. Allocated at set-up, never inside a step.
pub struct Buffer<T> {
    /// At least one byte: the driver refuses to allocate none.
    bytes: CudaSlice<u8>,
    len: usize,
    element: PhantomData<T>,
}

impl<T> Buffer<T> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

impl Cuda {
    /// A buffer of copies of `values`.
    pub fn upload<T: Pod>(&self, values: &[T]) -> Result<Buffer<T>> {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        let copied = self.stream.clone_htod(if bytes.is_empty() { &[0][..] } else { bytes });
        let bytes = copied.map_err(|e| driver_error(format!("allocating {} bytes", bytes.len()), e))?;
        Ok(Buffer { bytes, len: values.len(), element: PhantomData })
    }

    /// A buffer of `len` elements whose bytes are all zero.
    pub fn zeros<T: Pod>(&self, len: usize) -> Result<Buffer<T>> {
        let size = len.checked_mul(size_of::<T>()).filter(|&size| size <= isize::MAX as usize);
        let too_large = || Error::Cuda { op: "allocating".into(), detail: format!("{len} elements exceed any memory") };
        let size = size.ok_or_else(too_large)?;
        let bytes = self.stream.alloc_zeros(size.max(1));
        let bytes = bytes.map_err(|e| driver_error(format!("allocating {size} bytes"), e))?;
        Ok(Buffer { bytes, len, element: PhantomData })
    }

    /// All elements of a buffer. Waits for the work launched before.
    pub fn download<T: Pod>(&self, buffer: &Buffer<T>) -> Result<Vec<T>> {
        self.own(&buffer.bytes)?;
        let mut values = vec![T::zeroed(); buffer.len];
        if !values.is_empty() {
            let into: &mut [u8] = bytemuck::cast_slice_mut(&mut values);
            self.stream.memcpy_dtoh(&buffer.bytes, into).map_err(|e| driver_error("cuMemcpyDtoHAsync", e))?;
        }
        self.synchronize()?;
        Ok(values)
    }

    /// to = from, on the device. [`Error::Shape`] unless both have the same length.
    pub fn copy<T: Pod>(&self, to: &mut Buffer<T>, from: &Buffer<T>) -> Result<()> {
        if to.len != from.len {
            return Err(Error::Shape { op: "copy", argument: "from", found: from.len, expected: to.len });
        }
        self.own(&to.bytes)?;
        self.own(&from.bytes)?;
        self.stream.memcpy_dtod(&from.bytes, &mut to.bytes).map_err(|e| driver_error("cuMemcpyDtoDAsync", e))
    }

    /// The address of a buffer that a kernel reads. It stays valid as long as the buffer lives.
    pub(super) fn ptr<T>(&self, buffer: &Buffer<T>) -> Result<*const T> {
        self.own(&buffer.bytes)?;
        Ok(buffer.bytes.device_ptr(&self.stream).0 as *const T)
    }

    /// The address of a buffer that a kernel writes.
    pub(super) fn ptr_mut<T>(&self, buffer: &mut Buffer<T>) -> Result<*mut T> {
        self.own(&buffer.bytes)?;
        Ok(buffer.bytes.device_ptr_mut(&self.stream).0 as *mut T)
    }

    /// Work on a buffer is ordered by its one stream alone, so a buffer of another [`Cuda`] is refused.
    fn own(&self, bytes: &CudaSlice<u8>) -> Result<()> {
        if Arc::ptr_eq(bytes.stream(), &self.stream) {
            return Ok(());
        }
        Err(Error::Cuda { op: "buffer".into(), detail: "it belongs to another device or stream".into() })
    }
}
