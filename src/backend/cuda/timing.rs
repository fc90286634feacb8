//! Events on the stream, and launches timed between two of them: recorded once as a graph, so that neither the host nor
//! the launches' latency is in what is measured.

use cudarc::driver::{CudaEvent, CudaGraph, sys};

use super::{Cuda, driver_error};
use crate::error::{Error, Result};

/// Launches recorded between two events.
pub(crate) struct Recorded {
    // The graph goes before the events that it names.
    graph: CudaGraph,
    start: CudaEvent,
    end: CudaEvent,
}

impl Cuda {
    pub(super) fn timing_event(&self) -> Result<CudaEvent> {
        let event = self.context.new_event(Some(sys::CUevent_flags::CU_EVENT_DEFAULT));
        event.map_err(|e| driver_error("cuEventCreate", e))
    }

    /// Records an event behind what was launched so far; while a graph is recorded, as a node of it, which happens anew at
    /// every replay.
    pub(super) fn mark(&self, event: &CudaEvent) -> Result<()> {
        self.bind()?;
        let flags = match self.graphs.recording {
            // Without it the event would order streams of the recording, and hold no time.
            true => sys::CUevent_record_flags::CU_EVENT_RECORD_EXTERNAL,
            false => sys::CUevent_record_flags::CU_EVENT_RECORD_DEFAULT,
        };
        // SAFETY: event and stream are of this context. The event outlives the graph: whoever keeps one keeps the other.
        let recorded = unsafe { sys::cuEventRecordWithFlags(event.cu_event(), self.stream.cu_stream(), flags as u32) };
        recorded.result().map_err(|e| driver_error("cuEventRecordWithFlags", e))
    }

    /// Seconds from one event to a later one; both have happened.
    fn seconds_between(start: &CudaEvent, end: &CudaEvent) -> Result<f64> {
        let ms = start.elapsed_ms(end).map_err(|e| driver_error("cuEventElapsedTime", e))?;
        Ok(f64::from(ms) / 1e3)
    }

    /// Seconds that the GPU takes for what `f` launches, launched once as it is.
    pub(crate) fn time_once(&mut self, f: &mut dyn FnMut(&mut Self) -> Result<()>) -> Result<f64> {
        let (start, end) = (self.timing_event()?, self.timing_event()?);
        self.synchronize()?;
        self.mark(&start)?;
        f(self)?;
        self.mark(&end)?;
        self.synchronize()?;
        Self::seconds_between(&start, &end)
    }

    /// Records what `f` launches; it has run once before. [`Error::Cuda`] if it cannot be recorded.
    pub(crate) fn record_timed(&mut self, f: &mut dyn FnMut(&mut Self) -> Result<()>) -> Result<Recorded> {
        let (start, end) = (self.timing_event()?, self.timing_event()?);
        let recorded = self.record(&mut |cuda| {
            cuda.mark(&start)?;
            f(cuda)?;
            cuda.mark(&end)
        })?;
        let why = || self.recording_failure().unwrap_or("the driver gave no reason").to_string();
        let (graph, _) =
            recorded.ok_or_else(|| Error::Cuda { op: "recording launches to time".into(), detail: why() })?;
        Ok(Recorded { graph, start, end })
    }

    /// Runs the record and waits for it: seconds between its events.
    pub(crate) fn replay_timed(&mut self, recorded: &Recorded) -> Result<f64> {
        recorded.graph.launch().map_err(|e| driver_error("cuGraphLaunch", e))?;
        self.synchronize()?;
        Self::seconds_between(&recorded.start, &recorded.end)
    }
}
