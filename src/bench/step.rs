//! Whole training steps of a model with random weights: `halfbyte bench step`.

use std::time::{Duration, Instant};

use super::random_weights::RandomWeights;
use crate::backend::{Backend, Batch, Dropout, HostBatch, Item, NewOptimizer, OpTime, OptimKind, ParamGroup, Scope};
use crate::error::Result;
use crate::memory;
use crate::model::{AdamwSettings, HostAdapter, Model, ModelConfig, ModelOptions, Proj};

/// Steps whose ops are timed, and those before them: a GPU records the micro-step in the second.
pub const OPS_STEPS: usize = 10;
pub const OPS_WARM_UP: usize = 3;

/// What is timed.
pub struct Spec<'a> {
    pub config: &'a ModelConfig,
    pub adapter: &'a HostAdapter,
    /// Sequences of a step, and tokens of each.
    pub batch: usize,
    pub length: usize,
    pub options: ModelOptions,
    pub optim: OptimKind,
    pub dropout: f32,
    /// Steps that are timed, after `warm_up` that are not.
    pub steps: usize,
    pub warm_up: usize,
    /// Whether steps follow whose ops are timed.
    pub ops: bool,
    /// Whether a profiler is to see the timed steps, and nothing else.
    pub profiler: bool,
}

/// What was found.
pub struct Report {
    /// Wall-clock seconds of each timed step, sorted.
    pub seconds: Vec<f64>,
    pub loss: f32,
    pub grad_norm: f32,
    /// Bytes of device memory that the driver counts for weights, buffers and scratch; None where the device is the host.
    pub driver_bytes: Option<usize>,
    /// Seconds from the first weight to the last.
    pub load_seconds: f64,
    /// P
    pub trainable: usize,
    pub ops: Option<Ops>,
}

/// What the ops of a step take.
pub struct Ops {
    /// Wall-clock seconds of the step in the middle, while its ops were timed.
    pub step_seconds: f64,
    /// Of each op the calls of one step; its time is the median over the steps. The longest first.
    pub times: Vec<OpTime>,
}

impl Report {
    /// Seconds of the step in the middle.
    pub fn median(&self) -> f64 {
        middle(&self.seconds)
    }
}

/// Of sorted values.
fn middle<T: Copy>(sorted: &[T]) -> T {
    sorted[sorted.len() / 2]
}

/// Of each op the median over the steps, the longest first.
fn medians(steps: &[Vec<OpTime>]) -> Vec<OpTime> {
    let of = |op: &OpTime| {
        let mut times: Vec<Duration> = steps.iter().flatten().filter(|t| t.op == op.op).map(|t| t.time).collect();
        times.sort();
        OpTime { time: middle(&times), ..*op }
    };
    let mut ops: Vec<OpTime> = steps.last().map_or(vec![], |last| last.iter().map(of).collect());
    ops.sort_by_key(|op| std::cmp::Reverse(op.time));
    ops
}

/// Random tokens, each the target of the one before, in sequences of one length.
pub fn batch(config: &ModelConfig, batch: usize, length: usize) -> HostBatch {
    let t = batch * length;
    let token = |i: usize| (i.wrapping_mul(7919).wrapping_add(i / 31) % config.vocab_size) as i32;
    HostBatch {
        tokens: (0..t).map(token).collect(),
        targets: (1..=t).map(token).collect(),
        cu_seqlens: (0..=batch).map(|b| (b * length) as i32).collect(),
    }
}

/// Floating-point operations of the matrix products of a step: linears and head forward and dx, LoRA, attention.
/// With `recompute`, the layers' forward is counted twice.
pub fn flops(config: &ModelConfig, trainable: usize, batch: usize, length: usize, recompute: bool) -> f64 {
    let layers = config.num_hidden_layers;
    let base = layers * Proj::ALL.iter().map(|&p| config.dims(p).0 * config.dims(p).1).sum::<usize>();
    let head = config.vocab_size * config.hidden_size;
    let t = (batch * length) as f64;
    // Half of the square; two products forward, five backward.
    let product = t * (length as f64 + 1.0) * (config.num_attention_heads * config.head_dim * layers) as f64;
    let again = if recompute { 1.0 } else { 0.0 };
    let linears = (2.0 + again) * base as f64 + 2.0 * head as f64 + (3.0 + again) * trainable as f64;
    2.0 * t * linears + (7.0 + 2.0 * again) * product
}

