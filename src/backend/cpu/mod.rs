//! The f32 backend: the oracle of every CUDA kernel, and the default where there is no GPU.
//!
//! Buffers are plain vectors. Weights stay in 4 or 16 bits and are widened a slice at a time into scratch that the
//! backend owns; scratch grows to a high-water mark, so a step in steady state allocates nothing large. Work is split by
//! shape, never by the number of threads or by timing, and each element is summed by one thread in a fixed order: the
//! bits are the same run to run and on any number of threads.

mod attention;
mod decode;
mod gemm;
mod head;
mod linear;
mod math;
mod norm;
mod optimizer;
mod rates;
mod rope;
mod swiglu;
mod weights;

#[cfg(test)]
mod tests;

use std::sync::Mutex;
use std::time::Instant;

use rayon::{ThreadPool, ThreadPoolBuilder};

pub use optimizer::Optimizer;
pub use weights::Matrix;

use super::shape::{at_least, exactly};
use super::work::add_call;
use super::*;
use crate::error::Error;

/// The CPU as a device: a pool of threads and the scratch of its ops.
pub struct Cpu {
    /// None: rayon's global pool (a pool of our own could not be started).
    pool: Option<ThreadPool>,
    threads: usize,
    scratch: Scratch,
    times: Vec<OpTime>,
}

/// Buffers that ops reuse from call to call, each as long as its longest use so far.
#[derive(Default)]
struct Scratch {
    /// A widened slice of a weight matrix.
    weights: Vec<f32>,
    /// linear: the A matrices of all parts below each other (R, K).
    lora_a: Vec<f32>,
    /// linear: the gradient of `lora_a`.
    d_lora_a: Vec<f32>,
    /// linear: dropout(x), or the gradient of x through one adapter (T, K).
    dropped: Vec<f32>,
    /// attention: o or dq head by head (H, T, D).
    heads: Vec<f32>,
    /// attention backward: dk and dv of each query head, (H, T, 2, D).
    d_kv: Vec<f32>,
    /// head: logits of a chunk of target rows (rows, V).
    logits: Vec<f32>,
    /// head: those rows of x, and of dx.
    rows: Vec<f32>,
    d_rows: Vec<f32>,
    /// head: loss of each target; optimizer: partial sums of squares.
    sums: Vec<f64>,
    rope: rope::Table,
    /// Tiles of one thread each: a task locks the one of the thread that it runs on.
    tiles: Vec<Mutex<Vec<f32>>>,
}

/// The first `len` elements of a scratch buffer, grown if need be. Their content is left over from an earlier use.
fn grown<T: Clone + Default>(buffer: &mut Vec<T>, len: usize) -> &mut [T] {
    if buffer.len() < len {
        buffer.resize(len, T::default());
    }
    &mut buffer[..len]
}

/// A tile of at least `len` elements that belongs to the running thread while `f` runs. `f` must not enter rayon again:
/// a task stolen meanwhile could want the same tile.
fn with_tile<R>(tiles: &[Mutex<Vec<f32>>], len: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
    let i = rayon::current_thread_index().unwrap_or(0) % tiles.len();
    let mut tile = tiles[i].lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    f(grown(&mut tile, len))
}

/// H query heads in groups of H/G, an even head size, a window that sees something.
fn check_heads(op: &'static str, heads: Heads) -> Result<()> {
    if heads.g == 0 || !heads.h.is_multiple_of(heads.g) {
        return Err(Error::Shape { op, argument: "heads", found: heads.h, expected: heads.g });
    }
    if heads.window == Some(0) {
        return Err(Error::Shape { op, argument: "window", found: 0, expected: 1 });
    }
    exactly(op, "heads.d (even)", heads.d % 2, 0)
}

/// Where each sequence of a batch starts and ends; strictly rising from 0 to T.
fn check_sequences(op: &'static str, batch: &Batch<Cpu>) -> Result<()> {
    at_least(op, "cu_seqlens", batch.cu_seqlens.len(), batch.b + 1)?;
    let cu = &batch.cu_seqlens[..=batch.b];
    exactly(op, "cu_seqlens (first)", cu[0] as usize, 0)?;
    exactly(op, "cu_seqlens (last)", cu[batch.b] as usize, batch.t)?;
    match cu.windows(2).find(|w| w[0] >= w[1]) {
        Some(w) => Err(Error::Shape {
            op,
            argument: "cu_seqlens (rising)",
            found: w[1].max(0) as usize,
            expected: w[0].max(0) as usize + 1,
        }),
        None => Ok(()),
    }
}

