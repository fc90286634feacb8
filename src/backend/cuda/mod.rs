//! The CUDA backend: one NVIDIA GPU, our own kernels (csrc/*.cu), one stream, and a second one for copies to the host.
//!
//! `ffi` is the only extern block, and `ops` its only user: raw, then checked. The CUDA runtime is linked in statically,
//! the driver is opened at run time, so the program starts on a machine that has neither GPU nor driver.

mod backend;
pub mod cublas;
pub mod device;
mod ffi;
mod graph;
mod head;
pub mod launched;
mod linear;
pub mod load;
pub mod managed;
pub mod matrix;
pub mod memory;
pub mod module;
mod nvtx;
pub mod ops;
pub mod optimizer;
mod rates;
mod scratch;
mod timer;
pub(crate) mod timing;
pub mod transfer;

use std::collections::BTreeMap;
use std::ffi::c_int;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use cudarc::driver::{CudaContext, CudaStream, DriverError};

use super::Item;
use crate::error::{Error, Result};
use device::{Device, Driver};
pub use linear::LinearKind;

/// One GPU, ready to run kernels. All work goes to one stream, in order; copies to and from host memory run beside it.
pub struct Cuda {
    // What lives on the stream goes before it.
    graphs: graph::Graphs,
    /// While ops are timed.
    timer: Option<timer::Timer>,
    cublas: Option<cublas::Cublas>,
    scratch: Option<Box<scratch::Scratch>>,
    transfers: Option<transfer::Transfers>,
    /// While weights come.
    loader: Mutex<Option<load::Loader>>,
    /// What buffers are cut from once it is reserved.
    arena: Option<Arc<memory::Arena>>,

    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    device: Device,
    kernels: Kernels,
    /// Makes every linear run this way.
    linear: Option<LinearKind>,
    hide_cublas: bool,
    /// Whether `HALFBYTE_SYNC=1` asks to wait behind every launch.
    sync_each: bool,
    scopes: nvtx::Scopes,
    calls: Counters,
    /// What allocations are for now, and bytes by what they were for.
    item: Option<Item>,
    used: BTreeMap<Item, usize>,
    /// The plan has no room on the card for the optimizer's state.
    optimizer_on_host: bool,
}

/// How often the driver was asked for what a step may not ask for, and for replays.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Calls {
    /// Of device memory, or of pinned or managed memory.
    pub allocations: u64,
    /// Times the host waited for the GPU.
    pub waits: u64,
    /// Micro-steps recorded as graphs, and launched so.
    pub records: u64,
    pub replays: u64,
}

/// The counters behind [`Calls`].
#[derive(Default)]
struct Counters {
    allocations: AtomicU64,
    waits: AtomicU64,
    records: AtomicU64,
    replays: AtomicU64,
}

impl Counters {
    fn allocation(&self) {
        self.allocations.fetch_add(1, Ordering::Relaxed);
    }

    fn wait(&self) {
        self.waits.fetch_add(1, Ordering::Relaxed);
    }

    fn record(&self) {
        self.records.fetch_add(1, Ordering::Relaxed);
    }

    fn replay(&self) {
        self.replays.fetch_add(1, Ordering::Relaxed);
    }
}

/// Which of the kernels written twice run: those for any card from sm_80 on, or those for Hopper (wgmma).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kernels {
    Sm80,
    Sm90,
}

impl Kernels {
    fn best(compute_capability: (u32, u32)) -> Self {
        if compute_capability.0 == 9 && device::KERNEL_ARCHS.contains("sm_90a") { Self::Sm90 } else { Self::Sm80 }
    }

    /// The best for a card of this compute capability, or what the environment variable `HALFBYTE_KERNELS` names.
    fn pick(compute_capability: (u32, u32)) -> Result<Self> {
        let best = Self::best(compute_capability);
        match std::env::var("HALFBYTE_KERNELS").as_deref() {
            Err(_) | Ok("") => Ok(best),
            Ok("sm80") => Ok(Self::Sm80),
            Ok("sm90") if best == Self::Sm90 => Ok(Self::Sm90),
            Ok(other) => Err(Error::flag("HALFBYTE_KERNELS", format!("{other:?}"), "sm80, or sm90 on a Hopper card")),
        }
    }
}

