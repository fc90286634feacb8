//! The ops of csrc/lora.cu against loops in f64 written here, and their masks against src/rng.rs, bit for bit.

use half::bf16;
use halfbyte::Error;
use halfbyte::backend::cuda::Cuda;
use halfbyte::backend::cuda::memory::Buffer;
use halfbyte::backend::cuda::ops::lora::{self as ops, DropoutMask, LoraPart};
use halfbyte::rng::{Stream, uniform};
use libtest_mimic::Trial;

use crate::support::{Outcome, Random, poisoned, same, wide, within_twice};

const SEED: u64 = 0x0123_4567_89ab_cdef;
const STEP: u32 = 70_001;
/// Elements behind the end of an output, which must stay as they are.
const SPARE: usize = 5;

/// (name, T, K, (n, r) of each part, columns of y that belong to none before each part, first offset)
type Shape = (&'static str, usize, usize, &'static [(usize, usize)], usize, usize);

const SHAPES: &[Shape] = &[
    ("one_token", 1, 64, &[(64, 16)], 0, 0),
    ("one_of_everything", 1, 1, &[(1, 1)], 0, 1),
    ("eight_tokens", 8, 4096, &[(64, 16), (64, 16)], 0, 0),
    ("five_tokens_odd_sizes", 5, 2051, &[(33, 17), (70, 8), (5, 64)], 0, 3),
    ("q_k_v", 130, 256, &[(256, 16), (64, 16), (64, 16)], 0, 0),
    ("k_alone_between_others", 70, 128, &[(64, 8)], 256, 8),
    ("odd_sizes_rank_1", 77, 203, &[(97, 1)], 0, 1),
    ("three_ranks_odd_offsets", 65, 129, &[(33, 17), (70, 8), (5, 64)], 3, 3),
    ("three_ranks_even_offsets", 65, 136, &[(40, 24), (72, 8), (8, 64)], 8, 16),
    ("gate_up_rank_64", 200, 320, &[(136, 64), (136, 64)], 0, 0),
    ("rank_33", 70, 1000, &[(1030, 33)], 0, 5),
    ("rank_256", 64, 72, &[(40, 256)], 0, 0),
    ("high_ranks_together", 96, 136, &[(48, 256), (48, 200), (16, 129)], 0, 8),
    ("several_chunks_of_512_columns", 300, 512, &[(1100, 32), (1100, 8)], 0, 0),
    ("several_chunks_of_1024_columns", 513, 264, &[(2100, 16)], 4, 0),
    ("several_chunks_of_rows", 1100, 520, &[(264, 16), (264, 16)], 0, 0),
    ("large_q_k_v", 2048, 4096, &[(4096, 16), (1024, 16), (1024, 16)], 0, 0),
];

pub fn trials() -> Vec<Trial> {
    let mut trials = vec![Trial::test("lora/wrong_sizes_name_the_op_and_the_argument", wrong_sizes)];
    for &shape in SHAPES {
        for p in [0.0, 0.1] {
            let name = |op: &str| format!("lora/{op}/{}{}", shape.0, if p > 0.0 { "_dropout" } else { "" });
            trials.push(Trial::test(name("forward"), move || forward(&Case::new(shape, p)?)));
            trials.push(Trial::test(name("backward"), move || backward(&Case::new(shape, p)?)));
            trials.push(Trial::test(name("backward_x"), move || backward_x(&Case::new(shape, p)?)));
        }
        trials.push(Trial::test(format!("lora/expand/{}", shape.0), move || expand(&Case::new(shape, 0.0)?)));
        if shape.3.len() > 2 {
            let some = move |p| Case::new(shape, p).map(Case::without_the_second_part);
            let name = |op: &str| format!("lora/{op}/{}_without_the_second_part", shape.0);
            trials.push(Trial::test(name("expand"), move || expand(&some(0.0)?)));
            trials.push(Trial::test(name("backward_x"), move || backward_x(&some(0.1)?)));
        }
    }
    for (k, p) in [(136, 0.05), (136, 0.5), (131, 0.1), (254, 0.3)] {
        trials.push(Trial::test(format!("lora/masks_are_those_of_the_cpu/{k}_{p}"), move || masks(k, p)));
    }
    trials
}

/// One shape, with its operands on the host (exact in bf16) and on the device.
struct Case {
    cuda: Cuda,
    t: usize,
    k: usize,
    n: usize,
    r: usize,
    p: f32,
    parts: Vec<LoraPart>,
    lora: Vec<f32>,
    x: Vec<f32>,
    device_lora: Buffer<bf16>,
    device_x: Buffer<bf16>,
    step: Buffer<u32>,
}

