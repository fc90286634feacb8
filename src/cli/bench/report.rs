//! `halfbyte bench report`: one page of HTML from CSV files of results.

use std::fs::Metadata;
use std::path::{Path, PathBuf};

use clap::Args;
use halfbyte::bench::report::Report;
use halfbyte::bench::results;
use halfbyte::checkpoint::atomic;
use halfbyte::{Error, Result};

use crate::cli::output::{Out, bytes, grouped, put, table};

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  halfbyte bench report bench/results/*-steps.csv kernels.csv --out report.html

Kernels, steps, ops of steps, decoding and loading in any mix, also of peers, several cards or commits. The page needs
no network. Of rows that measure the same at the same commit the last counts.")]
pub struct ReportArgs {
    /// CSV files that `halfbyte bench` or scripts/peers wrote
    #[arg(value_name = "RESULTS.csv", required = true)]
    results: Vec<PathBuf>,

    /// Page to write; a file that is there is replaced
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

pub fn run(args: &ReportArgs) -> Result<()> {
    let target = target(&args.out, &args.results)?;
    let tables = args.results.iter().map(|path| results::read(path)).collect::<Result<Vec<_>>>()?;
    let report = Report::new(tables);
    let counts = report.counts();
    if counts.is_empty() {
        return Err(Error::input(
            &args.results[0],
            "the table",
            "no rows",
            "a row of results, here or in another file",
        ));
    }
    let page = report.html().map_err(|e| Error::write("render", &args.out)(std::io::Error::other(e)))?;
    atomic::write_file(&target, |out| out.write_all(page.as_bytes()))?;
    let mut out = Out::new();
    put!(out, "{}: {} bytes, {}", args.out.display(), grouped(page.len() as u64), bytes(page.len() as u64))?;
    let rows: Vec<_> = counts.iter().map(|(table, n)| vec![(*table).to_string(), grouped(*n as u64)]).collect();
    for line in table(&rows, &[1]) {
        put!(out, "  {line} rows")?;
    }
    out.flush()
}

/// The file to write: what a link leads to. Refuses what is no regular file, and the inputs.
fn target(out: &Path, inputs: &[PathBuf]) -> Result<PathBuf> {
    let wrong = |found: &str| {
        Err(Error::flag("--out", format!("{}, which is {found}", out.display()), "a new file or a page to replace"))
    };
    let metadata: Metadata = match std::fs::metadata(out) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(out.into()),
        other => other.map_err(Error::read("look at", out))?,
    };
    if metadata.is_dir() {
        return wrong("a directory");
    }
    if !metadata.is_file() {
        return wrong("no regular file");
    }
    let real = out.canonicalize().map_err(Error::read("look at", out))?;
    // An input that cannot be found is for the reader to name.
    if inputs.iter().any(|input| input.canonicalize().is_ok_and(|input| input == real)) {
        return wrong("one of the inputs");
    }
    Ok(real)
}
