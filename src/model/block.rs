//! One decoder block: forward beside backward, as straight-line calls.
//!
//! ```text
//! x      layer input (the residual stream)         kept for every layer
//! x_mid  x + attention(norm1(x))                   kept, or recomputed from x
//! next   x_mid + mlp(norm2(x_mid))                 the sum is taken by the next layer's norm
//! ```
//!
//! Normed inputs and the SwiGLU product are never kept: both are recomputed in backward at the speed of a copy.
//! `h` of down is kept for every layer, so that a recomputed layer stops at gate and up. What else is kept, and where,
//! `activations` says.

use super::WeightSource;
use super::activations::{Grads, Layer, Scratch, Stale};
use super::adapter::AdapterLayout;
use super::config::{ModelConfig, Proj};
use super::linear::{load_linear, load_vector};
use crate::backend::{
    AttentionBackward, AttentionDecode, AttentionForward, Backend, Batch, Dropout, HeadNormBackward, HeadNormForward,
    Heads, KvCache, Linear, LinearBackward, LinearForward, Needs, RmsNormBackward, RmsNormForward, Rope,
    SwigluBackward, SwigluForward,
};
use crate::error::Result;

/// Frozen weights of one layer.
pub(super) struct Block<B: Backend> {
    /// (C)
    norm1: B::Act,
    qkv: Linear<B>,
    /// Weights (D) of the q and k norms (Qwen3).
    qk_norm: Option<(B::Act, B::Act)>,
    o: Linear<B>,
    /// (C)
    norm2: B::Act,
    gate_up: Linear<B>,
    down: Linear<B>,
    heads: Heads,
}

/// The linears of a layer from bottom to top.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Stage {
    Qkv,
    O,
    GateUp,
    Down,
}

impl Stage {
    pub(super) fn of(proj: Proj) -> Self {
        match proj {
            Proj::Q | Proj::K | Proj::V => Self::Qkv,
            Proj::O => Self::O,
            Proj::Gate | Proj::Up => Self::GateUp,
            Proj::Down => Self::Down,
        }
    }
}

/// What the attention of a forward looks at.
pub(super) enum Attend<'a, B: Backend> {
    /// The packed sequences of a batch.
    Batch(&'a Batch<B>),
    /// Earlier tokens of one sequence, and the new ones.
    Cache { cache: &'a mut KvCache<B>, past: usize, positions: &'a B::I32 },
}

/// What all linears of a forward or backward share.
pub(super) struct Pass<'a, B: Backend> {
    pub t: usize,
    /// (T)
    pub positions: &'a B::I32,
    /// (D/2)
    pub inv_freq: &'a B::F32,
    /// (P); None: the base alone
    pub lora: Option<&'a B::Act>,
    pub dropout: Option<Dropout>,
    pub eps: f32,
}

impl<B: Backend> Block<B> {
    pub(super) fn load(
        backend: &mut B,
        config: &ModelConfig,
        layout: &AdapterLayout,
        source: &mut dyn WeightSource,
        layer: usize,
        needs: &mut Needs,
    ) -> Result<Self> {
        let (c, d) = (config.hidden_size, config.head_dim);
        let prefix = format!("model.layers.{layer}");
        let norm1 = load_vector(backend, source, &format!("{prefix}.input_layernorm.weight"), c)?;
        let qkv = load_linear(backend, config, layout, source, layer, &[Proj::Q, Proj::K, Proj::V], needs)?;
        let qk_norm = match config.qk_norm {
            true => Some((
                load_vector(backend, source, &format!("{prefix}.self_attn.q_norm.weight"), d)?,
                load_vector(backend, source, &format!("{prefix}.self_attn.k_norm.weight"), d)?,
            )),
            false => None,
        };
        let o = load_linear(backend, config, layout, source, layer, &[Proj::O], needs)?;
        let norm2 = load_vector(backend, source, &format!("{prefix}.post_attention_layernorm.weight"), c)?;
        let gate_up = load_linear(backend, config, layout, source, layer, &[Proj::Gate, Proj::Up], needs)?;
        let down = load_linear(backend, config, layout, source, layer, &[Proj::Down], needs)?;
        let heads = Heads {
            h: config.num_attention_heads,
            g: config.num_key_value_heads,
            d,
            window: config.windows.get(layer).copied().flatten(),
        };
        Ok(Self { norm1, qkv, qk_norm, o, norm2, gate_up, down, heads })
    }

