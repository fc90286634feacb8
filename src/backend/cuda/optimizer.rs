//! AdamW's state on the GPU: one region for master weights and moments, which stays on the device, or travels there and
//! back window by window in every step, or is used where it lies, pinned on the host. All give the same bits.
//!
//! A window comes on a stream of its own, the kernel waits for it on the compute stream, and it goes home on a third
//! stream: the host waits for none of them.

use std::sync::Arc;

use bytemuck::Pod;
use cudarc::driver::{CudaEvent, CudaStream, DriverError, result, sys};
use half::bf16;

use super::managed::{self, Pinned, Placement, Region};
use super::memory::{Buffer, View, ViewMut};
use super::ops::adamw::{self as ops, Adamw8bit, Adamw32bit, Factors, Group, Tensor};
use super::{Cuda, driver_error};
use crate::backend::adamw::{
    Blocks, M_ZERO, MIN_GROUPS, MOMENT_BLOCK, StateLayout, StepFactors, TABLE_ROW, V_ZERO, sorted_groups, tables,
};
use crate::backend::{Moment, NewOptimizer, OptimKind, OptimizerState, ParamGroup};
use crate::error::{Error, Result};

/// Weights of a window that travels: 24 MiB in 32 bits.
pub const WINDOW: usize = 2 << 20;

/// Windows that are on the device at a time: one in use, one on its way.
const IN_FLIGHT: usize = 2;

/// Steps whose tables of groups may be on their way to the device at a time.
const TABLES: usize = 4;

/// Bytes of device memory that an optimizer takes besides its state, for an adapter of `tensors` tensors.
pub fn table_bytes(tensors: usize) -> usize {
    const { assert!(size_of::<Group>() == TABLE_ROW && size_of::<Tensor>() == TABLE_ROW) };
    tables(tensors).map(|bytes| bytes.next_multiple_of(super::memory::ALIGNMENT)).iter().sum()
}

/// What an update takes besides the state.
pub struct Step<'a> {
    /// (P) = working copy, rounded from the master
    pub lora: ViewMut<'a, bf16>,
    /// (P)
    pub grads: View<'a, f32>,
    /// (1) of grad_norm
    pub norm: View<'a, f32>,
    /// Disjoint ranges that cover 0..P.
    pub groups: &'a [ParamGroup],
    pub beta1: f32,
    pub beta2: f32,
    pub eps: f32,
    /// <= 0: no clipping
    pub max_grad_norm: f32,
    /// 1 for the first
    pub step: u64,
}

/// Pages moved for the optimizer since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Traffic {
    pub steps: u64,
    /// Bytes to the device, and back.
    pub up: u64,
    pub down: u64,
    /// Steps that were timed, and milliseconds that they took the compute stream, waits for pages and all.
    pub timed: u64,
    pub milliseconds: f64,
}

/// Master weights and moments of all P weights.
pub struct Optimizer {
    kind: OptimKind,
    p: usize,
    blocks: Blocks,
    layout: StateLayout,
    region: Region,
    tensors: Buffer<Tensor>,
    groups: Buffer<Group>,
    tables: Tables,
    travel: Option<Travel>,
    stream: Arc<CudaStream>,
    /// Around the update on the compute stream.
    timer: [CudaEvent; 2],
    timing: bool,
    traffic: Traffic,
}

/// Pinned room for the tables of groups of the last steps.
struct Tables {
    room: Pinned,
    capacity: usize,
    /// Recorded behind the copy from each.
    copied: Vec<CudaEvent>,
    next: usize,
}

/// The windows of a state that is at home on the host.
struct Travel {
    up: Arc<CudaStream>,
    down: Arc<CudaStream>,
    windows: Vec<Window>,
    in_flight: usize,
    /// Windows that have been asked for in this step.
    coming: usize,
}

struct Window {
    /// Weights, or blocks of 8-bit moments.
    units: std::ops::Range<usize>,
    /// Bytes of each section.
    bytes: Vec<std::ops::Range<usize>>,
    /// It has come; the kernel has used it; it has gone home.
    arrived: CudaEvent,
    used: CudaEvent,
    gone: CudaEvent,
}

