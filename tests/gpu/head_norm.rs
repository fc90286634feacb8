//! head_norm forward and backward (csrc/rmsnorm.cu) against the CPU backend.

use half::bf16;
use halfbyte::Error;
use halfbyte::backend::cpu::Cpu;
use halfbyte::backend::cuda::Cuda;
use halfbyte::backend::cuda::ops::rmsnorm::{self as ops, HeadNormBackward, HeadNormForward};
use halfbyte::backend::{self, Backend, Heads};
use libtest_mimic::Trial;

use crate::rmsnorm::{gain, plain_gradient, plain_norm};
use crate::support::{Outcome, Random, poisoned, refused, round, same, wide, within_twice};

const EPS: f32 = 1e-6;

/// (H, G, D): every grouping; 8, 16 and 32 lanes a head, all or some of them busy; head sizes that are no vectors.
const HEADS: [(usize, usize, usize); 10] = [
    (1, 1, 2),
    (1, 1, 8),
    (3, 1, 10),
    (4, 4, 64),
    (8, 2, 96),
    (32, 8, 128),
    (8, 1, 128),
    (4, 1, 200),
    (2, 1, 256),
    (2, 2, 264),
];

pub fn trials() -> Vec<Trial> {
    let mut trials = vec![Trial::test("head_norm/wrong_sizes_name_the_op_and_the_argument", wrong_sizes)];
    for (h, g, d) in HEADS {
        let heads = Heads { h, g, d, window: None };
        for t in [1, 5, 67] {
            trials.push(Trial::test(format!("head_norm/{t}_tokens_heads_{h}_{g}_{d}"), move || agrees(t, heads, 0)));
        }
        trials.push(Trial::test(format!("head_norm/unaligned_heads_{h}_{g}_{d}"), move || agrees(3, heads, 1)));
    }
    trials
}

/// y, rstd, dqkv
type Found = (Vec<bf16>, Vec<f32>, Vec<bf16>);

fn agrees(t: usize, heads: Heads, skip: usize) -> Outcome {
    let cuda = Cuda::open(0)?;
    let (n, d, normed) = (t * heads.qkv(), heads.d, heads.h + heads.g);
    let mut random = Random::new((n + t) as u64);
    let (x, noise) = (random.bf16s(skip + n, 1.5), random.bf16s(skip + n, 0.02));
    let dy: Vec<bf16> = x.iter().zip(&noise).map(|(x, e)| bf16::from_f32(0.01 * x.to_f32() + e.to_f32())).collect();
    let (q_w, k_w) = (gain(&mut random, d), gain(&mut random, d));
    let (gpu_x, gpu_q, gpu_k) = (cuda.upload(&x)?, cuda.upload(&q_w)?, cuda.upload(&k_w)?);
    let at = skip..skip + n;
    let run = || -> Result<Found, Error> {
        let (mut y, mut rstd) = (poisoned::<bf16>(&cuda, skip + n)?, poisoned::<f32>(&cuda, t * normed)?);
        let op = HeadNormForward {
            y: y.range_mut(at.clone()),
            rstd: rstd.view_mut(),
            x: gpu_x.range(at.clone()),
            q_w: gpu_q.view(),
            k_w: gpu_k.view(),
            t,
            heads,
            eps: EPS,
        };
        ops::head_norm_forward(&cuda, op)?;
        let mut dqkv = cuda.upload(&dy)?;
        let op = HeadNormBackward {
            dqkv: dqkv.range_mut(at.clone()),
            x: gpu_x.range(at.clone()),
            rstd: rstd.view(),
            q_w: gpu_q.view(),
            k_w: gpu_k.view(),
            t,
            heads,
        };
        ops::head_norm_backward(&cuda, op)?;
        let (y, dqkv) = (cuda.download(&y)?, cuda.download(&dqkv)?);
        Ok((y[skip..].to_vec(), cuda.download(&rstd)?, dqkv[skip..].to_vec()))
    };
    let (y, rstd, dx) = run()?;
    let again = run()?;
    same("y, second run", &again.0, &y)?;
    same("rstd, second run", &again.1, &rstd)?;
    same("dqkv, second run", &again.2, &dx)?;

    let (x, dy, q_w, k_w) = (wide(&x[skip..]), wide(&dy[skip..]), wide(&q_w), wide(&k_w));
    let mut cpu = Cpu::new(Some(1));
    let (mut exact_y, mut exact_rstd, mut exact_dx) = (vec![0.0; n], vec![0.0; t * normed], dy.clone());
    let op = backend::HeadNormForward {
        y: &mut exact_y,
        rstd: &mut exact_rstd,
        x: &x,
        q_w: &q_w,
        k_w: &k_w,
        t,
        heads,
        eps: EPS,
    };
    cpu.head_norm_forward(op)?;
    let rstd_in = &exact_rstd;
    let op = backend::HeadNormBackward { dqkv: &mut exact_dx, x: &x, rstd: rstd_in, q_w: &q_w, k_w: &k_w, t, heads };
    cpu.head_norm_backward(op)?;

    let (mut plain_y, mut plain_dx) = (x.clone(), dy.clone());
    for token in 0..t {
        for head in 0..normed {
            let start = token * heads.qkv() + head * d;
            let at = start..start + d;
            let (w, r) = (if head < heads.h { &q_w } else { &k_w }, exact_rstd[token * normed + head]);
            plain_norm(&mut plain_y[at.clone()], &x[at.clone()], w, r);
            let gradient = plain_gradient(&dy[at.clone()], &x[at.clone()], w, r);
            plain_dx[at].iter_mut().zip(gradient).for_each(|(p, g)| *p = round(g));
        }
        let v = token * heads.qkv() + normed * d..(token + 1) * heads.qkv();
        same(&format!("y: v of token {token}"), &wide(&y[v.clone()]), &x[v.clone()])?;
        same(&format!("dqkv: v of token {token}"), &wide(&dx[v.clone()]), &dy[v])?;
    }
    within_twice("rstd", &rstd, &exact_rstd, &exact_rstd)?;
    within_twice("y", &wide(&y), &plain_y, &exact_y)?;
    within_twice("dqkv", &wide(&dx), &plain_dx, &exact_dx)
}

fn wrong_sizes() -> Outcome {
    let cuda = Cuda::open(0)?;
    let heads = Heads { h: 2, g: 1, d: 8, window: None };
    let (mut y, x, w) = (cuda.zeros::<bf16>(64)?, cuda.zeros::<bf16>(64)?, cuda.zeros::<bf16>(8)?);
    let mut rstd = cuda.zeros::<f32>(5)?;
    let mut run = |t| {
        let op = HeadNormForward {
            y: y.view_mut(),
            rstd: rstd.view_mut(),
            x: x.view(),
            q_w: w.view(),
            k_w: w.view(),
            t,
            heads,
            eps: EPS,
        };
        ops::head_norm_forward(&cuda, op)
    };
    refused(run(2), "head_norm_forward", "rstd")?;
    refused(run(3), "head_norm_forward", "y")?;
    let op = HeadNormBackward {
        dqkv: y.view_mut(),
        x: x.view(),
        rstd: rstd.view(),
        q_w: w.view(),
        k_w: w.range(0..7),
        t: 1,
        heads,
    };
    refused(ops::head_norm_backward(&cuda, op), "head_norm_backward", "k_w")
}
