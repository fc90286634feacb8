//! Merging an adapter into its base: a bf16 directory, W + scale·B·A of every adapted projection.
//!
//! One tensor at a time is in memory. The sum is in f32 and rounded to bf16 once. Nothing is resized.

use std::path::Path;

use half::bf16;
use rayon::prelude::*;
use serde_json::{Value, json};

use super::atomic::DirWriter;
use super::dir::ModelDir;
use super::names::Weight;
use super::output;
use super::safetensors_file::FileDtype;
use super::safetensors_write::{SHARD_BYTES, Spec, StreamWriter, shard_name, shards};
use crate::error::{Error, Result};
use crate::model::{HostAdapter, ModelConfig, Site};
use crate::tensor::{Dtype, HostTensor};

/// Which weights the adapter was added to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MergeBase {
    /// The base directory's own 16 or 32-bit weights.
    Dense,
    /// The 16 or 32-bit weights given beside a base in 4 bits.
    Original,
    /// The base's 4-bit weights, dequantised.
    Dequantized,
}

impl std::fmt::Display for MergeBase {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str(match self {
            Self::Dense => "the model's own 16 or 32-bit weights",
            Self::Original => "the original 16 or 32-bit weights",
            Self::Dequantized => "the 4-bit weights, dequantised",
        })
    }
}

/// What a merge did.
#[derive(Clone, Debug, PartialEq)]
pub struct MergeReport {
    pub base: MergeBase,
    /// Tensors written, and how many of them took a LoRA update.
    pub tensors: usize,
    pub merged: usize,
    /// Bytes of weights written.
    pub bytes: u64,
    pub shards: usize,
}

/// Writes base + adapter to the folder `out`, in bf16, in shards of at most 5 GB. Weights come from `original_16bit`
/// where given, else from `base`. config.json (without its quantisation), tokenizer and generation settings come along.
/// `progress(done, total)` counts bytes written. A folder at `out` is replaced when all is written. Errors: `original_16bit` is another model or in 4
/// bits; weights that are not finite; the system refuses to write (nothing is left behind).
pub fn merge(
    base: &ModelDir,
    original_16bit: Option<&ModelDir>,
    adapter: &HostAdapter,
    out: &Path,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<MergeReport> {
    merge_in_shards(base, original_16bit, adapter, out, SHARD_BYTES, progress)
}

pub(super) fn merge_in_shards(
    base: &ModelDir,
    original_16bit: Option<&ModelDir>,
    adapter: &HostAdapter,
    out: &Path,
    shard_bytes: u64,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<MergeReport> {
    let source = match original_16bit {
        Some(original) => same_model(base, original)?,
        None => base,
    };
    let kind = match (original_16bit, base.is_quantized()) {
        (Some(_), _) => MergeBase::Original,
        (None, true) => MergeBase::Dequantized,
        (None, false) => MergeBase::Dense,
    };
    let writer = DirWriter::new(out)?;
    let specs: Vec<Spec> =
        source.weights().iter().map(|w| Spec::new(&w.name, FileDtype::BF16, w.shape.clone())).collect();
    let sizes: Vec<u64> = specs.iter().map(Spec::bytes).collect();
    let total = sizes.iter().sum();
    let plan = shards(&sizes, shard_bytes);
    let mut report = MergeReport { base: kind, tensors: specs.len(), merged: 0, bytes: 0, shards: plan.len() };
    let mut names = Vec::new();
    for (i, range) in plan.iter().enumerate() {
        let file = shard_name(i, plan.len());
        let write_error = |e| Error::write("write", out.join(&file))(e);
        let mut shard = StreamWriter::create(&writer.path().join(&file), specs[range.clone()].to_vec(), &[])
            .map_err(write_error)?;
        for (j, weight) in source.weights()[range.clone()].iter().enumerate() {
            let site = adapter.layout.sites.iter().find(|s| s.proj.module(s.layer) == weight.module());
            report.merged += usize::from(site.is_some());
            put_merged(source, weight, site, adapter, &mut |bytes| shard.put(j, bytes).map_err(write_error))?;
            report.bytes += sizes[range.start + j];
            progress(report.bytes, total);
        }
        shard.finish().map_err(write_error)?;
        names.push(specs[range.clone()].iter().map(|s| s.name.clone()).collect());
    }
    output::write_index(&writer, &names, total)?;
    output::write_config(&writer, &config(source))?;
    output::copy_companions(base.path(), &writer)?;
    writer.commit()?;
    Ok(report)
}

/// The original weights, if they are of the same model as `base` and not themselves in 4 bits.
fn same_model<'a>(base: &ModelDir, original: &'a ModelDir) -> Result<&'a ModelDir> {
    let file = original.path().join("config.json");
    if original.is_quantized() {
        return Err(Error::input(file, "key quantization_config", "a model in 4 bits", "the original 16-bit weights"));
    }
    // Token ids may differ between releases of one model; what is computed may not.
    let fields = |c: &ModelConfig| {
        let c = ModelConfig { bos_token_id: None, eos_token_ids: vec![], pad_token_id: None, ..c.clone() };
        serde_json::to_value(c).unwrap_or_default()
    };
    let (theirs, ours) = (fields(original.config()), fields(base.config()));
    for (key, value) in theirs.as_object().into_iter().flatten() {
        if ours[key] != *value {
            let expected = format!("{}, as in {}", ours[key], base.path().display());
            return Err(Error::input(file, format!("key {key}"), value.to_string(), expected));
        }
    }
    Ok(original)
}

