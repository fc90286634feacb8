//! The graph: written once over [`Backend`], forward beside backward, as straight-line calls.

pub mod adapter;
mod block;
pub mod config;
mod linear;

pub use adapter::{AdapterLayout, HostAdapter, LoraConfig, Site, TargetModules};
pub use config::{Family, ModelConfig, Proj, RopeScaling};

use crate::backend::{
    Adamw, Backend, Batch, Dropout, Embedding, HeadLogits, HeadLoss, KvCache, ParamGroup, RmsNormBackward,
    RmsNormForward,
};
use crate::error::Result;
use crate::tensor::{HostMatrix, HostTensor};
use block::{Attend, Block, Grads, LayerBuffers, LayerInput, Pass, Saved, Scratch, Stage};

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
    /// T: the most tokens of one micro-batch (or of one chunk of a prompt).
    pub max_tokens: usize,
    /// Whether backward will run.
    pub train: bool,
    /// Keep only each layer's input and recompute the rest in backward (same bits, less memory).
    pub gradient_checkpointing: bool,
}

/// Rows of logits computed at once outside training.
const LOGIT_ROWS: usize = 8;

/// A model on a device: frozen weights, the adapter's working copy and gradients, and all activations.
pub struct Model<B: Backend> {
    pub config: ModelConfig,
    pub layout: AdapterLayout,
    options: ModelOptions,

    // frozen
    /// (V, C)
    embed: B::Matrix,
    blocks: Vec<Block<B>>,
    /// (C)
    norm: B::Act,
    /// (V, C); None: tied, the embedding serves
    head: Option<B::Matrix>,
    /// (D/2)
    inv_freq: B::F32,

    // trainable
    /// (P) working copy of the adapter; None: the base alone
    lora: Option<B::Act>,

    // activations
    /// One for each layer if backward runs, else one.
    inputs: Vec<LayerInput<B>>,
    /// One for each layer if all is kept, else one.
    saved: Vec<Saved<B>>,
    /// The residual stream after the last layer.
    last: LayerInput<B>,
    scratch: Scratch<B>,
    grads: Option<Grads<B>>,
    /// (1) sum of the losses since zero_grad
    loss: B::F32,
    /// (1) norm of the gradients
    grad_norm: B::F32,
    /// (LOGIT_ROWS, V)
    logits: B::F32,
    /// (T) of decoding
    tokens: B::I32,
    positions: B::I32,
}

impl<B: Backend> Model<B> {
    /// Loads weights from `source` layer by layer and allocates every buffer a step needs.
    /// `progress(layer)` is called after each of the L layers. `adapter` None: the base alone.
    /// Errors: those of the source and of the backend.
    pub fn load(
        backend: &mut B,
        config: &ModelConfig,
        source: &mut dyn WeightSource,
        adapter: Option<&HostAdapter>,
        options: ModelOptions,
        progress: &mut dyn FnMut(usize),
    ) -> Result<Self> {
        let (t, layers, v) = (options.max_tokens, config.num_hidden_layers, config.vocab_size);
        let layout = adapter.map(|a| a.layout.clone()).unwrap_or_default();

        let embed = source.matrix("model.embed_tokens.weight")?;
        let embed = backend.upload(&embed)?;
        let mut blocks = Vec::with_capacity(layers);
        for layer in 0..layers {
            blocks.push(Block::load(backend, config, &layout, source, layer)?);
            progress(layer);
        }
        let norm = linear::load_vector(backend, source, "model.norm.weight", config.hidden_size)?;
        let head = match config.tie_word_embeddings {
            true => None,
            false => {
                let host = source.matrix("lm_head.weight")?;
                Some(backend.upload(&host)?)
            }
        };
        let mut inv_freq = backend.alloc_f32(config.head_dim / 2)?;
        backend.write_f32(&mut inv_freq, &config.inv_freq())?;
        let lora = match adapter {
            Some(a) => {
                let mut work = backend.alloc_act(layout.len)?;
                backend.write_act(&mut work, &a.weights)?;
                Some(work)
            }
            None => None,
        };

        // Every slot takes the widest rank of any layer, linear by linear: any slot then serves any layer.
        let mut ranks = [0; 4];
        for block in &blocks {
            ranks = std::array::from_fn(|i| ranks[i].max(block.ranks()[i]));
        }
        let kept_inputs = if options.train { layers } else { 1 };
        let kept_layers = if options.train && !options.gradient_checkpointing { layers } else { 1 };
        let mut inputs = Vec::with_capacity(kept_inputs);
        for _ in 0..kept_inputs {
            inputs.push(LayerInput::new(backend, t, config, ranks)?);
        }
        let mut saved = Vec::with_capacity(kept_layers);
        for _ in 0..kept_layers {
            saved.push(Saved::new(backend, t, config, ranks)?);
        }
        let max_rank = ranks.into_iter().max().unwrap_or(0);
        let grads = match options.train {
            true => Some(Grads::new(backend, t, config, max_rank, layout.len)?),
            false => None,
        };
        Ok(Self {
            last: LayerInput::new(backend, t, config, [0; 4])?,
            scratch: Scratch::new(backend, t, config)?,
            loss: backend.alloc_f32(1)?,
            grad_norm: backend.alloc_f32(1)?,
            logits: backend.alloc_f32(LOGIT_ROWS * v)?,
            tokens: backend.alloc_i32(t)?,
            positions: backend.alloc_i32(t)?,
            config: config.clone(),
            layout,
            options,
            embed,
            blocks,
            norm,
            head,
            inv_freq,
            lora,
            inputs,
            saved,
            grads,
        })
    }

