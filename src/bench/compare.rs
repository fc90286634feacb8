//! Two files of results against each other: which rows became slower or faster, beyond what their samples scatter.
//!
//! Rows match by their key: whatever says what was timed and on which card, but not when, at which commit, with which
//! driver or version of a tool. A row stands for the interval from its least to its most sample. It has moved if the old
//! and the new interval have no point in common; its ratio is that of the medians, new over old, of time.

use std::collections::HashMap;
use std::fmt;
use std::path::Path;

use serde::Serialize;

use super::results::{self, DecodeRow, KernelRow, LoadRow, Row, StepOpRow, StepRow, Table};
use crate::error::{Error, Result};

/// Half the width of the interval of a row that has no least and most, as a share of its value.
pub const ASSUMED_SPREAD: f64 = 0.05;

/// What tells a row from the others of its table: names of columns and their cells.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Key(Vec<(&'static str, String)>);

impl Key {
    fn get(&self, column: &str) -> &str {
        self.0.iter().find(|(name, _)| *name == column).map_or("", |(_, value)| value)
    }

    /// The op that was timed, "" in a table that has none.
    pub fn op(&self) -> &str {
        self.get("op")
    }

    /// The name without the columns in which `leave` says so.
    pub fn name(&self, leave: impl Fn(&str) -> bool) -> String {
        let word = |(column, value): &(&str, String)| match *column {
            "tool" | "card" | "model" | "op" | "shape" | "implementation" | "optim" | "phase" => value.clone(),
            _ => format!("{column} {value}"),
        };
        let told = self.0.iter().filter(|(column, value)| !value.is_empty() && !leave(column));
        told.map(word).collect::<Vec<_>>().join(", ")
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(&self.name(|_| false))
    }
}

impl Serialize for Key {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(column, value)| (column, value)))
    }
}

/// The times of a row, in its table's unit.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Time {
    pub median: f64,
    pub least: f64,
    pub most: f64,
}

impl Time {
    fn new(median: f64, least: f64, most: f64) -> Self {
        match least > 0.0 && least <= median && median <= most {
            true => Self { median, least, most },
            false => Self::alone(median),
        }
    }

    /// Of a single sample.
    fn alone(median: f64) -> Self {
        Self { median, least: median * (1.0 - ASSUMED_SPREAD), most: median * (1.0 + ASSUMED_SPREAD) }
    }
}

/// How a row moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Move {
    Slower,
    Faster,
}

/// A row of both files.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Pair {
    pub key: Key,
    pub old: Time,
    pub new: Time,
    /// Median of new over median of old: above 1 it takes longer.
    pub ratio: f64,
    /// None while the two intervals of samples overlap.
    pub moved: Option<Move>,
}

impl Pair {
    fn new(key: Key, old: Time, new: Time) -> Self {
        let moved = if new.least > old.most {
            Some(Move::Slower)
        } else if new.most < old.least {
            Some(Move::Faster)
        } else {
            None
        };
        Self { key, old, new, ratio: new.median / old.median, moved }
    }
}

/// Two files of one table against each other.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Comparison {
    /// [`Row::TABLE`] of both.
    pub table: &'static str,
    /// Of all times.
    pub unit: &'static str,
    /// In the order of the new file.
    pub pairs: Vec<Pair>,
    pub only_old: Vec<Key>,
    pub only_new: Vec<Key>,
}

impl Comparison {
    /// How many rows moved so.
    pub fn count(&self, moved: Move) -> usize {
        self.pairs.iter().filter(|p| p.moved == Some(moved)).count()
    }

    /// Rows that are slower beyond their spread and by more than `percent`, but for the ops of `allow`.
    pub fn regressions(&self, percent: f64, allow: &[String]) -> Vec<&Pair> {
        let worst = 1.0 + percent / 100.0;
        let fails = |p: &&Pair| p.moved == Some(Move::Slower) && p.ratio > worst;
        self.pairs.iter().filter(fails).filter(|p| !allow.iter().any(|op| op == p.key.op())).collect()
    }

    /// Whether a column of the keys has the same cell in every pair, and so tells none from another.
    pub fn is_constant(&self, column: &str) -> bool {
        let mut cells = self.pairs.iter().map(|p| p.key.get(column));
        let first = cells.next();
        cells.all(|cell| Some(cell) == first)
    }
}

