//! `halfbyte eval`: loss and perplexity of a model, with or without an adapter, on a data file.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use halfbyte::backend::{Backend, Batch, Item};
use halfbyte::checkpoint::{ModelDir, QuantConfig};
use halfbyte::data::{self, DataOptions, Overlong, Row, Tokenizer};
use halfbyte::model::HostAdapter;
use halfbyte::train::eval::EvalResult;
use halfbyte::{Result, memory, train};
use serde_json::json;

use super::args::{DeviceArgs, QuantizeArgs, at_least_one};
use super::load::{self, Room, with_backend};
use super::output::{self, Out, note, put};
use super::progress::{Progress, Unit};

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  halfbyte eval --model SmolLM2-135M-Instruct --data held-out.jsonl
  halfbyte eval --model SmolLM2-135M-Instruct --adapter run1 --load-in-4bit --data held-out.jsonl --json

The loss is the mean over all target tokens of the data, the same number that `train` reports as eval_loss.")]
pub struct EvalArgs {
    /// Model directory, 16-bit or 4-bit, with its tokenizer
    #[arg(long, value_name = "DIR")]
    model: PathBuf,

    /// PEFT adapter or checkpoint directory
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,

    /// JSONL with text, prompt + completion, or messages; repeat for more files
    #[arg(long, value_name = "FILE", required = true)]
    data: Vec<PathBuf>,

    /// Longest row in tokens
    #[arg(long, value_name = "N", default_value_t = 1024)]
    max_length: usize,

    /// What to do with a document longer than --max-length
    #[arg(long, value_name = "HOW", default_value = "error")]
    overlong: OverlongArg,

    /// Loss on the completion of prompt + completion rows only
    #[arg(long, value_name = "BOOL", default_value_t = true, num_args = 0..=1, default_missing_value = "true",
        action = clap::ArgAction::Set)]
    completion_only_loss: bool,

    /// Loss on the assistant's turns of messages rows only
    #[arg(long, value_name = "BOOL", default_value_t = true, num_args = 0..=1, default_missing_value = "true",
        action = clap::ArgAction::Set)]
    assistant_only_loss: bool,

    /// Most rows that run together
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = at_least_one)]
    per_device_eval_batch_size: usize,

    /// Print one JSON object
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    quantize: QuantizeArgs,

    #[command(flatten)]
    device: DeviceArgs,
}

#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
enum OverlongArg {
    Error,
    Drop,
    Truncate,
    Split,
}

impl From<OverlongArg> for Overlong {
    fn from(a: OverlongArg) -> Self {
        match a {
            OverlongArg::Error => Self::Error,
            OverlongArg::Drop => Self::Drop,
            OverlongArg::Truncate => Self::Truncate,
            OverlongArg::Split => Self::Split,
        }
    }
}

pub fn run(args: EvalArgs) -> Result<()> {
    let mut backend = args.device.backend()?;
    let dir = ModelDir::open(&args.model)?;
    let tokenizer = Tokenizer::open(&args.model, dir.config().vocab_size)?;
    let adapter = load::adapter(args.adapter.as_deref(), &dir)?;
    let options = DataOptions {
        files: args.data,
        max_length: args.max_length,
        overlong: args.overlong.into(),
        completion_only_loss: args.completion_only_loss,
        assistant_only_loss: args.assistant_only_loss,
        cache_dir: None,
    };
    let bar = std::cell::RefCell::new(Progress::new("tokenizing", Unit::Bytes));
    let dataset = data::load(&tokenizer, &options, &|done, total| bar.borrow_mut().set(done, total))?;
    bar.into_inner().finish();
    for line in dataset.summary() {
        note(format_args!("{line}"));
    }
    let rows = data::pack(&dataset, args.max_length, false);
    let tokens = train::eval::most_tokens(&rows, args.per_device_eval_batch_size);
    let longest = rows.iter().map(|r| r.batch.tokens.len()).max().unwrap_or(1);
    let capacity = tokens.min(args.max_length.max(longest));
    let quantize = args.quantize.config();
    let size = args.per_device_eval_batch_size;
    let result = with_backend!(&mut backend, |b| evaluate(b, &dir, quantize, adapter.as_ref(), &rows, size, capacity))?;
    // It only stops early when told to.
    let Some(r) = result else { return Ok(()) };
    let mut out = Out::new();
    if args.json {
        let value = json!({ "loss": r.loss, "perplexity": r.perplexity, "tokens": r.tokens, "rows": r.rows });
        out.json(&value)?;
    } else {
        put!(out, "loss        {:.4}", r.loss)?;
        put!(out, "perplexity  {:.4}", r.perplexity)?;
        put!(out, "tokens      {} (targets)", output::grouped(r.tokens))?;
        put!(out, "rows        {}", output::grouped(r.rows))?;
    }
    out.flush()
}

/// Loads the model and runs the rows through it, with bars.
fn evaluate<B: Backend>(
    backend: &mut B,
    dir: &ModelDir,
    quantize: Option<QuantConfig>,
    adapter: Option<&HostAdapter>,
    rows: &[Row],
    batch_size: usize,
    capacity: usize,
) -> Result<Option<EvalResult>> {
    let mut model = load::model(backend, dir, quantize, adapter, capacity, Some(Room::Batch))?;
    backend.label(Item::Batch);
    let mut batch = Batch::new(backend, capacity)?;
    memory::check(backend)?;
    let mut bar = Progress::new("evaluating", Unit::Count("rows"));
    let result = train::evaluate(backend, &mut model, &mut batch, rows, batch_size, &mut |done, total| {
        bar.set(done, total);
        true
    })?;
    bar.finish();
    Ok(result)
}