impl Case {
    fn new((_, t, k, sizes, gap, shift): Shape, p: f32) -> Result<Self, Error> {
        let (mut at, mut y, mut h) = (shift, 0, 0);
        let mut parts = vec![];
        for (i, &(n, r)) in sizes.iter().enumerate() {
            y += gap;
            let scale = [2.0, 0.75, 1.25][i];
            parts.push(LoraPart { a: at, b: at + r * k, r, scale, site: 11 + i as u32, y, n, h });
            at += r * (k + n);
            y += n;
            h += r;
        }
        let mut random = Random::new((t * 1000 + k) as u64);
        let lora = random.bf16s(at, 0.3);
        let x = random.bf16s(t * k, 1.0);
        let cuda = Cuda::open(0)?;
        let (device_lora, device_x, step) = (cuda.upload(&lora)?, cuda.upload(&x)?, cuda.upload(&[STEP])?);
        Ok(Self { t, k, n: y + gap, r: h, p, parts, lora: wide(&lora), x: wide(&x), device_lora, device_x, step, cuda })
    }

    /// Its columns stay in h, y and x's gradient, for another op to use.
    fn without_the_second_part(mut self) -> Self {
        self.parts.remove(1);
        self
    }

    fn mask(&self) -> Option<DropoutMask<'_>> {
        (self.p > 0.0).then(|| DropoutMask { p: self.p, seed: SEED, step: self.step.view() })
    }

    /// 1 where element (t, k) is kept for this part, else 0.
    fn kept(&self, part: &LoraPart, t: usize, k: usize) -> f64 {
        let index = (u64::from(STEP) << 32) + (t * self.k + k) as u64;
        f64::from(u8::from(self.p == 0.0 || uniform(SEED, Stream::Dropout, part.site, index) >= self.p))
    }

    fn scratch(&self) -> Result<Buffer<f32>, Error> {
        poisoned(&self.cuda, ops::lora_scratch(self.t, self.k, self.n, self.r))
    }

    /// (exact, plain) dropout(x) of a part (T, K).
    fn dropped(&self, part: &LoraPart) -> (Vec<f64>, Vec<f64>) {
        let exact: Vec<f64> = (0..self.t * self.k)
            .map(|i| f64::from(self.x[i]) * self.kept(part, i / self.k, i % self.k) / (1.0 - f64::from(self.p)))
            .collect();
        let plain = exact.iter().map(|&v| round(v)).collect();
        (exact, plain)
    }

    fn a(&self, part: &LoraPart) -> Vec<f64> {
        self.lora[part.a..][..part.r * self.k].iter().map(|&v| f64::from(v)).collect()
    }

    fn b(&self, part: &LoraPart) -> Vec<f64> {
        self.lora[part.b..][..part.r * part.n].iter().map(|&v| f64::from(v)).collect()
    }
}

/// To bf16 and back.
fn round(x: f64) -> f64 {
    f64::from(bf16::from_f64(x).to_f32())
}

/// a (m, k) times b (k, n).
fn product(a: &[f64], b: &[f64], k: usize, n: usize) -> Vec<f64> {
    let mut c = vec![0.0; a.len() / k * n];
    for (c, a) in c.chunks_exact_mut(n).zip(a.chunks_exact(k)) {
        for (&a, b) in a.iter().zip(b.chunks_exact(n)) {
            c.iter_mut().zip(b).for_each(|(c, b)| *c += a * b);
        }
    }
    c
}

/// (rows, columns) to (columns, rows).
fn transposed(a: &[f64], columns: usize) -> Vec<f64> {
    (0..columns).flat_map(|c| a.iter().skip(c).step_by(columns).copied()).collect()
}

/// `width` columns of a matrix of `of` columns, from `first` on.
fn columns(a: &[f32], of: usize, first: usize, width: usize) -> Vec<f64> {
    a.chunks_exact(of).flat_map(|row| row[first..first + width].iter().map(|&v| f64::from(v))).collect()
}

fn set_columns(to: &mut [f64], of: usize, first: usize, width: usize, from: &[f64]) {
    for (to, from) in to.chunks_exact_mut(of).zip(from.chunks_exact(width)) {
        to[first..first + width].copy_from_slice(from);
    }
}

fn narrow(x: &[f64]) -> Vec<f32> {
    x.iter().map(|&v| v as f32).collect()
}

