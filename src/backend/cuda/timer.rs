//! The time of each op on the GPU: an event before it and one behind it. Inside a recorded micro-step the events are nodes
//! of the record, so that every replay takes the times anew.

use std::sync::Arc;
use std::time::Duration;

use super::Cuda;
use super::timing::Event;
use crate::backend::work::add_call;
use crate::backend::{OpTime, Work};
use crate::error::Result;

/// An op of which the events are recorded, or will be by the record that it is part of.
#[derive(Clone)]
pub(super) struct Call {
    op: &'static str,
    work: Work,
    /// Before and behind it.
    events: Arc<[Event; 2]>,
}

/// The calls that are timed.
#[derive(Default)]
pub(super) struct Timer {
    /// Since the times were taken last. One that a record has replayed more than once stands here as often, each time with
    /// the time of the last.
    pub calls: Vec<Call>,
    /// Events that no call uses. They are made as they are needed: all of them in a first step, which records nothing.
    spare: Vec<Arc<[Event; 2]>>,
}

impl Cuda {
    /// From now on takes the time of each op, or no longer.
    pub(super) fn set_timer(&mut self, on: bool) {
        // Records hold events, or lack them.
        self.graphs.forget();
        self.timer = on.then(Timer::default);
    }

    /// Runs an op, and takes its time on the stream if that is wanted.
    pub(super) fn timed(&mut self, op: &'static str, work: Work, f: impl FnOnce(&Self) -> Result<()>) -> Result<()> {
        let Some(timer) = &mut self.timer else { return f(self) };
        let events = match timer.spare.pop() {
            Some(events) => events,
            None => Arc::new([self.event()?, self.event()?]),
        };
        self.mark(&events[0])?;
        f(self)?;
        self.mark(&events[1])?;
        if let Some(timer) = &mut self.timer {
            timer.calls.push(Call { op, work, events });
        }
        Ok(())
    }

    /// The time of each op since the last call, in the order of first use. Waits for them.
    pub(super) fn take_times(&mut self) -> Result<Vec<OpTime>> {
        self.synchronize()?;
        let calls = self.timer.as_mut().map_or(vec![], |t| std::mem::take(&mut t.calls));
        let mut times = vec![];
        for Call { op, work, events } in calls {
            let time = Duration::try_from_secs_f64(self.seconds_between(&events[0], &events[1])?).unwrap_or_default();
            add_call(&mut times, op, time, work);
            // A record may hold them too.
            if let Some(timer) = self.timer.as_mut().filter(|_| Arc::strong_count(&events) == 1) {
                timer.spare.push(events);
            }
        }
        Ok(times)
    }
}
