//! The rows of `bench/results/*.csv`: a type for each kind of table, read from and appended to CSV files.
//!
//! A table's kind is told by its columns. Files of earlier versions lack some columns: these read as their default. A file
//! is only appended to by rows of exactly its columns, so that none is ever misaligned.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fs::{File, OpenOptions};
use std::hash::Hash;
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::path::Path;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{Error, Result};

/// A type of row: its columns are the names of its fields, in order.
pub trait Row: Serialize + DeserializeOwned + Default {
    /// What the table is called in messages.
    const TABLE: &'static str;
    /// Columns that tell this table from the others.
    const KEYS: &'static [&'static str];
    /// Columns that say what was measured and on what, the card last. With the commit they are a row's name.
    const MEASURED: &'static [&'static str];
}

/// The cells of some columns as text, "" where there is nothing.
pub fn cells(row: &impl Row, columns: &[&str]) -> Vec<String> {
    let row = serde_json::to_value(row).unwrap_or_default();
    let cell = |column: &&str| match &row[*column] {
        Value::String(text) => text.clone(),
        Value::Null => String::new(),
        // 0, not 0.0.
        Value::Number(n) if n.is_f64() => n.as_f64().unwrap_or_default().to_string(),
        other => other.to_string(),
    };
    columns.iter().map(cell).collect()
}

/// Rows whose key none behind them has, each in the place of the first. Files are appended to: the last counts.
pub fn last_of_each<T, K: Eq + Hash>(rows: impl IntoIterator<Item = T>, key: impl Fn(&T) -> K) -> Vec<T> {
    let mut places: HashMap<K, usize> = HashMap::new();
    let mut kept = vec![];
    for row in rows {
        match places.entry(key(&row)) {
            Entry::Occupied(place) => kept[*place.get()] = row,
            Entry::Vacant(place) => {
                place.insert(kept.len());
                kept.push(row);
            }
        }
    }
    kept
}

/// One implementation of one op at one shape: `halfbyte bench kernels`, `bench OP --candidate`, scripts/peers.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct KernelRow {
    /// Year-month-day.
    pub date: String,
    /// Who computed: "halfbyte", or a peer with its version, e.g. "bitsandbytes 0.50.2".
    pub tool: String,
    /// Commit of halfbyte that ran or whose script ran, "" if unknown.
    pub commit: String,
    /// Name of the GPU, or of the CPU and its threads.
    pub card: String,
    pub driver: String,
    /// Clocks as NVML reads them right behind the row's last sample.
    pub sm_mhz: Option<u32>,
    pub memory_mhz: Option<u32>,
    /// Whose shapes: "1b", "7b", "13b", "toy".
    pub model: String,
    pub op: String,
    pub shape: String,
    /// Tokens T of the shape; None where the op has none.
    pub tokens: Option<usize>,
    pub implementation: String,
    pub samples: usize,
    pub median_us: f64,
    pub least_us: f64,
    pub most_us: f64,
    /// That the op must read and write at least once.
    pub bytes: f64,
    /// Floating-point operations of its matrix products.
    pub flops: f64,
    pub gb_per_s: f64,
    pub tflop_per_s: f64,
    /// The two ceilings as measured in the same run: copy, read and write counted, and the best product.
    pub copy_gb_per_s: f64,
    pub product_tflop_per_s: f64,
    /// max(bytes / copy, flops / product).
    pub floor_us: f64,
    pub percent_of_floor: f64,
    /// Elements compared with the oracle; all were within its tolerance.
    pub checked: usize,
    /// Kernels that one run launches, and of them the most registers of a thread, bytes of a thread in local memory and
    /// shared memory of a block, and the least occupancy (0 to 1). None of a CPU or a peer.
    pub launches: Option<usize>,
    pub registers: Option<u32>,
    pub local_bytes: Option<u32>,
    pub shared_bytes: Option<u32>,
    pub occupancy: Option<f64>,
}

