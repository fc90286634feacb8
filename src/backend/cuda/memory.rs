//! Device memory: one arena that all buffers of a run are cut from, and views of buffers for the ops.

use std::marker::PhantomData;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytemuck::Pod;
use cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DriverError, result, sys};
use half::bf16;

use super::{Cuda, driver_error};
use crate::error::{Error, Result};

/// Buffers start at multiples of this many bytes: what cudaMalloc gives, and enough for every vector and TMA access.
pub const ALIGNMENT: usize = 256;

/// One device allocation that buffers are cut from in order. They are never given back singly.
pub(super) struct Arena {
    /// At least one byte: the driver refuses to allocate none.
    bytes: CudaSlice<u8>,
    base: u64,
    used: AtomicUsize,
}

impl Arena {
    /// The address of `bytes` more bytes, or what was left if that is too little.
    fn take(&self, bytes: usize) -> Result<u64, usize> {
        let size = self.bytes.len();
        let rounded = bytes.next_multiple_of(ALIGNMENT);
        let add = |used: usize| used.checked_add(rounded).filter(|&end| end <= size);
        let before = self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, add).map_err(|used| size - used)?;
        Ok(self.base + before as u64)
    }
}

/// A state of the arena: bytes used, and who holds on to it.
#[derive(Clone, Copy)]
pub(crate) struct ArenaMark {
    used: usize,
    holders: usize,
}

/// Keeps the memory of a buffer alive.
enum Owner {
    /// An allocation of its own: tests and tools, where no arena was reserved.
    Alone {
        _bytes: CudaSlice<u8>,
    },
    Arena {
        _arena: Arc<Arena>,
    },
}

/// `len` elements of T in the memory of one GPU. Allocated at set-up, never inside a step.
pub struct Buffer<T> {
    address: u64,
    len: usize,
    stream: Arc<CudaStream>,
    _owner: Owner,
    element: PhantomData<T>,
}

/// Elements that an op reads.
pub struct View<'a, T> {
    address: u64,
    len: usize,
    stream: *const CudaStream,
    buffer: PhantomData<&'a T>,
}

/// Elements that an op writes.
pub struct ViewMut<'a, T> {
    address: u64,
    len: usize,
    stream: *const CudaStream,
    buffer: PhantomData<&'a mut T>,
}

impl<T> Clone for View<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for View<'_, T> {}

impl<T> Buffer<T> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// All of it, to read.
    pub fn view(&self) -> View<'_, T> {
        View { address: self.address, len: self.len, stream: Arc::as_ptr(&self.stream), buffer: PhantomData }
    }

    /// All of it, to write.
    pub fn view_mut(&mut self) -> ViewMut<'_, T> {
        ViewMut { address: self.address, len: self.len, stream: Arc::as_ptr(&self.stream), buffer: PhantomData }
    }

    /// What lies before element `at`, to read, and what lies behind it, to write. Panics if it leaves the buffer.
    pub fn split(&mut self, at: usize) -> (View<'_, T>, ViewMut<'_, T>) {
        assert!(at <= self.len, "element {at} of {}", self.len);
        let (address, stream) = (self.address, Arc::as_ptr(&self.stream));
        let first = View { address, len: at, stream, buffer: PhantomData };
        let behind = address + (at * size_of::<T>()) as u64;
        (first, ViewMut { address: behind, len: self.len - at, stream, buffer: PhantomData })
    }

    /// The elements of `range`. Panics if it leaves the buffer.
    pub fn range(&self, range: Range<usize>) -> View<'_, T> {
        self.view().range(range)
    }

    /// The elements of `range`. Panics if it leaves the buffer.
    pub fn range_mut(&mut self, range: Range<usize>) -> ViewMut<'_, T> {
        self.view_mut().into_range(range)
    }
}

impl<'a, T> View<'a, T> {
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The elements of `range`. Panics if it leaves the view.
    #[track_caller]
    pub fn range(self, range: Range<usize>) -> View<'a, T> {
        assert!(range.start <= range.end && range.end <= self.len, "range {range:?} of {} elements", self.len);
        View { address: self.address + (range.start * size_of::<T>()) as u64, len: range.len(), ..self }
    }
}

