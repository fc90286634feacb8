//! A user's own kernel in the race: `halfbyte bench OP --candidate my.cu`. Its signature follows from the op ([`template`]),
//! how it is launched stands in the file ([`launch`]), NVRTC compiles it (`nvrtc`), and it enters the table as one more
//! way to run the op (`program`). [`verdict`] says who won.

pub mod expression;
pub mod launch;
#[cfg(feature = "cuda")]
pub mod nvrtc;
#[cfg(feature = "cuda")]
pub mod program;
pub mod template;
pub mod verdict;

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// No kernel is longer; a wrong path may be.
const LIMIT: u64 = 16 << 20;

/// A CUDA C++ file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// As the user wrote it: messages of the compiler begin with it.
    pub path: PathBuf,
    pub text: String,
}

impl Source {
    /// [`Error::Read`], or [`Error::Input`] where it can be no source.
    pub fn read(path: &Path) -> Result<Self> {
        let meta = std::fs::metadata(path).map_err(Error::read("open", path))?;
        if !meta.is_file() || meta.len() > LIMIT {
            let found = if meta.is_file() { format!("{} bytes", meta.len()) } else { "no regular file".into() };
            return Err(Error::input(path, "the file", found, "CUDA C++ of at most 16 MiB"));
        }
        let text = std::fs::read_to_string(path).map_err(Error::read("read", path))?;
        if text.contains('\0') {
            return Err(Error::input(path, "the file", "a NUL byte", "CUDA C++"));
        }
        Ok(Self { path: path.into(), text })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_can_be_no_source_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("my.cu");
        assert!(matches!(Source::read(&path), Err(Error::Read { .. })));
        assert!(Source::read(dir.path()).unwrap_err().to_string().contains("no regular file"));
        std::fs::write(&path, b"int\0").unwrap();
        assert!(Source::read(&path).unwrap_err().to_string().contains("a NUL byte"));
        std::fs::write(&path, b"int \xff").unwrap();
        assert!(Source::read(&path).unwrap_err().to_string().contains("UTF-8"));
        std::fs::write(&path, "int x;").unwrap();
        assert_eq!(Source::read(&path).unwrap().text, "int x;");
    }
}
