//! Launches timed on the device: recorded once as a graph with an event at each end, so that neither the host nor the
//! launches' latency is in what is measured.

use cudarc::driver::{CudaGraph, sys};

use super::{Cuda, driver_error};
use crate::error::{Error, Result};

/// A mark in the stream that knows when the GPU came by.
pub(crate) struct Event(sys::CUevent);

// SAFETY: an event may be used from any thread whose context is the one it was made in; its users bind that first.
unsafe impl Send for Event {}
// SAFETY: as above; calls of the driver on one handle may come from several threads at a time.
unsafe impl Sync for Event {}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: made by `event` and destroyed once. What the driver answers is of no use here.
        let _ = unsafe { sys::cuEventDestroy_v2(self.0) };
    }
}

/// Launches recorded between two events.
pub(crate) struct Recorded {
    graph: CudaGraph,
    start: Event,
    end: Event,
}

impl Cuda {
    pub(crate) fn event(&self) -> Result<Event> {
        self.bind()?;
        let mut event = std::ptr::null_mut();
        // SAFETY: the driver writes a handle to `event`.
        unsafe { sys::cuEventCreate(&raw mut event, sys::CUevent_flags_enum::CU_EVENT_DEFAULT as u32) }
            .result()
            .map_err(|e| driver_error("cuEventCreate", e))?;
        Ok(Event(event))
    }

    /// The event happens when all launched before has finished. While launches are recorded it becomes a node that happens
    /// at every replay.
    pub(crate) fn mark(&self, event: &Event) -> Result<()> {
        self.bind()?;
        let flag = match self.graphs.recording {
            true => sys::CUevent_record_flags_enum::CU_EVENT_RECORD_EXTERNAL,
            false => sys::CUevent_record_flags_enum::CU_EVENT_RECORD_DEFAULT,
        };
        // SAFETY: event and stream are live handles of this context.
        unsafe { sys::cuEventRecordWithFlags(event.0, self.stream.cu_stream(), flag as u32) }
            .result()
            .map_err(|e| driver_error("cuEventRecord", e))
    }

    /// Seconds from one event to a later one; both have happened.
    pub(crate) fn seconds_between(&self, start: &Event, end: &Event) -> Result<f64> {
        self.bind()?;
        let mut ms = 0f32;
        // SAFETY: both events are live, and the driver writes a float.
        unsafe { sys::cuEventElapsedTime_v2(&raw mut ms, start.0, end.0) }
            .result()
            .map_err(|e| driver_error("cuEventElapsedTime", e))?;
        Ok(f64::from(ms) / 1e3)
    }

    /// Seconds that the GPU takes for what `f` launches, launched once as it is.
    pub(crate) fn time_once(&mut self, f: &mut dyn FnMut(&mut Self) -> Result<()>) -> Result<f64> {
        let (start, end) = (self.event()?, self.event()?);
        self.synchronize()?;
        self.mark(&start)?;
        f(self)?;
        self.mark(&end)?;
        self.synchronize()?;
        self.seconds_between(&start, &end)
    }

    /// Records what `f` launches; it has run once before. [`Error::Cuda`] if it cannot be recorded.
    pub(crate) fn record_timed(&mut self, f: &mut dyn FnMut(&mut Self) -> Result<()>) -> Result<Recorded> {
        let (start, end) = (self.event()?, self.event()?);
        let graph = self.record(&mut |cuda| {
            cuda.mark(&start)?;
            f(cuda)?;
            cuda.mark(&end)
        })?;
        let why = || self.recording_failure().unwrap_or("the driver gave no reason").to_string();
        let graph = graph.ok_or_else(|| Error::Cuda { op: "recording launches to time".into(), detail: why() })?;
        Ok(Recorded { graph, start, end })
    }

    /// Runs the record and waits for it: seconds between its events.
    pub(crate) fn replay_timed(&mut self, recorded: &Recorded) -> Result<f64> {
        recorded.graph.launch().map_err(|e| driver_error("cuGraphLaunch", e))?;
        self.synchronize()?;
        self.seconds_between(&recorded.start, &recorded.end)
    }
}
