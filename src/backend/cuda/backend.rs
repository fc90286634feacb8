//! [`Backend`] for [`Cuda`]: each op of the graph over the launchers of `ops`.

use bytemuck::Pod;
use half::bf16;

use super::managed::Placement;
use super::matrix::Matrix;
use super::memory::{ALIGNMENT, Buffer};
use super::optimizer::{Optimizer, Step, table_bytes};
use super::scratch::{Scratch, missing};
use super::transfer::{Host, Ticket};
use super::{Cuda, ffi, head, linear, nvtx, ops};
use crate::backend::shape::at_least;
use crate::backend::work::LinearSize;
use crate::backend::workspace::{GRANULARITY, attention_decode_scratch};
use crate::backend::*;
use crate::error::{Error, Result};
use crate::tensor::HostMatrix;

impl Cuda {
    /// Runs an op: a range on the timeline, and a time where times are taken. Its error names the part of the step that it
    /// belongs to.
    fn op(&mut self, name: &'static str, work: Work, f: impl FnOnce(&Self) -> Result<()>) -> Result<()> {
        self.timed(name, work, |cuda| nvtx::range(name, || f(cuda))).map_err(|e| self.scopes.place(e))
    }

    /// Runs an op that needs scratch.
    fn op_with_scratch(
        &mut self,
        name: &'static str,
        work: Work,
        f: impl FnOnce(&Self, &mut Scratch) -> Result<()>,
    ) -> Result<()> {
        let Some(mut scratch) = self.scratch.take() else { return Err(missing(name)) };
        let result = self.timed(name, work, |cuda| nvtx::range(name, || f(cuda, &mut scratch)));
        self.scratch = Some(scratch);
        result.map_err(|e| self.scopes.place(e))
    }

    /// A buffer of the graph, counted under the label of the moment. What it holds is zero.
    fn buffer<T: Pod>(&mut self, len: usize) -> Result<Buffer<T>> {
        self.count(len * size_of::<T>());
        self.zeros(len)
    }

    /// Adds an allocation to the label of the moment.
    pub(super) fn count(&mut self, bytes: usize) {
        if let Some(item) = self.item {
            *self.used.entry(item).or_default() += bytes.next_multiple_of(ALIGNMENT);
        }
    }
}

impl Backend for Cuda {
    type Act = Buffer<bf16>;
    type F32 = Buffer<f32>;
    type I32 = Buffer<i32>;
    type Matrix = Matrix;
    type Optimizer = Optimizer;
    type Host = Host;
    type Ticket = Ticket;

    fn describe(&self) -> String {
        self.device.name.clone()
    }

    fn enter(&mut self, scope: Scope) {
        self.scopes.enter(scope);
    }

    fn leave(&mut self) {
        self.scopes.leave();
    }

    fn micro_step(
        &mut self,
        key: StepKey,
        dropout_step: u32,
        f: &mut dyn FnMut(&mut Self) -> Result<()>,
    ) -> Result<()> {
        if key.dropout.is_some() {
            self.set_dropout_step(dropout_step)?;
        }
        let depth = self.scopes.depth();
        let result = self.replay(key, f).map_err(|e| self.scopes.place(e));
        self.scopes.unwind(depth);
        result
    }

    fn time_ops(&mut self, on: bool) -> Result<()> {
        self.set_timer(on);
        Ok(())
    }

    fn take_op_times(&mut self) -> Result<Vec<OpTime>> {
        self.take_times()
    }

    fn profiler(&mut self, on: bool) -> Result<()> {
        self.bind()?;
        ffi::profiler(on)
    }

    fn granularity(&self) -> usize {
        GRANULARITY
    }

    fn free_memory(&self) -> Result<Option<usize>> {
        Ok(Some(self.memory()?.0))
    }

    fn release(&mut self) -> Result<()> {
        Cuda::release(self)
    }

    fn reserve(&mut self, bytes: usize) -> Result<()> {
        Cuda::reserve(self, bytes)
    }