    /// Embedding and all blocks; the normed output of the last is left in scratch.norm.
    fn forward(&mut self, backend: &mut B, batch: &Batch<B>, dropout: Option<Dropout>) -> Result<()> {
        let (t, c, eps) = (batch.t, self.config.hidden_size, self.config.rms_norm_eps);
        let (inv_freq, lora) = (&self.inv_freq, self.lora.as_ref());
        let pass = Pass { t, positions: &batch.positions, inv_freq, lora, dropout, eps };
        let x = &mut self.inputs[0].x;
        backend.embedding(Embedding { x, tokens: &batch.tokens, table: &self.embed, t, c })?;
        for (layer, block) in self.blocks.iter().enumerate() {
            let (last_input, last) = (self.inputs.len() - 1, self.saved.len() - 1);
            let input = &mut self.inputs[layer.min(last_input)];
            let below = (layer > 0).then(|| &self.saved[(layer.max(1) - 1).min(last)].x_mid);
            block.input_norm(backend, &pass, input, &mut self.scratch, below)?;
            let (saved, scratch) = (&mut self.saved[layer.min(last)], &mut self.scratch);
            block.forward(backend, &pass, LayerBuffers { input, saved, scratch }, Attend::Batch(batch))?;
            block.output(backend, &pass, LayerBuffers { input, saved, scratch })?;
        }
        self.final_norm(backend, t)
    }

    /// last.x = x_mid + branch of the last block; scratch.norm = its norm.
    fn final_norm(&mut self, backend: &mut B, t: usize) -> Result<()> {
        let (c, eps) = (self.config.hidden_size, self.config.rms_norm_eps);
        let Scratch { norm, branch, .. } = &mut self.scratch;
        let x = &self.saved[self.saved.len() - 1].x_mid;
        let (rstd, residual) = (&mut self.last.rstd, Some((&*branch, &mut self.last.x)));
        backend.rmsnorm_forward(RmsNormForward { y: norm, rstd, x, residual, w: &self.norm, t, c, eps })
    }

    /// From the gradient of the final norm's output in grads.d_norm down to the lowest adapter.
    fn backward(&mut self, backend: &mut B, batch: &Batch<B>, dropout: Option<Dropout>) -> Result<()> {
        let grads = self.grads.as_mut().expect("a model loaded for training");
        let (t, c, eps) = (batch.t, self.config.hidden_size, self.config.rms_norm_eps);
        let (inv_freq, lora) = (&self.inv_freq, self.lora.as_ref());
        let pass = Pass { t, positions: &batch.positions, inv_freq, lora, dropout, eps };
        let Some(lowest) = self.layout.sites.iter().min_by_key(|s| (s.layer, Stage::of(s.proj))) else {
            return Ok(());
        };

        backend.zero_act(&mut grads.dres)?;
        let (dx, dy, x, w, rstd) = (&mut grads.dres, &grads.d_norm, &self.last.x, &self.norm, &self.last.rstd);
        backend.rmsnorm_backward(RmsNormBackward { dx, dy, x, w, rstd, t, c })?;
        for layer in (lowest.layer..self.blocks.len()).rev() {
            let (block, input, scratch) = (&self.blocks[layer], &mut self.inputs[layer], &mut self.scratch);
            let recompute = self.options.gradient_checkpointing;
            let saved = &mut self.saved[if recompute { 0 } else { layer }];
            if recompute {
                block.input_norm(backend, &pass, input, scratch, None)?;
                block.forward(backend, &pass, LayerBuffers { input, saved, scratch }, Attend::Batch(batch))?;
            }
            let bottom = (layer == lowest.layer).then(|| Stage::of(lowest.proj));
            block.backward(backend, &pass, LayerBuffers { input, saved, scratch }, grads, batch, bottom)?;
        }
        Ok(())
    }

