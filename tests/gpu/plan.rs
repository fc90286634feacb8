//! The memory plan against the device: what was planned is what is taken, to the byte, and no choice changes a bit.

use halfbyte::backend::cuda::Cuda;
use halfbyte::backend::{Backend, Batch, HostBatch, Item, NewOptimizer, OptimKind};
use halfbyte::checkpoint::QuantConfig;
use halfbyte::memory::{self, Card, Mode, Plan, Request};
use halfbyte::model::shapes::{Format, shape};
use halfbyte::model::{HostAdapter, Keep, LayerPlan, Model, ModelConfig, ModelOptions};
use halfbyte::nf4::QuantType;
use halfbyte::rng::{Stream, word};
use libtest_mimic::Trial;

use crate::support::{Outcome, same};
use crate::tiny::{self, RandomWeights, Step};

pub fn trials() -> Vec<Trial> {
    vec![
        Trial::test("plan/mixed_choices_take_what_was_planned_and_change_no_bit", mixes),
        Trial::test("plan/a_budget_is_obeyed_to_the_byte", budget),
    ]
}

const NF4: QuantConfig = QuantConfig { quant_type: QuantType::Nf4, double_quant: true };
const LAYERS: usize = 7;
const SEQUENCES: usize = 3;
const LENGTH: usize = 400;

fn config() -> ModelConfig {
    ModelConfig { num_hidden_layers: LAYERS, windows: vec![None; LAYERS], ..shape("tiny").expect("a shape") }
}

fn batch(config: &ModelConfig) -> HostBatch {
    let sequences: Vec<HostBatch> = (0..SEQUENCES as u64).map(|i| tiny::sequence(config, i, LENGTH, 5)).collect();
    tiny::row(&sequences.iter().collect::<Vec<_>>())
}

fn request<'a>(config: &'a ModelConfig, adapter: &'a HostAdapter, device: usize) -> Request<'a> {
    Request {
        config,
        format: &|name| match name.contains("embed") || name.contains("lm_head") {
            true => Format::Dense,
            false => Format::FourBit { double_quant: true },
        },
        adapter,
        optim: OptimKind::PagedAdamw8bit,
        tokens: SEQUENCES * LENGTH,
        sequences: SEQUENCES,
        card: *Card::named("h100").expect("a card"),
        device,
        host: 1 << 30,
        mode: Mode::Auto,
    }
}

/// Two steps in the memory that `plan` says, the second a replay of the first.
fn run(config: &ModelConfig, adapter: &HostAdapter, plan: &Plan) -> halfbyte::Result<[Step; 2]> {
    let mut cuda = Cuda::open(0)?;
    cuda.prefer_optimizer_on_host(!plan.optimizer_on_device);
    cuda.reserve(plan.device_bytes)?;
    let mut source = RandomWeights { config, quantize: Some(NF4) };
    let options = ModelOptions { max_tokens: plan.tokens, train: true, layers: plan.layers.clone() };
    let mut model = Model::load(&mut cuda, config, &mut source, Some(adapter), options, &mut |_| ())?;
    cuda.label(Item::Batch);
    let mut device = Batch::new(&mut cuda, plan.tokens)?;
    cuda.label(Item::Optimizer);
    let tensors = adapter.layout.tensor_lens();
    cuda.new_optimizer(NewOptimizer { kind: OptimKind::PagedAdamw8bit, init: &adapter.weights, tensors: &tensors })?;
    memory::check(&cuda)?;
    let host = batch(config);
    let mut step = || {
        device.fill(&mut cuda, &host, 1.0 / host.target_count() as f32)?;
        model.zero_grad(&mut cuda)?;
        model.loss_and_grad(&mut cuda, &device, None)?;
        let (loss, norm) = model.read_loss_and_norm(&mut cuda)?;
        Ok::<_, halfbyte::Error>(Step { loss, norm, grads: model.read_grads(&mut cuda)? })
    };
    Ok([step()?, step()?])
}

fn same_steps(what: &str, found: &[Step; 2], expected: &[Step; 2]) -> Outcome {
    for (i, (a, b)) in found.iter().zip(expected).enumerate() {
        same(&format!("{what}: step {i}: loss"), &[a.loss], &[b.loss])?;
        same(&format!("{what}: step {i}: gradients"), &a.grads, &b.grads)?;
    }
    Ok(())
}

fn mixes() -> Outcome {
    let config = config();
    let adapter = tiny::adapter(&config, "all-linear");
    let of = request(&config, &adapter, 1 << 30);
    let kept = run(&config, &adapter, &memory::measure(&of, &[LayerPlan::default(); LAYERS], true)?)?;
    same("a step again", &kept[1].grads, &kept[0].grads)?;
    for case in 0..8 {
        let pick = |layer: usize| word(case, Stream::Sampling, 3, layer as u64) as usize;
        let layer = |l| LayerPlan { keep: Keep::ALL[pick(l) % 4], host: pick(l + LAYERS) % 3 > 0 };
        let layers: Vec<LayerPlan> = (0..LAYERS).map(layer).collect();
        let found = run(&config, &adapter, &memory::measure(&of, &layers, case % 2 == 0)?)?;
        same_steps(&memory::describe_layers(&layers), &found, &kept)?;
    }
    Ok(())
}

fn budget() -> Outcome {
    let config = config();
    let adapter = tiny::adapter(&config, "all-linear");
    let all = memory::plan(&request(&config, &adapter, 1 << 30))?;
    let kept = run(&config, &adapter, &all)?;
    let least = memory::measure(
        &request(&config, &adapter, 1 << 30),
        &[LayerPlan { keep: Keep::Input, host: true }; LAYERS],
        false,
    )?;
    for share in [0, 1, 2, 3] {
        let budget = least.total() + (all.total() - least.total()) * share / 4;
        let plan = memory::plan(&request(&config, &adapter, budget))?;
        assert!(plan.total() <= budget, "{} of {budget}", plan.total());
        same_steps(&format!("{budget} bytes: {}", plan.summary()), &run(&config, &adapter, &plan)?, &kept)?;
    }
    Ok(())
}
