//! Micro-steps as CUDA graphs: what a key launches is recorded at its second call and replayed from then on.
//!
//! The first call runs as it is: the driver loads kernels and cuBLAS picks its own then, which a recording may not. A key
//! that comes once, such as the odd last micro-batch of an epoch, costs no recording.

use std::collections::VecDeque;

use cudarc::driver::{CudaGraph, sys};

use super::timer::Call;
use super::{Cuda, driver_error};
use crate::backend::StepKey;
use crate::error::{Error, Result};

/// Graphs kept; the one used longest ago goes first.
const GRAPHS: usize = 16;
/// Recordings that may fail before none is tried any more.
const FAILURES: usize = 3;
/// Keys remembered that have run once.
const SEEN: usize = 256;

/// The records of this backend.
#[derive(Default)]
pub(super) struct Graphs {
    /// `HALFBYTE_GRAPH=0`, [`Cuda::use_graphs`], or recordings that failed.
    pub off: bool,
    /// Whether ops are being recorded now.
    pub recording: bool,
    /// Recordings that failed, and what the last of them said.
    failures: usize,
    failure: Option<String>,
    /// Keys that have run, the latest last.
    seen: VecDeque<StepKey>,
    /// Records, the one used last at the end.
    kept: Vec<Record>,
}

/// A micro-step as it is replayed.
struct Record {
    key: StepKey,
    graph: CudaGraph,
    /// Its ops whose time every replay takes. Behind the graph: it records their events.
    calls: Vec<Call>,
}

impl Graphs {
    pub(super) fn from_environment() -> Self {
        Self { off: std::env::var("HALFBYTE_GRAPH").as_deref() == Ok("0"), ..Self::default() }
    }

    /// Drops all records: something that they hold on to has changed.
    pub(super) fn forget(&mut self) {
        self.kept.clear();
        self.seen.clear();
    }

    /// Whether `key` has run before; it has from now on.
    fn meet(&mut self, key: StepKey) -> bool {
        let before = self.seen.iter().position(|k| *k == key);
        if let Some(at) = before {
            self.seen.remove(at);
        } else if self.seen.len() == SEEN {
            self.seen.pop_front();
        }
        self.seen.push_back(key);
        before.is_some()
    }
}

impl Cuda {
    /// Why the last recording that failed could not be made; its micro-step was launched op by op.
    pub fn recording_failure(&self) -> Option<&str> {
        self.graphs.failure.as_deref()
    }

    /// Turns replay on or off. The bits of a step do not depend on it.
    pub fn use_graphs(&mut self, on: bool) {
        self.graphs.off = !on;
        self.graphs.forget();
    }

    /// Runs `f`, or what it launched at an earlier call with this key.
    pub(super) fn replay(&mut self, key: StepKey, f: &mut dyn FnMut(&mut Self) -> Result<()>) -> Result<()> {
        if self.graphs.off || self.sync_each || self.graphs.recording {
            f(self)?;
            return self.join_transfers();
        }
        if let Some(at) = self.graphs.kept.iter().position(|r| r.key == key) {
            let record = self.graphs.kept.remove(at);
            return self.launch_record(record);
        }
        if !self.graphs.meet(key) {
            f(self)?;
            return self.join_transfers();
        }
        // A copy begun before must not be waited for inside the record.
        self.join_transfers()?;
        let before = self.timer.as_ref().map_or(0, |t| t.calls.len());
        let recorded = self.record(f)?;
        // None of them has run yet.
        let calls = self.timer.as_mut().map_or(vec![], |t| t.calls.split_off(before));
        match recorded {
            Some(graph) => {
                if self.graphs.kept.len() == GRAPHS {
                    self.graphs.kept.remove(0);
                }
                self.launch_record(Record { key, graph, calls })
            }
            None if self.timer.is_some() => {
                let detail = self.graphs.failure.clone().unwrap_or("nothing was recorded".into());
                Err(Error::Cuda { op: "recording a micro-step whose ops are timed".into(), detail })
            }
            None => {
                // What is really wrong shows when the ops run.
                self.graphs.failures += 1;
                self.graphs.off = self.graphs.failures >= FAILURES;
                f(self)?;
                self.join_transfers()
            }
        }
    }

    /// Replays a record and keeps it.
    fn launch_record(&mut self, record: Record) -> Result<()> {
        let launched = record.graph.launch();
        if let Some(timer) = &mut self.timer {
            timer.calls.extend(record.calls.iter().cloned());
        }
        self.graphs.kept.push(record);
        self.calls.replay();
        launched.map_err(|e| driver_error("cuGraphLaunch", e))
    }

    /// What `f` launches, without running it. None if it could not be recorded: work of another thread of the process can
    /// spoil a recording.
    pub(super) fn record(&mut self, f: &mut dyn FnMut(&mut Self) -> Result<()>) -> Result<Option<CudaGraph>> {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        self.stream.begin_capture(mode).map_err(|e| driver_error("cuStreamBeginCapture", e))?;
        self.graphs.recording = true;
        let depth = self.scopes.depth();
        let ran = f(self).and_then(|()| self.join_transfers());
        self.graphs.recording = false;
        let record = self.stream.end_capture(sys::CUgraphInstantiate_flags(0));
        if let Err(error) = ran {
            self.graphs.failure = Some(error.to_string());
            // Its copies never began, and its scopes are still open.
            self.forget_transfers();
            self.scopes.unwind(depth);
            return Ok(None);
        }
        match record {
            Ok(Some(graph)) => {
                self.calls.record();
                Ok(Some(graph))
            }
            Ok(None) => Ok(None),
            Err(error) => {
                self.graphs.failure = Some(driver_error("cuStreamEndCapture", error).to_string());
                Ok(None)
            }
        }
    }
}