/// The first `len` elements; fails if the spare ones behind were written.
fn inside(what: &str, found: Vec<bf16>, len: usize) -> Result<Vec<bf16>, libtest_mimic::Failed> {
    let poison = bf16::from_bits(0xa5a5);
    same(&format!("{what}, behind its end"), &found[len..], &vec![poison; found.len() - len])?;
    Ok(found[..len].to_vec())
}

fn forward(case: &Case) -> Outcome {
    let (t, k, r) = (case.t, case.k, case.r);
    let run = || -> Result<Vec<bf16>, Error> {
        let (mut h, mut scratch) = (poisoned::<bf16>(&case.cuda, t * r + SPARE)?, case.scratch()?);
        let op = ops::LoraForward {
            h: h.view_mut(),
            x: case.device_x.view(),
            lora: case.device_lora.view(),
            parts: &case.parts,
            t,
            k,
            r,
            dropout: case.mask(),
            scratch: scratch.view_mut(),
        };
        ops::lora_forward(&case.cuda, op)?;
        case.cuda.download(&h)
    };
    let found = inside("h", run()?, t * r)?;
    same("h, second run", &run()?[..t * r], &found)?;
    let (mut exact, mut plain) = (vec![0.0; t * r], vec![0.0; t * r]);
    for part in &case.parts {
        let a_t = transposed(&case.a(part), k);
        let (x, x_plain) = case.dropped(part);
        let scale = f64::from(part.scale);
        let of = |x: &[f64]| product(x, &a_t, k, part.r);
        set_columns(&mut exact, r, part.h, part.r, &of(&x).iter().map(|v| v * scale).collect::<Vec<_>>());
        let rounded: Vec<f64> = of(&x_plain).iter().map(|&v| round(round(v) * scale)).collect();
        set_columns(&mut plain, r, part.h, part.r, &rounded);
    }
    within_twice("h", &wide(&found), &narrow(&plain), &narrow(&exact))
}

fn expand(case: &Case) -> Outcome {
    let (t, n, r) = (case.t, case.n, case.r);
    let mut random = Random::new(3);
    let (before, h) = (random.bf16s(t * n, 1.0), random.bf16s(t * r, 1.0));
    let device_h = case.cuda.upload(&h)?;
    let run = || -> Result<Vec<bf16>, Error> {
        let mut y = poisoned::<bf16>(&case.cuda, t * n + SPARE)?;
        case.cuda.write(y.view_mut(), &before)?;
        let (lora, h) = (case.device_lora.view(), device_h.view());
        ops::lora_expand(&case.cuda, ops::LoraExpand { y: y.view_mut(), h, lora, parts: &case.parts, t, n, r })?;
        case.cuda.download(&y)
    };
    let found = inside("y", run()?, t * n)?;
    same("y, second run", &run()?[..t * n], &found)?;
    let start: Vec<f64> = wide(&before).iter().map(|&v| f64::from(v)).collect();
    let (mut exact, mut plain) = (start.clone(), start);
    for part in &case.parts {
        let b_t = transposed(&case.b(part), part.r);
        let added = product(&columns(&wide(&h), r, part.h, part.r), &b_t, part.r, part.n);
        for (row, added) in added.chunks_exact(part.n).enumerate() {
            for (col, &added) in added.iter().enumerate() {
                let at = row * n + part.y + col;
                exact[at] += added;
                plain[at] = round(plain[at] + round(added));
            }
        }
    }
    let owned = |i: usize| case.parts.iter().any(|p| (p.y..p.y + p.n).contains(&(i % n)));
    if let Some(i) = (0..t * n).find(|&i| !owned(i) && found[i] != before[i]) {
        return Err(format!("y: element {i} belongs to no part, but {} became {}", before[i], found[i]).into());
    }
    within_twice("y", &wide(&found), &narrow(&plain), &narrow(&exact))
}

