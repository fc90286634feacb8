//! PEFT adapters: adapter_config.json and adapter_model.safetensors, both ways.
//!
//! A setting of PEFT that changes what the adapter computes, and that we do not run, is refused by name. Keys that only
//! tell how the adapter was made are passed over; keys we have never seen are refused unless they are off.

use std::io::{self, Write};
use std::path::Path;

use serde_json::{Map, Value, json};

use super::atomic::{self, DirWriter};
use super::json::{Keys, is_off, parse_object, read_text, shorten};
use super::safetensors_file::{FileDtype, SafeTensors};
use super::safetensors_write::{Spec, write_to};
use crate::error::{Error, Result};
use crate::model::{AdapterLayout, HostAdapter, LoraConfig, ModelConfig, Proj, TargetModules};

pub const CONFIG: &str = "adapter_config.json";
pub const WEIGHTS: &str = "adapter_model.safetensors";

/// Keys of adapter_config.json that do not change what a trained adapter computes.
const PASSED_OVER: [&str; 15] = [
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "eva_config",
    "inference_mode",
    "layers_pattern",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    // Read below.
    "init_lora_weights",
    "task_type",
    "peft_type",
];

/// Keys that [`parse_config`] reads.
const READ: [&str; 9] = [
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "fan_in_fan_out",
    "bias",
];

/// Parses the text of an adapter_config.json; `file` only names it in errors.
/// Errors: malformed, a key missing or unusable, anything but plain LoRA for causal language models.
pub fn parse_config(file: &Path, text: &str) -> Result<LoraConfig> {
    let map = parse_object(file, text)?;
    let keys = Keys { file, prefix: "", map: &map };
    let kind = keys.text("peft_type")?;
    if kind != "LORA" {
        return Err(keys.fault("peft_type", format!("{kind:?}"), "\"LORA\": other adapters are not supported"));
    }
    let task = keys.text_or("task_type", "CAUSAL_LM")?;
    if task != "CAUSAL_LM" {
        return Err(keys.fault("task_type", format!("{task:?}"), "\"CAUSAL_LM\""));
    }
    let bias = keys.text_or("bias", "none")?;
    if bias != "none" {
        return Err(keys.fault("bias", format!("{bias:?}"), "\"none\": trained biases are not supported"));
    }
    if keys.flag("fan_in_fan_out", false)? {
        return Err(keys.fault("fan_in_fan_out", "true", "false: weights of Conv1D models are not supported"));
    }
    if let Some(init) = keys.get("init_lora_weights") {
        // PiSSA, OLoRA, CorDA and LoftQ take part of the weights out of the base model.
        let keeps_base = init.is_boolean() || matches!(init.as_str(), Some("gaussian" | "eva" | "orthogonal"));
        if !keeps_base {
            let expected = "true, false, \"gaussian\", \"eva\" or \"orthogonal\": others change the base model";
            return Err(keys.fault("init_lora_weights", shorten(init), expected));
        }
    }
    for (key, value) in &map {
        let known = READ.contains(&key.as_str()) || PASSED_OVER.contains(&key.as_str());
        if !known && !is_off(value) && !is_default(key, value) {
            return Err(keys.fault(key, shorten(value), "plain LoRA: this setting is not supported"));
        }
    }
    Ok(LoraConfig {
        r: keys.size("r")?,
        lora_alpha: keys.number("lora_alpha")?,
        lora_dropout: dropout(&keys)?,
        target_modules: target_modules(&keys)?,
        rank_pattern: rank_pattern(&keys)?,
        alpha_pattern: alpha_pattern(&keys)?,
        use_rslora: keys.flag("use_rslora", false)?,
    })
}

/// Settings whose default is not an "off" value.
fn is_default(key: &str, value: &Value) -> bool {
    // LoftQ's settings matter only under init_lora_weights = "loftq", which is refused.
    key == "loftq_config" && value.is_object()
}

fn dropout(keys: &Keys) -> Result<f32> {
    let p = keys.number_or("lora_dropout", 0.0)? as f32;
    if (0.0..1.0).contains(&p) {
        Ok(p)
    } else {
        Err(keys.fault("lora_dropout", p.to_string(), "a number from 0 to below 1"))
    }
}

