//! `halfbyte plan`: what a training run would take, byte by byte, and how long a step would be. Needs no GPU.

use std::path::PathBuf;

use clap::Args;
use halfbyte::backend::Item;
use halfbyte::checkpoint::ModelDir;
use halfbyte::memory::{self, CARDS, Card, Mode, Plan, Request};
use halfbyte::model::shapes::Format;
use halfbyte::model::{AdapterLayout, HostAdapter, LoraConfig, ModelConfig, TargetModules};
use halfbyte::train::config::TrainConfig;
use halfbyte::{Error, Result};
use serde_json::{Value, json};

use super::args::{BnbArgs, at_least_one, micro_batch, named_shape};
use super::output::{self, Out, put};

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  halfbyte plan --shape mistral-7b --gpu rtx4090 --max-length 2048
  halfbyte plan --model Mistral-7B-v0.3 --gpu rtx3090 --memory 20GiB --max-length 8192 --batch 2
  halfbyte plan --shape llama-3-8b --gpu h100 --max-length 32768 --json

The bytes are those that `train` will take, to the byte; what it would refuse is refused here in the same words.
The time is predicted from the card's data sheet: good for comparing, within some ten per cent of the truth.")]
pub struct PlanArgs {
    /// Model directory, 16-bit or 4-bit; only names and shapes are looked at
    #[arg(long, value_name = "DIR", required_unless_present = "shape", conflicts_with = "shape")]
    model: Option<PathBuf>,

    /// A well-known model without its files: mistral-7b, llama-3-8b, qwen2.5-7b, smollm2-135m, ...
    #[arg(long, value_name = "NAME")]
    shape: Option<String>,

    /// The card: rtx3090, rtx4090, rtx5090, l40s, a100-40gb, a100-80gb, h100 or h200 [default: the one in this machine]
    #[arg(long, value_name = "NAME")]
    gpu: Option<String>,

    /// Device memory that the run may take, such as 24GiB [default: the card's, less 768 MiB]
    #[arg(long, value_name = "SIZE")]
    memory: Option<String>,

    /// Pinned host memory that activations may take
    #[arg(long, value_name = "SIZE", default_value = "64GiB")]
    host_memory: String,

