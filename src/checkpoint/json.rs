//! Keys of a JSON object, read with errors that name file, key, found and expected.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// A JSON object of a file. `prefix` is the path to it inside the file ("rope_scaling."), for errors.
pub(super) struct Keys<'a> {
    pub file: &'a Path,
    pub prefix: &'static str,
    pub map: &'a Map<String, Value>,
}

/// The size limit of one dimension: what larger models than any known have, and small enough that products of two
/// dimensions and an element size fit in 64 bits.
const MAX_DIM: u64 = 1 << 28;

impl<'a> Keys<'a> {
    pub fn fault(&self, key: &str, found: impl Into<String>, expected: impl Into<String>) -> Error {
        Error::input(self.file, format!("key {}{key}", self.prefix), found, expected)
    }

    /// A key that is there and not null.
    pub fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|v| !v.is_null())
    }

    fn require(&self, key: &str, expected: &str) -> Result<&'a Value> {
        match self.map.get(key) {
            None => Err(self.fault(key, "no such key", expected)),
            Some(Value::Null) => Err(self.fault(key, "null", expected)),
            Some(v) => Ok(v),
        }
    }

    fn mistyped(&self, key: &str, v: &Value, expected: &str) -> Error {
        self.fault(key, shorten(v), expected)
    }

    /// A size of at least 1.
    pub fn size(&self, key: &str) -> Result<usize> {
        const EXPECTED: &str = "an integer from 1 to 2^28";
        let v = self.require(key, EXPECTED)?;
        v.as_u64()
            .filter(|n| (1..=MAX_DIM).contains(n))
            .map(|n| n as usize)
            .ok_or_else(|| self.mistyped(key, v, EXPECTED))
    }

    /// A size, or None where the key is missing or null.
    pub fn size_or_null(&self, key: &str) -> Result<Option<usize>> {
        self.get(key).map(|_| self.size(key)).transpose()
    }

    /// A finite number.
    pub fn number(&self, key: &str) -> Result<f64> {
        const EXPECTED: &str = "a number";
        let v = self.require(key, EXPECTED)?;
        v.as_f64().filter(|x| x.is_finite()).ok_or_else(|| self.mistyped(key, v, EXPECTED))
    }

    pub fn number_or(&self, key: &str, default: f64) -> Result<f64> {
        if self.get(key).is_some() { self.number(key) } else { Ok(default) }
    }

    /// A number that is finite and above zero in f32 too.
    pub fn positive(&self, key: &str) -> Result<f64> {
        let x = self.number(key)?;
        let y = x as f32;
        if y > 0.0 && y.is_finite() { Ok(x) } else { Err(self.fault(key, x.to_string(), "a number above 0")) }
    }

    pub fn flag(&self, key: &str, default: bool) -> Result<bool> {
        match self.get(key) {
            None => Ok(default),
            Some(v) => v.as_bool().ok_or_else(|| self.mistyped(key, v, "true or false")),
        }
    }

    pub fn text(&self, key: &str) -> Result<&'a str> {
        const EXPECTED: &str = "a string";
        let v = self.require(key, EXPECTED)?;
        v.as_str().ok_or_else(|| self.mistyped(key, v, EXPECTED))
    }

    pub fn text_or(&self, key: &str, default: &'a str) -> Result<&'a str> {
        if self.get(key).is_some() { self.text(key) } else { Ok(default) }
    }

    /// A list of strings; empty where the key is missing or null.
    pub fn texts(&self, key: &str) -> Result<Vec<String>> {
        let Some(v) = self.get(key) else { return Ok(Vec::new()) };
        v.as_array()
            .and_then(|a| a.iter().map(|s| s.as_str().map(str::to_owned)).collect())
            .ok_or_else(|| self.mistyped(key, v, "a list of strings"))
    }

    pub fn object(&self, key: &str) -> Result<Option<&'a Map<String, Value>>> {
        match self.get(key) {
            None => Ok(None),
            Some(v) => v.as_object().map(Some).ok_or_else(|| self.mistyped(key, v, "an object")),
        }
    }

    /// Refuses a key whose value is anything but missing, null, false, 0 or empty.
    pub fn must_be_off(&self, key: &str, expected: &str) -> Result<()> {
        match self.get(key) {
            Some(v) if !is_off(v) => Err(self.mistyped(key, v, expected)),
            _ => Ok(()),
        }
    }
}

/// null, false, 0, or empty.
pub(super) fn is_off(v: &Value) -> bool {
    match v {
        Value::Null => true,
        Value::Bool(b) => !b,
        Value::Number(n) => n.as_f64() == Some(0.0),
        Value::String(s) => s.is_empty(),
        Value::Array(a) => a.is_empty(),
        Value::Object(o) => o.is_empty(),
    }
}

/// A value as JSON, cut to a length that fits in an error line.
pub(super) fn shorten(v: &Value) -> String {
    let text = v.to_string();
    match text.char_indices().nth(80) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

/// Parses a file's text as a JSON object.
pub(super) fn parse_object(file: &Path, text: &str) -> Result<Map<String, Value>> {
    match serde_json::from_str(text) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(other) => Err(Error::input(file, "file", shorten(&other), "a JSON object")),
        Err(e) => {
            let place = format!("line {}, column {}", e.line(), e.column());
            Err(Error::input(file, place, format!("malformed JSON ({e})"), "a JSON object"))
        }
    }
}

/// Reads a JSON object of at most 64 MiB (an index of 100,000 tensors has 10).
pub(super) fn read_object(file: &Path) -> Result<Map<String, Value>> {
    parse_object(file, &read_text(file)?)
}

/// Reads a small text file. Errors: unreadable, not UTF-8, over 64 MiB.
pub(super) fn read_text(file: &Path) -> Result<String> {
    use std::io::Read;
    const LIMIT: u64 = 64 << 20;
    let handle = std::fs::File::open(file).map_err(Error::read("open", file))?;
    let mut bytes = Vec::new();
    handle.take(LIMIT + 1).read_to_end(&mut bytes).map_err(Error::read("read", file))?;
    if bytes.len() as u64 > LIMIT {
        return Err(Error::input(file, "file", "more than 64 MiB", "a small JSON file"));
    }
    String::from_utf8(bytes).map_err(|e| {
        Error::input(file, format!("byte {}", e.utf8_error().valid_up_to()), "bytes that are not UTF-8", "UTF-8 text")
    })
}

/// `dir/name` where that exists.
pub(super) fn existing(dir: &Path, name: &str) -> Option<PathBuf> {
    let path = dir.join(name);
    path.exists().then_some(path)
}
