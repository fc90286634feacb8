//! TensorBoard event files: TFRecords of `Event` messages with scalars, as far as a training run needs them.
//!
//! ```text
//! record  length (u64)  masked crc32c of length  data  masked crc32c of data        little-endian
//! Event   1: wall_time (double)  2: step (int64)  3: file_version (string)  5: summary (Summary)  7: session_log
//! Summary 1: value (repeated)    Value  1: tag (string)  2: simple_value (float)    SessionLog  1: status (START = 1)
//! ```
//! A resumed run adds a file. Its session log says from which step on it replaces what earlier files hold.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::error::{Error, Result};

/// Folder of the event files in the output folder, as transformers names it.
const FOLDER: &str = "runs";

/// Writes one event file.
#[derive(Debug)]
pub struct EventWriter {
    path: PathBuf,
    file: File,
}

impl EventWriter {
    /// Starts a new file in `out`/runs, for the steps after `done`.
    pub fn new(out: &Path, done: u64) -> Result<Self> {
        let dir = out.join(FOLDER);
        fs::create_dir_all(&dir).map_err(Error::write("make the folder", &dir))?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let (seconds, pid) = (now.as_secs(), std::process::id());
        let path = dir.join(format!("events.out.tfevents.{seconds}.halfbyte.{pid}"));
        let file = File::create(&path).map_err(Error::write("create", &path))?;
        let mut writer = Self { path, file };
        let mut event = vec![];
        put_bytes(&mut event, 3, b"brain.Event:2");
        writer.record(&with_time(event))?;
        if done > 0 {
            let mut event = vec![];
            put_key(&mut event, 2, 0);
            put_varint(&mut event, done + 1);
            put_bytes(&mut event, 7, &[0x08, 1]);
            writer.record(&with_time(event))?;
        }
        Ok(writer)
    }

    /// Adds scalars of a step.
    pub fn scalars(&mut self, step: u64, values: &[(&str, f64)]) -> Result<()> {
        let mut summary = vec![];
        for &(tag, value) in values {
            let mut v = vec![];
            put_bytes(&mut v, 1, tag.as_bytes());
            put_key(&mut v, 2, 5);
            v.extend((value as f32).to_le_bytes());
            put_bytes(&mut summary, 1, &v);
        }
        let mut event = vec![];
        put_key(&mut event, 2, 0);
        put_varint(&mut event, step);
        put_bytes(&mut event, 5, &summary);
        self.record(&with_time(event))
    }

    fn record(&mut self, data: &[u8]) -> Result<()> {
        self.file.write_all(&record(data)).map_err(Error::write("append to", &self.path))
    }
}

fn record(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    let mut out = length.to_vec();
    out.extend(masked(crc32c(&length)).to_le_bytes());
    out.extend(data);
    out.extend(masked(crc32c(data)).to_le_bytes());
    out
}

fn with_time(event: Vec<u8>) -> Vec<u8> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let mut out = vec![];
    put_key(&mut out, 1, 1);
    out.extend(now.as_secs_f64().to_le_bytes());
    out.extend(event);
    out
}

fn put_varint(out: &mut Vec<u8>, mut n: u64) {
    while n >= 0x80 {
        out.push(n as u8 | 0x80);
        n >>= 7;
    }
    out.push(n as u8);
}

fn put_key(out: &mut Vec<u8>, field: u8, wire_type: u8) {
    out.push(field << 3 | wire_type);
}

fn put_bytes(out: &mut Vec<u8>, field: u8, bytes: &[u8]) {
    put_key(out, field, 2);
    put_varint(out, bytes.len() as u64);
    out.extend(bytes);
}

/// CRC-32C (Castagnoli, reflected), bit by bit: a few records a minute need no table.
fn crc32c(data: &[u8]) -> u32 {
    let mut crc = !0u32;
    for &byte in data {
        crc ^= u32::from(byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ (0x82F6_3B78 & (crc & 1).wrapping_neg());
        }
    }
    !crc
}

/// TFRecord's mask, so that a checksum of checksums is none.
fn masked(crc: u32) -> u32 {
    crc.rotate_right(15).wrapping_add(0xA282_EAD8)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The check value of CRC-32C, and RFC 3720 B.4's 32 zero bytes.
    #[test]
    fn crc32c_gives_the_known_answers() {
        assert_eq!(crc32c(b"123456789"), 0xE306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8A91_36AA);
    }

    #[test]
    fn records_hold_scalars_with_their_checksums() {
        let dir = tempfile::tempdir().unwrap();
        let mut w = EventWriter::new(dir.path(), 299).unwrap();
        w.scalars(300, &[("train/loss", 1.5)]).unwrap();
        let bytes = fs::read(&w.path).unwrap();
        let mut rest = &bytes[..];
        let mut records = vec![];
        while !rest.is_empty() {
            let n = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
            assert_eq!(rest[..n + 16], record(&rest[12..12 + n]));
            records.push(rest[12..12 + n].to_vec());
            rest = &rest[n + 16..];
        }
        assert_eq!(records.len(), 3);
        assert!(records[0].ends_with(b"\x1a\x0dbrain.Event:2"));
        assert_eq!(&records[1][9..], b"\x10\xac\x02\x3a\x02\x08\x01");
        // step 300 is the varint ac 02; the summary holds one value of 17 bytes.
        let expected = [&b"\x10\xac\x02\x2a\x13\x0a\x11\x0a\x0atrain/loss\x15"[..], &1.5f32.to_le_bytes()].concat();
        assert_eq!(records[2][9..], expected);
    }
}