/// Loads random weights and runs `warm_up + steps` optimizer steps of one micro-batch each, then those whose ops are timed;
/// `progress(done, all)` after each. `free`: bytes of device memory before anything was taken. Errors: those of the backend.
pub fn run<B: Backend>(
    backend: &mut B,
    spec: &Spec,
    free: Option<usize>,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Report> {
    let t = spec.batch * spec.length;
    let start = Instant::now();
    let mut source = RandomWeights::new(spec.config);
    let options = spec.options.clone();
    let mut model = Model::load(backend, spec.config, &mut source, Some(spec.adapter), options, &mut |_| {})?;
    backend.label(Item::Batch);
    let mut device = Batch::new(backend, t)?;
    backend.label(Item::Optimizer);
    let (init, tensors) = (&spec.adapter.weights, &spec.adapter.layout.tensor_lens());
    let mut state = backend.new_optimizer(NewOptimizer { kind: spec.optim, init, tensors })?;
    memory::check(backend)?;
    let load_seconds = start.elapsed().as_secs_f64();

    device.fill(backend, &batch(spec.config, spec.batch, spec.length), 1.0 / t as f32)?;
    let groups = vec![ParamGroup { range: 0..spec.adapter.weights.len(), lr: 1e-4, weight_decay: 0.0 }];
    let mut settings = AdamwSettings { groups, beta1: 0.9, beta2: 0.999, eps: 1e-8, max_grad_norm: 0.3, step: 0 };
    let (untimed, all) = (spec.warm_up + spec.steps, spec.warm_up + spec.steps + ops_steps(spec));
    // Seconds, loss and gradient norm.
    let mut step = |backend: &mut B| -> Result<(f64, f32, f32)> {
        let number = settings.step as u32;
        settings.step += 1;
        let dropout = (spec.dropout > 0.0).then_some(Dropout { p: spec.dropout, seed: 1, step: number });
        let start = Instant::now();
        backend.enter(Scope::Step(settings.step));
        model.zero_grad(backend)?;
        backend.prefetch_optimizer(&mut state)?;
        model.loss_and_grad(backend, &device, dropout)?;
        let (loss, grad_norm) = model.read_loss_and_norm(backend)?;
        model.optimizer_step(backend, &mut state, &settings)?;
        backend.leave();
        // The next read waits for the update; a loop that reads nothing more would not time it.
        model.read_loss(backend)?;
        let seconds = start.elapsed().as_secs_f64();
        progress(settings.step as usize, all);
        Ok((seconds, loss, grad_norm))
    };
    let (mut seconds, mut loss, mut grad_norm) = (vec![], 0.0, 0.0);
    for number in 0..untimed {
        if spec.profiler && number == spec.warm_up {
            backend.profiler(true)?;
        }
        let took;
        (took, loss, grad_norm) = step(backend)?;
        if number >= spec.warm_up {
            seconds.push(took);
        }
    }
    if spec.profiler {
        backend.profiler(false)?;
    }
    seconds.sort_by(f64::total_cmp);
    let driver_bytes = free.zip(backend.free_memory()?).map(|(before, now)| before.saturating_sub(now));
    let ops = if spec.ops { Some(ops(backend, |backend| Ok(step(backend)?.0))?) } else { None };
    Ok(Report { seconds, loss, grad_norm, driver_bytes, load_seconds, trainable: spec.adapter.weights.len(), ops })
}

fn ops_steps(spec: &Spec) -> usize {
    if spec.ops { OPS_WARM_UP + OPS_STEPS } else { 0 }
}

/// Times the ops of `step`, which answers with its seconds.
fn ops<B: Backend>(backend: &mut B, mut step: impl FnMut(&mut B) -> Result<f64>) -> Result<Ops> {
    let (mut seconds, mut steps) = (vec![], vec![]);
    backend.time_ops(true)?;
    for number in 0..OPS_WARM_UP + OPS_STEPS {
        let took = step(backend)?;
        let times = backend.take_op_times()?;
        if number >= OPS_WARM_UP {
            seconds.push(took);
            steps.push(times);
        }
    }
    backend.time_ops(false)?;
    seconds.sort_by(f64::total_cmp);
    Ok(Ops { step_seconds: middle(&seconds), times: medians(&steps) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Work;

    #[test]
    fn an_op_takes_its_median_over_the_steps() {
        let op = |op, ms| OpTime { op, calls: 2, time: Duration::from_millis(ms), work: Work::default() };
        let steps = [vec![op("a", 9), op("b", 3)], vec![op("a", 1), op("b", 4)], vec![op("a", 2), op("b", 5)]];
        assert_eq!(medians(&steps), [op("b", 4), op("a", 2)]);
        assert_eq!(medians(&[]), []);
    }

    #[test]
    fn a_batch_predicts_the_next_token() {
        let config = crate::model::shapes::shape("tiny").expect("a shape");
        let b = batch(&config, 3, 5);
        assert_eq!((b.tokens.len(), &b.cu_seqlens[..]), (15, &[0, 5, 10, 15][..]));
        assert_eq!(b.tokens[1..], b.targets[..14]);
    }
}