    /// Tokens of a row
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = at_least_one)]
    max_length: usize,

    /// Rows of a micro-batch
    #[arg(long, value_name = "N", default_value_t = 1, alias = "per-device-train-batch-size",
        alias = "per_device_train_batch_size", value_parser = at_least_one)]
    batch: usize,

    /// Rank of the LoRA matrices
    #[arg(long, value_name = "N", default_value_t = 16, alias = "lora-r", alias = "lora_r")]
    r: usize,

    /// Modules to adapt: names, one regular expression, or all-linear
    #[arg(long, value_name = "A,B", default_value = "all-linear")]
    target_modules: String,

    /// Dropout on the input of A
    #[arg(long, value_name = "P", default_value_t = 0.05)]
    lora_dropout: f32,

    /// paged_adamw_32bit or paged_adamw_8bit
    #[arg(long, value_name = "NAME", default_value = "paged_adamw_32bit")]
    optim: String,

    /// true: every layer recomputed; false: none [default: the fastest that fits]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    gradient_checkpointing: Option<bool>,

    /// Bring a 16-bit model's projections into 4 bits
    #[arg(long, value_name = "BOOL", default_value_t = true, num_args = 0..=1, default_missing_value = "true",
        action = clap::ArgAction::Set)]
    load_in_4bit: bool,

    #[command(flatten)]
    bnb: BnbArgs,

    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub fn run(args: PlanArgs) -> Result<()> {
    let quantize = args.load_in_4bit.then(|| args.bnb.config());
    let dir = args.model.as_deref().map(ModelDir::open).transpose()?;
    let (name, config) = match (&dir, &args.shape) {
        (Some(dir), _) => (dir.path().display().to_string(), dir.config().clone()),
        (None, Some(name)) => (name.clone(), named_shape(name)?),
        (None, None) => return Err(Error::flag("--model", "nothing", "a model directory, or --shape")),
    };
    let format = |name: &str| match &dir {
        Some(dir) => dir.format(name, quantize),
        None => Format::of(name, quantize),
    };
    let (card, budget) = card(&args)?;
    let tokens = micro_batch("--max-length", args.batch, args.max_length)?;
    let adapter = adapter(&args, &config)?;
    let request = Request {
        config: &config,
        format: &format,
        adapter: &adapter,
        optim: TrainConfig { optim: args.optim.clone(), ..TrainConfig::default() }.optim_kind()?,
        tokens,
        sequences: args.batch,
        card,
        device: budget,
        host: memory::parse_size("--host-memory", &args.host_memory)?,
        mode: Mode::of(args.gradient_checkpointing),
    };
    let plan = memory::plan(&request)?;
    let length = memory::largest_length(&request, 1)?;
    let batch = memory::largest_batch(&request, args.max_length)?;
    let mut out = Out::new();
    if args.json {
        out.json(&as_json(&args, &name, &card, &plan, length, batch))?;
        return out.flush();
    }
    put!(
        out,
        "{name} on {}: {} × {} tokens, r = {}, {} trainable weights, {}",
        card.name,
        args.batch,
        args.max_length,
        args.r,
        output::grouped(adapter.layout.len as u64),
        args.optim
    )?;
    put!(out)?;
    for line in table(&plan) {
        put!(out, "{line}")?;
    }
    put!(out)?;
    put!(out, "{}", memory::describe_layers(&plan.layers))?;
    let step = &plan.step;
    put!(
        out,
        "step: {:.1} ms predicted, {} tokens/s, {:.0} TFLOP/s; {:.1} ms of it waiting for copies",
        1e3 * step.seconds,
        output::grouped(plan.tokens_per_second() as u64),
        step.flops / step.seconds / 1e12,
        1e3 * step.stalled
    )?;
    let rows = |n: usize| if n == 1 { "row" } else { "rows" };
    match length {
        Some(n) => put!(out, "longest row at batch 1: {} tokens{}", output::grouped(n as u64), beyond(n, &config))?,
        None => put!(out, "longest row at batch 1: none fits")?,
    }
    match batch {
        Some(n) => put!(out, "largest batch of this length: {n} {}", rows(n))?,
        None => put!(out, "largest batch of this length: none fits")?,
    }
    out.flush()
}

/// The card of `--gpu`, or the one in this machine, and the budget.
fn card(args: &PlanArgs) -> Result<(Card, usize)> {
    let (card, free) = match &args.gpu {
        Some(name) => {
            let names: Vec<&str> = CARDS.iter().map(|c| c.name).collect();
            let wrong = || Error::flag("--gpu", format!("{name:?}"), format!("one of {}", names.join(", ")));
            (*Card::named(name).ok_or_else(wrong)?, None)
        }
        None => {
            let (card, memory) = present().ok_or_else(|| {
                let names: Vec<&str> = CARDS.iter().map(|c| c.name).collect();
                Error::flag("--gpu", "nothing, on a machine without a GPU", format!("one of {}", names.join(", ")))
            })?;
            (card, Some(memory.saturating_sub(memory::CONTEXT)))
        }
    };
    match &args.memory {
        Some(text) => Ok((card, memory::parse_size("--memory", text)?)),
        None => Ok((card, memory::default_budget(free, &card))),
    }
}

/// The first GPU of this machine, as the nearest card that is known, and the bytes of its memory.
#[cfg(feature = "cuda")]
fn present() -> Option<(Card, usize)> {
    let driver = halfbyte::backend::cuda::device::Driver::discover().ok()?;
    let device = driver.devices.into_iter().find(|d| d.unsupported.is_none())?;
    Some((*Card::of_device(&device.name, device.memory), device.memory))
}

#[cfg(not(feature = "cuda"))]
fn present() -> Option<(Card, usize)> {
    None
}