impl Optimizer {
    /// Master = `init`, m = v = 0. Where managed memory may not or cannot hold it, the state is pinned, see
    /// [`Placement::pick`].
    pub fn new(cuda: &Cuda, of: NewOptimizer, wanted: Placement) -> Result<Self> {
        let blocks = Blocks::new(of.init.len(), of.tensors)?;
        let bytes = StateLayout::new(of.kind, of.init.len(), blocks.count()).bytes;
        Self::placed(cuda, of, Placement::pick(cuda, wanted, bytes)?, WINDOW)
    }

    /// The same at this place, or an error; `window` weights travel at a time.
    pub fn placed(cuda: &Cuda, of: NewOptimizer, placement: Placement, window: usize) -> Result<Self> {
        let p = of.init.len();
        let blocks = Blocks::new(p, of.tensors)?;
        let layout = StateLayout::new(of.kind, p, blocks.count());
        let region = Region::new(cuda, layout.bytes, placement)?;
        let tensor = |&(start, block): &(usize, usize)| Tensor { start: start as u64, block: block as u64 };
        let mut tensors: Vec<Tensor> = blocks.starts().iter().map(tensor).collect();
        tensors.resize(of.tensors.len().max(1), Tensor { start: p as u64, block: blocks.count() as u64 });
        let tensors = cuda.upload(&tensors)?;
        let capacity = of.tensors.len().max(MIN_GROUPS);
        let events = |count: usize| (0..count).map(|_| event(cuda)).collect::<Result<Vec<_>>>();
        let room = Pinned::new(cuda, TABLES * capacity * size_of::<Group>())?;
        let tables = Tables { room, capacity, copied: events(TABLES)?, next: 0 };
        let timed = || {
            let flags = Some(sys::CUevent_flags::CU_EVENT_DEFAULT);
            cuda.context.new_event(flags).map_err(|e| driver_error("cuEventCreate", e))
        };
        let mut optimizer = Self {
            kind: of.kind,
            p,
            region,
            tensors,
            groups: cuda.zeros(capacity)?,
            tables,
            travel: None,
            stream: cuda.stream.clone(),
            timer: [timed()?, timed()?],
            timing: false,
            traffic: Traffic::default(),
            blocks,
            layout,
        };
        if placement == Placement::Host {
            optimizer.travel = Some(optimizer.travel(cuda, window)?);
        }
        optimizer.region.write(optimizer.layout.master.start, bytemuck::cast_slice(of.init))?;
        if of.kind == OptimKind::PagedAdamw8bit {
            optimizer.region.write(optimizer.layout.m.start, &vec![M_ZERO; p])?;
            optimizer.region.write(optimizer.layout.v.start, &vec![V_ZERO; p])?;
        }
        optimizer.send_home(cuda)?;
        Ok(optimizer)
    }

    /// Number of weights.
    pub fn len(&self) -> usize {
        self.p
    }

    pub fn is_empty(&self) -> bool {
        self.p == 0
    }

    /// Bytes of master weights and moments.
    pub fn bytes(&self) -> usize {
        let StateLayout { master, m, v, m_absmax, v_absmax, .. } = &self.layout;
        [master, m, v, m_absmax, v_absmax].map(|section| section.len()).iter().sum()
    }

    /// Where the state lives.
    pub fn placement(&self) -> Placement {
        self.region.placement()
    }

    /// For the log: size and place of the state, and what its steps have cost.
    pub fn report(&mut self) -> Result<String> {
        let mb = |bytes: u64| format!("{} MB", bytes.div_ceil(1_000_000));
        let mut text = format!("optimizer state: {}, {}", mb(self.layout.bytes as u64), self.placement());
        let t = self.traffic()?;
        if t.up + t.down > 0 && t.steps > 0 {
            text += &format!("; {} to the GPU and {} back in a step", mb(t.up / t.steps), mb(t.down / t.steps));
        }
        if t.timed > 0 {
            text += &format!("; an update takes {:.2} ms", t.milliseconds / t.timed as f64);
        }
        Ok(text)
    }