/// A row whose time can be compared.
trait Timed: Row {
    const UNIT: &'static str;
    /// Of each phase; "" where there is but one.
    fn times(&self) -> Vec<(&'static str, Time)>;
}

impl Key {
    fn of<R: Timed>(row: &R, phase: &str) -> Self {
        let cells = results::cells(row, R::MEASURED);
        let mut key: Vec<(&'static str, String)> = R::MEASURED.iter().copied().zip(cells).collect();
        for (_, cell) in key.iter_mut().filter(|(column, _)| *column == "tool") {
            *cell = tool(cell).into();
        }
        if !phase.is_empty() {
            // The card stays last.
            key.insert(key.len() - 1, ("phase", phase.into()));
        }
        Self(key)
    }
}

/// "bitsandbytes 0.50.2" is bitsandbytes; tables were halfbyte's own before they named a tool.
fn tool(text: &str) -> &str {
    text.split_whitespace().next().unwrap_or("halfbyte")
}

impl Timed for KernelRow {
    const UNIT: &'static str = "us";
    fn times(&self) -> Vec<(&'static str, Time)> {
        vec![("", Time::new(self.median_us, self.least_us, self.most_us))]
    }
}

impl Timed for StepRow {
    const UNIT: &'static str = "ms";
    fn times(&self) -> Vec<(&'static str, Time)> {
        vec![("", Time::new(self.ms, self.ms_min, self.ms_max))]
    }
}

impl Timed for StepOpRow {
    const UNIT: &'static str = "ms";
    fn times(&self) -> Vec<(&'static str, Time)> {
        vec![("", Time::alone(self.op_ms))]
    }
}

impl Timed for DecodeRow {
    const UNIT: &'static str = "ms";
    fn times(&self) -> Vec<(&'static str, Time)> {
        vec![("", Time::new(self.ms, self.ms_min, self.ms_max))]
    }
}

impl Timed for LoadRow {
    const UNIT: &'static str = "s";
    fn times(&self) -> Vec<(&'static str, Time)> {
        vec![("cold", Time::alone(self.cold_seconds)), ("warm", Time::alone(self.warm_seconds))]
    }
}

/// The times of one file.
struct Times {
    table: &'static str,
    unit: &'static str,
    rows: Vec<(Key, Time)>,
}

impl Times {
    fn read(path: &Path) -> Result<Self> {
        Ok(match results::read(path)? {
            Table::Kernels(rows) => Self::of(&rows),
            Table::Steps(rows) => Self::of(&rows),
            Table::StepOps(rows) => Self::of(&rows),
            Table::Decode(rows) => Self::of(&rows),
            Table::Load(rows) => Self::of(&rows),
        })
    }

    /// Of several rows with one key the last counts.
    fn of<R: Timed>(all: &[R]) -> Self {
        let times =
            |row: &R| row.times().into_iter().map(|(phase, time)| (Key::of(row, phase), time)).collect::<Vec<_>>();
        let rows = results::last_of_each(all.iter().flat_map(times), |(key, _)| key.clone());
        Self { table: R::TABLE, unit: R::UNIT, rows }
    }

    /// The cells of a column, each once.
    fn cells(&self, column: &str) -> Vec<&str> {
        let mut cells: Vec<&str> = self.rows.iter().map(|(key, _)| key.get(column)).collect();
        cells.sort_unstable();
        cells.dedup();
        cells
    }
}

/// Compares two files of one table. Errors as [`results::read`], and [`Error::Input`] if they hold different tables or
/// have no row in common.
pub fn compare(old_path: &Path, new_path: &Path) -> Result<Comparison> {
    between(&Times::read(old_path)?, old_path, &Times::read(new_path)?, new_path)
}

/// The same of rows that were measured just now and those of `old_path`. [`Error::Input`] if they have none in common.
pub fn against(old_path: &Path, old: &[KernelRow], rows: &[KernelRow]) -> Result<Comparison> {
    between(&Times::of(old), old_path, &Times::of(rows), Path::new("this run"))
}

fn between(old: &Times, old_path: &Path, new: &Times, new_path: &Path) -> Result<Comparison> {
    if old.table != new.table {
        let expected = format!("a table of {}, as {} holds", old.table, old_path.display());
        return Err(Error::input(new_path, "line 1", format!("a table of {}", new.table), expected));
    }
    let mut left: HashMap<&Key, Time> = old.rows.iter().map(|(key, time)| (key, *time)).collect();
    let (mut pairs, mut only_new) = (vec![], vec![]);
    for (key, time) in &new.rows {
        match left.remove(key) {
            Some(before) => pairs.push(Pair::new(key.clone(), before, *time)),
            None => only_new.push(key.clone()),
        }
    }
    if pairs.is_empty() {
        let (found, expected) = apart(old, new);
        return Err(Error::input(new_path, "its rows", found, format!("{expected}, as in {}", old_path.display())));
    }
    let only_old = old.rows.iter().map(|(key, _)| key).filter(|key| left.contains_key(key)).cloned().collect();
    Ok(Comparison { table: new.table, unit: new.unit, pairs, only_old, only_new })
}

/// Why no row of `old` is one of `new`: what was found and what was expected.
fn apart(old: &Times, new: &Times) -> (String, String) {
    let (Some((key, _)), false) = (new.rows.first(), old.rows.is_empty()) else {
        let rows = |times: &Times| format!("{} rows of {}", times.rows.len(), times.table);
        return (rows(new), rows(old));
    };
    let list = |cells: &[&str]| match cells {
        [first, second, third, .., last] => format!("{first:?}, {second:?}, {third:?} .. {last:?}"),
        few => few.iter().map(|cell| format!("{cell:?}")).collect::<Vec<_>>().join(", "),
    };
    // The card first: it is what most often differs, and nothing else matters then.
    for (column, _) in key.0.iter().rev() {
        let (was, is) = (old.cells(column), new.cells(column));
        if !is.iter().any(|cell| was.contains(cell)) {
            return (format!("{column} {}", list(&is)), format!("{column} {}", list(&was)));
        }
    }
    (format!("{} rows of other keys", new.rows.len()), format!("a row such as {}", old.rows[0].0))
}
