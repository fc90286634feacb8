//! Small random models, on the CPU unless a test brings another backend: no file involved.

use halfbyte::backend::cpu::Cpu;
use halfbyte::backend::{Backend, Batch, Dropout, HostBatch, IGNORE};
use halfbyte::checkpoint::QuantConfig;
use halfbyte::error::Result;
use halfbyte::model::{
    Family, HostAdapter, LayerPlan, LoraConfig, Model, ModelConfig, ModelOptions, Proj, RopeScaling, TargetModules,
    WeightSource,
};
use halfbyte::nf4::{QuantType, quantize};
use halfbyte::rng::{Stream, uniform, word};
use halfbyte::tensor::{HostMatrix, HostTensor};

/// What the fixtures have: no biases, no q/k norms, heads that fill the hidden size.
pub fn plain() -> ModelConfig {
    ModelConfig {
        family: Family::Llama,
        hidden_size: 32,
        intermediate_size: 48,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 8,
        vocab_size: 61,
        max_position_embeddings: 128,
        rms_norm_eps: 1e-5,
        rope_theta: 10000.0,
        rope_scaling: RopeScaling::Default,
        windows: vec![None, None],
        qkv_bias: false,
        o_bias: false,
        mlp_bias: false,
        qk_norm: false,
        tie_word_embeddings: false,
        bos_token_id: None,
        eos_token_ids: vec![],
        pad_token_id: None,
    }
}

/// What no fixture has: q/k norms, every bias, a window in one layer of three, heads wider than the hidden size, tied
/// head, one KV head for six query heads, scaled rotary frequencies.
pub fn everything() -> ModelConfig {
    ModelConfig {
        family: Family::Qwen3,
        num_hidden_layers: 3,
        num_attention_heads: 6,
        num_key_value_heads: 1,
        head_dim: 14,
        rope_scaling: RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 64,
        },
        windows: vec![None, Some(3), None],
        qkv_bias: true,
        o_bias: true,
        mlp_bias: true,
        qk_norm: true,
        tie_word_embeddings: true,
        ..plain()
    }
}

/// Every tensor that `config` needs, random by name.
pub struct RandomWeights<'a> {
    pub config: &'a ModelConfig,
    /// How the projections are stored; None: f32.
    pub quantize: Option<QuantConfig>,
}

/// n values near a normal distribution, the same for the same name.
fn normal(name: &str, n: usize, scale: f32) -> Vec<f32> {
    let seed = name.bytes().fold(7u64, |h, b| h.wrapping_mul(0x100_0000_01b3) ^ u64::from(b));
    let four = |i: u64| (0..4).map(|j| uniform(seed, Stream::Init, 0, 4 * i + j) - 0.5).sum::<f32>();
    (0..n as u64).map(|i| scale * 1.7 * four(i)).collect()
}

impl RandomWeights<'_> {
    fn proj(&self, name: &str) -> Option<(usize, usize)> {
        let proj = Proj::ALL.into_iter().find(|p| name.contains(&format!(".{}.", p.short_name())))?;
        Some(self.config.dims(proj))
    }
}

impl WeightSource for RandomWeights<'_> {
    fn vector(&mut self, name: &str) -> Result<HostTensor> {
        let c = self.config;
        let (n, mean, scale) = match self.proj(name) {
            Some((n, _)) => (n, 0.0, 0.3),
            None if name.contains("q_norm") || name.contains("k_norm") => (c.head_dim, 1.0, 0.2),
            None => (c.hidden_size, 1.0, 0.2),
        };
        let values: Vec<f32> = normal(name, n, scale).iter().map(|v| mean + v).collect();
        Ok(HostTensor::from_f32(vec![n], &values))
    }

    fn matrix(&mut self, name: &str) -> Result<HostMatrix> {
        let c = self.config;
        let proj = self.proj(name);
        let (n, k) = proj.unwrap_or((c.vocab_size, c.hidden_size));
        let scale = if name.contains("embed") { 0.5 } else { 1.3 / (k as f32).sqrt() };
        let tensor = HostTensor::from_f32(vec![n, k], &normal(name, n * k, scale));
        Ok(match self.quantize {
            Some(q) if proj.is_some() => HostMatrix::Quantized(quantize(&tensor, q.quant_type, q.double_quant)),
            _ => HostMatrix::Dense(tensor),
        })
    }
}

/// An adapter with B not zero, so that every gradient is alive.
pub fn adapter(config: &ModelConfig, targets: &str) -> HostAdapter {
    let lora = LoraConfig {
        r: 4,
        lora_alpha: 8.0,
        lora_dropout: 0.0,
        target_modules: TargetModules::Pattern(targets.into()),
        rank_pattern: vec![("v_proj".into(), 2), ("down_proj".into(), 7)],
        alpha_pattern: vec![("layers.1.mlp.up_proj".into(), 3.0)],
        use_rslora: false,
    };
    let mut adapter = HostAdapter::init(lora, config, 3).expect("targets that match");
    for site in &adapter.layout.sites.clone() {
        adapter.weights[site.b_range()].copy_from_slice(&normal(&site.peft_name('B'), site.n * site.r, 0.2));
    }
    adapter
}