/// A training step: `halfbyte bench step`, scripts/peers.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct StepRow {
    pub date: String,
    pub tool: String,
    pub commit: String,
    pub card: String,
    pub driver: String,
    pub sm_mhz: Option<u32>,
    pub memory_mhz: Option<u32>,
    pub shape: String,
    pub batch: usize,
    pub length: usize,
    /// "true", "false", or "auto": the fastest that fits.
    pub gradient_checkpointing: String,
    /// The budget asked for, "" for none.
    pub memory: String,
    pub r: usize,
    pub lora_dropout: f64,
    pub optim: String,
    pub steps: usize,
    pub ms: f64,
    pub ms_min: f64,
    pub ms_max: f64,
    pub tokens_per_second: f64,
    pub tflops_ceiling: Option<f64>,
    pub bound_tokens_per_second: Option<f64>,
    pub percent_of_bound: Option<f64>,
    /// Of device memory: the arena; of a peer, the peak of its allocator.
    pub arena_bytes: Option<u64>,
    pub optimizer_bytes: Option<u64>,
    pub host_bytes: Option<u64>,
    pub planned_bytes: Option<u64>,
    /// As the driver counts, libraries and context included.
    pub driver_bytes: Option<u64>,
    pub planned_ms: Option<f64>,
    pub layers: String,
    pub loss: f64,
    pub load_seconds: f64,
}

/// What one op takes of a training step, all its calls together: `halfbyte bench step --ops`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct StepOpRow {
    pub date: String,
    pub tool: String,
    pub commit: String,
    pub card: String,
    pub driver: String,
    pub shape: String,
    pub batch: usize,
    pub length: usize,
    pub gradient_checkpointing: String,
    pub memory: String,
    /// Median of a whole step whose ops are not timed.
    pub step_ms: f64,
    /// The same while they are: what is more is the cost of timing.
    pub timed_step_ms: f64,
    pub op: String,
    pub calls: usize,
    pub op_ms: f64,
    pub bytes: f64,
    pub flops: f64,
    pub floor_ms: f64,
    pub percent_of_floor: f64,
}

/// The generation of one token after another: `halfbyte bench decode`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct DecodeRow {
    pub date: String,
    pub card: String,
    pub commit: String,
    pub shape: String,
    pub past: usize,
    pub tokens: usize,
    pub r: usize,
    pub ms: f64,
    pub ms_min: f64,
    pub ms_max: f64,
    pub tokens_per_second: f64,
}

/// How a model directory gets onto the device: `halfbyte bench load`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LoadRow {
    pub date: String,
    pub card: String,
    pub commit: String,
    pub model: String,
    pub bytes: u64,
    pub disk_gb_per_s: f64,
    pub pcie_gb_per_s: Option<f64>,
    pub cold_gb_per_s: f64,
    pub cold_seconds: f64,
    pub warm_gb_per_s: f64,
    pub warm_seconds: f64,
}

macro_rules! row {
    ($type:ty, $table:literal, $keys:expr, $measured:expr) => {
        impl Row for $type {
            const TABLE: &'static str = $table;
            const KEYS: &'static [&'static str] = &$keys;
            const MEASURED: &'static [&'static str] = &$measured;
        }
    };
}
row!(
    KernelRow,
    "kernels",
    ["op", "implementation", "median_us"],
    // A shape tells its tokens.
    ["tool", "model", "op", "shape", "implementation", "card"]
);
row!(
    StepRow,
    "steps",
    ["shape", "batch", "length", "tokens_per_second"],
    ["tool", "shape", "batch", "length", "gradient_checkpointing", "memory", "r", "lora_dropout", "optim", "card"]
);
row!(
    StepOpRow,
    "step ops",
    ["shape", "batch", "length", "op", "op_ms"],
    ["tool", "shape", "batch", "length", "gradient_checkpointing", "memory", "op", "card"]
);
row!(DecodeRow, "decode", ["shape", "past", "tokens_per_second"], ["shape", "past", "tokens", "r", "card"]);
row!(LoadRow, "load", ["model", "disk_gb_per_s"], ["model", "card"]);

