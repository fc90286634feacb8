//! Which checkpoints an output folder keeps.

use std::fs::{self, File, TryLockError};
use std::path::Path;

use super::config::TrainConfig;
use super::metrics;
use crate::checkpoint::{atomic, peft, state};
use crate::error::{Error, Result};

/// Locked while a run writes to the folder.
const LOCK: &str = ".lock";

/// Steps to remove so that `limit` are left: the oldest, but never the last or the best.
pub fn surplus(steps: &[u64], limit: usize, best: Option<u64>) -> Vec<u64> {
    let Some(&last) = steps.iter().max() else { return vec![] };
    let mut candidates: Vec<u64> = steps.iter().copied().filter(|&s| s != last && Some(s) != best).collect();
    candidates.sort_unstable();
    let kept = steps.len() - candidates.len();
    candidates.truncate(candidates.len().saturating_sub(limit.saturating_sub(kept)));
    candidates
}

/// Removes what `save_total_limit` leaves no room for.
pub fn prune(out: &Path, limit: usize, best: Option<u64>) -> Result<()> {
    let steps: Vec<u64> = state::checkpoints(out).iter().map(|c| c.0).collect();
    surplus(&steps, limit, best).into_iter().try_for_each(|s| atomic::remove_dir(&state::path_of(out, s)))
}

/// Makes `out`, takes it for this run as long as the answer lives, and tidies what a killed process left there.
/// Errors: another run writes to `out`; `out` holds a run, and neither `resume` nor `overwrite_output_dir` says what to do
/// with it; the system refuses.
pub fn prepare(config: &TrainConfig, resumes: bool) -> Result<File> {
    let out = &config.out;
    fs::create_dir_all(out).map_err(Error::write("make the folder", out))?;
    let path = out.join(LOCK);
    let lock = File::create(&path).map_err(Error::write("create", &path))?;
    // The system lets go of it when the process ends, however it ends. A file system without locks has none to offer.
    if let Err(TryLockError::WouldBlock) = lock.try_lock() {
        let found = format!("{}, which another run is writing to", out.display());
        return Err(Error::flag("out", found, "a folder for each run"));
    }
    atomic::clean(out)?;
    if resumes || config.overwrite_output_dir {
        return Ok(lock);
    }
    let held = state::checkpoints(out)
        .last()
        .map(|c| c.1.clone())
        .or_else(|| [peft::WEIGHTS, metrics::FILE].iter().map(|name| out.join(name)).find(|path| path.exists()));
    match held {
        None => Ok(lock),
        Some(path) => Err(Error::flag(
            "out",
            format!("a folder that holds a run ({})", path.display()),
            "a new folder, or --resume to continue that run, or --overwrite to replace it",
        )),
    }
}

/// Removes the run that `out` holds (`overwrite_output_dir`): checkpoints, adapter, metrics.
pub fn clear(out: &Path) -> Result<()> {
    for (_, path) in state::checkpoints(out) {
        atomic::remove_dir(&path)?;
    }
    for name in [metrics::FILE, peft::WEIGHTS, peft::CONFIG] {
        let path = out.join(name);
        match fs::remove_file(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(Error::write("remove", &path)(e)),
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_go_but_never_the_last_or_the_best() {
        assert_eq!(surplus(&[2, 4, 6, 8], 2, None), [2, 4]);
        assert_eq!(surplus(&[2, 4, 6, 8], 2, Some(2)), [4, 6]);
        assert_eq!(surplus(&[2, 4, 6, 8], 3, Some(2)), [4]);
        assert_eq!(surplus(&[2, 4], 1, Some(2)), [] as [u64; 0]);
        assert_eq!(surplus(&[2, 4], 1, Some(4)), [2]);
        assert_eq!(surplus(&[10, 9, 2], 2, None), [2]);
        assert_eq!(surplus(&[], 1, None), [] as [u64; 0]);
    }
}
