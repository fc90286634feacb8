//! The op set: what a device must be able to do for the graph in `model/` to run on it.
//!
//! The trait is shaped for CUDA first. Buffers are allocated at set-up and never inside a step; every op writes into
//! outputs that its caller owns and takes its arguments as one struct. `=` and `+=` in the field comments say whether an
//! op overwrites or adds. An op checks sizes once and answers [`crate::Error::Shape`] with its own name.
//!
//! Shape letters: `B` sequences, `T` tokens (all sequences laid end to end), `C` channels, `H` query heads, `G` KV heads,
//! `D` head size, `F` MLP width, `V` vocabulary, `R` LoRA rank (of all projections of a group together), `L` layers,
//! `N`,`K` output and input width of a linear, `M` target tokens, `P` trainable weights.

pub mod adamw;
mod batch;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
mod frame;
mod shape;
pub mod work;
pub mod workspace;

pub use adamw::{Moment, NewOptimizer, OptimKind, OptimizerState, ParamGroup};
pub use batch::{Batch, HostBatch, IGNORE};
pub use frame::{Item, Needs, Scope, StepKey, StepKind};
pub use work::{LinearSize, OpTime, Work};

use crate::error::Result;
use crate::tensor::HostMatrix;

/// A device that runs the op set. `cpu::Cpu` is the oracle (f32 throughout); CUDA keeps `Act` in bf16.
pub trait Backend: Sized {
    /// A buffer of activations, of norm weights, of biases, or of the working copy of the adapter.
    type Act;
    /// A buffer of f32: statistics, losses, gradients of the adapter.
    type F32;
    /// A buffer of i32: tokens, positions, offsets.
    type I32;
    /// A frozen weight matrix (N, K), in 4 bits or in 16/32.
    type Matrix;
    /// Master weights, m and v of AdamW for all P trainable weights.
    type Optimizer;
    /// A buffer of activations in host memory (pinned, where the device is not the host).
    type Host;
    /// A copy between the two that is under way.
    type Ticket: Copy;

    /// What `info` and the log call this device, e.g. "CPU (2 threads)".
    fn describe(&self) -> String;

    // ---- the frame of a step: names for errors and profilers, replay ----------------------------------------------

    /// What follows, up to the matching [`Backend::leave`], belongs to `scope`: an NVTX range, and the place in errors.
    fn enter(&mut self, _scope: Scope) {}
    fn leave(&mut self) {}
    /// Runs `f`, which launches the same ops on the same buffers for equal keys: a backend may record them at the first
    /// call and replay the record later. What differs between calls of one key lies in device memory.
    /// `dropout_step` is [`Dropout::step`] of this micro-batch.
    fn micro_step(
        &mut self,
        _key: StepKey,
        _dropout_step: u32,
        f: &mut dyn FnMut(&mut Self) -> Result<()>,
    ) -> Result<()> {
        f(self)
    }
    /// From now on takes the time of each op, or no longer; what it took so far is forgotten. Recorded micro-steps are
    /// recorded anew, and one that cannot be is an error: launched op by op it would be another step.
    fn time_ops(&mut self, _on: bool) -> Result<()> {
        Ok(())
    }
    /// The time of each op since the last call, in the order of first use; waits for them. A backend may leave it to
    /// [`Backend::time_ops`] whether there are any.
    fn take_op_times(&mut self) -> Result<Vec<OpTime>> {
        Ok(vec![])
    }
    /// Tells a profiler that is attached where to begin and where to end.
    fn profiler(&mut self, _on: bool) -> Result<()> {
        Ok(())
    }
    /// The token count of a micro-batch is padded to a multiple of this, see [`Batch`].
    fn granularity(&self) -> usize {
        1
    }

    // ---- memory: set-up only -------------------------------------------------------------------------------------

    /// Free bytes of device memory; None where the device is the host.
    fn free_memory(&self) -> Result<Option<usize>> {
        Ok(None)
    }
    /// Lets go of what an earlier model of the process needed beside its own buffers: scratch, recorded steps, its reservation.
    fn release(&mut self) -> Result<()> {
        Ok(())
    }
    /// Takes the one allocation that all buffers from now on are cut from: what `memory::plan` has counted.
    fn reserve(&mut self, _bytes: usize) -> Result<()> {
        Ok(())
    }
    /// Bytes taken of what was reserved, and all of it; None where nothing was.
    fn reserved(&self) -> Option<(usize, usize)> {
        None
    }
    /// Whether the state of optimizers made from now on had better live in host memory.
    fn prefer_optimizer_on_host(&mut self, _yes: bool) {}
    /// What the allocations that follow are for: the rows of the plan's table.
    fn label(&mut self, _item: Item) {}
    /// Makes the scratch that the ops themselves need for models and micro-batches up to `needs`.
    fn prepare(&mut self, _needs: &Needs) -> Result<()> {
        Ok(())
    }

