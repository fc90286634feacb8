//! rmsnorm forward and backward, against the CPU backend.

use half::bf16;
use halfbyte::Error;
use halfbyte::backend::cpu::Cpu;
use halfbyte::backend::cuda::Cuda;
use halfbyte::backend::cuda::ops::rmsnorm::{self as ops, RmsNormBackward, RmsNormForward};
use halfbyte::backend::{self, Backend};
use libtest_mimic::Trial;

use crate::support::{Outcome, Random, poisoned, refused, round, same, wide, within_twice};

const EPS: f32 = 1e-5;

/// (T, C): one element, odd widths, one to four vectors a thread, rows that do not fill the CTA, the longest row in
/// registers (16,384), and longer ones.
const SHAPES: [(usize, usize); 16] = [
    (1, 1),
    (3, 7),
    (1, 8),
    (5, 64),
    (70, 576),
    (3, 2048),
    (3, 2056),
    (33, 4096),
    (3, 4100),
    (2, 5120),
    (3, 8192),
    (2, 8200),
    (2, 16_384),
    (1, 16_392),
    (2, 20_001),
    (300, 24),
];

pub fn trials() -> Vec<Trial> {
    let mut trials = vec![Trial::test("rmsnorm/wrong_sizes_name_the_op_and_the_argument", wrong_sizes)];
    for (t, c) in SHAPES {
        for skip in [0, 1] {
            let shape = format!("{t}x{c}{}", if skip == 1 { "_unaligned" } else { "" });
            trials.push(Trial::test(format!("rmsnorm/forward/{shape}"), move || forward(t, c, false, skip)));
            trials.push(Trial::test(format!("rmsnorm/forward_residual/{shape}"), move || forward(t, c, true, skip)));
            trials.push(Trial::test(format!("rmsnorm/backward/{shape}"), move || backward(t, c, skip)));
        }
    }
    trials
}

/// Weights about 1.
pub fn gain(random: &mut Random, n: usize) -> Vec<bf16> {
    (0..n).map(|_| bf16::from_f32(1.0 + 0.2 * random.normal())).collect()
}

/// One norm as a chain of bf16 ops, given r.
pub fn plain_norm(y: &mut [f32], x: &[f32], w: &[f32], r: f32) {
    for ((y, x), w) in y.iter_mut().zip(x).zip(w) {
        *y = round(round(r * x) * w);
    }
}

/// Its gradient as a chain of bf16 ops with sums in f32.
pub fn plain_gradient(dy: &[f32], x: &[f32], w: &[f32], r: f32) -> Vec<f32> {
    let scaled: Vec<f32> = dy.iter().zip(w).map(|(dy, w)| round(dy * w)).collect();
    let mean = scaled.iter().zip(x).map(|(d, x)| d * x).sum::<f32>() / x.len() as f32;
    let coef = r * r * r * mean;
    scaled.iter().zip(x).map(|(d, x)| round(round(r * d) - round(coef * x))).collect()
}

/// y, s, rstd
type Found = (Vec<bf16>, Vec<bf16>, Vec<f32>);

fn forward(t: usize, c: usize, residual: bool, skip: usize) -> Outcome {
    let cuda = Cuda::open(0)?;
    let mut random = Random::new((t * c) as u64 + u64::from(residual));
    let n = t * c;
    let (x, delta, w) = (random.bf16s(skip + n, 1.5), random.bf16s(skip + n, 0.5), gain(&mut random, c));
    let (gpu_x, gpu_delta, gpu_w) = (cuda.upload(&x)?, cuda.upload(&delta)?, cuda.upload(&w)?);
    let at = skip..skip + n;
    let run = |x, delta| -> Result<Found, Error> {
        let (mut y, mut s) = (poisoned::<bf16>(&cuda, skip + n)?, poisoned::<bf16>(&cuda, skip + n)?);
        let mut rstd = poisoned::<f32>(&cuda, t)?;
        let op = RmsNormForward {
            y: y.range_mut(at.clone()),
            rstd: rstd.view_mut(),
            x,
            residual: Option::map(delta, |delta| (delta, s.range_mut(at.clone()))),
            w: gpu_w.view(),
            t,
            c,
            eps: EPS,
        };
        ops::rmsnorm_forward(&cuda, op)?;
        Ok((cuda.download(&y)?[skip..].to_vec(), cuda.download(&s)?[skip..].to_vec(), cuda.download(&rstd)?))
    };
    let delta_view = residual.then(|| gpu_delta.range(at.clone()));
    let (y, s, rstd) = run(gpu_x.range(at.clone()), delta_view)?;
    let again = run(gpu_x.range(at.clone()), delta_view)?;
    same("y, second run", &again.0, &y)?;
    same("rstd, second run", &again.2, &rstd)?;

    let (x, delta, w) = (wide(&x[skip..]), wide(&delta[skip..]), wide(&w));
    let sum: Vec<f32> = if residual { x.iter().zip(&delta).map(|(x, d)| x + d).collect() } else { x.clone() };
    let normed: Vec<f32> = sum.iter().map(|&s| round(s)).collect();
    if residual {
        same("s", &s, &normed.iter().map(|&s| bf16::from_f32(s)).collect::<Vec<_>>())?;
        let stored = cuda.upload(&[vec![bf16::ZERO; skip], s].concat())?;
        let recomputed = run(stored.range(at.clone()), None)?;
        same("y of the stored s", &recomputed.0, &y)?;
        same("rstd of the stored s", &recomputed.2, &rstd)?;
    }
    let norm = |x: &Vec<f32>| -> Result<(Vec<f32>, Vec<f32>), Error> {
        let (mut y, mut rstd) = (vec![0.0; n], vec![0.0; t]);
        let (y_out, rstd_out) = (&mut y, &mut rstd);
        let op = backend::RmsNormForward { y: y_out, rstd: rstd_out, x, residual: None, w: &w, t, c, eps: EPS };
        Cpu::new(Some(1)).rmsnorm_forward(op)?;
        Ok((y, rstd))
    };
    let (exact_y, _) = norm(&sum)?;
    let (_, exact_rstd) = norm(&normed)?;
    let mut plain_y = vec![0.0; n];
    for (row, &r) in exact_rstd.iter().enumerate() {
        let at = row * c..(row + 1) * c;
        plain_norm(&mut plain_y[at.clone()], &normed[at], &w, r);
    }
    within_twice("rstd", &rstd, &exact_rstd, &exact_rstd)?;
    within_twice("y", &wide(&y), &plain_y, &exact_y)
}

