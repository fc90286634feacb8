use super::*;
use crate::backend::{Dropout, Linear, LinearBackward, LinearForward, Lora, Projection};
use crate::nf4::{QuantType, quantize};
use crate::tensor::{Dtype, HostMatrix, HostTensor};

/// One part of a group as the tests describe it.
#[derive(Clone, Copy)]
struct Part {
    n: usize,
    r: usize,
    bias: bool,
    kind: Kind,
}

#[derive(Clone, Copy)]
enum Kind {
    F32,
    Bf16,
    F16,
    Nf4,
    Fp4,
}

fn host_matrix(kind: Kind, n: usize, k: usize, seed: u32) -> HostMatrix {
    let values = random(seed, n * k);
    let dense = HostTensor::from_f32(vec![n, k], &values);
    let narrow = |dtype, f: fn(f32) -> [u8; 2]| {
        HostTensor::owned(dtype, vec![n, k], values.iter().flat_map(|&x| f(x)).collect())
    };
    match kind {
        Kind::F32 => HostMatrix::Dense(dense),
        Kind::Bf16 => HostMatrix::Dense(narrow(Dtype::Bf16, |x| half::bf16::from_f32(x).to_le_bytes())),
        Kind::F16 => HostMatrix::Dense(narrow(Dtype::F16, |x| half::f16::from_f32(x).to_le_bytes())),
        Kind::Nf4 => HostMatrix::Quantized(quantize(&dense, QuantType::Nf4, true)),
        Kind::Fp4 => HostMatrix::Quantized(quantize(&dense, QuantType::Fp4, false)),
    }
}

struct Group {
    linear: Linear<Cpu>,
    /// Widened weights and biases.
    w: Vec<Vec<f64>>,
    lora: Vec<f32>,
}

fn group(cpu: &mut Cpu, k: usize, parts: &[Part]) -> Group {
    // The adapter starts at an odd offset, and leaves gaps.
    let mut p = 3;
    let mut linear = Linear { k, n: 0, r: 0, parts: vec![] };
    let mut w = vec![];
    for (i, part) in parts.iter().enumerate() {
        let host = host_matrix(part.kind, part.n, k, 20 + i as u32);
        w.push(wide(&host.to_f32()));
        let lora = (part.r > 0).then(|| {
            let a = p;
            p += part.r * k + 1;
            let b = p;
            p += part.n * part.r + 2;
            Lora { a, b, r: part.r, scale: 0.5 + i as f32, site: 7 + i as u32 }
        });
        let bias = part.bias.then(|| random(40 + i as u32, part.n));
        linear.n += part.n;
        linear.r += part.r;
        linear.parts.push(Projection { n: part.n, w: cpu.upload(&host).unwrap(), bias, lora });
    }
    Group { linear, w, lora: random(50, p) }
}

/// dropout(x) of one site, from the definition.
fn dropped(x: &[f64], dropout: Option<Dropout>, site: u32) -> Vec<f64> {
    let Some(d) = dropout else { return x.to_vec() };
    let keep = |i: usize| uniform(d.seed, Stream::Dropout, site, (u64::from(d.step) << 32) + i as u64) >= d.p;
    x.iter().enumerate().map(|(i, x)| if keep(i) { x / (1.0 - f64::from(d.p)) } else { 0.0 }).collect()
}

/// y (T, N) and h (T, R) by loops.
fn naive(g: &Group, x: &[f64], lora: Option<&[f64]>, t: usize, dropout: Option<Dropout>) -> (Vec<f64>, Vec<f64>) {
    let (k, n, r) = (g.linear.k, g.linear.n, g.linear.r);
    let (mut y, mut h) = (vec![0.0; t * n], vec![0.0; t * r]);
    let (mut col, mut at) = (0, 0);
    for (part, w) in g.linear.parts.iter().zip(&g.w) {
        for i in 0..t {
            for j in 0..part.n {
                let base: f64 = (0..k).map(|l| x[i * k + l] * w[j * k + l]).sum();
                y[i * n + col + j] = base + part.bias.as_ref().map_or(0.0, |b| f64::from(b[j]));
            }
        }
        if let (Some(l), Some(lora)) = (&part.lora, lora) {
            let x = dropped(x, dropout, l.site);
            for i in 0..t {
                for q in 0..l.r {
                    h[i * r + at + q] = (0..k).map(|c| x[i * k + c] * lora[l.a + q * k + c]).sum();
                }
                for j in 0..part.n {
                    let low: f64 = (0..l.r).map(|q| h[i * r + at + q] * lora[l.b + j * l.r + q]).sum();
                    y[i * n + col + j] += f64::from(l.scale) * low;
                }
            }
            at += l.r;
        }
        col += part.n;
    }
    (y, h)
}

