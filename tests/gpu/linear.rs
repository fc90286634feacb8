//! The linear op as the graph calls it, in each of its ways, against the CPU backend: groups of projections in 4 and in 16
//! bits, with and without LoRA, bias and dropout, with adapters that start inside a vector.

use half::bf16;
use halfbyte::Error;
use halfbyte::backend::cpu::Cpu;
use halfbyte::backend::cuda::{Cuda, LinearKind};
use halfbyte::backend::{Backend, Dropout, Linear, LinearBackward, LinearForward, Lora, Needs, Projection};
use halfbyte::nf4::{QuantType, quantize};
use halfbyte::rng::{Stream, uniform};
use halfbyte::tensor::{HostMatrix, HostTensor};
use libtest_mimic::Trial;

use crate::support::{Outcome, Random, poisoned, round, same, wide, within_twice};

/// n, rank, bias, 4 bits.
type Part = (usize, usize, bool, bool);

#[derive(Clone, Copy)]
struct Shape {
    name: &'static str,
    t: usize,
    k: usize,
    parts: &'static [Part],
    /// Elements of the flat vector before the first A.
    shift: usize,
    p: f32,
}

const fn shape(name: &'static str, t: usize, k: usize, parts: &'static [Part]) -> Shape {
    Shape { name, t, k, parts, shift: 0, p: 0.0 }
}

const QKV: &[Part] = &[(128, 16, false, true), (64, 16, false, true), (64, 16, false, true)];
const SHAPES: [Shape; 14] = [
    shape("qkv", 70, 128, QKV),
    shape("qkv_one_token", 1, 128, QKV),
    shape("qkv_nine_tokens", 9, 128, QKV),
    shape("qkv_with_biases", 64, 128, &[(128, 8, true, true), (64, 0, true, true), (64, 8, true, true)]),
    shape("some_adapted", 65, 64, &[(64, 0, false, true), (192, 8, false, true)]),
    shape("gate_up", 130, 192, &[(256, 32, false, true), (256, 32, false, true)]),
    shape("one_of_two_dense", 80, 128, &[(96, 8, false, false), (64, 8, false, true)]),
    shape("dense", 257, 64, &[(128, 16, true, false)]),
    shape("frozen", 300, 256, &[(100, 0, false, true)]),
    shape("many_tokens", 320, 128, &[(320, 64, false, true)]),
    shape("odd_ranks", 33, 72, &[(40, 3, false, true), (24, 5, true, true)]),
    shape("odd_sizes", 37, 61, &[(33, 4, true, true), (7, 1, false, true)]),
    Shape { shift: 3, ..shape("unaligned", 66, 128, QKV) },
    Shape { p: 0.3, ..shape("dropout", 70, 128, QKV) },
];

const KINDS: [(&str, Option<LinearKind>); 5] = [
    ("table", None),
    ("fused", Some(LinearKind::Fused)),
    ("slice", Some(LinearKind::Slice)),
    ("slice_cublas", Some(LinearKind::SliceCublas)),
    ("matvec", Some(LinearKind::Matvec)),
];

pub fn trials() -> Vec<Trial> {
    let cublas = Cuda::open(0).is_ok_and(|cuda| cuda.has_cublas());
    let mut trials = vec![];
    for (name, kind) in KINDS.into_iter().filter(|k| cublas || k.1 != Some(LinearKind::SliceCublas)) {
        for s in SHAPES {
            trials.push(Trial::test(format!("linear/{name}/{}", s.name), move || agrees(s, kind)));
        }
    }
    trials.push(Trial::test("linear/without_cublas/the_table_does_without", || {
        let cuda = Cuda::open(0)?.without_cublas();
        assert!(!cuda.has_cublas());
        agrees_on(cuda, shape("many_tokens", 320, 128, QKV))
    }));
    trials
}

const DROPOUT: (u64, u32) = (77, 5);

fn agrees(s: Shape, kind: Option<LinearKind>) -> Outcome {
    agrees_on(Cuda::open(0)?.with_linear(kind), s)
}

/// What a group needs on a backend.
fn group<B: Backend>(
    backend: &mut B,
    s: Shape,
    weights: &[HostMatrix],
    biases: &[Vec<f32>],
) -> Result<Linear<B>, Error> {
    let (mut at, mut group) = (s.shift, Linear { k: s.k, n: 0, r: 0, parts: vec![] });
    for (i, &(n, r, bias, _)) in s.parts.iter().enumerate() {
        let bias = match bias {
            true => {
                let mut buffer = backend.alloc_act(n)?;
                backend.write_act(&mut buffer, &biases[i])?;
                Some(buffer)
            }
            false => None,
        };
        let scale = [2.0, 0.75, 1.25][i];
        let lora = (r > 0).then(|| Lora { a: at, b: at + r * s.k, r, scale, site: 11 + i as u32 });
        at += r * (s.k + n);
        group.n += n;
        group.r += r;
        group.parts.push(Projection { n, w: backend.upload(&weights[i])?, bias, lora });
    }
    Ok(group)
}

