//! What an optimizer step gives must not depend on how its tokens are laid out, and must repeat.

use halfbyte::backend::cpu::Optimizer;
use halfbyte::backend::{Backend, Dropout, HostBatch, IGNORE, NewOptimizer, OptimKind, ParamGroup};
use halfbyte::data::{Dataset, Document, pack};
use halfbyte::model::{AdamwSettings, HostAdapter, Keep, LayerPlan, ModelConfig};
use halfbyte::rng::{Stream, word};

use crate::tiny::{Engine, Step, adapter, distance, everything, plain, row, sequence};

/// f32 sums taken in another order.
const ROUNDING: f64 = 2e-5;

fn assert_near(what: &str, a: &Step, b: &Step) {
    let relative = |x: f32, y: f32| f64::from((x - y).abs() / y.abs());
    assert!(relative(a.loss, b.loss) < ROUNDING, "{what}: loss {} against {}", a.loss, b.loss);
    assert!(relative(a.norm, b.norm) < ROUNDING, "{what}: norm {} against {}", a.norm, b.norm);
    assert!(distance(&a.grads, &b.grads) < ROUNDING, "{what}: gradients {:e}", distance(&a.grads, &b.grads));
}

/// Four sequences with unequal numbers of tokens and targets.
fn four() -> [HostBatch; 4] {
    let c = everything();
    [sequence(&c, 1, 9, 2), sequence(&c, 2, 17, 11), sequence(&c, 3, 5, 1), sequence(&c, 4, 12, 10)]
}

#[test]
fn one_by_four_equals_four_by_one_and_any_order() {
    let config = everything();
    let mut engine = Engine::new(&config, Some(&adapter(&config, "all-linear")), &[]);
    let [a, b, c, d] = four();
    let together = engine.step(&[row(&[&a, &b, &c, &d])], None);
    let apart = engine.step(&[a.clone(), b.clone(), c.clone(), d.clone()], None);
    assert_near("four micro-batches of one sequence", &apart, &together);
    let pairs = engine.step(&[row(&[&d, &a]), row(&[&c, &b])], None);
    assert_near("two micro-batches of two sequences", &pairs, &together);
    // A mean of the micro-batches' means would be something else.
    let means: f32 = [&a, &b, &c, &d].into_iter().map(|s| engine.loss(s) / 4.0).sum();
    assert!((means - together.loss).abs() > 1e-3 * together.loss, "the cases tell the two means apart");
}

#[test]
fn packed_rows_give_the_gradients_of_unpacked_ones() {
    let config = everything();
    let mut engine = Engine::new(&config, Some(&adapter(&config, "all-linear")), &[]);
    let document = |s: &HostBatch, i| Document {
        tokens: s.tokens.clone(),
        is_target: (0..s.tokens.len()).map(|t| t > 0 && s.targets[t - 1] != IGNORE).collect(),
        file: 0,
        line: i,
    };
    let documents = four().iter().enumerate().map(|(i, s)| document(s, i)).collect();
    let dataset = Dataset { documents, ..Dataset::default() };
    let rows = |packing| pack(&dataset, 24, packing).into_iter().map(|r| r.batch).collect::<Vec<_>>();
    let (packed, unpacked) = (rows(true), rows(false));
    assert!(packed.len() < unpacked.len(), "something was packed");
    let (packed, unpacked) = (engine.step(&packed, None), engine.step(&unpacked, None));
    assert_near("packed", &packed, &unpacked);
}

#[test]
fn packed_rows_equal_rows_run_apart() {
    for config in [plain(), everything()] {
        let mut engine = Engine::new(&config, Some(&adapter(&config, "all-linear")), &[]);
        let sequences = four();
        let packed = engine.logits(&row(&sequences.iter().collect::<Vec<_>>()));
        let apart: Vec<f32> = sequences.iter().flat_map(|s| engine.logits(s)).collect();
        assert!(distance(&packed, &apart) < ROUNDING, "{:e}", distance(&packed, &apart));
    }
}

#[test]
fn a_micro_batch_without_targets_adds_nothing() {
    let config = everything();
    let mut engine = Engine::new(&config, Some(&adapter(&config, "all-linear")), &[]);
    let [a, mut silent, c, _] = four();
    silent.targets.fill(IGNORE);
    let with = engine.step(&[a.clone(), silent, c.clone()], None);
    assert_eq!(with, engine.step(&[a, c], None));
    assert!(with.grads.iter().all(|g| g.is_finite()) && with.norm > 0.0);
}

