//! `halfbyte merge`: an adapter goes into a bf16 directory; a probe says how far the result is from base + adapter.

use std::path::{Path, PathBuf};

use clap::Args;
use halfbyte::Result;
use halfbyte::backend::{Backend, Batch, HostBatch, IGNORE};
use halfbyte::checkpoint::merge::{self, MergeBase};
use halfbyte::checkpoint::{ModelDir, peft};
use halfbyte::data::Tokenizer;
use halfbyte::model::HostAdapter;
use serde_json::json;

use super::args::{DeviceArgs, OutArgs};
use super::load::{self, with_backend};
use super::output::{self, Out, put};
use super::progress::{Progress, Unit};

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  halfbyte merge --model SmolLM2-135M-Instruct --adapter run1 --out merged
  halfbyte merge --model mistral-7b-4bit --base-16bit mistral-7b --adapter run1 --out merged

The base is the original 16-bit weights where --model or --base-16bit has them, else the 4-bit weights, dequantised.
The output says which. The probe runs a short text through --model with the adapter and through the merged model, and
compares the logits.")]
pub struct MergeArgs {
    /// Model directory, 16-bit or 4-bit
    #[arg(long, value_name = "DIR")]
    model: PathBuf,

    /// PEFT adapter or checkpoint directory
    #[arg(long, value_name = "DIR")]
    adapter: PathBuf,

    /// The original 16-bit weights of a 4-bit --model: the merge starts from them
    #[arg(long = "base-16bit", value_name = "DIR")]
    base_16bit: Option<PathBuf>,

    #[command(flatten)]
    out: OutArgs,

    /// Do not compare the merged model with base + adapter
    #[arg(long)]
    no_probe: bool,

    /// Print one JSON object
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    device: DeviceArgs,
}

/// Text of the probe, where the model has a tokenizer.
const PROBE: &str =
    "The quick brown fox jumps over the lazy dog. In 1815, M. Charles-François-Bienvenu Myriel was Bishop of D——.";

pub fn run(args: MergeArgs) -> Result<()> {
    let base_16bit = args.base_16bit.as_deref();
    let inputs = [Some(args.model.as_path()), Some(args.adapter.as_path()), base_16bit];
    args.out.check(&inputs.into_iter().flatten().collect::<Vec<_>>())?;
    let mut backend = args.device.backend()?;
    let base = ModelDir::open(&args.model)?;
    let original = base_16bit.map(ModelDir::open).transpose()?;
    let adapter = peft::load(&args.adapter, base.config())?;
    let mut bar = Progress::new(format!("merging into {}", args.out.out.display()), Unit::Bytes);
    let report = args
        .out
        .write(|out| merge::merge(&base, original.as_ref(), &adapter, out, &mut |done, total| bar.set(done, total)))?;
    bar.finish();
    let probe = match args.no_probe {
        true => None,
        false => Some(with_backend!(&mut backend, |b| probe(b, &base, &adapter, &args.out.out))?),
    };
    let mut out = Out::new();
    if args.json {
        out.json(&json!({
            "out": args.out.out.to_string_lossy(),
            "base": match report.base {
                MergeBase::Dense | MergeBase::Original => "16-bit",
                MergeBase::Dequantized => "4-bit",
            },
            "base_path": original.as_ref().unwrap_or(&base).path().to_string_lossy(),
            "tensors": report.tensors,
            "merged": report.merged,
            "bytes": report.bytes,
            "shards": report.shards,
            "probe": probe.map(|p| json!({
                "tokens": p.tokens,
                "max_difference": p.max,
                "mean_difference": p.mean,
                "max_logit": p.scale,
                "same_next_token": p.same_argmax,
            })),
        }))?;
        return out.flush();
    }
    let used = original.as_ref().unwrap_or(&base).path().display().to_string();
    put!(out, "{}: bf16, {}", args.out.out.display(), output::bytes(report.bytes))?;
    put!(out, "  base    {}: {used}", report.base)?;
    put!(out, "  merged  {} of {} tensors", report.merged, report.tensors)?;
    if let Some(p) = probe {
        put!(
            out,
            "  probe   logits against base + adapter on {} tokens: max difference {:.2e}, mean {:.2e} (largest logit {:.1})",
            p.tokens,
            p.max,
            p.mean,
            p.scale
        )?;
        put!(out, "          same next token at {} of {} positions", p.same_argmax, p.tokens)?;
    }
    out.flush()
}

