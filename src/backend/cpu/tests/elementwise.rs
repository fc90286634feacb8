use super::*;
use crate::backend::cpu::gemm::{Mat, MatMut, Threads, Write, gemm};
use crate::backend::cpu::math;
use crate::backend::{
    HeadNormBackward, HeadNormForward, Heads, RmsNormBackward, RmsNormForward, Rope, SwigluBackward, SwigluForward,
};

#[test]
fn exp_is_within_two_ulp_and_keeps_nan_and_infinity() {
    for i in -86_900..88_700 {
        let x = i as f32 * 1e-3;
        let want = f64::from(x).exp();
        let ulp = f64::from((want as f32).next_up()) - want.min(f64::from(f32::MAX));
        assert!((f64::from(math::exp(x)) - want).abs() <= 2.0 * ulp.max(want * 6e-8), "exp({x}) = {}", math::exp(x));
    }
    assert_eq!(math::exp(f32::NEG_INFINITY), 0.0);
    assert_eq!(math::exp(-200.0), 0.0);
    assert_eq!(math::exp(0.0), 1.0);
    assert_eq!(math::exp(89.0), f32::INFINITY);
    assert_eq!(math::exp(f32::INFINITY), f32::INFINITY);
    assert!(math::exp(f32::NAN).is_nan());
    assert_eq!(math::sigmoid(f32::NEG_INFINITY), 0.0);
    assert_eq!(math::sigmoid(f32::INFINITY), 1.0);
}

