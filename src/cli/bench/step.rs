//! `halfbyte bench step`: how fast this machine trains.

use clap::Args;
use halfbyte::backend::Backend;
use halfbyte::bench::environment::{Environment, environment};
use halfbyte::bench::kernels::outcome::Ceilings;
use halfbyte::bench::results::{StepOpRow, StepRow, figure};
use halfbyte::bench::step::{self, Report, Spec};
use halfbyte::memory::{self, Card, Mode, Plan, Request};
use halfbyte::model::shapes::{self, Format};
use halfbyte::model::{HostAdapter, Keep, LayerPlan, LoraConfig, ModelConfig, ModelOptions, TargetModules};
use halfbyte::train::TrainConfig;
use halfbyte::{Error, Result};
use serde::Serialize;

use super::RowArgs;
use super::step_ops::{self, OpsArgs};
use crate::cli::args::{DeviceArgs, at_least_one, micro_batch, named_shape};
use crate::cli::load::{Picked, with_backend};
use crate::cli::output::{Out, put};
use crate::cli::progress::{Progress, Unit};

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  halfbyte bench step --shape mistral-7b --batch 4 --length 2048
  halfbyte bench step --shape mistral-7b --length 8192 --memory 24GiB --csv steps.csv
  halfbyte bench step --shape mistral-7b --batch 4 --length 2048 --ops --ops-csv ops.csv
  halfbyte bench step --shape smollm2-135m --length 512 --device cpu

A step is one micro-batch forward and backward, the gradient norm and the update; LoRA on all seven projections. The
bound is the time of the matrix products alone at the rate of the best of five large ones in this run.")]
pub struct StepArgs {
    /// Model whose shape it is
    #[arg(long, value_name = "NAME", default_value = "mistral-7b", value_parser = clap::builder::PossibleValuesParser::new(shapes::SHAPES))]
    shape: String,

    /// Sequences of a step
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = at_least_one)]
    batch: usize,

    /// Tokens of a sequence
    #[arg(long, value_name = "N", default_value_t = 2048, value_parser = at_least_one)]
    length: usize,

    /// Device memory that the run may take, optimizer included, e.g. 24GiB [default: what the card has free]
    #[arg(long, value_name = "SIZE")]
    memory: Option<String>,

    /// true: keep only each layer's input; false: keep everything [default: the fastest that fits]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    gradient_checkpointing: Option<bool>,

    /// Rank of the LoRA matrices
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = at_least_one)]
    r: usize,

    /// LoRA dropout
    #[arg(long, value_name = "P", default_value_t = 0.0)]
    lora_dropout: f32,

    /// Optimizer, as in the run file
    #[arg(long, value_name = "NAME", default_value = "paged_adamw_32bit")]
    optim: String,

    /// Steps that are timed
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = at_least_one)]
    steps: usize,

    /// Steps before them
    #[arg(long, value_name = "N", default_value_t = 4)]
    warm_up: usize,

    /// Have an attached profiler see the timed steps alone, see docs/profiling.md; needs a GPU
    #[arg(long)]
    profile_range: bool,

    #[command(flatten)]
    ops: OpsArgs,

    #[command(flatten)]
    row: RowArgs,

    #[command(flatten)]
    device: DeviceArgs,
}

/// What is known of the device beside its backend.
struct Machine {
    name: String,
    card: Option<Card>,
    /// FLOP/s that the largest product reaches; None on the CPU.
    rate: Option<f64>,
    /// What ops are measured by; None on the CPU, and where they are not timed.
    ceilings: Option<Ceilings>,
}

pub fn run(args: &StepArgs) -> Result<()> {
    if !(0.0..1.0).contains(&args.lora_dropout) {
        return Err(Error::flag("--lora-dropout", args.lora_dropout.to_string(), "a number from 0 to below 1"));
    }
    micro_batch("--length", args.batch, args.length)?;
    args.row.check::<StepRow>()?;
    args.ops.check()?;
    let config = named_shape(&args.shape)?;
    let mut picked = args.device.backend()?;
    if args.profile_range && picked.gpu().is_none() {
        return Err(Error::flag("--profile-range", "the CPU", "a GPU: it is for nsys and ncu"));
    }
    let free = with_backend!(&mut picked, |b| b.free_memory())?;
    let machine = machine(&mut picked, args)?;
    let (plan, report) = with_backend!(&mut picked, |b| measure(b, &config, args, &machine, free))?;
    let row = row(args, &config, &machine, plan.as_ref(), &report, environment(picked.gpu()));
    let ops = report.ops.as_ref().map(|ops| step_ops::rows(&row, ops, machine.ceilings));
    if let Some(ops) = &ops {
        args.ops.append(ops)?;
    }
    let json = Shown { step: &row, ops: ops.as_deref() };
    args.row.put_as(&row, &json, |out| {
        print(out, args, &row, plan.as_ref(), &report)?;
        ops.as_deref().map_or(Ok(()), |ops| step_ops::print(out, ops, machine.ceilings))
    })
}

