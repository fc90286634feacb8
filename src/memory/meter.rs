//! A backend that only counts: loading a model on it gives every byte, running a step on it predicts its time. The plan
//! is thus the graph's own order of allocations and ops, and cannot drift from it.

use std::collections::BTreeMap;

use super::card::Card;
use crate::backend::workspace::{GRANULARITY, workspace};
use crate::backend::*;
use crate::error::Result;
use crate::nf4::{self, Absmax};
use crate::tensor::HostMatrix;

/// Buffers of the CUDA backend start at multiples of this.
const ALIGNMENT: usize = 256;
/// bf16
const ACT: usize = 2;
/// Seconds from one launch to the next where a graph is replayed.
const LAUNCH: f64 = 2e-6;
/// Up to so many tokens a linear is a matrix-vector product; below the second, 4-bit weights are decoded inside the product.
const MATVEC_TOKENS: usize = 8;
const FUSED_TOKENS: usize = 256;

/// A buffer: its name and its length.
#[derive(Debug)]
pub struct Buffer {
    id: usize,
    len: usize,
}

/// A frozen matrix.
#[derive(Debug)]
pub struct Matrix {
    n: usize,
    k: usize,
    /// Bytes that hold it, if in 4 bits.
    packed: Option<usize>,
}

impl Matrix {
    fn elements(&self) -> f64 {
        (self.n * self.k) as f64
    }

    /// Bytes that a pass over it reads.
    fn stored(&self) -> f64 {
        self.packed.map_or(ACT as f64 * self.elements(), |bytes| bytes as f64)
    }
}

/// AdamW's state of so many weights, in so many bytes.
#[derive(Debug)]
pub struct Optimizer {
    weights: usize,
    bytes: usize,
}

/// A copy under way.
#[derive(Clone, Copy, Debug)]
pub struct Ticket(usize);

/// A copy that has not been waited for.
#[derive(Debug)]
struct Copy {
    ticket: usize,
    buffer: usize,
    /// To the device: no op may touch the buffer. To the host: none may write it.
    inward: bool,
    end: f64,
}

/// Seconds since the start of the step, and what was done in them.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Work {
    pub seconds: f64,
    /// Of those, waiting for copies.
    pub stalled: f64,
    pub flops: f64,
    /// Read or written in device memory.
    pub bytes: f64,
    /// Over PCIe, both directions together.
    pub copied: f64,
    pub launches: usize,
}

/// The backend that counts. Nothing that it is given is read.
#[derive(Debug)]
pub struct Meter {
    card: Card,
    item: Item,
    device: BTreeMap<Item, usize>,
    host: usize,
    buffers: usize,
    /// Whether AdamW's state lies in device memory.
    pub optimizer_on_device: bool,
    work: Work,
    copies: Vec<Copy>,
    tickets: usize,
    /// When the copies given so far in each direction will have ended.
    outward_end: f64,
    inward_end: f64,
}

impl Meter {
    pub fn new(card: Card) -> Self {
        Self {
            card,
            item: Item::Scratch,
            device: BTreeMap::new(),
            host: 0,
            buffers: 0,
            optimizer_on_device: true,
            work: Work::default(),
            copies: vec![],
            tickets: 0,
            outward_end: 0.0,
            inward_end: 0.0,
        }
    }

    /// Device bytes of each item, without the optimizer.
    pub fn device(&self) -> &BTreeMap<Item, usize> {
        &self.device
    }

    /// Device bytes of all items: what the arena must hold.
    pub fn device_bytes(&self) -> usize {
        self.device.values().sum()
    }

    /// Pinned host bytes of activations.
    pub fn host_bytes(&self) -> usize {
        self.host
    }

    /// What was done since the last call. Panics if a copy has not been waited for: a replayed step would lose it.
    pub fn take_work(&mut self) -> Work {
        assert!(self.copies.is_empty(), "copies under way at the end of a step: {:?}", self.copies);
        (self.outward_end, self.inward_end) = (0.0, 0.0);
        std::mem::take(&mut self.work)
    }

