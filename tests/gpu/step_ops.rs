//! Times of the ops of a step: every op is there as often as the graph calls it, the times fit into the step, and taking
//! them changes no bit.

use std::collections::BTreeMap;

use halfbyte::backend::cuda::Cuda;
use halfbyte::backend::{Backend, Dropout, HostBatch, OpTime, OptimKind};
use halfbyte::bench::kernels::outcome::Ceilings;
use halfbyte::bench::step::{self, Spec};
use halfbyte::checkpoint::QuantConfig;
use halfbyte::model::shapes::shape;
use halfbyte::model::{ModelConfig, ModelOptions};
use halfbyte::nf4::QuantType;
use libtest_mimic::Trial;

use crate::support::{Outcome, same};
use crate::tiny::{self, Engine};

/// They record micro-steps, so they run one at a time.
pub fn trials() -> Vec<Trial> {
    vec![
        Trial::test("step_ops/every_op_of_a_step_is_timed_and_fits_into_it", bench),
        Trial::test("step_ops/timing_changes_no_bit_and_replays_as_before", bits),
        Trial::test("step_ops/a_profiler_that_is_not_there_is_told_nothing", profiler),
        Trial::test("step_ops/a_copy_has_a_rate_and_gives_its_memory_back", copy_rate),
    ]
}

/// With the norms of Qwen3, so that no op of the graph is missing.
fn config() -> ModelConfig {
    ModelConfig { qk_norm: true, ..shape("tiny").expect("a shape") }
}

/// Calls of a step of one micro-batch whose `l` layers keep everything, with an adapter on every projection.
fn calls(l: u64) -> BTreeMap<&'static str, u64> {
    let mut calls = micro_batch(l);
    calls.extend([("zero_f32", 2), ("grad_norm", 1), ("adamw", 1)]);
    calls
}

/// Of these, those of its micro-batch.
fn micro_batch(l: u64) -> BTreeMap<&'static str, u64> {
    BTreeMap::from([
        ("embedding", 1),
        // Twice in forward and twice in backward, and the last norm.
        ("rmsnorm_forward", 4 * l + 1),
        // Under the lowest adapter nothing has a gradient.
        ("rmsnorm_backward", 2 * l),
        ("linear_forward", 4 * l),
        ("linear_backward", 4 * l),
        ("head_norm_forward", l),
        ("head_norm_backward", l),
        ("rope_forward", l),
        ("rope_backward", l),
        ("attention_forward", l),
        ("attention_backward", l),
        ("swiglu_forward", 2 * l),
        ("swiglu_backward", l),
        ("head_loss", 1),
        ("zero_act", 1),
    ])
}

fn called(times: &[OpTime]) -> BTreeMap<&'static str, u64> {
    times.iter().map(|t| (t.op, t.calls)).collect()
}

fn bench() -> Outcome {
    let config = config();
    let adapter = tiny::adapter(&config, "all-linear");
    let (batch, length) = (2, 256);
    let spec = Spec {
        config: &config,
        adapter: &adapter,
        batch,
        length,
        options: ModelOptions { max_tokens: batch * length, train: true, layers: vec![] },
        optim: OptimKind::PagedAdamw32bit,
        dropout: 0.1,
        steps: 3,
        warm_up: 3,
        ops: true,
        profiler: false,
    };
    let mut cuda = Cuda::open(0)?;
    let report = step::run(&mut cuda, &spec, None, &mut |_, _| ())?;
    let ops = report.ops.ok_or("no times of ops")?;
    assert_eq!(called(&ops.times), calls(config.num_hidden_layers as u64));
    let unused = ops.times.iter().find(|t| t.time.is_zero() || t.work.bytes <= 0.0);
    assert!(unused.is_none(), "{unused:?}");
    let products = ["linear_forward", "linear_backward", "attention_forward", "attention_backward", "head_loss"];
    for time in &ops.times {
        assert_eq!(time.work.flops > 0.0, products.contains(&time.op), "{time:?}");
    }
    let sum: f64 = ops.times.iter().map(|t| t.time.as_secs_f64()).sum();
    assert!(sum <= 1.05 * ops.step_seconds, "ops of {sum} s in a step of {} s", ops.step_seconds);
    // Two runs of the warm-up are launched op by op: the first untimed one, and the first with events.
    let found = cuda.calls();
    let why = cuda.recording_failure();
    assert_eq!((found.records, why), (2, None), "{found:?}");
    let all = spec.warm_up + spec.steps + step::OPS_WARM_UP + step::OPS_STEPS;
    assert_eq!(found.replays as usize, all - 2, "{found:?}");
    Ok(())
}