    /// Sets the gradients and the loss to zero: the start of an optimizer step.
    pub fn zero_grad(&mut self, backend: &mut B) -> Result<()> {
        if let Some(grads) = &mut self.grads {
            backend.zero_f32(&mut grads.d_lora)?;
        }
        backend.zero_f32(&mut self.loss)
    }

    /// Forward and backward of one micro-batch: loss and gradients are added to.
    /// Panics unless the model was loaded for training with an adapter.
    pub fn loss_and_grad(&mut self, backend: &mut B, batch: &Batch<B>, dropout: Option<Dropout>) -> Result<()> {
        self.forward(backend, batch, dropout)?;
        let grads = self.grads.as_mut().expect("a model loaded for training");
        let (c, v, head) = (self.config.hidden_size, self.config.vocab_size, self.head.as_ref().unwrap_or(&self.embed));
        let (loss, dx, x) = (&mut self.loss, Some(&mut grads.d_norm), &self.scratch.norm);
        backend.head_loss(HeadLoss { loss, dx, x, head, batch, c, v })?;
        self.backward(backend, batch, dropout)
    }

    /// Forward of one micro-batch: the loss is added to (evaluation).
    pub fn loss(&mut self, backend: &mut B, batch: &Batch<B>) -> Result<()> {
        self.forward(backend, batch, None)?;
        let (c, v, head) = (self.config.hidden_size, self.config.vocab_size, self.head.as_ref().unwrap_or(&self.embed));
        let (loss, x) = (&mut self.loss, &self.scratch.norm);
        backend.head_loss(HeadLoss { loss, dx: None, x, head, batch, c, v })
    }

    /// The loss summed since `zero_grad`.
    pub fn read_loss(&mut self, backend: &mut B) -> Result<f32> {
        read_one(backend, &self.loss)
    }

    /// The loss summed since `zero_grad`, and the norm of the gradients, which `optimizer_step` clips by.
    pub fn read_loss_and_norm(&mut self, backend: &mut B) -> Result<(f32, f32)> {
        let grads = self.grads.as_ref().expect("a model loaded for training");
        backend.grad_norm(&mut self.grad_norm, &grads.d_lora)?;
        Ok((read_one(backend, &self.loss)?, read_one(backend, &self.grad_norm)?))
    }

    /// One AdamW update of all trainable weights; `read_loss_and_norm` came before.
    pub fn optimizer_step(
        &mut self,
        backend: &mut B,
        state: &mut B::Optimizer,
        settings: &AdamwSettings,
    ) -> Result<()> {
        let grads = &self.grads.as_ref().expect("a model loaded for training").d_lora;
        let lora = self.lora.as_mut().expect("a model with an adapter");
        let AdamwSettings { groups, beta1, beta2, eps, max_grad_norm, step } = settings;
        backend.adamw(Adamw {
            state,
            lora,
            grads,
            norm: &self.grad_norm,
            groups,
            beta1: *beta1,
            beta2: *beta2,
            eps: *eps,
            max_grad_norm: *max_grad_norm,
            step: *step,
        })
    }

    /// The gradients (P), for tests.
    pub fn read_grads(&mut self, backend: &mut B) -> Result<Vec<f32>> {
        let mut out = vec![0.0; self.layout.len];
        backend.read_f32(&self.grads.as_ref().expect("a model loaded for training").d_lora, &mut out)?;
        Ok(out)
    }

    /// Sets the adapter's working copy from host weights (P).
    pub fn write_adapter(&mut self, backend: &mut B, weights: &[f32]) -> Result<()> {
        backend.write_act(self.lora.as_mut().expect("a model with an adapter"), weights)
    }

    /// Logits (rows.len(), V) of chosen rows of a batch.
    pub fn logits(&mut self, backend: &mut B, batch: &Batch<B>, rows: &[usize]) -> Result<Vec<f32>> {
        self.forward(backend, batch, None)?;
        self.head_logits(backend, rows)
    }

