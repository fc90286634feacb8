//! Which cards, tools and commits the rows come from. Nothing is merged: what differs gets a line of its own.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use super::Report;
use super::html::{grouped, or_dash, table};
use crate::bench::results::{DecodeRow, KernelRow, LoadRow, Row, StepOpRow, StepRow};

/// What a row says of where it was measured.
#[derive(Default)]
struct Origin<'a> {
    table: &'static str,
    card: &'a str,
    tool: &'a str,
    commit: &'a str,
    driver: &'a str,
    date: &'a str,
    sm_mhz: Option<u32>,
    memory_mhz: Option<u32>,
    copy: f64,
    product: f64,
}

/// What every row says, of the tool that it names.
macro_rules! origin {
    ($row:ident: $type:ident, $tool:expr) => {
        Origin {
            table: $type::TABLE,
            card: &$row.card,
            tool: $tool,
            commit: &$row.commit,
            date: &$row.date,
            ..Origin::default()
        }
    };
}

fn origins(report: &Report) -> Vec<Origin<'_>> {
    let kernels = report.kernels.iter().map(|r| Origin {
        driver: &r.driver,
        sm_mhz: r.sm_mhz,
        memory_mhz: r.memory_mhz,
        copy: r.copy_gb_per_s,
        product: r.product_tflop_per_s,
        ..origin!(r: KernelRow, &r.tool)
    });
    let steps = report.steps.iter().map(|r| Origin {
        driver: &r.driver,
        sm_mhz: r.sm_mhz,
        memory_mhz: r.memory_mhz,
        ..origin!(r: StepRow, &r.tool)
    });
    let ops = report.step_ops.iter().map(|r| Origin { driver: &r.driver, ..origin!(r: StepOpRow, &r.tool) });
    let decode = report.decode.iter().map(|r| origin!(r: DecodeRow, "halfbyte"));
    let load = report.load.iter().map(|r| origin!(r: LoadRow, "halfbyte"));
    kernels.chain(steps).chain(ops).chain(decode).chain(load).collect()
}

/// What the rows of one card, tool and commit have in common.
#[derive(Default)]
struct Source<'a> {
    drivers: BTreeSet<&'a str>,
    dates: BTreeSet<&'a str>,
    sm_mhz: Range,
    memory_mhz: Range,
    copy: Range,
    product: Range,
    rows: BTreeMap<&'static str, usize>,
}

/// Least and most.
#[derive(Default)]
struct Range(Option<(f64, f64)>);

impl Range {
    fn add(&mut self, value: f64) {
        // Files of earlier versions read as 0 where they have no column.
        if value > 0.0 {
            let (least, most) = self.0.unwrap_or((value, value));
            self.0 = Some((least.min(value), most.max(value)));
        }
    }

    fn show(&self) -> String {
        let Some((least, most)) = self.0 else { return "–".into() };
        let (least, most) = (grouped(least), grouped(most));
        if least == most { least } else { format!("{least}–{most}") }
    }
}

/// The table, and sentences for what must not be overlooked.
pub fn context(report: &Report) -> Value {
    let origins = origins(report);
    let mut sources: BTreeMap<(&str, &str, &str), Source<'_>> = BTreeMap::new();
    for o in &origins {
        let source = sources.entry((o.card, o.tool, o.commit)).or_default();
        if !o.date.is_empty() {
            source.dates.insert(o.date);
        }
        if !o.driver.is_empty() {
            source.drivers.insert(o.driver);
        }
        source.sm_mhz.add(o.sm_mhz.map_or(0.0, f64::from));
        source.memory_mhz.add(o.memory_mhz.map_or(0.0, f64::from));
        source.copy.add(o.copy);
        source.product.add(o.product);
        *source.rows.entry(o.table).or_default() += 1;
    }
    let columns = [
        "card",
        "tool",
        "commit",
        "driver",
        ">SM MHz",
        ">memory MHz",
        ">copy, GB/s",
        ">product, TFLOP/s",
        "date",
        "rows",
    ];
    let lines = sources.iter().map(|((card, tool, commit), source)| {
        let rows: Vec<String> =
            source.rows.iter().map(|(table, n)| format!("{} {table}", grouped(*n as f64))).collect();
        let drivers: Vec<&str> = source.drivers.iter().copied().collect();
        vec![
            or_dash(card),
            or_dash(tool),
            or_dash(commit),
            or_dash(&drivers.join(", ")),
            source.sm_mhz.show(),
            source.memory_mhz.show(),
            source.copy.show(),
            source.product.show(),
            span(&source.dates),
            rows.join(", "),
        ]
    });
    json!({ "table": table(&columns, lines.collect()), "warnings": warnings(&origins) })
}

/// "2026-11-24" or "2026-11-24 to 2026-11-26".
fn span(dates: &BTreeSet<&str>) -> String {
    match (dates.first(), dates.last()) {
        (Some(first), Some(last)) if first != last => format!("{first} to {last}"),
        (Some(first), _) => (*first).into(),
        _ => "–".into(),
    }
}

fn warnings(origins: &[Origin<'_>]) -> Vec<String> {
    let cards: BTreeSet<&str> = origins.iter().map(|o| o.card).collect();
    let commits: BTreeSet<&str> = origins.iter().filter(|o| o.tool == "halfbyte").map(|o| o.commit).collect();
    let list = |names: &BTreeSet<&str>| names.iter().map(|n| or_dash(n)).collect::<Vec<_>>().join(", ");
    let mut warnings = vec![];
    if cards.len() > 1 {
        warnings.push(format!("{} cards: {}. Each has its own charts.", cards.len(), list(&cards)));
    }
    if commits.len() > 1 {
        let list = list(&commits);
        warnings
            .push(format!("{} commits of halfbyte: {list}. Where they meet, names carry the commit.", commits.len()));
    }
    warnings
}