    fn alloc_act(&mut self, len: usize) -> Result<Self::Act>;
    fn alloc_f32(&mut self, len: usize) -> Result<Self::F32>;
    fn alloc_i32(&mut self, len: usize) -> Result<Self::I32>;
    /// Moves a frozen matrix to the device: 4-bit stays 4-bit, 16-bit stays 16-bit, [`HostMatrix::Quantize`] becomes 4-bit.
    /// [`Error::Input`](crate::Error::Input) if a weight is NaN or infinite.
    fn upload(&mut self, w: &HostMatrix) -> Result<Self::Matrix>;
    /// Master = `init` (P), m = v = 0.
    fn new_optimizer(&mut self, of: NewOptimizer) -> Result<Self::Optimizer>;

    /// `len` activations in host memory.
    fn alloc_host(&mut self, len: usize) -> Result<Self::Host>;
    /// Begins to copy the first `len` elements to host memory, behind all ops before. Until [`Backend::wait`] the source
    /// must stay as it is.
    fn send(&mut self, to: &mut Self::Host, from: &Self::Act, len: usize) -> Result<Self::Ticket>;
    /// Begins to copy `len` elements back, behind all ops before. Until [`Backend::wait`] no op may touch `to`.
    fn fetch(&mut self, to: &mut Self::Act, from: &Self::Host, len: usize) -> Result<Self::Ticket>;
    /// Every op from now on comes behind the end of this copy.
    fn wait(&mut self, copy: Self::Ticket) -> Result<()>;

    // ---- moves between host and device; `src`/`dst` may be shorter than the buffer, the rest is left as it is ----------

    /// Rounds to the device's activation type.
    fn write_act(&mut self, dst: &mut Self::Act, src: &[f32]) -> Result<()>;
    fn read_act(&mut self, src: &Self::Act, dst: &mut [f32]) -> Result<()>;
    fn write_f32(&mut self, dst: &mut Self::F32, src: &[f32]) -> Result<()>;
    fn read_f32(&mut self, src: &Self::F32, dst: &mut [f32]) -> Result<()>;
    fn write_i32(&mut self, dst: &mut Self::I32, src: &[i32]) -> Result<()>;
    /// dst = 0, all of it.
    fn zero_f32(&mut self, dst: &mut Self::F32) -> Result<()>;
    fn zero_act(&mut self, dst: &mut Self::Act) -> Result<()>;
    /// Master weights and moments as the device keeps them, bit for bit.
    fn read_optimizer(&mut self, src: &Self::Optimizer) -> Result<OptimizerState>;
    fn write_optimizer(&mut self, dst: &mut Self::Optimizer, src: &OptimizerState) -> Result<()>;

    // ---- frozen weights --------------------------------------------------------------------------------------------

    /// out (N*K) = the matrix in the activation type. For tests and merging: a step never needs it.
    fn nf4_dequantize(&mut self, out: &mut Self::Act, w: &Self::Matrix) -> Result<()>;

    // ---- the graph's ops ---------------------------------------------------------------------------------------------

