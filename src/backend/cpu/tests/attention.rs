use proptest::prelude::*;

use super::*;
use crate::backend::{AttentionBackward, AttentionDecode, AttentionForward, Heads, KvCache};

/// o (T, H*D) and lse (H, T), one score at a time.
fn naive(qkv: &[f64], lengths: &[usize], heads: Heads) -> (Vec<f64>, Vec<f64>) {
    let (h, g, d) = (heads.h, heads.g, heads.d);
    let width = (h + 2 * g) * d;
    let t: usize = lengths.iter().sum();
    let (mut o, mut lse) = (vec![0.0; t * h * d], vec![0.0; h * t]);
    let mut start = 0;
    for len in lengths {
        for head in 0..h {
            let kv = head / (h / g);
            for i in 0..*len {
                let q = &qkv[(start + i) * width + head * d..][..d];
                let from = heads.window.map_or(0, |w| (i + 1).saturating_sub(w));
                let weights: Vec<f64> = (from..=i)
                    .map(|j| {
                        let k = &qkv[(start + j) * width + (h + kv) * d..][..d];
                        (q.iter().zip(k).map(|(q, k)| q * k).sum::<f64>() / (d as f64).sqrt()).exp()
                    })
                    .collect();
                let sum: f64 = weights.iter().sum();
                lse[head * t + start + i] = sum.ln();
                for (j, p) in (from..=i).zip(&weights) {
                    let v = &qkv[(start + j) * width + (h + g + kv) * d..][..d];
                    for (o, v) in o[((start + i) * h + head) * d..][..d].iter_mut().zip(v) {
                        *o += p / sum * v;
                    }
                }
            }
        }
        start += len;
    }
    (o, lse)
}

struct Case {
    heads: Heads,
    batch: Batch<Cpu>,
    qkv: Vec<f32>,
    o: Vec<f32>,
    lse: Vec<f32>,
}

fn forward(cpu: &mut Cpu, lengths: &[usize], heads: Heads, seed: u32) -> Case {
    let t: usize = lengths.iter().sum();
    let batch = batch(cpu, lengths, 100, 1.0);
    // Twice ±1, so that the softmax is far from flat.
    let qkv: Vec<f32> = random(seed, t * heads.qkv()).iter().map(|x| 2.0 * x).collect();
    let (mut o, mut lse) = (poisoned(t * heads.h * heads.d), poisoned(heads.h * t));
    cpu.attention_forward(AttentionForward { o: &mut o, lse: &mut lse, qkv: &qkv, batch: &batch, heads }).unwrap();
    Case { heads, batch, qkv, o, lse }
}

fn backward(cpu: &mut Cpu, c: &Case, d_o: &Vec<f32>) -> Vec<f32> {
    let (mut dqkv, mut delta) = (poisoned(c.batch.t * c.heads.qkv()), poisoned(c.heads.h * c.batch.t));
    let Case { heads, batch, qkv, o, lse } = c;
    let a = AttentionBackward { dqkv: &mut dqkv, delta: &mut delta, d_o, o, lse, qkv, batch, heads: *heads };
    cpu.attention_backward(a).unwrap();
    dqkv
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn forward_matches_for_any_packing_grouping_and_window(
        lengths in prop::collection::vec(1usize..90, 1..5),
        (g, group) in (1usize..3, 1usize..5),
        half in 1usize..9,
        window in prop::option::of(1usize..100),
        seed in any::<u32>(),
    ) {
        let heads = Heads { h: g * group, g, d: 2 * half, window };
        let c = forward(&mut cpu(), &lengths, heads, seed);
        let (o, lse) = naive(&wide(&c.qkv), &lengths, heads);
        assert_close("o", &c.o, &o, 2e-6);
        assert_close("lse", &c.lse, &lse, 2e-6);
    }
}

#[test]
fn backward_is_the_gradient_for_all_groupings_and_windows() {
    let mut cpu = cpu();
    let shapes = [(1, 1, None), (3, 1, None), (4, 1, Some(3)), (4, 2, Some(1)), (2, 2, Some(70))];
    for (lengths, d) in [(vec![1], 2), (vec![5, 1, 9], 4), (vec![67], 2)] {
        for (h, g, window) in shapes {
            let heads = Heads { h, g, d, window };
            let c = forward(&mut cpu, &lengths, heads, 5);
            let d_o = random(6, c.batch.t * h * d);
            let dqkv = backward(&mut cpu, &c, &d_o);
            let want = differences(&wide(&c.qkv), |qkv| weighted(&naive(qkv, &lengths, heads).0, &d_o));
            assert_close(&format!("dqkv of {lengths:?} {heads:?}"), &dqkv, &want, 1e-5);
        }
    }
}

