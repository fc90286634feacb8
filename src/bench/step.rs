//! Whole training steps of a model with random weights: `halfbyte bench step`.

use std::time::Instant;

use super::random_weights::RandomWeights;
use crate::backend::{Backend, Batch, Dropout, HostBatch, Item, NewOptimizer, OptimKind, ParamGroup, Scope};
use crate::error::Result;
use crate::memory;
use crate::model::{AdamwSettings, HostAdapter, Model, ModelConfig, ModelOptions, Proj};

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
}

impl Report {
    /// Seconds of the step in the middle.
    pub fn median(&self) -> f64 {
        self.seconds[self.seconds.len() / 2]
    }
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

/// Loads random weights and runs `warm_up + steps` optimizer steps of one micro-batch each; `progress(done, all)` after
/// each. `free`: bytes of device memory before anything was taken. Errors: those of the backend.
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
    let (mut seconds, mut loss, mut grad_norm) = (vec![], 0.0, 0.0);
    for step in 0..spec.warm_up + spec.steps {
        settings.step = step as u64 + 1;
        let dropout = (spec.dropout > 0.0).then_some(Dropout { p: spec.dropout, seed: 1, step: step as u32 });
        let start = Instant::now();
        backend.enter(Scope::Step(settings.step));
        model.zero_grad(backend)?;
        backend.prefetch_optimizer(&mut state)?;
        model.loss_and_grad(backend, &device, dropout)?;
        (loss, grad_norm) = model.read_loss_and_norm(backend)?;
        model.optimizer_step(backend, &mut state, &settings)?;
        backend.leave();
        // The next read waits for the update; a loop that reads nothing more would not time it.
        model.read_loss(backend)?;
        if step >= spec.warm_up {
            seconds.push(start.elapsed().as_secs_f64());
        }
        progress(step + 1, spec.warm_up + spec.steps);
    }
    seconds.sort_by(f64::total_cmp);
    let driver_bytes = free.zip(backend.free_memory()?).map(|(before, now)| before.saturating_sub(now));
    Ok(Report { seconds, loss, grad_norm, driver_bytes, load_seconds, trainable: spec.adapter.weights.len() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_predicts_the_next_token() {
        let config = crate::model::shapes::shape("tiny").expect("a shape");
        let b = batch(&config, 3, 5);
        assert_eq!((b.tokens.len(), &b.cu_seqlens[..]), (15, &[0, 5, 10, 15][..]));
        assert_eq!(b.tokens[1..], b.targets[..14]);
    }
}