/// Elements of an elementwise task: enough work to be worth a task, few enough to share out evenly.
const TASK: usize = 16 * 1024;

/// Rows of `width` elements that make up about one [`TASK`].
fn rows_per_task(width: usize) -> usize {
    (TASK / width.max(1)).max(1)
}

impl Cpu {
    /// A backend of `threads` threads; None: as many as the machine offers (or `RAYON_NUM_THREADS` says).
    pub fn new(threads: Option<usize>) -> Self {
        let pool =
            ThreadPoolBuilder::new().num_threads(threads.unwrap_or(0)).thread_name(|i| format!("cpu-{i}")).build().ok();
        let threads = pool.as_ref().map_or_else(rayon::current_num_threads, ThreadPool::current_num_threads);
        let tiles = (0..threads).map(|_| Mutex::default()).collect();
        Self { pool, threads, scratch: Scratch { tiles, ..Scratch::default() }, times: vec![] }
    }

    /// Threads of its pool.
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// How long each op has run since [`Cpu::reset_times`], in the order of first use.
    pub fn times(&self) -> &[OpTime] {
        &self.times
    }

    pub fn reset_times(&mut self) {
        self.times.clear();
    }

    /// Runs `f` inside the pool, without a hand-over where the caller runs in it already, and adds to the op's time.
    fn run<R: Send>(&mut self, op: &'static str, f: impl FnOnce(&mut Scratch) -> R + Send) -> R {
        let start = Instant::now();
        let result = match &self.pool {
            Some(pool) => pool.install(|| f(&mut self.scratch)),
            None => f(&mut self.scratch),
        };
        add_call(&mut self.times, op, start.elapsed(), Work::default());
        result
    }
}

fn copy_in<T: Copy>(op: &'static str, dst: &mut [T], src: &[T]) -> Result<()> {
    at_least(op, "dst", dst.len(), src.len())?;
    dst[..src.len()].copy_from_slice(src);
    Ok(())
}

fn copy_out<T: Copy>(op: &'static str, src: &[T], dst: &mut [T]) -> Result<()> {
    at_least(op, "src", src.len(), dst.len())?;
    dst.copy_from_slice(&src[..dst.len()]);
    Ok(())
}

/// The first `len` elements.
fn copy(op: &'static str, to: &mut [f32], from: &[f32], len: usize) -> Result<()> {
    at_least(op, "to", to.len(), len)?;
    at_least(op, "from", from.len(), len)?;
    to[..len].copy_from_slice(&from[..len]);
    Ok(())
}

impl Backend for Cpu {
    type Act = Vec<f32>;
    type F32 = Vec<f32>;
    type I32 = Vec<i32>;
    type Matrix = Matrix;
    type Optimizer = Optimizer;
    type Host = Vec<f32>;
    type Ticket = ();

    fn describe(&self) -> String {
        let s = if self.threads == 1 { "" } else { "s" };
        format!("CPU ({} thread{s})", self.threads)
    }

    fn time_ops(&mut self, _on: bool) -> Result<()> {
        self.reset_times();
        Ok(())
    }

    fn take_op_times(&mut self) -> Result<Vec<OpTime>> {
        Ok(std::mem::take(&mut self.times))
    }

    fn alloc_act(&mut self, len: usize) -> Result<Vec<f32>> {
        Ok(vec![0.0; len])
    }

    fn alloc_f32(&mut self, len: usize) -> Result<Vec<f32>> {
        Ok(vec![0.0; len])
    }

    fn alloc_i32(&mut self, len: usize) -> Result<Vec<i32>> {
        Ok(vec![0; len])
    }

    fn upload(&mut self, w: &HostMatrix) -> Result<Matrix> {
        Matrix::new(w)
    }

    fn new_optimizer(&mut self, of: NewOptimizer) -> Result<Optimizer> {
        Optimizer::new(of)
    }

    fn alloc_host(&mut self, len: usize) -> Result<Vec<f32>> {
        Ok(vec![0.0; len])
    }

    fn send(&mut self, to: &mut Vec<f32>, from: &Vec<f32>, len: usize) -> Result<()> {
        copy("send", to, from, len)
    }

    fn fetch(&mut self, to: &mut Vec<f32>, from: &Vec<f32>, len: usize) -> Result<()> {
        copy("fetch", to, from, len)
    }

    fn wait(&mut self, (): ()) -> Result<()> {
        Ok(())
    }

    fn write_act(&mut self, dst: &mut Vec<f32>, src: &[f32]) -> Result<()> {
        copy_in("write_act", dst, src)
    }

    fn read_act(&mut self, src: &Vec<f32>, dst: &mut [f32]) -> Result<()> {
        copy_out("read_act", src, dst)
    }

