use super::*;
use crate::backend::Item;
use crate::checkpoint::ModelDir;
use crate::model::shapes::{Format, shape};
use crate::model::{
    AdapterLayout, HostAdapter, Keep, LayerPlan, LoraConfig, Model, ModelConfig, ModelOptions, TargetModules,
};
use crate::nf4::{QuantConfig, QuantType};
use crate::rng::{Stream, word};

const GIB: usize = 1 << 30;

fn nf4(name: &str) -> Format {
    match name.contains("embed") || name.contains("lm_head") {
        true => Format::Dense,
        false => Format::FourBit { double_quant: true },
    }
}

fn adapter(config: &ModelConfig, targets: &str) -> HostAdapter {
    let lora = LoraConfig {
        r: 16,
        lora_alpha: 32.0,
        lora_dropout: 0.0,
        target_modules: TargetModules::Pattern(targets.into()),
        rank_pattern: vec![],
        alpha_pattern: vec![],
        use_rslora: false,
    };
    let layout = AdapterLayout::new(&lora, config).unwrap();
    HostAdapter { config: lora, layout, weights: vec![] }
}

/// A request with everything that a test does not care about.
struct Case {
    config: ModelConfig,
    adapter: HostAdapter,
}

impl Case {
    fn new(name: &str) -> Self {
        let config = shape(name).unwrap();
        Self { adapter: adapter(&config, "all-linear"), config }
    }

    fn of(&self, card: &str, sequences: usize, length: usize, device: usize) -> Request<'_> {
        Request {
            config: &self.config,
            format: &nf4,
            adapter: &self.adapter,
            optim: OptimKind::PagedAdamw32bit,
            tokens: sequences * length,
            sequences,
            card: *Card::named(card).unwrap(),
            device,
            host: 64 * GIB,
            mode: Mode::Auto,
        }
    }
}

#[test]
fn a_mistral_7b_takes_the_bytes_that_arithmetic_gives() {
    let case = Case::new("mistral-7b");
    let of = case.of("h100", 1, 8192, 80 * GIB);
    let hosted = vec![LayerPlan { keep: Keep::Input, host: true }; 32];
    let plan = measure(&of, &hosted, false).unwrap();
    let (layer, t) = (218_103_808usize, 8192usize);
    let packed = 32 * (layer / 2 + layer / 64 + layer / 64 / 256 * 4 + 7 * 256 + 2 * 2 * 4096);
    assert_eq!(plan.item(Item::Weights), packed);
    assert_eq!(plan.item(Item::Embedding), 2 * 2 * 32_000 * 4096 + 2 * 4096 + 256);
    assert_eq!(plan.item(Item::Adapter), 2 * 41_943_040);
    assert_eq!(plan.item(Item::Gradients), 4 * 41_943_040);
    assert_eq!(plan.optimizer_bytes, 12 * 41_943_040);
    assert_eq!(plan.item(Item::Optimizer), 2 * 16 * 448);
    // Per layer: the statistic of norm1 and h of down; and the two places of the ring.
    assert_eq!(plan.item(Item::Activations), 33 * t * (4 + 2 * 16) + 2 * t * 2 * 4096);
    assert_eq!(plan.host_bytes, 31 * t * 2 * 4096);
    let whole = plan.item(Item::Weights) + plan.item(Item::Embedding);
    assert!(whole < 4_160_000_000, "the model is to take at most 4.16 GB: {whole}");
    let beside = plan.device_bytes - whole;
    assert!(plan.device_bytes < 6_880_000_000, "{}, {beside} beside the model", plan.device_bytes);
    assert_eq!(plan.device_bytes, plan.items.values().sum::<usize>());
}

