//! Tests of the readers and writers against the fixtures and against broken copies of them.

use std::path::{Path, PathBuf};

use crate::error::Error;

mod bad_input;
mod configs;
mod crashes;
mod round_trips;

/// A folder of tests/fixtures.
fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// A copy of a fixture folder to break.
fn copy_of(name: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(fixture(name)).unwrap() {
        let entry = entry.unwrap();
        if entry.file_type().unwrap().is_file() {
            std::fs::copy(entry.path(), dir.path().join(entry.file_name())).unwrap();
        }
    }
    dir
}

/// An input error whose text holds all of `parts`.
#[track_caller]
fn assert_input<T: std::fmt::Debug>(result: crate::Result<T>, parts: &[&str]) {
    let error = result.unwrap_err();
    assert!(matches!(error, Error::Input { .. }), "{error:?}");
    assert_eq!(error.exit_code(), 2);
    let text = error.to_string();
    for part in parts {
        assert!(text.contains(part), "{part:?} in {text}");
    }
}

/// Replaces the value of a key of a JSON file (or adds it); None removes the key.
fn set_key(file: &Path, key: &str, value: Option<serde_json::Value>) {
    let mut map: serde_json::Map<String, serde_json::Value> =
        serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    match value {
        Some(v) => drop(map.insert(key.into(), v)),
        None => drop(map.shift_remove(key)),
    }
    std::fs::write(file, serde_json::to_vec(&map).unwrap()).unwrap();
}

/// Header and data of a safetensors file.
fn split(file: &Path) -> (serde_json::Map<String, serde_json::Value>, Vec<u8>) {
    let bytes = std::fs::read(file).unwrap();
    let n = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    (serde_json::from_slice(&bytes[8..8 + n]).unwrap(), bytes[8 + n..].to_vec())
}

fn join(file: &Path, header: &str, data: &[u8]) {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend(data);
    std::fs::write(file, bytes).unwrap();
}
