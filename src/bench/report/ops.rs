//! What a step is made of: its ops against their floors.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::html::{number, or_dash, table, width};
use crate::bench::results::StepOpRow;

/// Ops with a colour of their own; the others share one.
const COLOURS: usize = 8;

/// The bars and the table; null without rows.
pub fn context(rows: &[StepOpRow]) -> Value {
    if rows.is_empty() {
        return Value::Null;
    }
    let mut steps: Vec<(String, Vec<&StepOpRow>)> = vec![];
    let mut totals: BTreeMap<&str, f64> = BTreeMap::new();
    for row in rows {
        let title = title(row);
        match steps.iter_mut().find(|(t, _)| *t == title) {
            Some((_, ops)) => ops.push(row),
            None => steps.push((title, vec![row])),
        }
        *totals.entry(&row.op).or_default() += share(row);
    }
    // The order of the colours, and of the ops within a bar, is one for all bars.
    let mut order: Vec<&str> = totals.keys().copied().collect();
    order.sort_by(|a, b| totals[b].total_cmp(&totals[a]).then(a.cmp(b)));
    let place = |op: &str| order.iter().position(|o| *o == op).unwrap_or(COLOURS);
    steps.iter_mut().for_each(|(_, ops)| ops.sort_by_key(|r| place(&r.op)));
    let legend = order.iter().take(COLOURS).enumerate().map(|(i, op)| json!({ "colour": i, "name": op }));
    json!({
        "legend": legend.collect::<Vec<_>>(),
        "others": order.len() > COLOURS,
        "steps": steps.iter().map(|(title, ops)| bars(title, ops, &place)).collect::<Vec<_>>(),
        "table": details(&steps),
    })
}

/// Of its step, so that a long step does not decide on the colours alone.
fn share(row: &StepOpRow) -> f64 {
    if row.step_ms > 0.0 { row.op_ms / row.step_ms } else { 0.0 }
}

fn title(r: &StepOpRow) -> String {
    let memory = if r.memory.is_empty() { String::new() } else { format!(" in {}", r.memory) };
    format!(
        "{}, {} × {}, checkpointing {}{memory} — {} {}, {}",
        r.shape,
        r.batch,
        r.length,
        or_dash(&r.gradient_checkpointing),
        r.tool,
        r.commit,
        or_dash(&r.card)
    )
}

fn bars(title: &str, ops: &[&StepOpRow], place: &dyn Fn(&str) -> usize) -> Value {
    let step = ops.iter().map(|r| r.step_ms).fold(0.0, f64::max);
    let timed: f64 = ops.iter().map(|r| r.op_ms).sum();
    let floor: f64 = ops.iter().map(|r| r.floor_ms).sum();
    let whole = step.max(timed).max(floor);
    let segment = |r: &&StepOpRow, ms: f64, what: &str| {
        let colour = place(&r.op);
        json!({
            "colour": if colour < COLOURS { colour.to_string() } else { "other".into() },
            "width": width(ms, whole),
            "title": format!("{}: {} ms {what}, {} calls", r.op, number(ms), r.calls),
        })
    };
    json!({
        "title": title,
        "step": number(step),
        "timed": number(timed),
        "floor": number(floor),
        "ops": ops.iter().map(|r| segment(r, r.op_ms, "in this op")).collect::<Vec<_>>(),
        "floors": ops.iter().map(|r| segment(r, r.floor_ms, "at least")).collect::<Vec<_>>(),
        // Timed one by one, ops may take longer together than the step in which they follow without a gap.
        "rest": (step > timed).then(|| number(step - timed)),
        "rest_width": width(step - timed, whole),
        "excess": (timed > step).then(|| number(timed - step)),
    })
}

fn details(steps: &[(String, Vec<&StepOpRow>)]) -> Value {
    let columns = [
        "model",
        ">batch × length",
        "checkpointing",
        "op",
        ">calls",
        ">ms",
        ">% of the step",
        ">floor, ms",
        ">% of floor",
        ">above the floor, ms",
        "tool",
        "card",
        "commit",
        "date",
    ];
    let row = |r: &&StepOpRow| {
        vec![
            or_dash(&r.shape),
            format!("{} × {}", r.batch, r.length),
            or_dash(&r.gradient_checkpointing),
            or_dash(&r.op),
            r.calls.to_string(),
            number(r.op_ms),
            number(100.0 * share(r)),
            number(r.floor_ms),
            number(r.percent_of_floor),
            number(r.op_ms - r.floor_ms),
            or_dash(&r.tool),
            or_dash(&r.card),
            or_dash(&r.commit),
            or_dash(&r.date),
        ]
    };
    table(&columns, steps.iter().flat_map(|(_, ops)| ops).map(row).collect())
}