impl<'a> View<'a, f32> {
    /// The same bytes as twice as many bf16.
    pub fn as_bf16(self) -> View<'a, bf16> {
        View { address: self.address, len: 2 * self.len, stream: self.stream, buffer: PhantomData }
    }
}

impl<'a> ViewMut<'a, bf16> {
    /// The same bytes as half as many f32. Panics if an f32 may not lie there.
    pub fn into_f32(self) -> ViewMut<'a, f32> {
        assert!(self.address.is_multiple_of(4) && self.len.is_multiple_of(2), "{} bf16 as f32", self.len);
        ViewMut { address: self.address, len: self.len / 2, stream: self.stream, buffer: PhantomData }
    }
}

impl<'a> ViewMut<'a, i32> {
    /// The same bits.
    pub fn into_u32(self) -> ViewMut<'a, u32> {
        ViewMut { address: self.address, len: self.len, stream: self.stream, buffer: PhantomData }
    }
}

impl<'a, T> ViewMut<'a, T> {
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The elements of `range`. Panics if it leaves the view.
    pub fn into_range(self, range: Range<usize>) -> ViewMut<'a, T> {
        assert!(range.start <= range.end && range.end <= self.len, "range {range:?} of {} elements", self.len);
        ViewMut { address: self.address + (range.start * size_of::<T>()) as u64, len: range.len(), ..self }
    }

    /// Elements of memory that is no [`Buffer`] but outlives the view. Work on them is ordered by `stream`.
    pub(super) fn at(address: u64, len: usize, stream: &'a Arc<CudaStream>) -> Self {
        Self { address, len, stream: Arc::as_ptr(stream), buffer: PhantomData }
    }

    /// The same elements for a shorter time.
    pub fn reborrow(&mut self) -> ViewMut<'_, T> {
        ViewMut { address: self.address, len: self.len, stream: self.stream, buffer: PhantomData }
    }

    /// The same elements, from now on to read.
    pub fn into_view(self) -> View<'a, T> {
        View { address: self.address, len: self.len, stream: self.stream, buffer: PhantomData }
    }

    /// The same elements, to read.
    pub fn as_view(&self) -> View<'_, T> {
        View { address: self.address, len: self.len, stream: self.stream, buffer: PhantomData }
    }
}

impl Cuda {
    /// Drops what holds the arena beside the buffers cut from it: recorded steps, cuBLAS's workspace, the ops' scratch. The
    /// driver has the memory back when the last buffer goes, here if none is left.
    pub fn release(&mut self) -> Result<()> {
        self.end_of_loading();
        self.drop_scratch();
        self.arena = None;
        self.used.clear();
        self.synchronize()
    }

    /// Makes the one allocation that every buffer from now on is cut from, after [`Cuda::release`]. [`Error::Cuda`] if the
    /// card has less free.
    pub fn reserve(&mut self, bytes: usize) -> Result<()> {
        self.release()?;
        self.calls.allocation();
        // SAFETY: the bytes are written before they are read: a buffer is zeroed or filled by whoever allocates it.
        let bytes = unsafe { self.stream.alloc::<u8>(bytes.max(1)) }.map_err(|e| self.refused(bytes, e))?;
        let base = bytes.device_ptr(&self.stream).0;
        self.arena = Some(Arc::new(Arena { bytes, base, used: AtomicUsize::new(0) }));
        Ok(())
    }

    /// The driver did not give `bytes` of device memory.
    fn refused(&self, bytes: usize, error: DriverError) -> Error {
        let op = format!("allocating {bytes} bytes of device memory");
        match (error.0, self.memory()) {
            (sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY, Ok((free, total))) => {
                let advice = "a smaller budget (memory) or fewer processes on it (nvidia-smi shows them) would help";
                Error::Cuda { op, detail: format!("{free} of the GPU's {total} are free; {advice}") }
            }
            _ => driver_error(op, error),
        }
    }

