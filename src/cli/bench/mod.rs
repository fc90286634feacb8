//! `halfbyte bench`: how fast this machine is, mostly with random weights of a well-known model's shape.

mod compare;
mod decode;
mod kernels;
mod load;
mod op;
mod report;
mod step;
mod step_ops;
#[cfg(feature = "cuda")]
mod watch;

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Subcommand};
use halfbyte::Result;
use halfbyte::bench::results::{self, Row};
use serde::Serialize;

use crate::cli::output::Out;

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  halfbyte bench kernels --csv kernels.csv
  halfbyte bench step --shape mistral-7b --batch 4 --length 2048
  halfbyte bench decode --shape mistral-7b --past 4096
  halfbyte bench compare old-steps.csv new-steps.csv
  halfbyte bench rmsnorm_forward --candidate my.cu --watch

`halfbyte bench OP` races the ways to run one op of the table, and a kernel of your own beside them.
`halfbyte bench kernels --list` has the names, `halfbyte bench OP --help` the flags, docs/candidates.md the rest.")]
pub struct BenchArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand, Debug)]
enum What {
    /// Time every kernel at the shapes of 1B, 7B and 13B models
    Kernels(kernels::KernelsArgs),
    /// Time whole training steps
    Step(Box<step::StepArgs>),
    /// Time the generation of one token after another
    Decode(decode::DecodeArgs),
    /// Time how a model directory gets onto the device and into 4 bits
    Load(load::LoadArgs),
    /// Show which rows of two CSV files of results became slower or faster
    Compare(compare::CompareArgs),
    /// Make one page of HTML from CSV files of results
    Report(report::ReportArgs),
    /// The name of an op, and the flags of [`op::OpArgs`]
    #[command(external_subcommand)]
    Op(Vec<OsString>),
}

pub fn run(args: BenchArgs) -> Result<()> {
    match args.what {
        What::Kernels(args) => kernels::run(&args),
        What::Step(args) => step::run(&args),
        What::Decode(args) => decode::run(&args),
        What::Load(args) => load::run(&args),
        What::Compare(args) => compare::run(&args),
        What::Op(words) => {
            let command = BenchArgs::augment_args(clap::Command::new("bench"));
            let others: Vec<String> = command.get_subcommands().map(|c| c.get_name().to_string()).collect();
            op::run(&words, &others)
        }
        What::Report(args) => report::run(&args),
    }
}

/// Where a command's row goes: `--csv` and `--json`.
#[derive(Args, Debug)]
struct RowArgs {
    /// Append a row to this file
    #[arg(long, value_name = "FILE")]
    csv: Option<PathBuf>,

    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

impl RowArgs {
    /// Refuses a `--csv` that could not take the row, before the time is spent.
    fn check<R: Row>(&self) -> Result<()> {
        self.csv.as_deref().map_or(Ok(()), results::can_append::<R>)
    }

    /// Appends the row, then shows it: as JSON, or by `print`.
    fn put<R: Row>(&self, row: &R, print: impl FnOnce(&mut Out) -> Result<()>) -> Result<()> {
        self.put_as(row, row, print)
    }

    /// The same; as JSON, what is shown is `json`.
    fn put_as<R: Row>(&self, row: &R, json: &impl Serialize, print: impl FnOnce(&mut Out) -> Result<()>) -> Result<()> {
        if let Some(path) = &self.csv {
            results::append(path, std::slice::from_ref(row))?;
        }
        let mut out = Out::new();
        if self.json {
            out.value(json)?
        } else {
            print(&mut out)?
        }
        out.flush()
    }
}