    fn write_f32(&mut self, dst: &mut Vec<f32>, src: &[f32]) -> Result<()> {
        copy_in("write_f32", dst, src)
    }

    fn read_f32(&mut self, src: &Vec<f32>, dst: &mut [f32]) -> Result<()> {
        copy_out("read_f32", src, dst)
    }

    fn write_i32(&mut self, dst: &mut Vec<i32>, src: &[i32]) -> Result<()> {
        copy_in("write_i32", dst, src)
    }

    fn zero_act(&mut self, dst: &mut Vec<f32>) -> Result<()> {
        dst.fill(0.0);
        Ok(())
    }

    fn zero_f32(&mut self, dst: &mut Vec<f32>) -> Result<()> {
        dst.fill(0.0);
        Ok(())
    }

    fn read_optimizer(&mut self, src: &Optimizer) -> Result<OptimizerState> {
        Ok(src.state.clone())
    }

    fn write_optimizer(&mut self, dst: &mut Optimizer, src: &OptimizerState) -> Result<()> {
        dst.state.copy_from("write_optimizer", src)
    }

    fn nf4_dequantize(&mut self, out: &mut Vec<f32>, w: &Matrix) -> Result<()> {
        at_least("nf4_dequantize", "out", out.len(), w.n * w.k)?;
        self.run("nf4_dequantize", |_| w.widen(0..w.n, &mut out[..w.n * w.k]));
        Ok(())
    }

    fn embedding(&mut self, a: Embedding<Self>) -> Result<()> {
        self.run("embedding", |_| head::embedding(a))
    }

    fn rmsnorm_forward(&mut self, a: RmsNormForward<Self>) -> Result<()> {
        self.run("rmsnorm_forward", |_| norm::rmsnorm_forward(a))
    }

    fn rmsnorm_backward(&mut self, a: RmsNormBackward<Self>) -> Result<()> {
        self.run("rmsnorm_backward", |_| norm::rmsnorm_backward(a))
    }

    fn head_norm_forward(&mut self, a: HeadNormForward<Self>) -> Result<()> {
        self.run("head_norm_forward", |_| norm::head_norm_forward(a))
    }

    fn head_norm_backward(&mut self, a: HeadNormBackward<Self>) -> Result<()> {
        self.run("head_norm_backward", |_| norm::head_norm_backward(a))
    }

    fn rope_forward(&mut self, a: Rope<Self>) -> Result<()> {
        self.run("rope_forward", |s| rope::rotate("rope_forward", &mut s.rope, a, 1.0))
    }

    fn rope_backward(&mut self, a: Rope<Self>) -> Result<()> {
        self.run("rope_backward", |s| rope::rotate("rope_backward", &mut s.rope, a, -1.0))
    }

    fn attention_forward(&mut self, a: AttentionForward<Self>) -> Result<()> {
        self.run("attention_forward", |s| attention::forward(s, a))
    }

    fn attention_backward(&mut self, a: AttentionBackward<Self>) -> Result<()> {
        self.run("attention_backward", |s| attention::backward(s, a))
    }

    fn swiglu_forward(&mut self, a: SwigluForward<Self>) -> Result<()> {
        self.run("swiglu_forward", |_| swiglu::forward(a))
    }

    fn swiglu_backward(&mut self, a: SwigluBackward<Self>) -> Result<()> {
        self.run("swiglu_backward", |_| swiglu::backward(a))
    }

    fn linear_forward(&mut self, a: LinearForward<Self>) -> Result<()> {
        self.run("linear_forward", |s| linear::forward(s, a))
    }

    fn linear_backward(&mut self, a: LinearBackward<Self>) -> Result<()> {
        self.run("linear_backward", |s| linear::backward(s, a))
    }

    fn head_loss(&mut self, a: HeadLoss<Self>) -> Result<()> {
        self.run("head_loss", |s| head::loss(s, a))
    }

    fn head_logits(&mut self, a: HeadLogits<Self>) -> Result<()> {
        self.run("head_logits", |s| head::logits(s, a))
    }

    fn grad_norm(&mut self, norm: &mut Vec<f32>, grads: &Vec<f32>) -> Result<()> {
        self.run("grad_norm", |s| optimizer::grad_norm(s, norm, grads))
    }

    fn adamw(&mut self, a: Adamw<Self>) -> Result<()> {
        self.run("adamw", |_| optimizer::adamw(a))
    }

    fn attention_decode(&mut self, a: AttentionDecode<Self>) -> Result<()> {
        self.run("attention_decode", |s| decode::attention(s, a))
    }
}
