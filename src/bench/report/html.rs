//! Tables and numbers as the template takes them.

use serde_json::{Value, json};

use crate::bench::results::{DecodeRow, LoadRow};

/// A table of cells; a column whose name begins with ">" holds numbers.
pub fn table(columns: &[&str], rows: Vec<Vec<String>>) -> Value {
    let column = |name: &&str| match name.strip_prefix('>') {
        Some(name) => json!({ "name": name, "number": true }),
        None => json!({ "name": name, "number": false }),
    };
    json!({ "columns": columns.iter().map(column).collect::<Vec<_>>(), "rows": rows })
}

/// "–" for an empty cell.
pub fn or_dash(text: &str) -> String {
    if text.is_empty() { "–".into() } else { text.into() }
}

/// "13,490": a whole number in groups of three digits.
pub fn grouped(value: f64) -> String {
    let digits = format!("{value:.0}");
    let mut out = String::new();
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) && digits.as_bytes()[i - 1].is_ascii_digit() {
            out.push(',');
        }
        out.push(c);
    }
    out
}

/// Three digits or more: "13,490", "169.8", "62.2", "3.72", "0.124".
pub fn number(value: f64) -> String {
    match value.abs() {
        v if !v.is_finite() => "–".into(),
        0.0 => "0".into(),
        v if v >= 1000.0 => grouped(value),
        v if v >= 10.0 => format!("{value:.1}"),
        v if v >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

/// As [`number`], "–" for what was not measured.
pub fn some(value: Option<f64>) -> String {
    value.map_or("–".into(), number)
}

/// Bytes in GB.
pub fn gb(bytes: Option<u64>) -> String {
    some(bytes.map(|b| b as f64 / 1e9))
}

/// Per cent of `whole` as a CSS width.
pub fn width(part: f64, whole: f64) -> String {
    let percent = 100.0 * part / whole;
    format!("{:.2}%", if percent.is_finite() { percent.clamp(0.0, 100.0) } else { 0.0 })
}

/// The table of `bench decode`; null without rows.
pub fn decode(rows: &[DecodeRow]) -> Value {
    if rows.is_empty() {
        return Value::Null;
    }
    let columns =
        ["model", ">tokens before", ">r", ">tokens/s", ">ms a token", ">least", ">most", "card", "commit", "date"];
    let row = |r: &DecodeRow| {
        vec![
            or_dash(&r.shape),
            grouped(r.past as f64),
            r.r.to_string(),
            number(r.tokens_per_second),
            number(r.ms),
            number(r.ms_min),
            number(r.ms_max),
            or_dash(&r.card),
            or_dash(&r.commit),
            or_dash(&r.date),
        ]
    };
    table(&columns, rows.iter().map(row).collect())
}

/// The table of `bench load`; null without rows.
pub fn load(rows: &[LoadRow]) -> Value {
    if rows.is_empty() {
        return Value::Null;
    }
    let columns = [
        "model",
        ">GB",
        ">disk alone, GB/s",
        ">PCIe alone, GB/s",
        ">cold, GB/s",
        ">cold, s",
        ">warm, GB/s",
        ">warm, s",
        "card",
        "commit",
        "date",
    ];
    let row = |r: &LoadRow| {
        vec![
            or_dash(&r.model),
            gb(Some(r.bytes)),
            number(r.disk_gb_per_s),
            some(r.pcie_gb_per_s),
            number(r.cold_gb_per_s),
            number(r.cold_seconds),
            number(r.warm_gb_per_s),
            number(r.warm_seconds),
            or_dash(&r.card),
            or_dash(&r.commit),
            or_dash(&r.date),
        ]
    };
    table(&columns, rows.iter().map(row).collect())
}
