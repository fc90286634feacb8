//! `halfbyte bench decode`: how fast this machine generates.

use clap::Args;
use halfbyte::Result;
use halfbyte::backend::Backend;
use halfbyte::bench::decode::{self, CHUNK};
use halfbyte::bench::environment::environment;
use halfbyte::bench::results::{DecodeRow, figure};
use halfbyte::model::shapes::{self, Format};
use halfbyte::model::{HostAdapter, ModelConfig};

use super::RowArgs;
use super::step::random_adapter;
use crate::cli::args::{DeviceArgs, at_least_one, micro_batch, named_shape};
use crate::cli::load::{self, Room, with_backend};
use crate::cli::output::put;
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

    #[command(flatten)]
    row: RowArgs,

    #[command(flatten)]
    device: DeviceArgs,
}

pub fn run(args: &DecodeArgs) -> Result<()> {
    micro_batch("--past", 1, args.past.saturating_add(args.tokens))?;
    args.row.check::<DecodeRow>()?;
    let config = named_shape(&args.shape)?;
    let adapter = random_adapter(&config, args.r, 0.0)?;
    let mut picked = args.device.backend()?;
    let (name, seconds) = with_backend!(&mut picked, |b| (b.describe(), measure(b, &config, &adapter, args)?));
    let here = environment(picked.gpu());
    let (median, least, most) = (seconds[seconds.len() / 2], seconds[0], seconds[seconds.len() - 1]);
    let row = DecodeRow {
        date: here.date,
        card: name,
        commit: here.commit,
        shape: args.shape.clone(),
        past: args.past,
        tokens: args.tokens,
        r: args.r,
        ms: figure(median * 1e3),
        ms_min: figure(least * 1e3),
        ms_max: figure(most * 1e3),
        tokens_per_second: figure(1.0 / median),
    };
    args.row.put(&row, |out| {
        put!(out, "{}: one token of {} behind {} others, r = {}", row.card, row.shape, row.past, row.r)?;
        let DecodeRow { ms, ms_min, ms_max, tokens, tokens_per_second, .. } = row;
        put!(out, "  {ms:.2} ms ({ms_min:.2} to {ms_max:.2} of {tokens}), {tokens_per_second:.1} tokens/s")
    })
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