/// What each layer can keep, and where.
fn choices() -> impl Iterator<Item = LayerPlan> {
    Keep::ALL.into_iter().flat_map(|keep| [false, true].map(|host| LayerPlan { keep, host }))
}

/// Loss and gradients, and between two steps an evaluation in the same buffers.
fn two_steps(config: &ModelConfig, adapter: &HostAdapter, layers: &[LayerPlan], dropout: Option<Dropout>) -> [Step; 2] {
    let mut engine = Engine::new(config, Some(adapter), layers);
    let micro_batches = four();
    let first = engine.step(&micro_batches, dropout);
    engine.loss(&micro_batches[1]);
    [first, engine.step(&micro_batches[..2], dropout)]
}

#[test]
fn whatever_the_layers_keep_and_wherever_gives_the_same_bits() {
    for config in [plain(), ModelConfig { num_hidden_layers: 5, windows: vec![None; 5], ..everything() }] {
        for dropout in [None, Some(Dropout { p: 0.3, seed: 5, step: 2 })] {
            let adapter = adapter(&config, "all-linear");
            let all = two_steps(&config, &adapter, &[], dropout);
            assert!(all[0].norm > 0.0 && all[0].norm.is_finite());
            for plan in choices() {
                let layers = vec![plan; config.num_hidden_layers];
                assert_eq!(all, two_steps(&config, &adapter, &layers, dropout), "{plan:?}");
            }
        }
    }
}

#[test]
fn any_mix_of_choices_over_the_layers_gives_the_same_bits() {
    let config = ModelConfig { num_hidden_layers: 6, windows: vec![None; 6], ..everything() };
    let choices: Vec<LayerPlan> = choices().collect();
    for (targets, dropout) in [
        ("all-linear", Some(Dropout { p: 0.3, seed: 5, step: 2 })),
        (r".*\.[2-5]\..*(o|up|down)_proj", None),
        (r".*\.[1-5]\..*(q|gate)_proj", None),
    ] {
        let adapter = adapter(&config, targets);
        let all = two_steps(&config, &adapter, &[], dropout);
        for case in 0..24 {
            let pick = |layer| choices[word(9, Stream::Sampling, case, layer) as usize % choices.len()];
            let layers: Vec<LayerPlan> = (0..6).map(pick).collect();
            assert_eq!(all, two_steps(&config, &adapter, &layers, dropout), "{targets}: {layers:?}");
        }
    }
}

#[test]
fn dropout_repeats_by_seed_and_step_and_differs_otherwise() {
    let config = plain();
    let adapter = adapter(&config, "all-linear");
    let mut engine = Engine::new(&config, Some(&adapter), &[]);
    let batch = [row(&four().iter().collect::<Vec<_>>())];
    let drop = |seed, step, p| Some(Dropout { p, seed, step });
    let one = engine.step(&batch, drop(1, 1, 0.25));
    assert_eq!(one, engine.step(&batch, drop(1, 1, 0.25)), "the same seed and step");
    assert_eq!(one, Engine::new(&config, Some(&adapter), &[]).step(&batch, drop(1, 1, 0.25)), "a run of its own");
    assert_ne!(one.grads, engine.step(&batch, drop(2, 1, 0.25)).grads, "another seed");
    assert_ne!(one.grads, engine.step(&batch, drop(1, 2, 0.25)).grads, "another step");
    let none = engine.step(&batch, None);
    assert_ne!(one.grads, none.grads, "no dropout");
    assert_eq!(engine.step(&batch, drop(1, 1, 0.0)), none, "p = 0 is no dropout");
}

#[test]
fn decoding_with_a_cache_gives_the_logits_of_the_whole_sequence() {
    for config in [plain(), everything()] {
        let mut engine = Engine::new(&config, Some(&adapter(&config, "all-linear")), &[]);
        let host = sequence(&config, 8, 19, 0);
        let (v, whole) = (config.vocab_size, engine.logits(&host));
        let mut cache = engine.model.new_cache(&mut engine.backend, 19).expect("a cache");
        let mut start = 0;
        for n in [5, 1, 1, 7, 1, 4] {
            let tokens = &host.tokens[start..start + n];
            let logits = engine.model.decode(&mut engine.backend, &mut cache, tokens).expect("decode");
            start += n;
            let expected = &whole[(start - 1) * v..start * v];
            assert!(distance(&logits, expected) < ROUNDING, "after {start}: {:e}", distance(&logits, expected));
        }
        assert_eq!(cache.len, 19);
    }
}