    fn reserved(&self) -> Option<(usize, usize)> {
        self.arena_use()
    }

    fn prefer_optimizer_on_host(&mut self, yes: bool) {
        self.optimizer_on_host = yes;
    }

    fn label(&mut self, item: Item) {
        self.item = Some(item);
    }

    fn prepare(&mut self, needs: &Needs) -> Result<()> {
        self.prepare_scratch(needs)
    }

    fn alloc_act(&mut self, len: usize) -> Result<Buffer<bf16>> {
        self.buffer(len)
    }

    fn alloc_f32(&mut self, len: usize) -> Result<Buffer<f32>> {
        self.buffer(len)
    }

    fn alloc_i32(&mut self, len: usize) -> Result<Buffer<i32>> {
        self.buffer(len)
    }

    fn upload(&mut self, w: &HostMatrix) -> Result<Matrix> {
        let matrix = self.upload_matrix(w)?;
        self.count(matrix.bytes());
        Ok(matrix)
    }

    fn new_optimizer(&mut self, of: NewOptimizer) -> Result<Optimizer> {
        self.count(table_bytes(of.tensors.len()));
        // Read and written in place over PCIe it takes a fifth of the time that prefetching there and back does
        // (bench/results/2026-11-24-h100-kernels.csv: adamw).
        let wanted = if self.optimizer_on_host { Placement::Pinned } else { Placement::Device };
        Optimizer::new(self, of, wanted)
    }

    fn alloc_host(&mut self, len: usize) -> Result<Host> {
        self.pinned(len)
    }

    fn send(&mut self, to: &mut Host, from: &Buffer<bf16>, len: usize) -> Result<Ticket> {
        at_least("send", "from", from.len(), len)?;
        self.copy_out(to, from.range(0..len)).map_err(|e| self.scopes.place(e))
    }

    fn fetch(&mut self, to: &mut Buffer<bf16>, from: &Host, len: usize) -> Result<Ticket> {
        at_least("fetch", "to", to.len(), len)?;
        self.copy_in(to.range_mut(0..len), from).map_err(|e| self.scopes.place(e))
    }

    fn wait(&mut self, copy: Ticket) -> Result<()> {
        self.wait_for(copy)
    }

    fn write_act(&mut self, dst: &mut Buffer<bf16>, src: &[f32]) -> Result<()> {
        let rounded: Vec<bf16> = src.iter().map(|&x| bf16::from_f32(x)).collect();
        self.write(dst.view_mut(), &rounded)
    }

    fn read_act(&mut self, src: &Buffer<bf16>, dst: &mut [f32]) -> Result<()> {
        let mut narrow = vec![bf16::ZERO; dst.len()];
        self.read(src.view(), &mut narrow).map_err(|e| self.scopes.place(e))?;
        dst.iter_mut().zip(narrow).for_each(|(to, from)| *to = from.to_f32());
        Ok(())
    }

    fn write_f32(&mut self, dst: &mut Buffer<f32>, src: &[f32]) -> Result<()> {
        self.write(dst.view_mut(), src)
    }

    fn read_f32(&mut self, src: &Buffer<f32>, dst: &mut [f32]) -> Result<()> {
        self.read(src.view(), dst).map_err(|e| self.scopes.place(e))
    }

    fn write_i32(&mut self, dst: &mut Buffer<i32>, src: &[i32]) -> Result<()> {
        self.write(dst.view_mut(), src)
    }

    fn zero_f32(&mut self, dst: &mut Buffer<f32>) -> Result<()> {
        self.op("zero_f32", Work::moves(4 * dst.len()), |cuda| cuda.zero(dst.view_mut()))
    }

    fn zero_act(&mut self, dst: &mut Buffer<bf16>) -> Result<()> {
        self.op("zero_act", Work::moves(2 * dst.len()), |cuda| cuda.zero(dst.view_mut()))
    }

