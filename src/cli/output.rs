//! Standard output and notes: a closed pipe ends a command quietly, a full disk is an error, nothing here panics.

use std::fmt::Arguments;
use std::io::{self, Write};

use halfbyte::{Error, Result};

const STDOUT: &str = "standard output";

/// Standard output, buffered by line. [`Out::flush`] must be the last call: an error of a drop would be lost.
pub struct Out(io::Stdout);

impl Out {
    pub fn new() -> Self {
        Self(io::stdout())
    }

    pub fn line(&mut self, text: Arguments) -> Result<()> {
        writeln!(self.0, "{text}").map_err(Error::write("write", STDOUT))
    }

    /// Text without a line end, shown at once.
    pub fn text(&mut self, text: &str) -> Result<()> {
        self.0.write_all(text.as_bytes()).map_err(Error::write("write", STDOUT))?;
        self.flush()
    }

    /// One JSON value, indented, and a line end.
    pub fn json(&mut self, value: &serde_json::Value) -> Result<()> {
        self.line(format_args!("{value:#}"))
    }

    /// Anything that serde writes, as JSON.
    pub fn value(&mut self, value: &impl serde::Serialize) -> Result<()> {
        let value = serde_json::to_value(value).map_err(|e| Error::write("write", STDOUT)(io::Error::other(e)))?;
        self.json(&value)
    }

    pub fn flush(&mut self) -> Result<()> {
        self.0.flush().map_err(Error::write("write", STDOUT))
    }
}

/// `put!(out, "format", ..)?`: a line on standard output.
macro_rules! put {
    ($out:expr) => { $out.line(format_args!("")) };
    ($out:expr, $($arg:tt)*) => { $out.line(format_args!($($arg)*)) };
}
pub(crate) use put;

/// A line on standard error. Whoever closed it does not want it.
pub fn note(text: Arguments) {
    let _ = writeln!(io::stderr(), "{text}");
}

/// Whether the reader of standard output went away (`halfbyte inspect DIR | head`).
pub fn is_closed_pipe(e: &Error) -> bool {
    matches!(e, Error::Write { path, source, .. }
        if path.as_os_str() == STDOUT && source.kind() == io::ErrorKind::BrokenPipe)
}

/// "1.50 GiB", "12 B".
pub fn bytes(n: u64) -> String {
    let units = ["KiB", "MiB", "GiB", "TiB"];
    if n < 1024 {
        return format!("{n} B");
    }
    let mut value = n as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1023.995 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.2} {}", units[unit])
}

/// "134,515,008".
pub fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(c);
    }
    out
}

/// Columns padded to their widest cell; columns listed in `right` are aligned right.
pub fn table(rows: &[Vec<String>], right: &[usize]) -> Vec<String> {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |c: usize| rows.iter().filter_map(|r| r.get(c)).map(|s| s.chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let cell = |(c, s): (usize, &String)| {
        let pad = " ".repeat(widths[c] - s.chars().count());
        if right.contains(&c) { format!("{pad}{s}") } else { format!("{s}{pad}") }
    };
    rows.iter().map(|r| r.iter().enumerate().map(cell).collect::<Vec<_>>().join("  ").trim_end().to_string()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_readable() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1024), "1.00 KiB");
        assert_eq!(bytes(1024 * 1024 - 1), "1.00 MiB");
        assert_eq!(bytes(14_500_000_000), "13.50 GiB");
        assert_eq!(grouped(7), "7");
        assert_eq!(grouped(134_515_008), "134,515,008");
    }

    #[test]
    fn table_columns_line_up() {
        let rows = [vec!["a".to_string(), "1".into()], vec!["long".into(), "200".into()]];
        assert_eq!(table(&rows, &[1]), ["a       1", "long  200"]);
    }
}