/// torch.optim.AdamW for one step from m = v = 0, in f64.
fn adamw_once(w: f32, g: f32, clip: f64, lr: f64, wd: f64) -> f64 {
    let g = f64::from(g) * clip;
    let (m, v) = (0.1 * g, 0.001 * g * g);
    f64::from(w) * (1.0 - lr * wd) - lr * (m / 0.1) / ((v / 0.001).sqrt() + 1e-8)
}

fn new_optimizer(engine: &mut Engine, kind: OptimKind, adapter: &HostAdapter) -> Optimizer {
    let tensors = adapter.layout.tensor_lens();
    engine
        .backend
        .new_optimizer(NewOptimizer { kind, init: &adapter.weights, tensors: &tensors })
        .expect("an optimizer")
}

#[test]
fn one_step_of_adamw_matches_the_formula_with_the_clip_active_and_not() {
    let config = plain();
    let adapter = adapter(&config, "all-linear");
    let len = adapter.layout.len;
    for max_grad_norm in [0.01, 1e6, 0.0] {
        let mut engine = Engine::new(&config, Some(&adapter), &[]);
        let mut state = new_optimizer(&mut engine, OptimKind::AdamwTorch, &adapter);
        let step = engine.step(&four(), None);
        let half = len / 2;
        let groups = vec![
            ParamGroup { range: 0..half, lr: 1e-3, weight_decay: 0.01 },
            ParamGroup { range: half..len, lr: 4e-3, weight_decay: 0.0 },
        ];
        let settings = AdamwSettings { groups, beta1: 0.9, beta2: 0.999, eps: 1e-8, max_grad_norm, step: 1 };
        engine.model.optimizer_step(&mut engine.backend, &mut state, &settings).expect("a step");
        let trained = engine.backend.read_optimizer(&state).expect("its state").master;
        let clip = match f64::from(max_grad_norm) / (f64::from(step.norm) + 1e-6) {
            coefficient if max_grad_norm > 0.0 => coefficient.min(1.0),
            _ => 1.0,
        };
        assert_eq!(clip < 1.0, max_grad_norm == 0.01, "the clip is active in the first case alone");
        for (i, &trained) in trained.iter().enumerate() {
            let (lr, wd) = if i < half { (1e-3, 0.01) } else { (4e-3, 0.0) };
            let expected = adamw_once(adapter.weights[i], step.grads[i], clip, lr, wd);
            // The bits of the first moment of a vanishing gradient are lost against eps: an absolute bound.
            assert!((f64::from(trained) - expected).abs() < 1e-6, "weight {i}: {trained} against {expected}");
        }
        assert_eq!(engine.model.read_grads(&mut engine.backend).expect("gradients"), step.grads, "left as they are");
    }
}

#[test]
fn the_working_copy_follows_the_optimizer() {
    let config = plain();
    let adapter = adapter(&config, "all-linear");
    let mut engine = Engine::new(&config, Some(&adapter), &[]);
    let mut state = new_optimizer(&mut engine, OptimKind::PagedAdamw32bit, &adapter);
    let mut losses = Vec::new();
    for step in 1..=10 {
        losses.push(engine.step(&four(), None).loss);
        let groups = vec![ParamGroup { range: 0..adapter.layout.len, lr: 5e-3, weight_decay: 0.0 }];
        let settings = AdamwSettings { groups, beta1: 0.9, beta2: 0.999, eps: 1e-8, max_grad_norm: 1.0, step };
        engine.model.optimizer_step(&mut engine.backend, &mut state, &settings).expect("a step");
    }
    assert!(losses[9] < 0.7 * losses[0], "{losses:?}");
    let trained = engine.backend.read_optimizer(&state).expect("its state").master;
    let after = engine.step(&four(), None);
    engine.model.write_adapter(&mut engine.backend, &trained).expect("room for the adapter");
    assert_eq!(after, engine.step(&four(), None), "the master weights, as the CPU keeps them in f32");
}
