//! metrics.jsonl: a line per logged step and per evaluation. A run that was stopped and resumed leaves the same lines as
//! one that was not, except for timings and memory.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::error::{Error, Result};

/// File name in the output folder.
pub const FILE: &str = "metrics.jsonl";

/// Training metrics since the last such line.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TrainRow {
    /// Optimizer steps done.
    pub step: u64,
    pub epoch: f64,
    /// Mean of the steps' losses.
    pub loss: f64,
    /// Of the last step, before clipping.
    pub grad_norm: f32,
    /// Of the last step.
    pub learning_rate: f64,
    /// Input tokens since step 1.
    pub tokens: u64,
    pub tokens_per_second: f64,
    /// Resident bytes of the process, now and at most; null where the system does not tell.
    pub memory: Option<u64>,
    pub memory_peak: Option<u64>,
}

/// Metrics of the held-out rows.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct EvalRow {
    pub step: u64,
    pub epoch: f64,
    /// Mean over all target tokens.
    pub eval_loss: f64,
    /// exp(eval_loss)
    pub eval_perplexity: f64,
    /// Target tokens.
    pub eval_tokens: u64,
    pub eval_rows: u64,
    /// Seconds.
    pub eval_runtime: f64,
}

/// Appends to metrics.jsonl.
#[derive(Debug)]
pub struct MetricsFile {
    path: PathBuf,
    file: File,
}

impl MetricsFile {
    /// Opens `dir`/metrics.jsonl for appending, without the lines after step `keep` (0: those of step 0 stay, `None`: none
    /// stays). A torn last line goes too: a kill may have cut it.
    pub fn open(dir: &Path, keep: Option<u64>) -> Result<Self> {
        let path = dir.join(FILE);
        let old = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(e) => return Err(Error::read("read", &path)(e)),
        };
        let kept: String =
            old.split_inclusive('\n').filter(|line| line.ends_with('\n') && step_of(line) <= keep).collect();
        if kept != old {
            // Atomic, so that a kill here loses nothing either.
            let temp = dir.join(format!(".{FILE}.tmp-{}", std::process::id()));
            std::fs::write(&temp, &kept).map_err(Error::write("write", &temp))?;
            std::fs::rename(&temp, &path).map_err(Error::write("replace", &path))?;
        }
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&path)
            .map_err(Error::write("open for writing", &path))?;
        Ok(Self { path, file })
    }

    /// Appends one line, in one write.
    pub fn append(&mut self, row: &impl Serialize) -> Result<()> {
        let write = || Error::write("append to", &self.path);
        let mut line = serde_json::to_string(row).map_err(|e| write()(e.into()))?;
        line.push('\n');
        self.file.write_all(line.as_bytes()).map_err(write())
    }

    /// Brings all lines to the disk: before a checkpoint that stands for them.
    pub fn sync(&mut self) -> Result<()> {
        self.file.sync_data().map_err(Error::write("sync", &self.path))
    }
}

/// The step of a line; a line that says none counts as later than any.
fn step_of(line: &str) -> Option<u64> {
    let value: Option<serde_json::Value> = serde_json::from_str(line).ok();
    Some(value.and_then(|v| v.get("step")?.as_u64()).unwrap_or(u64::MAX))
}

/// Resident bytes of this process and their peak (VmRSS, VmHWM of /proc/self/status).
pub fn memory() -> (Option<u64>, Option<u64>) {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let bytes = |key: &str| {
        let line = status.lines().find_map(|l| l.strip_prefix(key))?;
        line.trim().strip_suffix(" kB")?.parse::<u64>().ok().map(|kib| kib * 1024)
    };
    (bytes("VmRSS:"), bytes("VmHWM:"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reopening_drops_later_and_torn_lines() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE);
        std::fs::write(&path, "{\"step\":0}\n{\"step\":2,\"loss\":1}\n{\"step\":4}\nnonsense\n{\"step\":1").unwrap();
        let mut m = MetricsFile::open(dir.path(), Some(2)).unwrap();
        m.append(&serde_json::json!({"step": 3})).unwrap();
        m.sync().unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text, "{\"step\":0}\n{\"step\":2,\"loss\":1}\n{\"step\":3}\n");
        MetricsFile::open(dir.path(), None).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "");
    }

    #[test]
    fn an_unwritable_folder_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let e = MetricsFile::open(&dir.path().join("missing"), None).unwrap_err();
        assert_eq!(e.exit_code(), 1);
        assert!(e.to_string().contains("metrics.jsonl"), "{e}");
    }

    #[test]
    fn memory_is_read_on_linux() {
        let (now, peak) = memory();
        assert_eq!(now.is_some(), cfg!(target_os = "linux"));
        assert!(now <= peak);
    }
}