    /// Logits of rows of scratch.norm.
    fn head_logits(&mut self, backend: &mut B, rows: &[usize]) -> Result<Vec<f32>> {
        let (c, v, head) = (self.config.hidden_size, self.config.vocab_size, self.head.as_ref().unwrap_or(&self.embed));
        let mut out = vec![0.0; rows.len() * v];
        for (rows, out) in rows.chunks(LOGIT_ROWS).zip(out.chunks_mut(LOGIT_ROWS * v)) {
            let (logits, x) = (&mut self.logits, &self.scratch.norm);
            backend.head_logits(HeadLogits { logits, x, head, rows, c, v })?;
            backend.read_f32(&self.logits, out)?;
        }
        Ok(out)
    }

    /// A cache for `capacity` tokens of one sequence.
    pub fn new_cache(&mut self, backend: &mut B, capacity: usize) -> Result<Cache<B>> {
        let width = self.config.num_key_value_heads * self.config.head_dim;
        let mut layers = Vec::with_capacity(self.blocks.len());
        for _ in &self.blocks {
            layers.push(KvCache { k: backend.alloc_act(capacity * width)?, v: backend.alloc_act(capacity * width)? });
        }
        Ok(Cache { layers, len: 0, capacity })
    }

    /// Runs new tokens of the cached sequence and gives the logits (V) after the last.
    /// Panics on no tokens or more than the cache has room for.
    pub fn decode(&mut self, backend: &mut B, cache: &mut Cache<B>, tokens: &[i32]) -> Result<Vec<f32>> {
        assert!(!tokens.is_empty() && cache.len + tokens.len() <= cache.capacity, "tokens fit the cache");
        let mut row = 0;
        for chunk in tokens.chunks(self.options.max_tokens) {
            self.decode_chunk(backend, cache, chunk)?;
            row = chunk.len() - 1;
        }
        self.head_logits(backend, &[row])
    }

    /// At most `max_tokens` new tokens; leaves the normed output in scratch.norm.
    fn decode_chunk(&mut self, backend: &mut B, cache: &mut Cache<B>, tokens: &[i32]) -> Result<()> {
        let (t, c, eps, past) = (tokens.len(), self.config.hidden_size, self.config.rms_norm_eps, cache.len);
        let positions: Vec<i32> = (past..past + t).map(|p| p as i32).collect();
        backend.write_i32(&mut self.tokens, tokens)?;
        backend.write_i32(&mut self.positions, &positions)?;
        let (inv_freq, lora) = (&self.inv_freq, self.lora.as_ref());
        let pass = Pass { t, positions: &self.positions, inv_freq, lora, dropout: None, eps };
        // One slot serves every layer: nothing is kept for backward.
        let (input, saved, scratch) = (&mut self.inputs[0], &mut self.saved[0], &mut self.scratch);
        backend.embedding(Embedding { x: &mut input.x, tokens: &self.tokens, table: &self.embed, t, c })?;
        for (layer, (block, cache)) in self.blocks.iter().zip(&mut cache.layers).enumerate() {
            block.input_norm(backend, &pass, input, scratch, (layer > 0).then_some(&saved.x_mid))?;
            block.forward(backend, &pass, LayerBuffers { input, saved, scratch }, Attend::Cache { cache, past })?;
            block.output(backend, &pass, LayerBuffers { input, saved, scratch })?;
        }
        cache.len += t;
        let (x, residual) = (&saved.x_mid, Some((&scratch.branch, &mut self.last.x)));
        let (y, rstd, w) = (&mut scratch.norm, &mut self.last.rstd, &self.norm);
        backend.rmsnorm_forward(RmsNormForward { y, rstd, x, residual, w, t, c, eps })
    }
}

fn read_one<B: Backend>(backend: &mut B, src: &B::F32) -> Result<f32> {
    let mut out = [0.0];
    backend.read_f32(src, &mut out)?;
    Ok(out[0])
}

/// Keys and values of every layer for one sequence.
pub struct Cache<B: Backend> {
    layers: Vec<KvCache<B>>,
    /// Tokens it holds.
    pub len: usize,
    pub capacity: usize,
}

impl<B: Backend> Cache<B> {
    /// Forgets all tokens behind the first `len`.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }
}

/// Settings of one optimizer step.
#[derive(Clone, Debug)]
pub struct AdamwSettings {
    /// Disjoint ranges that cover all P trainable weights.
    pub groups: Vec<ParamGroup>,
    pub beta1: f32,
    pub beta2: f32,
    pub eps: f32,
    /// <= 0: no clipping
    pub max_grad_norm: f32,
    /// 1 for the first
    pub step: u64,
}
