//! Whole steps: halfbyte and its peers side by side.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::html::{gb, number, or_dash, some, table, width};
use crate::bench::results::StepRow;

/// Rows that answer the same question: card, model, batch, length, and whether everything is recomputed.
type Question<'a> = (&'a str, &'a str, usize, usize, bool);

/// Bars and the table; null without rows.
pub fn context(rows: &[StepRow]) -> Value {
    if rows.is_empty() {
        return Value::Null;
    }
    let mut questions: BTreeMap<Question<'_>, Vec<&StepRow>> = BTreeMap::new();
    for row in rows {
        // "auto" is free to keep what fits, as a peer without checkpointing is.
        let recomputed = row.gradient_checkpointing == "true";
        questions.entry((&row.card, &row.shape, row.batch, row.length, !recomputed)).or_default().push(row);
    }
    // halfbyte first, then the peers by name.
    questions.values_mut().for_each(|rows| rows.sort_by_key(|r| (r.tool != "halfbyte", r.tool.clone())));
    let groups: Vec<Value> = questions.iter().map(|(question, rows)| group(question, rows, &questions)).collect();
    json!({ "groups": groups, "table": details(&questions) })
}

fn title((card, shape, batch, length, free): &Question<'_>) -> Value {
    let mode = if *free { "free to keep activations" } else { "everything recomputed" };
    json!({ "shape": format!("{shape}, {batch} × {length}"), "mode": mode, "card": or_dash(card) })
}

/// Bars of one question, on the scales of its card and model.
fn group(question: &Question<'_>, rows: &[&StepRow], all: &BTreeMap<Question<'_>, Vec<&StepRow>>) -> Value {
    let of_model = || all.iter().filter(|(q, _)| (q.0, q.1) == (question.0, question.1)).flat_map(|(_, rows)| rows);
    let most = |value: fn(&StepRow) -> f64| of_model().map(|r| value(r)).fold(0.0, f64::max);
    let speed = most(|r| r.tokens_per_second.max(r.bound_tokens_per_second.unwrap_or(0.0)));
    let memory = most(|r| r.arena_bytes.unwrap_or(0) as f64);
    let bar = |row: &&StepRow| {
        json!({
            "name": name(row, rows),
            "own": row.tool == "halfbyte",
            "speed": number(row.tokens_per_second),
            "speed_width": width(row.tokens_per_second, speed),
            "bound": row.bound_tokens_per_second.map(number),
            "bound_at": row.bound_tokens_per_second.map(|bound| width(bound, speed)),
            "memory": row.arena_bytes.map(|b| gb(Some(b))),
            "memory_width": width(row.arena_bytes.unwrap_or(0) as f64, memory),
        })
    };
    json!({ "title": title(question), "bars": rows.iter().map(bar).collect::<Vec<_>>() })
}

/// The tool, and what tells this row from its neighbours.
fn name(row: &StepRow, rows: &[&StepRow]) -> String {
    let others = || rows.iter().filter(|r| r.tool == row.tool);
    let mut name = row.tool.clone();
    let mut tell = |column: fn(&StepRow) -> String, prefix: &str| {
        if others().any(|r| column(r) != column(row)) && !column(row).is_empty() {
            name += &format!(", {prefix}{}", column(row));
        }
    };
    tell(|r| r.gradient_checkpointing.clone(), "checkpointing ");
    tell(|r| r.memory.clone(), "in ");
    tell(|r| format!("{} r = {} dropout {}", r.optim, r.r, r.lora_dropout), "");
    tell(|r| r.commit.clone(), "");
    name
}

fn details(questions: &BTreeMap<Question<'_>, Vec<&StepRow>>) -> Value {
    let columns = [
        "model",
        ">batch × length",
        "checkpointing",
        "tool",
        ">tokens/s",
        ">ms",
        ">least",
        ">most",
        ">% of bound",
        ">ceiling, TFLOP/s",
        ">memory, GB",
        ">optimizer, GB",
        ">host, GB",
        ">driver counts, GB",
        ">budget",
        ">r",
        "optimizer",
        "layers",
        "card",
        "commit",
        "date",
    ];
    let row = |r: &&StepRow| {
        vec![
            or_dash(&r.shape),
            format!("{} × {}", r.batch, r.length),
            or_dash(&r.gradient_checkpointing),
            or_dash(&r.tool),
            number(r.tokens_per_second),
            number(r.ms),
            number(r.ms_min),
            number(r.ms_max),
            some(r.percent_of_bound),
            some(r.tflops_ceiling),
            gb(r.arena_bytes),
            gb(r.optimizer_bytes),
            gb(r.host_bytes),
            gb(r.driver_bytes),
            or_dash(&r.memory),
            r.r.to_string(),
            or_dash(&r.optim),
            or_dash(&r.layers),
            or_dash(&r.card),
            or_dash(&r.commit),
            or_dash(&r.date),
        ]
    };
    table(&columns, questions.values().flatten().map(row).collect())
}
