use super::*;
use crate::backend::{Embedding, HeadLogits, HeadLoss};
use crate::tensor::{HostMatrix, HostTensor};

fn naive_logits(x: &[f64], head: &[f64], c: usize, row: usize) -> Vec<f64> {
    head.chunks(c).map(|w| w.iter().zip(&x[row * c..]).map(|(w, x)| w * x).sum()).collect()
}

fn naive_loss(x: &[f64], head: &[f64], c: usize, batch: &Batch<Cpu>) -> f64 {
    let targets = batch.target_rows[..batch.m].iter().zip(&batch.target_ids);
    let loss: f64 = targets
        .map(|(&row, &id)| {
            let z = naive_logits(x, head, c, row as usize);
            z.iter().map(|z| z.exp()).sum::<f64>().ln() - z[id as usize]
        })
        .sum();
    loss * f64::from(batch.scale[0])
}

#[test]
fn head_loss_adds_the_loss_and_sets_its_gradient() {
    let mut cpu = cpu();
    // The last ones take several slices of the head, and several chunks of rows.
    for (lengths, v, c) in [(vec![1], 7, 3), (vec![2, 9], 33, 5), (vec![40], 700, 8), (vec![30, 30], 1500, 4)] {
        let batch = batch(&mut cpu, &lengths, v as i32, 0.125);
        let (x, w) = (random(1, batch.t * c), random(2, v * c));
        let head = cpu.upload(&HostMatrix::Dense(HostTensor::from_f32(vec![v, c], &w))).unwrap();
        let want = naive_loss(&wide(&x), &wide(&w), c, &batch);
        for with_dx in [true, false] {
            let (mut loss, mut dx) = (vec![10.0], poisoned(batch.t * c));
            let (x, head, batch) = (&x, &head, &batch);
            let a = HeadLoss { loss: &mut loss, dx: with_dx.then_some(&mut dx), x, head, batch, c, v };
            cpu.head_loss(a).unwrap();
            assert!((f64::from(loss[0]) - 10.0 - want).abs() < 1e-6 * (10.0 + want), "{} {want}", loss[0]);
            if with_dx && v < 100 {
                let want = differences(&wide(x), |x| naive_loss(x, &wide(&w), c, batch));
                assert_close("dx", &dx, &want, 1e-5);
            } else if with_dx {
                // softmax - onehot, by its formula: differences would take too long here
                let mut want = vec![0.0; batch.t * c];
                for (&row, &id) in batch.target_rows[..batch.m].iter().zip(&batch.target_ids) {
                    let z = naive_logits(&wide(x), &wide(&w), c, row as usize);
                    let sum: f64 = z.iter().map(|z| z.exp()).sum();
                    for (j, z) in z.iter().enumerate() {
                        let d = z.exp() / sum - if j == id as usize { 1.0 } else { 0.0 };
                        for l in 0..c {
                            want[row as usize * c + l] += f64::from(batch.scale[0]) * d * f64::from(w[j * c + l]);
                        }
                    }
                }
                assert_close("dx", &dx, &want, 1e-5);
            } else {
                assert!(dx.iter().all(|x| x.is_nan()));
            }
        }
    }
}

#[test]
fn a_batch_without_targets_adds_nothing_and_has_a_zero_gradient() {
    let mut cpu = cpu();
    let host = HostBatch { tokens: vec![1, 2], targets: vec![IGNORE; 2], cu_seqlens: vec![0, 2] };
    let mut batch = Batch::new(&mut cpu, 2).unwrap();
    batch.fill(&mut cpu, &host, 1.0).unwrap();
    let head = cpu.upload(&HostMatrix::Dense(HostTensor::from_f32(vec![4, 3], &random(2, 12)))).unwrap();
    let (mut loss, mut dx, x) = (vec![5.0], vec![f32::NAN; 6], random(1, 6));
    let a = HeadLoss { loss: &mut loss, dx: Some(&mut dx), x: &x, head: &head, batch: &batch, c: 3, v: 4 };
    cpu.head_loss(a).unwrap();
    assert_eq!((loss, dx), (vec![5.0], vec![0.0; 6]));
}