fn check(cpu: &mut Cpu, k: usize, t: usize, parts: &[Part], dropout: Option<Dropout>) {
    let g = group(cpu, k, parts);
    let (n, r, p) = (g.linear.n, g.linear.r, g.lora.len());
    let (x, dy, before) = (random(1, t * k), random(2, t * n), random(3, p));
    let (mut y, mut h) = (poisoned(t * n), poisoned(t * r));
    let w = &g.linear;
    cpu.linear_forward(LinearForward { y: &mut y, h: &mut h, x: &x, w, lora: Some(&g.lora), t, dropout }).unwrap();
    let (want_y, want_h) = naive(&g, &wide(&x), Some(&wide(&g.lora)), t, dropout);
    assert_close("y", &y, &want_y, 1e-6);
    assert_close("h", &h, &want_h, 1e-6);

    for with_dx in [true, false] {
        let (mut dx, mut d_lora, mut dh) = (poisoned(t * k), before.clone(), poisoned(t * r));
        cpu.linear_backward(LinearBackward {
            dx: with_dx.then_some(&mut dx),
            d_lora: &mut d_lora,
            dh: &mut dh,
            dy: &dy,
            x: &x,
            h: &h,
            w,
            lora: &g.lora,
            t,
            dropout,
        })
        .unwrap();
        if with_dx {
            let want = differences(&wide(&x), |x| weighted(&naive(&g, x, Some(&wide(&g.lora)), t, dropout).0, &dy));
            assert_close("dx", &dx, &want, 1e-5);
        } else {
            assert!(dx.iter().all(|x| x.is_nan()));
        }
        let gradient =
            differences(&wide(&g.lora), |lora| weighted(&naive(&g, &wide(&x), Some(lora), t, dropout).0, &dy));
        let want: Vec<f64> = gradient.iter().zip(&before).map(|(g, b)| g + f64::from(*b)).collect();
        assert_close("d_lora", &d_lora, &want, 1e-5);
    }
}

const QKV: [Part; 3] = [
    Part { n: 10, r: 2, bias: true, kind: Kind::Nf4 },
    Part { n: 5, r: 0, bias: false, kind: Kind::Bf16 },
    Part { n: 7, r: 3, bias: true, kind: Kind::Fp4 },
];

#[test]
fn linear_matches_over_parts_with_and_without_lora_and_bias() {
    let mut cpu = cpu();
    for t in [1, 2, 6] {
        check(&mut cpu, 9, t, &QKV, None);
        check(&mut cpu, 12, t, &[Part { n: 4, r: 5, bias: false, kind: Kind::F16 }], None);
        check(&mut cpu, 1, t, &[Part { n: 3, r: 1, bias: true, kind: Kind::F32 }], None);
        check(&mut cpu, 5, t, &[Part { n: 3, r: 0, bias: false, kind: Kind::F32 }], None);
    }
}

#[test]
fn linear_drops_out_what_the_generator_says_in_both_directions() {
    let mut cpu = cpu();
    for (t, k) in [(1, 9), (7, 9), (4, 16)] {
        for (p, step) in [(0.3, 0), (0.7, 3), (0.0, 1)] {
            check(&mut cpu, k, t, &QKV, Some(Dropout { p, seed: 1 << 40 | 5, step }));
        }
    }
}

#[test]
fn linear_widens_weights_of_several_slices() {
    let mut cpu = cpu();
    // 300 rows of 200: more than one slice, the last one short; blocks of 64 straddle the rows.
    for kind in [Kind::Nf4, Kind::Bf16] {
        for t in [1, 3] {
            let g = group(&mut cpu, 200, &[Part { n: 300, r: 0, bias: false, kind }]);
            let (x, dy) = (random(1, t * 200), random(2, t * 300));
            let (mut y, mut dx) = (poisoned(t * 300), poisoned(t * 200));
            let w = &g.linear;
            let a = LinearForward { y: &mut y, h: &mut vec![], x: &x, w, lora: None, t, dropout: None };
            cpu.linear_forward(a).unwrap();
            assert_close("y", &y, &naive(&g, &wide(&x), None, t, None).0, 1e-6);
            let (d_lora, dh) = (&mut vec![], &mut vec![]);
            let (h, lora) = (&vec![], &vec![]);
            let dx_out = Some(&mut dx);
            let a = LinearBackward { dx: dx_out, d_lora, dh, dy: &dy, x: &x, h, w, lora, t, dropout: None };
            cpu.linear_backward(a).unwrap();
            let mut want = vec![0.0; t * 200];
            for i in 0..t {
                for l in 0..200 {
                    want[i * 200 + l] = (0..300).map(|j| f64::from(dy[i * 300 + j]) * g.w[0][j * 200 + l]).sum();
                }
            }
            assert_close("dx", &dx, &want, 1e-6);
        }
    }
}