    /// AdamW's state without anything to start it from. Its tables lie with everything else, the state does not.
    pub fn optimizer(&mut self, kind: OptimKind, tensors: &[usize]) -> Optimizer {
        for bytes in adamw::tables(tensors.len()) {
            self.take(bytes);
        }
        Optimizer { weights: tensors.iter().sum(), bytes: super::optimizer_bytes(kind, tensors) }
    }

    /// A device buffer of `bytes` under the label of the day.
    fn allocate(&mut self, len: usize, size: usize) -> Buffer {
        self.take(len * size);
        self.buffers += 1;
        Buffer { id: self.buffers, len }
    }

    fn take(&mut self, bytes: usize) {
        *self.device.entry(self.item).or_default() += bytes.next_multiple_of(ALIGNMENT);
    }

    /// An op: `seconds` of arithmetic and `bytes` of device memory at the same time.
    fn op(&mut self, flops: f64, rate: f64, bytes: f64) {
        let reached = self.card.reached;
        let arithmetic = flops / (self.card.tflops * 1e12 * rate);
        let memory = bytes / (self.card.bandwidth * 1e9 * reached.bandwidth);
        self.work.seconds += arithmetic.max(memory) + LAUNCH;
        self.work.flops += flops;
        self.work.bytes += bytes;
        self.work.launches += 1;
    }

    /// An op that streams so many bf16 elements and f32 elements through memory.
    fn stream(&mut self, acts: usize, floats: usize) {
        self.op(0.0, 1.0, (ACT * acts + 4 * floats) as f64);
    }

    /// c (m,n) = a (m,k) · b (n,k) with b in 16 bits.
    fn gemm(&mut self, m: usize, n: usize, k: usize) {
        let bytes = ACT as f64 * (m * k + m * n) as f64 + ACT as f64 * n as f64 * k as f64;
        self.op(2.0 * m as f64 * n as f64 * k as f64, self.card.reached.matrix, bytes);
    }

    /// The large products of `w` with `t` tokens, forward or back, and whatever it takes to have 16-bit weights.
    fn products(&mut self, w: &Linear<Self>, t: usize) {
        let r: usize = w.r;
        if t <= MATVEC_TOKENS {
            let stored: f64 = w.parts.iter().map(|p| p.w.stored()).sum();
            let flops = 2.0 * (t * w.k) as f64 * w.n as f64;
            return self.op(flops, self.card.reached.matrix, stored + (ACT * t * (w.k + w.n)) as f64);
        }
        if t >= FUSED_TOKENS {
            for part in &w.parts {
                if let Some(packed) = part.w.packed {
                    self.op(0.0, 1.0, packed as f64 + ACT as f64 * part.w.elements());
                }
            }
        }
        self.gemm(t, w.n, w.k + r);
    }

    /// Reads and writes of the ops against the copies under way.
    fn touch(&self, read: &[&Buffer], written: &[&Buffer]) {
        for copy in &self.copies {
            let is = |b: &&&Buffer| b.id == copy.buffer;
            assert!(!written.iter().any(|b| is(&b)), "an op writes buffer {} while a copy uses it", copy.buffer);
            assert!(
                !copy.inward || !read.iter().any(|b| is(&b)),
                "an op reads buffer {} before it is here",
                copy.buffer
            );
        }
    }

    /// Begins a copy behind all ops and all copies in the same direction.
    fn copy(&mut self, buffer: &Buffer, len: usize, inward: bool) -> Ticket {
        let end = if inward { &mut self.inward_end } else { &mut self.outward_end };
        let bytes = (ACT * len) as f64;
        *end = end.max(self.work.seconds) + bytes / (self.card.pcie * 1e9);
        let end = *end;
        self.work.copied += bytes;
        self.tickets += 1;
        self.copies.push(Copy { ticket: self.tickets, buffer: buffer.id, inward, end });
        Ticket(self.tickets)
    }

