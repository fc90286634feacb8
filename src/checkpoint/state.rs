//! Training state: a folder `checkpoint-N` with the adapter as PEFT has it, the optimizer, and where training stood.
//!
//! The folder appears under its name only when all of it is on disk, so a process killed at any moment leaves the
//! previous one as the newest.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::atomic::DirWriter;
use super::json::{Keys, parse_object, read_text};
use super::peft;
use super::safetensors_file::{FileDtype, SafeTensors};
use super::safetensors_write::{Spec, write_to};
use crate::backend::adamw::Blocks;
use crate::backend::{Moment, OptimizerState};
use crate::error::{Error, Result};
use crate::model::{AdapterLayout, HostAdapter, LoraConfig, ModelConfig};

pub const OPTIMIZER: &str = "optimizer.safetensors";
pub const TRAINER: &str = "trainer_state.json";
const PREFIX: &str = "checkpoint-";
const VERSION: usize = 1;

/// All that a run needs to go on as if it had never stopped.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainingState {
    /// Optimizer steps done.
    pub step: u64,
    pub adapter: HostAdapter,
    /// Master weights and moments, in the order of the adapter's flat vector.
    pub optimizer: OptimizerState,
    /// What the training loop keeps: data position, best loss, seeds. Not looked into here.
    pub trainer: Value,
}

/// The folder of a step: `dir/checkpoint-STEP`.
pub fn path_of(dir: &Path, step: u64) -> PathBuf {
    dir.join(format!("{PREFIX}{step}"))
}

/// Writes a checkpoint folder, complete or not at all, replacing one of the same name.
pub fn save(dir: &Path, state: &TrainingState, base_model: &str) -> Result<()> {
    let writer = DirWriter::new(dir)?;
    peft::write_files(&writer, &state.adapter, base_model)?;
    writer.write(OPTIMIZER, |out| {
        let o = &state.optimizer;
        let mut tensors = moment(["m", "m.absmax"], &o.m);
        tensors.push(floats("master", &o.master));
        tensors.extend(moment(["v", "v.absmax"], &o.v));
        write_to(out, tensors)
    })?;
    writer.write(TRAINER, |out| {
        // The LoRA settings as they were given: adapter_config.json has "all-linear" spelled out.
        let lora = serde_json::to_value(&state.adapter.config)?;
        let map = json!({"version": VERSION, "global_step": state.step, "lora": lora, "trainer": state.trainer});
        serde_json::to_writer_pretty(out, &map).map_err(io::Error::from)
    })?;
    writer.commit()
}

/// Reads a checkpoint folder for a model. Errors: a missing or faulty file, another model, another version.
pub fn load(dir: &Path, model: &ModelConfig) -> Result<TrainingState> {
    let path = dir.join(TRAINER);
    let map = read_trainer(&path)?;
    let keys = Keys { file: &path, prefix: "", map: &map };
    let step = global_step(&keys)?;
    let mut adapter = peft::load(dir, model)?;
    if let Some(lora) = keys.get("lora") {
        let config = serde_json::from_value::<LoraConfig>(lora.clone())
            .map_err(|e| keys.fault("lora", e.to_string(), "the LoRA settings"))?;
        let layout = AdapterLayout::new(&config, model)?;
        if layout != adapter.layout {
            return Err(keys.fault("lora", "settings of another adapter", "the settings of the adapter beside it"));
        }
        adapter.config = config;
    }
    let optimizer = read_optimizer(&dir.join(OPTIMIZER), &adapter.layout)?;
    Ok(TrainingState { step, adapter, optimizer, trainer: map.get("trainer").cloned().unwrap_or_default() })
}

fn floats<'a>(name: &str, values: &'a [f32]) -> (Spec, &'a [u8]) {
    (Spec::new(name, FileDtype::F32, vec![values.len()]), bytemuck::cast_slice(values))
}

