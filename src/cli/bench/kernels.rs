//! `halfbyte bench kernels`: every op, each way it can run, on the GPU or the CPU.

use std::path::{Path, PathBuf};

use clap::Args;
#[cfg(feature = "cuda")]
use halfbyte::backend::cuda::Cuda;
use halfbyte::bench::compare;
use halfbyte::bench::kernels::case::Case;
#[cfg(feature = "cuda")]
use halfbyte::bench::kernels::case::Way;
#[cfg(feature = "cuda")]
use halfbyte::bench::kernels::gpu::Gpu;
use halfbyte::bench::kernels::models::{MODELS, TOKENS};
use halfbyte::bench::kernels::ops::{self, Op};
use halfbyte::bench::kernels::outcome::{Ceilings, Outcome};
use halfbyte::bench::kernels::{Filter, cpu};
use halfbyte::bench::results::{self, KernelRow};
use halfbyte::{Error, Result};
use serde_json::json;

use crate::cli::args::{DeviceArgs, at_least_one};
use crate::cli::load::Picked;
use crate::cli::output::{Out, note, put};
use crate::cli::progress::{Progress, Unit};

#[derive(Args, Clone, Debug)]
#[command(after_help = "Examples:
  halfbyte bench kernels --csv kernels.csv
  halfbyte bench kernels --op rmsnorm_forward --op swiglu_forward --model 7b
  halfbyte bench kernels --op linear_forward --tokens 2048 --implementation fused --implementation slice_cublas
  halfbyte bench kernels --model 7b --compare bench/results/2026-11-28-h100-kernels.csv

Each row: the median of 40 samples in eight rounds that place the buffers elsewhere, between the least and the most; inputs
that no cache holds; checked against the host before it is timed. The floor is what the bytes take at the rate of a
copy, or the products at the best product's, both measured in the same run. On the CPU: the shape of SmolLM2-135M.")]
pub struct KernelsArgs {
    /// Only this op (repeatable)
    #[arg(long = "op", value_name = "NAME")]
    ops: Vec<String>,

    /// Only the shapes of this model: 1b, 7b, 13b, 135m or toy (repeatable)
    #[arg(long = "model", value_name = "NAME")]
    models: Vec<String>,

    /// Only this number of tokens (repeatable)
    #[arg(long = "tokens", value_name = "T", value_parser = at_least_one)]
    tokens: Vec<usize>,

    /// Only shapes whose name contains this (repeatable)
    #[arg(long = "shape", value_name = "PART")]
    shapes: Vec<String>,

    /// Only this implementation: own, sm80, cublas, fused, slice, slice_cublas, matvec (repeatable)
    #[arg(long = "implementation", value_name = "NAME")]
    implementations: Vec<String>,

    /// List the ops, and how many rows each has
    #[arg(long)]
    list: bool,

    /// Append the rows to this file
    #[arg(long, value_name = "FILE")]
    csv: Option<PathBuf>,

    /// Print a JSON array of the rows instead of a table; with --compare, an object of the rows and what moved
    #[arg(long)]
    json: bool,

    /// Print how each row differs from the same row of this earlier CSV, and mark what moved by more than the spread
    #[arg(long, value_name = "OLD.csv")]
    compare: Option<PathBuf>,

    #[command(flatten)]
    device: DeviceArgs,
}

impl KernelsArgs {
    fn filter(&self) -> Filter {
        Filter {
            ops: self.ops.clone(),
            models: self.models.clone(),
            tokens: self.tokens.clone(),
            shapes: self.shapes.clone(),
            implementations: self.implementations.clone(),
        }
    }
}

pub fn run(args: &KernelsArgs) -> Result<()> {
    if args.list {
        return list();
    }
    let filter = args.filter();
    let picked = args.device.backend()?;
    // The models' shapes are too large for a CPU: it has one of its own.
    let groups = filter.cases(matches!(picked, Picked::Cpu(_)))?;
    if let Some(path) = &args.csv {
        results::can_append::<KernelRow>(path)?;
    }
    // As it is now: it may be the file that the rows go to.
    let old = args
        .compare
        .as_deref()
        .map(|path| Ok::<_, Error>((path, results::read_rows::<KernelRow>(path)?)))
        .transpose()?;
    let mut table = Table::new(args);
    match picked {
        #[cfg(feature = "cuda")]
        Picked::Cuda(mut cuda) => on_gpu(&mut cuda, groups, &filter, &mut table)?,
        Picked::Cpu(_) => on_cpu(args.device.threads, groups, &filter, &mut table)?,
    }
    table.finish(old)
}

