//! The one error type of the library. Values with fields, so that a caller can tell a bad file from a full disk.

use std::io;
use std::path::{Path, PathBuf};

pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong. [`Error::exit_code`] gives the process exit code of the command line.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file, data row, tensor or config key that is not what it must be. Exit code 2.
    #[error("{}: {place}: found {found}, expected {expected}", file.display())]
    Input { file: PathBuf, place: String, found: String, expected: String },

    /// A command-line flag or a run-file key with an unusable value. Exit code 2.
    #[error("{flag}: found {found}, expected {expected}")]
    Flag { flag: String, found: String, expected: String },

    /// The operating system refused to read `path`. Exit code 2: the path came from the user.
    #[error("{}: cannot {action}: {source}", path.display())]
    Read { action: &'static str, path: PathBuf, source: io::Error },

    /// The operating system refused to write `path` (full disk, no permission). Exit code 1.
    #[error("{}: cannot {action}: {source}", path.display())]
    Write { action: &'static str, path: PathBuf, source: io::Error },

    /// An op got an argument of the wrong size: a bug in the caller, found before anything runs. Exit code 1.
    #[error("op {op}: argument {argument}: found {found} elements, expected {expected}")]
    Shape { op: &'static str, argument: &'static str, found: usize, expected: usize },

    /// A loss or a gradient that is not finite stops a run. Exit code 1.
    #[error("step {step}: {what} is {value}; rows of the step: {rows}; last good checkpoint: {checkpoint}")]
    NotFinite { step: u64, what: &'static str, value: f32, rows: String, checkpoint: String },

    /// The GPU, its driver, or a kernel launch. Exit code 1.
    #[error("CUDA: {op}: {detail}")]
    Cuda { op: String, detail: String },

    /// The requested device or feature is not there. Exit code 2.
    #[error("{what} is not available: {why}")]
    Unavailable { what: String, why: String },

    /// A gate on results found rows that are slower than they were. Exit code 3.
    #[error("{}: rows slower by more than {percent} %: {rows}, the first: {first}", file.display())]
    Slower { file: PathBuf, rows: usize, percent: f64, first: String },
}

impl Error {
    /// A fault in an input file: `file`, the place in it (line, key, tensor name), what was found, what was expected.
    pub fn input(
        file: impl AsRef<Path>,
        place: impl Into<String>,
        found: impl Into<String>,
        expected: impl Into<String>,
    ) -> Self {
        Self::Input { file: file.as_ref().into(), place: place.into(), found: found.into(), expected: expected.into() }
    }

    /// An unusable flag or run-file key.
    pub fn flag(flag: impl Into<String>, found: impl Into<String>, expected: impl Into<String>) -> Self {
        Self::Flag { flag: flag.into(), found: found.into(), expected: expected.into() }
    }

    /// For `map_err` on reads: `fs::read(p).map_err(Error::read("open", p))`.
    pub fn read(action: &'static str, path: impl AsRef<Path>) -> impl FnOnce(io::Error) -> Self {
        let path = path.as_ref().to_path_buf();
        move |source| Self::Read { action, path, source }
    }

    /// For `map_err` on writes.
    pub fn write(action: &'static str, path: impl AsRef<Path>) -> impl FnOnce(io::Error) -> Self {
        let path = path.as_ref().to_path_buf();
        move |source| Self::Write { action, path, source }
    }

    /// 2 when the user's input is at fault, 3 when a gate does not open, else 1.
    pub fn exit_code(&self) -> i32 {
        match self {
            Self::Input { .. } | Self::Flag { .. } | Self::Read { .. } | Self::Unavailable { .. } => 2,
            Self::Slower { .. } => 3,
            Self::Write { .. } | Self::Shape { .. } | Self::NotFinite { .. } | Self::Cuda { .. } => 1,
        }
    }
}
