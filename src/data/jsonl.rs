//! JSON lines: a reader that holds one line at a time, and what a row may be.

use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::Message;
use crate::error::{Error, Result};

/// Longest line read: a line without end must not take all memory.
pub const MAX_LINE: usize = 64 << 20;

/// What is wrong with a row. The caller adds file and line.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Fault {
    /// Inside the line: ", column 7", ": messages[1].content"; may be empty.
    pub place: String,
    pub found: String,
    pub expected: String,
}

impl Fault {
    pub fn new(found: impl Into<String>, expected: impl Into<String>) -> Self {
        Self { place: String::new(), found: found.into(), expected: expected.into() }
    }

    pub fn at(place: impl std::fmt::Display, found: impl Into<String>, expected: impl Into<String>) -> Self {
        Self { place: format!(", {place}"), found: found.into(), expected: expected.into() }
    }

    pub fn into_error(self, file: &Path, line: usize) -> Error {
        Error::input(file, format!("line {line}{}", self.place), self.found, self.expected)
    }
}

/// One row of a data file.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Row {
    Text(String),
    /// Plain strings.
    Completion {
        prompt: String,
        completion: String,
    },
    Chat {
        messages: Vec<Message>,
        tools: Value,
    },
    /// The first `prompt` messages are the prompt.
    ChatCompletion {
        messages: Vec<Message>,
        prompt: usize,
        tools: Value,
    },
}

impl Row {
    /// The keys that make the kind, for the error about files that mix kinds.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Text(_) => "`text`",
            Self::Completion { .. } => "`prompt` and `completion` as strings",
            Self::Chat { .. } => "`messages`",
            Self::ChatCompletion { .. } => "`prompt` and `completion` as lists of messages",
        }
    }
}

/// The lines of a file with their numbers, counted from 1.
pub(super) struct Lines<R> {
    reader: R,
    path: PathBuf,
    number: usize,
    limit: usize,
    /// Bytes read so far, line ends included.
    pub bytes: u64,
}

impl Lines<BufReader<File>> {
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::read("open", path))?;
        Ok(Self::new(BufReader::with_capacity(1 << 18, file), path, MAX_LINE))
    }
}

impl<R: BufRead> Lines<R> {
    pub fn new(reader: R, path: &Path, limit: usize) -> Self {
        Self { reader, path: path.into(), number: 0, limit, bytes: 0 }
    }

    /// The next line without its end, or None at the end of the file.
    pub fn next_line(&mut self) -> Result<Option<(usize, Vec<u8>)>> {
        let mut line = Vec::new();
        self.number += 1;
        loop {
            let chunk = match self.reader.fill_buf() {
                Ok(chunk) => chunk,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(Error::read("read", &self.path)(e)),
            };
            if chunk.is_empty() {
                return Ok((!line.is_empty()).then_some((self.number, line)));
            }
            let end = chunk.iter().position(|&b| b == b'\n');
            let part = &chunk[..end.unwrap_or(chunk.len())];
            if line.len() + part.len() > self.limit {
                return Err(Error::input(
                    &self.path,
                    format!("line {}", self.number),
                    format!("more than {} bytes without a line end", self.limit),
                    "JSON lines: one row a line",
                ));
            }
            line.extend_from_slice(part);
            let used = part.len() + usize::from(end.is_some());
            self.reader.consume(used);
            self.bytes += used as u64;
            if end.is_some() {
                return Ok(Some((self.number, line)));
            }
        }
    }
}

/// Parses one line; None if it is blank.
pub(super) fn parse(number: usize, line: &[u8]) -> Result<Option<Row>, Fault> {
    let line = match line {
        // A byte-order mark is not JSON, but editors leave it at the start of a file.
        [0xEF, 0xBB, 0xBF, rest @ ..] if number == 1 => rest,
        _ => line,
    };
    let text = std::str::from_utf8(line).map_err(|e| {
        let at = e.valid_up_to();
        Fault::at(format!("byte {}", at + 1), format!("byte 0x{:02x}, which is not UTF-8", line[at]), "UTF-8 text")
    })?;
    let text = text.trim_matches([' ', '\t', '\r']);
    if text.is_empty() {
        return Ok(None);
    }
    match serde_json::from_str(text) {
        Ok(Value::Object(map)) => row(map).map(Some),
        Ok(other) => Err(Fault::new(type_name(&other), "a JSON object: JSON lines hold one object a line")),
        Err(e) => {
            let message = e.to_string();
            let message = message.split(" at line ").next().unwrap_or(&message);
            let hint = if number == 1 && text.starts_with(['[', '{']) && e.is_eof() {
                "a whole JSON object on one line (JSON lines, not one JSON document over many lines)"
            } else {
                "a JSON object"
            };
            Err(Fault::at(format!("column {}", e.column()), format!("malformed JSON ({message})"), hint))
        }
    }
}

/// Checks one line of `file` without a tokenizer: the keys that make its kind of row, or None if it is blank.
pub fn check_line(file: &Path, number: usize, line: &[u8]) -> Result<Option<&'static str>> {
    let row = parse(number, line).map_err(|fault| fault.into_error(file, number))?;
    Ok(row.map(|row| row.kind()))
}

