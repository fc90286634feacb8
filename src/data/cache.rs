//! The cache of token ids: one file a data set, named by a hash of all that decides its contents.
//!
//! ```text
//! "HALFBYTE DATA 2\n"  sha256 of the rest (32)  length of stats (u64)  stats as JSON  documents (u64)
//! each document: file (u32)  line (u64)  n (u32)  n token ids (i32), the top bit set on targets
//! ```
//! Little-endian. Whatever does not read back exactly is ignored and written anew.

use std::fs;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::tokenizer::Tokenizer;
use super::{DataOptions, Document, Stats};
use crate::error::{Error, Result};

/// The number rises with the layout and with every change of what a row becomes.
const MAGIC: &[u8; 16] = b"HALFBYTE DATA 2\n";
const TARGET: u32 = 1 << 31;

/// Where the cache of this tokenizer, these files and these options is. The files are read once for their hash.
pub(super) fn path(dir: &Path, tok: &Tokenizer, opts: &DataOptions) -> Result<PathBuf> {
    let mut hash = Sha256::new();
    hash.update(MAGIC);
    hash.update(env!("CARGO_PKG_VERSION"));
    hash.update(tok.fingerprint());
    if tok.reads_clock() {
        hash.update(chrono::Local::now().format("%Y-%m-%d").to_string());
    }
    let DataOptions { files: _, max_length, overlong, completion_only_loss, assistant_only_loss, cache_dir: _ } = opts;
    hash.update(format!("{max_length} {overlong:?} {completion_only_loss} {assistant_only_loss}"));
    let mut buffer = vec![0; 1 << 18];
    for file in &opts.files {
        let mut reader = fs::File::open(file).map_err(Error::read("open", file))?;
        let mut one = Sha256::new();
        loop {
            let n = match reader.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(Error::read("read", file)(e)),
            };
            one.update(&buffer[..n]);
        }
        hash.update(one.finalize());
    }
    let hex: String = hash.finalize().iter().take(16).map(|b| format!("{b:02x}")).collect();
    Ok(dir.join(format!("tokens-{hex}.bin")))
}

/// What the file holds; None if there is none, or it is not what was written.
pub(super) fn read(path: &Path) -> Option<(Vec<Document>, Stats)> {
    let bytes = fs::read(path).ok()?;
    let (magic, rest) = bytes.split_at_checked(MAGIC.len())?;
    let (hash, mut body) = rest.split_at_checked(32)?;
    if magic != MAGIC || Sha256::digest(body)[..] != *hash {
        return None;
    }
    let n = u64::from_le_bytes(take(&mut body)?) as usize;
    let (stats, mut body) = body.split_at_checked(n)?;
    let stats = serde_json::from_slice(stats).ok()?;
    let count = u64::from_le_bytes(take(&mut body)?);
    let mut documents = Vec::new();
    for _ in 0..count {
        let file = u32::from_le_bytes(take(&mut body)?) as usize;
        let line = u64::from_le_bytes(take(&mut body)?) as usize;
        let n = u32::from_le_bytes(take(&mut body)?) as usize;
        let (words, rest) = body.split_at_checked(n.checked_mul(4)?)?;
        body = rest;
        let words = words.chunks_exact(4).map(|w| u32::from_le_bytes([w[0], w[1], w[2], w[3]]));
        let (tokens, is_target) = words.map(|w| ((w & !TARGET) as i32, w & TARGET != 0)).unzip();
        documents.push(Document { tokens, is_target, file, line });
    }
    body.is_empty().then_some((documents, stats))
}

fn take<const N: usize>(body: &mut &[u8]) -> Option<[u8; N]> {
    let (head, rest) = body.split_at_checked(N)?;
    *body = rest;
    head.try_into().ok()
}

/// Writes under a temporary name and renames, so that a killed process leaves no half a cache.
pub(super) fn write(path: &Path, documents: &[Document], stats: &Stats) -> io::Result<()> {
    let mut body = Vec::new();
    let stats = serde_json::to_vec(stats)?;
    body.extend((stats.len() as u64).to_le_bytes());
    body.extend(stats);
    body.extend((documents.len() as u64).to_le_bytes());
    for d in documents {
        body.extend((d.file as u32).to_le_bytes());
        body.extend((d.line as u64).to_le_bytes());
        body.extend((d.tokens.len() as u32).to_le_bytes());
        for (&token, &target) in d.tokens.iter().zip(&d.is_target) {
            let mark = if target { TARGET } else { 0 };
            body.extend((token as u32 | mark).to_le_bytes());
        }
    }
    let dir = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(dir)?;
    let mut file = tempfile::NamedTempFile::new_in(dir)?;
    file.write_all(MAGIC)?;
    file.write_all(&Sha256::digest(&body))?;
    file.write_all(&body)?;
    file.as_file().sync_all()?;
    file.persist(path)?;
    Ok(())
}
