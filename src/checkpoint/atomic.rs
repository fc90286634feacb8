//! Writes that are complete or not there: a temporary name in the same folder, fsync, rename, fsync of the folder.
//!
//! Temporary names are `.NAME.tmp-PID`. Whoever writes holds a lock (flock) on the file or folder, so that [`clean`]
//! can tell the leftovers of a killed process from the work of a living one.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;

use crate::error::{Error, Result};

/// Writes the file `path` whole: after a crash, a full disk or an error it is the old one or the new one.
/// Errors: [`Error::Write`] with what the system or `write` answered; the temporary file is removed.
pub fn write_file(path: &Path, write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<()> {
    let (parent, temp) = temporary(path, "tmp")?;
    let result = write_and_sync(&temp, write)
        .map_err(Error::write("write", path))
        .and_then(|()| fs::rename(&temp, path).map_err(Error::write("replace", path)))
        .and_then(|()| sync_dir(&parent));
    if result.is_err() {
        // Best effort: the error in hand matters more than a leftover, and `clean` finds that later.
        let _ = fs::remove_file(&temp);
    }
    result
}

fn write_and_sync(path: &Path, write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> io::Result<()> {
    let file = File::create(path)?;
    // Without locks (some network file systems) `clean` leaves everything alone.
    let _ = file.try_lock();
    let mut out = BufWriter::with_capacity(1 << 20, file);
    write(&mut out)?;
    out.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()
}

fn sync_dir(path: &Path) -> Result<()> {
    File::open(path).and_then(|d| d.sync_all()).map_err(Error::write("sync", path))
}

/// The parent of `path`, and `.NAME.KIND-PID` in it. Errors: a path without a last name ("/", "..").
fn temporary(path: &Path, kind: &str) -> Result<(PathBuf, PathBuf)> {
    let Some(name) = path.file_name() else {
        return Err(Error::input(path, "output", "a path without a name", "the path of a file or folder to make"));
    };
    let parent = match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p.to_path_buf(),
        _ => PathBuf::from("."),
    };
    let temp = parent.join(format!(".{}.{kind}-{}", name.to_string_lossy(), std::process::id()));
    Ok((parent, temp))
}

/// A folder in the making. Its files are written under a temporary name; [`DirWriter::commit`] gives it its own.
/// Dropped without a commit, it leaves nothing behind.
#[derive(Debug)]
pub struct DirWriter {
    target: PathBuf,
    parent: PathBuf,
    temp: PathBuf,
    /// Holds the lock.
    _lock: Option<File>,
}

impl DirWriter {
    /// Starts a folder that will be `target`; missing parents are made. Errors: the system refuses.
    pub fn new(target: &Path) -> Result<Self> {
        let (parent, temp) = temporary(target, "tmp")?;
        fs::create_dir_all(&parent).map_err(Error::write("create folder", &parent))?;
        if target.exists() && !target.is_dir() {
            return Err(Error::write("create folder", target)(io::ErrorKind::AlreadyExists.into()));
        }
        // What a dead process of the same id left.
        remove_any(&temp).map_err(Error::write("remove", &temp))?;
        fs::create_dir(&temp).map_err(Error::write("create folder", &temp))?;
        let lock = lock(&temp);
        Ok(Self { target: target.into(), parent, temp, _lock: lock })
    }

    /// The folder under its temporary name. Files that the caller makes there are synced by `commit`.
    pub fn path(&self) -> &Path {
        &self.temp
    }

    /// Writes one file. Errors name it by its final place.
    pub fn write(&self, name: &str, write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<()> {
        write_and_sync(&self.temp.join(name), write).map_err(Error::write("write", self.target.join(name)))
    }

    /// Copies a file from elsewhere.
    pub fn copy(&self, from: &Path, name: &str) -> Result<()> {
        let mut source = File::open(from).map_err(Error::read("open", from))?;
        self.write(name, |out| io::copy(&mut source, out).map(drop))
    }

    /// Syncs everything and puts the folder in its place, replacing a folder that is there in one step.
    pub fn commit(self) -> Result<()> {
        self.sync_files().map_err(Error::write("sync", &self.target))?;
        sync_dir(&self.temp)?;
        if self.target.is_dir() {
            // The old folder takes the temporary name, which Drop removes.
            self.exchange().map_err(Error::write("replace", &self.target))?;
        } else {
            fs::rename(&self.temp, &self.target).map_err(Error::write("create", &self.target))?;
        }
        sync_dir(&self.parent)
    }

    fn sync_files(&self) -> io::Result<()> {
        for entry in fs::read_dir(&self.temp)? {
            File::open(entry?.path())?.sync_all()?;
        }
        Ok(())
    }

    fn exchange(&self) -> io::Result<()> {
        match renameat_with(CWD, &self.temp, CWD, &self.target, RenameFlags::EXCHANGE) {
            Ok(()) => Ok(()),
            Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) => self.exchange_in_two_steps(),
            Err(e) => Err(e.into()),
        }
    }

    /// For file systems that cannot exchange two names. A crash between the steps leaves `.NAME.old-PID`, which
    /// [`clean`] puts back.
    fn exchange_in_two_steps(&self) -> io::Result<()> {
        let old = self.temp.with_file_name(temp_name_as_old(&self.temp));
        remove_any(&old)?;
        let _lock = lock(&self.target);
        fs::rename(&self.target, &old)?;
        if let Err(e) = fs::rename(&self.temp, &self.target) {
            fs::rename(&old, &self.target)?;
            return Err(e);
        }
        // Drop must not find the temporary name, and does not: it was renamed.
        remove_any(&old)
    }
}

impl Drop for DirWriter {
    fn drop(&mut self) {
        // After a commit this is the replaced folder or nothing.
        let _ = remove_any(&self.temp);
    }
}

fn temp_name_as_old(temp: &Path) -> String {
    let name = temp.file_name().unwrap_or_default().to_string_lossy();
    match name.rsplit_once(".tmp-") {
        Some((stem, pid)) => format!("{stem}.old-{pid}"),
        None => format!("{name}.old-0"),
    }
}

/// A lock that lives as long as the handle, and as the process.
fn lock(path: &Path) -> Option<File> {
    let file = File::open(path).ok()?;
    file.try_lock().ok()?;
    Some(file)
}

/// Removes a file or a folder with all that is in it; nothing there is fine.
fn remove_any(path: &Path) -> io::Result<()> {
    let result = match fs::symlink_metadata(path) {
        Ok(m) if m.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(e) => Err(e),
    };
    match result {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Removes a folder so that no crash leaves half of it under its name.
pub fn remove_dir(path: &Path) -> Result<()> {
    let (parent, temp) = temporary(path, "tmp")?;
    remove_any(&temp).map_err(Error::write("remove", &temp))?;
    fs::rename(path, &temp).map_err(Error::write("remove", path))?;
    sync_dir(&parent)?;
    remove_any(&temp).map_err(Error::write("remove", path))
}

/// Removes what killed processes left in `folder` (`.NAME.tmp-PID`), and puts back a folder whose replacement was cut
/// short (`.NAME.old-PID`). What a living process works on is left alone. A missing folder is fine.
pub fn clean(folder: &Path) -> Result<()> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(Error::read("list", folder)(e)),
    };
    for entry in entries {
        let path = entry.map_err(Error::read("list", folder))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let Some((stem, kind)) = leftover(&name) else { continue };
        if lock(&path).is_none() {
            continue;
        }
        let target = folder.join(stem);
        if kind == "old" && !target.exists() {
            fs::rename(&path, &target).map_err(Error::write("restore", &target))?;
        } else {
            remove_any(&path).map_err(Error::write("remove", &path))?;
        }
    }
    Ok(())
}

/// (NAME, "tmp" or "old") of `.NAME.tmp-PID` or `.NAME.old-PID`.
fn leftover(name: &str) -> Option<(&str, &str)> {
    let (rest, pid) = name.strip_prefix('.')?.rsplit_once('-')?;
    if pid.is_empty() || !pid.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let (stem, kind) = rest.rsplit_once('.')?;
    (!stem.is_empty() && matches!(kind, "tmp" | "old")).then_some((stem, kind))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<String> =
            fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_file_is_replaced_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.json");
        write_file(&path, |w| w.write_all(b"first")).unwrap();
        let error = write_file(&path, |w| {
            w.write_all(b"second")?;
            Err(io::ErrorKind::StorageFull.into())
        })
        .unwrap_err();
        assert!(matches!(&error, Error::Write { path: p, .. } if *p == path), "{error:?}");
        assert_eq!(fs::read(&path).unwrap(), b"first");
        write_file(&path, |w| w.write_all(b"second")).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"second");
        assert_eq!(names(dir.path()), ["a.json"]);
    }

    #[test]
    fn a_full_device_is_a_write_error_and_keeps_the_old_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.bin");
        write_file(&path, |w| w.write_all(b"old")).unwrap();
        // /dev/full answers every write with "no space left on device".
        let error = write_file(&path, |w| {
            w.write_all(&[0; 10])?;
            File::options().write(true).open("/dev/full")?.write_all(&[0; 10])
        })
        .unwrap_err();
        assert_eq!(error.exit_code(), 1);
        assert!(error.to_string().contains("No space left"), "{error}");
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(names(dir.path()), ["a.bin"]);
    }

    #[test]
    fn a_folder_that_cannot_be_made_is_a_write_error() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, b"x").unwrap();
        for target in [file.join("out"), file.join("a/b"), file.clone()] {
            let error = DirWriter::new(&target).unwrap_err();
            assert!(matches!(error, Error::Write { .. }), "{error:?}");
        }
        assert!(matches!(write_file(&file.join("a.json"), |_| Ok(())).unwrap_err(), Error::Write { .. }));
        assert_eq!(names(dir.path()), ["file"]);
        DirWriter::new(Path::new("..")).unwrap_err();
    }

    #[test]
    fn a_folder_appears_at_commit_and_leaves_nothing_when_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("deep/out");
        let w = DirWriter::new(&target).unwrap();
        w.write("a", |f| f.write_all(b"1")).unwrap();
        assert!(!target.exists());
        w.commit().unwrap();
        assert_eq!(names(&target), ["a"]);

        let w = DirWriter::new(&target).unwrap();
        w.write("b", |f| f.write_all(b"2")).unwrap();
        assert_eq!(names(&target), ["a"], "the old folder stays until the commit");
        drop(w);
        assert_eq!(names(target.parent().unwrap()), ["out"]);

        let w = DirWriter::new(&target).unwrap();
        w.write("b", |f| f.write_all(b"2")).unwrap();
        w.commit().unwrap();
        assert_eq!(names(&target), ["b"]);
        assert_eq!(names(target.parent().unwrap()), ["out"]);
    }

    #[test]
    fn where_names_cannot_be_exchanged_two_renames_do_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("out");
        fs::create_dir(&target).unwrap();
        fs::write(target.join("old"), b"").unwrap();
        let w = DirWriter::new(&target).unwrap();
        w.write("new", |_| Ok(())).unwrap();
        w.exchange_in_two_steps().unwrap();
        drop(w);
        assert_eq!((names(&target), names(dir.path())), (vec!["new".into()], vec!["out".to_owned()]));
    }

    #[test]
    fn leftovers_of_the_dead_go_and_the_work_of_the_living_stays() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::create_dir_all(at(".checkpoint-3.tmp-999999999")).unwrap();
        fs::write(at(".checkpoint-3.tmp-999999999").join("x"), b"").unwrap();
        fs::write(at(".state.json.tmp-999999999"), b"").unwrap();
        fs::create_dir(at(".checkpoint-2.old-999999999")).unwrap();
        fs::create_dir(at(".checkpoint-1.old-999999999")).unwrap();
        fs::create_dir(at("checkpoint-1")).unwrap();
        fs::write(at(".hidden"), b"").unwrap();
        let alive = DirWriter::new(&at("checkpoint-4")).unwrap();
        clean(dir.path()).unwrap();
        let temp = alive.path().file_name().unwrap().to_string_lossy().into_owned();
        assert_eq!(names(dir.path()), [temp.as_str(), ".hidden", "checkpoint-1", "checkpoint-2"]);
        alive.commit().unwrap();
        remove_dir(&at("checkpoint-2")).unwrap();
        assert_eq!(names(dir.path()), [".hidden", "checkpoint-1", "checkpoint-4"]);
        clean(&at("not-there")).unwrap();
    }
}