/// The JSON object.
#[derive(Serialize)]
struct Shown<'a> {
    #[serde(flatten)]
    step: &'a StepRow,
    #[serde(skip_serializing_if = "Option::is_none")]
    ops: Option<&'a [StepOpRow]>,
}

fn print(out: &mut Out, args: &StepArgs, row: &StepRow, plan: Option<&Plan>, report: &Report) -> Result<()> {
    put!(
        out,
        "{}: {} × {} tokens of {}, r = {}, {}",
        row.card,
        args.batch,
        args.length,
        args.shape,
        args.r,
        args.optim
    )?;
    put!(out, "  step        {:.1} ms ({:.1} to {:.1} of {} steps)", row.ms, row.ms_min, row.ms_max, args.steps)?;
    put!(out, "  speed       {:.0} tokens/s", row.tokens_per_second)?;
    if let (Some(percent), Some(bound), Some(rate)) =
        (row.percent_of_bound, row.bound_tokens_per_second, row.tflops_ceiling)
    {
        put!(out, "  bound       {percent:.1} % of {bound:.0} tokens/s (products alone at {rate:.0} TFLOP/s)")?;
    }
    if let Some(plan) = plan {
        put!(
            out,
            "  memory      {} in the arena, {} optimizer, {} on the host",
            memory::size(plan.device_bytes),
            memory::size(plan.optimizer_bytes),
            memory::size(plan.host_bytes)
        )?;
        put!(
            out,
            "              {} with kernels and libraries as planned, {} as the driver counts",
            memory::size(plan.driver_bytes()),
            report.driver_bytes.map_or("nothing".into(), memory::size)
        )?;
        put!(out, "  layers      {}", row.layers)?;
    }
    put!(
        out,
        "  loss {:.4}, gradient norm {:.4}; weights and buffers in {:.1} s",
        report.loss,
        report.grad_norm,
        report.load_seconds
    )
}

#[cfg_attr(not(feature = "cuda"), expect(unused, clippy::unnecessary_wraps, reason = "for a GPU"))]
fn machine(picked: &mut Picked, args: &StepArgs) -> Result<Machine> {
    match picked {
        Picked::Cpu(cpu) => Ok(Machine { name: cpu.describe(), card: None, rate: None, ceilings: None }),
        #[cfg(feature = "cuda")]
        Picked::Cuda(cuda) => {
            let device = cuda.device();
            let (name, card) = (device.name.clone(), *Card::of_device(&device.name, device.memory));
            let rate = cuda.product_rate()?;
            let ceilings = match args.ops.ops {
                true => Some(Ceilings { copy: cuda.copy_rate()?, product: rate }),
                false => None,
            };
            Ok(Machine { name, card: Some(card), rate: Some(rate), ceilings })
        }
    }
}