fn backward(case: &Case) -> Outcome {
    let (t, k, n, r) = (case.t, case.k, case.n, case.r);
    let mut random = Random::new(4);
    let (dy, h) = (random.bf16s(t * n, 1.0), random.bf16s(t * r, 1.0));
    let before = random.f32s(case.lora.len() + SPARE, 1.0);
    let (device_dy, device_h) = (case.cuda.upload(&dy)?, case.cuda.upload(&h)?);
    let run = || -> Result<(Vec<bf16>, Vec<f32>), Error> {
        let (mut dh, mut scratch) = (poisoned::<bf16>(&case.cuda, t * r + SPARE)?, case.scratch()?);
        let mut d_lora = case.cuda.upload(&before)?;
        let op = ops::LoraBackward {
            dh: dh.view_mut(),
            d_lora: d_lora.view_mut(),
            dy: device_dy.view(),
            x: case.device_x.view(),
            h: device_h.view(),
            lora: case.device_lora.view(),
            parts: &case.parts,
            t,
            k,
            n,
            r,
            dropout: case.mask(),
            scratch: scratch.view_mut(),
        };
        ops::lora_backward(&case.cuda, op)?;
        Ok((case.cuda.download(&dh)?, case.cuda.download(&d_lora)?))
    };
    let (found, grads) = run()?;
    let found = inside("dh", found, t * r)?;
    let again = run()?;
    same("dh, second run", &again.0[..t * r], &found)?;
    same("d_lora, second run", &again.1, &grads)?;

    let (mut exact, mut plain) = (vec![0.0; t * r], vec![0.0; t * r]);
    let (dy, h) = (wide(&dy), wide(&h));
    let mut named = vec![false; before.len()];
    for (i, part) in case.parts.iter().enumerate() {
        let scale = f64::from(part.scale);
        let dy = columns(&dy, n, part.y, part.n);
        let raw = product(&dy, &case.b(part), part.n, part.r);
        let dh: Vec<f64> = raw.iter().map(|v| v * scale).collect();
        let dh_plain: Vec<f64> = raw.iter().map(|&v| round(round(v) * scale)).collect();
        set_columns(&mut exact, r, part.h, part.r, &dh);
        set_columns(&mut plain, r, part.h, part.r, &dh_plain);

        let d_b = product(&transposed(&dy, part.n), &columns(&h, r, part.h, part.r), t, part.r);
        grown(&format!("dB of part {i}"), &grads[part.b..], &before[part.b..], &d_b, &d_b)?;
        let (x, x_plain) = case.dropped(part);
        let d_a = product(&transposed(&dh, part.r), &x, t, k);
        let d_a_plain = product(&transposed(&dh_plain, part.r), &x_plain, t, k);
        grown(&format!("dA of part {i}"), &grads[part.a..], &before[part.a..], &d_a, &d_a_plain)?;
        named[part.a..part.a + part.r * k].fill(true);
        named[part.b..part.b + part.r * part.n].fill(true);
    }
    if let Some(i) = (0..before.len()).find(|&i| !named[i] && grads[i] != before[i]) {
        return Err(format!("d_lora: element {i} belongs to no part, but {} became {}", before[i], grads[i]).into());
    }
    within_twice("dh", &wide(&found), &narrow(&plain), &narrow(&exact))
}

/// found = before + exact; the plain computation rounds what it adds to bf16.
fn grown(what: &str, found: &[f32], before: &[f32], exact: &[f64], plain: &[f64]) -> Outcome {
    let sum = |added: &[f64]| -> Vec<f32> {
        added.iter().zip(before).map(|(&added, &before)| (f64::from(before) + added) as f32).collect()
    };
    let rounded: Vec<f64> = plain.iter().map(|&v| round(v)).collect();
    within_twice(what, &found[..exact.len()], &sum(&rounded), &sum(exact))
}

fn backward_x(case: &Case) -> Outcome {
    let (t, k, r) = (case.t, case.k, case.r);
    let mut random = Random::new(5);
    let (before, dh) = (random.bf16s(t * k, 1.0), random.bf16s(t * r, 1.0));
    let device_dh = case.cuda.upload(&dh)?;
    let run = || -> Result<Vec<bf16>, Error> {
        let mut dx = poisoned::<bf16>(&case.cuda, t * k + SPARE)?;
        case.cuda.write(dx.view_mut(), &before)?;
        let op = ops::LoraBackwardX {
            dx: dx.view_mut(),
            dh: device_dh.view(),
            lora: case.device_lora.view(),
            parts: &case.parts,
            t,
            k,
            r,
            dropout: case.mask(),
        };
        ops::lora_backward_x(&case.cuda, op)?;
        case.cuda.download(&dx)
    };
    let found = inside("dx", run()?, t * k)?;
    same("dx, second run", &run()?[..t * k], &found)?;
    let start: Vec<f64> = wide(&before).iter().map(|&v| f64::from(v)).collect();
    let (mut exact, mut plain) = (start.clone(), start);
    for part in &case.parts {
        let added = product(&columns(&wide(&dh), r, part.h, part.r), &case.a(part), part.r, k);
        for (i, &added) in added.iter().enumerate() {
            let factor = case.kept(part, i / k, i % k) / (1.0 - f64::from(case.p));
            exact[i] += added * factor;
            plain[i] = round(plain[i] + round(round(added) * factor));
        }
    }
    within_twice("dx", &wide(&found), &narrow(&plain), &narrow(&exact))
}

