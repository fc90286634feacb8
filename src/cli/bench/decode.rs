//! `halfbyte bench decode`: how fast this machine generates.

use std::path::PathBuf;

use clap::Args;
use halfbyte::Result;
use halfbyte::backend::Backend;
use halfbyte::bench::decode::{self, CHUNK};
use halfbyte::model::shapes::{self, Format};
use halfbyte::model::{HostAdapter, ModelConfig};
use serde_json::json;

use super::step::random_adapter;
use super::{append, can_append};
use crate::cli::args::{DeviceArgs, at_least_one, micro_batch, named_shape};
use crate::cli::load::{self, Room, with_backend};
use crate::cli::output::{Out, put};
use crate::cli::progress::{Progress, Unit};

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  halfbyte bench decode --shape mistral-7b
  halfbyte bench decode --shape mistral-7b --past 4096 --tokens 100 --csv decode.csv

One sequence, NF4 weights, LoRA on all seven projections; the logits come to the host after each token.")]
pub struct DecodeArgs {
    /// Model whose shape it is
    #[arg(long, value_name = "NAME", default_value = "mistral-7b", value_parser = clap::builder::PossibleValuesParser::new(shapes::SHAPES))]
    shape: String,

    /// Tokens in the cache before the first
    #[arg(long, value_name = "N", default_value_t = 512)]
    past: usize,

    /// Tokens that are timed
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = at_least_one)]
    tokens: usize,

    /// Rank of the LoRA matrices
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = at_least_one)]
    r: usize,

    /// Append a row to this file
    #[arg(long, value_name = "FILE")]
    csv: Option<PathBuf>,

    /// Print one JSON object
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    device: DeviceArgs,
}

pub fn run(args: &DecodeArgs) -> Result<()> {
    micro_batch("--past", 1, args.past.saturating_add(args.tokens))?;
    can_append(args.csv.as_deref())?;
    let config = named_shape(&args.shape)?;
    let adapter = random_adapter(&config, args.r, 0.0)?;
    let mut picked = args.device.backend()?;
    let (name, seconds) = with_backend!(&mut picked, |b| (b.describe(), measure(b, &config, &adapter, args)?));
    let median = seconds[seconds.len() / 2];
    let row = json!({
        "date": chrono::Local::now().format("%Y-%m-%d").to_string(),
        "card": name,
        "commit": std::env::var("HALFBYTE_COMMIT").unwrap_or_default(),
        "shape": args.shape,
        "past": args.past,
        "tokens": args.tokens,
        "r": args.r,
        "ms": median * 1e3,
        "ms_min": seconds[0] * 1e3,
        "ms_max": seconds[seconds.len() - 1] * 1e3,
        "tokens_per_second": 1.0 / median,
    });
    if let Some(path) = &args.csv {
        append(path, &row)?;
    }
    let mut out = Out::new();
    if args.json {
        out.json(&row)?;
        return out.flush();
    }
    let (least, most) = (seconds[0] * 1e3, seconds[seconds.len() - 1] * 1e3);
    put!(out, "{name}: one token of {} behind {} others, r = {}", args.shape, args.past, args.r)?;
    put!(out, "  {:.2} ms ({least:.2} to {most:.2} of {}), {:.1} tokens/s", median * 1e3, args.tokens, 1.0 / median)?;
    out.flush()
}

fn measure<B: Backend>(
    backend: &mut B,
    config: &ModelConfig,
    adapter: &HostAdapter,
    args: &DecodeArgs,
) -> Result<Vec<f64>> {
    let room = Room::Cache(decode::capacity(args.past, args.tokens));
    load::reserve(backend, config, &Format::of_random, Some(adapter), CHUNK, &room)?;
    let mut bar = Progress::new("decoding", Unit::Count("tokens"));
    let seconds = decode::run(backend, config, Some(adapter), args.past, args.tokens, &mut |done, all| {
        bar.set(done as u64, all as u64);
    })?;
    bar.finish();
    Ok(seconds)
}
