//! Python's json.dumps, byte for byte: chat templates print tool schemas with it.

use std::fmt::Write as _;

use serde_json::Value;

/// The arguments of json.dumps that templates use.
#[derive(Clone, Debug, Default)]
pub(super) struct Style {
    pub ensure_ascii: bool,
    /// What a level is indented by; None: all on one line.
    pub indent: Option<String>,
    /// Between items, between key and value.
    pub separators: Option<(String, String)>,
    pub sort_keys: bool,
}

pub(super) fn dumps(value: &Value, style: &Style) -> String {
    let item = if style.indent.is_some() { "," } else { ", " };
    let (item, key) = style.separators.as_ref().map_or((item, ": "), |(item, key)| (item.as_str(), key.as_str()));
    let mut out = String::new();
    write_value(&mut out, value, style, item, key, 0);
    out
}

fn write_value(out: &mut String, value: &Value, style: &Style, item: &str, key: &str, depth: usize) {
    let line = |out: &mut String, depth: usize| {
        if let Some(indent) = &style.indent {
            out.push('\n');
            out.push_str(&indent.repeat(depth));
        }
    };
    match value {
        Value::Null => out.push_str("null"),
        Value::Bool(b) => out.push_str(if *b { "true" } else { "false" }),
        Value::Number(n) if n.is_f64() => out.push_str(&float(n.as_f64().unwrap_or(f64::NAN))),
        Value::Number(n) => out.push_str(&n.to_string()),
        Value::String(s) => write_string(out, s, style.ensure_ascii),
        Value::Array(items) if items.is_empty() => out.push_str("[]"),
        Value::Object(map) if map.is_empty() => out.push_str("{}"),
        Value::Array(items) => {
            out.push('[');
            for (i, v) in items.iter().enumerate() {
                out.push_str(if i > 0 { item } else { "" });
                line(out, depth + 1);
                write_value(out, v, style, item, key, depth + 1);
            }
            line(out, depth);
            out.push(']');
        }
        Value::Object(map) => {
            let mut entries: Vec<_> = map.iter().collect();
            if style.sort_keys {
                entries.sort_by_key(|e| e.0);
            }
            out.push('{');
            for (i, (k, v)) in entries.into_iter().enumerate() {
                out.push_str(if i > 0 { item } else { "" });
                line(out, depth + 1);
                write_string(out, k, style.ensure_ascii);
                out.push_str(key);
                write_value(out, v, style, item, key, depth + 1);
            }
            line(out, depth);
            out.push('}');
        }
    }
}

fn write_string(out: &mut String, s: &str, ensure_ascii: bool) {
    out.push('"');
    for c in s.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\x08' => out.push_str("\\b"),
            '\x0c' => out.push_str("\\f"),
            c if c < ' ' || (ensure_ascii && !(' '..='~').contains(&c)) => {
                let mut units = [0; 2];
                for unit in c.encode_utf16(&mut units) {
                    // Writing to a String cannot fail.
                    let _ = write!(out, "\\u{unit:04x}");
                }
            }
            c => out.push(c),
        }
    }
    out.push('"');
}

/// repr(float): the shortest digits that read back, an exponent below 1e-4 and from 1e16 on.
fn float(x: f64) -> String {
    if !x.is_finite() {
        return if x.is_nan() { "NaN".into() } else { format!("{}Infinity", if x < 0.0 { "-" } else { "" }) };
    }
    let scientific = format!("{x:e}");
    let (mantissa, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..16).contains(&exponent) || x == 0.0 {
        let plain = format!("{x}");
        if plain.contains('.') { plain } else { plain + ".0" }
    } else {
        format!("{mantissa}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn floats_print_as_python_prints_them() {
        for (x, s) in [
            (1.0, "1.0"),
            (0.1, "0.1"),
            (-0.0, "-0.0"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.5e-7, "1.5e-07"),
            (0.0001, "0.0001"),
            (0.00001, "1e-05"),
            (1e300, "1e+300"),
        ] {
            assert_eq!(float(x), s);
        }
    }

    #[test]
    fn json_prints_as_python_prints_it() {
        let v = json!({"b": [1, 2.0, null, true], "a": "é\"\u{1F600}\n<&'\u{1}", "e": {}, "l": []});
        let plain = r#"{"b": [1, 2.0, null, true], "a": "é\"😀\n<&'\u0001", "e": {}, "l": []}"#;
        assert_eq!(dumps(&v, &Style::default()), plain);
        let ascii = Style { ensure_ascii: true, sort_keys: true, ..Style::default() };
        let escaped = r#"{"a": "\u00e9\"\ud83d\ude00\n<&'\u0001", "b": [1, 2.0, null, true], "e": {}, "l": []}"#;
        assert_eq!(dumps(&v, &ascii), escaped);
        let indented = Style { indent: Some("  ".into()), ..Style::default() };
        assert_eq!(
            dumps(&json!({"a": [1, {}], "b": 2}), &indented),
            "{\n  \"a\": [\n    1,\n    {}\n  ],\n  \"b\": 2\n}"
        );
        let tight = Style { separators: Some((",".into(), ":".into())), ..Style::default() };
        assert_eq!(dumps(&json!({"a": [1, 2]}), &tight), r#"{"a":[1,2]}"#);
    }
}