/// The meter panics if an op touches a buffer that a copy is still using.
#[test]
fn no_op_touches_what_a_copy_is_using_whatever_the_layers_keep() {
    let config = shape("tiny").unwrap();
    let config = ModelConfig { num_hidden_layers: 7, windows: vec![None; 7], ..config };
    for targets in ["all-linear", r".*\.[3-6]\..*o_proj"] {
        let case = Case { adapter: adapter(&config, targets), config: config.clone() };
        let of = case.of("rtx3090", 2, 64, GIB);
        for seed in 0..200 {
            let pick = |layer| word(seed, Stream::Sampling, 0, layer) as usize;
            let layers: Vec<LayerPlan> = (0..7)
                .map(|l| LayerPlan { keep: Keep::ALL[pick(l) % 4], host: pick(l + 7).is_multiple_of(2) })
                .collect();
            measure(&of, &layers, true).unwrap();
        }
    }
}

#[test]
fn keeping_more_takes_more_bytes_and_less_time() {
    let case = Case::new("mistral-7b");
    let of = case.of("h100", 4, 2048, 80 * GIB);
    let all = |keep, host| measure(&of, &[LayerPlan { keep, host }; 32], true).unwrap();
    let plans: Vec<Plan> = Keep::ALL.map(|keep| all(keep, false)).into();
    for pair in plans.windows(2) {
        assert!(pair[0].device_bytes < pair[1].device_bytes && pair[0].step.seconds > pair[1].step.seconds);
    }
    let hosted = all(Keep::Input, true);
    assert!(hosted.device_bytes < plans[0].device_bytes);
    assert!(hosted.step.seconds < 1.02 * plans[0].step.seconds, "the copies run beside the work");
}

#[test]
fn a_plan_obeys_its_budget_and_uses_what_it_is_given() {
    let case = Case::new("mistral-7b");
    let mut before = f64::INFINITY;
    for gib in [7, 8, 10, 12, 16, 20, 24, 32, 40, 80] {
        let of = case.of("h100", 4, 2048, gib * GIB);
        let plan = plan(&of).unwrap();
        assert!(plan.total() <= gib * GIB && plan.host_bytes <= of.host);
        assert!(plan.step.seconds <= before * 1.0001, "more memory is never slower");
        before = plan.step.seconds;
        assert_eq!(plan, measure(&of, &plan.layers, plan.optimizer_on_device).unwrap(), "a plan is what it measures");
    }
    let free = plan(&case.of("h100", 4, 2048, 80 * GIB)).unwrap();
    assert!(free.layers.iter().all(|l| *l == LayerPlan { keep: Keep::All, host: false }), "with memory free: {free:?}");
}

#[test]
fn the_modes_do_what_gradient_checkpointing_says() {
    let case = Case::new("smollm2-135m");
    let of = case.of("rtx3090", 8, 1024, 20 * GIB);
    let recompute = plan(&Request { mode: Mode::Recompute, ..of }).unwrap();
    assert!(recompute.layers.iter().all(|l| *l == LayerPlan { keep: Keep::Input, host: false }));
    let keep = plan(&Request { mode: Mode::KeepAll, ..of }).unwrap();
    assert!(keep.layers.iter().all(|l| l.keep == Keep::All));
    // A little less than the inputs on the device take: some of them go to the host.
    let of =
        Request { mode: Mode::Recompute, device: recompute.total() - recompute.optimizer_bytes - (20 << 20), ..of };
    let tight = plan(&of).unwrap();
    let hosted = tight.layers.iter().filter(|l| l.host).count();
    assert!((1..30).contains(&hosted) && tight.host_bytes > 0 && tight.layers.iter().all(|l| l.keep == Keep::Input));
}

#[test]
fn what_does_not_fit_is_one_error_that_says_what_would() {
    let case = Case::new("mistral-7b");
    let of = case.of("rtx3090", 8, 16384, 6 * GIB);
    let e = plan(&of).unwrap_err();
    assert_eq!(e.exit_code(), 2);
    let text = e.to_string();
    for part in [
        "memory: found 6.00 GiB",
        "for 8 × 16384 tokens",
        "largest: ",
        "scratch",
        "weights of the layers",
        "what fits: ",
    ] {
        assert!(text.contains(part), "{part:?} is not in {text}");
    }
    let keep = Request { mode: Mode::KeepAll, device: 16 * GIB, ..case.of("rtx3090", 1, 8192, 0) };
    let text = plan(&keep).unwrap_err().to_string();
    assert!(text.contains("gradient_checkpointing left out or true"), "{text}");
    let tiny = plan(&case.of("rtx3090", 1, 64, GIB)).unwrap_err().to_string();
    assert!(tiny.contains("no length fits beside the weights"), "{tiny}");
}