/// The adapter's settings and layout, without weights.
fn adapter(args: &PlanArgs, model: &ModelConfig) -> Result<HostAdapter> {
    let target_modules = match args.target_modules.contains(',') {
        true => TargetModules::List(args.target_modules.split(',').map(|s| s.trim().to_string()).collect()),
        false => TargetModules::Pattern(match args.target_modules.as_str() {
            "all-linear" => "all-linear".into(),
            name if name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_') => format!(r".*\.{name}"),
            pattern => pattern.into(),
        }),
    };
    if !(0.0..1.0).contains(&args.lora_dropout) {
        return Err(Error::flag("--lora-dropout", args.lora_dropout.to_string(), "a number from 0 to below 1"));
    }
    let config = LoraConfig {
        r: args.r,
        lora_alpha: 2.0 * args.r as f64,
        lora_dropout: args.lora_dropout,
        target_modules,
        rank_pattern: vec![],
        alpha_pattern: vec![],
        use_rslora: false,
    };
    let layout = AdapterLayout::new(&config, model)?;
    Ok(HostAdapter { config, layout, weights: vec![] })
}

/// A note where a row is longer than the model has positions for.
fn beyond(length: usize, config: &ModelConfig) -> String {
    match config.max_position_embeddings {
        n if n < length => format!(" (the model has {} positions)", output::grouped(n as u64)),
        _ => String::new(),
    }
}

/// Rows of the table in the order of a run's life.
const ITEMS: [Item; 9] = [
    Item::Embedding,
    Item::Weights,
    Item::Adapter,
    Item::Gradients,
    Item::Activations,
    Item::Scratch,
    Item::Workspace,
    Item::Batch,
    Item::Optimizer,
];

fn table(plan: &Plan) -> Vec<String> {
    let size = |bytes: usize| output::bytes(bytes as u64);
    let optional = |bytes: usize| if bytes == 0 { String::new() } else { size(bytes) };
    let mut rows = vec![vec![String::new(), "device".into(), "host".into()]];
    for item in ITEMS {
        let host = if item == Item::Activations { plan.host_bytes } else { 0 };
        rows.push(vec![memory::item_name(item).into(), size(plan.item(item)), optional(host)]);
    }
    let (device, host) = if plan.optimizer_on_device { (plan.optimizer_bytes, 0) } else { (0, plan.optimizer_bytes) };
    rows.push(vec!["AdamW's state (managed)".into(), optional(device), optional(host)]);
    rows.push(vec!["total".into(), size(plan.total()), optional(plan.host_bytes + host)]);
    rows.push(vec!["budget".into(), size(plan.budget)]);
    rows.push(vec!["head room".into(), size(plan.head_room())]);
    output::table(&rows, &[1, 2])
}

fn as_json(
    args: &PlanArgs,
    name: &str,
    card: &Card,
    plan: &Plan,
    length: Option<usize>,
    batch: Option<usize>,
) -> Value {
    let key = |item: Item| memory::item_name(item).replace([' ', '-'], "_");
    let items: serde_json::Map<String, Value> =
        ITEMS.iter().map(|&item| (key(item), Value::from(plan.item(item)))).collect();
    json!({
        "model": name,
        "gpu": card.name,
        "max_length": args.max_length,
        "batch": args.batch,
        "r": args.r,
        "optim": args.optim,
        "device_bytes": items,
        "arena_bytes": plan.device_bytes,
        "optimizer_bytes": plan.optimizer_bytes,
        "optimizer_on_device": plan.optimizer_on_device,
        "host_bytes": plan.host_bytes,
        "total_bytes": plan.total(),
        "budget_bytes": plan.budget,
        "head_room_bytes": plan.head_room(),
        "layers": plan.layers,
        "step_seconds": plan.step.seconds,
        "stalled_seconds": plan.step.stalled,
        "tokens_per_second": plan.tokens_per_second(),
        "flops": plan.step.flops,
        "longest_row": length,
        "largest_batch": batch,
    })
}