    fn read_optimizer(&mut self, src: &Optimizer) -> Result<OptimizerState> {
        src.read(self)
    }

    fn write_optimizer(&mut self, dst: &mut Optimizer, src: &OptimizerState) -> Result<()> {
        dst.write(self, src)
    }

    fn nf4_dequantize(&mut self, out: &mut Buffer<bf16>, w: &Matrix) -> Result<()> {
        self.op("nf4_dequantize", Work::nf4_dequantize(w.bytes(), w.len()), |cuda| cuda.widen_matrix(out.view_mut(), w))
    }

    fn embedding(&mut self, a: Embedding<Self>) -> Result<()> {
        let (t, c, v) = (a.t, a.c, a.table.n);
        self.op("embedding", Work::embedding(t, c), |cuda| {
            let Some(table) = a.table.dense() else {
                let detail = "a table in 4 bits: embeddings stay in 16".into();
                return Err(Error::Cuda { op: "embedding".into(), detail });
            };
            let (x, tokens) = (a.x.view_mut(), a.tokens.view());
            ops::embedding::embedding(cuda, ops::embedding::Embedding { x, tokens, table, t, c, v })
        })
    }

    fn rmsnorm_forward(&mut self, a: RmsNormForward<Self>) -> Result<()> {
        let work = Work::rmsnorm_forward(a.t, a.c, a.residual.is_some());
        let residual = a.residual.map(|(delta, s)| (delta.view(), s.view_mut()));
        let (y, rstd, x, w) = (a.y.view_mut(), a.rstd.view_mut(), a.x.view(), a.w.view());
        let op = ops::rmsnorm::RmsNormForward { y, rstd, x, residual, w, t: a.t, c: a.c, eps: a.eps };
        self.op("rmsnorm_forward", work, |cuda| ops::rmsnorm::rmsnorm_forward(cuda, op))
    }

    fn rmsnorm_backward(&mut self, a: RmsNormBackward<Self>) -> Result<()> {
        let (dx, dy, x, w, rstd) = (a.dx.view_mut(), a.dy.view(), a.x.view(), a.w.view(), a.rstd.view());
        let op = ops::rmsnorm::RmsNormBackward { dx, dy, x, w, rstd, t: a.t, c: a.c };
        self.op("rmsnorm_backward", Work::rmsnorm_backward(a.t, a.c), |cuda| ops::rmsnorm::rmsnorm_backward(cuda, op))
    }

    fn head_norm_forward(&mut self, a: HeadNormForward<Self>) -> Result<()> {
        let (y, rstd, x) = (a.y.view_mut(), a.rstd.view_mut(), a.x.view());
        let (q_w, k_w, t, heads, eps) = (a.q_w.view(), a.k_w.view(), a.t, a.heads, a.eps);
        let op = ops::rmsnorm::HeadNormForward { y, rstd, x, q_w, k_w, t, heads, eps };
        self.op("head_norm_forward", Work::head_norm_forward(t, heads), |cuda| {
            ops::rmsnorm::head_norm_forward(cuda, op)
        })
    }

    fn head_norm_backward(&mut self, a: HeadNormBackward<Self>) -> Result<()> {
        let (dqkv, x, rstd) = (a.dqkv.view_mut(), a.x.view(), a.rstd.view());
        let (q_w, k_w, t, heads) = (a.q_w.view(), a.k_w.view(), a.t, a.heads);
        let op = ops::rmsnorm::HeadNormBackward { dqkv, x, rstd, q_w, k_w, t, heads };
        self.op("head_norm_backward", Work::head_norm_backward(t, heads), |cuda| {
            ops::rmsnorm::head_norm_backward(cuda, op)
        })
    }

    fn rope_forward(&mut self, a: Rope<Self>) -> Result<()> {
        let (work, op) = (Work::rope(a.t, a.heads), rope(a));
        self.op("rope_forward", work, |cuda| ops::rope::rope_forward(cuda, op))
    }

