use super::*;
use crate::backend::{Adamw, OptimKind, OptimizerState, ParamGroup};

#[test]
fn grad_norm_is_the_root_of_the_sum_of_squares() {
    let mut cpu = cpu();
    for n in [0, 1, 257, 50_001] {
        let g = random(1, n);
        let mut norm = poisoned(1);
        cpu.grad_norm(&mut norm, &g).unwrap();
        let want: f64 = wide(&g).iter().map(|g| g * g).sum::<f64>().sqrt();
        assert_close("norm", &norm, &[want], 1e-7);
    }
    let mut norm = vec![0.0];
    cpu.grad_norm(&mut norm, &vec![1.0, f32::NAN]).unwrap();
    assert!(norm[0].is_nan());
}

struct Run {
    state: OptimizerState,
    lora: Vec<f32>,
}

fn step(cpu: &mut Cpu, run: &mut Run, grads: &Vec<f32>, groups: &[ParamGroup], max: f32, step: u64) -> Result<()> {
    let mut norm = vec![0.0];
    cpu.grad_norm(&mut norm, grads)?;
    let (state, lora) = (&mut run.state, &mut run.lora);
    let (beta1, beta2, eps) = (0.9, 0.99, 1e-8);
    cpu.adamw(Adamw { state, lora, grads, norm: &norm, groups, beta1, beta2, eps, max_grad_norm: max, step })
}

#[test]
fn adamw_follows_its_formula_over_groups_with_and_without_clipping() {
    let mut cpu = cpu();
    let p = 40_003;
    let split = 17_001;
    let groups = [
        ParamGroup { range: split..p, lr: 3e-3, weight_decay: 0.0 },
        ParamGroup { range: 0..split, lr: 1e-2, weight_decay: 0.1 },
    ];
    for max in [0.0, 0.5, 1e9] {
        let init = random(1, p);
        let mut run = Run { state: cpu.new_optimizer(OptimKind::AdamwTorch, &init).unwrap(), lora: poisoned(p) };
        let (mut w, mut m, mut v) = (wide(&init), vec![0.0; p], vec![0.0; p]);
        for t in 1..=3 {
            let grads = random(10 + t, p);
            step(&mut cpu, &mut run, &grads, &groups, max, u64::from(t)).unwrap();
            let norm = wide(&grads).iter().map(|g| g * g).sum::<f64>().sqrt();
            let clip = if max > 0.0 { (f64::from(max) / (norm + 1e-6)).min(1.0) } else { 1.0 };
            for g in &groups {
                for i in g.range.clone() {
                    let grad = f64::from(grads[i]) * clip;
                    w[i] *= 1.0 - f64::from(g.lr) * f64::from(g.weight_decay);
                    m[i] = 0.9 * m[i] + 0.1 * grad;
                    v[i] = 0.99 * v[i] + 0.01 * grad * grad;
                    let (mh, vh) = (m[i] / (1.0 - 0.9f64.powi(t as i32)), v[i] / (1.0 - 0.99f64.powi(t as i32)));
                    w[i] -= f64::from(g.lr) * mh / (vh.sqrt() + 1e-8);
                }
            }
        }
        assert_close("master", &run.state.master, &w, 1e-6);
        assert_close("lora", &run.lora, &w, 1e-6);
        assert_close("m", &run.state.m, &m, 1e-6);
        assert_close("v", &run.state.v, &v, 1e-5);
        assert_eq!(run.lora[..p], run.state.master[..]);
    }
}

#[test]
fn adamw_updates_nothing_where_the_norm_is_not_finite() {
    let mut cpu = cpu();
    let mut run =
        Run { state: cpu.new_optimizer(OptimKind::PagedAdamw32bit, &[1.0, 2.0]).unwrap(), lora: vec![7.0; 2] };
    let groups = [ParamGroup { range: 0..2, lr: 1.0, weight_decay: 0.1 }];
    for bad in [f32::NAN, f32::INFINITY] {
        step(&mut cpu, &mut run, &vec![bad, 1.0], &groups, 1.0, 1).unwrap();
        assert_eq!(run.state, OptimizerState { master: vec![1.0, 2.0], m: vec![0.0; 2], v: vec![0.0; 2] });
        assert_eq!(run.lora, [7.0; 2]);
    }
}

#[test]
fn adamw_refuses_groups_that_do_not_cover_the_weights_once() {
    let mut cpu = cpu();
    let mut run = Run { state: cpu.new_optimizer(OptimKind::AdamwTorch, &[1.0; 4]).unwrap(), lora: vec![0.0; 4] };
    let group = |range| ParamGroup { range, lr: 1.0, weight_decay: 0.0 };
    let grads = vec![1.0; 4];
    let result = step(&mut cpu, &mut run, &grads, &[group(0..3)], 0.0, 1);
    assert_shape_error(result, "adamw", "groups (weights covered)");
    let result = step(&mut cpu, &mut run, &grads, &[group(0..2), group(1..3)], 0.0, 1);
    assert_shape_error(result, "adamw", "groups (overlap)");
    let result = step(&mut cpu, &mut run, &grads, &[group(1..5)], 0.0, 1);
    assert_shape_error(result, "adamw", "groups (end)");
}

#[test]
fn optimizer_state_goes_out_and_in_unchanged() {
    let mut cpu = cpu();
    let state = OptimizerState { master: random(1, 9), m: random(2, 9), v: random(3, 9) };
    let mut device = cpu.new_optimizer(OptimKind::AdamwTorch, &[0.0; 9]).unwrap();
    cpu.write_optimizer(&mut device, &state).unwrap();
    assert_eq!(cpu.read_optimizer(&device).unwrap(), state);
    let mut short = cpu.new_optimizer(OptimKind::AdamwTorch, &[0.0; 8]).unwrap();
    assert_shape_error(cpu.write_optimizer(&mut short, &state), "write_optimizer", "master");
}