    /// Bytes taken from the arena, and its size; None where none was reserved.
    pub fn arena_use(&self) -> Option<(usize, usize)> {
        self.arena.as_ref().map(|a| (a.used.load(Ordering::Relaxed), a.bytes.len()))
    }

    /// How far the arena is used now, for [`Cuda::rewind`]; None where none was reserved.
    pub(crate) fn arena_mark(&self) -> Option<ArenaMark> {
        self.arena.as_ref().map(|a| ArenaMark { used: a.used.load(Ordering::Relaxed), holders: Arc::strong_count(a) })
    }

    /// Takes back all that was cut from the arena since the mark. [`Error::Cuda`] if a buffer of it still lives.
    pub(crate) fn rewind(&mut self, mark: ArenaMark) -> Result<()> {
        self.synchronize()?;
        let alive = |count: usize| Error::Cuda { op: "arena".into(), detail: format!("{count} buffers still live") };
        let Some(arena) = &self.arena else { return Ok(()) };
        let count = Arc::strong_count(arena).saturating_sub(mark.holders);
        if count > 0 {
            return Err(alive(count));
        }
        arena.used.store(mark.used, Ordering::Relaxed);
        Ok(())
    }

    /// A buffer of `len` elements with whatever lies there.
    pub(crate) fn allocate<T: Pod>(&self, len: usize) -> Result<Buffer<T>> {
        let size = len.checked_mul(size_of::<T>()).filter(|&size| size <= isize::MAX as usize / 2);
        let too_large = || Error::Cuda { op: "allocating".into(), detail: format!("{len} elements exceed any memory") };
        let size = size.ok_or_else(too_large)?;
        let Some(arena) = &self.arena else { return self.allocate_alone(len) };
        let full = |left| Error::Cuda {
            op: "arena".into(),
            detail: format!("{size} bytes asked for, {left} of {} left: the plan counted less", arena.bytes.len()),
        };
        let (address, owner) = (arena.take(size).map_err(full)?, Owner::Arena { _arena: arena.clone() });
        Ok(Buffer { address, len, stream: self.stream.clone(), _owner: owner, element: PhantomData })
    }

    /// The same as an allocation of its own, which goes back to the driver with the buffer.
    pub(super) fn allocate_alone<T: Pod>(&self, len: usize) -> Result<Buffer<T>> {
        let size = len.saturating_mul(size_of::<T>());
        self.calls.allocation();
        // SAFETY: as in `reserve`.
        let bytes = unsafe { self.stream.alloc::<u8>(size.max(1)) };
        let bytes = bytes.map_err(|e| self.refused(size, e))?;
        let address = bytes.device_ptr(&self.stream).0;
        let owner = Owner::Alone { _bytes: bytes };
        Ok(Buffer { address, len, stream: self.stream.clone(), _owner: owner, element: PhantomData })
    }

    /// The address of the last `bytes` bytes of the arena, if none of them has been taken. They are lent until the next
    /// allocation: whoever gets them then uses them behind what is launched now.
    pub(super) fn arena_end(&self, bytes: usize) -> Option<u64> {
        let arena = self.arena.as_ref()?;
        let start = arena.bytes.len().checked_sub(bytes)? / ALIGNMENT * ALIGNMENT;
        (arena.used.load(Ordering::Relaxed) <= start).then_some(arena.base + start as u64)
    }

    /// A buffer of `len` elements whose bytes are all zero.
    pub fn zeros<T: Pod>(&self, len: usize) -> Result<Buffer<T>> {
        let mut buffer = self.allocate(len)?;
        self.zero(buffer.view_mut())?;
        Ok(buffer)
    }

    /// A buffer of copies of `values`.
    pub fn upload<T: Pod>(&self, values: &[T]) -> Result<Buffer<T>> {
        let mut buffer = self.allocate(values.len())?;
        self.write(buffer.view_mut(), values)?;
        Ok(buffer)
    }

