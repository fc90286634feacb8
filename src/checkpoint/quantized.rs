//! Writing a 4-bit directory that transformers loads with bitsandbytes.
//!
//! Layout of a shard: F32 parts, 16-bit weights, packed codes and absmax, and behind them the quant_state tensors, whose
//! length is known only after quantising. One weight at a time is in memory.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::QuantConfig;
use super::atomic::DirWriter;
use super::dir::ModelDir;
use super::names::{Role, Weight};
use super::output;
use super::safetensors_file::{FileDtype, file_dtype};
use super::safetensors_write::{APPENDED_MAX, SHARD_BYTES, Spec, StreamWriter, shard_name, shards};
use crate::error::{Error, Result};
use crate::nf4::serialize::{state_name, to_parts};
use crate::nf4::{self, BLOCK, NESTED_BLOCK};

/// What was written.
#[derive(Clone, Debug, PartialEq)]
pub struct Summary {
    /// Modules put into 4 bits, and their weights (elements) and bytes, all parts together.
    pub quantized: usize,
    pub quantized_elements: u64,
    pub quantized_bytes: u64,
    /// Projections left as they were because `skip_modules` says so.
    pub skipped: Vec<String>,
    /// Elements and bytes of all other tensors.
    pub dense_elements: u64,
    pub dense_bytes: u64,
    /// Bytes of the source's weights.
    pub source_bytes: u64,
    pub shards: usize,
}

/// Quantises the seven projections of each layer of `dir_in` into the folder `out`, in shards of at most 5 GB; a folder
/// there is replaced when all is written. `skip_modules`: names, or whole dotted parts of names ("down_proj",
/// "model.layers.0"), of modules left in 16 bits; embedding, norms and head always are. Tokenizer and generation
/// settings come along. `progress(done, total)` counts bytes read.
/// Errors: already in 4 bits; a skip name that matches nothing; weights not finite; the system refuses to write
/// (nothing is left behind).
pub fn write(
    dir_in: &ModelDir,
    out: &Path,
    config: QuantConfig,
    skip_modules: &[String],
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Summary> {
    write_in_shards(dir_in, out, config, skip_modules, SHARD_BYTES, progress)
}

pub(super) fn write_in_shards(
    dir_in: &ModelDir,
    out: &Path,
    config: QuantConfig,
    skip_modules: &[String],
    shard_bytes: u64,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Summary> {
    if dir_in.is_quantized() {
        let expected = "a model with 16 or 32-bit weights";
        return Err(Error::input(dir_in.path(), "model", "a model in 4 bits", expected));
    }
    let skipped = skipped(dir_in, skip_modules)?;
    let plans: Vec<Plan> = dir_in
        .weights()
        .iter()
        .map(|w| {
            let packed = w.role == Role::Projection && !skipped.iter().any(|s| s == w.module());
            Ok(Plan { weight: w, parts: parts(dir_in, w, packed.then_some(config))?, packed })
        })
        .collect::<Result<_>>()?;
    let sizes: Vec<u64> = plans.iter().map(Plan::bytes).collect();
    let ranges = shards(&sizes, shard_bytes);
    let source_bytes: u64 = dir_in.tensors().map(|t| t.bytes).sum();
    let mut summary = Summary {
        quantized: 0,
        quantized_elements: 0,
        quantized_bytes: 0,
        skipped,
        dense_elements: 0,
        dense_bytes: 0,
        source_bytes,
        shards: ranges.len(),
    };
    let writer = DirWriter::new(out)?;
    let (mut names, mut total, mut done) = (Vec::new(), 0, 0);
    for (i, range) in ranges.iter().enumerate() {
        let shard = Shard { dir_in, config, file: shard_name(i, ranges.len()), out, plans: &plans[range.clone()] };
        let (shard_names, bytes) = shard.write(writer.path(), &mut summary, &mut |bytes| {
            done += bytes;
            progress(done, source_bytes);
        })?;
        names.push(shard_names);
        total += bytes;
    }
    output::write_index(&writer, &names, total)?;
    output::write_config(&writer, &config_json(dir_in, config, &summary.skipped))?;
    output::copy_companions(dir_in.path(), &writer)?;
    writer.commit()?;
    Ok(summary)
}

/// Where one weight goes.
struct Plan<'a> {
    weight: &'a Weight,
    /// Its tensors of known size: itself, or the parts but quant_state.
    parts: Vec<Spec>,
    packed: bool,
}

impl Plan<'_> {
    fn bytes(&self) -> u64 {
        self.parts.iter().map(Spec::bytes).sum::<u64>() + if self.packed { APPENDED_MAX as u64 } else { 0 }
    }
}

/// The tensors that a weight becomes, but quant_state.
fn parts(dir: &ModelDir, w: &Weight, quantize: Option<QuantConfig>) -> Result<Vec<Spec>> {
    let Some(config) = quantize else {
        return Ok(vec![Spec::new(&w.name, file_dtype(dir.dtype(&w.name)?), w.shape.clone())]);
    };
    let n: usize = w.shape.iter().product();
    let blocks = n.div_ceil(BLOCK);
    let part = |suffix: &str, dtype, len| Spec::new(format!("{}{suffix}", w.name), dtype, vec![len]);
    let mut specs = vec![
        Spec::new(&w.name, FileDtype::U8, vec![n.div_ceil(2), 1]),
        part(".quant_map", FileDtype::F32, config.quant_type.code_book().len()),
    ];
    if config.double_quant {
        specs.push(part(".absmax", FileDtype::U8, blocks));
        specs.push(part(".nested_absmax", FileDtype::F32, blocks.div_ceil(NESTED_BLOCK)));
        specs.push(part(".nested_quant_map", FileDtype::F32, 256));
    } else {
        specs.push(part(".absmax", FileDtype::F32, blocks));
    }
    Ok(specs)
}

