use super::*;
use crate::backend::adamw::{Blocks, MOMENT_BLOCK};
use crate::backend::{Adamw, Moment, NewOptimizer, OptimKind, OptimizerState, ParamGroup};
use crate::nf4::codebook::{DYNAMIC, DYNAMIC_UNSIGNED};

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
    state: crate::backend::cpu::Optimizer,
    lora: Vec<f32>,
}

fn new(cpu: &mut Cpu, kind: OptimKind, init: &[f32], tensors: &[usize]) -> Run {
    let state = cpu.new_optimizer(NewOptimizer { kind, init, tensors }).unwrap();
    Run { state, lora: poisoned(init.len()) }
}

fn f32s(moment: &Moment) -> &[f32] {
    match moment {
        Moment::F32(values) => values,
        Moment::U8 { .. } => panic!("in 8 bits"),
    }
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
        let mut run = new(&mut cpu, OptimKind::AdamwTorch, &init, &[p]);
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
        let state = cpu.read_optimizer(&run.state).unwrap();
        assert_close("master", &state.master, &w, 1e-6);
        assert_close("lora", &run.lora, &w, 1e-6);
        assert_close("m", f32s(&state.m), &m, 1e-6);
        assert_close("v", f32s(&state.v), &v, 1e-5);
        assert_eq!(run.lora[..p], state.master[..]);
    }
}

/// bitsandbytes' order: the weights move by the fresh moments, then these are rounded to the nearest value of their map
/// times the largest magnitude of the block.
#[test]
fn moments_in_8_bits_are_the_nearest_of_their_map_in_each_block() {
    let mut cpu = cpu();
    let tensors = [3000, 256, 1, 700];
    let p = tensors.iter().sum();
    let blocks = Blocks::new(p, &tensors).unwrap();
    let groups = [
        ParamGroup { range: 0..3100, lr: 1e-2, weight_decay: 0.1 },
        ParamGroup { range: 3100..p, lr: 3e-3, weight_decay: 0.0 },
    ];
    let mut run = new(&mut cpu, OptimKind::PagedAdamw8bit, &random(1, p), &tensors);
    for t in 1..=4 {
        let before = cpu.read_optimizer(&run.state).unwrap();
        // One block without gradients: its moments stay 0.
        let mut grads = random(10 + t, p);
        grads[512..768].fill(0.0);
        step(&mut cpu, &mut run, &grads, &groups, 0.5, u64::from(t)).unwrap();
        let after = cpu.read_optimizer(&run.state).unwrap();
        let norm = wide(&grads).iter().map(|g| g * g).sum::<f64>().sqrt();
        let clip = (0.5 / (norm + 1e-6)).min(1.0);
        let value = |moment: &Moment, map: &[f32; 256], b: usize, i: usize| match moment {
            Moment::U8 { codes, absmax } => (f64::from(map[usize::from(codes[i])] * absmax[b]), f64::from(absmax[b])),
            Moment::F32(_) => panic!("in 32 bits"),
        };
        for b in 0..blocks.count() {
            assert!(blocks.range(b).len() <= MOMENT_BLOCK);
            for i in blocks.range(b) {
                let group = &groups[usize::from(i >= 3100)];
                let grad = f64::from(grads[i]) * clip;
                let m = 0.9 * value(&before.m, &DYNAMIC, b, i).0 + 0.1 * grad;
                let v = 0.99 * value(&before.v, &DYNAMIC_UNSIGNED, b, i).0 + 0.01 * grad * grad;
                let (mh, vh) = (m / (1.0 - 0.9f64.powi(t as i32)), v / (1.0 - 0.99f64.powi(t as i32)));
                let decayed = f64::from(before.master[i]) * (1.0 - f64::from(group.lr) * f64::from(group.weight_decay));
                let w = decayed - f64::from(group.lr) * mh / (vh.sqrt() + 1e-8);
                assert!((f64::from(after.master[i]) - w).abs() < 2e-6, "weight {i}: {} for {w}", after.master[i]);
                for (what, exact, moment, map) in [("m", m, &after.m, &DYNAMIC), ("v", v, &after.v, &DYNAMIC_UNSIGNED)]
                {
                    let (found, absmax) = value(moment, map, b, i);
                    let error = (found - exact).abs();
                    let best = map.iter().map(|&c| (f64::from(c) * absmax - exact).abs()).fold(f64::MAX, f64::min);
                    assert!(error <= best * 1.001 + absmax * 1e-6, "{what} {i}: {found} for {exact}");
                    assert!(what == "v" || exact == 0.0 || found * exact > 0.0, "{what} {i} changed its sign");
                }
            }
        }
    }
}

#[test]
fn adamw_updates_nothing_where_the_norm_is_not_finite() {
    let mut cpu = cpu();
    for kind in [OptimKind::PagedAdamw32bit, OptimKind::PagedAdamw8bit] {
        let mut run = new(&mut cpu, kind, &[1.0, 2.0], &[2]);
        run.lora.fill(7.0);
        let before = cpu.read_optimizer(&run.state).unwrap();
        let groups = [ParamGroup { range: 0..2, lr: 1.0, weight_decay: 0.1 }];
        for bad in [f32::NAN, f32::INFINITY] {
            step(&mut cpu, &mut run, &vec![bad, 1.0], &groups, 1.0, 1).unwrap();
            assert_eq!(cpu.read_optimizer(&run.state).unwrap(), before);
            assert!(run.lora.iter().all(|&x| x == 7.0));
        }
    }
}

#[test]
fn adamw_refuses_groups_that_do_not_cover_the_weights_once() {
    let mut cpu = cpu();
    let mut run = new(&mut cpu, OptimKind::AdamwTorch, &[1.0; 4], &[4]);
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
    let wide = OptimizerState { master: random(1, 9), m: Moment::F32(random(2, 9)), v: Moment::F32(random(3, 9)) };
    let bytes = |codes: &[u8], absmax: f32| Moment::U8 { codes: codes.to_vec(), absmax: vec![absmax, absmax + 1.0] };
    let narrow = OptimizerState {
        master: random(1, 9),
        m: bytes(&[0, 1, 2, 3, 4, 5, 126, 127, 255], 0.5),
        v: bytes(&[255, 254, 253, 252, 5, 4, 3, 2, 0], 0.25),
    };
    for (kind, state) in [(OptimKind::AdamwTorch, wide), (OptimKind::PagedAdamw8bit, narrow)] {
        let mut device = new(&mut cpu, kind, &[0.0; 9], &[4, 5]).state;
        cpu.write_optimizer(&mut device, &state).unwrap();
        assert_eq!(cpu.read_optimizer(&device).unwrap(), state);
        let mut short = new(&mut cpu, kind, &[0.0; 8], &[8]).state;
        assert_shape_error(cpu.write_optimizer(&mut short, &state), "write_optimizer", "master");
    }
}
