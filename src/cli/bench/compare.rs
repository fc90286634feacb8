//! `halfbyte bench compare`: what became slower between two files of results.

use std::path::{Path, PathBuf};

use clap::Args;
use halfbyte::bench::compare::{self, Comparison, Key, Move, Pair};
use halfbyte::{Error, Result};
use serde_json::json;

use crate::cli::output::{Out, put, table};

/// Rows of only one file that are named.
const NAMED: usize = 3;

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  halfbyte bench compare bench/results/2026-11-24-h100-steps.csv steps.csv
  halfbyte bench compare old-kernels.csv kernels.csv --gate 5 --allow nf4_quantize

Rows match by what was timed, tool (whatever its version) and card. A row has moved if no sample of the one file lies
among those of the other: the intervals from least to most are disjoint. A row without least and most (step ops, loading)
counts as ± 5 %. Of several rows with one key the last counts.
Exit codes: 0 compared, 2 nothing to compare, 3 --gate found a slower row.")]
pub struct CompareArgs {
    /// CSV file of before
    #[arg(value_name = "OLD.csv")]
    old: PathBuf,

    /// CSV file of the same table, of after
    #[arg(value_name = "NEW.csv")]
    new: PathBuf,

    /// Show rows that have not moved, too
    #[arg(long)]
    all: bool,

    /// Exit with code 3 if a row is slower beyond its spread and by more than this
    #[arg(long, value_name = "PERCENT", value_parser = percent)]
    gate: Option<f64>,

    /// An op that may be slower; can be given again
    #[arg(long, value_name = "OP", requires = "gate")]
    allow: Vec<String>,

    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

fn percent(text: &str) -> Result<f64, String> {
    let usable = text.parse().ok().filter(|p: &f64| p.is_finite() && *p >= 0.0);
    usable.ok_or_else(|| "expected per cent, a number of at least 0".into())
}

pub fn run(args: &CompareArgs) -> Result<()> {
    let found = compare::compare(&args.old, &args.new)?;
    // A misspelt op would let nothing pass, and say nothing.
    if let Some(op) = args.allow.iter().find(|op| found.pairs.iter().all(|p| p.key.op() != **op)) {
        let mut ops: Vec<&str> = found.pairs.iter().map(|p| p.key.op()).filter(|op| !op.is_empty()).collect();
        ops.sort_unstable();
        ops.dedup();
        let known = if ops.is_empty() { "no --allow: the table has no ops".into() } else { ops.join(", ") };
        return Err(Error::flag("--allow", format!("{op:?}"), known));
    }
    let regressions = args.gate.map(|percent| found.regressions(percent, &args.allow));
    let mut out = Out::new();
    if args.json {
        let mut value = json!({ "slower": found.count(Move::Slower), "faster": found.count(Move::Faster) });
        value["comparison"] = json!(found);
        if let Some(rows) = &regressions {
            value["gate"] = json!({ "percent": args.gate, "allow": args.allow, "regressions": rows });
        }
        out.json(&value)?;
    } else {
        print(&mut out, (&args.old, &args.new), args.all, &found)?;
    }
    out.flush()?;
    match (args.gate, regressions.as_deref()) {
        (Some(percent), Some(rows @ [first, ..])) => {
            Err(Error::Slower { file: args.new.clone(), rows: rows.len(), percent, first: first.key.to_string() })
        }
        _ => Ok(()),
    }
}

/// The rows that moved, or `all`; what is in one alone; how many there are.
pub(super) fn print(out: &mut Out, (old, new): (&Path, &Path), all: bool, found: &Comparison) -> Result<()> {
    let constant = |column: &str| found.pairs.len() > 1 && found.is_constant(column);
    let shown = |p: &&Pair| all || p.moved.is_some();
    let mut cells = vec![];
    for pair in found.pairs.iter().filter(shown) {
        cells.push(vec![
            pair.key.name(constant),
            time(pair.old.median),
            time(pair.new.median),
            format!("{:.3}", pair.ratio),
            match pair.moved {
                Some(Move::Slower) => "slower".into(),
                Some(Move::Faster) => "faster".into(),
                None => String::new(),
            },
        ]);
    }
    // What all rows share is said once.
    let shared = found.pairs.first().map(|pair| pair.key.name(|column| !constant(column))).unwrap_or_default();
    put!(out, "{}{}{shared}", found.table, if shared.is_empty() { "" } else { ": " })?;
    if !cells.is_empty() {
        let head = ["", &format!("old, {}", found.unit), &format!("new, {}", found.unit), "new/old"];
        cells.insert(0, head.iter().map(ToString::to_string).collect());
        for line in table(&cells, &[1, 2, 3]) {
            put!(out, "  {line}")?;
        }
    }
    for (keys, path) in [(&found.only_old, old), (&found.only_new, new)] {
        if !keys.is_empty() {
            put!(out, "{} only in {}: {}", rows(keys.len()), path.display(), some(keys))?;
        }
    }
    let (slower, faster) = (found.count(Move::Slower), found.count(Move::Faster));
    put!(out, "{} compared, {slower} slower, {faster} faster", rows(found.pairs.len()))
}

fn rows(n: usize) -> String {
    if n == 1 { "1 row".into() } else { format!("{n} rows") }
}

/// Four digits, or all before the point.
fn time(value: f64) -> String {
    let before = value.abs().log10().floor().clamp(-1.0, 3.0);
    format!("{value:.*}", (3.0 - before) as usize)
}

/// The first few.
fn some(keys: &[Key]) -> String {
    let names: Vec<String> = keys.iter().take(NAMED).map(ToString::to_string).collect();
    names.join("; ") + if keys.len() > NAMED { "; .." } else { "" }
}