/// A measured value as it goes into a row: six significant digits, for the rest is noise.
pub fn figure(value: f64) -> f64 {
    format!("{value:.5e}").parse().unwrap_or(value)
}

const EXPECTED_ROW: &str = "a row of a table that `halfbyte bench` or scripts/peers wrote";

/// All rows of a CSV file, whatever table it holds.
#[derive(Clone, Debug, PartialEq)]
pub enum Table {
    Kernels(Vec<KernelRow>),
    Steps(Vec<StepRow>),
    StepOps(Vec<StepOpRow>),
    Decode(Vec<DecodeRow>),
    Load(Vec<LoadRow>),
}

/// The rows of a CSV file of any kind. [`Error::Read`], or [`Error::Input`] that names the line.
pub fn read(path: &Path) -> Result<Table> {
    let text = text(path)?;
    let columns = columns(path, &text)?;
    let is = |keys: &[&str]| keys.iter().all(|key| columns.iter().any(|c| c == key));
    if is(StepOpRow::KEYS) {
        return Ok(Table::StepOps(rows(path, &text)?));
    } else if is(KernelRow::KEYS) {
        return Ok(Table::Kernels(rows(path, &text)?));
    } else if is(DecodeRow::KEYS) {
        return Ok(Table::Decode(rows(path, &text)?));
    } else if is(StepRow::KEYS) {
        return Ok(Table::Steps(rows(path, &text)?));
    } else if is(LoadRow::KEYS) {
        return Ok(Table::Load(rows(path, &text)?));
    }
    let expected = "the columns of a table that `halfbyte bench` or scripts/peers writes";
    Err(Error::input(path, "line 1", format!("columns {}", columns.join(",")), expected))
}

/// The rows of a CSV file of this kind. Errors as [`read`], and [`Error::Input`] if it holds another table.
pub fn read_rows<R: Row>(path: &Path) -> Result<Vec<R>> {
    let text = text(path)?;
    let columns = columns(path, &text)?;
    match R::KEYS.iter().find(|key| !columns.iter().any(|c| c == *key)) {
        None => rows(path, &text),
        Some(key) => {
            let found = format!("no column {key:?} among {}", columns.join(","));
            Err(Error::input(path, "line 1", found, format!("a table of {}", R::TABLE)))
        }
    }
}

/// A file of results: regular, or a pipe that ends; a directory is no table.
fn text(path: &Path) -> Result<String> {
    if path.is_dir() {
        return Err(Error::input(path, "the path", "a directory", "a CSV file"));
    }
    std::fs::read_to_string(path).map_err(Error::read("read", path))
}

fn columns(path: &Path, text: &str) -> Result<Vec<String>> {
    let mut reader = csv::Reader::from_reader(text.as_bytes());
    let headers = reader.headers().map_err(|e| malformed(path, &e))?;
    Ok(headers.iter().map(str::to_string).collect())
}

fn rows<R: Row>(path: &Path, text: &str) -> Result<Vec<R>> {
    let mut reader = csv::Reader::from_reader(text.as_bytes());
    let headers = reader.headers().map_err(|e| malformed(path, &e))?.clone();
    let row = |record: csv::Result<csv::StringRecord>| {
        let record = record.map_err(|e| malformed(path, &e))?;
        record.deserialize(Some(&headers)).map_err(|e| unreadable(path, &e, &headers, &record))
    };
    reader.records().map(row).collect()
}

fn malformed(path: &Path, error: &csv::Error) -> Error {
    let found = match error.kind() {
        csv::ErrorKind::UnequalLengths { expected_len, len, .. } => format!("{len} cells under {expected_len} columns"),
        _ => error.to_string(),
    };
    Error::input(path, line(error.position()), found, EXPECTED_ROW)
}