/// With identity matrices for operands, every output is a mask: h of the forward, dx, and dA.
fn masks(k: usize, p: f32) -> Outcome {
    let cuda = Cuda::open(0)?;
    // dA shows the rows of x that dh names, one for each rank.
    let (t, r) = (k.min(150), k);
    let identity = |rows: usize, columns: usize| -> Vec<bf16> {
        (0..rows * columns).map(|i| bf16::from_f32(f32::from(u8::from(i / columns == i % columns)))).collect()
    };
    let part = LoraPart { a: 0, b: k * k, r, scale: 1.0, site: 4_000_000_000, y: 0, n: r, h: 0 };
    let lora = cuda.upload(&[identity(r, k), identity(r, r)].concat())?;
    let ones = cuda.upload(&vec![bf16::ONE; t * k])?;
    let step = cuda.upload(&[u32::MAX])?;
    let dropout = Some(DropoutMask { p, seed: SEED, step: step.view() });
    let mut scratch = poisoned::<f32>(&cuda, ops::lora_scratch(t, k, r, r))?;
    let factor = 1.0 / (1.0 - p);
    let expected: Vec<f32> = (0..t * k)
        .map(|i| {
            let index = (u64::from(u32::MAX) << 32) + i as u64;
            if uniform(SEED, Stream::Dropout, part.site, index) >= p { factor } else { 0.0 }
        })
        .collect();
    let rounded: Vec<bf16> = expected.iter().map(|&v| bf16::from_f32(v)).collect();

    let mut h = poisoned::<bf16>(&cuda, t * r)?;
    let op = ops::LoraForward {
        h: h.view_mut(),
        x: ones.view(),
        lora: lora.view(),
        parts: &[part],
        t,
        k,
        r,
        dropout,
        scratch: scratch.view_mut(),
    };
    ops::lora_forward(&cuda, op)?;
    same("h", &cuda.download(&h)?, &rounded)?;

    let mut dx = cuda.zeros::<bf16>(t * k)?;
    let op =
        ops::LoraBackwardX { dx: dx.view_mut(), dh: ones.view(), lora: lora.view(), parts: &[part], t, k, r, dropout };
    ops::lora_backward_x(&cuda, op)?;
    same("dx", &cuda.download(&dx)?, &rounded)?;

    let dy = cuda.upload(&identity(t, r))?;
    let (mut dh, mut d_lora) = (poisoned::<bf16>(&cuda, t * r)?, cuda.zeros::<f32>(lora.len())?);
    let op = ops::LoraBackward {
        dh: dh.view_mut(),
        d_lora: d_lora.view_mut(),
        dy: dy.view(),
        x: ones.view(),
        h: ones.view(),
        lora: lora.view(),
        parts: &[part],
        t,
        k,
        n: r,
        r,
        dropout,
        scratch: scratch.view_mut(),
    };
    ops::lora_backward(&cuda, op)?;
    same("dh", &cuda.download(&dh)?, &identity(t, r))?;
    same("dA", &cuda.download(&d_lora)?[..t * k], &expected)
}

fn wrong_sizes() -> Outcome {
    let case = Case::new(("", 3, 8, &[(8, 4), (8, 4)], 0, 0), 0.0)?;
    let mut h = case.cuda.zeros::<bf16>(3 * 8)?;
    let mut scratch = case.scratch()?;
    let mut run = |parts: &[LoraPart], r: usize, t: usize| {
        let op = ops::LoraForward {
            h: h.view_mut(),
            x: case.device_x.view(),
            lora: case.device_lora.view(),
            parts,
            t,
            k: 8,
            r,
            dropout: None,
            scratch: scratch.view_mut(),
        };
        ops::lora_forward(&case.cuda, op).err()
    };
    let mut shifted = case.parts.clone();
    shifted[1].h = 5;
    let mut outside = case.parts.clone();
    outside[1].a += 1000;
    let errors = [
        (run(&case.parts, 8, 4), "h"),
        (run(&case.parts, 9, 3), "r"),
        (run(&shifted, 8, 3), "parts (h)"),
        (run(&outside, 8, 3), "lora"),
        (run(&[], 0, 3), "parts"),
    ];
    for (error, expected) in errors {
        match error {
            Some(Error::Shape { op: "lora_forward", argument, .. }) if argument == expected => {}
            other => return Err(format!("expected an error about {expected}, found {other:?}").into()),
        }
    }
    assert!(run(&case.parts, 8, 0).is_none(), "no tokens");
    Ok(())
}