#[test]
fn logits_far_apart_do_not_overflow_and_nan_reaches_the_loss() {
    let mut cpu = cpu();
    let batch = batch(&mut cpu, &[1], 3, 1.0);
    let w = [1.0, 0.0, -1.0];
    let head = cpu.upload(&HostMatrix::Dense(HostTensor::from_f32(vec![3, 1], &w))).unwrap();
    let mut run = |x: f32| {
        let (mut loss, mut dx) = (vec![0.0], vec![0.0]);
        let x = vec![x];
        let a = HeadLoss { loss: &mut loss, dx: Some(&mut dx), x: &x, head: &head, batch: &batch, c: 1, v: 3 };
        cpu.head_loss(a).unwrap();
        (loss[0], dx[0])
    };
    // The target is id 1, whose logit is 0.
    assert_eq!(run(1e4), (1e4, 1.0));
    assert_eq!(run(-1e4), (1e4, -1.0));
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        assert!(run(bad).0.is_nan(), "{bad}");
    }
}

#[test]
fn head_logits_of_chosen_rows_match() {
    let mut cpu = cpu();
    for (rows, v, c) in
        [(vec![4], 9, 3), (vec![0, 2, 2], 9, 3), (vec![4, 0], 1500, 4), (vec![1], 1500, 4), (vec![], 9, 3)]
    {
        let (x, w) = (random(1, 5 * c), random(2, v * c));
        let head = cpu.upload(&HostMatrix::Dense(HostTensor::from_f32(vec![v, c], &w))).unwrap();
        let mut logits = poisoned(rows.len() * v);
        cpu.head_logits(HeadLogits { logits: &mut logits, x: &x, head: &head, rows: &rows, c, v }).unwrap();
        let want: Vec<f64> = rows.iter().flat_map(|&r| naive_logits(&wide(&x), &wide(&w), c, r)).collect();
        assert_close("logits", &logits, &want, 1e-6);
    }
}

#[test]
fn embedding_copies_rows() {
    let mut cpu = cpu();
    let (v, c, t) = (11, 5, 40);
    let w = random(2, v * c);
    let table = cpu.upload(&HostMatrix::Dense(HostTensor::from_f32(vec![v, c], &w))).unwrap();
    let tokens: Vec<i32> = (0..t as i32).map(|i| (i * 3) % 11).collect();
    let mut x = poisoned(t * c);
    cpu.embedding(Embedding { x: &mut x, tokens: &tokens, table: &table, t, c }).unwrap();
    for (x, &token) in x.chunks(c).zip(&tokens) {
        assert_eq!(x, &w[token as usize * c..][..c]);
    }
    assert!(x[t * c..].iter().all(|x| x.is_nan()));
    for bad in [11, -1] {
        let a = Embedding { x: &mut x, tokens: &vec![0, bad], table: &table, t: 2, c };
        assert_shape_error(cpu.embedding(a), "embedding", "tokens (id below V)");
    }
}

#[test]
fn wrong_sizes_and_ids_name_op_and_argument() {
    let mut cpu = cpu();
    let mut batch = batch(&mut cpu, &[4], 9, 1.0);
    let head = cpu.upload(&HostMatrix::Dense(HostTensor::from_f32(vec![9, 3], &random(2, 27)))).unwrap();
    let (mut loss, x) = (vec![0.0], random(1, 12));
    let mut run = |batch: &Batch<Cpu>, x: &Vec<f32>, c: usize, v: usize| {
        cpu.head_loss(HeadLoss { loss: &mut loss, dx: None, x, head: &head, batch, c, v })
    };
    assert_shape_error(run(&batch, &vec![0.0; 11], 3, 9), "head_loss", "x");
    assert_shape_error(run(&batch, &x, 3, 10), "head_loss", "head (v)");
    batch.target_ids[1] = 9;
    assert_shape_error(run(&batch, &x, 3, 9), "head_loss", "batch.target_ids (id below V)");
    batch.target_rows[0] = 4;
    assert_shape_error(run(&batch, &x, 3, 9), "head_loss", "batch.target_rows (row below T)");
}
