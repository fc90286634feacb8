//! `halfbyte quantize`: a Hugging Face directory in, the 4-bit directory that transformers loads out.

use std::path::PathBuf;

use clap::Args;
use halfbyte::checkpoint::{ModelDir, quantized};
use halfbyte::{Error, Result};

use super::args::{BnbArgs, OutArgs};
use super::output::{self, Out, put};
use super::progress::{Progress, Unit};

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  halfbyte quantize --model SmolLM2-135M-Instruct --out SmolLM2-135M-Instruct-4bit
  halfbyte quantize --model mistral-7b --out mistral-7b-fp4 --bnb-4bit-quant-type fp4
  halfbyte quantize --model mistral-7b --out mixed --skip-modules lm_head,model.layers.0

transformers loads the directory with bitsandbytes installed; --model takes it in every command.")]
pub struct QuantizeArgs {
    /// Model directory with 16 or 32-bit weights
    #[arg(long, value_name = "DIR")]
    model: PathBuf,

    #[command(flatten)]
    out: OutArgs,

    #[command(flatten)]
    bnb: BnbArgs,

    /// Modules to leave as they are (llm_int8_skip_modules); embedding, norms and lm_head always are
    #[arg(long, value_name = "A,B", value_delimiter = ',', alias = "llm-int8-skip-modules")]
    skip_modules: Vec<String>,
}

pub fn run(args: QuantizeArgs) -> Result<()> {
    args.out.check(&[&args.model])?;
    let dir = ModelDir::open(&args.model)?;
    if dir.is_quantized() {
        let expected = "a model directory with 16 or 32-bit weights";
        return Err(Error::input(dir.path(), "model", "a directory in 4 bits already", expected));
    }
    let mut bar = Progress::new(format!("quantizing {}", dir.path().display()), Unit::Bytes);
    let config = args.bnb.config();
    let s = args.out.write(|out| {
        quantized::write(&dir, out, config, &args.skip_modules, &mut |done, total| bar.set(done, total))
    })?;
    bar.finish();
    let mut out = Out::new();
    let with = if config.double_quant { "with" } else { "without" };
    put!(out, "{}: {}, {with} double quantisation", args.out.out.display(), config.quant_type.name())?;
    let bits = s.quantized_bytes as f64 * 8.0 / s.quantized_elements.max(1) as f64;
    put!(
        out,
        "  in 4 bits      {} modules, {} weights, {}, {bits:.3} bits a weight",
        s.quantized,
        output::grouped(s.quantized_elements),
        output::bytes(s.quantized_bytes)
    )?;
    put!(out, "  left as it is  {} weights, {}", output::grouped(s.dense_elements), output::bytes(s.dense_bytes))?;
    if !s.skipped.is_empty() {
        put!(out, "  skipped        {}", s.skipped.join(", "))?;
    }
    let all = s.quantized_bytes + s.dense_bytes;
    let share = all as f64 * 100.0 / s.source_bytes.max(1) as f64;
    put!(
        out,
        "  weights        {} of {} ({share:.0} %), {} file{}",
        output::bytes(all),
        output::bytes(s.source_bytes),
        s.shards,
        if s.shards == 1 { "" } else { "s" }
    )?;
    out.flush()
}