/// Results of forward and backward.
struct Results {
    y: Vec<f32>,
    dx: Vec<f32>,
    d_lora: Vec<f32>,
}

struct Inputs {
    x: Vec<f32>,
    dy: Vec<f32>,
    lora: Vec<f32>,
    before: Vec<f32>,
    dropout: Option<Dropout>,
}

fn run<B: Backend>(
    backend: &mut B,
    w: &Linear<B>,
    t: usize,
    inputs: &Inputs,
    [y, h, dh, dx]: [&mut B::Act; 4],
) -> Result<Results, Error> {
    let (mut x, mut dy) = (backend.alloc_act(t * w.k)?, backend.alloc_act(t * w.n)?);
    backend.write_act(&mut x, &inputs.x)?;
    backend.write_act(&mut dy, &inputs.dy)?;
    let mut lora = backend.alloc_act(inputs.lora.len())?;
    backend.write_act(&mut lora, &inputs.lora)?;
    let mut d_lora = backend.alloc_f32(inputs.lora.len())?;
    backend.write_f32(&mut d_lora, &inputs.before)?;
    let dropout = inputs.dropout;
    backend.linear_forward(LinearForward { y, h, x: &x, w, lora: Some(&lora), t, dropout })?;
    let (d, a) = (&mut d_lora, &lora);
    let dx_out = Some(&mut *dx);
    backend.linear_backward(LinearBackward { dx: dx_out, d_lora: d, dh, dy: &dy, x: &x, h, w, lora: a, t, dropout })?;
    let mut results = Results { y: vec![0.0; t * w.n], dx: vec![0.0; t * w.k], d_lora: vec![0.0; inputs.lora.len()] };
    backend.read_act(y, &mut results.y)?;
    backend.read_act(dx, &mut results.dx)?;
    backend.read_f32(&d_lora, &mut results.d_lora)?;
    Ok(results)
}

fn agrees_on(mut cuda: Cuda, s: Shape) -> Outcome {
    let mut cpu = Cpu::new(Some(1));
    let mut random = Random::new((s.t * 1000 + s.k) as u64);
    let mut weights = vec![];
    let mut biases = vec![];
    for &(n, _, _, four_bits) in s.parts {
        let dense = HostTensor::from_f32(vec![n, s.k], &wide(&random.bf16s(n * s.k, 0.1)));
        weights.push(match four_bits {
            true => HostMatrix::Quantized(quantize(&dense, QuantType::Nf4, n % 3 != 0)),
            false => HostMatrix::Dense(dense),
        });
        biases.push(wide(&random.bf16s(n, 1.0)));
    }
    let p: usize = s.shift + s.parts.iter().map(|&(n, r, ..)| r * (s.k + n)).sum::<usize>();
    let (n, r): (usize, usize) = (s.parts.iter().map(|p| p.0).sum(), s.parts.iter().map(|p| p.1).sum());
    let inputs = Inputs {
        x: wide(&random.bf16s(s.t * s.k, 1.0)),
        dy: wide(&random.bf16s(s.t * n, 1.0)),
        lora: wide(&random.bf16s(p, 0.2)),
        before: random.f32s(p, 1.0),
        dropout: (s.p > 0.0).then_some(Dropout { p: s.p, seed: DROPOUT.0, step: DROPOUT.1 }),
    };

    let w = group(&mut cpu, s, &weights, &biases)?;
    let mut room: Vec<Vec<f32>> = [n, r, r, s.k].iter().map(|width| vec![0.0; s.t * width]).collect();
    let [y, h, dh, dx] = &mut room[..] else { return Err("four buffers".into()) };
    let exact = run(&mut cpu, &w, s.t, &inputs, [y, h, dh, dx])?;

    let part = s.parts.iter().map(|p| p.0 * s.k).max().unwrap_or(0);
    let needs = Needs {
        t: s.t,
        c: s.k,
        v: 8,
        part,
        group: n * s.k,
        n,
        k: s.k,
        r,
        trainable: p,
        heads: None,
        train: true,
        dropout: s.p > 0.0,
    };
    cuda.prepare(&needs)?;
    let w = group(&mut cuda, s, &weights, &biases)?;
    let mut twice = vec![];
    for _ in 0..2 {
        let (mut y, mut h) = (poisoned::<bf16>(&cuda, s.t * n)?, poisoned::<bf16>(&cuda, s.t * r)?);
        let (mut dh, mut dx) = (poisoned::<bf16>(&cuda, s.t * r)?, poisoned::<bf16>(&cuda, s.t * s.k)?);
        twice.push(run(&mut cuda, &w, s.t, &inputs, [&mut y, &mut h, &mut dh, &mut dx])?);
    }
    let (found, again) = (&twice[0], &twice[1]);
    same("y again", &again.y, &found.y)?;
    same("dx again", &again.dx, &found.dx)?;
    same("d_lora again", &again.d_lora, &found.d_lora)?;

    let plain = plain(s, &weights, &biases, &inputs);
    within_twice("y", &found.y, &plain.y, &exact.y)?;
    within_twice("dx", &found.dx, &plain.dx, &exact.dx)?;
    within_twice("d_lora", &found.d_lora, &plain.d_lora, &exact.d_lora)
}