    /// LoRA ranks of the four linears, from bottom to top.
    pub(super) fn ranks(&self) -> [usize; 4] {
        [self.qkv.r, self.o.r, self.gate_up.r, self.down.r]
    }

    /// scratch.inner = norm1(x). Given x_mid of the layer below, x = x_mid + scratch.outer comes first.
    pub(super) fn input_norm(
        &self,
        backend: &mut B,
        pass: &Pass<B>,
        x: &mut B::Act,
        rstd: &mut B::F32,
        scratch: &mut Scratch<B>,
        below: Option<&B::Act>,
    ) -> Result<()> {
        let (t, c, eps, w, y) = (pass.t, self.qkv.k, pass.eps, &self.norm1, &mut scratch.inner);
        match below {
            Some(below) => {
                let residual = Some((&scratch.outer, x));
                backend.rmsnorm_forward(RmsNormForward { y, rstd, x: below, residual, w, t, c, eps })
            }
            None => backend.rmsnorm_forward(RmsNormForward { y, rstd, x, residual: None, w, t, c, eps }),
        }
    }

    /// From norm1's output in scratch.inner to what the MLP adds to x_mid, in scratch.outer.
    pub(super) fn forward(
        &self,
        backend: &mut B,
        pass: &Pass<B>,
        layer: &mut Layer<B>,
        attend: Attend<B>,
    ) -> Result<()> {
        let (t, f) = (pass.t, self.down.k);
        self.qkv(backend, pass, layer)?;
        self.attention(backend, layer, t, attend)?;
        self.middle(backend, pass, layer)?;
        self.gate_up(backend, pass, layer)?;
        // The normed input is used up: the SwiGLU product takes its place.
        let Layer { mlp, scratch, small, .. } = layer;
        backend.swiglu_forward(SwigluForward { y: &mut scratch.inner, gate_up: &mlp.gate_up, t, f })?;
        linear(backend, pass, &self.down, &mut scratch.outer, &mut small.h_down, &scratch.inner)
    }

    /// The parts of [`Block::forward`] that backward needs again: the same ops on the same inputs.
    pub(super) fn recompute(
        &self,
        backend: &mut B,
        pass: &Pass<B>,
        layer: &mut Layer<B>,
        stale: Stale,
        batch: &Batch<B>,
    ) -> Result<()> {
        if stale.middle {
            self.input_norm(backend, pass, layer.x, &mut layer.small.rstd, layer.scratch, None)?;
            self.qkv(backend, pass, layer)?;
            if stale.attention {
                self.attention(backend, layer, pass.t, Attend::Batch(batch))?;
            }
            self.middle(backend, pass, layer)?;
        } else {
            self.middle_norm(backend, pass, layer)?;
        }
        self.gate_up(backend, pass, layer)
    }

    /// q, k, v of scratch.inner, normed (Qwen3) and rotated.
    fn qkv(&self, backend: &mut B, pass: &Pass<B>, layer: &mut Layer<B>) -> Result<()> {
        let (t, eps, heads, inv_freq) = (pass.t, pass.eps, self.heads, pass.inv_freq);
        let Layer { middle, scratch, .. } = layer;
        // The q and k norms of Qwen3 keep their input.
        match (&self.qk_norm, &mut middle.raw) {
            (Some((q_w, k_w)), Some((raw, rstd))) => {
                linear(backend, pass, &self.qkv, raw, &mut middle.h_qkv, &scratch.inner)?;
                let (y, x) = (&mut middle.qkv, &*raw);
                backend.head_norm_forward(HeadNormForward { y, rstd, x, q_w, k_w, t, heads, eps })?;
            }
            _ => linear(backend, pass, &self.qkv, &mut middle.qkv, &mut middle.h_qkv, &scratch.inner)?,
        }
        backend.rope_forward(Rope { qkv: &mut middle.qkv, positions: pass.positions, inv_freq, t, heads })
    }

