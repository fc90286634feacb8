//! Cases on the CPU backend, which computes in f32: with all its threads and with one.

use std::time::Instant;

use super::case::{Arg, Case, HostBuffer, Role};
use super::case::{CpuLaunch, Element};
use super::check::{Answers, Difference};
use super::outcome::{Ceilings, Outcome, Times, row};
use super::values::{Column, Inputs};
use crate::backend::Work;
use crate::backend::cpu::Cpu;
use crate::bench::environment::environment;
use crate::error::Result;

/// Samples at least, and seconds behind which no more are taken.
const SAMPLES: usize = 30;
const ENOUGH: f64 = 0.5;
/// However slow the op is, so many samples are taken.
const FEW: usize = 5;

/// The CPU with all the threads asked for, beside the CPU with one.
pub struct Race {
    contestants: Vec<(String, Cpu, Ceilings)>,
    card: String,
}

impl Race {
    /// Measures the ceilings of each.
    pub fn new(threads: Option<usize>) -> Self {
        let all = Cpu::new(threads);
        let card = crate::backend::Backend::describe(&all);
        let mut contestants = vec![];
        let one = Cpu::new(Some(1));
        let alone = all.threads() == 1;
        for mut cpu in [all, one].into_iter().take(if alone { 1 } else { 2 }) {
            let ceilings = Ceilings { copy: cpu.copy_rate(), product: cpu.product_rate() };
            contestants.push((format!("{} threads", cpu.threads()).replace("1 threads", "1 thread"), cpu, ceilings));
        }
        Self { contestants, card }
    }

    /// Names of the implementations.
    pub fn names(&self) -> Vec<String> {
        self.contestants.iter().map(|(name, ..)| name.clone()).collect()
    }

    /// What each contestant does at best.
    pub fn ceilings(&self) -> Ceilings {
        self.contestants.first().map_or(Ceilings { copy: f64::NAN, product: f64::NAN }, |c| c.2)
    }

    /// Checks and times the case; nothing where the CPU backend has no such op. Errors: those of the op.
    pub fn race(&mut self, case: &Case, wanted: &dyn Fn(&str) -> bool) -> Result<Vec<Outcome>> {
        let Some(launch) = case.cpu.clone() else { return Ok(vec![]) };
        let inputs = Inputs::new(&case.args, &case.scalars);
        let answers = Answers::of(case, &inputs);
        let checked = answers.iter().map(Answers::len).sum();
        // All in f32 here.
        let host = Case { work: Work { bytes: host_bytes(case), ..case.work }, ..case.clone() };
        let mut outcomes = vec![];
        for (name, cpu, ceilings) in self.contestants.iter_mut().filter(|(name, ..)| wanted(name)) {
            let mut buffers: Vec<_> = case.args.iter().zip(inputs.columns()).map(|(a, c)| buffer(a, c)).collect();
            launch(cpu, &mut buffers)?;
            let refused = difference(case, &answers, &buffers);
            let times = if refused.is_none() { Times::of(samples(cpu, &launch, &mut buffers)?) } else { None };
            let row = row(&host, name, times, *ceilings, environment(None), &self.card, checked);
            outcomes.push(Outcome {
                row,
                refused,
                #[cfg(feature = "cuda")]
                launched: vec![],
            });
        }
        Ok(outcomes)
    }
}

fn samples(cpu: &mut Cpu, launch: &CpuLaunch, buffers: &mut [HostBuffer]) -> Result<Vec<f64>> {
    let start = Instant::now();
    let mut seconds = vec![];
    while seconds.len() < FEW || (seconds.len() < SAMPLES && start.elapsed().as_secs_f64() < ENOUGH) {
        let start = Instant::now();
        launch(cpu, buffers)?;
        seconds.push(start.elapsed().as_secs_f64());
    }
    Ok(seconds)
}

fn host_bytes(case: &Case) -> f64 {
    let times = |arg: &Arg| match arg.role {
        Role::Input | Role::Output => 1,
        Role::InOut => 2,
        Role::Scratch => 0,
    };
    let size = |arg: &Arg| if arg.element == Element::Bf16 { 4 } else { arg.element.size() };
    case.args.iter().map(|arg| (times(arg) * size(arg) * arg.len()) as f64).sum()
}

fn buffer(arg: &Arg, column: &Column) -> HostBuffer {
    // What no op leaves behind by chance.
    let value = |i: usize| if column.period().is_empty() { -3e-16 } else { column.at(i) };
    match arg.element {
        Element::U8 => HostBuffer::U8((0..arg.len()).map(|i| value(i) as u8).collect()),
        Element::I32 => HostBuffer::I32((0..arg.len()).map(|i| value(i) as i32).collect()),
        _ => HostBuffer::F32((0..arg.len()).map(|i| value(i) as f32).collect()),
    }
}

fn difference(case: &Case, answers: &[Answers], buffers: &[HostBuffer]) -> Option<Difference> {
    answers.iter().find_map(|answers| {
        let places = answers.spans.iter().cloned().flatten();
        let found: Vec<f64> = match &buffers[answers.arg] {
            HostBuffer::F32(v) => places.map(|i| f64::from(v[i])).collect(),
            HostBuffer::I32(v) => places.map(|i| f64::from(v[i])).collect(),
            HostBuffer::U8(v) => places.map(|i| f64::from(v[i])).collect(),
        };
        answers.difference(case, &found)
    })
}

/// Runs the case once on fresh buffers and compares: the first difference, if any. None too where the CPU has no such op.
pub fn check(cpu: &mut Cpu, case: &Case, budget: usize) -> Result<Option<Difference>> {
    let Some(launch) = case.cpu.clone() else { return Ok(None) };
    let inputs = Inputs::new(&case.args, &case.scalars);
    let answers = Answers::within(case, &inputs, budget);
    let mut buffers: Vec<_> = case.args.iter().zip(inputs.columns()).map(|(a, c)| buffer(a, c)).collect();
    launch(cpu, &mut buffers)?;
    Ok(difference(case, &answers, &buffers))
}