    /// What has been moved so far.
    pub fn traffic(&mut self) -> Result<Traffic> {
        self.read_timer().map_err(|e| driver_error("cuEventElapsedTime", e))?;
        Ok(self.traffic)
    }

    fn travel(&self, cuda: &Cuda, window: usize) -> Result<Travel> {
        let stream = || cuda.context.new_stream().map_err(|e| driver_error("cuStreamCreate", e));
        let (units, window) = match self.kind {
            OptimKind::PagedAdamw8bit => (self.blocks.count(), window.div_ceil(MOMENT_BLOCK).max(1)),
            _ => (self.p, window.next_multiple_of(ops::WINDOW_ALIGN).max(ops::WINDOW_ALIGN)),
        };
        let windows = (0..units).step_by(window).map(|start| {
            let units = start..(start + window).min(units);
            let (arrived, used, gone) = (event(cuda)?, event(cuda)?, event(cuda)?);
            Ok(Window { bytes: self.bytes_of(&units), units, arrived, used, gone })
        });
        let windows = windows.collect::<Result<_>>()?;
        Ok(Travel { up: stream()?, down: stream()?, windows, in_flight: IN_FLIGHT, coming: 0 })
    }

    /// The bytes of a window's master weights, moments and absmax.
    fn bytes_of(&self, units: &std::ops::Range<usize>) -> Vec<std::ops::Range<usize>> {
        let part = |section: &std::ops::Range<usize>, size: usize, of: &std::ops::Range<usize>| {
            section.start + size * of.start..section.start + size * of.end
        };
        let l = &self.layout;
        match self.kind {
            OptimKind::PagedAdamw8bit => {
                let weights = self.blocks.range(units.start).start..self.blocks.range(units.end - 1).end;
                let moments = [&l.m, &l.v].map(|section| part(section, 1, &weights));
                let absmax = [&l.m_absmax, &l.v_absmax].map(|section| part(section, 4, units));
                [part(&l.master, 4, &weights)].into_iter().chain(moments).chain(absmax).collect()
            }
            _ => [&l.master, &l.m, &l.v].map(|section| part(section, 4, units)).to_vec(),
        }
    }

    /// Called ahead of the last backward pass of a step: the first windows begin to come to the device.
    pub fn prefetch(&mut self, cuda: &Cuda) -> Result<()> {
        let Some(travel) = &mut self.travel else { return Ok(()) };
        cuda.bind()?;
        self.traffic.up += travel.bring(cuda, &self.region, travel.in_flight)?;
        Ok(())
    }