    /// Products q·k and p·v of one head, of all pairs that the mask leaves, where all sequences are of one length.
    fn pairs(batch: &Batch<Self>, heads: Heads) -> f64 {
        let len = batch.t as f64 / batch.b.max(1) as f64;
        let seen = heads.window.map_or(len, |w| len.min(w as f64));
        batch.b.max(1) as f64 * (seen * (seen + 1.0) / 2.0 + (len - seen) * seen)
    }
}

impl Backend for Meter {
    type Act = Buffer;
    type F32 = Buffer;
    type I32 = Buffer;
    type Matrix = Matrix;
    type Optimizer = Optimizer;
    type Host = usize;
    type Ticket = Ticket;

    fn describe(&self) -> String {
        format!("a count for {}", self.card.name)
    }

    fn granularity(&self) -> usize {
        GRANULARITY
    }

    fn label(&mut self, item: Item) {
        self.item = item;
    }

    fn prepare(&mut self, needs: &Needs) -> Result<()> {
        for (_, bytes) in workspace(needs).items() {
            self.take(bytes);
        }
        Ok(())
    }

    fn alloc_act(&mut self, len: usize) -> Result<Buffer> {
        Ok(self.allocate(len, ACT))
    }

    fn alloc_f32(&mut self, len: usize) -> Result<Buffer> {
        Ok(self.allocate(len, 4))
    }

    fn alloc_i32(&mut self, len: usize) -> Result<Buffer> {
        Ok(self.allocate(len, 4))
    }

    fn upload(&mut self, w: &HostMatrix) -> Result<Matrix> {
        let (n, k) = w.dims();
        let before = self.device_bytes();
        let double_quant = match w {
            HostMatrix::Dense(_) => {
                self.take(ACT * n * k);
                return Ok(Matrix { n, k, packed: None });
            }
            HostMatrix::Quantize(_, config) => config.double_quant,
            HostMatrix::Quantized(q) => matches!(q.absmax, Absmax::Double { .. }),
        };
        let blocks = (n * k).div_ceil(nf4::BLOCK);
        self.take((n * k).div_ceil(2));
        if double_quant {
            self.take(blocks);
            self.take(4 * blocks.div_ceil(nf4::NESTED_BLOCK));
            self.take(4);
        } else {
            self.take(4 * blocks);
        }
        Ok(Matrix { n, k, packed: Some(self.device_bytes() - before) })
    }

    fn new_optimizer(&mut self, of: NewOptimizer) -> Result<Optimizer> {
        Ok(self.optimizer(of.kind, of.tensors))
    }

    fn alloc_host(&mut self, len: usize) -> Result<usize> {
        self.host += ACT * len;
        Ok(len)
    }

    fn send(&mut self, _to: &mut usize, from: &Buffer, len: usize) -> Result<Ticket> {
        self.touch(&[from], &[]);
        Ok(self.copy(from, len, false))
    }

    fn fetch(&mut self, to: &mut Buffer, _from: &usize, len: usize) -> Result<Ticket> {
        self.touch(&[], &[to]);
        Ok(self.copy(to, len, true))
    }

    fn wait(&mut self, copy: Ticket) -> Result<()> {
        if let Some(at) = self.copies.iter().position(|c| c.ticket == copy.0) {
            let end = self.copies.remove(at).end;
            self.work.stalled += (end - self.work.seconds).max(0.0);
            self.work.seconds = self.work.seconds.max(end);
        }
        Ok(())
    }

    fn write_act(&mut self, _dst: &mut Buffer, _src: &[f32]) -> Result<()> {
        Ok(())
    }

    fn read_act(&mut self, _src: &Buffer, _dst: &mut [f32]) -> Result<()> {
        Ok(())
    }

    fn write_f32(&mut self, _dst: &mut Buffer, _src: &[f32]) -> Result<()> {
        Ok(())
    }

