//! Activations to pinned host memory and back, beside the kernels: a stream of its own, ordered by events.

use std::ptr::NonNull;
use std::sync::Arc;

use cudarc::driver::{CudaEvent, CudaStream, result, sys};
use half::bf16;

use super::memory::{View, ViewMut};
use super::{Cuda, driver_error};
use crate::backend::shape::at_least;
use crate::error::{Error, Result};

/// Copies under way at a time that keep an event each. An older copy shares the event of a newer one: the stream of copies
/// runs in order, so waiting for the newer is enough.
const EVENTS: usize = 256;

/// `len` activations in pinned host memory.
pub struct Host {
    address: NonNull<bf16>,
    len: usize,
    /// Where copies run: beside the kernels, or inside a replayed step.
    streams: [Arc<CudaStream>; 2],
}

// SAFETY: a plain allocation that any thread may use; copies into it are ordered by streams.
unsafe impl Send for Host {}

impl Host {
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // A copy may still be under way. An error that shows here was met, or will be, by whoever waits for results.
        // Not the whole context: that would spoil what another thread is recording.
        let _ = self.streams.iter().map(|s| s.synchronize()).collect::<Vec<_>>();
        // SAFETY: `address` came from malloc_host, and no copy uses it any more.
        let _ = unsafe { result::free_host(self.address.as_ptr().cast()) };
    }
}

/// A copy under way: its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticket(u64);

/// The stream of copies and its events.
pub(super) struct Transfers {
    stream: Arc<CudaStream>,
    /// Recorded on the compute stream when a copy is asked for, and on the stream of copies behind it.
    events: Vec<(CudaEvent, CudaEvent)>,
    /// Number of the next copy.
    next: u64,
    /// Copies with smaller numbers are behind a join of both streams already.
    joined: u64,
}

impl Transfers {
    fn new(cuda: &Cuda) -> Result<Self> {
        let context = &cuda.context;
        let event = || context.new_event(Some(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING));
        let events = (0..EVENTS).map(|_| Ok((event()?, event()?))).collect::<Result<_, _>>();
        let events = events.map_err(|e| driver_error("cuEventCreate", e))?;
        let stream = context.new_stream().map_err(|e| driver_error("cuStreamCreate", e))?;
        Ok(Self { stream, events, next: 0, joined: 0 })
    }

    /// Runs `copy` on the stream of copies, behind all that `compute` has been given, and records its end.
    fn launch(
        &mut self,
        compute: &CudaStream,
        copy: impl FnOnce(sys::CUstream) -> Result<(), cudarc::driver::DriverError>,
    ) -> Result<Ticket, cudarc::driver::DriverError> {
        let (before, after) = &self.events[(self.next % EVENTS as u64) as usize];
        before.record(compute)?;
        self.stream.wait(before)?;
        copy(self.stream.cu_stream())?;
        after.record(&self.stream)?;
        self.next += 1;
        Ok(Ticket(self.next - 1))
    }
}

impl Cuda {
    /// Pinned memory of `len` activations. Set-up only.
    pub fn pinned(&mut self, len: usize) -> Result<Host> {
        self.bind()?;
        let copies = match &self.transfers {
            Some(transfers) => transfers.stream.clone(),
            None => {
                let transfers = Transfers::new(self)?;
                self.transfers.insert(transfers).stream.clone()
            }
        };
        self.calls.allocation();
        let bytes = (len * size_of::<bf16>()).max(1);
        // SAFETY: the memory is written by a copy before a copy reads it.
        let address = unsafe { result::malloc_host(bytes, sys::CU_MEMHOSTALLOC_PORTABLE) };
        let address = address.map_err(|e| driver_error(format!("pinning {bytes} bytes of host memory"), e))?;
        let address = NonNull::new(address.cast()).ok_or_else(|| Error::Cuda {
            op: "cuMemHostAlloc".into(),
            detail: format!("no address for {bytes} bytes"),
        })?;
        Ok(Host { address, len, streams: [copies, self.stream.clone()] })
    }

    /// Begins to copy `from` to host memory, behind all ops before.
    pub(super) fn copy_out(&mut self, to: &mut Host, from: View<bf16>) -> Result<Ticket> {
        at_least("send", "to", to.len, from.len())?;
        let source = self.ptr(&from)? as u64;
        let target = to.address.as_ptr();
        self.transfer("cuMemcpyDtoHAsync", |stream| {
            // SAFETY: `to` has room (checked); both live until the copy is waited for: dropping a `Host` waits, and device
            // buffers are freed in stream order behind it.
            unsafe { sys::cuMemcpyDtoHAsync_v2(target.cast(), source, from.len() * size_of::<bf16>(), stream).result() }
        })
    }

    /// Begins to copy the first elements of `from` back, behind all ops before.
    pub(super) fn copy_in(&mut self, to: ViewMut<bf16>, from: &Host) -> Result<Ticket> {
        at_least("fetch", "from", from.len, to.len())?;
        let target = self.ptr_mut(&to)? as u64;
        let source = from.address.as_ptr();
        self.transfer("cuMemcpyHtoDAsync", |stream| {
            // SAFETY: as in `copy_out`; what `from` holds was written by a copy on the same stream.
            unsafe { sys::cuMemcpyHtoDAsync_v2(target, source.cast(), to.len() * size_of::<bf16>(), stream).result() }
        })
    }

    fn transfer(
        &mut self,
        op: &str,
        copy: impl FnOnce(sys::CUstream) -> Result<(), cudarc::driver::DriverError>,
    ) -> Result<Ticket> {
        self.bind()?;
        let Some(transfers) = &mut self.transfers else {
            return Err(Error::Cuda { op: op.into(), detail: "no host memory was allocated".into() });
        };
        transfers.launch(&self.stream, copy).map_err(|e| driver_error(op, e))
    }

    /// Every op from now on comes behind the end of this copy.
    pub(super) fn wait_for(&mut self, copy: Ticket) -> Result<()> {
        let Some(transfers) = self.transfers.as_ref().filter(|t| copy.0 >= t.joined) else { return Ok(()) };
        let (_, after) = &transfers.events[(copy.0 % EVENTS as u64) as usize];
        self.stream.wait(after).map_err(|e| driver_error("cuStreamWaitEvent", e))
    }

    /// No copy asked for so far is waited for any more: they were recorded, and the record is thrown away.
    pub(super) fn forget_transfers(&mut self) {
        if let Some(transfers) = &mut self.transfers {
            transfers.joined = transfers.next;
        }
    }

    /// Every op from now on comes behind the end of all copies. A record of a micro-step must end so, and one that is not
    /// recorded does the same.
    pub(super) fn join_transfers(&mut self) -> Result<()> {
        let Some(last) = self.transfers.as_ref().filter(|t| t.next > t.joined).map(|t| t.next - 1) else {
            return Ok(());
        };
        self.wait_for(Ticket(last))?;
        if let Some(transfers) = &mut self.transfers {
            transfers.joined = transfers.next;
        }
        Ok(())
    }
}
