//! One training step of a SmolLM2-135M shape with random NF4 weights on the CPU backend: `cargo bench --bench step`.
//!
//! Prints tokens/s, GFLOP/s and the share of each op, then the speed of decoding. Arguments: tokens a step (default 512), steps (default 3).

use std::time::Instant;

use halfbyte::backend::cpu::Cpu;
use halfbyte::backend::{Backend, Batch, HostBatch, NewOptimizer, OptimKind, ParamGroup};
use halfbyte::model::{
    AdamwSettings, Family, HostAdapter, LoraConfig, Model, ModelConfig, ModelOptions, Proj, RopeScaling, TargetModules,
    WeightSource,
};
use halfbyte::nf4::{QuantType, quantize};
use halfbyte::rng::{Stream, word};
use halfbyte::tensor::{HostMatrix, HostTensor};
use halfbyte::{Error, Result};

fn smollm2() -> ModelConfig {
    ModelConfig {
        family: Family::Llama,
        hidden_size: 576,
        intermediate_size: 1536,
        num_hidden_layers: 30,
        num_attention_heads: 9,
        num_key_value_heads: 3,
        head_dim: 64,
        vocab_size: 49152,
        max_position_embeddings: 8192,
        rms_norm_eps: 1e-5,
        rope_theta: 1e5,
        rope_scaling: RopeScaling::Default,
        windows: vec![None; 30],
        qkv_bias: false,
        o_bias: false,
        mlp_bias: false,
        qk_norm: false,
        tie_word_embeddings: true,
        bos_token_id: None,
        eos_token_ids: vec![],
        pad_token_id: None,
    }
}

/// Random weights of the right shapes; projections in NF4 with double quantisation, the embedding in f32.
struct RandomWeights {
    config: ModelConfig,
    /// One run of random numbers in ±0.05, repeated as often as a matrix needs: only the speed matters here.
    values: Vec<f32>,
}

impl RandomWeights {
    fn new(config: &ModelConfig) -> Self {
        let unit = |i| (word(1, Stream::Init, 0, i) >> 8) as f32 / (1 << 23) as f32 - 1.0;
        Self { config: config.clone(), values: (0..100_003).map(|i| 0.05 * unit(i)).collect() }
    }

    fn dense(&self, n: usize, k: usize) -> HostTensor {
        let values: Vec<f32> = self.values.iter().copied().cycle().take(n * k).collect();
        HostTensor::from_f32(vec![n, k], &values)
    }
}

impl WeightSource for RandomWeights {
    fn vector(&mut self, name: &str) -> Result<HostTensor> {
        let n = self.config.hidden_size;
        if name.ends_with("norm.weight") {
            Ok(HostTensor::from_f32(vec![n], &vec![1.0; n]))
        } else {
            Err(Error::input("random weights", name, "a vector that is not a norm", "a norm"))
        }
    }

    fn matrix(&mut self, name: &str) -> Result<HostMatrix> {
        let (v, c) = (self.config.vocab_size, self.config.hidden_size);
        if name.contains("embed_tokens") {
            return Ok(HostMatrix::Dense(self.dense(v, c)));
        }
        let proj = Proj::ALL.into_iter().find(|p| name.contains(p.short_name()));
        let proj = proj.ok_or_else(|| Error::input("random weights", name, "an unknown matrix", "a projection"))?;
        let (n, k) = self.config.dims(proj);
        Ok(HostMatrix::Quantized(quantize(&self.dense(n, k), QuantType::Nf4, true)))
    }
}

/// Floating-point operations of the matrix products of a step: base forward and dx, LoRA, attention, head.
fn step_flops(c: &ModelConfig, adapter: &HostAdapter, t: usize) -> f64 {
    let base: usize = Proj::ALL.iter().map(|&p| c.dims(p).0 * c.dims(p).1).sum::<usize>() * c.num_hidden_layers;
    let head = c.vocab_size * c.hidden_size;
    // Two products forward, five backward, over half of the square.
    let attention = 7 * c.num_attention_heads * c.head_dim * (t + 1) / 2 * c.num_hidden_layers;
    2.0 * t as f64 * (2 * (base + head) + 3 * adapter.weights.len() + attention) as f64
}

/// Peak resident set in MiB, where /proc tells.
fn peak_resident() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|l| l.starts_with("VmHWM:"))?;
    line.split_whitespace().nth(1)?.parse::<f64>().ok().map(|kib| kib / 1024.0)
}

/// User and system seconds of this process so far, where /proc tells: what a step costs even if others use the cores.
fn cpu_seconds() -> Option<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    // Fields 14 and 15, in ticks of 10 ms; the name in field 2 may hold spaces, so count from its end.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11).map(str::parse::<f64>);
    Some((fields.next()?.ok()? + fields.next()?.ok()?) / 100.0)
}

