//! A Hugging Face model directory: config.json and safetensors, single or sharded, memory-mapped.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};

use serde_json::{Map, Value};

use super::QuantConfig;
use super::config::{self, Bnb4bit, ConfigFile};
use super::json::{Keys, existing, parse_object, read_text, shorten};
use super::names::{self, Role, Weight};
use super::safetensors_file::{SafeTensors, dense_dtype};
use crate::error::{Error, Result};
use crate::model::shapes::Format;
use crate::model::{ModelConfig, WeightSource};
use crate::nf4::serialize::{self, Part, QuantState};
use crate::nf4::{QuantType, Quantized};
use crate::tensor::{Dtype, HostMatrix, HostTensor};

/// Bytes that the disk is asked for behind the weight that is being loaded.
const READ_AHEAD: usize = 256 << 20;

/// An open model directory.
#[derive(Clone, Debug)]
pub struct ModelDir {
    path: PathBuf,
    config: ConfigFile,
    files: Vec<SafeTensors>,
    /// The file that holds each tensor.
    place: BTreeMap<String, usize>,
    /// What errors about a missing tensor name: the index, or the one file.
    listing: PathBuf,
    weights: Vec<Weight>,
    /// Names of the weights in 4 bits.
    packed: BTreeSet<String>,
}

/// One weight as `inspect` shows it. The parts of a 4-bit weight count as one.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorInfo {
    pub name: String,
    /// "BF16", "F16", "F32" of the file, or "NF4", "FP4".
    pub dtype: String,
    pub shape: Vec<usize>,
    /// Bytes in the file, all parts of a 4-bit weight together.
    pub bytes: u64,
    pub file: PathBuf,
}

impl ModelDir {
    /// Opens `path` and checks names, shapes and dtypes of all tensors against config.json.
    /// Errors: no such folder, a config that we do not run, a missing or faulty file, a tensor that is missing, of the
    /// wrong shape or dtype, or unknown.
    pub fn open(path: &Path) -> Result<Self> {
        if !path.is_dir() {
            std::fs::metadata(path).map_err(Error::read("open", path))?;
            return Err(Error::input(path, "model", "a file", "a folder with config.json and safetensors"));
        }
        let config = config::read(path)?;
        let (listing, files, place) = open_files(path)?;
        let weights = names::weights(&config.model);
        let mut dir = Self { path: path.into(), config, files, place, listing, weights, packed: BTreeSet::new() };
        dir.check()?;
        Ok(dir)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn config(&self) -> &ModelConfig {
        &self.config.model
    }

    /// The whole config.json.
    pub fn raw_config(&self) -> &Map<String, Value> {
        &self.config.raw
    }

    /// `quantization_config` of a 4-bit directory.
    pub fn quantization(&self) -> Option<&Bnb4bit> {
        self.config.quantization.as_ref()
    }

    /// Whether it is a 4-bit directory of bitsandbytes.
    pub fn is_quantized(&self) -> bool {
        self.config.quantization.is_some()
    }

    /// Weights for `Model::load`. `quantize`: how to put 16/32-bit projections into 4 bits; None leaves them as they
    /// are. A 4-bit directory is used as it is. Embedding, norms, biases and head always stay dense.
    /// NaN or infinite weights are an error naming file and tensor: of `vector` and, for matrices, of the upload.
    pub fn source(&self, quantize: Option<QuantConfig>) -> Result<Weights<'_>> {
        Ok(Weights { dir: self, quantize: quantize.filter(|_| !self.is_quantized()), ahead: None })
    }

