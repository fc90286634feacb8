//! Gradients against central differences of the loss, for models that no fixture covers.

use halfbyte::backend::{Dropout, HostBatch};
use halfbyte::checkpoint::QuantConfig;
use halfbyte::model::{HostAdapter, ModelConfig, RopeScaling};
use halfbyte::nf4::QuantType;

use crate::tiny::{Engine, adapter, everything, plain, row, sequence};

/// Largest error allowed in a slope, as a share of the gradient's norm. f32 losses leave at most half of it.
const SHARE: f64 = 1e-3;

/// Checks the gradient of every tensor along itself, by two central differences whose cubic errors cancel.
fn check(name: &str, config: &ModelConfig, adapter: &HostAdapter, quantize: Option<QuantConfig>, p: f32) {
    let mut engine = Engine::load(config, Some(adapter), &[], quantize);
    let batch = [row(&[&sequence(config, 1, 11, 2), &sequence(config, 2, 7, 3)]), sequence(config, 3, 9, 1)];
    let dropout = (p > 0.0).then_some(Dropout { p, seed: 4, step: 6 });
    let grads = engine.step(&batch, dropout).grads;
    let total = norm(&grads);
    assert!(total > 0.0, "{name}: no gradient at all");
    for site in &adapter.layout.sites {
        for (which, range) in [('A', site.a_range()), ('B', site.b_range())] {
            let slope = norm(&grads[range.clone()]);
            assert!(slope > 1e-3 * total, "{name}: the gradient of {} is all but zero", site.peft_name(which));
            let along: Vec<f64> = grads[range.clone()].iter().map(|&g| f64::from(g) / slope).collect();
            let mut loss = |by: f64| {
                let mut weights = adapter.weights.clone();
                for (w, d) in weights[range.clone()].iter_mut().zip(&along) {
                    *w += (by * d) as f32;
                }
                f64::from(loss_at(&mut engine, &weights, &batch, dropout))
            };
            // Far enough for the loss to move well above its rounding, near enough for the series to hold.
            let h = 0.01;
            let mut central = |h: f64| (loss(h) - loss(-h)) / (2.0 * h);
            let measured = (4.0 * central(h) - central(2.0 * h)) / 3.0;
            let error = (measured - slope).abs();
            let place = site.peft_name(which);
            assert!(error < SHARE * slope + 1e-4, "{name}: {place}: slope {measured}, gradient {slope}");
        }
    }
}

fn norm(x: &[f32]) -> f64 {
    x.iter().map(|&g| f64::from(g) * f64::from(g)).sum::<f64>().sqrt()
}

fn loss_at(engine: &mut Engine, weights: &[f32], batch: &[HostBatch], dropout: Option<Dropout>) -> f32 {
    engine.model.write_adapter(&mut engine.backend, weights).expect("room for the adapter");
    engine.step(batch, dropout).loss
}

const NF4: Option<QuantConfig> = Some(QuantConfig { quant_type: QuantType::Nf4, double_quant: true });
const FP4: Option<QuantConfig> = Some(QuantConfig { quant_type: QuantType::Fp4, double_quant: false });

#[test]
fn gradients_match_differences_of_the_loss_with_norms_biases_and_windows() {
    let config = everything();
    check("everything", &config, &adapter(&config, "all-linear"), NF4, 0.0);
}

#[test]
fn gradients_match_differences_of_the_loss_under_dropout() {
    let config = everything();
    check("dropout", &config, &adapter(&config, "all-linear"), NF4, 0.2);
}

#[test]
fn gradients_match_differences_of_the_loss_over_dense_and_fp4_weights() {
    let config = ModelConfig { rope_scaling: RopeScaling::Linear { factor: 4.0 }, ..plain() };
    check("dense", &config, &adapter(&config, "all-linear"), None, 0.0);
    check("fp4", &config, &adapter(&config, "all-linear"), FP4, 0.0);
}

#[test]
fn gradients_match_differences_of_the_loss_whichever_projections_are_adapted() {
    let config = ModelConfig { qkv_bias: true, tie_word_embeddings: false, ..everything() };
    for targets in
        [r".*\.q_proj", r".*1\.self_attn\.[kv]_proj", r".*\.o_proj", r".*2\.mlp\.(up|down)_proj", r".*gate_proj"]
    {
        check(targets, &config, &adapter(&config, targets), NF4, 0.0);
    }
}
