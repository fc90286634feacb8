//! The whole graph on the GPU: the golden cases within twice the error of a plain bf16 computation, and what must not
//! change a bit: replay, what layers keep, and running again.

use std::path::Path;

use halfbyte::backend::cuda::{Cuda, Kernels, LinearKind};
use halfbyte::backend::{Backend, Dropout, HostBatch, NewOptimizer, OptimKind, ParamGroup};
use halfbyte::checkpoint::QuantConfig;
use halfbyte::model::{AdamwSettings, HostAdapter, Keep, LayerPlan, ModelConfig};
use halfbyte::nf4::QuantType;
use libtest_mimic::{Failed, Trial};

use crate::golden::{self, Device, Tolerance};
use crate::support::{Outcome, same};
use crate::tiny::{self, Engine, Step, distance};

/// Twice the worst that PyTorch gives for these fixtures with every tensor in bf16: loss 1.9e-3, logits 1.9e-2, gradient
/// tensor 5.0e-2. The gradient norm is one number, whose error is luck: noise of bf16's size on the weights moves it by
/// 3.3e-3 (deviation over twelve draws), and four of those are allowed. AdamW divides each gradient by its own size, so
/// errors of small ones grow.
const BF16: Tolerance = Tolerance {
    loss: 3.8e-3,
    logits: 3.8e-2,
    gradient: 0.1,
    norm: 1.3e-2,
    training: 1e-2,
    adapter: 2e-2,
    update: 0.15,
    packed: 1e-2,
};

macro_rules! device {
    ($name:ident, |$cuda:ident| $how:expr) => {
        struct $name;
        impl Device for $name {
            type Backend = Cuda;
            const TOLERANCE: Tolerance = BF16;
            fn open() -> Result<Cuda, Failed> {
                #[allow(unused_mut)]
                let mut $cuda = Cuda::open(0)?;
                Ok($how)
            }
        }
    };
}
device!(AsPicked, |cuda| cuda);
device!(Sm80, |cuda| cuda.with_kernels(Kernels::Sm80));
device!(WithoutCublas, |cuda| cuda.without_cublas());
device!(Fused, |cuda| cuda.with_linear(Some(LinearKind::Fused)));
device!(Slice, |cuda| cuda.with_linear(Some(LinearKind::Slice)));

/// What records its micro-steps for replay: work of another thread would spoil that, so these run one at a time.
pub fn recorded_trials() -> Vec<Trial> {
    vec![
        Trial::test("model/replayed_steps_equal_launched_ones", replay),
        Trial::test("model/what_layers_keep_changes_no_bit", keeps),
        Trial::test("model/a_step_run_again_gives_the_same_bits", again),
        Trial::test("model/dropout_follows_the_cpu", dropout),
        Trial::test("model/decoding_follows_the_logits_of_the_whole", decoding),
        Trial::test("model/a_step_allocates_nothing_and_waits_once", calls),
        Trial::test("model/evaluation_gives_the_loss_of_training", evaluation),
        Trial::test("model/sixteen_bit_weights_follow_the_cpu", dense),
    ]
}

/// The golden cases, on each of the ways that a linear can take.
pub fn trials(root: &Path) -> Vec<Trial> {
    let mut trials = vec![];
    for (way, found) in [
        ("as_picked", golden_cases::<AsPicked>(root)),
        ("sm80", golden_cases::<Sm80>(root)),
        ("without_cublas", golden_cases::<WithoutCublas>(root)),
        ("fused", golden_cases::<Fused>(root)),
        ("slice", golden_cases::<Slice>(root)),
    ] {
        match found {
            Ok(cases) => trials.extend(cases),
            Err(why) => trials.push(Trial::test(format!("model/{way}/fixtures"), move || Err(why))),
        }
    }
    trials
}