fn measure<B: Backend>(
    backend: &mut B,
    config: &ModelConfig,
    args: &StepArgs,
    machine: &Machine,
    free: Option<usize>,
) -> Result<(Option<Plan>, Report)> {
    let optim = TrainConfig { optim: args.optim.clone(), ..TrainConfig::default() }.optim_kind()?;
    let adapter = random_adapter(config, args.r, args.lora_dropout)?;
    let tokens = args.batch * args.length;
    let plan = match machine.card {
        None => None,
        Some(card) => {
            let format = |name: &str| Format::of_random(name);
            let device = match free {
                Some(free) => memory::budget("--memory", args.memory.as_deref(), free, &card)?,
                None => memory::default_budget(None, &card),
            };
            Some(memory::plan(&Request {
                config,
                format: &format,
                adapter: &adapter,
                optim,
                tokens,
                sequences: args.batch,
                card,
                device,
                // What can be pinned without starving the rest of the machine.
                host: memory::host_memory() / 2,
                mode: Mode::of(args.gradient_checkpointing),
            })?)
        }
    };
    let layers = match &plan {
        Some(plan) => {
            backend.prefer_optimizer_on_host(!plan.optimizer_on_device);
            backend.reserve(plan.device_bytes)?;
            plan.layers.clone()
        }
        None => {
            let keep = if args.gradient_checkpointing == Some(true) { Keep::Input } else { Keep::All };
            vec![LayerPlan { keep, host: false }; config.num_hidden_layers]
        }
    };
    let spec = Spec {
        config,
        adapter: &adapter,
        batch: args.batch,
        length: args.length,
        options: ModelOptions { max_tokens: tokens, train: true, layers },
        optim,
        dropout: args.lora_dropout,
        steps: args.steps,
        warm_up: args.warm_up,
        ops: args.ops.ops,
        profiler: args.profile_range,
    };
    let mut bar = Progress::new(format!("{} × {}", args.batch, args.length), Unit::Count("steps"));
    let report = step::run(backend, &spec, free, &mut |done, all| bar.set(done as u64, all as u64))?;
    bar.finish();
    Ok((plan, report))
}

/// LoRA on all seven projections; B is not zero, as it is not in training but for the first step.
pub(super) fn random_adapter(config: &ModelConfig, r: usize, lora_dropout: f32) -> Result<HostAdapter> {
    let lora = LoraConfig {
        r,
        lora_alpha: 2.0 * r as f64,
        lora_dropout,
        target_modules: TargetModules::Pattern("all-linear".into()),
        rank_pattern: vec![],
        alpha_pattern: vec![],
        use_rslora: false,
    };
    let mut adapter = HostAdapter::init(lora, config, 1)?;
    for site in &adapter.layout.sites.clone() {
        let a = adapter.weights[site.a_range()].to_vec();
        adapter.weights[site.b_range()].iter_mut().zip(a.iter().cycle()).for_each(|(b, a)| *b = 0.1 * a);
    }
    Ok(adapter)
}

/// The row of the CSV and the JSON object.
fn row(
    args: &StepArgs,
    config: &ModelConfig,
    machine: &Machine,
    plan: Option<&Plan>,
    report: &Report,
    here: Environment,
) -> StepRow {
    let tokens = (args.batch * args.length) as f64;
    let median = report.median();
    let recompute = args.gradient_checkpointing == Some(true);
    let flops = step::flops(config, report.trainable, args.batch, args.length, recompute);
    let bound = machine.rate.map(|rate| tokens / (flops / rate));
    let times = &report.seconds;
    StepRow {
        date: here.date,
        tool: "halfbyte".into(),
        commit: here.commit,
        card: machine.name.clone(),
        driver: here.driver,
        sm_mhz: here.sm_mhz,
        memory_mhz: here.memory_mhz,
        shape: args.shape.clone(),
        batch: args.batch,
        length: args.length,
        gradient_checkpointing: args.gradient_checkpointing.map_or("auto".into(), |b| b.to_string()),
        memory: args.memory.clone().unwrap_or_default(),
        r: args.r,
        lora_dropout: figure(args.lora_dropout.into()),
        optim: args.optim.clone(),
        steps: args.steps,
        ms: figure(median * 1e3),
        ms_min: figure(times[0] * 1e3),
        ms_max: figure(times[times.len() - 1] * 1e3),
        tokens_per_second: figure(tokens / median),
        tflops_ceiling: machine.rate.map(|rate| figure(rate / 1e12)),
        bound_tokens_per_second: bound.map(figure),
        percent_of_bound: bound.map(|bound| figure(100.0 * tokens / median / bound)),
        arena_bytes: plan.map(|p| p.device_bytes as u64),
        optimizer_bytes: plan.map(|p| p.optimizer_bytes as u64),
        host_bytes: plan.map(|p| p.host_bytes as u64),
        planned_bytes: plan.map(|p| p.driver_bytes() as u64),
        driver_bytes: report.driver_bytes.map(|b| b as u64),
        planned_ms: plan.map(|p| figure(p.step.seconds * 1e3)),
        layers: plan.map(|p| memory::describe_layers(&p.layers)).unwrap_or_default(),
        loss: figure(report.loss.into()),
        load_seconds: figure(report.load_seconds),
    }
}
