//! What a run reads before step 1: data, adapter, base weights.

use std::cell::RefCell;

use super::config::TrainConfig;
use super::resume::{self, Fingerprints};
use super::ui::Ui;
use crate::backend::Backend;
use crate::checkpoint::{ModelDir, QuantConfig, peft};
use crate::data::{self, DataOptions, Dataset, EvalSize, Overlong, Row, Tokenizer};
use crate::error::{Error, Result};
use crate::memory::{self, Card, Mode, Plan, Request};
use crate::model::{HostAdapter, Keep, LayerPlan, Model, ModelOptions};

/// Rows to train on and rows held out.
pub struct Data {
    pub train: Dataset,
    pub rows: Vec<Row>,
    pub eval_rows: Vec<Row>,
}

/// Tokenises, splits and packs; shows counts, lengths and one sample with its targets.
pub fn data(config: &TrainConfig, dir: &ModelDir, ui: &mut dyn Ui) -> Result<Data> {
    let tokenizer = Tokenizer::open(&config.model, dir.config().vocab_size)?;
    let mut options = DataOptions {
        files: config.data.clone(),
        max_length: config.max_length,
        overlong: overlong(config)?,
        completion_only_loss: config.completion_only_loss.unwrap_or(true),
        assistant_only_loss: config.assistant_only_loss,
        cache_dir: Some(config.cache_dir.clone().unwrap_or_else(|| config.out.join(".cache"))),
    };
    let ui = RefCell::new(ui);
    let load = |label: &str, options: &DataOptions| {
        let dataset =
            data::load(&tokenizer, options, &|done, total| ui.borrow_mut().work(label, "bytes", done, total))?;
        for line in dataset.summary() {
            ui.borrow_mut().note(&format!("{label}: {line}"));
        }
        Ok::<_, Error>(dataset)
    };
    let mut train = load("data", &options)?;
    let mut eval = None;
    if !config.eval_data.is_empty() {
        options.files = config.eval_data.clone();
        eval = Some(load("eval_data", &options)?);
    } else if config.eval_fraction > 0.0 {
        let (rest, held) = data::split(train, EvalSize::Fraction(config.eval_fraction), config.seed)?;
        train = rest;
        eval = Some(held);
    }
    let rows = data::pack(&train, config.max_length, config.packing);
    let eval_rows = eval.map(|e| data::pack(&e, config.max_length, config.packing)).unwrap_or_default();
    if let Some(document) = train.documents.first() {
        let sample = data::preview(&tokenizer, document, false)?;
        ui.borrow_mut().note(&format!("sample {} (targets between ⟦ and ⟧):\n{sample}", train.document_name(0)));
    }
    Ok(Data { train, rows, eval_rows })
}

fn overlong(config: &TrainConfig) -> Result<Overlong> {
    match config.overlong.as_str() {
        "error" => Ok(Overlong::Error),
        "drop" => Ok(Overlong::Drop),
        "truncate" => Ok(Overlong::Truncate),
        "split" => Ok(Overlong::Split),
        other => Err(Error::flag("overlong", format!("{other:?}"), "one of error, drop, truncate, split")),
    }
}

/// Hashes of what was read, for [`resume`].
pub fn fingerprints(config: &TrainConfig, data: &Data) -> Result<Fingerprints> {
    Ok(Fingerprints {
        model: resume::model_fingerprint(&config.model)?,
        train_rows: resume::rows_fingerprint(&data.rows),
        eval_rows: resume::rows_fingerprint(&data.eval_rows),
    })
}

/// The adapter that step 1 starts from: that of the key `adapter`, or a fresh one.
pub fn adapter(config: &TrainConfig, dir: &ModelDir) -> Result<HostAdapter> {
    match &config.adapter {
        Some(path) => peft::load(path, dir.config()),
        None => HostAdapter::init(config.lora(), dir.config(), config.seed),
    }
}

/// How the base weights come into 4 bits; None: as they are.
fn quantize(config: &TrainConfig) -> Result<Option<QuantConfig>> {
    if !config.load_in_4bit {
        return Ok(None);
    }
    Ok(Some(QuantConfig { quant_type: config.quant_type()?, double_quant: config.bnb_4bit_use_double_quant }))
}

/// The plan of the run, for which the backend has set its memory aside; None where the device is the host.
/// Errors: a budget that the device has not, or into which nothing fits.
pub fn plan<B: Backend>(
    backend: &mut B,
    config: &TrainConfig,
    dir: &ModelDir,
    adapter: &HostAdapter,
    max_tokens: usize,
    ui: &mut dyn Ui,
) -> Result<Option<Plan>> {
    backend.release()?;
    let Some(free) = backend.free_memory()? else { return Ok(None) };
    let card = *Card::of_device(&backend.describe(), free);
    let device = memory::budget("memory", config.memory.as_deref(), free, &card)?;
    let host = match &config.host_memory {
        Some(text) => memory::parse_size("host_memory", text)?,
        None => memory::host_memory() / 2,
    };
    let quantize = quantize(config)?;
    let plan = memory::plan(&Request {
        config: dir.config(),
        format: &|name| dir.format(name, quantize),
        adapter,
        optim: config.optim_kind()?,
        tokens: max_tokens,
        sequences: config.per_device_train_batch_size,
        card,
        device,
        host,
        mode: Mode::of(config.gradient_checkpointing),
    })?;
    ui.note(&format!("memory: {}", plan.summary()));
    backend.prefer_optimizer_on_host(!plan.optimizer_on_device);
    backend.reserve(plan.device_bytes)?;
    Ok(Some(plan))
}

/// Loads the base weights and makes every buffer for micro-batches of at most `max_tokens` tokens.
pub fn model<B: Backend>(
    backend: &mut B,
    config: &TrainConfig,
    dir: &ModelDir,
    adapter: &HostAdapter,
    max_tokens: usize,
    plan: Option<&Plan>,
    ui: &mut dyn Ui,
) -> Result<Model<B>> {
    let mut source = dir.source(quantize(config)?)?;
    let layers = match plan {
        Some(plan) => plan.layers.clone(),
        None => {
            let keep = if config.gradient_checkpointing == Some(false) { Keep::All } else { Keep::Input };
            vec![LayerPlan { keep, host: false }; dir.config().num_hidden_layers]
        }
    };
    let options = ModelOptions { max_tokens, train: true, layers };
    let (label, layers) = (format!("loading {}", config.model.display()), dir.config().num_hidden_layers as u64);
    let mut done = 0;
    Model::load(backend, dir.config(), &mut source, Some(adapter), options, &mut |_| {
        done += 1;
        ui.work(&label, "layers", done, layers);
    })
}
