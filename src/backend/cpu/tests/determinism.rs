use super::*;
use crate::backend::{
    AttentionBackward, AttentionForward, Dropout, HeadLoss, Heads, Linear, LinearBackward, LinearForward, Lora,
    Projection,
};
use crate::nf4::{QuantType, quantize};
use crate::tensor::{HostMatrix, HostTensor};

/// The bits of every op whose work is shared out, on sizes large enough that it is.
fn bits(cpu: &mut Cpu) -> Vec<Vec<u32>> {
    let (t, k, n, r) = (150, 192, 320, 4);
    let mut out = vec![];
    let mut keep = |x: &[f32]| out.push(x.iter().map(|x| x.to_bits()).collect());

    let dense = HostTensor::from_f32(vec![n, k], &random(1, n * k));
    let w = cpu.upload(&HostMatrix::Quantized(quantize(&dense, QuantType::Nf4, true))).unwrap();
    let lora = Lora { a: 0, b: r * k, r, scale: 2.0, site: 3 };
    let w = Linear { k, n, r, parts: vec![Projection { n, w, bias: None, lora: Some(lora) }] };
    let (x, dy, lora) = (random(2, t * k), random(3, t * n), random(4, r * (k + n)));
    for dropout in [None, Some(Dropout { p: 0.1, seed: 1, step: 2 })] {
        let (mut y, mut h, mut dx) = (poisoned(t * n), poisoned(t * r), poisoned(t * k));
        let (mut d_lora, mut dh) = (vec![0.0; r * (k + n)], poisoned(t * r));
        let a = LinearForward { y: &mut y, h: &mut h, x: &x, w: &w, lora: Some(&lora), t, dropout };
        cpu.linear_forward(a).unwrap();
        let (dx_out, lora) = (Some(&mut dx), &lora);
        let (d_lora_out, dh, w, x, dy) = (&mut d_lora, &mut dh, &w, &x, &dy);
        let a = LinearBackward { dx: dx_out, d_lora: d_lora_out, dh, dy, x, h: &h, w, lora, t, dropout };
        cpu.linear_backward(a).unwrap();
        [&y, &h, &dx, &d_lora].into_iter().for_each(|x| keep(x));
    }

    let heads = Heads { h: 6, g: 2, d: 16, window: Some(90) };
    let batch = batch(cpu, &[100, 50], 1000, 0.1);
    let (qkv, d_o) = (random(5, t * heads.qkv()), random(6, t * 96));
    let (mut o, mut lse, mut delta) = (poisoned(t * 96), poisoned(6 * t), poisoned(6 * t));
    let mut dqkv = poisoned(t * heads.qkv());
    cpu.attention_forward(AttentionForward { o: &mut o, lse: &mut lse, qkv: &qkv, batch: &batch, heads }).unwrap();
    let (dqkv_out, delta) = (&mut dqkv, &mut delta);
    let a = AttentionBackward { dqkv: dqkv_out, delta, d_o: &d_o, o: &o, lse: &lse, qkv: &qkv, batch: &batch, heads };
    cpu.attention_backward(a).unwrap();
    [&o, &lse, &dqkv].into_iter().for_each(|x| keep(x));

    let head = cpu.upload(&HostMatrix::Dense(HostTensor::from_f32(vec![1000, k], &random(7, 1000 * k)))).unwrap();
    let (mut loss, mut dx) = (vec![0.0], poisoned(t * k));
    let a = HeadLoss { loss: &mut loss, dx: Some(&mut dx), x: &x, head: &head, batch: &batch, c: k, v: 1000 };
    cpu.head_loss(a).unwrap();
    keep(&loss);
    keep(&dx);
    let mut norm = vec![0.0];
    cpu.grad_norm(&mut norm, &random(8, 100_003)).unwrap();
    keep(&norm);
    out
}

#[test]
fn same_bits_run_to_run_and_on_any_number_of_threads() {
    let mut two = cpu();
    let want = bits(&mut two);
    assert!(bits(&mut two) == want, "the same backend again");
    for threads in [1, 3, 5] {
        assert!(bits(&mut Cpu::new(Some(threads))) == want, "{threads} threads");
    }
}
