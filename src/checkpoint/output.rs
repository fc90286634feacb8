//! What the two writers of model directories, `quantized` and `merge`, share.

use std::fs;
use std::io;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::atomic::DirWriter;
use super::safetensors_write::shard_name;
use crate::error::{Error, Result};

/// Files that go along with a model: tokenizer, chat template, generation settings, licence.
fn goes_along(name: &str) -> bool {
    const PREFIXES: [&str; 5] = ["tokenizer", "chat_template", "LICENSE", "NOTICE", "USE_POLICY"];
    const NAMES: [&str; 6] = [
        "added_tokens.json",
        "generation_config.json",
        "merges.txt",
        "special_tokens_map.json",
        "vocab.json",
        "vocab.txt",
    ];
    NAMES.contains(&name) || PREFIXES.iter().any(|p| name.starts_with(p))
}

/// Copies what goes along with the model in `from`.
pub(super) fn copy_companions(from: &Path, writer: &DirWriter) -> Result<()> {
    let mut names: Vec<String> = fs::read_dir(from)
        .and_then(|entries| entries.map(|e| e.map(|e| e.file_name().to_string_lossy().into_owned())).collect())
        .map_err(Error::read("list", from))?;
    names.sort();
    for name in names.iter().filter(|n| goes_along(n) && from.join(n).is_file()) {
        writer.copy(&from.join(name), name)?;
    }
    Ok(())
}

/// Writes config.json, indented as transformers does.
pub(super) fn write_config(writer: &DirWriter, config: &Map<String, Value>) -> Result<()> {
    writer.write("config.json", |out| {
        serde_json::to_writer_pretty(&mut *out, config).map_err(io::Error::from)?;
        out.write_all(b"\n")
    })
}

/// Writes the index of more than one shard. `shards` lists the tensors of each.
pub(super) fn write_index(writer: &DirWriter, shards: &[Vec<String>], total_size: u64) -> Result<()> {
    if shards.len() < 2 {
        return Ok(());
    }
    let mut files: Vec<(&String, usize)> =
        shards.iter().enumerate().flat_map(|(i, names)| names.iter().map(move |n| (n, i))).collect();
    files.sort();
    let map: Map<String, Value> =
        files.into_iter().map(|(n, i)| (n.clone(), json!(shard_name(i, shards.len())))).collect();
    let index = json!({"metadata": {"total_size": total_size}, "weight_map": map});
    writer
        .write("model.safetensors.index.json", |out| serde_json::to_writer_pretty(out, &index).map_err(io::Error::from))
}