#[test]
fn the_longest_row_and_the_largest_batch_fit_and_no_more_does() {
    let case = Case::new("mistral-7b");
    let of = case.of("rtx4090", 1, 64, 23 * GIB);
    let length = largest_length(&of, 1).unwrap().unwrap();
    assert!(plan(&Request { tokens: length, ..of }).is_ok());
    assert!(plan(&Request { tokens: length + 64, ..of }).is_err());
    let batch = largest_batch(&of, 2048).unwrap().unwrap();
    assert!(plan(&Request { tokens: batch * 2048, sequences: batch, ..of }).is_ok());
    assert!(plan(&Request { tokens: (batch + 1) * 2048, sequences: batch + 1, ..of }).is_err());
}

#[test]
fn a_forward_alone_takes_little_beside_the_weights() {
    let case = Case::new("mistral-7b");
    let items = forward_bytes(&case.config, &nf4, None, 512, true, 4096).unwrap();
    assert_eq!(items[&Item::KvCache], 2 * 32 * 4096 * 1024 * 2);
    let total: usize = items.values().sum();
    assert!(total < 6 * GIB && !items.contains_key(&Item::Gradients), "{items:?}");
}

/// Peaks of another program in GB, its optimizer state not counted: with full recompute, and without.
#[test]
fn a_mistral_7b_takes_no_more_than_its_rival() {
    let case = Case::new("mistral-7b");
    for (sequences, length, recomputed, kept) in
        [(1, 512, 4.91, 6.71), (1, 2048, 5.25, 12.79), (4, 2048, 6.89, 34.57), (1, 8192, 6.88, 36.80)]
    {
        for (mode, peak) in [(Mode::Recompute, recomputed), (Mode::Auto, kept)] {
            let state = optimizer_bytes(OptimKind::PagedAdamw32bit, &case.adapter.layout.tensor_lens());
            let of = case.of("h100", sequences, length, (peak * 1e9) as usize + state);
            let plan = plan(&Request { mode, ..of }).unwrap();
            assert!(
                plan.optimizer_on_device && plan.device_bytes as f64 <= peak * 1e9,
                "{sequences} × {length} {mode:?}"
            );
            let keep = if mode == Mode::Auto { Keep::All } else { Keep::Input };
            assert!(plan.layers.iter().all(|l| l.keep == keep), "{sequences} × {length} {mode:?}");
        }
    }
}

/// Real directories, as they are and quantised while loading: the source of the weights takes what their shapes said.
#[test]
fn a_directory_takes_what_its_names_and_shapes_said() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let nf4 = |double_quant| Some(QuantConfig { quant_type: QuantType::Nf4, double_quant });
    for name in ["tiny-mistral", "tiny-llama-tied", "tiny-qwen2", "tiny-mistral-nf4-bf16", "tiny-mistral-nf4-f32"] {
        let dir = ModelDir::open(&root.join(name)).unwrap();
        for quantize in [None, nf4(true), nf4(false)] {
            let planned = forward_bytes(dir.config(), &|name| dir.format(name, quantize), None, 100, false, 0).unwrap();
            let mut meter = Meter::new(CARDS[0]);
            let mut source = dir.source(quantize).unwrap();
            let options = ModelOptions::inference(100);
            Model::load(&mut meter, dir.config(), &mut source, None, options, &mut |_| ()).unwrap();
            assert_eq!(meter.device(), &planned, "{name} {quantize:?}");
        }
    }
}