fn target_modules(keys: &Keys) -> Result<TargetModules> {
    match keys.get("target_modules") {
        Some(Value::String(s)) if s.eq_ignore_ascii_case("all-linear") => {
            Ok(TargetModules::Pattern("all-linear".into()))
        }
        Some(Value::String(s)) => Ok(TargetModules::Pattern(s.clone())),
        Some(_) => Ok(TargetModules::List(keys.texts("target_modules")?)),
        None => Err(keys.fault("target_modules", "no value", "a list of names, a regex, or \"all-linear\"")),
    }
}

fn rank_pattern(keys: &Keys) -> Result<Vec<(String, usize)>> {
    let Some(map) = keys.object("rank_pattern")? else { return Ok(Vec::new()) };
    let inner = Keys { file: keys.file, prefix: "rank_pattern.", map };
    map.keys().map(|k| Ok((k.clone(), inner.size(k)?))).collect()
}

fn alpha_pattern(keys: &Keys) -> Result<Vec<(String, f64)>> {
    let Some(map) = keys.object("alpha_pattern")? else { return Ok(Vec::new()) };
    let inner = Keys { file: keys.file, prefix: "alpha_pattern.", map };
    map.keys().map(|k| Ok((k.clone(), inner.number(k)?))).collect()
}

/// Reads the adapter in `dir` for a model. Tensors of f32, bf16 or f16; the weights come out in f32.
/// Errors: an unsupported setting; a tensor that is missing, unknown, of another shape (an adapter for another model),
/// or not finite.
pub fn load(dir: &Path, model: &ModelConfig) -> Result<HostAdapter> {
    let path = dir.join(CONFIG);
    if dir.is_dir() && !path.exists() {
        return Err(Error::input(dir, "folder", "no adapter_config.json", "a PEFT adapter"));
    }
    let config = parse_config(&path, &read_text(&path)?)?;
    let layout = AdapterLayout::new(&config, model).map_err(|e| in_file(&path, e))?;
    let weights = dir.join(WEIGHTS);
    if !weights.exists() && dir.join("adapter_model.bin").exists() {
        return Err(Error::input(dir, "folder", "pickled weights (adapter_model.bin)", WEIGHTS));
    }
    let file = SafeTensors::open(&weights)?;
    let weights = read_weights(&file, &layout, model)?;
    Ok(HostAdapter { config, layout, weights })
}

/// An error of the layout that came from a file, not from the command line.
fn in_file(path: &Path, error: Error) -> Error {
    match error {
        Error::Flag { flag, found, expected } => Error::input(path, format!("key {flag}"), found, expected),
        other => other,
    }
}

fn read_weights(file: &SafeTensors, layout: &AdapterLayout, model: &ModelConfig) -> Result<Vec<f32>> {
    const OTHER: &str = "is it an adapter for another model?";
    let mut weights = vec![0.0f32; layout.len];
    let mut wanted = std::collections::BTreeSet::new();
    for s in &layout.sites {
        for (which, shape, range) in [('A', [s.r, s.k], s.a_range()), ('B', [s.n, s.r], s.b_range())] {
            let name = s.peft_name(which);
            let fault =
                |found: String, expected: String| Error::input(file.path(), format!("tensor {name}"), found, expected);
            if !file.contains(&name) {
                return Err(fault(
                    "no such tensor".into(),
                    format!("shape {shape:?}, by {CONFIG} and the model; {OTHER}"),
                ));
            }
            let tensor = file.dense(&name)?;
            if tensor.shape != shape {
                let expected = format!("shape {shape:?}, by {CONFIG} and the model; {OTHER}");
                return Err(fault(format!("shape {:?}", tensor.shape), expected));
            }
            let out = &mut weights[range];
            tensor.widen(0, out);
            if let Some(i) = tensor.first_not_finite() {
                return Err(fault(format!("{} at index {i}", out[i]), "finite weights".into()));
            }
            wanted.insert(name);
        }
    }
    if let Some(name) = file.names().find(|n| !wanted.contains(*n)) {
        let shape = &file.entry(name)?.shape;
        let expected = format!(
            "only LoRA tensors of the modules that {CONFIG} targets in a model of {} layers; {OTHER}",
            model.num_hidden_layers
        );
        return Err(Error::input(
            file.path(),
            format!("tensor {name}"),
            format!("an unknown tensor, shape {shape:?}"),
            expected,
        ));
    }
    Ok(weights)
}

