//! The commands, a file each. A command answers a [`halfbyte::Result`]; only [`main`] turns it into text and exit code.

mod args;
mod bench;
mod eval;
mod generate;
mod info;
mod inspect;
mod load;
mod merge;
mod output;
mod plan;
mod progress;
mod quantize;
mod run_file;
mod term_ui;
mod train;

use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use halfbyte::{Error, Result};

#[derive(Parser, Debug)]
#[command(
    name = "halfbyte",
    version,
    about = "QLoRA fine-tuning from one native binary",
    max_term_width = 110,
    after_help = "Examples:
  halfbyte train --model SmolLM2-135M-Instruct --data chat.jsonl --out run1
  halfbyte generate --model SmolLM2-135M-Instruct --adapter run1 --chat --prompt 'Who are you?'
  halfbyte inspect SmolLM2-135M-Instruct

--model, --adapter, --data and --out mean the same in every command.
Exit codes: 0 done, 2 bad input (arguments, files), 3 slower than before (bench compare --gate),
1 anything else."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Fine-tune a model: LoRA adapters over frozen 4-bit weights
    Train(Box<train::TrainArgs>),
    /// Measure loss and perplexity on a data file
    Eval(eval::EvalArgs),
    /// Continue a text or answer a chat message
    Generate(generate::GenerateArgs),
    /// Bring a model directory into 4 bits, as transformers and bitsandbytes write it
    Quantize(quantize::QuantizeArgs),
    /// Merge an adapter into a bf16 model directory
    Merge(merge::MergeArgs),
    /// Show what a directory holds: settings, tensors, dtypes, bits a weight, bytes
    Inspect(inspect::InspectArgs),
    /// Time kernels, training and generation on this machine
    Bench(bench::BenchArgs),
    /// Show what a training run would take: every byte, what each layer keeps, the time of a step. Needs no GPU
    Plan(plan::PlanArgs),
    /// Show version, devices, and which backend is picked and why
    Info(info::InfoArgs),
}

impl Command {
    fn run(self) -> Result<()> {
        match self {
            Self::Train(a) => train::run(*a),
            Self::Eval(a) => eval::run(a),
            Self::Generate(a) => generate::run(a),
            Self::Quantize(a) => quantize::run(a),
            Self::Merge(a) => merge::run(a),
            Self::Inspect(a) => inspect::run(a),
            Self::Bench(a) => bench::run(a),
            Self::Plan(a) => plan::run(a),
            Self::Info(a) => info::run(a),
        }
    }
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    let cli = match command().try_get_matches().and_then(|m| Cli::from_arg_matches(&m)) {
        Ok(cli) => cli,
        Err(e) => {
            let _ = e.print();
            return code(e.exit_code());
        }
    };
    match cli.command.run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) if output::is_closed_pipe(&e) => ExitCode::SUCCESS,
        Err(e) => {
            let e = as_flag(e);
            output::note(format_args!("error: {e}"));
            code(e.exit_code())
        }
    }
}

/// The library names settings as the run file does; on the command line they are flags.
fn as_flag(e: Error) -> Error {
    match e {
        Error::Flag { flag, found, expected }
            if flag.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_') =>
        {
            Error::flag(run_file::flag_name(&flag), found, expected)
        }
        other => other,
    }
}

fn code(n: i32) -> ExitCode {
    ExitCode::from(u8::try_from(n).unwrap_or(1))
}

/// The parser.
fn command() -> clap::Command {
    with_usual_flags(Cli::command())
}

/// What holds for the flags of every command. One of two words is shown as `--two-words`; `--two_words`, as PEFT and TRL
/// spell it, is the same. Of one given twice the last counts, so that a script can be called with one more.
fn with_usual_flags(command: clap::Command) -> clap::Command {
    let command = command.args_override_self(true).mut_args(|a| match a.get_long() {
        Some(long) if long.contains('-') => {
            let snake = long.replace('-', "_");
            a.alias(snake)
        }
        _ => a,
    });
    command.mut_subcommands(with_usual_flags)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parser_is_consistent() {
        command().debug_assert();
    }

    #[test]
    fn every_flag_has_its_spelling_with_underscores_and_the_last_counts() {
        let words = ["halfbyte", "bench", "step", "--warm_up", "1", "--length", "7", "--length", "64", "--warm-up=2"];
        let matches = command().try_get_matches_from(words).unwrap();
        let step = matches.subcommand().and_then(|(_, bench)| bench.subcommand()).unwrap().1;
        let last = |id: &str| step.get_raw(id).unwrap().next_back().unwrap().to_owned();
        assert_eq!((last("warm_up"), last("length")), ("2".into(), "64".into()));
        let train = ["halfbyte", "train", "run.toml", "--lora_alpha", "8"];
        assert!(command().try_get_matches_from(train).is_ok());
    }

    #[test]
    fn every_command_and_argument_has_help_and_every_command_examples() {
        let mut root = command();
        root.build();
        for c in root.get_subcommands().filter(|c| c.get_name() != "help") {
            assert!(c.get_about().is_some(), "{}", c.get_name());
            let after = c.get_after_help().map(|h| h.to_string()).unwrap_or_default();
            assert!(after.contains("Examples:"), "{}", c.get_name());
            assert!(after.contains(&format!("halfbyte {}", c.get_name())), "{}", c.get_name());
            for a in c.get_arguments() {
                assert!(a.get_help().is_some(), "{} {}", c.get_name(), a.get_id());
            }
        }
    }
}