    /// One step of AdamW on all weights, see `backend::Adamw`. Nothing here waits for the device.
    pub fn adamw(&mut self, cuda: &Cuda, a: Step) -> Result<()> {
        let op = "adamw";
        if a.step == 0 {
            return Err(Error::Shape { op, argument: "step", found: 0, expected: 1 });
        }
        let sorted = sorted_groups(a.groups, self.p)?;
        if sorted.len() > self.tables.capacity {
            let (found, expected) = (sorted.len(), self.tables.capacity);
            return Err(Error::Shape { op, argument: "groups (count)", found, expected });
        }
        if self.p == 0 {
            return Ok(());
        }
        cuda.bind()?;
        self.read_timer().map_err(|e| driver_error("cuEventElapsedTime", e))?;
        let factors = StepFactors::new(a.beta1, a.beta2, a.step);
        let rows = sorted.iter().map(|g| {
            let (decay, rate) = factors.of_group(g);
            Group { start: g.range.start as u64, decay, rate }
        });
        self.tables.send(cuda, &mut self.groups, rows)?;
        record(&self.timer[0], &self.stream)?;
        let Self { kind, p, blocks, layout, region, tensors, groups, travel, .. } = self;
        let mut lora = a.lora;
        let mut update = |units: std::ops::Range<usize>| {
            let factors = Factors {
                grads: a.grads,
                norm: a.norm,
                groups: groups.range(0..sorted.len()),
                beta1: a.beta1,
                beta2: a.beta2,
                eps: a.eps,
                bias2_root: factors.bias2_root,
                max_grad_norm: a.max_grad_norm,
            };
            let (lora, master) = (lora.reborrow(), region.view(layout.master.start, *p));
            match kind {
                OptimKind::PagedAdamw8bit => ops::adamw_8bit(
                    cuda,
                    Adamw8bit {
                        master,
                        m: region.view(layout.m.start, *p),
                        v: region.view(layout.v.start, *p),
                        m_absmax: region.view(layout.m_absmax.start, blocks.count()),
                        v_absmax: region.view(layout.v_absmax.start, blocks.count()),
                        lora,
                        factors,
                        tensors: tensors.range(0..blocks.starts().len()),
                        window: units,
                    },
                ),
                _ => ops::adamw_32bit(
                    cuda,
                    Adamw32bit {
                        master,
                        m: region.view(layout.m.start, *p),
                        v: region.view(layout.v.start, *p),
                        lora,
                        factors,
                        window: units,
                    },
                ),
            }
        };
        let units = if *kind == OptimKind::PagedAdamw8bit { blocks.count() } else { *p };
        match travel {
            None => update(0..units)?,
            Some(travel) => {
                for i in 0..travel.windows.len() {
                    self.traffic.up += travel.bring(cuda, region, i + travel.in_flight)?;
                    let w = &travel.windows[i];
                    wait(&self.stream, &w.arrived)?;
                    update(w.units.clone())?;
                    record(&w.used, &self.stream)?;
                    self.traffic.down += travel.send_home(region, i)?;
                }
                travel.coming = 0;
            }
        }
        record(&self.timer[1], &self.stream)?;
        self.timing = true;
        self.traffic.steps += 1;
        Ok(())
    }

    /// Adds the time of the last step, if it is over.
    fn read_timer(&mut self) -> Result<(), DriverError> {
        if self.timing && self.timer[1].try_is_complete()? {
            // SAFETY: both were created with timing, and recorded; the later one is over.
            let ms = unsafe { result::event::elapsed(self.timer[0].cu_event(), self.timer[1].cu_event()) }?;
            self.traffic.milliseconds += f64::from(ms);
            self.traffic.timed += 1;
        }
        self.timing = false;
        Ok(())
    }

    /// Master weights and moments as they are. Waits for the work launched before.
    pub fn read(&self, cuda: &Cuda) -> Result<OptimizerState> {
        let mut state = self.blank();
        cuda.synchronize()?;
        let l = &self.layout;
        read(&self.region, l.master.start, &mut state.master)?;
        for (moment, [at, at_absmax]) in [(&mut state.m, [&l.m, &l.m_absmax]), (&mut state.v, [&l.v, &l.v_absmax])] {
            match moment {
                Moment::F32(values) => read(&self.region, at.start, values)?,
                Moment::U8 { codes, absmax } => {
                    read(&self.region, at.start, codes)?;
                    read(&self.region, at_absmax.start, absmax)?;
                }
            }
        }
        Ok(state)
    }

    /// Takes over a state of the same form. Waits for the work launched before.
    pub fn write(&mut self, cuda: &Cuda, from: &OptimizerState) -> Result<()> {
        // Through a copy: it checks the form, all of it, before anything is written.
        let mut state = self.blank();
        state.copy_from("write_optimizer", from)?;
        cuda.synchronize()?;
        let l = &self.layout;
        self.region.write(l.master.start, bytemuck::cast_slice(&state.master))?;
        for (moment, [at, at_absmax]) in [(&state.m, [&l.m, &l.m_absmax]), (&state.v, [&l.v, &l.v_absmax])] {
            match moment {
                Moment::F32(values) => self.region.write(at.start, bytemuck::cast_slice(values))?,
                Moment::U8 { codes, absmax } => {
                    self.region.write(at.start, codes)?;
                    self.region.write(at_absmax.start, bytemuck::cast_slice(absmax))?;
                }
            }
        }
        self.send_home(cuda)
    }

