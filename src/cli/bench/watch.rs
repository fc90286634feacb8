//! `--watch`: runs a command again whenever a file is saved.

use std::path::Path;
use std::process::Child;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use halfbyte::{Error, Result};

use crate::cli::output::note;

/// Between two looks at the file.
const POLL: Duration = Duration::from_millis(200);

/// Starts a process, and another for each new content of `file`, until `stop`. A process that still runs then is ended.
/// Processes, since a kernel that faults takes the GPU's context of its process with it, and one may never end.
pub fn watch(file: &Path, stop: &AtomicBool, start: &mut dyn FnMut() -> Result<Child>) -> Result<()> {
    let mut seen = std::fs::read(file).ok();
    // Content that is not seen twice may still be being written.
    let mut pending = None;
    let mut child = Some(start()?);
    while !stop.load(Ordering::Relaxed) {
        if let Some(running) = &mut child
            && running.try_wait().map_err(Error::read("wait for", "the race"))?.is_some()
        {
            child = None;
            note(format_args!("watching {}; Ctrl-C ends", file.display()));
        }
        std::thread::sleep(POLL);
        // While an editor replaces the file it may not be there.
        let Some(now) = std::fs::read(file).ok() else { continue };
        if seen.as_ref() == Some(&now) {
            pending = None;
        } else if pending.as_ref() == Some(&now) {
            (seen, pending) = (Some(now), None);
            end(child.take());
            child = Some(start()?);
        } else {
            pending = Some(now);
        }
    }
    end(child);
    Ok(())
}

/// Kills what still runs.
fn end(child: Option<Child>) {
    if let Some(mut child) = child {
        // It may have ended by itself, on the same Ctrl-C.
        let _ = child.kill();
        let _ = child.wait();
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};
    use std::sync::Arc;
    use std::time::Instant;

    use super::*;

    /// Waits until `log` has this text; fails after ten seconds.
    fn until(log: &Path, text: &str) {
        let start = Instant::now();
        while std::fs::read_to_string(log).unwrap_or_default() != text {
            assert!(start.elapsed() < Duration::from_secs(10), "{:?}", std::fs::read_to_string(log));
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    #[test]
    fn every_save_runs_once_more_and_the_flag_ends_it() {
        let dir = tempfile::tempdir().unwrap();
        let (file, log) = (dir.path().join("my.cu"), dir.path().join("log"));
        std::fs::write(&file, "one ").unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let thread = {
            let (file, log, stop) = (file.clone(), log.clone(), stop.clone());
            std::thread::spawn(move || {
                watch(&file, &stop, &mut || {
                    let mut command = Command::new("sh");
                    // Some end at once, with whatever code, one never does.
                    command.args(["-c", "cat $1 >> $2; grep -q hang $1 && exec sleep 1000; exit 2", "sh"]);
                    let command = command.arg(&file).arg(&log).stdin(Stdio::null());
                    command.spawn().map_err(Error::read("start", "sh"))
                })
            })
        };
        until(&log, "one ");
        std::fs::write(&file, "hang ").unwrap();
        until(&log, "one hang ");
        // As editors do that keep the old file until the new one is whole.
        std::fs::write(dir.path().join("new"), "three ").unwrap();
        std::fs::remove_file(&file).unwrap();
        std::thread::sleep(2 * POLL);
        std::fs::rename(dir.path().join("new"), &file).unwrap();
        until(&log, "one hang three ");
        // The same content again is no change.
        std::fs::write(&file, "three ").unwrap();
        std::thread::sleep(4 * POLL);
        until(&log, "one hang three ");
        stop.store(true, Ordering::Relaxed);
        thread.join().unwrap().unwrap();
    }
}