/// The text of adapter_config.json. "all-linear" becomes the names it stands for, as PEFT itself saves it. Only keys
/// that every release of PEFT knows are written.
pub fn config_text(config: &LoraConfig, base_model: &str) -> String {
    let targets = match &config.target_modules {
        TargetModules::List(names) => json!(names),
        TargetModules::Pattern(p) if p == "all-linear" => json!(Proj::ALL.map(Proj::short_name)),
        TargetModules::Pattern(p) => json!(p),
    };
    let ranks: Map<String, Value> = config.rank_pattern.iter().map(|(k, r)| (k.clone(), json!(r))).collect();
    let alphas: Map<String, Value> = config.alpha_pattern.iter().map(|(k, a)| (k.clone(), number(*a))).collect();
    let map = json!({
        "alpha_pattern": alphas,
        "auto_mapping": null,
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": true,
        "layers_pattern": null,
        "layers_to_transform": null,
        "lora_alpha": number(config.lora_alpha),
        "lora_dropout": shortest(config.lora_dropout),
        "modules_to_save": null,
        "peft_type": "LORA",
        "r": config.r,
        "rank_pattern": ranks,
        "revision": null,
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
        "use_dora": false,
        "use_rslora": config.use_rslora,
    });
    format!("{map:#}\n")
}

/// Whole numbers without a fraction: 16, not 16.0.
fn number(x: f64) -> Value {
    if x.fract() == 0.0 && x.abs() < 1e15 { json!(x as i64) } else { json!(x) }
}

/// The shortest decimal that is this f32: 0.05, not 0.05000000074505806.
fn shortest(x: f32) -> Value {
    json!(x.to_string().parse::<f64>().unwrap_or(x.into()))
}

/// Writes adapter_model.safetensors: f32, PEFT's names, in alphabetical order as PEFT has them.
pub(super) fn write_weights(adapter: &HostAdapter, out: &mut dyn Write) -> io::Result<()> {
    let mut tensors = Vec::new();
    for s in &adapter.layout.sites {
        for (which, shape, range) in [('A', [s.r, s.k], s.a_range()), ('B', [s.n, s.r], s.b_range())] {
            let spec = Spec::new(s.peft_name(which), FileDtype::F32, shape.to_vec());
            tensors.push((spec, bytemuck::cast_slice(&adapter.weights[range])));
        }
    }
    tensors.sort_by(|a, b| a.0.name.cmp(&b.0.name));
    write_to(out, tensors)
}

/// Writes the two files into a folder in the making.
pub(super) fn write_files(dir: &DirWriter, adapter: &HostAdapter, base_model: &str) -> Result<()> {
    dir.write(WEIGHTS, |out| write_weights(adapter, out))?;
    dir.write(CONFIG, |out| out.write_all(config_text(&adapter.config, base_model).as_bytes()))
}

/// Writes the adapter so that PEFT loads it. A folder that is not there appears complete or not at all; in one that is,
/// the two files are replaced one after the other and everything else is left alone.
/// Errors: the system refuses to write.
pub fn save(dir: &Path, adapter: &HostAdapter, base_model: &str) -> Result<()> {
    if dir.is_dir() {
        atomic::write_file(&dir.join(WEIGHTS), |out| write_weights(adapter, out))?;
        let text = config_text(&adapter.config, base_model);
        return atomic::write_file(&dir.join(CONFIG), |out| out.write_all(text.as_bytes()));
    }
    let writer = DirWriter::new(dir)?;
    write_files(&writer, adapter, base_model)?;
    writer.commit()
}