    /// A state of this form.
    fn blank(&self) -> OptimizerState {
        let moment = || match self.kind {
            OptimKind::PagedAdamw8bit => Moment::U8 { codes: vec![0; self.p], absmax: vec![0.0; self.blocks.count()] },
            _ => Moment::F32(vec![0.0; self.p]),
        };
        OptimizerState { master: vec![0.0; self.p], m: moment(), v: moment() }
    }

    /// All pages go where they belong. Waits: set-up alone.
    fn send_home(&self, cuda: &Cuda) -> Result<()> {
        cuda.bind()?;
        self.region.prefetch(0..self.layout.bytes, self.region.home(cuda), &self.stream)?;
        cuda.synchronize()
    }
}

fn read<T: Pod>(region: &Region, at: usize, to: &mut [T]) -> Result<()> {
    region.read(at, bytemuck::cast_slice_mut(to))
}

fn event(cuda: &Cuda) -> Result<CudaEvent> {
    cuda.context.new_event(None).map_err(|e| driver_error("cuEventCreate", e))
}

fn record(event: &CudaEvent, stream: &CudaStream) -> Result<()> {
    event.record(stream).map_err(|e| driver_error("cuEventRecord", e))
}

fn wait(stream: &CudaStream, event: &CudaEvent) -> Result<()> {
    stream.wait(event).map_err(|e| driver_error("cuStreamWaitEvent", e))
}

impl Tables {
    /// Begins to copy the groups to the device, behind what used the table before.
    fn send(&mut self, cuda: &Cuda, to: &mut Buffer<Group>, rows: impl Iterator<Item = Group>) -> Result<()> {
        let (slot, capacity) = (self.next, self.capacity);
        self.next = (slot + 1) % TABLES;
        let copied = &self.copied[slot];
        // Of four steps ago: over, wherever the host reads the loss of a step before it asks for the next but one.
        if !copied.try_is_complete().map_err(|e| driver_error("cuEventQuery", e))? {
            cuda.calls.wait();
            copied.synchronize().map_err(|e| driver_error("cuEventSynchronize", e))?;
        }
        let size = size_of::<Group>();
        let room = &mut self.room.bytes_mut()[slot * capacity * size..(slot + 1) * capacity * size];
        let mut bytes = 0;
        for (row, group) in room.chunks_exact_mut(size).zip(rows) {
            row.copy_from_slice(bytemuck::bytes_of(&group));
            bytes += size;
        }
        let address = cuda.ptr_mut(&to.view_mut())? as u64;
        // SAFETY: the table has room for `capacity` groups; the pinned source is left alone until `copied` has passed.
        unsafe { result::memcpy_htod_async(address, &room[..bytes], cuda.stream.cu_stream()) }
            .map_err(|e| driver_error("cuMemcpyHtoDAsync", e))?;
        record(copied, &cuda.stream)
    }
}

impl Travel {
    /// Asks for all windows below `end` that have not been asked for in this step. Gives the bytes.
    fn bring(&mut self, cuda: &Cuda, region: &Region, end: usize) -> Result<u64> {
        let mut bytes = 0;
        for i in self.coming..end.min(self.windows.len()) {
            // The window that makes room: of this step, or, for the first ones, the last of the step before.
            let before = i.checked_sub(self.in_flight).unwrap_or(self.windows.len() - 1);
            wait(&self.up, &self.windows[before].gone)?;
            for piece in &self.windows[i].bytes {
                region.prefetch(piece.clone(), managed::device(cuda), &self.up)?;
                bytes += piece.len() as u64;
            }
            record(&self.windows[i].arrived, &self.up)?;
            self.coming = i + 1;
        }
        Ok(bytes)
    }

    /// Sends a window home once it has been used. Gives the bytes.
    fn send_home(&self, region: &Region, i: usize) -> Result<u64> {
        let w = &self.windows[i];
        wait(&self.down, &w.used)?;
        for piece in &w.bytes {
            region.prefetch(piece.clone(), managed::host(), &self.down)?;
        }
        record(&w.gone, &self.down)?;
        Ok(w.bytes.iter().map(|piece| piece.len() as u64).sum())
    }
}