    fn attention(&self, backend: &mut B, layer: &mut Layer<B>, t: usize, attend: Attend<B>) -> Result<()> {
        let (o, lse, qkv, heads) = (&mut *layer.o, &mut *layer.lse, &layer.middle.qkv, self.heads);
        match attend {
            Attend::Batch(batch) => backend.attention_forward(AttentionForward { o, lse, qkv, batch, heads }),
            Attend::Cache { cache, past, positions } => {
                backend.attention_decode(AttentionDecode { o, cache, qkv, positions, t, past, heads })
            }
        }
    }

    /// x_mid = x + the output of o; scratch.inner = norm2(x_mid).
    fn middle(&self, backend: &mut B, pass: &Pass<B>, layer: &mut Layer<B>) -> Result<()> {
        let (t, c, eps, w) = (pass.t, self.qkv.k, pass.eps, &self.norm2);
        let Layer { x, middle, o, scratch, .. } = layer;
        linear(backend, pass, &self.o, &mut scratch.outer, &mut middle.h_o, o)?;
        let (y, rstd, residual) = (&mut scratch.inner, &mut middle.rstd2, Some((&scratch.outer, &mut middle.x_mid)));
        backend.rmsnorm_forward(RmsNormForward { y, rstd, x, residual, w, t, c, eps })
    }

    /// scratch.inner = norm2(x_mid) alone.
    fn middle_norm(&self, backend: &mut B, pass: &Pass<B>, layer: &mut Layer<B>) -> Result<()> {
        let (t, c, eps, w) = (pass.t, self.qkv.k, pass.eps, &self.norm2);
        let (y, rstd, x) = (&mut layer.scratch.inner, &mut layer.middle.rstd2, &layer.middle.x_mid);
        backend.rmsnorm_forward(RmsNormForward { y, rstd, x, residual: None, w, t, c, eps })
    }

    fn gate_up(&self, backend: &mut B, pass: &Pass<B>, layer: &mut Layer<B>) -> Result<()> {
        let Layer { mlp, scratch, .. } = layer;
        linear(backend, pass, &self.gate_up, &mut mlp.gate_up, &mut mlp.h_gate_up, &scratch.inner)
    }