const NF4: QuantConfig = QuantConfig { quant_type: QuantType::Nf4, double_quant: true };

/// Micro-batches of one shape and different content.
fn micro_batches(config: &ModelConfig, seed: u64) -> Vec<HostBatch> {
    let batch = |i| {
        let parts = [tiny::sequence(config, seed + i, 30, 4), tiny::sequence(config, seed + i + 100, 21, 9)];
        tiny::row(&parts.iter().collect::<Vec<_>>())
    };
    (0..3).map(batch).collect()
}

fn bits() -> Outcome {
    let config = config();
    let adapter = tiny::adapter(&config, "all-linear");
    let engine = || -> Result<Engine<Cuda>, halfbyte::Error> {
        Ok(Engine::on(Cuda::open(0)?, &config, Some(&adapter), &[], Some(NF4)))
    };
    let (mut plain, mut timed) = (engine()?, engine()?);
    assert_eq!(plain.backend.take_op_times()?, []);
    let mut expected = micro_batch(config.num_hidden_layers as u64);
    // A step of three micro-batches: one launched and two replayed at first, then three replayed.
    expected.values_mut().for_each(|calls| *calls *= 3);
    expected.extend([("zero_f32", 2), ("grad_norm", 1)]);
    for round in 0..4 {
        // On, and off again.
        if round == 0 || round == 3 {
            timed.backend.time_ops(round == 0)?;
        }
        let batches = micro_batches(&config, 10 * round);
        let dropout = Some(Dropout { p: 0.2, seed: 5, step: 3 * round as u32 });
        let (a, b) = (plain.step(&batches, dropout), timed.step(&batches, dropout));
        same(&format!("round {round}: loss"), &[b.loss], &[a.loss])?;
        same(&format!("round {round}: norm"), &[b.norm], &[a.norm])?;
        same(&format!("round {round}: gradients"), &b.grads, &a.grads)?;
        let times = timed.backend.take_op_times()?;
        if round == 3 {
            assert_eq!(times, []);
        } else {
            assert_eq!(called(&times), expected, "round {round}");
            assert!(times.iter().all(|t| !t.time.is_zero()), "round {round}: {times:?}");
        }
    }
    let (plain, timed) = (plain.backend.calls(), timed.backend.calls());
    assert_eq!((plain.records, plain.replays), (1, 11));
    // Recorded anew without events: one more launched op by op.
    assert_eq!((timed.records, timed.replays), (2, 10));
    Ok(())
}

fn profiler() -> Outcome {
    let mut cuda = Cuda::open(0)?;
    cuda.profiler(true)?;
    cuda.profiler(false)?;
    cuda.synchronize()?;
    Ok(())
}

fn copy_rate() -> Outcome {
    let mut cuda = Cuda::open(0)?;
    let before = cuda.memory()?.0;
    let copy = cuda.copy_rate()?;
    // From the slowest card that there are kernels for to more than any has.
    assert!((1e11..1e14).contains(&copy), "{copy} bytes/s");
    let kept = before.saturating_sub(cuda.memory()?.0);
    assert!(kept < 512 << 20, "{kept} bytes are still taken");
    let floor = Ceilings { copy, product: 1e15 }.floor(halfbyte::backend::Work::rmsnorm_forward(8192, 4096, true));
    assert!(floor > 0.0);
    Ok(())
}