    /// `x[t,:] = table[tokens[t],:]`
    fn embedding(&mut self, a: Embedding<Self>) -> Result<()>;
    fn rmsnorm_forward(&mut self, a: RmsNormForward<Self>) -> Result<()>;
    fn rmsnorm_backward(&mut self, a: RmsNormBackward<Self>) -> Result<()>;
    /// RMSNorm over each head of q and k (Qwen3); v is copied.
    fn head_norm_forward(&mut self, a: HeadNormForward<Self>) -> Result<()>;
    /// In place on the gradient.
    fn head_norm_backward(&mut self, a: HeadNormBackward<Self>) -> Result<()>;
    /// Rotates q and k in place (half-split, "rotate_half").
    fn rope_forward(&mut self, a: Rope<Self>) -> Result<()>;
    /// Rotates the gradients of q and k back, in place.
    fn rope_backward(&mut self, a: Rope<Self>) -> Result<()>;
    fn attention_forward(&mut self, a: AttentionForward<Self>) -> Result<()>;
    fn attention_backward(&mut self, a: AttentionBackward<Self>) -> Result<()>;
    fn swiglu_forward(&mut self, a: SwigluForward<Self>) -> Result<()>;
    fn swiglu_backward(&mut self, a: SwigluBackward<Self>) -> Result<()>;
    fn linear_forward(&mut self, a: LinearForward<Self>) -> Result<()>;
    fn linear_backward(&mut self, a: LinearBackward<Self>) -> Result<()>;
    fn head_loss(&mut self, a: HeadLoss<Self>) -> Result<()>;
    /// logits (M, V) f32 = `x[rows] · headᵀ`. For generation, evaluation of few rows, and tests.
    fn head_logits(&mut self, a: HeadLogits<Self>) -> Result<()>;
    /// norm (1) = sqrt(sum of squares of grads (P)), in a fixed order.
    fn grad_norm(&mut self, norm: &mut Self::F32, grads: &Self::F32) -> Result<()>;
    fn adamw(&mut self, a: Adamw<Self>) -> Result<()>;
    /// Called ahead of the last micro-step before [`Backend::adamw`]: state that lives elsewhere begins to come.
    fn prefetch_optimizer(&mut self, _state: &mut Self::Optimizer) -> Result<()> {
        Ok(())
    }
    /// For the log: where the state lives, and, after steps, what moving it cost. None where there is nothing to tell.
    fn optimizer_report(&mut self, _state: &mut Self::Optimizer) -> Result<Option<String>> {
        Ok(None)
    }
    /// Appends k, v of T new tokens of one sequence to the cache and attends over all of it.
    fn attention_decode(&mut self, a: AttentionDecode<Self>) -> Result<()>;
}

/// Heads of the attention and the layout of `qkv` (T, (H + 2G) * D): H query heads, then G key heads, then G value heads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    pub h: usize,
    pub g: usize,
    pub d: usize,
    /// Query i sees keys j with i - window < j <= i; None: all j <= i.
    pub window: Option<usize>,
}

impl Heads {
    /// (H + 2G) * D, the width of a row of qkv.
    pub fn qkv(&self) -> usize {
        (self.h + 2 * self.g) * self.d
    }

    /// 1 / sqrt(D), the factor of q·k.
    pub fn scale(&self) -> f32 {
        1.0 / (self.d as f32).sqrt()
    }
}

/// Frozen projections that read the same input x (T, K), side by side in one output y (T, N): q|k|v, gate|up, or one alone.
pub struct Linear<B: Backend> {
    pub k: usize,
    /// Sum of the parts' n.
    pub n: usize,
    /// Sum of the parts' LoRA ranks (0: nothing trainable here).
    pub r: usize,
    pub parts: Vec<Projection<B>>,
}

/// One projection: W (n, K), frozen; bias (n), frozen; LoRA if it is a target.
pub struct Projection<B: Backend> {
    pub n: usize,
    pub w: B::Matrix,
    pub bias: Option<B::Act>,
    pub lora: Option<Lora>,
}

/// Where the adapter of a projection lies in the flat vector of all P trainable weights.
#[derive(Clone, Debug, PartialEq)]
pub struct Lora {
    /// Offset of A (r, K), row-major.
    pub a: usize,
    /// Offset of B (n, r), row-major.
    pub b: usize,
    pub r: usize,
    /// alpha / r, or alpha / sqrt(r) with rsLoRA.
    pub scale: f32,
    /// Number of this projection in the model: its stream of dropout masks.
    pub site: u32,
}

/// LoRA dropout on x before A. Element i = t*K + k of projection `site` is kept where
/// `uniform(seed, Stream::Dropout, site, step * 2^32 + i) >= p`, and then divided by 1 - p.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    /// 0 <= p < 1; 0 means none.
    pub p: f32,
    pub seed: u64,
    /// Number of the micro-batch since the start of the run.
    pub step: u32,
}

pub struct Embedding<'a, B: Backend> {
    /// (T, C) =
    pub x: &'a mut B::Act,
    /// (T)
    pub tokens: &'a B::I32,
    /// (V, C)
    pub table: &'a B::Matrix,
    pub t: usize,
    pub c: usize,
}