    fn read_f32(&mut self, _src: &Buffer, _dst: &mut [f32]) -> Result<()> {
        Ok(())
    }

    fn write_i32(&mut self, _dst: &mut Buffer, _src: &[i32]) -> Result<()> {
        Ok(())
    }

    fn zero_f32(&mut self, dst: &mut Buffer) -> Result<()> {
        self.touch(&[], &[dst]);
        self.stream(0, dst.len);
        Ok(())
    }

    fn zero_act(&mut self, dst: &mut Buffer) -> Result<()> {
        self.touch(&[], &[dst]);
        self.stream(dst.len, 0);
        Ok(())
    }

    fn read_optimizer(&mut self, _src: &Optimizer) -> Result<OptimizerState> {
        Ok(OptimizerState { master: vec![], m: Moment::F32(vec![]), v: Moment::F32(vec![]) })
    }

    fn write_optimizer(&mut self, _dst: &mut Optimizer, _src: &OptimizerState) -> Result<()> {
        Ok(())
    }

    fn nf4_dequantize(&mut self, out: &mut Buffer, w: &Matrix) -> Result<()> {
        self.touch(&[], &[out]);
        self.op(0.0, 1.0, w.stored() + ACT as f64 * w.elements());
        Ok(())
    }

    fn embedding(&mut self, a: Embedding<Self>) -> Result<()> {
        self.touch(&[a.tokens], &[a.x]);
        self.stream(2 * a.t * a.c, a.t);
        Ok(())
    }

    fn rmsnorm_forward(&mut self, a: RmsNormForward<Self>) -> Result<()> {
        self.touch(&[a.x], &[a.y, a.rstd]);
        let mut passes = 2;
        if let Some((delta, s)) = a.residual {
            self.touch(&[delta], &[s]);
            passes += 2;
        }
        self.stream(passes * a.t * a.c, a.t);
        Ok(())
    }

    fn rmsnorm_backward(&mut self, a: RmsNormBackward<Self>) -> Result<()> {
        self.touch(&[a.dy, a.x, a.rstd], &[a.dx]);
        self.stream(4 * a.t * a.c, a.t);
        Ok(())
    }

    fn head_norm_forward(&mut self, a: HeadNormForward<Self>) -> Result<()> {
        self.touch(&[a.x], &[a.y, a.rstd]);
        self.stream(2 * a.t * a.heads.qkv(), a.t * (a.heads.h + a.heads.g));
        Ok(())
    }

    fn head_norm_backward(&mut self, a: HeadNormBackward<Self>) -> Result<()> {
        self.touch(&[a.x, a.rstd], &[a.dqkv]);
        self.stream(3 * a.t * a.heads.qkv(), a.t * (a.heads.h + a.heads.g));
        Ok(())
    }

    fn rope_forward(&mut self, a: Rope<Self>) -> Result<()> {
        self.touch(&[a.positions, a.inv_freq], &[a.qkv]);
        self.stream(2 * a.t * (a.heads.h + a.heads.g) * a.heads.d, a.t);
        Ok(())
    }

    fn rope_backward(&mut self, a: Rope<Self>) -> Result<()> {
        self.rope_forward(a)
    }

    fn attention_forward(&mut self, a: AttentionForward<Self>) -> Result<()> {
        self.touch(&[a.qkv], &[a.o, a.lse]);
        let (t, heads) = (a.batch.t, a.heads);
        let flops = 4.0 * (heads.h * heads.d) as f64 * Self::pairs(a.batch, heads);
        let bytes = ACT * t * (heads.qkv() + heads.h * heads.d) + 4 * t * heads.h;
        self.op(flops, self.card.reached.attention[0], bytes as f64);
        Ok(())
    }