/// A cell that is not of its column's type.
fn unreadable(path: &Path, error: &csv::Error, headers: &csv::StringRecord, record: &csv::StringRecord) -> Error {
    let csv::ErrorKind::Deserialize { err, .. } = error.kind() else { return malformed(path, error) };
    let cell = |cells: &csv::StringRecord| err.field().and_then(|i| cells.get(i as usize).map(str::to_string));
    let (column, value) = (cell(headers).unwrap_or_default(), cell(record).unwrap_or_default());
    let place = format!("{}, column {column:?}", line(record.position()));
    Error::input(path, place, format!("{value:?} ({})", err.kind()), EXPECTED_ROW)
}

fn line(position: Option<&csv::Position>) -> String {
    position.map_or("the table".into(), |p| format!("line {}", p.line()))
}

/// The names of a row's columns.
fn names<R: Row>() -> Vec<String> {
    let mut writer = csv::Writer::from_writer(vec![]);
    let written = writer.serialize(R::default());
    debug_assert!(written.is_ok(), "a row is flat");
    let bytes = writer.into_inner().unwrap_or_default();
    let mut reader = csv::Reader::from_reader(&bytes[..]);
    reader.headers().map(|h| h.iter().map(str::to_string).collect()).unwrap_or_default()
}

/// Whether rows can be appended in the end, asked before the time is spent; leaves no file behind. [`Error::Write`], or
/// [`Error::Input`] if the file holds another table or one of other columns.
pub fn can_append<R: Row>(path: &Path) -> Result<()> {
    // A link that leads nowhere is not ours to remove.
    let new = path.symlink_metadata().is_err();
    let mut file = open(path)?;
    let checked = has_columns::<R>(path, &mut file).map(|_| ());
    if new {
        std::fs::remove_file(path).map_err(Error::write("open", path))?;
    }
    checked
}

/// Appends rows; a new or empty file gets a line of names first. Errors as [`can_append`].
pub fn append<R: Row>(path: &Path, rows: &[R]) -> Result<()> {
    let mut file = open(path)?;
    let empty = !has_columns::<R>(path, &mut file)?;
    let mut writer = csv::WriterBuilder::new().has_headers(empty).from_writer(vec![]);
    for row in rows {
        writer.serialize(row).map_err(|e| Error::write("write a row to", path)(std::io::Error::other(e)))?;
    }
    let bytes = writer.into_inner().map_err(|e| Error::write("write a row to", path)(e.into_error()))?;
    // One write: a row is there whole or not at all.
    file.write_all(&bytes).map_err(Error::write("append to", path))
}

fn open(path: &Path) -> Result<File> {
    if path.is_dir() {
        return Err(Error::input(path, "the path", "a directory", "a CSV file, there or not"));
    }
    let mut options = OpenOptions::new();
    options.create(true).append(true).read(true).open(path).map_err(Error::write("open", path))
}

/// Whether the file has the line of names, which must be those of R; false if it is empty.
fn has_columns<R: Row>(path: &Path, file: &mut File) -> Result<bool> {
    let metadata = file.metadata().map_err(Error::read("open", path))?;
    if !metadata.is_file() {
        return Err(Error::input(path, "the path", "no regular file", "a CSV file"));
    }
    if metadata.len() == 0 {
        return Ok(false);
    }
    let mut text = String::new();
    file.seek(SeekFrom::Start(0)).and_then(|_| file.read_to_string(&mut text)).map_err(Error::read("read", path))?;
    let (found, expected) = (columns(path, &text)?, names::<R>());
    if found != expected {
        let found = format!("columns {}", found.join(","));
        return Err(Error::input(path, "line 1", found, format!("columns {} ({})", expected.join(","), R::TABLE)));
    }
    if !text.ends_with('\n') {
        return Err(Error::input(path, "the last line", "no line end", "a whole row: it was cut off"));
    }
    // Also a file that was cut off at a line end inside a cell is not to be appended to.
    rows::<R>(path, &text)?;
    Ok(true)
}