/// s = x + delta (where there is one), r = 1 / sqrt(mean_c(s^2) + eps), y = r * s * w.
/// r and y follow from s as it is stored, rounded: norming s again, without a delta, gives the same bits.
pub struct RmsNormForward<'a, B: Backend> {
    /// (T, C) =
    pub y: &'a mut B::Act,
    /// (T) = r
    pub rstd: &'a mut B::F32,
    /// (T, C)
    pub x: &'a B::Act,
    /// delta (T, C), and where s goes (T, C) =
    pub residual: Option<(&'a B::Act, &'a mut B::Act)>,
    /// (C)
    pub w: &'a B::Act,
    pub t: usize,
    pub c: usize,
    pub eps: f32,
}

/// `dx[t,c] += r*dy*w - r^3 * x[t,c] * mean_c(dy*w*x)`. `x` is what was normed (s of the forward).
pub struct RmsNormBackward<'a, B: Backend> {
    /// (T, C) += : the gradient of the residual stream
    pub dx: &'a mut B::Act,
    /// (T, C)
    pub dy: &'a B::Act,
    /// (T, C)
    pub x: &'a B::Act,
    /// (C)
    pub w: &'a B::Act,
    /// (T)
    pub rstd: &'a B::F32,
    pub t: usize,
    pub c: usize,
}

/// y = x, but each query head normed and scaled by q_w (D), each key head by k_w (D).
pub struct HeadNormForward<'a, B: Backend> {
    /// (T, (H+2G)*D) =
    pub y: &'a mut B::Act,
    /// (T, H+G) = r of each head
    pub rstd: &'a mut B::F32,
    /// (T, (H+2G)*D)
    pub x: &'a B::Act,
    pub q_w: &'a B::Act,
    pub k_w: &'a B::Act,
    pub t: usize,
    pub heads: Heads,
    pub eps: f32,
}

pub struct HeadNormBackward<'a, B: Backend> {
    /// (T, (H+2G)*D) in: gradient of y; out: gradient of x
    pub dqkv: &'a mut B::Act,
    /// (T, (H+2G)*D) input of the forward
    pub x: &'a B::Act,
    /// (T, H+G)
    pub rstd: &'a B::F32,
    pub q_w: &'a B::Act,
    pub k_w: &'a B::Act,
    pub t: usize,
    pub heads: Heads,
}

/// For i < D/2: angle = `positions[t] * inv_freq[i]` in f32; (x_i, x_{i+D/2}) turned by it, in each query and key head.
pub struct Rope<'a, B: Backend> {
    /// (T, (H+2G)*D) in place; v is left alone
    pub qkv: &'a mut B::Act,
    /// (T)
    pub positions: &'a B::I32,
    /// (D/2)
    pub inv_freq: &'a B::F32,
    pub t: usize,
    pub heads: Heads,
}

/// o = softmax(scale * q kᵀ + mask) v, causal inside each sequence; query head h reads KV head h / (H/G).
pub struct AttentionForward<'a, B: Backend> {
    /// (T, H*D) =
    pub o: &'a mut B::Act,
    /// (H, T) = log-sum-exp of each row of scores; row stride `t`
    pub lse: &'a mut B::F32,
    /// (T, (H+2G)*D)
    pub qkv: &'a B::Act,
    pub batch: &'a Batch<B>,
    pub heads: Heads,
}

pub struct AttentionBackward<'a, B: Backend> {
    /// (T, (H+2G)*D) =
    pub dqkv: &'a mut B::Act,
    /// (H, T) scratch: sum_d(do*o) of each row
    pub delta: &'a mut B::F32,
    /// (T, H*D)
    pub d_o: &'a B::Act,
    /// (T, H*D)
    pub o: &'a B::Act,
    /// (H, T)
    pub lse: &'a B::F32,
    /// (T, (H+2G)*D)
    pub qkv: &'a B::Act,
    pub batch: &'a Batch<B>,
    pub heads: Heads,
}

/// y = silu(gate) * up
pub struct SwigluForward<'a, B: Backend> {
    /// (T, F) =
    pub y: &'a mut B::Act,
    /// (T, 2F): gate, then up
    pub gate_up: &'a B::Act,
    pub t: usize,
    pub f: usize,
}

pub struct SwigluBackward<'a, B: Backend> {
    /// (T, 2F) in: gate, then up; out: their gradients
    pub gate_up: &'a mut B::Act,
    /// (T, F)
    pub dy: &'a B::Act,
    pub t: usize,
    pub f: usize,
}