/// A moment as it is: f32, or 8-bit codes and the absmax of their blocks.
fn moment<'a>(names: [&str; 2], moment: &'a Moment) -> Vec<(Spec, &'a [u8])> {
    match moment {
        Moment::F32(values) => vec![floats(names[0], values)],
        Moment::U8 { codes, absmax } => {
            let codes = (Spec::new(names[0], FileDtype::U8, vec![codes.len()]), codes.as_slice());
            vec![codes, floats(names[1], absmax)]
        }
    }
}

fn read_trainer(path: &Path) -> Result<Map<String, Value>> {
    let map = parse_object(path, &read_text(path)?)?;
    let keys = Keys { file: path, prefix: "", map: &map };
    match keys.size("version")? {
        VERSION => Ok(map),
        other => Err(keys.fault("version", other.to_string(), format!("{VERSION}: made by another halfbyte"))),
    }
}

fn global_step(keys: &Keys) -> Result<u64> {
    let value = keys.get("global_step").and_then(Value::as_u64);
    value.ok_or_else(|| keys.fault("global_step", "no count", "the number of steps done"))
}

fn read_optimizer(path: &Path, layout: &AdapterLayout) -> Result<OptimizerState> {
    let file = SafeTensors::open(path)?;
    let blocks = Blocks::new(layout.len, &layout.tensor_lens())?.count();
    let expect = |name: &str, shape: &[usize], len: usize| {
        let expected = format!("shape [{len}], by the adapter beside it");
        let fault = || Error::input(path, format!("tensor {name}"), format!("shape {shape:?}"), expected);
        if shape == [len] { Ok(()) } else { Err(fault()) }
    };
    let floats = |name: &str, len: usize| {
        let tensor = file.dense(name)?;
        expect(name, &tensor.shape, len)?;
        let fault = |found: String, expected: String| Error::input(path, format!("tensor {name}"), found, expected);
        match tensor.first_not_finite() {
            None => Ok(tensor.to_f32()),
            Some(i) => Err(fault(format!("NaN or infinity at index {i}"), "finite values".into())),
        }
    };
    let moment = |name: &str| {
        let view = file.get(name)?;
        if view.dtype != FileDtype::U8 {
            return Ok(Moment::F32(floats(name, layout.len)?));
        }
        expect(name, view.shape, layout.len)?;
        Ok::<_, Error>(Moment::U8 { codes: view.bytes.to_vec(), absmax: floats(&format!("{name}.absmax"), blocks)? })
    };
    Ok(OptimizerState { master: floats("master", layout.len)?, m: moment("m")?, v: moment("v")? })
}

/// All folders `checkpoint-N` of an output folder, by rising N, complete or not.
pub fn checkpoints(dir: &Path) -> Vec<(u64, PathBuf)> {
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    let mut found: Vec<(u64, PathBuf)> = entries
        .filter_map(|e| {
            let path = e.ok()?.path();
            let digits = path.file_name()?.to_str()?.strip_prefix(PREFIX)?.to_owned();
            // "+3" and "03" parse as numbers too, and are not ours.
            let step: u64 = digits.parse().ok().filter(|n: &u64| n.to_string() == digits)?;
            path.is_dir().then_some((step, path))
        })
        .collect();
    found.sort();
    found
}

/// The newest checkpoint of an output folder whose files are all there and sound.
pub fn latest(dir: &Path) -> Option<PathBuf> {
    checkpoints(dir).into_iter().rev().find(|(step, path)| is_sound(path, *step)).map(|(_, path)| path)
}

fn is_sound(dir: &Path, step: u64) -> bool {
    let path = dir.join(TRAINER);
    let Ok(map) = read_trainer(&path) else { return false };
    let keys = Keys { file: &path, prefix: "", map: &map };
    global_step(&keys).is_ok_and(|n| n == step)
        && read_text(&dir.join(peft::CONFIG)).is_ok_and(|t| peft::parse_config(&dir.join(peft::CONFIG), &t).is_ok())
        && [peft::WEIGHTS, OPTIMIZER].iter().all(|f| SafeTensors::open(&dir.join(f)).is_ok())
}
