//! The graph: written once over [`Backend`], forward beside backward, as straight-line calls.

mod activations;
pub mod adapter;
mod block;
pub mod config;
mod linear;
pub mod shapes;

use std::sync::atomic::{AtomicU64, Ordering};

pub use activations::{Keep, LayerPlan};
pub use adapter::{AdapterLayout, HostAdapter, LoraConfig, Site, TargetModules};
pub use config::{Family, ModelConfig, Proj, RopeScaling};

use crate::backend::{
    Adamw, Backend, Batch, Dropout, Embedding, HeadLogits, HeadLoss, Heads, Item, KvCache, Needs, ParamGroup,
    RmsNormBackward, RmsNormForward, Scope, StepKey, StepKind,
};
use crate::error::Result;
use crate::tensor::{HostMatrix, HostTensor};
use activations::{Activations, Grads, Scratch};
use block::{Attend, Block, Pass, Stage};

/// Where a model's frozen weights come from. Names are those of transformers ("model.layers.0.mlp.up_proj.weight").
pub trait WeightSource {
    /// A norm weight or a bias.
    fn vector(&mut self, name: &str) -> Result<HostTensor>;
    /// A projection, the embedding or the head: in 4 bits or dense, as this source decides.
    fn matrix(&mut self, name: &str) -> Result<HostMatrix>;
}

/// What the buffers of a model are made for.
#[derive(Clone, Debug)]
pub struct ModelOptions {
    /// T: the most tokens of one micro-batch (or of one chunk of a prompt).
    pub max_tokens: usize,
    /// Whether backward will run.
    pub train: bool,
    /// What each layer keeps for backward; layers behind the end keep all. The same bits whatever it says.
    pub layers: Vec<LayerPlan>,
}

impl ModelOptions {
    /// For forward passes alone.
    pub fn inference(max_tokens: usize) -> Self {
        Self { max_tokens, train: false, layers: vec![] }
    }

    /// For training, every one of `layers` layers keeping the same.
    pub fn training(max_tokens: usize, layers: usize, plan: LayerPlan) -> Self {
        Self { max_tokens, train: true, layers: vec![plan; layers] }
    }
}

/// Numbers of models and caches.
static NUMBER: AtomicU64 = AtomicU64::new(0);

fn new_number() -> u64 {
    NUMBER.fetch_add(1, Ordering::Relaxed)
}

/// Rows of logits computed at once outside training.
const LOGIT_ROWS: usize = 8;

/// A model on a device: frozen weights, the adapter's working copy and gradients, and all activations.
pub struct Model<B: Backend> {
    pub config: ModelConfig,
    pub layout: AdapterLayout,
    max_tokens: usize,
    number: u64,

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
    activations: Activations<B>,
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
        let t = options.max_tokens.next_multiple_of(backend.granularity());
        let (layers, c, v) = (config.num_hidden_layers, config.hidden_size, config.vocab_size);
        let layout = adapter.map(|a| a.layout.clone()).unwrap_or_default();
        let mut needs = Needs {
            t,
            c,
            v,
            trainable: layout.len,
            heads: Some(Heads {
                h: config.num_attention_heads,
                g: config.num_key_value_heads,
                d: config.head_dim,
                window: None,
            }),
            train: options.train,
            dropout: options.train && adapter.is_some_and(|a| a.config.lora_dropout > 0.0),
            ..Needs::default()
        };

