//! The kernels that memory bounds: norms, rope, swiglu, cross-entropy, moves of rows, grad_norm.

use half::bf16;
use halfbyte::Error;
use halfbyte::backend::Heads;
use halfbyte::backend::cuda::ops::cross_entropy::{
    AddLoss, CrossEntropy, GatherRows, ScatterRows, add_loss, cross_entropy, gather_rows, scatter_rows,
};
use halfbyte::backend::cuda::ops::embedding::{Embedding, embedding};
use halfbyte::backend::cuda::ops::grad_norm::{GRAD_NORM_PARTIALS, GradNorm, grad_norm};
use halfbyte::backend::cuda::ops::rmsnorm::{
    HeadNormBackward, HeadNormForward, RmsNormBackward, RmsNormForward, head_norm_backward, head_norm_forward,
    rmsnorm_backward, rmsnorm_forward,
};
use halfbyte::backend::cuda::ops::rope::{Rope, rope_backward, rope_forward};
use halfbyte::backend::cuda::ops::swiglu::{SwigluBackward, SwigluForward, swiglu_backward, swiglu_forward};
use libtest_mimic::Trial;

use super::{Bench, C, F, Row, T, V, bench};

const HEADS: Heads = Heads { h: 32, g: 8, d: 128, window: None };
const EPS: f32 = 1e-5;

pub fn trials() -> Vec<Trial> {
    vec![
        bench("embedding", rows_of_a_table),
        bench("rmsnorm", norms),
        bench("head_norm", head_norms),
        bench("rope", ropes),
        bench("swiglu", swiglus),
        bench("cross_entropy", losses),
        bench("moves_of_rows", moves),
        bench("grad_norm", gradients),
    ]
}

fn own<'a>(op: &'a str, shape: &'a str, bytes: usize) -> Row<'a> {
    Row { op, shape, implementation: "own", bytes, flops: 0.0 }
}

/// `n` different rows below `limit`, in no order.
fn spread(n: usize, limit: usize) -> Vec<i32> {
    (0..n).map(|i| (i * 4999 % limit) as i32).collect()
}

fn rows_of_a_table(b: &mut Bench) -> Result<(), Error> {
    let (table, tokens) = (b.activations(V * C, 0.02)?, b.cuda.upload(&spread(T, V))?);
    let mut x = b.cuda.zeros::<bf16>(T * C)?;
    b.row(own("embedding", "8192x4096 of 32000", 4 * T * C), |cuda, _| {
        let (tokens, table) = (tokens.view(), table.view());
        embedding(cuda, Embedding { x: x.view_mut(), tokens, table, t: T, c: C, v: V })
    })
}

fn norms(b: &mut Bench) -> Result<(), Error> {
    let (t, c, n) = (T, C, T * C);
    let (x, delta, w) = (b.activations(n, 1.0)?, b.activations(n, 0.1)?, b.activations(c, 1.0)?);
    let (mut y, mut s) = (b.cuda.zeros::<bf16>(n)?, b.cuda.zeros::<bf16>(n)?);
    let mut rstd = b.cuda.zeros::<f32>(t)?;
    b.row(own("rmsnorm_forward", "8192x4096", 4 * n), |cuda, _| {
        let (y, rstd) = (y.view_mut(), rstd.view_mut());
        rmsnorm_forward(cuda, RmsNormForward { y, rstd, x: x.view(), residual: None, w: w.view(), t, c, eps: EPS })
    })?;
    b.row(own("rmsnorm_forward residual", "8192x4096", 8 * n), |cuda, _| {
        let (y, rstd, residual) = (y.view_mut(), rstd.view_mut(), Some((delta.view(), s.view_mut())));
        rmsnorm_forward(cuda, RmsNormForward { y, rstd, x: x.view(), residual, w: w.view(), t, c, eps: EPS })
    })?;
    b.row(own("rmsnorm_backward", "8192x4096", 8 * n), |cuda, _| {
        let (dx, dy, rstd) = (y.view_mut(), delta.view(), rstd.view());
        rmsnorm_backward(cuda, RmsNormBackward { dx, dy, x: x.view(), w: w.view(), rstd, t, c })
    })
}

fn head_norms(b: &mut Bench) -> Result<(), Error> {
    let (t, n) = (T, T * HEADS.qkv());
    let (x, w) = (b.activations(n, 1.0)?, b.activations(HEADS.d, 1.0)?);
    let mut y = b.cuda.zeros::<bf16>(n)?;
    let mut rstd = b.cuda.zeros::<f32>(t * (HEADS.h + HEADS.g))?;
    b.row(own("head_norm_forward", "8192 heads 32:8:128", 4 * n), |cuda, _| {
        let (y, rstd, q_w, k_w) = (y.view_mut(), rstd.view_mut(), w.view(), w.view());
        head_norm_forward(cuda, HeadNormForward { y, rstd, x: x.view(), q_w, k_w, t, heads: HEADS, eps: EPS })
    })?;
    let bytes = 6 * t * (HEADS.h + HEADS.g) * HEADS.d;
    b.row(own("head_norm_backward", "8192 heads 32:8:128", bytes), |cuda, _| {
        let (dqkv, rstd, q_w, k_w) = (y.view_mut(), rstd.view(), w.view(), w.view());
        head_norm_backward(cuda, HeadNormBackward { dqkv, x: x.view(), rstd, q_w, k_w, t, heads: HEADS })
    })
}