#[test]
fn without_an_adapter_h_is_not_touched() {
    let mut cpu = cpu();
    let g = group(&mut cpu, 9, &QKV);
    let x = random(1, 4 * 9);
    let (mut y, mut h) = (poisoned(4 * 22), poisoned(4 * 5));
    let a = LinearForward { y: &mut y, h: &mut h, x: &x, w: &g.linear, lora: None, t: 4, dropout: None };
    cpu.linear_forward(a).unwrap();
    assert_close("y", &y, &naive(&g, &wide(&x), None, 4, None).0, 1e-6);
    assert!(h.iter().all(|h| h.is_nan()));
}

#[test]
fn dequantize_gives_the_bits_of_the_format() {
    let mut cpu = cpu();
    for kind in [Kind::F32, Kind::Bf16, Kind::F16, Kind::Nf4, Kind::Fp4] {
        let host = host_matrix(kind, 37, 51, 4);
        let w = cpu.upload(&host).unwrap();
        let mut out = poisoned(37 * 51);
        cpu.nf4_dequantize(&mut out, &w).unwrap();
        assert_eq!(out[..37 * 51], host.to_f32());
    }
}

#[test]
fn wrong_sizes_name_op_and_argument() {
    let mut cpu = cpu();
    let mut g = group(&mut cpu, 9, &QKV);
    let (x, lora) = (random(1, 4 * 9), vec![0.0; 10]);
    let (mut y, mut h) = (poisoned(4 * 22), poisoned(4 * 5));
    let mut run = |w: &Linear<Cpu>, lora: &Vec<f32>, t: usize| {
        cpu.linear_forward(LinearForward { y: &mut y, h: &mut h, x: &x, w, lora: Some(lora), t, dropout: None })
    };
    assert_shape_error(run(&g.linear, &lora, 4), "linear_forward", "lora (A)");
    assert_shape_error(run(&g.linear, &g.lora, 5), "linear_forward", "y");
    g.linear.r += 1;
    assert_shape_error(run(&g.linear, &g.lora, 4), "linear_forward", "parts (r)");
    g.linear.parts[1].n += 1;
    assert_shape_error(run(&g.linear, &g.lora, 4), "linear_forward", "parts (n)");
    g.linear.n += 1;
    g.linear.r -= 1;
    assert_shape_error(run(&g.linear, &g.lora, 4), "linear_forward", "w (n)");
    let vector = HostMatrix::Dense(HostTensor::from_f32(vec![3], &[0.0; 3]));
    assert_shape_error(cpu.upload(&vector).map(|_| ()), "upload", "w (dimensions)");
}

#[test]
fn dropout_keeps_its_place_over_the_borders_of_tasks() {
    let mut cpu = cpu();
    let (t, k) = (70, 301);
    let g = group(&mut cpu, k, &[Part { n: 2, r: 1, bias: false, kind: Kind::Nf4 }]);
    let dropout = Some(Dropout { p: 0.25, seed: 3, step: 1 });
    let (x, dy, h_in) = (random(1, t * k), random(2, t * 2), vec![0.0; t]);
    let (mut y, mut h) = (poisoned(t * 2), poisoned(t));
    let w = &g.linear;
    cpu.linear_forward(LinearForward { y: &mut y, h: &mut h, x: &x, w, lora: Some(&g.lora), t, dropout }).unwrap();
    let lora = wide(&g.lora);
    assert_close("h", &h, &naive(&g, &wide(&x), Some(&lora), t, dropout).1, 1e-6);

    let (mut dx, mut d_lora, mut dh) = (poisoned(t * k), vec![0.0; g.lora.len()], poisoned(t));
    let (dx_out, d_lora, dh, lora_in) = (Some(&mut dx), &mut d_lora, &mut dh, &g.lora);
    let (dy, x, h) = (&dy, &x, &h_in);
    cpu.linear_backward(LinearBackward { dx: dx_out, d_lora, dh, dy, x, h, w, lora: lora_in, t, dropout }).unwrap();
    // y is linear in x, so dx is a difference of two values at any distance.
    for element in [0, 63, 64, 16_383, 16_384, 16_385, t * k - 1] {
        let at = |v: f64| {
            let mut x = wide(x);
            x[element] = v;
            let row = element / k;
            weighted(&naive(&g, &x[row * k..][..k], None, 1, None).0, &dy[2 * row..])
        };
        let kept = dropped(&vec![1.0; t * k], dropout, 7)[element];
        let l = g.linear.parts[0].lora.as_ref().unwrap();
        let dy = &dy[element / k * 2..];
        let dh: f64 = (0..2).map(|j| f64::from(dy[j]) * lora[l.b + j]).sum::<f64>() * f64::from(l.scale);
        let want = at(1.0) - at(0.0) + dh * lora[l.a + element % k] * kept;
        assert!((f64::from(dx[element]) - want).abs() < 1e-5, "dx at {element}: {} {want}", dx[element]);
    }
}
