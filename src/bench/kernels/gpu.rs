//! Cases on a GPU: checked against the oracle, then timed, in rounds that place the buffers elsewhere.
//!
//! A sample is a graph of launches between two events, long enough that the clock's resolution does not matter, on sets
//! of buffers that take turns; the cache is flushed before it. So no launch finds its inputs in the cache, and neither
//! the host nor the latency of a launch is in it.

use std::collections::BTreeMap;

use super::case::{Case, Way};
use super::check::{Answers, Difference};
use super::models::Model;
use super::outcome::{Ceilings, Outcome, Times, row, with_launched};
use super::set::{Dev, Set};
use super::values::Inputs;
use crate::backend::Needs;
use crate::backend::cuda::launched::Launched;
use crate::backend::cuda::memory::{ArenaMark, Buffer};
use crate::backend::cuda::{Cuda, Kernels};
use crate::bench::environment::{Environment, environment};
use crate::error::{Error, Result};

/// Rounds, each with the buffers elsewhere; samples of each.
const ROUNDS: usize = 8;
const SAMPLES: usize = 5;
/// Seconds that a sample should take, and launches in it at most.
const SAMPLE: f64 = 400e-6;
const LAUNCHES: usize = 256;
/// Bytes of all sets behind which nothing is left of the first in any cache.
const ENOUGH: usize = 512 << 20;
/// Bytes that a flush reads.
const FLUSH: usize = 256 << 20;
/// The arena: at most this, and this left to the driver.
const ARENA: usize = 24 << 30;
const SPARE: usize = 1 << 30;
/// How far apart rounds begin.
const SHIFT: usize = (1 << 30) + (3 << 20);

/// What is known of a way of a case as its rounds go by.
#[derive(Default)]
struct Run {
    /// Of a launch, one number a sample.
    seconds: Vec<f64>,
    refused: Option<Difference>,
    environment: Environment,
    launched: Vec<Launched>,
}

/// A GPU made ready for cases.
pub struct Gpu<'a> {
    pub cuda: &'a mut Cuda,
    pub ceilings: Ceilings,
    /// What runs where a way does not name others: the card's best, or what `HALFBYTE_KERNELS` asks for.
    kernels: Kernels,
    flush: Buffer<f32>,
    flushed: (Buffer<f32>, Buffer<f64>),
    /// What the ops need beside their buffers, and where the arena is free to place it.
    needs: Needs,
    start: Option<ArenaMark>,
    /// Bytes that are then left of the arena.
    room: usize,
}