/// config.json of a plain bf16 model.
fn config(source: &ModelDir) -> serde_json::Map<String, Value> {
    let mut map = source.raw_config().clone();
    map.shift_remove("quantization_config");
    let key = if map.contains_key("torch_dtype") { "torch_dtype" } else { "dtype" };
    map.insert(key.into(), json!("bfloat16"));
    map
}

fn put_merged(
    source: &ModelDir,
    weight: &Weight,
    site: Option<&Site>,
    adapter: &HostAdapter,
    put: &mut dyn FnMut(&[u8]) -> Result<()>,
) -> Result<()> {
    let name = &weight.name;
    if source.is_packed(name) {
        let mut values = source.quantized(name)?.dequantize();
        add_lora(&mut values, site, adapter);
        return put(&to_bf16(&values));
    }
    let tensor = source.dense(name)?;
    if site.is_none() && tensor.dtype == Dtype::Bf16 {
        put(tensor.bytes())?;
    } else {
        let mut values = widen(&tensor);
        add_lora(&mut values, site, adapter);
        put(&to_bf16(&values))?;
    }
    source.release(name);
    Ok(())
}

fn widen(tensor: &HostTensor) -> Vec<f32> {
    const CHUNK: usize = 1 << 16;
    let mut values = vec![0.0; tensor.len()];
    values.par_chunks_mut(CHUNK).enumerate().for_each(|(i, out)| tensor.widen(i * CHUNK, out));
    values
}

fn to_bf16(values: &[f32]) -> Vec<u8> {
    let mut bytes = vec![0; values.len() * 2];
    bytes.par_chunks_mut(1 << 16).zip(values.par_chunks(1 << 15)).for_each(|(bytes, values)| {
        for (b, &v) in bytes.chunks_exact_mut(2).zip(values) {
            b.copy_from_slice(&bf16::from_f32(v).to_le_bytes());
        }
    });
    bytes
}

/// w (n, k) += scale * B (n, r) · A (r, k), where there is an adapter. Rows in parallel; each sums over r in order.
fn add_lora(w: &mut [f32], site: Option<&Site>, adapter: &HostAdapter) {
    let Some(s) = site else { return };
    let (a, b) = (&adapter.weights[s.a_range()], &adapter.weights[s.b_range()]);
    w.par_chunks_exact_mut(s.k).zip(b.par_chunks_exact(s.r)).for_each_init(
        || vec![0.0f32; s.k],
        |update, (row, b)| {
            update.fill(0.0);
            for (b, a) in b.iter().zip(a.chunks_exact(s.k)) {
                update.iter_mut().zip(a).for_each(|(u, a)| *u += b * a);
            }
            row.iter_mut().zip(&*update).for_each(|(w, u)| *w += s.scale * u);
        },
    );
}