    /// Takes grads.dres from the gradient of the layer's output to that of its input, and adds to grads.d_lora.
    /// `bottom`: the lowest linear with an adapter, if it is in this layer; what lies under it is not computed.
    pub(super) fn backward(
        &self,
        backend: &mut B,
        pass: &Pass<B>,
        layer: &mut Layer<B>,
        grads: &mut Grads<B>,
        batch: &Batch<B>,
        bottom: Option<Stage>,
    ) -> Result<()> {
        let Grads { dres, delta, dh, d_lora } = grads;
        let (t, c, f, heads, dropout) = (pass.t, self.qkv.k, self.down.k, self.heads, pass.dropout);
        let (positions, inv_freq) = (pass.positions, pass.inv_freq);
        let lora = pass.lora.expect("backward runs with an adapter");
        let above = |stage| bottom.is_none_or(|b| stage > b);

        // down: the gradient of the branch is that of the residual stream itself. Its input is recomputed in `inner`; the
        // gradient of it goes to `outer`.
        let Layer { mlp, small, scratch, .. } = layer;
        backend.swiglu_forward(SwigluForward { y: &mut scratch.inner, gate_up: &mlp.gate_up, t, f })?;
        let dx = above(Stage::Down).then_some(&mut scratch.outer);
        let (dy, x, h, w) = (&*dres, &scratch.inner, &small.h_down, &self.down);
        backend.linear_backward(LinearBackward { dx, d_lora, dh, dy, x, h, w, lora, t, dropout })?;
        if !above(Stage::Down) {
            return Ok(());
        }
        // In place: what was kept of gate and up is not needed again.
        backend.swiglu_backward(SwigluBackward { gate_up: &mut mlp.gate_up, dy: &scratch.outer, t, f })?;

        // gate and up; their input, the output of norm2, is recomputed in `inner`: the SwiGLU product is used up.
        self.middle_norm(backend, pass, layer)?;
        let Layer { middle, mlp, scratch, .. } = layer;
        let dx = above(Stage::GateUp).then_some(&mut scratch.outer);
        let (dy, x, h, w) = (&mlp.gate_up, &scratch.inner, &mlp.h_gate_up, &self.gate_up);
        backend.linear_backward(LinearBackward { dx, d_lora, dh, dy, x, h, w, lora, t, dropout })?;
        if !above(Stage::GateUp) {
            return Ok(());
        }
        let (dx, dy, x, w, rstd) = (&mut *dres, &scratch.outer, &middle.x_mid, &self.norm2, &middle.rstd2);
        backend.rmsnorm_backward(RmsNormBackward { dx, dy, x, w, rstd, t, c })?;

        // o, attention, and back through the rotation and the q and k norms. `outer` now holds the gradient of o; the
        // gradients of gate and up are used up, and their buffer takes that of q, k and v.
        let Layer { middle, o, lse, mlp, scratch, .. } = layer;
        let dx = above(Stage::O).then_some(&mut scratch.outer);
        let (dy, x, h, w) = (&*dres, &**o, &middle.h_o, &self.o);
        backend.linear_backward(LinearBackward { dx, d_lora, dh, dy, x, h, w, lora, t, dropout })?;
        if !above(Stage::O) {
            return Ok(());
        }
        let (dqkv, d_o, o, lse, qkv) = (&mut mlp.gate_up, &scratch.outer, &**o, &**lse, &middle.qkv);
        backend.attention_backward(AttentionBackward { dqkv, delta, d_o, o, lse, qkv, batch, heads })?;
        backend.rope_backward(Rope { qkv: dqkv, positions, inv_freq, t, heads })?;
        if let (Some((q_w, k_w)), Some((x, rstd))) = (&self.qk_norm, &middle.raw) {
            backend.head_norm_backward(HeadNormBackward { dqkv, x, rstd, q_w, k_w, t, heads })?;
        }

        // q, k, v; their input, the output of norm1, is recomputed in `inner`.
        let Layer { x: input, small, middle, mlp, scratch, .. } = layer;
        self.input_norm(backend, pass, input, &mut small.rstd, scratch, None)?;
        let dx = above(Stage::Qkv).then_some(&mut scratch.outer);
        let (dy, x, h, w) = (&mlp.gate_up, &scratch.inner, &middle.h_qkv, &self.qkv);
        backend.linear_backward(LinearBackward { dx, d_lora, dh, dy, x, h, w, lora, t, dropout })?;
        if !above(Stage::Qkv) {
            return Ok(());
        }
        let (dx, dy, x, w, rstd) = (&mut *dres, &scratch.outer, &**input, &self.norm1, &small.rstd);
        backend.rmsnorm_backward(RmsNormBackward { dx, dy, x, w, rstd, t, c })
    }
}

/// A linear of a forward pass.
fn linear<B: Backend>(
    backend: &mut B,
    pass: &Pass<B>,
    w: &Linear<B>,
    y: &mut B::Act,
    h: &mut B::Act,
    x: &B::Act,
) -> Result<()> {
    backend.linear_forward(LinearForward { y, h, x, w, lora: pass.lora, t: pass.t, dropout: pass.dropout })
}