fn ropes(b: &mut Bench) -> Result<(), Error> {
    let mut qkv = b.activations(T * HEADS.qkv(), 1.0)?;
    let positions = b.cuda.upload(&(0..T as i32).collect::<Vec<_>>())?;
    let inv_freq: Vec<f32> = (0..HEADS.d / 2).map(|i| 1e4f32.powf(-2.0 * i as f32 / HEADS.d as f32)).collect();
    let inv_freq = b.cuda.upload(&inv_freq)?;
    let bytes = 4 * T * (HEADS.h + HEADS.g) * HEADS.d;
    for (op, back) in [("rope_forward", false), ("rope_backward", true)] {
        b.row(own(op, "8192 heads 32:8:128", bytes), |cuda, _| {
            let (qkv, positions, inv_freq) = (qkv.view_mut(), positions.view(), inv_freq.view());
            let op = Rope { qkv, positions, inv_freq, t: T, heads: HEADS };
            if back { rope_backward(cuda, op) } else { rope_forward(cuda, op) }
        })?;
    }
    Ok(())
}

fn swiglus(b: &mut Bench) -> Result<(), Error> {
    let (t, f) = (T, F);
    let (mut gate_up, dy) = (b.activations(2 * t * f, 1.0)?, b.activations(t * f, 0.1)?);
    let mut y = b.cuda.zeros::<bf16>(t * f)?;
    b.row(own("swiglu_forward", "8192x14336", 6 * t * f), |cuda, _| {
        swiglu_forward(cuda, SwigluForward { y: y.view_mut(), gate_up: gate_up.view(), t, f })
    })?;
    b.row(own("swiglu_backward", "8192x14336", 10 * t * f), |cuda, _| {
        swiglu_backward(cuda, SwigluBackward { gate_up: gate_up.view_mut(), dy: dy.view(), t, f })
    })
}

/// The gradient overwrites the logits: from the second launch on they are its bits, which cost the same.
fn losses(b: &mut Bench) -> Result<(), Error> {
    for (m, v) in [(2048, 32_000), (2048, 32_001), (1024, 128_256), (1024, 151_936)] {
        let mut logits = b.floats(m * v, 2.0)?;
        let (mut row_loss, ids) = (b.cuda.zeros::<f32>(m)?, b.cuda.upload(&spread(m, v))?);
        let scale = b.cuda.upload(&[1.0 / m as f32])?;
        for gradient in [false, true] {
            let (op, each) = if gradient { ("cross_entropy gradient", 6) } else { ("cross_entropy loss", 4) };
            b.row(own(op, &format!("{m}x{v}"), each * m * v), |cuda, _| {
                let (logits, row_loss, ids) = (logits.view_mut(), row_loss.view_mut(), ids.view());
                cross_entropy(cuda, CrossEntropy { logits, row_loss, ids, scale: scale.view(), gradient, m, v })
            })?;
        }
    }
    let (mut loss, row_loss, scale) = (b.cuda.zeros::<f32>(1)?, b.floats(T, 1.0)?, b.cuda.upload(&[0.5f32])?);
    b.row(own("add_loss", "8192", 4 * T), |cuda, _| {
        add_loss(cuda, AddLoss { loss: loss.view_mut(), row_loss: row_loss.view(), scale: scale.view(), m: T })
    })
}

fn moves(b: &mut Bench) -> Result<(), Error> {
    let (m, t, c) = (T, T, C);
    let (x, rows) = (b.activations(t * c, 1.0)?, b.cuda.upload(&spread(m, t))?);
    let mut out = b.cuda.zeros::<bf16>(m * c)?;
    b.row(own("gather_rows", "8192x4096", 4 * m * c), |cuda, _| {
        gather_rows(cuda, GatherRows { out: out.view_mut(), x: x.view(), rows: rows.view(), m, c, t })
    })?;
    b.row(own("scatter_rows", "8192x4096", 4 * m * c), |cuda, _| {
        scatter_rows(cuda, ScatterRows { dx: out.view_mut(), d_rows: x.view(), rows: rows.view(), m, c, t })
    })
}

/// The trainable weights of r=16 on the seven projections of Mistral-7B.
fn gradients(b: &mut Bench) -> Result<(), Error> {
    let p = 41_943_040;
    let (grads, mut norm) = (b.floats(p, 1e-3)?, b.cuda.zeros::<f32>(1)?);
    let mut partial = b.cuda.zeros::<f64>(GRAD_NORM_PARTIALS)?;
    b.row(own("grad_norm", "41943040", 4 * p), |cuda, _| {
        grad_norm(cuda, GradNorm { norm: norm.view_mut(), grads: grads.view(), partial: partial.view_mut() })
    })
}