    /// All weights, in the order of the graph.
    pub fn tensors(&self) -> impl Iterator<Item = TensorInfo> + '_ {
        self.weights.iter().map(|w| self.info(w))
    }

    /// All weights, in the order of the graph, with what they are for.
    pub(super) fn weights(&self) -> &[Weight] {
        &self.weights
    }

    /// Whether a weight is in 4 bits.
    pub fn is_packed(&self, name: &str) -> bool {
        self.packed.contains(name)
    }

    /// How the source of the same `quantize` gives a matrix, without reading it.
    pub fn format(&self, name: &str, quantize: Option<QuantConfig>) -> Format {
        if self.is_packed(name) {
            let nested = self.place.contains_key(&format!("{name}.nested_absmax"));
            return Format::FourBit { double_quant: nested };
        }
        let projection = self.weights.iter().any(|w| w.name == name && w.role == Role::Projection);
        match quantize.filter(|_| projection && !self.is_quantized()) {
            Some(q) => Format::FourBit { double_quant: q.double_quant },
            None => Format::Dense,
        }
    }

    /// The most common dtype of the dense weights, by bytes; F32 on a tie with none.
    pub fn dense_dtype(&self) -> Dtype {
        let mut bytes = [(Dtype::Bf16, 0), (Dtype::F16, 0), (Dtype::F32, 0)];
        for w in self.weights.iter().filter(|w| !self.is_packed(&w.name)) {
            if let Ok(e) = self.file_of(&w.name).and_then(|f| f.entry(&w.name)) {
                bytes.iter_mut().filter(|(d, _)| Some(*d) == dense_dtype(e.dtype)).for_each(|b| b.1 += e.range.len());
            }
        }
        bytes.into_iter().max_by_key(|b| b.1).map_or(Dtype::F32, |b| b.0)
    }

    /// The dtype of a dense tensor. Errors: not one.
    pub(super) fn dtype(&self, name: &str) -> Result<Dtype> {
        Ok(self.file_of(name)?.dense(name)?.dtype)
    }

    /// A dense tensor, mapped, checked for NaN and infinities.
    pub fn dense(&self, name: &str) -> Result<HostTensor> {
        self.file_of(name)?.will_need(name);
        let tensor = self.unchecked(name)?;
        tensor.check_finite()?;
        Ok(tensor)
    }

    /// A dense tensor, mapped. Whoever reads it looks for NaN and infinities.
    fn unchecked(&self, name: &str) -> Result<HostTensor> {
        let file = self.file_of(name)?;
        Ok(file.dense(name)?.named(file.path(), name))
    }

    /// A weight in 4 bits. Errors: not one, a missing or faulty part.
    pub fn quantized(&self, name: &str) -> Result<Quantized> {
        let file = self.file_of(name)?;
        file.will_need(name);
        let q = serialize::from_parts(file.path(), name, |part| self.part(part))?;
        file.release(name);
        q.ok_or_else(|| Error::input(file.path(), format!("tensor {name}"), "no quant_state", "a weight in 4 bits"))
    }

    /// Gives back the pages of a dense tensor whose values now live elsewhere.
    pub fn release(&self, name: &str) {
        if let Ok(file) = self.file_of(name) {
            file.release(name);
        }
    }

    fn part(&self, name: &str) -> Result<Option<Part<'_>>> {
        let Some(&i) = self.place.get(name) else { return Ok(None) };
        let view = self.files[i].get(name)?;
        Ok(Some(Part { dtype: view.dtype, shape: view.shape.to_vec(), bytes: view.bytes.into() }))
    }

    fn file_of(&self, name: &str) -> Result<&SafeTensors> {
        match self.place.get(name) {
            Some(&i) => Ok(&self.files[i]),
            None => {
                Err(Error::input(&self.listing, format!("tensor {name}"), "no such tensor", "all tensors of the model"))
            }
        }
    }

    fn info(&self, w: &Weight) -> TensorInfo {
        let size = |name: &str| {
            let entry = self.place.get(name).and_then(|&i| self.files[i].entry(name).ok());
            entry.map_or(0, |e| e.range.len() as u64)
        };
        let (mut dtype, mut bytes) = (String::new(), size(&w.name));
        if let Some(&i) = self.place.get(&w.name) {
            dtype = self.files[i].entry(&w.name).map_or_else(|_| String::new(), |e| e.dtype.to_string());
        }
        if self.is_packed(&w.name) {
            let state = |t| self.place.contains_key(&serialize::state_name(&w.name, t));
            dtype = if state(QuantType::Nf4) { "NF4" } else { "FP4" }.into();
            let parts = self.place.range(w.name.clone()..).map(|(n, _)| n).take_while(|n| n.starts_with(&w.name));
            bytes += parts.filter(|n| serialize::weight_of_part(n) == Some(&w.name)).map(|n| size(n)).sum::<u64>();
        }
        let file = self.place.get(&w.name).map_or_else(|| self.listing.clone(), |&i| self.files[i].path().into());
        TensorInfo { name: w.name.clone(), dtype, shape: w.shape.clone(), bytes, file }
    }

    /// Names, shapes and dtypes against the config.
    fn check(&mut self) -> Result<()> {
        let mut packed = BTreeSet::new();
        for w in &self.weights {
            let file = self.file_of(&w.name)?;
            let place = || format!("tensor {}", w.name);
            let entry = file.entry(&w.name)?;
            if let Some(state) = self.quant_state(&w.name)? {
                if !matches!(w.role, Role::Projection | Role::Head) {
                    return Err(Error::input(file.path(), place(), "a weight in 4 bits", "16 or 32-bit floats"));
                }
                if state.shape != w.shape {
                    let found = format!("shape {:?} in its quant_state", state.shape);
                    return Err(Error::input(file.path(), place(), found, shape_of(w)));
                }
                let bytes = w.shape.iter().product::<usize>().div_ceil(2);
                if entry.range.len() != bytes {
                    let found = format!("{} bytes of packed codes", entry.range.len());
                    return Err(Error::input(file.path(), place(), found, format!("{bytes} bytes for {:?}", w.shape)));
                }
                packed.insert(w.name.clone());
                continue;
            }
            if dense_dtype(entry.dtype).is_none() {
                let found = format!("dtype {}", entry.dtype);
                return Err(Error::input(file.path(), place(), found, "dtype BF16, F16 or F32"));
            }
            if entry.shape != w.shape {
                return Err(Error::input(file.path(), place(), format!("shape {:?}", entry.shape), shape_of(w)));
            }
        }
        let config = self.path.join("config.json");
        match (packed.is_empty(), self.config.quantization.is_some()) {
            (false, false) => {
                let found = "no such key, beside weights in 4 bits";
                return Err(Error::input(config, "key quantization_config", found, "the settings they were made with"));
            }
            (true, true) => {
                let found = "4-bit settings, beside 16 or 32-bit weights alone";
                return Err(Error::input(
                    config,
                    "key quantization_config",
                    found,
                    "weights in 4 bits, or no such key",
                ));
            }
            _ => {}
        }
        self.packed = packed;
        self.refuse_unknown()
    }

    /// A tensor that the config does not know is part of a model that we would get wrong.
    fn refuse_unknown(&self) -> Result<()> {
        let known: BTreeSet<&str> = self.weights.iter().map(|w| w.name.as_str()).collect();
        for (name, &i) in &self.place {
            let part = serialize::weight_of_part(name).is_some_and(|weight| self.packed.contains(weight));
            if !part && !known.contains(name.as_str()) && !names::is_ignored(name, self.config()) {
                let model_type = self.config.raw.get("model_type").map(shorten).unwrap_or_default();
                let expected = format!(
                    "only tensors that a {model_type} model of {} layers with this config.json has",
                    self.config().num_hidden_layers
                );
                return Err(Error::input(
                    self.files[i].path(),
                    format!("tensor {name}"),
                    "an unknown tensor",
                    expected,
                ));
            }
        }
        Ok(())
    }

    fn quant_state(&self, name: &str) -> Result<Option<QuantState>> {
        for quant_type in [QuantType::Nf4, QuantType::Fp4] {
            let state = serialize::state_name(name, quant_type);
            if let Some(&i) = self.place.get(&state) {
                let file = &self.files[i];
                return QuantState::parse(file.path(), &state, file.get(&state)?.bytes).map(Some);
            }
        }
        Ok(None)
    }
}