    fn rope_backward(&mut self, a: Rope<Self>) -> Result<()> {
        let (work, op) = (Work::rope(a.t, a.heads), rope(a));
        self.op("rope_backward", work, |cuda| ops::rope::rope_backward(cuda, op))
    }

    fn attention_forward(&mut self, a: AttentionForward<Self>) -> Result<()> {
        let (o, lse, qkv, heads) = (a.o.view_mut(), a.lse.view_mut(), a.qkv.view(), a.heads);
        let (cu_seqlens, t, b) = (a.batch.cu_seqlens.view(), a.batch.t, a.batch.b);
        let op = ops::attention::AttentionForward { o, lse, qkv, cu_seqlens, t, b, heads };
        self.op("attention_forward", Work::attention_forward(&a.batch.lengths, heads), |cuda| {
            ops::attention::attention_forward(cuda, op)
        })
    }

    fn attention_backward(&mut self, a: AttentionBackward<Self>) -> Result<()> {
        let (dqkv, delta, d_o, o) = (a.dqkv.view_mut(), a.delta.view_mut(), a.d_o.view(), a.o.view());
        let (lse, qkv, heads) = (a.lse.view(), a.qkv.view(), a.heads);
        let (cu_seqlens, t, b) = (a.batch.cu_seqlens.view(), a.batch.t, a.batch.b);
        let op = ops::attention::AttentionBackward { dqkv, delta, d_o, o, lse, qkv, cu_seqlens, t, b, heads };
        self.op("attention_backward", Work::attention_backward(&a.batch.lengths, heads), |cuda| {
            ops::attention::attention_backward(cuda, op)
        })
    }

    fn swiglu_forward(&mut self, a: SwigluForward<Self>) -> Result<()> {
        let op = ops::swiglu::SwigluForward { y: a.y.view_mut(), gate_up: a.gate_up.view(), t: a.t, f: a.f };
        self.op("swiglu_forward", Work::swiglu_forward(a.t, a.f), |cuda| ops::swiglu::swiglu_forward(cuda, op))
    }

    fn swiglu_backward(&mut self, a: SwigluBackward<Self>) -> Result<()> {
        let op = ops::swiglu::SwigluBackward { gate_up: a.gate_up.view_mut(), dy: a.dy.view(), t: a.t, f: a.f };
        self.op("swiglu_backward", Work::swiglu_backward(a.t, a.f), |cuda| ops::swiglu::swiglu_backward(cuda, op))
    }

    fn linear_forward(&mut self, a: LinearForward<Self>) -> Result<()> {
        self.meet_dropout(a.dropout)?;
        let work = Work::linear_forward(linear_size(a.w, a.t, a.lora.is_some()));
        self.op_with_scratch("linear_forward", work, |cuda, s| linear::forward(cuda, s, a))
    }

    fn linear_backward(&mut self, a: LinearBackward<Self>) -> Result<()> {
        self.meet_dropout(a.dropout)?;
        let work = Work::linear_backward(linear_size(a.w, a.t, true), a.dx.is_some());
        self.op_with_scratch("linear_backward", work, |cuda, s| linear::backward(cuda, s, a))
    }

    fn head_loss(&mut self, a: HeadLoss<Self>) -> Result<()> {
        let work = Work::head_loss(a.batch.t, a.batch.m, a.c, a.v, a.head.bytes(), a.dx.is_some());
        self.op_with_scratch("head_loss", work, |cuda, s| head::loss(cuda, s, a))
    }

    fn head_logits(&mut self, a: HeadLogits<Self>) -> Result<()> {
        let work = Work::head_logits(a.rows.len(), a.c, a.v, a.head.bytes());
        self.op_with_scratch("head_logits", work, |cuda, s| head::logits(cuda, s, a))
    }