impl<'a> Gpu<'a> {
    /// Measures the ceilings and takes most of the free memory. `cases`: those that will run.
    pub fn new<'c>(cuda: &'a mut Cuda, cases: impl Iterator<Item = &'c Case> + Clone) -> Result<Self> {
        let mut models: Vec<Model> = cases.clone().filter_map(|case| Model::named(case.model).ok()).collect();
        models.dedup();
        let needs = Model::needs(&models, cases.filter_map(|case| case.tokens).max().unwrap_or(1));
        let ceilings = Ceilings { copy: cuda.copy_rate()?, product: cuda.product_rate()? };
        Self::ready(cuda, &needs, ceilings)
    }

    /// The same without timing anything: for checks alone. `needs`: of the linears that will run.
    pub fn unmeasured(cuda: &'a mut Cuda, needs: &Needs) -> Result<Self> {
        Self::ready(cuda, needs, Ceilings { copy: f64::INFINITY, product: f64::INFINITY })
    }

    fn ready(cuda: &'a mut Cuda, needs: &Needs, ceilings: Ceilings) -> Result<Self> {
        let free = cuda.memory()?.0;
        let arena = free.saturating_sub(SPARE).min(ARENA);
        if arena < 4 * FLUSH {
            let why = format!("{free} bytes of its memory are free, timing kernels takes {}", 4 * FLUSH + SPARE);
            return Err(Error::Unavailable { what: "the GPU".into(), why });
        }
        cuda.reserve(arena)?;
        let flush = cuda.zeros(FLUSH / 4)?;
        let flushed = (cuda.zeros(1)?, cuda.zeros(crate::backend::cuda::ops::grad_norm::GRAD_NORM_PARTIALS)?);
        let start = cuda.arena_mark();
        let mut gpu = Self { kernels: cuda.kernels(), cuda, ceilings, flush, flushed, needs: *needs, start, room: 0 };
        gpu.place(0)?;
        gpu.room = gpu.left();
        Ok(gpu)
    }

    /// Places the scratch, and all that comes behind it, so many bytes further on in the arena.
    fn place(&mut self, shift: usize) -> Result<()> {
        self.cuda.drop_scratch();
        self.reset(self.start)?;
        self.cuda.allocate::<u8>(shift)?;
        self.cuda.prepare_scratch(&self.needs)
    }

    /// The cache holds nothing of what was used before, and nothing that it must write back.
    fn flush(&mut self) -> Result<()> {
        use crate::backend::cuda::ops::grad_norm::{GradNorm, grad_norm};
        let (norm, partial) = (self.flushed.0.view_mut(), self.flushed.1.view_mut());
        grad_norm(self.cuda, GradNorm { norm, grads: self.flush.view(), partial })
    }

    /// Rounds of a race.
    pub fn rounds(&self) -> usize {
        ROUNDS
    }

    /// Bytes of the arena that are left.
    fn left(&self) -> usize {
        self.cuda.arena_use().map_or(0, |(used, all)| all - used)
    }

    /// Whether this machine can run the way, and no other runs the same: the kernels for every card are what runs anyway
    /// where there are no others.
    pub fn runs(&self, way: &Way) -> bool {
        let others = self.kernels != Kernels::Sm80;
        (self.cuda.has_cublas() || !way.needs_cublas) && (others || way.kernels.is_none())
    }

    /// Whether the case has room: its arguments, one set, and what is made beside them.
    pub fn fits(&self, case: &Case) -> bool {
        3 * case.set_bytes() < self.room
    }

    /// Every argument as the case declares it.
    fn args(&self, case: &Case, inputs: &Inputs) -> Result<Vec<Dev>> {
        let filled = |(arg, column)| {
            let mut dev = Dev::new(self.cuda, arg)?;
            dev.fill(self.cuda, column)?;
            Ok(dev)
        };
        case.args.iter().zip(inputs.columns()).map(filled).collect()
    }

    /// A set of these arguments, for this way.
    fn set(&mut self, args: Vec<Dev>, way: &Way) -> Result<Set> {
        let mut set = Set { args, extra: None };
        if let Some(set_up) = &way.set_up {
            set_up(self.cuda, &mut set)?;
        }
        Ok(set)
    }

    /// A set whose arguments are copies of these.
    fn copied(&mut self, args: &[Dev], way: &Way) -> Result<Set> {
        let args = args.iter().map(|arg| arg.copied(self.cuda)).collect::<Result<_>>()?;
        self.set(args, way)
    }

    /// Runs the way once on fresh buffers and compares: the first difference, if any.
    pub fn check(&mut self, case: &Case, way: &Way) -> Result<Option<Difference>> {
        let inputs = Inputs::new(&case.args, &case.scalars);
        let answers = Answers::of(case, &inputs);
        let mark = self.cuda.arena_mark();
        self.cuda.use_kernels(way.kernels.unwrap_or(self.kernels));
        let found = self.args(case, &inputs).and_then(|args| self.set(args, way)).and_then(|mut set| {
            (way.launch)(self.cuda, &mut set)?;
            self.compare(case, &answers, &set)
        });
        self.reset(mark)?;
        found
    }

    fn compare(&self, case: &Case, answers: &[Answers], set: &Set) -> Result<Option<Difference>> {
        for answer in answers {
            let whole = 0..case.args[answer.arg].len();
            let spans = if answer.len() == whole.len() { std::slice::from_ref(&whole) } else { &answer.spans };
            let difference = answer.difference(case, &set.args[answer.arg].read(self.cuda, spans)?);
            if difference.is_some() {
                return Ok(difference);
            }
        }
        Ok(None)
    }

    /// Takes the buffers of a case back, whatever became of it.
    fn reset(&mut self, mark: Option<ArenaMark>) -> Result<()> {
        self.cuda.use_kernels(self.kernels);
        self.cuda.use_linear(None);
        match mark {
            Some(mark) => self.cuda.rewind(mark),
            None => Ok(()),
        }
    }

    /// Checks and times the ways that are wanted, of those that this machine has, of these cases. All cases go through a
    /// round before the next begins, and the ways of a case take turns in being first. A way whose output is wrong is not
    /// timed. `done` is told after each round of a way. Errors: those of the driver.
    pub fn race(
        &mut self,
        cases: &[Case],
        wanted: &dyn Fn(&Way) -> bool,
        done: &mut dyn FnMut(),
    ) -> Result<Vec<Outcome>> {
        let mut answers: BTreeMap<usize, (Inputs, Vec<Answers>)> = BTreeMap::new();
        let mut runs: BTreeMap<(usize, usize), Run> = BTreeMap::new();
        let largest = cases.iter().map(Case::set_bytes).max().unwrap_or(0);
        for round in 0..ROUNDS {
            let shift = (round * SHIFT).min(self.room.saturating_sub(4 * largest));
            self.place(shift - shift % 256)?;
            for (c, case) in cases.iter().enumerate() {
                let ways: Vec<usize> =
                    (0..case.ways.len()).filter(|&w| wanted(&case.ways[w]) && self.runs(&case.ways[w])).collect();
                if ways.is_empty() {
                    continue;
                }
                let (inputs, answers) = answers.entry(c).or_insert_with(|| {
                    let inputs = Inputs::new(&case.args, &case.scalars);
                    let answers = Answers::of(case, &inputs);
                    (inputs, answers)
                });
                let all = self.cuda.arena_mark();
                let args = self.args(case, inputs)?;
                for turn in 0..ways.len() {
                    let w = ways[(turn + round) % ways.len()];
                    let run = runs.entry((c, w)).or_default();
                    if run.refused.is_some() {
                        continue;
                    }
                    let mark = self.cuda.arena_mark();
                    let result = self.round(case, &args, answers, &case.ways[w], run);
                    self.reset(mark)?;
                    result.map_err(|e| named(e, case, &case.ways[w]))?;
                    run.environment = environment(Some(0));
                    done();
                }
                drop(args);
                self.reset(all)?;
            }
        }
        let outcome = |((c, w), run): ((usize, usize), Run)| {
            let (case, Run { seconds, refused, environment, launched }) = (&cases[c], run);
            let checked = answers.get(&c).map_or(0, |(_, answers)| answers.iter().map(Answers::len).sum());
            let times = if refused.is_none() { Times::of(seconds) } else { None };
            let card = &self.cuda.device().name;
            let row = row(case, case.ways[w].name, times, self.ceilings, environment, card, checked);
            Outcome { row: with_launched(row, &launched), refused, launched }
        };
        Ok(runs.into_iter().map(outcome).collect())
    }

    /// One round of one way, on sets that are copies of `args`.
    fn round(&mut self, case: &Case, args: &[Dev], answers: &[Answers], way: &Way, run: &mut Run) -> Result<()> {
        self.cuda.use_kernels(way.kernels.unwrap_or(self.kernels));
        let mut sets = vec![self.copied(args, way)?];
        (way.launch)(self.cuda, &mut sets[0])?;
        if run.launched.is_empty() {
            run.launched = self.cuda.launched(&mut |cuda| (way.launch)(cuda, &mut sets[0]))?;
        }
        run.refused = self.compare(case, answers, &sets[0])?;
        if run.refused.is_some() {
            return Ok(());
        }
        let once = {
            let set = &mut sets[0];
            self.cuda.time_once(&mut |cuda| (0..3).try_for_each(|_| (way.launch)(cuda, set)))? / 3.0
        };
        let launches = ((SAMPLE / once) as usize).clamp(1, LAUNCHES);
        let room = self.left() / (2 * case.set_bytes() + 4096);
        let count = ENOUGH.div_ceil(case.set_bytes()).clamp(2, LAUNCHES).min(launches.max(2)).min(1 + room);
        while sets.len() < count {
            sets.push(self.copied(args, way)?);
        }
        let recorded = self
            .cuda
            .record_timed(&mut |cuda| (0..launches).try_for_each(|i| (way.launch)(cuda, &mut sets[i % count])))?;
        for sample in 0..SAMPLES + 2 {
            self.flush()?;
            let took = self.cuda.replay_timed(&recorded)? / launches as f64;
            if sample >= 2 {
                run.seconds.push(took);
            }
        }
        Ok(())
    }
}

/// An error with the row that it came from.
fn named(error: Error, case: &Case, way: &Way) -> Error {
    match error {
        Error::Cuda { op, detail } => {
            Error::Cuda { op: format!("{op} ({} {} {} {})", case.op, case.model, case.shape, way.name), detail }
        }
        other => other,
    }
}