/// c (m, n) = a (m, k) · b (k, n), summed in f64.
fn product(a: &[f32], b: &[f32], (m, n, k): (usize, usize, usize)) -> Vec<f32> {
    let mut c = vec![0.0f64; m * n];
    for i in 0..m {
        for l in 0..k {
            let a = f64::from(a[i * k + l]);
            let row = c[i * n..(i + 1) * n].iter_mut().zip(&b[l * n..(l + 1) * n]);
            row.for_each(|(c, b)| *c += a * f64::from(*b));
        }
    }
    c.into_iter().map(|c| c as f32).collect()
}

fn transposed(a: &[f32], (rows, columns): (usize, usize)) -> Vec<f32> {
    (0..rows * columns).map(|i| a[i % rows * columns + i / rows]).collect()
}

fn rounded(x: Vec<f32>) -> Vec<f32> {
    x.into_iter().map(round).collect()
}

/// A chain of bf16 ops: operands, and the result of every product and sum, in bf16.
fn plain(s: Shape, weights: &[HostMatrix], biases: &[Vec<f32>], inputs: &Inputs) -> Results {
    let (t, k) = (s.t, s.k);
    let n_all: usize = s.parts.iter().map(|p| p.0).sum();
    let (mut y_all, mut dx_all) = (vec![0.0; t * n_all], vec![0.0; t * k]);
    let mut d_lora = inputs.before.clone();
    let (mut at, mut column) = (s.shift, 0);
    for (i, &(n, r, bias, _)) in s.parts.iter().enumerate() {
        let w = rounded(weights[i].to_f32());
        let dy: Vec<f32> = (0..t * n).map(|j| inputs.dy[j / n * n_all + column + j % n]).collect();
        let mut y = rounded(product(&inputs.x, &transposed(&w, (n, k)), (t, n, k)));
        let add = |to: &mut Vec<f32>, more: &[f32]| to.iter_mut().zip(more).for_each(|(a, b)| *a = round(*a + b));
        add(&mut dx_all, &rounded(product(&dy, &w, (t, k, n))));
        if r > 0 {
            let (scale, a, b) = ([2.0, 0.75, 1.25][i], at, at + r * k);
            let (a_w, b_w) = (&inputs.lora[a..b], &inputs.lora[b..b + n * r]);
            let keep = |j: usize| match inputs.dropout {
                Some(d) => {
                    let index = (u64::from(d.step) << 32) + j as u64;
                    if uniform(d.seed, Stream::Dropout, 11 + i as u32, index) >= d.p { 1.0 / (1.0 - d.p) } else { 0.0 }
                }
                None => 1.0,
            };
            let x: Vec<f32> = inputs.x.iter().enumerate().map(|(j, x)| round(x * keep(j))).collect();
            let scaled = |x: Vec<f32>| -> Vec<f32> { x.into_iter().map(|x| round(round(x) * scale)).collect() };
            let h = scaled(product(&x, &transposed(a_w, (r, k)), (t, r, k)));
            add(&mut y, &rounded(product(&h, &transposed(b_w, (n, r)), (t, n, r))));
            let dh = scaled(product(&dy, b_w, (t, r, n)));
            let through = rounded(product(&dh, a_w, (t, k, r)));
            let through: Vec<f32> = through.iter().enumerate().map(|(j, g)| round(g * keep(j))).collect();
            add(&mut dx_all, &through);
            let d_b = product(&transposed(&dy, (t, n)), &h, (n, r, t));
            let d_a = product(&transposed(&dh, (t, r)), &x, (r, k, t));
            d_lora[a..b].iter_mut().zip(rounded(d_a)).for_each(|(to, d)| *to += d);
            d_lora[b..b + n * r].iter_mut().zip(rounded(d_b)).for_each(|(to, d)| *to += d);
        }
        if bias {
            y.iter_mut().enumerate().for_each(|(j, y)| *y = round(*y + biases[i][j % n]));
        }
        for (j, y) in y.into_iter().enumerate() {
            y_all[j / n * n_all + column + j % n] = y;
        }
        at += r * (k + n);
        column += n;
    }
    Results { y: y_all, dx: dx_all, d_lora }
}