#[test]
fn packed_sequences_equal_sequences_alone() {
    let mut cpu = cpu();
    let heads = Heads { h: 3, g: 1, d: 8, window: Some(20) };
    let lengths = [70, 1, 130];
    let packed = forward(&mut cpu, &lengths, heads, 9);
    let d_o = random(2, 201 * 24);
    let dqkv = backward(&mut cpu, &packed, &d_o);
    let mut start = 0;
    for len in lengths {
        let mut alone = forward(&mut cpu, &[len], heads, 9);
        alone.qkv.copy_from_slice(&packed.qkv[start * heads.qkv()..][..len * heads.qkv()]);
        let Case { o, lse, qkv, batch, .. } = &mut alone;
        cpu.attention_forward(AttentionForward { o, lse, qkv, batch, heads }).unwrap();
        assert_eq!(alone.o[..len * 24], packed.o[start * 24..][..len * 24]);
        let alone_dqkv = backward(&mut cpu, &alone, &d_o[start * 24..].to_vec());
        assert_eq!(alone_dqkv[..len * heads.qkv()], dqkv[start * heads.qkv()..][..len * heads.qkv()]);
        start += len;
    }
}

#[test]
fn large_scores_do_not_overflow() {
    let mut cpu = cpu();
    let heads = Heads { h: 1, g: 1, d: 2, window: None };
    let mut c = forward(&mut cpu, &[3], heads, 1);
    for x in &mut c.qkv {
        *x *= 1e3;
    }
    let Case { o, lse, qkv, batch, .. } = &mut c;
    cpu.attention_forward(AttentionForward { o, lse, qkv, batch, heads }).unwrap();
    assert!(c.o[..6].iter().chain(&c.lse[..3]).all(|x| x.is_finite()));
}

#[test]
fn a_nan_reaches_every_query_that_sees_it() {
    let mut cpu = cpu();
    let heads = Heads { h: 2, g: 1, d: 2, window: None };
    let mut c = forward(&mut cpu, &[50, 50], heads, 1);
    // A key of the second sequence
    c.qkv[60 * heads.qkv() + 4] = f32::NAN;
    let Case { o, lse, qkv, batch, .. } = &mut c;
    cpu.attention_forward(AttentionForward { o, lse, qkv, batch, heads }).unwrap();
    for t in 0..100 {
        for h in 0..2 {
            assert_eq!(c.lse[h * 100 + t].is_nan(), t >= 60, "token {t}");
        }
    }
    assert!(c.o[..50 * 4].iter().all(|o| o.is_finite()), "the other sequence is untouched");
}

#[test]
fn decode_in_any_chunks_equals_forward_over_the_whole_sequence() {
    let mut cpu = cpu();
    for (heads, chunks) in [
        (Heads { h: 4, g: 2, d: 6, window: None }, vec![1, 1, 1, 5, 70, 1]),
        (Heads { h: 3, g: 1, d: 4, window: Some(5) }, vec![79]),
        (Heads { h: 2, g: 2, d: 8, window: Some(66) }, vec![68, 1, 1, 9]),
    ] {
        let t: usize = chunks.iter().sum();
        let (row, out, kv) = (heads.qkv(), heads.h * heads.d, heads.g * heads.d);
        let whole = forward(&mut cpu, &[t], heads, 3);
        let mut cache = KvCache { k: poisoned(t * kv), v: poisoned(t * kv) };
        let mut past = 0;
        for n in chunks {
            let qkv = whole.qkv[past * row..(past + n) * row].to_vec();
            let mut o = poisoned(n * out);
            let positions: Vec<i32> = (past..past + n).map(|p| p as i32).collect();
            let a =
                AttentionDecode { o: &mut o, cache: &mut cache, qkv: &qkv, positions: &positions, t: n, past, heads };
            cpu.attention_decode(a).unwrap();
            assert_close("o", &o, &wide(&whole.o[past * out..][..n * out]), 2e-6);
            past += n;
        }
    }
}

#[test]
fn wrong_sizes_name_op_and_argument() {
    let mut cpu = cpu();
    let heads = Heads { h: 3, g: 2, d: 2, window: None };
    let mut c = forward(&mut cpu, &[4], Heads { h: 2, ..heads }, 1);
    let Case { o, lse, qkv, batch, .. } = &mut c;
    let a = AttentionForward { o, lse, qkv, batch, heads };
    assert_shape_error(cpu.attention_forward(a), "attention_forward", "heads");
    let a = AttentionForward { o, lse, qkv, batch, heads: Heads { h: 2, window: Some(0), ..heads } };
    assert_shape_error(cpu.attention_forward(a), "attention_forward", "window");
    let a = AttentionForward { o, lse, qkv, batch, heads: Heads { h: 4, ..heads } };
    assert_shape_error(cpu.attention_forward(a), "attention_forward", "o");
    batch.cu_seqlens[0] = 1;
    let a = AttentionForward { o, lse, qkv, batch, heads: Heads { h: 2, ..heads } };
    assert_shape_error(cpu.attention_forward(a), "attention_forward", "cu_seqlens (first)");
    let mut cache = KvCache { k: vec![0.0; 4 * 4], v: vec![0.0; 4 * 4] };
    let a = AttentionDecode {
        o,
        cache: &mut cache,
        qkv,
        positions: &vec![4],
        t: 1,
        past: 4,
        heads: Heads { h: 2, ..heads },
    };
    assert_shape_error(cpu.attention_decode(a), "attention_decode", "cache.k");
}
