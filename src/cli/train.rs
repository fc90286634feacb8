//! `halfbyte train`: a run file, flags over it, and the loop of `halfbyte::train`.

use std::io::{self, IsTerminal};
use std::path::PathBuf;

use clap::Args;
use halfbyte::train::ui::{PlainUi, Ui};
use halfbyte::train::{self, interrupt};
use halfbyte::{Error, Result};

use super::args::Device;
use super::load::{self, with_backend};
use super::output::{self, Out, put};
use super::run_file::{KeyFlags, Settings};
use super::term_ui::TermUi;

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  halfbyte train run.toml
  halfbyte train run.toml --learning-rate 1e-4 --out run2
  halfbyte train --model SmolLM2-135M-Instruct --data chat.jsonl --out run1 --max-steps 100
  halfbyte train run.toml --resume

A run file holds one key = value a line, with the names of the flags in snake case:
  model = \"SmolLM2-135M-Instruct\"
  data = \"chat.jsonl\"
  out = \"run1\"
  learning_rate = 2e-4
A flag overrides the file. A relative path is relative to the working directory, in the
file too.

--out gets the PEFT adapter, checkpoint-N and metrics.jsonl. Ctrl-C saves a checkpoint and ends the run;
--resume goes on from there.")]
pub struct TrainArgs {
    /// Run file: TOML with the keys below
    #[arg(value_name = "RUN.TOML")]
    run_file: Option<PathBuf>,

    #[command(flatten)]
    keys: KeyFlags,
}

pub fn run(args: TrainArgs) -> Result<()> {
    let settings = Settings::new(args.run_file.as_deref(), &args.keys)?;
    let config = &settings.config;
    config.require_paths().map_err(|e| settings.locate(e))?;
    if config.out.exists() && !config.out.is_dir() {
        let found = format!("{}, which is a file", config.out.display());
        return Err(settings.locate(Error::flag("out", found, "a directory")));
    }
    let mut backend = load::backend(Device::named(&config.device), config.threads).map_err(|e| settings.locate(e))?;
    let stop = interrupt::install()?;
    let mut ui: Box<dyn Ui> = match io::stderr().is_terminal() {
        true => Box::new(TermUi::new(stop)),
        false => Box::new(PlainUi::new(io::stderr(), Some(stop))),
    };
    let outcome =
        with_backend!(&mut backend, |b| train::run(b, config, ui.as_mut())).map_err(|e| settings.locate(e))?;
    drop(ui);
    if outcome.interrupted {
        return Ok(());
    }
    let mut out = Out::new();
    let steps = outcome.step;
    let speed = outcome.tokens_per_second;
    put!(out, "{steps} steps, {} tokens, {speed:.0} tok/s", output::grouped(outcome.tokens))?;
    if let Some(e) = outcome.eval {
        put!(out, "held-out loss {:.4}, perplexity {:.2}", e.loss, e.perplexity)?;
    }
    if let Some(best) = outcome.best {
        put!(out, "best checkpoint: step {}, held-out loss {:.4}", best.step, best.eval_loss)?;
    }
    put!(out, "adapter: {}", config.out.display())?;
    out.flush()
}