    fn attention_backward(&mut self, a: AttentionBackward<Self>) -> Result<()> {
        self.touch(&[a.d_o, a.o, a.lse, a.qkv], &[a.dqkv, a.delta]);
        let (t, heads) = (a.batch.t, a.heads);
        // Of the seven products that two kernels without atomics take, five count as work.
        let flops = 10.0 * (heads.h * heads.d) as f64 * Self::pairs(a.batch, heads);
        let bytes = ACT * t * (3 * heads.qkv() + 4 * heads.h * heads.d) + 12 * t * heads.h;
        self.op(flops, self.card.reached.attention[1], bytes as f64);
        Ok(())
    }

    fn swiglu_forward(&mut self, a: SwigluForward<Self>) -> Result<()> {
        self.touch(&[a.gate_up], &[a.y]);
        self.stream(3 * a.t * a.f, 0);
        Ok(())
    }

    fn swiglu_backward(&mut self, a: SwigluBackward<Self>) -> Result<()> {
        self.touch(&[a.dy], &[a.gate_up]);
        self.stream(5 * a.t * a.f, 0);
        Ok(())
    }

    fn linear_forward(&mut self, a: LinearForward<Self>) -> Result<()> {
        self.touch(&[a.x], &[a.y, a.h]);
        if a.lora.is_some() && a.w.r > 0 {
            self.gemm(a.t, a.w.r, a.w.k);
        }
        self.products(a.w, a.t);
        Ok(())
    }

    fn linear_backward(&mut self, a: LinearBackward<Self>) -> Result<()> {
        self.touch(&[a.dy, a.x, a.h], &[a.dh, a.d_lora]);
        let (t, n, k, r) = (a.t, a.w.n, a.w.k, a.w.r);
        if r > 0 {
            // dh and dB of one read of dy, dA of one read of x.
            self.gemm(t, 2 * r, n);
            self.gemm(t, r, k);
        }
        if let Some(dx) = a.dx {
            self.touch(&[], &[dx]);
            self.products(a.w, t);
        }
        Ok(())
    }

    fn head_loss(&mut self, a: HeadLoss<Self>) -> Result<()> {
        self.touch(&[a.x], &[a.loss]);
        let (m, v, c) = (a.batch.m, a.v, a.c);
        self.gemm(m, v, c);
        // The logits are written, read and replaced by their gradient, which the second product reads.
        self.stream(0, 3 * m * v);
        if let Some(dx) = a.dx {
            self.touch(&[], &[dx]);
            self.gemm(m, c, v);
            self.stream(2 * m * c + a.batch.t * c, 0);
        }
        Ok(())
    }

    fn head_logits(&mut self, a: HeadLogits<Self>) -> Result<()> {
        self.touch(&[a.x], &[a.logits]);
        self.gemm(a.rows.len(), a.v, a.c);
        Ok(())
    }

    fn grad_norm(&mut self, norm: &mut Buffer, grads: &Buffer) -> Result<()> {
        self.touch(&[grads], &[norm]);
        self.stream(0, grads.len);
        Ok(())
    }

    fn adamw(&mut self, a: Adamw<Self>) -> Result<()> {
        self.touch(&[a.grads, a.norm], &[a.lora]);
        let state = 2.0 * a.state.bytes as f64;
        if self.optimizer_on_device {
            self.op(0.0, 1.0, state + (a.state.weights * (4 + ACT)) as f64);
        } else {
            self.work.copied += state;
            self.work.seconds += state / (self.card.pcie * 1e9);
        }
        Ok(())
    }

    fn attention_decode(&mut self, a: AttentionDecode<Self>) -> Result<()> {
        self.touch(&[a.qkv, a.positions], &[a.o]);
        let heads = a.heads;
        let seen = heads.window.map_or(a.past + a.t, |w| w.min(a.past + a.t));
        let flops = 4.0 * (a.t * heads.h * heads.d) as f64 * seen as f64;
        self.op(flops, self.card.reached.attention[0], (2 * ACT * seen * heads.g * heads.d) as f64);
        Ok(())
    }
}
