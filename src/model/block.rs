//! One decoder block: forward beside backward, as straight-line calls.
//!
//! ```text
//! x      layer input (the residual stream)         kept for every layer
//! x_mid  x + attention(norm1(x))                   kept, or recomputed from x
//! next   x_mid + mlp(norm2(x_mid))                 the sum is taken by the next layer's norm
//! ```
//!
//! Normed inputs and the SwiGLU product are never kept: both are recomputed in backward at the speed of a copy.
//! `h` of down is kept for every layer, so that a recomputed layer stops at gate and up.

use super::WeightSource;
use super::adapter::AdapterLayout;
use super::config::{ModelConfig, Proj};
use super::linear::{load_linear, load_vector};
use crate::backend::{
    AttentionBackward, AttentionDecode, AttentionForward, Backend, Batch, Dropout, HeadNormBackward, HeadNormForward,
    Heads, KvCache, Linear, LinearBackward, LinearForward, RmsNormBackward, RmsNormForward, Rope, SwigluBackward,
    SwigluForward,
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

/// What is kept of every layer, recomputed or not.
pub(super) struct LayerInput<B: Backend> {
    /// (T, C) the layer's input
    pub x: B::Act,
    /// (T) statistic of norm1
    pub rstd: B::F32,
    /// (T, R) of down
    h_down: B::Act,
}

/// What backward needs of a layer beside its input.
pub(super) struct Saved<B: Backend> {
    /// Output of the qkv projection before the q and k norms: (T, (H+2G)*D), and (T, H+G); Qwen3 only.
    raw: Option<(B::Act, B::F32)>,
    /// (T, (H+2G)*D) normed and rotated
    qkv: B::Act,
    /// (T, H*D)
    o: B::Act,
    /// (H, T)
    lse: B::F32,
    /// (T, C)
    pub x_mid: B::Act,
    /// (T)
    rstd2: B::F32,
    /// (T, 2F)
    gate_up: B::Act,
    /// (T, R) of each linear
    h_qkv: B::Act,
    h_o: B::Act,
    h_gate_up: B::Act,
}

/// Buffers that every layer uses in turn.
pub(super) struct Scratch<B: Backend> {
    /// (T, C) a normed input
    pub norm: B::Act,
    /// (T, C) what the branch adds to the residual stream: output of o, then of down
    pub branch: B::Act,
    /// (T, F) the SwiGLU product
    act: B::Act,
}

/// Buffers of backward that every layer uses in turn.
pub(super) struct Grads<B: Backend> {
    /// (T, C) gradient of the residual stream
    pub dres: B::Act,
    /// (T, C) gradient of a normed input
    pub d_norm: B::Act,
    /// (T, F)
    d_act: B::Act,
    /// (T, H*D)
    d_o: B::Act,
    /// (T, (H+2G)*D)
    dqkv: B::Act,
    /// (H, T)
    delta: B::F32,
    /// (T, R) of the widest group
    dh: B::Act,
    /// (P) gradients of the adapter, summed over the micro-batches of a step
    pub d_lora: B::F32,
}

/// The buffers a layer works in.
pub(super) struct LayerBuffers<'a, B: Backend> {
    pub input: &'a mut LayerInput<B>,
    pub saved: &'a mut Saved<B>,
    pub scratch: &'a mut Scratch<B>,
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
    Cache { cache: &'a mut KvCache<B>, past: usize },
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
    ) -> Result<Self> {
        let (c, d) = (config.hidden_size, config.head_dim);
        let prefix = format!("model.layers.{layer}");
        let norm1 = load_vector(backend, source, &format!("{prefix}.input_layernorm.weight"), c)?;
        let qkv = load_linear(backend, config, layout, source, layer, &[Proj::Q, Proj::K, Proj::V])?;
        let qk_norm = match config.qk_norm {
            true => Some((
                load_vector(backend, source, &format!("{prefix}.self_attn.q_norm.weight"), d)?,
                load_vector(backend, source, &format!("{prefix}.self_attn.k_norm.weight"), d)?,
            )),
            false => None,
        };
        let o = load_linear(backend, config, layout, source, layer, &[Proj::O])?;
        let norm2 = load_vector(backend, source, &format!("{prefix}.post_attention_layernorm.weight"), c)?;
        let gate_up = load_linear(backend, config, layout, source, layer, &[Proj::Gate, Proj::Up])?;
        let down = load_linear(backend, config, layout, source, layer, &[Proj::Down])?;
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

    /// From norm1's output in scratch.norm (see [`Block::input_norm`]) to saved.gate_up: all that backward needs.
    pub(super) fn forward(
        &self,
        backend: &mut B,
        pass: &Pass<B>,
        buffers: LayerBuffers<B>,
        attend: Attend<B>,
    ) -> Result<()> {
        let LayerBuffers { input, saved, scratch } = buffers;
        let (t, c, eps, heads) = (pass.t, self.qkv.k, pass.eps, self.heads);
        let (positions, inv_freq) = (pass.positions, pass.inv_freq);

        // q, k, v; the q and k norms of Qwen3 keep their input.
        match (&self.qk_norm, &mut saved.raw) {
            (Some((q_w, k_w)), Some((raw, rstd))) => {
                linear(backend, pass, &self.qkv, raw, &mut saved.h_qkv, &scratch.norm)?;
                let (y, x) = (&mut saved.qkv, &*raw);
                backend.head_norm_forward(HeadNormForward { y, rstd, x, q_w, k_w, t, heads, eps })?;
            }
            _ => linear(backend, pass, &self.qkv, &mut saved.qkv, &mut saved.h_qkv, &scratch.norm)?,
        }
        backend.rope_forward(Rope { qkv: &mut saved.qkv, positions, inv_freq, t, heads })?;

        // attention, o
        let (o, lse, qkv) = (&mut saved.o, &mut saved.lse, &saved.qkv);
        match attend {
            Attend::Batch(batch) => backend.attention_forward(AttentionForward { o, lse, qkv, batch, heads })?,
            Attend::Cache { cache, past } => {
                backend.attention_decode(AttentionDecode { o, cache, qkv, t, past, heads })?;
            }
        }
        linear(backend, pass, &self.o, &mut scratch.branch, &mut saved.h_o, &saved.o)?;

        // x_mid = x + branch, normed
        let (y, rstd, x, w) = (&mut scratch.norm, &mut saved.rstd2, &input.x, &self.norm2);
        let residual = Some((&scratch.branch, &mut saved.x_mid));
        backend.rmsnorm_forward(RmsNormForward { y, rstd, x, residual, w, t, c, eps })?;

        linear(backend, pass, &self.gate_up, &mut saved.gate_up, &mut saved.h_gate_up, &scratch.norm)
    }

    /// SwiGLU and down: what the MLP adds to saved.x_mid, in scratch.branch.
    pub(super) fn output(&self, backend: &mut B, pass: &Pass<B>, buffers: LayerBuffers<B>) -> Result<()> {
        let LayerBuffers { input, saved, scratch } = buffers;
        let (t, f) = (pass.t, self.down.k);
        backend.swiglu_forward(SwigluForward { y: &mut scratch.act, gate_up: &saved.gate_up, t, f })?;
        linear(backend, pass, &self.down, &mut scratch.branch, &mut input.h_down, &scratch.act)
    }

    /// scratch.norm = norm1(input.x). Given x_mid of the layer below, input.x = x_mid + scratch.branch comes first.
    pub(super) fn input_norm(
        &self,
        backend: &mut B,
        pass: &Pass<B>,
        input: &mut LayerInput<B>,
        scratch: &mut Scratch<B>,
        below: Option<&B::Act>,
    ) -> Result<()> {
        let (t, c, eps, w) = (pass.t, self.qkv.k, pass.eps, &self.norm1);
        let (y, rstd) = (&mut scratch.norm, &mut input.rstd);
        match below {
            Some(x) => {
                let residual = Some((&scratch.branch, &mut input.x));
                backend.rmsnorm_forward(RmsNormForward { y, rstd, x, residual, w, t, c, eps })
            }
            None => backend.rmsnorm_forward(RmsNormForward { y, rstd, x: &input.x, residual: None, w, t, c, eps }),
        }
    }

    /// Takes grads.dres from the gradient of the layer's output to that of its input, and adds to grads.d_lora.
    /// `bottom`: the lowest linear with an adapter, if it is in this layer; what lies under it is not computed.
    pub(super) fn backward(
        &self,
        backend: &mut B,
        pass: &Pass<B>,
        buffers: LayerBuffers<B>,
        grads: &mut Grads<B>,
        batch: &Batch<B>,
        bottom: Option<Stage>,
    ) -> Result<()> {
        let LayerBuffers { input, saved, scratch } = buffers;
        let Grads { dres, d_norm, d_act, d_o, dqkv, delta, dh, d_lora } = grads;
        let (t, c, f, eps, heads, dropout) = (pass.t, self.qkv.k, self.down.k, pass.eps, self.heads, pass.dropout);
        let (positions, inv_freq) = (pass.positions, pass.inv_freq);
        let lora = pass.lora.expect("backward runs with an adapter");
        let above = |stage| bottom.is_none_or(|b| stage > b);

        // down: the gradient of the branch is that of the residual stream itself. Its input is recomputed.
        backend.swiglu_forward(SwigluForward { y: &mut scratch.act, gate_up: &saved.gate_up, t, f })?;
        let (dx, dy, x, h, w) =
            (above(Stage::Down).then_some(&mut *d_act), &*dres, &scratch.act, &input.h_down, &self.down);
        backend.linear_backward(LinearBackward { dx, d_lora, dh, dy, x, h, w, lora, t, dropout })?;
        if !above(Stage::Down) {
            return Ok(());
        }
        // In place: what was kept of gate and up is not needed again.
        backend.swiglu_backward(SwigluBackward { gate_up: &mut saved.gate_up, dy: d_act, t, f })?;

        // gate and up; their input, the output of norm2, is recomputed.
        let (y, rstd, x, w) = (&mut scratch.norm, &mut saved.rstd2, &saved.x_mid, &self.norm2);
        backend.rmsnorm_forward(RmsNormForward { y, rstd, x, residual: None, w, t, c, eps })?;
        let (dx, dy, x, h, w) = (
            above(Stage::GateUp).then_some(&mut *d_norm),
            &saved.gate_up,
            &scratch.norm,
            &saved.h_gate_up,
            &self.gate_up,
        );
        backend.linear_backward(LinearBackward { dx, d_lora, dh, dy, x, h, w, lora, t, dropout })?;
        if !above(Stage::GateUp) {
            return Ok(());
        }
        let (dx, dy, x, w, rstd) = (&mut *dres, &*d_norm, &saved.x_mid, &self.norm2, &saved.rstd2);
        backend.rmsnorm_backward(RmsNormBackward { dx, dy, x, w, rstd, t, c })?;

        // o, attention, and back through the rotation and the q and k norms
        let (dx, dy, x, h, w) = (above(Stage::O).then_some(&mut *d_o), &*dres, &saved.o, &saved.h_o, &self.o);
        backend.linear_backward(LinearBackward { dx, d_lora, dh, dy, x, h, w, lora, t, dropout })?;
        if !above(Stage::O) {
            return Ok(());
        }
        let (o, lse, qkv) = (&saved.o, &saved.lse, &saved.qkv);
        backend.attention_backward(AttentionBackward { dqkv, delta, d_o, o, lse, qkv, batch, heads })?;
        backend.rope_backward(Rope { qkv: dqkv, positions, inv_freq, t, heads })?;
        if let (Some((q_w, k_w)), Some((x, rstd))) = (&self.qk_norm, &saved.raw) {
            backend.head_norm_backward(HeadNormBackward { dqkv, x, rstd, q_w, k_w, t, heads })?;
        }

        // q, k, v; their input, the output of norm1, is recomputed.
        self.input_norm(backend, pass, input, scratch, None)?;
        let (dx, dy, x, h, w) =
            (above(Stage::Qkv).then_some(&mut *d_norm), &*dqkv, &scratch.norm, &saved.h_qkv, &self.qkv);
        backend.linear_backward(LinearBackward { dx, d_lora, dh, dy, x, h, w, lora, t, dropout })?;
        if !above(Stage::Qkv) {
            return Ok(());
        }
        let (dx, dy, x, w, rstd) = (&mut *dres, &*d_norm, &input.x, &self.norm1, &input.rstd);
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

impl<B: Backend> LayerInput<B> {
    /// `ranks` as [`Block::ranks`] gives them.
    pub(super) fn new(backend: &mut B, t: usize, config: &ModelConfig, ranks: [usize; 4]) -> Result<Self> {
        Ok(Self {
            x: backend.alloc_act(t * config.hidden_size)?,
            rstd: backend.alloc_f32(t)?,
            h_down: backend.alloc_act(t * ranks[3])?,
        })
    }
}

impl<B: Backend> Saved<B> {
    /// `ranks` as [`Block::ranks`] gives them.
    pub(super) fn new(backend: &mut B, t: usize, config: &ModelConfig, ranks: [usize; 4]) -> Result<Self> {
        let (c, f, d) = (config.hidden_size, config.intermediate_size, config.head_dim);
        let (h, g) = (config.num_attention_heads, config.num_key_value_heads);
        let qkv = (h + 2 * g) * d;
        let raw = match config.qk_norm {
            true => Some((backend.alloc_act(t * qkv)?, backend.alloc_f32(t * (h + g))?)),
            false => None,
        };
        Ok(Self {
            raw,
            qkv: backend.alloc_act(t * qkv)?,
            o: backend.alloc_act(t * h * d)?,
            lse: backend.alloc_f32(t * h)?,
            x_mid: backend.alloc_act(t * c)?,
            rstd2: backend.alloc_f32(t)?,
            gate_up: backend.alloc_act(t * 2 * f)?,
            h_qkv: backend.alloc_act(t * ranks[0])?,
            h_o: backend.alloc_act(t * ranks[1])?,
            h_gate_up: backend.alloc_act(t * ranks[2])?,
        })
    }
}

impl<B: Backend> Scratch<B> {
    pub(super) fn new(backend: &mut B, t: usize, config: &ModelConfig) -> Result<Self> {
        let (c, f) = (config.hidden_size, config.intermediate_size);
        Ok(Self { norm: backend.alloc_act(t * c)?, branch: backend.alloc_act(t * c)?, act: backend.alloc_act(t * f)? })
    }
}

impl<B: Backend> Grads<B> {
    /// `max_rank`: of the widest group; `trainable`: P.
    pub(super) fn new(
        backend: &mut B,
        t: usize,
        config: &ModelConfig,
        max_rank: usize,
        trainable: usize,
    ) -> Result<Self> {
        let (c, f, d) = (config.hidden_size, config.intermediate_size, config.head_dim);
        let (h, g) = (config.num_attention_heads, config.num_key_value_heads);
        Ok(Self {
            dres: backend.alloc_act(t * c)?,
            d_norm: backend.alloc_act(t * c)?,
            d_act: backend.alloc_act(t * f)?,
            d_o: backend.alloc_act(t * h * d)?,
            dqkv: backend.alloc_act(t * (h + 2 * g) * d)?,
            delta: backend.alloc_f32(t * h)?,
            dh: backend.alloc_act(t * max_rank)?,
            d_lora: backend.alloc_f32(trainable)?,
        })
    }
}