/// How far the merged model's logits are from those of base + adapter.
#[derive(Clone, Copy)]
struct Probe {
    tokens: usize,
    max: f64,
    mean: f64,
    /// Largest absolute logit, to judge the differences by.
    scale: f64,
    /// Positions where both pick the same next token.
    same_argmax: usize,
}

fn probe<B: Backend>(backend: &mut B, base: &ModelDir, adapter: &HostAdapter, merged: &Path) -> Result<Probe> {
    let tokens = probe_tokens(base);
    let t = tokens.len();
    let batch = HostBatch { targets: vec![IGNORE; t], cu_seqlens: vec![0, t as i32], tokens };
    let mut logits = |dir: &ModelDir, adapter: Option<&HostAdapter>| {
        let mut model = load::model(backend, dir, None, adapter, t, None)?;
        let mut device = Batch::new(backend, t)?;
        device.fill(backend, &batch, 1.0)?;
        model.logits(backend, &device, &(0..t).collect::<Vec<_>>())
    };
    let with_adapter = logits(base, Some(adapter))?;
    let merged = logits(&ModelDir::open(merged)?, None)?;
    Ok(compare(&with_adapter, &merged, t))
}

fn probe_tokens(base: &ModelDir) -> Vec<i32> {
    let vocab = base.config().vocab_size;
    let text = Tokenizer::open(base.path(), vocab).and_then(|t| t.encode(PROBE, true));
    match text {
        Ok(ids) if !ids.is_empty() => ids.into_iter().map(|id| id as i32).collect(),
        // A directory without a tokenizer can still be merged: ids spread over the vocabulary serve as well.
        _ => (1..33u64).map(|i| (i * 7919 % vocab as u64) as i32).collect(),
    }
}

fn compare(a: &[f32], b: &[f32], rows: usize) -> Probe {
    // f64::max passes over NaN, which must not look like no difference.
    let diff = |(x, y): (&f32, &f32)| match (f64::from(*x) - f64::from(*y)).abs() {
        d if d.is_nan() => f64::INFINITY,
        d => d,
    };
    let width = a.len() / rows.max(1);
    let argmax = |row: &[f32]| (0..row.len()).max_by(|&i, &j| row[i].total_cmp(&row[j]));
    let pairs = a.chunks(width.max(1)).zip(b.chunks(width.max(1)));
    Probe {
        tokens: rows,
        max: a.iter().zip(b).map(diff).fold(0.0, f64::max),
        mean: a.iter().zip(b).map(diff).sum::<f64>() / a.len().max(1) as f64,
        scale: a.iter().map(|x| f64::from(x.abs())).fold(0.0, f64::max),
        same_argmax: pairs.filter(|(x, y)| argmax(x) == argmax(y)).count(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_are_of_all_logits_and_a_nan_is_the_largest() {
        let p = compare(&[1.0, 2.0, -4.0, 0.0], &[1.0, 2.5, -4.0, 1.0], 2);
        assert_eq!((p.max, p.mean, p.scale, p.same_argmax), (1.0, 0.375, 4.0, 2));
        assert_eq!(compare(&[1.0, 2.0], &[2.0, 1.0], 1).same_argmax, 0);
        assert_eq!(compare(&[1.0, 2.0], &[f32::NAN, 2.0], 1).max, f64::INFINITY);
    }
}
