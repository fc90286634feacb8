//! What a run needs, measured on the graph itself.

use std::collections::BTreeMap;

use super::card::Card;
use super::choose::Mode;
use super::meter::{Meter, Work};
use super::optimizer_bytes;
use super::size::size;
use crate::backend::{Backend, Batch, Dropout, Item, OptimKind};
use crate::error::Result;
use crate::model::shapes::{Format, ShapeSource};
use crate::model::{AdamwSettings, HostAdapter, Keep, LayerPlan, Model, ModelConfig, ModelOptions};

/// What a training run asks for.
#[derive(Clone, Copy)]
pub struct Request<'a> {
    pub config: &'a ModelConfig,
    /// How each matrix is stored, by its name.
    pub format: &'a dyn Fn(&str) -> Format,
    /// Settings and layout; its weights are not looked at.
    pub adapter: &'a HostAdapter,
    pub optim: OptimKind,
    /// Most tokens of a micro-batch, and how many sequences they are.
    pub tokens: usize,
    pub sequences: usize,
    pub card: Card,
    /// Bytes of device memory that the run may take, optimizer included.
    pub device: usize,
    /// Bytes of pinned host memory for activations.
    pub host: usize,
    pub mode: Mode,
}

/// Every byte of a run and the time of its step.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// The choice for each layer.
    pub layers: Vec<LayerPlan>,
    /// Device bytes of each item; of the optimizer its tables alone.
    pub items: BTreeMap<Item, usize>,
    /// Their sum: the size of the arena.
    pub device_bytes: usize,
    /// Pinned host bytes of activations.
    pub host_bytes: usize,
    /// Bytes of AdamW's state, in managed memory.
    pub optimizer_bytes: usize,
    /// Whether the budget has room for it on the device.
    pub optimizer_on_device: bool,
    /// The device budget.
    pub budget: usize,
    /// Tokens of a step.
    pub tokens: usize,
    /// The predicted work of one optimizer step of one micro-batch.
    pub step: Work,
}

impl Plan {
    /// Device bytes of the run, optimizer included where it lies there.
    pub fn total(&self) -> usize {
        self.device_bytes + if self.optimizer_on_device { self.optimizer_bytes } else { 0 }
    }

    /// What the driver's own count of used memory will have grown by after the first steps.
    pub fn driver_bytes(&self) -> usize {
        self.total() + super::LIBRARIES
    }

    pub fn item(&self, item: Item) -> usize {
        self.items.get(&item).copied().unwrap_or(0)
    }

    /// What is left of the budget.
    pub fn head_room(&self) -> usize {
        self.budget.saturating_sub(self.total())
    }

    /// One line for the log.
    pub fn summary(&self) -> String {
        let optimizer = match self.optimizer_on_device {
            true => "with the optimizer",
            false => "the optimizer on the host",
        };
        let host = match self.host_bytes {
            0 => String::new(),
            bytes => format!(", {} of activations on the host", size(bytes)),
        };
        format!(
            "{} of {} on the GPU {optimizer}{host}; {}",
            size(self.total()),
            size(self.budget),
            describe_layers(&self.layers)
        )
    }

    pub fn tokens_per_second(&self) -> f64 {
        self.tokens as f64 / self.step.seconds.max(1e-12)
    }
}

/// "layers 0-3 keep the input, on the host; 4-31 all": from the bottom up.
pub fn describe_layers(layers: &[LayerPlan]) -> String {
    let mut first = 0;
    let one = |run: &[LayerPlan]| {
        let (start, last) = (first, first + run.len() - 1);
        first = last + 1;
        let range = if start == last { format!("{start}") } else { format!("{start}-{last}") };
        let keep = match run[0].keep {
            Keep::Input => "the input",
            Keep::Attention => "input and attention",
            Keep::NoMlp => "all but gate and up",
            Keep::All => "all",
        };
        let verb = if start == 0 { "layers " } else { "" };
        let keeps = if start == 0 { " keep " } else { " " };
        format!("{verb}{range}{keeps}{keep}{}", if run[0].host { ", on the host" } else { "" })
    };
    layers.chunk_by(|a, b| a == b).map(one).collect::<Vec<_>>().join("; ")
}

/// Bytes and time with the given choice, whether it fits or not.
pub fn measure(of: &Request, layers: &[LayerPlan], optimizer_on_device: bool) -> Result<Plan> {
    let mut meter = Meter::new(of.card);
    meter.optimizer_on_device = optimizer_on_device;
    let mut source = ShapeSource { config: of.config, format: of.format };
    let options = ModelOptions { max_tokens: of.tokens, train: true, layers: layers.to_vec() };
    let mut model = Model::load(&mut meter, of.config, &mut source, Some(of.adapter), options, &mut |_| ())?;
    meter.label(Item::Batch);
    let mut batch = Batch::new(&mut meter, of.tokens)?;
    // A full batch of sequences of one length, every token of which is a target.
    batch.t = of.tokens.next_multiple_of(meter.granularity());
    (batch.b, batch.m) = (of.sequences.max(1), of.tokens);
    let tensors = of.adapter.layout.tensor_lens();
    meter.label(Item::Optimizer);
    let mut state = meter.optimizer(of.optim, &tensors);
    meter.take_work();

    let p = of.adapter.config.lora_dropout;
    let dropout = (p > 0.0).then_some(Dropout { p, seed: 0, step: 0 });
    model.zero_grad(&mut meter)?;
    model.loss_and_grad(&mut meter, &batch, dropout)?;
    model.read_loss_and_norm(&mut meter)?;
    let settings = AdamwSettings { groups: vec![], beta1: 0.9, beta2: 0.999, eps: 1e-8, max_grad_norm: 1.0, step: 1 };
    model.optimizer_step(&mut meter, &mut state, &settings)?;
    Ok(Plan {
        layers: layers.to_vec(),
        device_bytes: meter.device_bytes(),
        host_bytes: meter.host_bytes(),
        items: meter.device().clone(),
        optimizer_bytes: optimizer_bytes(of.optim, &tensors),
        optimizer_on_device,
        budget: of.device,
        tokens: of.tokens,
        step: meter.take_work(),
    })
}

/// Device bytes of a model for forward passes alone: of `tokens` tokens at a time, with a batch of so many tokens where
/// `batch` is set, and a cache of `cache` tokens where that is not 0.
pub fn forward_bytes(
    config: &ModelConfig,
    format: &dyn Fn(&str) -> Format,
    adapter: Option<&HostAdapter>,
    tokens: usize,
    batch: bool,
    cache: usize,
) -> Result<BTreeMap<Item, usize>> {
    let mut meter = Meter::new(super::CARDS[0]);
    let mut source = ShapeSource { config, format };
    let options = ModelOptions::inference(tokens);
    let mut model = Model::load(&mut meter, config, &mut source, adapter, options, &mut |_| ())?;
    if batch {
        meter.label(Item::Batch);
        Batch::new(&mut meter, tokens)?;
    }
    if cache > 0 {
        model.new_cache(&mut meter, cache)?;
    }
    Ok(meter.device().clone())
}
