//! attention, forward and backward, on the heads of Mistral-7B: one sequence that fills the row, and packed ones.

use half::bf16;
use halfbyte::Error;
use halfbyte::backend::Heads;
use halfbyte::backend::cuda::Kernels;
use halfbyte::backend::cuda::ops::attention::{
    AttentionBackward, AttentionForward, attention_backward, attention_forward,
};
use libtest_mimic::Trial;

use super::{Bench, Row, bench_with};

pub fn trials() -> Vec<Trial> {
    let both = [("sm90", Kernels::Sm90), ("sm80", Kernels::Sm80)];
    both.map(|(name, kernels)| {
        bench_with(
            &format!("attention_{name}"),
            move |cuda| cuda.with_kernels(kernels),
            |b| {
                run(b, 2048, 1, 128)?;
                run(b, 8192, 4, 128)?;
                run(b, 8192, 1, 128)?;
                run(b, 8192, 1, 64)
            },
        )
    })
    .into()
}

/// `sequences` of equal length in `t` tokens.
fn run(b: &mut Bench, t: usize, sequences: usize, d: usize) -> Result<(), Error> {
    let heads = Heads { h: 32, g: 8, d, window: None };
    let length = t / sequences;
    let starts: Vec<i32> = (0..=sequences).map(|i| (i * length) as i32).collect();
    let cu_seqlens = b.cuda.upload(&starts)?;
    let (q, lse_len) = (t * heads.h * d, heads.h * t);
    let (qkv, d_o) = (b.activations(t * heads.qkv(), 1.0)?, b.activations(q, 0.1)?);
    let (mut o, mut lse) = (b.cuda.zeros::<bf16>(q)?, b.cuda.zeros::<f32>(lse_len)?);
    let (mut dqkv, mut delta) = (b.cuda.zeros::<bf16>(t * heads.qkv())?, b.cuda.zeros::<f32>(lse_len)?);
    let implementation = if b.cuda.kernels() == Kernels::Sm90 { "sm90" } else { "sm80" };
    let shape = format!("{sequences}x{length} heads 32:8:{d} causal");
    // Two products forward and five backward, over half of the square.
    let product = (sequences * heads.h * d) as f64 * (length * length) as f64;
    let bytes = 2 * (t * heads.qkv() + q) + 4 * lse_len;
    let row = Row { op: "attention_forward", shape: &shape, implementation, bytes, flops: 2.0 * product };
    b.row(row, |cuda, _| {
        let (o, lse, qkv, cu_seqlens) = (o.view_mut(), lse.view_mut(), qkv.view(), cu_seqlens.view());
        attention_forward(cuda, AttentionForward { o, lse, qkv, cu_seqlens, t, b: sequences, heads })
    })?;
    let bytes = 2 * (2 * t * heads.qkv() + 2 * q) + 4 * lse_len;
    let row = Row { op: "attention_backward", shape: &shape, implementation, bytes, flops: 5.0 * product };
    b.row(row, |cuda, _| {
        let op = AttentionBackward {
            dqkv: dqkv.view_mut(),
            delta: delta.view_mut(),
            d_o: d_o.view(),
            o: o.view(),
            lse: lse.view(),
            qkv: qkv.view(),
            cu_seqlens: cu_seqlens.view(),
            t,
            b: sequences,
            heads,
        };
        attention_backward(cuda, op)
    })
}