fn shape_of(w: &Weight) -> String {
    format!("shape {:?}, by config.json", w.shape)
}

type Files = (PathBuf, Vec<SafeTensors>, BTreeMap<String, usize>);

/// The files of a directory, and which of them holds each tensor.
fn open_files(dir: &Path) -> Result<Files> {
    if let Some(path) = existing(dir, "model.safetensors") {
        let file = SafeTensors::open(&path)?;
        let place = file.names().map(|n| (n.to_owned(), 0)).collect();
        return Ok((path, vec![file], place));
    }
    let Some(index) = existing(dir, "model.safetensors.index.json") else {
        let pickled = existing(dir, "pytorch_model.bin").or(existing(dir, "pytorch_model.bin.index.json"));
        let found = if pickled.is_some() { "pickled weights (pytorch_model.bin)" } else { "no weights" };
        return Err(Error::input(dir, "folder", found, "model.safetensors or model.safetensors.index.json"));
    };
    let (mut files, mut opened, mut place) = (Vec::new(), BTreeMap::new(), BTreeMap::new());
    for (name, shard) in parse_index(&index, &read_text(&index)?)? {
        let i = match opened.get(&shard) {
            Some(&i) => i,
            None => {
                let path = dir.join(&shard);
                if !path.exists() {
                    let found = format!("file {shard:?}, which is missing");
                    return Err(Error::input(&index, format!("tensor {name}"), found, "a file in the same folder"));
                }
                files.push(SafeTensors::open(&path)?);
                opened.insert(shard, files.len() - 1);
                files.len() - 1
            }
        };
        if !files[i].contains(&name) {
            let expected = format!("the tensor that {} says is here", index.display());
            return Err(Error::input(files[i].path(), format!("tensor {name}"), "no such tensor", expected));
        }
        place.insert(name, i);
    }
    Ok((index, files, place))
}