const KINDS: &str = "`text`, or `prompt` and `completion`, or `messages`";

fn row(mut map: Map<String, Value>) -> Result<Row, Fault> {
    let has = |k: &str| map.contains_key(k);
    let kinds = [("`messages`", has("messages")), ("`text`", has("text")), ("`completion`", has("completion"))];
    let found: Vec<&str> = kinds.iter().filter(|k| k.1).map(|k| k.0).collect();
    if found.len() > 1 {
        return Err(Fault::new(format!("{} in one row", found.join(" and ")), format!("one kind: {KINDS}")));
    }
    if has("completion") != has("prompt") && found.first() != Some(&"`messages`") && found.first() != Some(&"`text`") {
        let (is, not) = if has("prompt") { ("prompt", "completion") } else { ("completion", "prompt") };
        return Err(Fault::new(format!("`{is}` without `{not}`"), KINDS));
    }
    let tools = match map.remove("tools") {
        None | Some(Value::Null) => Value::Null,
        Some(list @ Value::Array(_)) => list,
        Some(other) => return Err(Fault::at("tools", type_name(&other), "a list of tools")),
    };
    if let Some(value) = map.remove("messages") {
        return Ok(Row::Chat { messages: messages("messages", value)?, tools });
    }
    if let Some(value) = map.remove("text") {
        return Ok(Row::Text(string("text", value)?));
    }
    match (map.remove("prompt"), map.remove("completion")) {
        (Some(prompt @ Value::Array(_)), Some(completion @ Value::Array(_))) => {
            let mut all = messages("prompt", prompt)?;
            let prompt = all.len();
            all.extend(messages("completion", completion)?);
            if all[prompt].role != "assistant" {
                let found = format!("role `{}`", all[prompt].role);
                return Err(Fault::at("completion[0]", found, "a message of the assistant"));
            }
            Ok(Row::ChatCompletion { messages: all, prompt, tools })
        }
        (Some(prompt @ Value::String(_)), Some(completion @ Value::Array(_)))
        | (Some(prompt @ Value::Array(_)), Some(completion @ Value::String(_))) => {
            let found = format!("`prompt` is {}, `completion` is {}", type_name(&prompt), type_name(&completion));
            Err(Fault::new(found, "both strings or both lists of messages"))
        }
        (Some(prompt), Some(completion)) => {
            Ok(Row::Completion { prompt: string("prompt", prompt)?, completion: string("completion", completion)? })
        }
        _ => {
            let keys: Vec<String> = map.keys().take(8).map(|k| format!("`{k}`")).collect();
            let found = if keys.is_empty() { "an empty object".into() } else { format!("keys {}", keys.join(", ")) };
            Err(Fault::new(found, KINDS))
        }
    }
}

fn string(key: &str, value: Value) -> Result<String, Fault> {
    match value {
        Value::String(s) => Ok(s),
        other => Err(Fault::at(key, type_name(&other), "a string")),
    }
}

fn messages(key: &str, value: Value) -> Result<Vec<Message>, Fault> {
    let Value::Array(items) = value else {
        return Err(Fault::at(key, type_name(&value), "a list of messages"));
    };
    if items.is_empty() {
        return Err(Fault::at(key, "an empty list", "at least one message"));
    }
    items.into_iter().enumerate().map(|(i, item)| message(&format!("{key}[{i}]"), item)).collect()
}

fn message(place: &str, item: Value) -> Result<Message, Fault> {
    let Value::Object(mut extra) = item else {
        return Err(Fault::at(place, type_name(&item), "an object with `role` and `content`"));
    };
    let role = match extra.remove("role") {
        Some(Value::String(role)) if !role.is_empty() => role,
        Some(Value::String(_)) => return Err(Fault::at(format!("{place}.role"), "an empty string", "a role")),
        Some(other) => return Err(Fault::at(format!("{place}.role"), type_name(&other), "a string")),
        None => return Err(Fault::at(place, "no `role`", "an object with `role` and `content`")),
    };
    let content = match extra.remove("content") {
        Some(Value::String(content)) => content,
        // The answer that only calls tools: the template sees the null.
        None | Some(Value::Null) if extra.contains_key("tool_calls") => {
            extra.insert("content".into(), Value::Null);
            String::new()
        }
        Some(other) => {
            return Err(Fault::at(format!("{place}.content"), type_name(&other), "a string (text is all we train on)"));
        }
        None => return Err(Fault::at(place, "no `content`", "an object with `role` and `content`")),
    };
    Ok(Message { role, content, extra })
}

fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    fn fault(line: &str) -> String {
        let f = parse(7, line.as_bytes()).expect_err(line);
        f.into_error(Path::new("d.jsonl"), 7).to_string()
    }

    fn lines(bytes: &[u8]) -> Vec<(usize, Vec<u8>)> {
        let mut lines = Lines::new(bytes, Path::new("d.jsonl"), MAX_LINE);
        std::iter::from_fn(|| lines.next_line().unwrap()).collect()
    }

    #[test]
    fn the_three_kinds_are_read() {
        let row = |s: &str| parse(1, s.as_bytes()).unwrap().unwrap();
        assert_eq!(row(r#"{"text": "a", "id": 3}"#), Row::Text("a".into()));
        let pc = row(r#"{"prompt": "a", "completion": "b"}"#);
        assert_eq!(pc, Row::Completion { prompt: "a".into(), completion: "b".into() });
        let chat = row(r#"{"messages": [{"role": "user", "content": "a", "name": "x"}], "prompt": "kept by the set"}"#);
        let Row::Chat { messages, tools } = chat else { panic!("{chat:?}") };
        assert_eq!((messages[0].role.as_str(), messages[0].content.as_str()), ("user", "a"));
        assert_eq!(messages[0].extra["name"], "x");
        assert_eq!(tools, Value::Null);
        let both =
            r#"{"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}"#;
        assert!(matches!(row(both), Row::ChatCompletion { prompt: 1, ref messages, .. } if messages.len() == 2));
    }

    #[test]
    fn a_call_of_a_tool_may_have_no_content() {
        let line = r#"{"messages": [{"role": "assistant", "content": null, "tool_calls": [1]}]}"#;
        let Some(Row::Chat { messages, .. }) = parse(1, line.as_bytes()).unwrap() else { panic!() };
        assert_eq!(messages[0].extra["content"], Value::Null);
    }

    #[test]
    fn wrong_rows_say_what_and_where() {
        for (line, wants) in [
            (r#"{"text": 5}"#, "d.jsonl: line 7, text: found a number, expected a string"),
            (r#"{"text": "a""#, "line 7, column 12: found malformed JSON (EOF"),
            (r#"{"text": "a", "messages": []}"#, "found `messages` and `text` in one row"),
            (r#"{"prompt": "a"}"#, "found `prompt` without `completion`"),
            (r#"{"completion": "a"}"#, "found `completion` without `prompt`"),
            (r#"{"prompt": "a", "completion": []}"#, "`completion` is a list, expected both strings"),
            (r#"{"prompt": 1, "completion": "x"}"#, "line 7, prompt: found a number"),
            (r#"{"instruction": "a", "output": "b"}"#, "found keys `instruction`, `output`, expected `text`"),
            (r"{}", "found an empty object"),
            (r"[1]", "found a list, expected a JSON object"),
            (r#"{"messages": "hi"}"#, "line 7, messages: found a string"),
            (r#"{"messages": []}"#, "found an empty list"),
            (r#"{"messages": ["hi"]}"#, "line 7, messages[0]: found a string"),
            (r#"{"messages": [{"content": "a"}]}"#, "messages[0]: found no `role`"),
            (r#"{"messages": [{"role": 1, "content": "a"}]}"#, "messages[0].role: found a number"),
            (r#"{"messages": [{"role": "", "content": "a"}]}"#, "messages[0].role: found an empty string"),
            (r#"{"messages": [{"role": "user"}]}"#, "messages[0]: found no `content`"),
            (r#"{"messages": [{"role": "user", "content": [{"type": "text"}]}]}"#, "messages[0].content: found a list"),
            (r#"{"messages": [{"role": "user", "content": "a"}], "tools": "x"}"#, "line 7, tools: found a string"),
            (
                r#"{"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "user", "content": "a"}]}"#,
                "completion[0]: found role `user`",
            ),
        ] {
            let message = fault(line);
            assert!(message.contains(wants), "{line}\n  says {message}\n  wants {wants}");
        }
    }

    #[test]
    fn a_json_document_over_many_lines_is_explained() {
        let message = parse(1, b"[").unwrap_err().expected;
        assert!(message.contains("not one JSON document"), "{message}");
    }

    #[test]
    fn nesting_without_end_is_an_error() {
        let line = format!("{{\"text\": {}", "[".repeat(100_000));
        assert!(fault(&line).contains("recursion limit"), "{}", fault(&line));
    }

    #[test]
    fn bytes_that_are_not_utf8_are_named() {
        let message = parse(3, b"{\"text\": \"\xff\"}").unwrap_err().into_error(Path::new("x"), 3).to_string();
        assert!(message.contains("line 3, byte 11: found byte 0xff"), "{message}");
    }

    #[test]
    fn line_ends_marks_and_blank_lines_do_not_matter() {
        let file = b"\xEF\xBB\xBF{\"text\": \"a\"}\r\n\r\n  \n{\"text\": \"b\"}";
        let rows: Vec<_> =
            lines(file).into_iter().filter_map(|(n, l)| parse(n, &l).unwrap().map(|row| (n, row))).collect();
        assert_eq!(rows, [(1, Row::Text("a".into())), (4, Row::Text("b".into()))]);
    }

    #[test]
    fn a_gigabyte_without_a_line_end_is_refused_early() {
        let endless = BufReader::new(io::repeat(b'a').take(1 << 30));
        let mut lines = Lines::new(endless, Path::new("d.jsonl"), MAX_LINE);
        let message = lines.next_line().unwrap_err().to_string();
        assert!(message.contains("line 1: found more than 67108864 bytes without a line end"), "{message}");
        assert!(lines.bytes <= MAX_LINE as u64);
    }
}
