//! Each op against straightforward loops in f64 written here, and each backward against central differences of those.
//! Outputs hold NaN before, buffers are longer than needed, sizes are odd.

mod attention;
mod determinism;
mod elementwise;
mod head;
mod linear;
mod optimizer;

use super::{Batch, Cpu};
use crate::backend::{Backend, HostBatch, IGNORE};
use crate::error::{Error, Result};
use crate::rng::{Stream, uniform};

/// A backend of two threads, whatever the machine.
fn cpu() -> Cpu {
    Cpu::new(Some(2))
}

/// n numbers in ±1 of a sequence of its own for each seed.
fn random(seed: u32, n: usize) -> Vec<f32> {
    (0..n as u64).map(|i| 2.0 * uniform(11, Stream::Init, seed, i) - 1.0).collect()
}

/// A buffer of NaN with room to spare.
fn poisoned(n: usize) -> Vec<f32> {
    vec![f32::NAN; n + 3]
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

/// Relative L2 distance below `tolerance`, and the spare room behind untouched.
#[track_caller]
fn assert_close(what: &str, got: &[f32], want: &[f64], tolerance: f64) {
    assert!(got.len() >= want.len());
    let difference: f64 = got.iter().zip(want).map(|(g, w)| (f64::from(*g) - w).powi(2)).sum::<f64>().sqrt();
    let size: f64 = want.iter().map(|w| w * w).sum::<f64>().sqrt();
    assert!(difference <= tolerance * size.max(1e-3), "{what}: off by {difference:e} of {size:e}");
    assert!(got[want.len()..].iter().all(|x| x.is_nan()), "{what}: wrote behind its end");
}

/// The gradient of `f` at `x` by central differences.
fn differences(x: &[f64], f: impl Fn(&[f64]) -> f64) -> Vec<f64> {
    let h = 1e-5;
    let mut x = x.to_vec();
    (0..x.len())
        .map(|i| {
            let old = x[i];
            x[i] = old + h;
            let up = f(&x);
            x[i] = old - h;
            let down = f(&x);
            x[i] = old;
            (up - down) / (2.0 * h)
        })
        .collect()
}

fn weighted(y: &[f64], dy: &[f32]) -> f64 {
    y.iter().zip(dy).map(|(y, d)| y * f64::from(*d)).sum()
}

/// Sequences of the given lengths; tokens and targets below `vocab`, every third position without a target.
fn batch(cpu: &mut Cpu, lengths: &[usize], vocab: i32, scale: f32) -> Batch<Cpu> {
    let t: usize = lengths.iter().sum();
    let mut host = HostBatch { cu_seqlens: vec![0], ..HostBatch::default() };
    for (i, _) in (0..t).enumerate() {
        host.tokens.push((i as i32 * 7 + 3) % vocab);
        host.targets.push(if i % 3 == 1 { IGNORE } else { (i as i32 * 5 + 1) % vocab });
    }
    for n in lengths {
        host.cu_seqlens.push(host.cu_seqlens.last().unwrap() + *n as i32);
    }
    let mut batch = Batch::new(cpu, t + 5).unwrap();
    batch.fill(cpu, &host, scale).unwrap();
    batch
}

/// The error names the op and the argument.
#[track_caller]
fn assert_shape_error(result: Result<()>, op: &str, argument: &str) {
    match result {
        Err(Error::Shape { op: o, argument: a, .. }) => assert_eq!((o, a), (op, argument)),
        other => panic!("expected a shape error of {op}: {argument}, got {other:?}"),
    }
}

#[test]
fn moves_keep_bits_and_leave_the_rest_alone() {
    let mut cpu = cpu();
    let mut x = vec![9.0; 5];
    cpu.write_act(&mut x, &[1.0, f32::MIN_POSITIVE, -0.0]).unwrap();
    assert_eq!(x, [1.0, f32::MIN_POSITIVE, 0.0, 9.0, 9.0]);
    let mut y = [0.0; 4];
    cpu.read_act(&x, &mut y).unwrap();
    assert_eq!(y, x[..4]);
    cpu.zero_f32(&mut x).unwrap();
    assert_eq!(x, [0.0; 5]);
    let mut x = vec![9.0; 5];
    cpu.zero_act(&mut x).unwrap();
    assert_eq!(x, [0.0; 5]);
    assert_shape_error(cpu.write_act(&mut x, &[0.0; 6]), "write_act", "dst");
    assert_shape_error(cpu.read_f32(&x, &mut [0.0; 6]), "read_f32", "src");
    assert_eq!(cpu.describe(), "CPU (2 threads)");
}

#[test]
fn times_count_the_calls_of_each_op_until_reset() {
    let mut cpu = cpu();
    let (mut norm, grads) = (vec![0.0], vec![1.0; 4]);
    for _ in 0..3 {
        cpu.grad_norm(&mut norm, &grads).unwrap();
    }
    let counts: Vec<_> = cpu.times().iter().map(|t| (t.op, t.calls)).collect();
    assert_eq!(counts, [("grad_norm", 3)]);
    cpu.reset_times();
    assert!(cpu.times().is_empty());
}