    /// All bytes of `to` become zero.
    pub fn zero<T: Pod>(&self, to: ViewMut<T>) -> Result<()> {
        let address = self.ptr_mut(&to)? as u64;
        self.bind()?;
        if to.is_empty() {
            return Ok(());
        }
        // SAFETY: the view is `len` elements of live device memory, written in stream order.
        let set = unsafe { result::memset_d8_async(address, 0, to.len * size_of::<T>(), self.stream.cu_stream()) };
        set.map_err(|e| driver_error("cuMemsetD8Async", e))
    }

    /// to = values. [`Error::Shape`] if `values` is longer; elements behind it stay. `values` may be reused on return.
    pub fn write<T: Pod>(&self, to: ViewMut<T>, values: &[T]) -> Result<()> {
        if values.len() > to.len {
            return Err(Error::Shape { op: "write", argument: "values", found: values.len(), expected: to.len });
        }
        let address = self.ptr_mut(&to)? as u64;
        self.bind()?;
        if values.is_empty() {
            return Ok(());
        }
        let bytes: &[u8] = bytemuck::cast_slice(values);
        // SAFETY: the view has room for `values` (checked above). The driver has read pageable memory when it returns.
        unsafe { result::memcpy_htod_async(address, bytes, self.stream.cu_stream()) }
            .map_err(|e| driver_error("cuMemcpyHtoDAsync", e))
    }

    /// values = the first elements of `from`. Waits for the work launched before.
    pub fn read<T: Pod>(&self, from: View<T>, values: &mut [T]) -> Result<()> {
        if values.len() > from.len {
            return Err(Error::Shape { op: "read", argument: "values", found: values.len(), expected: from.len });
        }
        let address = self.ptr(&from)? as u64;
        self.bind()?;
        if !values.is_empty() {
            let bytes: &mut [u8] = bytemuck::cast_slice_mut(values);
            // SAFETY: the view has at least `values.len()` elements (checked above), and the stream is waited for below,
            // before `values` can go away.
            unsafe { result::memcpy_dtoh_async(bytes, address, self.stream.cu_stream()) }
                .map_err(|e| driver_error("cuMemcpyDtoHAsync", e))?;
        }
        self.synchronize()
    }

    /// All elements of a buffer. Waits for the work launched before.
    pub fn download<T: Pod>(&self, buffer: &Buffer<T>) -> Result<Vec<T>> {
        let mut values = vec![T::zeroed(); buffer.len];
        self.read(buffer.view(), &mut values)?;
        Ok(values)
    }

    /// to = from, on the device. [`Error::Shape`] unless both have the same length.
    pub fn copy<T: Pod>(&self, to: ViewMut<T>, from: View<T>) -> Result<()> {
        if to.len != from.len {
            return Err(Error::Shape { op: "copy", argument: "from", found: from.len, expected: to.len });
        }
        let (to_address, from_address) = (self.ptr_mut(&to)? as u64, self.ptr(&from)? as u64);
        self.bind()?;
        if to.is_empty() {
            return Ok(());
        }
        let bytes = to.len * size_of::<T>();
        // SAFETY: both views have `len` elements of live device memory; the copy is ordered by the stream.
        unsafe { result::memcpy_dtod_async(to_address, from_address, bytes, self.stream.cu_stream()) }
            .map_err(|e| driver_error("cuMemcpyDtoDAsync", e))
    }

    /// The address of elements that a kernel reads.
    pub(super) fn ptr<T>(&self, view: &View<T>) -> Result<*const T> {
        self.own(view.stream)?;
        Ok(view.address as *const T)
    }

    /// The address of elements that a kernel writes.
    pub(super) fn ptr_mut<T>(&self, view: &ViewMut<T>) -> Result<*mut T> {
        self.own(view.stream)?;
        Ok(view.address as *mut T)
    }

    /// Work on a buffer is ordered by its one stream alone, so a buffer of another [`Cuda`] is refused.
    fn own(&self, stream: *const CudaStream) -> Result<()> {
        if std::ptr::eq(stream, Arc::as_ptr(&self.stream)) {
            return Ok(());
        }
        Err(Error::Cuda { op: "buffer".into(), detail: "it belongs to another device or stream".into() })
    }
}