impl Cuda {
    /// Opens the GPU with this number (`CUDA_VISIBLE_DEVICES` applies). [`Error::Unavailable`] says why it cannot be used.
    pub fn open(ordinal: usize) -> Result<Self> {
        let what = format!("GPU {ordinal}");
        let driver = Driver::discover()?;
        let unavailable = |why: String| Error::Unavailable { what: what.clone(), why };
        if let Some(why) = driver.too_old {
            return Err(unavailable(why));
        }
        let count = driver.devices.len();
        let device = driver.devices.into_iter().nth(ordinal);
        let device = device.ok_or_else(|| unavailable(format!("the driver shows {count} GPU(s), numbered from 0")))?;
        if let Some(why) = device.unsupported {
            return Err(unavailable(why));
        }
        let refused = |code: c_int, words: String| unavailable(device::why_not(code, || words));
        ffi::set_device(ordinal as c_int).map_err(|(code, words)| refused(code, words))?;
        let context = CudaContext::new(ordinal).map_err(|e| refused(e.0 as c_int, device::describe(e)))?;
        // SAFETY: events order uses of a buffer by several streams. Here is one stream; `memory` and `ops` refuse
        // buffers of another.
        unsafe { context.disable_event_tracking() };
        let stream = context.new_stream().map_err(|e| driver_error("cuStreamCreate", e))?;
        let kernels = Kernels::pick(device.compute_capability)?;
        Ok(Self {
            graphs: graph::Graphs::from_environment(),
            timer: None,
            cublas: None,
            scratch: None,
            transfers: None,
            loader: Mutex::new(None),
            arena: None,
            context,
            stream,
            device,
            kernels,
            linear: LinearKind::from_environment()?,
            hide_cublas: std::env::var("HALFBYTE_CUBLAS").as_deref() == Ok("0"),
            sync_each: ffi::synchronous(),
            scopes: nvtx::Scopes::default(),
            calls: Counters::default(),
            item: None,
            used: BTreeMap::new(),
            optimizer_on_host: false,
        })
    }

    /// The same GPU with these kernels instead of its best; [`Kernels::Sm90`] gives the best.
    pub fn with_kernels(mut self, kernels: Kernels) -> Self {
        self.use_kernels(kernels);
        self
    }

    /// [`Cuda::with_kernels`] in place.
    pub fn use_kernels(&mut self, kernels: Kernels) {
        self.kernels = match kernels {
            Kernels::Sm80 => Kernels::Sm80,
            Kernels::Sm90 => Kernels::best(self.device.compute_capability),
        };
        self.graphs.forget();
    }

    /// Which kernels run.
    pub fn kernels(&self) -> Kernels {
        self.kernels
    }

    /// Makes this GPU's context the thread's current one.
    fn bind(&self) -> Result<()> {
        self.context.bind_to_thread().map_err(|e| driver_error("cuCtxSetCurrent", e))
    }

    /// The GPU that this is.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Free and total bytes of device memory.
    pub fn memory(&self) -> Result<(usize, usize)> {
        self.bind()?;
        self.context.mem_get_info().map_err(|e| driver_error("cuMemGetInfo", e))
    }

    /// Whether large products can go to cuBLAS.
    pub fn has_cublas(&self) -> bool {
        self.cublas.is_some() || (!self.hide_cublas && cublas::is_present())
    }

    /// The same GPU as if the machine had no cuBLAS.
    pub fn without_cublas(mut self) -> Self {
        (self.cublas, self.hide_cublas) = (None, true);
        self
    }

    /// Calls of the driver so far.
    pub fn calls(&self) -> Calls {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Calls {
            allocations: read(&self.calls.allocations),
            waits: read(&self.calls.waits),
            records: read(&self.calls.records),
            replays: read(&self.calls.replays),
        }
    }

    /// Bytes of device memory by what they were allocated for; only what came through [`super::Backend`].
    pub fn memory_by_item(&self) -> &BTreeMap<Item, usize> {
        &self.used
    }

    /// Waits until all that was launched has finished; an error of a kernel shows here at the latest.
    pub fn synchronize(&self) -> Result<()> {
        self.calls.wait();
        self.stream.synchronize().map_err(|e| driver_error("cuStreamSynchronize", e))
    }
}

/// A driver call that failed, with the driver's own words for it.
fn driver_error(op: impl Into<String>, error: DriverError) -> Error {
    Error::Cuda { op: op.into(), detail: ffi::with_hint(error.0 as c_int, device::describe(error)) }
}
