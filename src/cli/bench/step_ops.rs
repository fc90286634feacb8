//! `halfbyte bench step --ops`: what each op takes of a step.

use std::path::PathBuf;

use clap::Args;
use halfbyte::Result;
use halfbyte::backend::OpTime;
use halfbyte::bench::kernels::outcome::Ceilings;
use halfbyte::bench::results::{self, StepOpRow, StepRow, figure};
use halfbyte::bench::step::Ops;

use crate::cli::output::{Out, put};

#[derive(Args, Debug)]
pub struct OpsArgs {
    /// Then run more steps with each op timed, and print what it takes of a step
    #[arg(long)]
    pub ops: bool,

    /// Append a row for each op to this file
    #[arg(long, value_name = "FILE", requires = "ops")]
    ops_csv: Option<PathBuf>,
}

impl OpsArgs {
    /// Refuses a `--ops-csv` that could not take the rows, before the time is spent.
    pub fn check(&self) -> Result<()> {
        self.ops_csv.as_deref().map_or(Ok(()), results::can_append::<StepOpRow>)
    }

    pub fn append(&self, rows: &[StepOpRow]) -> Result<()> {
        self.ops_csv.as_deref().map_or(Ok(()), |path| results::append(path, rows))
    }
}

/// A row for each op of `step`; without ceilings there are no floors.
pub fn rows(step: &StepRow, ops: &Ops, ceilings: Option<Ceilings>) -> Vec<StepOpRow> {
    let of = |op: &OpTime| {
        let ms = op.time.as_secs_f64() * 1e3;
        let floor = ceilings.map_or(0.0, |c| c.floor(op.work) * 1e3);
        StepOpRow {
            date: step.date.clone(),
            tool: step.tool.clone(),
            commit: step.commit.clone(),
            card: step.card.clone(),
            driver: step.driver.clone(),
            shape: step.shape.clone(),
            batch: step.batch,
            length: step.length,
            gradient_checkpointing: step.gradient_checkpointing.clone(),
            memory: step.memory.clone(),
            step_ms: step.ms,
            timed_step_ms: figure(ops.step_seconds * 1e3),
            op: op.op.into(),
            calls: op.calls as usize,
            op_ms: figure(ms),
            bytes: op.work.bytes,
            flops: op.work.flops,
            floor_ms: figure(floor),
            percent_of_floor: if ms > 0.0 { figure(100.0 * floor / ms) } else { 0.0 },
        }
    };
    ops.times.iter().map(of).collect()
}

/// The rows as a table. Shares are of the step while its ops are timed.
pub fn print(out: &mut Out, rows: &[StepOpRow], ceilings: Option<Ceilings>) -> Result<()> {
    let Some(first) = rows.first() else { return Ok(()) };
    let (untimed, step) = (first.step_ms, first.timed_step_ms);
    put!(out)?;
    put!(
        out,
        "A step whose ops are timed takes {step:.1} ms, {:+.1} % of one whose ops are not.",
        100.0 * (step - untimed) / untimed
    )?;
    if let Some(Ceilings { copy, product }) = ceilings {
        put!(out, "Floors: a copy at {:.0} GB/s, products at {:.0} TFLOP/s.", copy / 1e9, product / 1e12)?;
    }
    put!(out, "{:>20} {:>7} {:>10} {:>8} {:>10} {:>10}", "op", "calls", "ms", "share", "floor ms", "% of floor")?;
    for row in rows {
        let StepOpRow { op, calls, op_ms, .. } = row;
        let share = 100.0 * op_ms / step;
        let floor = match ceilings {
            Some(_) => format!(" {:10.3} {:10.1}", row.floor_ms, row.percent_of_floor),
            None => format!(" {:>10} {:>10}", "-", "-"),
        };
        put!(out, "{op:>20} {calls:7} {op_ms:10.3} {share:6.1} %{floor}")?;
    }
    let between = step - rows.iter().map(|r| r.op_ms).sum::<f64>();
    put!(out, "{:>20} {:>7} {between:10.3} {:6.1} %", "between ops", "", 100.0 * between / step)
}