fn backward(t: usize, c: usize, skip: usize) -> Outcome {
    let cuda = Cuda::open(0)?;
    let mut random = Random::new((t * c + 7) as u64);
    let n = t * c;
    let (x, w) = (random.bf16s(skip + n, 1.5), gain(&mut random, c));
    // A part of dy along x, so that the second term of the gradient counts.
    let noise = random.bf16s(skip + n, 0.02);
    let dy: Vec<bf16> = x.iter().zip(&noise).map(|(x, e)| bf16::from_f32(0.01 * x.to_f32() + e.to_f32())).collect();
    let before = random.bf16s(skip + n, 0.02);

    let (x32, w32) = (wide(&x[skip..]), wide(&w));
    let (mut y, mut rstd) = (vec![0.0; n], vec![0.0; t]);
    let (y_out, rstd_out) = (&mut y, &mut rstd);
    let op = backend::RmsNormForward { y: y_out, rstd: rstd_out, x: &x32, residual: None, w: &w32, t, c, eps: EPS };
    let mut cpu = Cpu::new(Some(1));
    cpu.rmsnorm_forward(op)?;

    let (gpu_x, gpu_w, gpu_dy) = (cuda.upload(&x)?, cuda.upload(&w)?, cuda.upload(&dy)?);
    let gpu_rstd = cuda.upload(&rstd)?;
    let run = || -> Result<Vec<bf16>, Error> {
        let mut dx = cuda.upload(&before)?;
        let op = RmsNormBackward {
            dx: dx.range_mut(skip..skip + n),
            dy: gpu_dy.range(skip..skip + n),
            x: gpu_x.range(skip..skip + n),
            w: gpu_w.view(),
            rstd: gpu_rstd.view(),
            t,
            c,
        };
        ops::rmsnorm_backward(&cuda, op)?;
        Ok(cuda.download(&dx)?[skip..].to_vec())
    };
    let dx = run()?;
    same("dx, second run", &run()?, &dx)?;

    let (dy32, before) = (wide(&dy[skip..]), wide(&before[skip..]));
    let mut exact = before.clone();
    let op = backend::RmsNormBackward { dx: &mut exact, dy: &dy32, x: &x32, w: &w32, rstd: &rstd, t, c };
    cpu.rmsnorm_backward(op)?;
    let mut plain = before;
    for (row, &r) in rstd.iter().enumerate() {
        let at = row * c..(row + 1) * c;
        let gradient = plain_gradient(&dy32[at.clone()], &x32[at.clone()], &w32, r);
        plain[at].iter_mut().zip(gradient).for_each(|(p, g)| *p = round(*p + g));
    }
    within_twice("dx", &wide(&dx), &plain, &exact)
}

fn wrong_sizes() -> Outcome {
    let cuda = Cuda::open(0)?;
    let (mut y, mut s, x) = (cuda.zeros::<bf16>(24)?, cuda.zeros::<bf16>(23)?, cuda.zeros::<bf16>(24)?);
    let (w, mut rstd) = (cuda.zeros::<bf16>(8)?, cuda.zeros::<f32>(2)?);
    let mut run = |t, residual: bool| {
        let op = RmsNormForward {
            y: y.view_mut(),
            rstd: rstd.view_mut(),
            x: x.view(),
            residual: residual.then(|| (x.view(), s.view_mut())),
            w: w.view(),
            t,
            c: 8,
            eps: EPS,
        };
        ops::rmsnorm_forward(&cuda, op)
    };
    refused(run(3, false), "rmsnorm_forward", "rstd")?;
    refused(run(4, false), "rmsnorm_forward", "y")?;
    run(2, true)?;
    let (dy, rstd) = (cuda.zeros::<bf16>(16)?, cuda.zeros::<f32>(3)?);
    let op =
        RmsNormBackward { dx: y.view_mut(), dy: dy.view(), x: x.view(), w: w.view(), rstd: rstd.view(), t: 3, c: 8 };
    refused(ops::rmsnorm_backward(&cuda, op), "rmsnorm_backward", "dy")
}