/// An implementation that is named must be one of those there are.
fn known(filter: &Filter, names: &[String]) -> Result<()> {
    match filter.implementations.iter().find(|name| !names.contains(name)) {
        Some(name) => Err(Error::flag("--implementation", format!("{name:?}"), names.join(", "))),
        None => Ok(()),
    }
}

fn on_cpu(threads: Option<usize>, groups: Vec<(Op, Vec<Case>)>, filter: &Filter, table: &mut Table) -> Result<()> {
    note(format_args!("no GPU is used: the CPU backend races, in f32; rows say nothing of any GPU"));
    let named: Vec<&str> = groups.iter().map(|(op, _)| op.name).collect();
    let what = format!("the race of {}", named.join(", "));
    let has = |(_, cases): &(Op, Vec<Case>)| cases.iter().any(|case| case.cpu.is_some());
    let groups: Vec<_> = groups.into_iter().filter(has).collect();
    if groups.is_empty() {
        return Err(Error::Unavailable { what, why: "the CPU backend has no such op, and no GPU is used".into() });
    }
    let mut race = cpu::Race::new(threads);
    known(filter, &race.names())?;
    table.ceilings(race.ceilings())?;
    for (op, cases) in groups {
        let mut outcomes = vec![];
        let mut bar = Progress::new(op.name, Unit::Count("shapes"));
        for (i, case) in cases.iter().enumerate() {
            outcomes.extend(race.race(case, &|name| filter.takes(name))?);
            bar.set(i as u64 + 1, cases.len() as u64);
        }
        drop(bar);
        table.add(outcomes)?;
    }
    Ok(())
}

#[cfg(feature = "cuda")]
fn on_gpu(cuda: &mut Cuda, groups: Vec<(Op, Vec<Case>)>, filter: &Filter, table: &mut Table) -> Result<()> {
    let mut names: Vec<String> =
        groups.iter().flat_map(|(_, cases)| cases).flat_map(|c| &c.ways).map(|w| w.name.to_string()).collect();
    names.sort();
    names.dedup();
    known(filter, &names)?;
    let mut gpu = Gpu::new(cuda, groups.iter().flat_map(|(_, cases)| cases))?;
    table.ceilings(gpu.ceilings)?;
    for (op, cases) in groups {
        let (cases, large): (Vec<Case>, Vec<Case>) = cases.into_iter().partition(|case| gpu.fits(case));
        for case in large {
            note(format_args!(
                "{} {} {} is left out: it does not fit in the free memory",
                op.name, case.model, case.shape
            ));
        }
        let runs = |gpu: &Gpu, way: &Way| filter.takes(way.name) && gpu.runs(way);
        let all = gpu.rounds() * cases.iter().flat_map(|case| &case.ways).filter(|way| runs(&gpu, way)).count();
        let mut bar = Progress::new(op.name, Unit::Count("rounds"));
        let mut done = 0;
        let outcomes = gpu.race(&cases, &|way| filter.takes(way.name), &mut || {
            done += 1;
            bar.set(done, all as u64);
        })?;
        drop(bar);
        table.add(outcomes)?;
    }
    Ok(())
}

fn list() -> Result<()> {
    let mut out = Out::new();
    for op in ops::all() {
        let shapes: usize = MODELS.iter().map(|m| shapes(&op, m)).sum();
        let raced = if op.starter.is_some() { "a candidate can race" } else { "" };
        put!(out, "{:<26} {shapes:>4} shapes  {raced:<20}  {}", op.name, op.about)?;
    }
    out.flush()
}