struct Shard<'a> {
    dir_in: &'a ModelDir,
    config: QuantConfig,
    file: String,
    out: &'a Path,
    plans: &'a [Plan<'a>],
}

impl Shard<'_> {
    /// Writes the shard into the folder `temp`. Its tensor names, and the bytes of its data.
    fn write(&self, temp: &Path, summary: &mut Summary, read: &mut dyn FnMut(u64)) -> Result<(Vec<String>, u64)> {
        let write_error = |e| Error::write("write", self.out.join(&self.file))(e);
        let mut specs: Vec<Spec> = self.plans.iter().flat_map(|p| p.parts.clone()).collect();
        // Wider dtypes first, as safetensors itself orders them: everything lies aligned.
        specs.sort_by(|a, b| b.dtype.bitsize().cmp(&a.dtype.bitsize()).then_with(|| a.name.cmp(&b.name)));
        let states = self.plans.iter().filter(|p| p.packed);
        let states: Vec<String> = states.map(|p| state_name(&p.weight.name, self.config.quant_type)).collect();
        let place: std::collections::HashMap<String, usize> =
            specs.iter().enumerate().map(|(i, s)| (s.name.clone(), i)).collect();
        let mut names: Vec<String> = specs.iter().map(|s| s.name.clone()).collect();
        names.extend(states.iter().cloned());
        let mut writer = StreamWriter::create(&temp.join(&self.file), specs, &states).map_err(write_error)?;
        for plan in self.plans {
            let name = &plan.weight.name;
            let elements = plan.weight.shape.iter().product::<usize>() as u64;
            let tensor = self.dir_in.dense(name)?;
            if plan.packed {
                let q = nf4::quantize(&tensor, self.config.quant_type, self.config.double_quant);
                for (part, data) in to_parts(name, &q) {
                    summary.quantized_bytes += data.bytes.len() as u64;
                    match place.get(&part) {
                        Some(&i) => writer.put(i, &data.bytes),
                        None => writer.append(&part, &data.bytes),
                    }
                    .map_err(write_error)?;
                }
                summary.quantized += 1;
                summary.quantized_elements += elements;
            } else {
                writer.put(place[name], tensor.bytes()).map_err(write_error)?;
                summary.dense_elements += elements;
                summary.dense_bytes += tensor.bytes().len() as u64;
            }
            self.dir_in.release(name);
            read(tensor.bytes().len() as u64);
        }
        Ok((names, writer.finish().map_err(write_error)?))
    }
}

/// The projections that `skip_modules` names, by their full names: every release of transformers reads those alike.
fn skipped(dir: &ModelDir, skip_modules: &[String]) -> Result<Vec<String>> {
    let mut hit = vec![false; skip_modules.len()];
    let mut skipped = Vec::new();
    for w in dir.weights().iter().filter(|w| w.role != Role::Bias) {
        for (key, hit) in skip_modules.iter().zip(&mut hit) {
            if format!(".{}.", w.module()).contains(&format!(".{key}.")) {
                *hit = true;
                if w.role == Role::Projection && skipped.last().is_none_or(|s| s != w.module()) {
                    skipped.push(w.module().to_owned());
                }
            }
        }
    }
    // A tied head is no module of its own, but everyone's list of skipped modules has it.
    match skip_modules.iter().zip(hit).find(|(key, hit)| !hit && *key != "lm_head") {
        Some((key, _)) => {
            Err(Error::flag("llm_int8_skip_modules", format!("{key:?}"), "the name of a module of the model"))
        }
        None => Ok(skipped),
    }
}

/// config.json with the `quantization_config` that transformers writes for such a directory.
fn config_json(dir: &ModelDir, config: QuantConfig, skipped: &[String]) -> Map<String, Value> {
    let mut map = dir.raw_config().clone();
    let dtype = dir.dense_dtype().torch_name();
    let key = if map.contains_key("torch_dtype") { "torch_dtype" } else { "dtype" };
    map.insert(key.into(), json!(dtype));
    // With a list of its own, transformers no longer leaves out the head by itself.
    let skip = if skipped.is_empty() {
        Value::Null
    } else {
        json!(["lm_head".to_owned()].iter().chain(skipped).collect::<Vec<_>>())
    };
    map.insert(
        "quantization_config".into(),
        json!({
            "_load_in_4bit": true,
            "_load_in_8bit": false,
            "bnb_4bit_compute_dtype": dtype,
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_quant_type": config.quant_type.name(),
            "bnb_4bit_use_double_quant": config.double_quant,
            "llm_int8_enable_fp32_cpu_offload": false,
            "llm_int8_has_fp16_weight": false,
            "llm_int8_skip_modules": skip,
            "llm_int8_threshold": 6.0,
            "load_in_4bit": true,
            "load_in_8bit": false,
            "quant_method": "bitsandbytes",
        }),
    );
    map
}