/// A sequence of `n` tokens whose first `prompt` tokens are no targets.
pub fn sequence(config: &ModelConfig, seed: u64, n: usize, prompt: usize) -> HostBatch {
    let tokens: Vec<i32> =
        (0..n as u64).map(|i| (word(seed, Stream::Sampling, 0, i) % config.vocab_size as u32) as i32).collect();
    let targets = (1..=n).map(|t| if t < n && t >= prompt { tokens[t] } else { IGNORE }).collect();
    HostBatch { tokens, targets, cu_seqlens: vec![0, n as i32] }
}

/// Sequences laid end to end.
pub fn row(sequences: &[&HostBatch]) -> HostBatch {
    let mut all = HostBatch::default();
    for s in sequences {
        all.append(s);
    }
    all
}

const NF4: QuantConfig = QuantConfig { quant_type: QuantType::Nf4, double_quant: true };

/// The most tokens of a micro-batch.
const MAX_TOKENS: usize = 96;

/// A loaded model and its device.
pub struct Engine<B: Backend = Cpu> {
    pub backend: B,
    pub model: Model<B>,
    /// One for all micro-batches of steps, as training has it: a step on the same buffers may be replayed.
    buffers: Option<Batch<B>>,
}

/// What one step gave.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    pub loss: f32,
    pub norm: f32,
    pub grads: Vec<f32>,
}

impl Engine {
    pub fn new(config: &ModelConfig, adapter: Option<&HostAdapter>, layers: &[LayerPlan]) -> Self {
        Self::on(Cpu::new(Some(2)), config, adapter, layers, Some(NF4))
    }

    pub fn load(
        config: &ModelConfig,
        adapter: Option<&HostAdapter>,
        layers: &[LayerPlan],
        quantize: Option<QuantConfig>,
    ) -> Self {
        Self::on(Cpu::new(Some(2)), config, adapter, layers, quantize)
    }
}

impl<B: Backend> Engine<B> {
    /// `quantize` None: the projections stay in f32.
    pub fn on(
        mut backend: B,
        config: &ModelConfig,
        adapter: Option<&HostAdapter>,
        layers: &[LayerPlan],
        quantize: Option<QuantConfig>,
    ) -> Self {
        let mut source = RandomWeights { config, quantize };
        let options = ModelOptions { max_tokens: MAX_TOKENS, train: adapter.is_some(), layers: layers.to_vec() };
        let model = Model::load(&mut backend, config, &mut source, adapter, options, &mut |_| ()).expect("a model");
        Self { backend, model, buffers: None }
    }

    pub fn batch(&mut self, host: &HostBatch, targets: usize) -> Batch<B> {
        let mut batch = Batch::new(&mut self.backend, host.tokens.len()).expect("a batch");
        batch.fill(&mut self.backend, host, 1.0 / targets as f32).expect("room for the batch");
        batch
    }

    /// One optimizer step's loss and gradients over micro-batches; micro-batch i has dropout step `first + i`.
    pub fn step(&mut self, micro_batches: &[HostBatch], dropout: Option<Dropout>) -> Step {
        let targets: usize = micro_batches.iter().map(HostBatch::target_count).sum();
        self.model.zero_grad(&mut self.backend).expect("zero_grad");
        let mut batch = self.buffers.take();
        for (i, host) in micro_batches.iter().enumerate() {
            let new = || Batch::new(&mut self.backend, MAX_TOKENS).expect("a batch");
            let batch = batch.get_or_insert_with(new);
            batch.fill(&mut self.backend, host, 1.0 / targets as f32).expect("room for the batch");
            let dropout = dropout.map(|d| Dropout { step: d.step + i as u32, ..d });
            self.model.loss_and_grad(&mut self.backend, batch, dropout).expect("loss_and_grad");
        }
        self.buffers = batch;
        let (loss, norm) = self.model.read_loss_and_norm(&mut self.backend).expect("read_loss_and_norm");
        Step { loss, norm, grads: self.model.read_grads(&mut self.backend).expect("read_grads") }
    }

    /// Mean loss of evaluation.
    pub fn loss(&mut self, host: &HostBatch) -> f32 {
        self.model.zero_grad(&mut self.backend).expect("zero_grad");
        let batch = self.batch(host, host.target_count());
        self.model.loss(&mut self.backend, &batch).expect("loss");
        self.model.read_loss(&mut self.backend).expect("read_loss")
    }

    pub fn logits(&mut self, host: &HostBatch) -> Vec<f32> {
        let rows: Vec<usize> = (0..host.tokens.len()).collect();
        let batch = self.batch(host, 1);
        self.model.logits(&mut self.backend, &batch, &rows).expect("logits")
    }
}

/// Distance of two vectors, relative to the second.
pub fn distance(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let square = |x: f64| x * x;
    let error: f64 = a.iter().zip(b).map(|(&a, &b)| square(f64::from(a) - f64::from(b))).sum();
    (error / b.iter().map(|&b| square(b.into())).sum::<f64>()).sqrt()
}