fn golden_cases<D: Device>(root: &Path) -> Result<Vec<Trial>, Failed> {
    let entries = std::fs::read_dir(root).map_err(|e| format!("{}: {e}", root.display()))?;
    let mut names: Vec<String> = entries.flatten().map(|e| e.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    let mut cases = vec![];
    for name in names {
        if name.contains("-nf4-") {
            cases.extend(golden::four_bit_cases::<D>(root, &name)?);
        } else if name.ends_with("-lora") {
            cases.extend(golden::lora_cases::<D>(root, &name)?);
        }
    }
    let device = std::any::type_name::<D>().rsplit("::").next().unwrap_or_default();
    Ok(cases.into_iter().map(|(name, check)| Trial::test(format!("model/{device}/{name}"), check)).collect())
}

const NF4: QuantConfig = QuantConfig { quant_type: QuantType::Nf4, double_quant: true };

/// The plain graph, with heads of a size that the GPU takes.
fn plain() -> ModelConfig {
    ModelConfig { head_dim: 16, ..tiny::plain() }
}

/// Every feature of the graph, with heads of a size that the GPU takes.
fn everything() -> ModelConfig {
    ModelConfig { head_dim: 16, ..tiny::everything() }
}

fn adapter(config: &ModelConfig) -> HostAdapter {
    tiny::adapter(config, "all-linear")
}

fn engine(config: &ModelConfig, layers: &[LayerPlan], graphs: bool) -> Result<Engine<Cuda>, Failed> {
    let mut cuda = Cuda::open(0)?;
    cuda.use_graphs(graphs);
    Ok(Engine::on(cuda, config, Some(&adapter(config)), layers, Some(NF4)))
}

/// Micro-batches of one shape, so that graphs replay, and different content.
fn micro_batches(config: &ModelConfig) -> Vec<HostBatch> {
    let batch = |seed| {
        let parts = [tiny::sequence(config, seed, 30, 4), tiny::sequence(config, seed + 100, 21, 9)];
        tiny::row(&parts.iter().collect::<Vec<_>>())
    };
    (1..=4).map(batch).collect()
}

fn same_step(what: &str, a: &Step, b: &Step) -> Outcome {
    same(&format!("{what}: loss"), &[a.loss], &[b.loss])?;
    same(&format!("{what}: norm"), &[a.norm], &[b.norm])?;
    same(&format!("{what}: gradients"), &a.grads, &b.grads)
}

fn near_cpu(what: &str, found: &Step, cpu: &Step) -> Outcome {
    let off = f64::from((found.loss - cpu.loss).abs() / cpu.loss);
    let gradients = distance(&found.grads, &cpu.grads);
    if off <= BF16.loss && gradients <= BF16.gradient {
        return Ok(());
    }
    Err(format!("{what}: loss {} for {}, gradients off by {gradients:.2e}", found.loss, cpu.loss).into())
}

fn replay() -> Outcome {
    for config in [plain(), everything()] {
        let (mut launched, mut replayed) = (engine(&config, &[], false)?, engine(&config, &[], true)?);
        for round in 0..3 {
            let batches = micro_batches(&config);
            let batch = batches[round..=round].to_vec();
            let dropout = Some(Dropout { p: 0.2, seed: 5, step: round as u32 });
            let (a, b) = (launched.step(&batch, dropout), replayed.step(&batch, dropout));
            same_step(&format!("round {round}"), &b, &a)?;
        }
        assert_eq!(launched.backend.calls().replays, 0);
        let (replays, why) = (replayed.backend.calls().replays, replayed.backend.recording_failure());
        assert_eq!(replays, 2, "all rounds but the first; {why:?}; {:?}", config.family);
    }
    Ok(())
}

fn keeps() -> Outcome {
    let config = everything();
    let batches = micro_batches(&config);
    let kept = engine(&config, &[], true)?.step(&batches, None);
    for keep in Keep::ALL {
        for host in [false, true] {
            let layers = vec![LayerPlan { keep, host }; config.num_hidden_layers];
            let found = engine(&config, &layers, true)?.step(&batches, None);
            same_step(&format!("{keep:?}, host {host}"), &found, &kept)?;
        }
    }
    let mixed =
        [(Keep::Input, true), (Keep::All, false), (Keep::Attention, true)].map(|(keep, host)| LayerPlan { keep, host });
    same_step("mixed", &engine(&config, &mixed, true)?.step(&batches, None), &kept)
}

fn again() -> Outcome {
    let config = everything();
    let batches = micro_batches(&config);
    let first = engine(&config, &[], true)?.step(&batches, None);
    same_step("again", &engine(&config, &[], true)?.step(&batches, None), &first)
}

fn dropout() -> Outcome {
    let config = everything();
    let batches = micro_batches(&config);
    let dropout = Some(Dropout { p: 0.3, seed: 11, step: 7 });
    let cpu = Engine::new(&config, Some(&adapter(&config)), &[]).step(&batches, dropout);
    near_cpu("dropout", &engine(&config, &[], true)?.step(&batches, dropout), &cpu)
}

fn dense() -> Outcome {
    let config = everything();
    let batches = micro_batches(&config);
    let adapter = adapter(&config);
    let cpu = Engine::load(&config, Some(&adapter), &[], None).step(&batches, None);
    let mut gpu = Engine::on(Cuda::open(0)?, &config, Some(&adapter), &[], None);
    near_cpu("16-bit weights", &gpu.step(&batches, None), &cpu)
}

fn evaluation() -> Outcome {
    let config = everything();
    let mut engine = engine(&config, &[], true)?;
    let batches = micro_batches(&config);
    let trained = engine.step(&batches[..1], None).loss;
    same("loss", &[engine.loss(&batches[0])], &[trained])
}

fn decoding() -> Outcome {
    for config in [plain(), everything()] {
        let mut engine = engine(&config, &[], true)?;
        let tokens = tiny::sequence(&config, 9, 40, 0);
        let whole = engine.logits(&tokens);
        let mut cache = engine.model.new_cache(&mut engine.backend, 64)?;
        let v = config.vocab_size;
        let mut at = 0;
        // A prompt, a few tokens at once, then one by one: the third and later replay.
        for n in [17, 3].into_iter().chain(std::iter::repeat_n(1, 20)) {
            let logits = engine.model.decode(&mut engine.backend, &mut cache, &tokens.tokens[at..at + n])?;
            at += n;
            let off = distance(&logits, &whole[(at - 1) * v..at * v]);
            if off > BF16.logits {
                return Err(format!("after {at} tokens: logits off by {off:.2e}").into());
            }
        }
    }
    Ok(())
}

fn calls() -> Outcome {
    let config = plain();
    let mut engine = engine(&config, &[], true)?;
    let host = &micro_batches(&config)[0];
    let weights = adapter(&config).weights;
    let tensors = adapter(&config).layout.tensor_lens();
    let of = NewOptimizer { kind: OptimKind::PagedAdamw32bit, init: &weights, tensors: &tensors };
    let mut state = engine.backend.new_optimizer(of)?;
    let mut batch = engine.batch(host, host.target_count());
    let groups = vec![ParamGroup { range: 0..weights.len(), lr: 1e-3, weight_decay: 0.0 }];
    let mut settings = AdamwSettings { groups, beta1: 0.9, beta2: 0.999, eps: 1e-8, max_grad_norm: 1.0, step: 0 };
    for step in 1..=5 {
        settings.step = step;
        let before = engine.backend.calls();
        let (backend, model) = (&mut engine.backend, &mut engine.model);
        batch.fill(backend, host, 0.1)?;
        model.zero_grad(backend)?;
        model.loss_and_grad(backend, &batch, None)?;
        let middle = backend.calls();
        let (loss, _) = model.read_loss_and_norm(backend)?;
        model.optimizer_step(backend, &mut state, &settings)?;
        let after = backend.calls();
        assert!(loss.is_finite());
        // The first two steps load kernels and record the graph.
        if step > 2 {
            same("allocations", &[after.allocations], &[before.allocations])?;
            same("waits inside the micro-step", &[middle.waits], &[before.waits])?;
        }
    }
    Ok(())
}