    fn grad_norm(&mut self, norm: &mut Buffer<f32>, grads: &Buffer<f32>) -> Result<()> {
        self.op_with_scratch("grad_norm", Work::grad_norm(grads.len()), |cuda, s| {
            let (norm, grads, partial) = (norm.view_mut(), grads.view(), s.norm.view_mut());
            ops::grad_norm::grad_norm(cuda, ops::grad_norm::GradNorm { norm, grads, partial })
        })
    }

    fn adamw(&mut self, a: Adamw<Self>) -> Result<()> {
        let step = Step {
            lora: a.lora.view_mut(),
            grads: a.grads.view(),
            norm: a.norm.view(),
            groups: a.groups,
            beta1: a.beta1,
            beta2: a.beta2,
            eps: a.eps,
            max_grad_norm: a.max_grad_norm,
            step: a.step,
        };
        let work = Work::adamw(a.grads.len(), a.state.bytes());
        self.op("adamw", work, |cuda| a.state.adamw(cuda, step))
    }

    fn optimizer_report(&mut self, state: &mut Optimizer) -> Result<Option<String>> {
        state.report().map(Some)
    }

    fn prefetch_optimizer(&mut self, state: &mut Optimizer) -> Result<()> {
        // Asks the driver to move pages: nothing that the stream of the ops takes time for.
        nvtx::range("prefetch_optimizer", || state.prefetch(self)).map_err(|e| self.scopes.place(e))
    }

    fn attention_decode(&mut self, a: AttentionDecode<Self>) -> Result<()> {
        let (t, heads) = (a.t, a.heads);
        let capacity = a.cache.k.len().min(a.cache.v.len()) / (heads.g * heads.d).max(1);
        at_least("attention_decode", "cache", capacity, a.past + t)?;
        let work = Work::attention_decode(t, a.past, heads);
        self.op_with_scratch("attention_decode", work, |cuda, s| {
            let room = |t: &usize| attention_decode_scratch(*t, heads) <= s.decode.len();
            let most = (1..=t).rev().find(room).unwrap_or(1);
            // Earlier rows do not see later ones, so they may come one chunk behind the other.
            for first in (0..t).step_by(most) {
                let t = most.min(t - first);
                let (q, kv) = (heads.h * heads.d, heads.qkv());
                let (o, qkv) = (a.o.range_mut(first * q..(first + t) * q), a.qkv.range(first * kv..(first + t) * kv));
                let (k, v, scratch) = (a.cache.k.view_mut(), a.cache.v.view_mut(), s.decode.view_mut());
                let positions = a.positions.range(first..first + t);
                let op = ops::decode::AttentionDecode { o, k, v, qkv, positions, t, capacity, heads, scratch };
                ops::decode::attention_decode(cuda, op)?;
            }
            Ok(())
        })
    }
}

impl Cuda {
    /// The number of the micro-batch lies on the device before a kernel draws its masks.
    fn meet_dropout(&mut self, dropout: Option<Dropout>) -> Result<()> {
        match dropout.filter(|d| d.p > 0.0) {
            Some(d) => self.set_dropout_step(d.step),
            None => Ok(()),
        }
    }
}

/// What the time of a linear is measured by; without its adapters unless they run.
fn linear_size(w: &Linear<Cuda>, t: usize, adapted: bool) -> LinearSize {
    let b = |p: &Projection<Cuda>| p.lora.as_ref().map_or(0, |l| p.n * l.r);
    let (r, b) = if adapted { (w.r, w.parts.iter().map(b).sum()) } else { (0, 0) };
    LinearSize { t, n: w.n, k: w.k, r, b, weights: w.parts.iter().map(|p| p.w.bytes()).sum() }
}

fn rope(a: Rope<'_, Cuda>) -> ops::rope::Rope<'_> {
    let (qkv, positions, inv_freq) = (a.qkv.view_mut(), a.positions.view(), a.inv_freq.view());
    ops::rope::Rope { qkv, positions, inv_freq, t: a.t, heads: a.heads }
}