fn main() -> Result<()> {
    // cargo bench passes --bench
    let mut numbers = std::env::args().skip(1).filter_map(|a| a.parse::<usize>().ok());
    let (t, steps) = (numbers.next().unwrap_or(512), numbers.next().unwrap_or(3));

    let config = smollm2();
    let lora = LoraConfig {
        r: 16,
        lora_alpha: 32.0,
        lora_dropout: 0.0,
        target_modules: TargetModules::Pattern("all-linear".into()),
        rank_pattern: vec![],
        alpha_pattern: vec![],
        use_rslora: false,
    };
    let adapter = HostAdapter::init(lora, &config, 0)?;
    let mut cpu = Cpu::new(None);
    println!("{}; SmolLM2-135M shape, NF4, r=16 on 7 projections, {t} tokens a step", cpu.describe());
    let options = ModelOptions { max_tokens: t, train: true, layers: vec![] };
    let mut source = RandomWeights::new(&config);
    let mut model = Model::load(&mut cpu, &config, &mut source, Some(&adapter), options, &mut |_| {})?;
    let tensors = adapter.layout.tensor_lens();
    let of = NewOptimizer { kind: OptimKind::AdamwTorch, init: &adapter.weights, tensors: &tensors };
    let mut state = cpu.new_optimizer(of)?;
    let ids: Vec<i32> = (0..t).map(|i| (i * 7919 % config.vocab_size) as i32).collect();
    let host = HostBatch { targets: ids.clone(), tokens: ids, cu_seqlens: vec![0, t as i32] };
    let mut batch = Batch::new(&mut cpu, t)?;
    batch.fill(&mut cpu, &host, 1.0 / t as f32)?;
    let groups = vec![ParamGroup { range: 0..adapter.weights.len(), lr: 1e-4, weight_decay: 0.0 }];
    let mut settings = AdamwSettings { groups, beta1: 0.9, beta2: 0.999, eps: 1e-8, max_grad_norm: 1.0, step: 0 };

    let mut best = f64::INFINITY;
    for step in 0..=steps {
        cpu.reset_times();
        settings.step = step as u64 + 1;
        let (start, cpu_start) = (Instant::now(), cpu_seconds());
        model.zero_grad(&mut cpu)?;
        model.loss_and_grad(&mut cpu, &batch, None)?;
        let (loss, norm) = model.read_loss_and_norm(&mut cpu)?;
        model.optimizer_step(&mut cpu, &mut state, &settings)?;
        let seconds = start.elapsed().as_secs_f64();
        let warm = if step == 0 { " (warm-up)" } else { "" };
        let used = cpu_seconds().zip(cpu_start).map_or(f64::NAN, |(now, then)| now - then);
        println!("step {step}: {seconds:.3} s ({used:.2} s of CPU), loss {loss:.4}, grad norm {norm:.4}{warm}");
        if step > 0 {
            best = best.min(seconds);
        }
    }
    let mut times = cpu.times().to_vec();
    times.sort_by_key(|op| std::cmp::Reverse(op.time));
    let total: f64 = times.iter().map(|op| op.time.as_secs_f64()).sum();
    println!("\nops of the last step:");
    for op in times {
        let s = op.time.as_secs_f64();
        println!("{:>18} {:6} calls {:9.2} ms {:5.1} %", op.op, op.calls, s * 1e3, 100.0 * s / total);
    }
    let gflop = step_flops(&config, &adapter, t) / 1e9;
    println!("\nbest: {:.1} tokens/s, {:.1} GFLOP/s ({gflop:.1} GFLOP a step)", t as f64 / best, gflop / best);
    let tokens = 16;
    let mut cache = model.new_cache(&mut cpu, tokens + 1)?;
    model.decode(&mut cpu, &mut cache, &[1])?;
    let (start, cpu_start) = (Instant::now(), cpu_seconds());
    for token in 0..tokens {
        model.decode(&mut cpu, &mut cache, &[token as i32])?;
    }
    let seconds = start.elapsed().as_secs_f64() / tokens as f64;
    let used = cpu_seconds().zip(cpu_start).map_or(f64::NAN, |(now, then)| now - then) / tokens as f64;
    println!("decoding: {:.1} tokens/s ({:.1} ms, {:.1} ms of CPU a token)", 1.0 / seconds, seconds * 1e3, used * 1e3);
    if let Some(mib) = peak_resident() {
        println!("peak resident: {mib:.0} MiB");
    }
    Ok(())
}