fn shapes(op: &Op, model: &halfbyte::bench::kernels::models::Model) -> usize {
    let tokens = if op.has_tokens { &TOKENS[..] } else { &TOKENS[..1] };
    tokens.iter().map(|&t| (op.cases)(model, t).len()).sum()
}

/// Prints rows as they come, and keeps them.
struct Table<'a> {
    out: Out,
    csv: Option<&'a Path>,
    json: bool,
    rows: Vec<KernelRow>,
    refused: Vec<String>,
    op: String,
}

impl<'a> Table<'a> {
    fn new(args: &'a KernelsArgs) -> Self {
        let (csv, json) = (args.csv.as_deref(), args.json);
        Self { out: Out::new(), csv, json, rows: vec![], refused: vec![], op: String::new() }
    }

    fn ceilings(&mut self, ceilings: Ceilings) -> Result<()> {
        if self.json {
            return Ok(());
        }
        let (copy, product) = (ceilings.copy / 1e9, ceilings.product / 1e12);
        put!(self.out, "at best: copy {copy:.0} GB/s (read and write), product {product:.2} TFLOP/s")?;
        self.out.flush()
    }

    /// Rows are kept as they come: an interrupted run loses nothing.
    fn add(&mut self, outcomes: Vec<Outcome>) -> Result<()> {
        let mut rows = vec![];
        for Outcome { row, refused, .. } in outcomes {
            if !self.json && self.op != row.op {
                self.op.clone_from(&row.op);
                put!(self.out, "\n{}", row.op)?;
                put!(
                    self.out,
                    "  {:<5} {:<34} {:<14} {:>11} {:>23} {:>8} {:>8} {:>7}",
                    "model",
                    "shape",
                    "implementation",
                    "median us",
                    "least to most",
                    "GB/s",
                    "TFLOP/s",
                    "% floor"
                )?;
            }
            if let Some(difference) = refused {
                let name = format!("{} {} {} {}", row.op, row.model, row.shape, row.implementation);
                if !self.json {
                    put!(
                        self.out,
                        "  {:<5} {:<34} {:<14} refused: {difference}",
                        row.model,
                        row.shape,
                        row.implementation
                    )?;
                }
                self.refused.push(format!("{name}: {difference}"));
                continue;
            }
            if !self.json {
                put!(
                    self.out,
                    "  {:<5} {:<34} {:<14} {:>11.2} {:>11.2} {:>11.2} {:>8.0} {:>8.1} {:>7.1}",
                    row.model,
                    row.shape,
                    row.implementation,
                    row.median_us,
                    row.least_us,
                    row.most_us,
                    row.gb_per_s,
                    row.tflop_per_s,
                    row.percent_of_floor
                )?;
            }
            rows.push(row);
        }
        self.out.flush()?;
        if let Some(path) = self.csv.filter(|_| !rows.is_empty()) {
            results::append(path, &rows)?;
        }
        self.rows.append(&mut rows);
        Ok(())
    }

    /// Compares with rows of before, if there are, and their file. [`Error::Cuda`] if a row was refused: the kernel is wrong.
    fn finish(mut self, old: Option<(&Path, Vec<KernelRow>)>) -> Result<()> {
        let moved = old.map(|(path, old)| (path, compare::against(path, &old, &self.rows)));
        if self.json {
            let json = match &moved {
                Some((_, moved)) => json!({ "rows": self.rows, "comparison": moved.as_ref().ok() }),
                None => json!(self.rows),
            };
            self.out.json(&json)?;
        } else {
            put!(self.out, "\n{} rows, every one checked against the host", self.rows.len())?;
            if let Some((path, Ok(moved))) = &moved {
                put!(self.out, "\nagainst {}:", path.display())?;
                super::compare::print(&mut self.out, (path, Path::new("this run")), false, moved)?;
            }
        }
        self.out.flush()?;
        match self.refused.first() {
            None => moved.map_or(Ok(()), |(_, moved)| moved.map(drop)),
            Some(first) => Err(Error::Cuda {
                op: "bench kernels".into(),
                detail: format!("{} rows are wrong, the first: {first}", self.refused.len()),
            }),
        }
    }
}
