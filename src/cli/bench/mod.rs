//! `halfbyte bench`: how fast this machine is, mostly with random weights of a well-known model's shape.

mod decode;
mod load;
mod report;
mod step;

use std::io::Write;
use std::path::Path;

use clap::{Args, Subcommand};
use halfbyte::{Error, Result};
use serde_json::Value;

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  halfbyte bench step --shape mistral-7b --batch 4 --length 2048
  halfbyte bench decode --shape mistral-7b --past 4096")]
pub struct BenchArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand, Debug)]
enum What {
    /// Time whole training steps
    Step(Box<step::StepArgs>),
    /// Time the generation of one token after another
    Decode(decode::DecodeArgs),
    /// Time how a model directory gets onto the device and into 4 bits
    Load(load::LoadArgs),
    /// Make one page of HTML from CSV files of results
    Report(report::ReportArgs),
}

pub fn run(args: BenchArgs) -> Result<()> {
    match args.what {
        What::Step(args) => step::run(&args),
        What::Decode(args) => decode::run(&args),
        What::Load(args) => load::run(&args),
        What::Report(args) => report::run(&args),
    }
}

/// Whether a row can be appended in the end, asked before the time is spent. Leaves no file behind.
fn can_append(path: Option<&Path>) -> Result<()> {
    let Some(path) = path else { return Ok(()) };
    let new = !path.exists();
    std::fs::OpenOptions::new().create(true).append(true).open(path).map_err(Error::write("open", path))?;
    match new {
        true => std::fs::remove_file(path).map_err(Error::write("open", path)),
        false => Ok(()),
    }
}

/// Appends a row; a new file gets a line of names first.
fn append(path: &Path, row: &Value) -> Result<()> {
    let Value::Object(fields) = row else { return Ok(()) };
    let new = !path.exists();
    let cell = |v: &Value| match v {
        Value::Null => String::new(),
        Value::String(s) if s.contains(',') => format!("\"{s}\""),
        Value::String(s) => s.clone(),
        Value::Number(n) if n.is_f64() => format!("{:.3}", n.as_f64().unwrap_or(f64::NAN)),
        other => other.to_string(),
    };
    let mut text = String::new();
    if new {
        text += &(fields.keys().cloned().collect::<Vec<_>>().join(",") + "\n");
    }
    text += &(fields.values().map(cell).collect::<Vec<_>>().join(",") + "\n");
    let mut file =
        std::fs::OpenOptions::new().create(true).append(true).open(path).map_err(Error::write("open", path))?;
    file.write_all(text.as_bytes()).map_err(Error::write("append to", path))
}
