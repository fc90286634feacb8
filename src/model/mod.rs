//! The graph: written once over [`Backend`], forward beside backward, as straight-line calls.

pub mod adapter;
pub mod config;

use std::marker::PhantomData;

pub use adapter::{AdapterLayout, HostAdapter, LoraConfig, Site, TargetModules};
pub use config::{Family, ModelConfig, Proj, RopeScaling};

use crate::backend::{Backend, Batch, Dropout};
use crate::error::Result;
use crate::tensor::{HostMatrix, HostTensor};

/// Where a model's frozen weights come from. Names are those of transformers ("model.layers.0.mlp.up_proj.weight").
pub trait WeightSource {
    /// A norm weight or a bias.
    fn vector(&mut self, name: &str) -> Result<HostTensor>;
    /// A projection, the embedding or the head: in 4 bits or dense, as this source decides.
    fn matrix(&mut self, name: &str) -> Result<HostMatrix>;
}

/// What the buffers of a model are made for.
#[derive(Clone, Copy, Debug)]
pub struct ModelOptions {
    /// T: the most tokens of one micro-batch (or of one prefill chunk).
    pub max_tokens: usize,
    /// Whether backward will run.
    pub train: bool,
    /// Keep only each layer's input and recompute the rest in backward (same bits, less memory).
    pub gradient_checkpointing: bool,
}

/// A model on a device: frozen weights, the adapter's working copy and gradients, and all activations.
pub struct Model<B: Backend> {
    pub config: ModelConfig,
    pub layout: AdapterLayout,
    _b: PhantomData<B>,
}

impl<B: Backend> Model<B> {
    /// Loads weights from `source` layer by layer and allocates every buffer a step needs.
    /// `progress(layer)` is called after each of the L layers. `adapter` None: the base alone.
    pub fn load(
        _backend: &mut B,
        _config: &ModelConfig,
        _source: &mut dyn WeightSource,
        _adapter: Option<&HostAdapter>,
        _options: ModelOptions,
        _progress: &mut dyn FnMut(usize),
    ) -> Result<Self> {
        unimplemented!()
    }

    /// Sets the gradients and the loss to zero: the start of an optimizer step.
    pub fn zero_grad(&mut self, _backend: &mut B) -> Result<()> {
        unimplemented!()
    }

    /// Forward and backward of one micro-batch: loss and gradients are added to.
    pub fn loss_and_grad(&mut self, _backend: &mut B, _batch: &Batch<B>, _dropout: Option<Dropout>) -> Result<()> {
        unimplemented!()
    }

    /// Forward of one micro-batch: the loss is added to (evaluation).
    pub fn loss(&mut self, _backend: &mut B, _batch: &Batch<B>) -> Result<()> {
        unimplemented!()
    }

    /// The loss summed since `zero_grad`, and the gradients' norm (computed here, kept for `optimizer_step`).
    pub fn read_loss_and_norm(&mut self, _backend: &mut B) -> Result<(f32, f32)> {
        unimplemented!()
    }

    /// The loss summed since `zero_grad`.
    pub fn read_loss(&mut self, _backend: &mut B) -> Result<f32> {
        unimplemented!()
    }

    /// One AdamW update of all trainable weights; `read_loss_and_norm` came before.
    pub fn optimizer_step(
        &mut self,
        _backend: &mut B,
        _state: &mut B::Optimizer,
        _settings: &AdamwSettings,
    ) -> Result<()> {
        unimplemented!()
    }

    /// The gradients (P), for tests.
    pub fn read_grads(&mut self, _backend: &mut B) -> Result<Vec<f32>> {
        unimplemented!()
    }

    /// Sets the adapter's working copy from host weights (P).
    pub fn write_adapter(&mut self, _backend: &mut B, _weights: &[f32]) -> Result<()> {
        unimplemented!()
    }

    /// Logits (rows.len(), V) of chosen rows of a batch.
    pub fn logits(&mut self, _backend: &mut B, _batch: &Batch<B>, _rows: &[usize]) -> Result<Vec<f32>> {
        unimplemented!()
    }

    /// A cache for `capacity` tokens of one sequence.
    pub fn new_cache(&mut self, _backend: &mut B, _capacity: usize) -> Result<Cache<B>> {
        unimplemented!()
    }

    /// Runs new tokens of the cached sequence (at most `max_tokens` at a time) and gives the logits (V) after the last.
    pub fn decode(&mut self, _backend: &mut B, _cache: &mut Cache<B>, _tokens: &[i32]) -> Result<Vec<f32>> {
        unimplemented!()
    }
}

/// Keys and values of every layer for one sequence.
pub struct Cache<B: Backend> {
    pub layers: Vec<crate::backend::KvCache<B>>,
    pub len: usize,
    pub capacity: usize,
}

/// Settings of one optimizer step.
#[derive(Clone, Debug)]
pub struct AdamwSettings {
    pub groups: Vec<crate::backend::ParamGroup>,
    pub beta1: f32,
    pub beta2: f32,
    pub eps: f32,
    /// <= 0: no clipping
    pub max_grad_norm: f32,
    /// 1 for the first
    pub step: u64,
}