#[test]
fn max_and_sums_cover_every_length() {
    for n in [0, 1, 7, 8, 31, 32, 33, 64, 100, 1000] {
        let (a, b, c) = (random(1, n), random(2, n), random(3, n));
        assert_eq!(math::max(&a), a.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        let want: f64 = (0..n).map(|i| f64::from(a[i]) * f64::from(b[i])).sum();
        assert!((f64::from(math::dot(&a, &b)) - want).abs() < 1e-5);
        let want: f64 = (0..n).map(|i| f64::from(a[i]) * f64::from(b[i]) * f64::from(c[i])).sum();
        assert!((f64::from(math::dot3(&a, &b, &c)) - want).abs() < 1e-5);
        let want: f64 = wide(&a).iter().sum();
        assert!((f64::from(math::sum(&a)) - want).abs() < 1e-5);
        let mut e = a.clone();
        let sum = math::exp_sum(&mut e, 0.25);
        let want: f64 = a.iter().map(|&a| (f64::from(a) - 0.25).exp()).sum();
        assert!((f64::from(sum) - want).abs() <= 1e-5 * want.max(1.0));
    }
}

#[test]
fn gemm_multiplies_any_layout_and_ignores_what_the_output_held() {
    for (m, n, k) in [(1, 1, 1), (1, 17, 5), (33, 1, 70), (16, 16, 2), (40, 37, 19), (65, 130, 300), (3, 5, 0)] {
        for (ta, tb) in [(false, false), (false, true), (true, false), (true, true)] {
            let pad = 3;
            let (sa, sb) = (if ta { m } else { k } + pad, if tb { k } else { n } + pad);
            let (a, b) = (random(1, (m.max(k) + 1) * sa), random(2, (n.max(k) + 1) * sb));
            let at = |i: usize, l: usize| f64::from(if ta { a[l * sa + i] } else { a[i * sa + l] });
            let bt = |l: usize, j: usize| f64::from(if tb { b[j * sb + l] } else { b[l * sb + j] });
            let (va, vb) = (Mat::rows(&a, sa), Mat::rows(&b, sb));
            let (va, vb) = (if ta { va.t() } else { va }, if tb { vb.t() } else { vb });
            for threads in [Threads::One, Threads::All] {
                let mut c = vec![f32::NAN; m * n];
                gemm(threads, (m, n, k), 0.5, va, vb, Write::Set, MatMut::rows(&mut c, n));
                let product = |i: usize, j: usize| (0..k).map(|l| at(i, l) * bt(l, j)).sum::<f64>() * 0.5;
                let want: Vec<f64> = (0..m * n).map(|e| product(e / n, e % n)).collect();
                let same = |c: &[f32], factor: f64| {
                    c.iter().zip(&want).all(|(c, w)| (f64::from(*c) - factor * w).abs() < 1e-4)
                };
                assert!(same(&c, 1.0), "{m} {n} {k} {ta} {tb}");
                gemm(threads, (m, n, k), 0.5, va, vb, Write::Add, MatMut::rows(&mut c, n));
                assert!(same(&c, 2.0), "add: {m} {n} {k} {ta} {tb}");
            }
        }
    }
}

/// y, r, s of RMSNorm.
fn naive_norm(x: &[f64], w: &[f64], c: usize, eps: f64) -> (Vec<f64>, Vec<f64>) {
    let (mut y, mut r) = (vec![], vec![]);
    for row in x.chunks(c) {
        let rstd = 1.0 / (row.iter().map(|x| x * x).sum::<f64>() / c as f64 + eps).sqrt();
        r.push(rstd);
        y.extend(row.iter().zip(w).map(|(x, w)| rstd * x * w));
    }
    (y, r)
}

#[test]
fn rmsnorm_forward_matches_with_and_without_residual() {
    let mut cpu = cpu();
    for (t, c) in [(1, 1), (1, 64), (5, 33), (130, 200), (3, 20_000)] {
        let (x, delta, w) = (random(1, t * c), random(2, t * c), random(3, c));
        for with in [false, true] {
            let (mut y, mut rstd, mut s) = (poisoned(t * c), poisoned(t), poisoned(t * c));
            let residual = with.then_some((&delta, &mut s));
            let a = RmsNormForward { y: &mut y, rstd: &mut rstd, x: &x, residual, w: &w, t, c, eps: 1e-5 };
            cpu.rmsnorm_forward(a).unwrap();
            let sum: Vec<f64> =
                x.iter().zip(&delta).map(|(x, d)| f64::from(*x) + if with { f64::from(*d) } else { 0.0 }).collect();
            let (want, want_r) = naive_norm(&sum, &wide(&w), c, 1e-5);
            assert_close("y", &y, &want, 1e-6);
            assert_close("rstd", &rstd, &want_r, 1e-6);
            if with {
                assert_close("s", &s, &sum, 1e-7);
            } else {
                assert!(s.iter().all(|s| s.is_nan()), "s is not an output without a residual");
            }
        }
    }
}

#[test]
fn rmsnorm_backward_adds_the_gradient() {
    let mut cpu = cpu();
    for (t, c) in [(1, 1), (1, 64), (4, 33), (40, 7)] {
        let (x, dy, w, before) = (random(1, t * c), random(2, t * c), random(3, c), random(4, t * c));
        let (_, r) = naive_norm(&wide(&x), &wide(&w), c, 1e-3);
        let rstd: Vec<f32> = r.iter().map(|&r| r as f32).collect();
        let mut dx = before.clone();
        cpu.rmsnorm_backward(RmsNormBackward { dx: &mut dx, dy: &dy, x: &x, w: &w, rstd: &rstd, t, c }).unwrap();
        let gradient = differences(&wide(&x), |x| weighted(&naive_norm(x, &wide(&w), c, 1e-3).0, &dy));
        let want: Vec<f64> = gradient.iter().zip(&before).map(|(g, b)| g + f64::from(*b)).collect();
        assert_close("dx", &dx, &want, 1e-5);
    }
}

fn naive_head_norm(x: &[f64], q_w: &[f64], k_w: &[f64], h: Heads, eps: f64) -> (Vec<f64>, Vec<f64>) {
    let (mut y, mut r) = (vec![], vec![]);
    for row in x.chunks(h.qkv()) {
        for (head, x) in row.chunks(h.d).enumerate() {
            if head >= h.h + h.g {
                y.extend_from_slice(x);
                continue;
            }
            let (yy, rr) = naive_norm(x, if head < h.h { q_w } else { k_w }, h.d, eps);
            y.extend(yy);
            r.extend(rr);
        }
    }
    (y, r)
}

#[test]
fn head_norm_matches_forward_and_backward() {
    let mut cpu = cpu();
    for (t, h, g, d) in [(1, 1, 1, 2), (5, 4, 2, 6), (9, 3, 1, 40)] {
        let heads = Heads { h, g, d, window: None };
        let n = t * heads.qkv();
        let (x, dy, q_w, k_w) = (random(1, n), random(2, n), random(3, d), random(4, d));
        let (mut y, mut rstd) = (poisoned(n), poisoned(t * (h + g)));
        let a = HeadNormForward { y: &mut y, rstd: &mut rstd, x: &x, q_w: &q_w, k_w: &k_w, t, heads, eps: 1e-3 };
        cpu.head_norm_forward(a).unwrap();
        let naive = |x: &[f64]| naive_head_norm(x, &wide(&q_w), &wide(&k_w), heads, 1e-3);
        let (want, want_r) = naive(&wide(&x));
        assert_close("y", &y, &want, 1e-6);
        assert_close("rstd", &rstd, &want_r, 1e-6);
        let mut dqkv = dy.clone();
        let a = HeadNormBackward { dqkv: &mut dqkv, x: &x, rstd: &rstd, q_w: &q_w, k_w: &k_w, t, heads };
        cpu.head_norm_backward(a).unwrap();
        assert_close("dqkv", &dqkv, &differences(&wide(&x), |x| weighted(&naive(x).0, &dy)), 1e-5);
    }
}

#[test]
fn rope_turns_queries_and_keys_and_backward_turns_back() {
    let mut cpu = cpu();
    for (t, h, g, d) in [(1, 1, 1, 2), (7, 4, 2, 6), (300, 3, 1, 16)] {
        let heads = Heads { h, g, d, window: None };
        let half = d / 2;
        let x = random(1, t * heads.qkv());
        let positions: Vec<i32> = (0..t as i32).map(|i| (i * 37) % 1000).collect();
        let inv_freq: Vec<f32> = (0..half).map(|i| 10_000f32.powf(-(i as f32) / half as f32)).collect();
        let mut y = x.clone();
        // Twice with other angles in between: a cached table must not outlive its inputs.
        for freq in [&inv_freq, &random(5, half), &inv_freq] {
            y.copy_from_slice(&x);
            let a = Rope { qkv: &mut y, positions: &positions, inv_freq: freq, t, heads };
            cpu.rope_forward(a).unwrap();
        }
        let mut want = wide(&x);
        for (row, p) in want.chunks_mut(heads.qkv()).zip(&positions) {
            for head in row[..(h + g) * d].chunks_mut(d) {
                for i in 0..half {
                    let (sin, cos) = f64::from(*p as f32 * inv_freq[i]).sin_cos();
                    let (a, b) = (head[i], head[i + half]);
                    head[i] = a * cos - b * sin;
                    head[i + half] = b * cos + a * sin;
                }
            }
        }
        assert_close("qkv", &y, &want, 1e-6);
        cpu.rope_backward(Rope { qkv: &mut y, positions: &positions, inv_freq: &inv_freq, t, heads }).unwrap();
        assert_close("back", &y, &wide(&x), 1e-6);
    }
}

fn naive_swiglu(x: &[f64], f: usize) -> Vec<f64> {
    x.chunks(2 * f).flat_map(|r| (0..f).map(move |i| r[i] / (1.0 + (-r[i]).exp()) * r[f + i])).collect()
}

#[test]
fn swiglu_matches_forward_and_backward() {
    let mut cpu = cpu();
    for (t, f) in [(1, 1), (3, 35), (70, 4)] {
        let x: Vec<f32> = random(1, t * 2 * f).iter().map(|x| 8.0 * x).collect();
        let dy = random(2, t * f);
        let (mut y, mut dx) = (poisoned(t * f), x.clone());
        cpu.swiglu_forward(SwigluForward { y: &mut y, gate_up: &x, t, f }).unwrap();
        assert_close("y", &y, &naive_swiglu(&wide(&x), f), 1e-6);
        cpu.swiglu_backward(SwigluBackward { gate_up: &mut dx, dy: &dy, t, f }).unwrap();
        let want = differences(&wide(&x), |x| weighted(&naive_swiglu(x, f), &dy));
        assert_close("d_gate_up", &dx, &want, 1e-6);
    }
    let (mut y, x) = (poisoned(1), vec![-1e30, 1.0]);
    cpu.swiglu_forward(SwigluForward { y: &mut y, gate_up: &x, t: 1, f: 1 }).unwrap();
    assert_eq!(y[0], 0.0, "a gate far below zero closes");
}

#[test]
fn wrong_sizes_name_op_and_argument() {
    let mut cpu = cpu();
    let (x, w, mut y, mut r) = (vec![0.0; 12], vec![0.0; 4], vec![0.0; 12], vec![0.0; 3]);
    let a = RmsNormForward { y: &mut y, rstd: &mut r, x: &x, residual: None, w: &w, t: 3, c: 5, eps: 0.0 };
    assert_shape_error(cpu.rmsnorm_forward(a), "rmsnorm_forward", "y");
    let a = RmsNormForward { y: &mut y, rstd: &mut r, x: &x, residual: None, w: &w, t: 4, c: 3, eps: 0.0 };
    assert_shape_error(cpu.rmsnorm_forward(a), "rmsnorm_forward", "rstd");
    let a = SwigluForward { y: &mut y, gate_up: &x, t: 3, f: 3 };
    assert_shape_error(cpu.swiglu_forward(a), "swiglu_forward", "gate_up");
    let heads = Heads { h: 1, g: 1, d: 3, window: None };
    let a = Rope { qkv: &mut y, positions: &vec![0], inv_freq: &w, t: 1, heads };
    assert_shape_error(cpu.rope_forward(a), "rope_forward", "heads.d (even)");
}