/// Of each part: h = dropout(x) Aᵀ, y = x Wᵀ + scale * h Bᵀ (+ bias).
pub struct LinearForward<'a, B: Backend> {
    /// (T, N) =
    pub y: &'a mut B::Act,
    /// (T, R) = h of all parts side by side; parts without LoRA take no columns
    pub h: &'a mut B::Act,
    /// (T, K)
    pub x: &'a B::Act,
    pub w: &'a Linear<B>,
    /// (P) working copy of the adapter; None: run the frozen base alone (h is not touched)
    pub lora: Option<&'a B::Act>,
    pub t: usize,
    pub dropout: Option<Dropout>,
}

/// dh = scale * dy B; dx = dy W + dropout'(dh A); dB += scale * dyᵀ h; dA += dhᵀ dropout(x).
pub struct LinearBackward<'a, B: Backend> {
    /// (T, K) = ; None where nothing below is trainable
    pub dx: Option<&'a mut B::Act>,
    /// (P) += at the parts' offsets
    pub d_lora: &'a mut B::F32,
    /// (T, R) scratch
    pub dh: &'a mut B::Act,
    /// (T, N)
    pub dy: &'a B::Act,
    /// (T, K)
    pub x: &'a B::Act,
    /// (T, R)
    pub h: &'a B::Act,
    pub w: &'a Linear<B>,
    /// (P)
    pub lora: &'a B::Act,
    pub t: usize,
    pub dropout: Option<Dropout>,
}

/// Cross-entropy of the target tokens, in chunks; the (T, V) logits never exist.
/// `loss += scale * sum_m(logsumexp(z_m) - z_m[id_m])`, `z_m = x[row_m] · headᵀ`
/// `dx[row_m] = scale * (softmax(z_m) - onehot(id_m)) · head`, and 0 in rows without a target.
pub struct HeadLoss<'a, B: Backend> {
    /// (1) +=
    pub loss: &'a mut B::F32,
    /// (T, C) = ; None: loss alone (evaluation)
    pub dx: Option<&'a mut B::Act>,
    /// (T, C) output of the final norm
    pub x: &'a B::Act,
    /// (V, C)
    pub head: &'a B::Matrix,
    pub batch: &'a Batch<B>,
    pub c: usize,
    pub v: usize,
}

pub struct HeadLogits<'a, B: Backend> {
    /// (M, V) =
    pub logits: &'a mut B::F32,
    /// (T, C)
    pub x: &'a B::Act,
    /// (V, C)
    pub head: &'a B::Matrix,
    /// Rows of x, on the host.
    pub rows: &'a [usize],
    pub c: usize,
    pub v: usize,
}

/// Decoupled weight decay (Loshchilov & Hutter 2019, as torch.optim.AdamW), after clipping by the global norm:
/// g *= min(1, max_grad_norm / (norm + 1e-6)); w *= 1 - lr*wd; m, v; w -= lr * (m / (1-b1^step)) / (sqrt(v / (1-b2^step)) + eps).
/// Nothing is updated where `norm` is not finite. The gradients are left as they are.
pub struct Adamw<'a, B: Backend> {
    pub state: &'a mut B::Optimizer,
    /// (P) = working copy, rounded from the master
    pub lora: &'a mut B::Act,
    /// (P)
    pub grads: &'a B::F32,
    /// (1) of grad_norm
    pub norm: &'a B::F32,
    /// Disjoint ranges that cover 0..P.
    pub groups: &'a [ParamGroup],
    pub beta1: f32,
    pub beta2: f32,
    pub eps: f32,
    /// <= 0: no clipping
    pub max_grad_norm: f32,
    /// 1 for the first
    pub step: u64,
}

/// Keys and values of one layer for one sequence being generated.
pub struct KvCache<B: Backend> {
    /// (capacity, G*D), rotated
    pub k: B::Act,
    /// (capacity, G*D)
    pub v: B::Act,
}

/// Row i of the T new tokens sits at position `past + i` and sees the cache up to itself (and the window).
pub struct AttentionDecode<'a, B: Backend> {
    /// (T, H*D) =
    pub o: &'a mut B::Act,
    /// rows past .. past+T are written
    pub cache: &'a mut KvCache<B>,
    /// (T, (H+2G)*D), rotated
    pub qkv: &'a B::Act,
    /// (T) past .. past+T, on the device: what a replayed launch reads
    pub positions: &'a B::I32,
    pub t: usize,
    pub past: usize,
    pub heads: Heads,
}