/// Tensor names with the shards that hold them, of the text of a model.safetensors.index.json; `file` only names it in
/// errors. Errors: malformed, no weight_map, a shard that is not the name of a file in the same folder.
pub fn parse_index(file: &Path, text: &str) -> Result<Vec<(String, String)>> {
    let map = parse_object(file, text)?;
    let keys = Keys { file, prefix: "", map: &map };
    let weight_map = keys.object("weight_map")?;
    let weight_map =
        weight_map.ok_or_else(|| keys.fault("weight_map", "no such key", "tensor names with their files"))?;
    let mut places = Vec::with_capacity(weight_map.len());
    for (name, value) in weight_map {
        let fault = |found: String, expected: &str| Error::input(file, format!("tensor {name}"), found, expected);
        let shard = value.as_str().ok_or_else(|| fault(shorten(value), "the name of a file"))?;
        if !matches!(Path::new(shard).components().collect::<Vec<_>>()[..], [Component::Normal(_)]) {
            return Err(fault(format!("file {shard:?}"), "the name of a file in the same folder"));
        }
        places.push((name.clone(), shard.to_owned()));
    }
    Ok(places)
}

/// The weights of a [`ModelDir`], one at a time.
pub struct Weights<'a> {
    dir: &'a ModelDir,
    quantize: Option<QuantConfig>,
    /// From the first matrix on.
    ahead: Option<ReadAhead>,
}

/// Tells the kernel of the weights that come next, from a thread of its own: for pages that it has already, advice takes as
/// long as loading them.
struct ReadAhead {
    /// So many weights, in the order of the graph, have been passed on.
    told: usize,
    /// Their numbers. The thread ends when this goes.
    tell: Sender<usize>,
    /// The weight that is being loaded: the thread is silent about those before it.
    here: Arc<AtomicUsize>,
}

impl ReadAhead {
    /// None where no thread is to be had.
    fn new(dir: ModelDir) -> Option<Self> {
        let (tell, told) = channel();
        let here = Arc::new(AtomicUsize::new(0));
        let now = here.clone();
        let advise = move |i: usize| {
            let name = &dir.weights[i].name;
            // Advice only: where it fails the pages come as they are touched.
            if let (true, Ok(file)) = (i >= now.load(Ordering::Relaxed), dir.file_of(name)) {
                file.will_need(name);
            }
        };
        let work = move || told.into_iter().for_each(advise);
        std::thread::Builder::new().name("read-ahead".into()).spawn(work).ok()?;
        Some(Self { told: 0, tell, here })
    }

    /// Weight `here` is being loaded: passes it on, and [`READ_AHEAD`] bytes behind it.
    fn reach(&mut self, dir: &ModelDir, here: usize) -> Result<()> {
        self.here.store(here, Ordering::Relaxed);
        let mut behind = 0;
        for (i, w) in dir.weights.iter().enumerate().skip(here) {
            if i >= self.told {
                // It fails if the thread is gone, and its advice with it.
                let _ = self.tell.send(i);
                self.told = i + 1;
            }
            behind += if i > here { dir.file_of(&w.name)?.parts(&w.name).map(|e| e.range.len()).sum() } else { 0 };
            if behind >= READ_AHEAD {
                break;
            }
        }
        Ok(())
    }
}

impl Drop for ReadAhead {
    fn drop(&mut self) {
        self.here.store(usize::MAX, Ordering::Relaxed);
    }
}

impl WeightSource for Weights<'_> {
    fn vector(&mut self, name: &str) -> Result<HostTensor> {
        self.dir.dense(name)
    }

    fn matrix(&mut self, name: &str) -> Result<HostMatrix> {
        let here = self.dir.weights.iter().position(|w| w.name == name);
        if self.ahead.is_none() {
            self.ahead = ReadAhead::new(self.dir.clone());
        }
        if let (Some(here), Some(ahead)) = (here, &mut self.ahead) {
            ahead.reach(self.dir, here)?;
        }
        if self.dir.is_packed(name) {
            return self.dir.quantized(name).map(HostMatrix::Quantized);
        }
        let tensor = self.dir.unchecked(name)?;
        let projection = here.is_some_and(|here| self.dir.weights[here].role == Role::Projection);
        Ok(match self.quantize.filter(|_| projection) {
            Some(config) => HostMatrix::Quantize(tensor, config),
            None => HostMatrix::Dense(tensor),
        })
    }
}