        backend.label(Item::Embedding);
        let embed = source.matrix("model.embed_tokens.weight")?;
        let embed = backend.upload(&embed)?;
        backend.label(Item::Weights);
        let mut blocks = Vec::with_capacity(layers);
        for layer in 0..layers {
            blocks.push(Block::load(backend, config, &layout, source, layer, &mut needs)?);
            progress(layer);
        }
        backend.label(Item::Embedding);
        let norm = linear::load_vector(backend, source, "model.norm.weight", c)?;
        let head = match config.tie_word_embeddings {
            true => None,
            false => {
                let host = source.matrix("lm_head.weight")?;
                Some(backend.upload(&host)?)
            }
        };
        let mut inv_freq = backend.alloc_f32(config.head_dim / 2)?;
        backend.write_f32(&mut inv_freq, &config.inv_freq())?;
        backend.label(Item::Adapter);
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
        let lowest = if options.train { layout.sites.iter().map(|s| s.layer).min() } else { None };
        let activations = Activations::new(backend, t, config, &options.layers, lowest, ranks)?;
        let grads = match options.train {
            true => Some(Grads::new(backend, t, config, ranks.into_iter().max().unwrap_or(0), &layout)?),
            false => None,
        };
        backend.label(Item::Scratch);
        let loss = backend.alloc_f32(1)?;
        let grad_norm = backend.alloc_f32(1)?;
        let logits = backend.alloc_f32(LOGIT_ROWS * v)?;
        let tokens = backend.alloc_i32(t)?;
        let positions = backend.alloc_i32(t)?;
        backend.label(Item::Workspace);
        backend.prepare(&needs)?;
        Ok(Self {
            config: config.clone(),
            layout,
            max_tokens: t,
            number: new_number(),
            embed,
            blocks,
            norm,
            head,
            inv_freq,
            lora,
            activations,
            grads,
            loss,
            grad_norm,
            logits,
            tokens,
            positions,
        })
    }

    /// Embedding and all blocks; the normed output of the last is left in scratch.inner.
    /// `keep`: backward comes next.
    fn forward(&mut self, backend: &mut B, batch: &Batch<B>, dropout: Option<Dropout>, keep: bool) -> Result<()> {
        backend.enter(Scope::Forward);
        let (t, c, eps) = (batch.t, self.config.hidden_size, self.config.rms_norm_eps);
        let (inv_freq, lora, a) = (&self.inv_freq, self.lora.as_ref(), &mut self.activations);
        let pass = Pass { t, positions: &batch.positions, inv_freq, lora, dropout, eps };
        let x = a.x.get_mut(0);
        backend.embedding(Embedding { x, tokens: &batch.tokens, table: &self.embed, t, c })?;
        for (layer, block) in self.blocks.iter().enumerate() {
            backend.enter(Scope::Layer(layer));
            a.make_room(backend, layer)?;
            let below = (layer > 0).then(|| &a.middle.get(layer - 1).x_mid);
            let (x, rstd) = (a.x.get_mut(layer), &mut a.small.get_mut(layer).rstd);
            block.input_norm(backend, &pass, x, rstd, &mut a.scratch, below)?;
            block.forward(backend, &pass, &mut a.layer(layer), Attend::Batch(batch))?;
            if keep {
                a.send(backend, layer, t)?;
            }
            backend.leave();
        }
        self.final_norm(backend, t)?;
        backend.leave();
        Ok(())
    }

    /// x of number L = x_mid + branch of the last block; scratch.inner = its norm.
    fn final_norm(&mut self, backend: &mut B, t: usize) -> Result<()> {
        let (c, eps, layers, a) =
            (self.config.hidden_size, self.config.rms_norm_eps, self.blocks.len(), &mut self.activations);
        a.make_room(backend, layers)?;
        let Scratch { inner: y, outer } = &mut a.scratch;
        let x = &a.middle.get(layers - 1).x_mid;
        let (rstd, residual) = (&mut a.small.get_mut(layers).rstd, Some((&*outer, a.x.get_mut(layers))));
        backend.rmsnorm_forward(RmsNormForward { y, rstd, x, residual, w: &self.norm, t, c, eps })
    }

    /// From the gradient of the final norm's output in scratch.outer down to the lowest adapter.
    fn backward(&mut self, backend: &mut B, batch: &Batch<B>, dropout: Option<Dropout>) -> Result<()> {
        let grads = self.grads.as_mut().expect("a model loaded for training");
        let (t, c, eps, layers) = (batch.t, self.config.hidden_size, self.config.rms_norm_eps, self.blocks.len());
        let (inv_freq, lora, a) = (&self.inv_freq, self.lora.as_ref(), &mut self.activations);
        let pass = Pass { t, positions: &batch.positions, inv_freq, lora, dropout, eps };
        let Some(lowest) = self.layout.sites.iter().min_by_key(|s| (s.layer, Stage::of(s.proj))) else {
            return Ok(());
        };

        backend.enter(Scope::Backward);
        backend.zero_act(&mut grads.dres)?;
        let (dx, dy, x, w) = (&mut grads.dres, &a.scratch.outer, a.x.get(layers), &self.norm);
        let rstd = &a.small.get(layers).rstd;
        backend.rmsnorm_backward(RmsNormBackward { dx, dy, x, w, rstd, t, c })?;
        for layer in (lowest.layer..layers).rev() {
            backend.enter(Scope::Layer(layer));
            a.fetch(backend, layer, t)?;
            let (block, stale) = (&self.blocks[layer], a.stale(layer));
            let buffers = &mut a.layer(layer);
            if stale.mlp {
                backend.enter(Scope::Recompute(layer));
                block.recompute(backend, &pass, buffers, stale, batch)?;
                backend.leave();
            }
            let bottom = (layer == lowest.layer).then(|| Stage::of(lowest.proj));
            block.backward(backend, &pass, buffers, grads, batch, bottom)?;
            backend.leave();
        }
        backend.leave();
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
        let key = self.key(StepKind::Train, batch, dropout);
        backend.micro_step(key, dropout.map_or(0, |d| d.step), &mut |backend| {
            self.forward(backend, batch, dropout, true)?;
            self.head_loss(backend, batch, true)?;
            self.backward(backend, batch, dropout)
        })
    }

    /// Forward of one micro-batch: the loss is added to (evaluation).
    pub fn loss(&mut self, backend: &mut B, batch: &Batch<B>) -> Result<()> {
        backend.micro_step(self.key(StepKind::Loss, batch, None), 0, &mut |backend| {
            self.forward(backend, batch, None, false)?;
            self.head_loss(backend, batch, false)
        })
    }

    fn key(&self, kind: StepKind, batch: &Batch<B>, dropout: Option<Dropout>) -> StepKey {
        let dropout = dropout.map(|d| (d.p.to_bits(), d.seed));
        StepKey { model: self.number, batch: batch.number, kind, t: batch.t, b: batch.b, m: batch.m, dropout }
    }

    /// Adds the loss of the normed output in scratch.inner; `gradient`: leaves its gradient in scratch.outer.
    fn head_loss(&mut self, backend: &mut B, batch: &Batch<B>, gradient: bool) -> Result<()> {
        backend.enter(Scope::Head);
        let (c, v, head) = (self.config.hidden_size, self.config.vocab_size, self.head.as_ref().unwrap_or(&self.embed));
        let Scratch { inner: x, outer } = &mut self.activations.scratch;
        let (loss, dx) = (&mut self.loss, gradient.then_some(outer));
        backend.head_loss(HeadLoss { loss, dx, x, head, batch, c, v })?;
        backend.leave();
        Ok(())
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
        backend.enter(Scope::Optimizer);
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
        })?;
        backend.leave();
        Ok(())
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
        self.forward(backend, batch, None, false)?;
        self.head_logits(backend, rows)
    }

    /// Logits of rows of scratch.inner.
    fn head_logits(&mut self, backend: &mut B, rows: &[usize]) -> Result<Vec<f32>> {
        let (c, v, head) = (self.config.hidden_size, self.config.vocab_size, self.head.as_ref().unwrap_or(&self.embed));
        let mut out = vec![0.0; rows.len() * v];
        for (rows, out) in rows.chunks(LOGIT_ROWS).zip(out.chunks_mut(LOGIT_ROWS * v)) {
            let (logits, x) = (&mut self.logits, &self.activations.scratch.inner);
            backend.head_logits(HeadLogits { logits, x, head, rows, c, v })?;
            backend.read_f32(&self.logits, out)?;
        }
        Ok(out)
    }

    /// A cache for `capacity` tokens of one sequence.
    pub fn new_cache(&mut self, backend: &mut B, capacity: usize) -> Result<Cache<B>> {
        let width = self.config.num_key_value_heads * self.config.head_dim;
        let mut layers = Vec::with_capacity(self.blocks.len());
        backend.label(Item::KvCache);
        for _ in &self.blocks {
            layers.push(KvCache { k: backend.alloc_act(capacity * width)?, v: backend.alloc_act(capacity * width)? });
        }
        Ok(Cache { layers, len: 0, capacity, number: new_number() })
    }

    /// Runs new tokens of the cached sequence and gives the logits (V) after the last.
    /// Panics on no tokens or more than the cache has room for.
    pub fn decode(&mut self, backend: &mut B, cache: &mut Cache<B>, tokens: &[i32]) -> Result<Vec<f32>> {
        assert!(!tokens.is_empty() && cache.len + tokens.len() <= cache.capacity, "tokens fit the cache");
        let mut row = 0;
        for chunk in tokens.chunks(self.max_tokens) {
            self.decode_chunk(backend, cache, chunk)?;
            row = chunk.len() - 1;
        }
        self.head_logits(backend, &[row])
    }

    /// At most `max_tokens` new tokens; leaves the normed output in scratch.inner.
    fn decode_chunk(&mut self, backend: &mut B, cache: &mut Cache<B>, tokens: &[i32]) -> Result<()> {
        let (t, past) = (tokens.len(), cache.len);
        let positions: Vec<i32> = (past..past + t).map(|p| p as i32).collect();
        backend.write_i32(&mut self.tokens, tokens)?;
        backend.write_i32(&mut self.positions, &positions)?;
        let key = StepKey { model: cache.number, batch: 0, kind: StepKind::Decode, t, b: 1, m: 1, dropout: None };
        backend.micro_step(key, 0, &mut |backend| self.decode_layers(backend, &mut cache.layers, t, past))?;
        cache.len += t;
        Ok(())
    }

    /// Of the `t` tokens in self.tokens. In a model for training this spoils what was kept for backward.
    fn decode_layers(&mut self, backend: &mut B, cache: &mut [KvCache<B>], t: usize, past: usize) -> Result<()> {
        backend.enter(Scope::Decode);
        let (c, eps, a, positions) =
            (self.config.hidden_size, self.config.rms_norm_eps, &mut self.activations, &self.positions);
        let pass = Pass { t, positions, inv_freq: &self.inv_freq, lora: self.lora.as_ref(), dropout: None, eps };
        let x = a.x.get_mut(0);
        backend.embedding(Embedding { x, tokens: &self.tokens, table: &self.embed, t, c })?;
        for (layer, (block, cache)) in self.blocks.iter().zip(cache).enumerate() {
            backend.enter(Scope::Layer(layer));
            let below = (layer > 0).then(|| &a.middle.get(layer - 1).x_mid);
            let (x, rstd) = (a.x.get_mut(layer), &mut a.small.get_mut(layer).rstd);
            block.input_norm(backend, &pass, x, rstd, &mut a.scratch, below)?;
            block.forward(backend, &pass, &mut a.layer(layer), Attend::Cache { cache, past, positions })?;
            backend.leave();
        }
        self.final_norm(backend, t)?;
        backend.leave();
        Ok(())
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
    number: u64,
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
