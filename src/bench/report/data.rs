//! The kernels' rows as JSON inside the page: a list for each column, strings by their place in a dictionary.

use std::collections::HashMap;

use serde_json::{Map, Value, json};

use super::group::group;
use crate::bench::results::KernelRow;

/// Columns of rows. 3,000 rows take about 0.4 MB.
pub fn kernels(rows: &[KernelRow]) -> Value {
    let mut columns: Map<String, Value> = Map::new();
    let values: Vec<Value> = rows.iter().map(|row| serde_json::to_value(row).unwrap_or_default()).collect();
    if let Some(Value::Object(first)) = values.first() {
        for name in first.keys() {
            columns.insert(name.clone(), column(values.iter().map(|row| &row[name])));
        }
    }
    let groups: Vec<Value> = rows.iter().map(|row| group(&row.shape, row.tokens).into()).collect();
    columns.insert("group".into(), column(groups.iter()));
    json!({ "rows": rows.len(), "columns": columns })
}

/// Strings become `{"names": [..], "at": [..]}`, numbers a list.
fn column<'a>(values: impl Iterator<Item = &'a Value>) -> Value {
    let mut names: Vec<&str> = vec![];
    let mut places: HashMap<&str, usize> = HashMap::new();
    let mut cells = vec![];
    for value in values {
        cells.push(match value {
            Value::String(text) => json!(places.entry(text).or_insert_with(|| {
                names.push(text);
                names.len() - 1
            })),
            Value::Number(n) if n.is_f64() => n.as_f64().map_or(Value::Null, rounded),
            other => other.clone(),
        });
    }
    if names.is_empty() { Value::Array(cells) } else { json!({ "names": names, "at": cells }) }
}

/// Five significant digits: more are noise and make the page large.
fn rounded(value: f64) -> Value {
    let short: f64 = format!("{value:.4e}").parse().unwrap_or(value);
    if short.fract() == 0.0 && short.abs() < 1e15 { json!(short as i64) } else { json!(short) }
}

/// JSON for a `<script>`: no text of a row can end it or start another. The signs only occur inside strings.
pub fn embed(value: &Value) -> String {
    let text = value.to_string();
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '<' => safe += "\\u003c",
            '>' => safe += "\\u003e",
            '&' => safe += "\\u0026",
            '\u{2028}' => safe += "\\u2028",
            '\u{2029}' => safe += "\\u2029",
            other => safe.push(other),
        }
    }
    safe
}
