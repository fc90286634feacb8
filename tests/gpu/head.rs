//! head_loss and head_logits as the graph calls them, against the CPU backend: one chunk and several, no targets, rows that
//! padding added.

use half::bf16;
use halfbyte::Error;
use halfbyte::backend::cpu::Cpu;
use halfbyte::backend::cuda::Cuda;
use halfbyte::backend::{Backend, Batch, HeadLogits, HeadLoss, HostBatch, IGNORE, Needs};
use halfbyte::tensor::{HostMatrix, HostTensor};
use libtest_mimic::Trial;

use crate::support::{Outcome, Random, poisoned, round, same, wide, within_twice};

/// (T, C, V), and how many of ten tokens are targets.
const SHAPES: [(usize, usize, usize, usize); 6] =
    [(1, 64, 100, 10), (70, 64, 1000, 10), (200, 72, 333, 6), (130, 64, 50_257, 8), (5, 64, 100, 0), (64, 64, 512, 1)];
/// More target tokens than a chunk of so wide a vocabulary holds.
const LARGE: (usize, usize, usize, usize) = (300, 16, 151_936, 9);

pub fn trials() -> Vec<Trial> {
    let mut trials = vec![];
    for s in SHAPES {
        trials.push(Trial::test(format!("head/loss/{}x{}_of_{}_{}", s.0, s.1, s.2, s.3), move || loss(s)));
    }
    trials.push(Trial::test("head/loss/large_several_chunks", || loss(LARGE)));
    for m in [1, 3, 8, 9, 100] {
        trials.push(Trial::test(format!("head/logits/{m}_rows"), move || logits(m)));
    }
    trials
}

fn needs((t, c, v, _): (usize, usize, usize, usize)) -> Needs {
    Needs { t, c, v, n: c, k: c, train: true, ..Needs::default() }
}

struct Case {
    host: HostBatch,
    x: Vec<f32>,
    head: HostMatrix,
    targets: usize,
}

impl Case {
    fn new((t, c, v, of_ten): (usize, usize, usize, usize)) -> Self {
        let mut random = Random::new((t * v + c) as u64);
        let target = |random: &mut Random| if random.below(10) < of_ten { random.below(v) as i32 } else { IGNORE };
        let targets: Vec<i32> = (0..t).map(|_| target(&mut random)).collect();
        let host = HostBatch { tokens: vec![1; t], targets, cu_seqlens: vec![0, t as i32] };
        let x = wide(&random.bf16s(t * c, 1.0));
        let head = HostMatrix::Dense(HostTensor::from_f32(vec![v, c], &wide(&random.bf16s(v * c, 0.2))));
        Self { targets: host.target_count(), host, x, head }
    }

    /// Loss from 10 on, and dx of the rows of the batch.
    fn run<B: Backend>(
        &self,
        backend: &mut B,
        dx: &mut B::Act,
        (t, c, v): (usize, usize, usize),
    ) -> Result<[Vec<f32>; 2], Error> {
        let mut batch = Batch::new(backend, t)?;
        batch.fill(backend, &self.host, 1.0 / self.targets.max(1) as f32)?;
        let (mut x, head) = (backend.alloc_act(batch.t * c)?, backend.upload(&self.head)?);
        backend.write_act(&mut x, &self.x)?;
        let mut loss = backend.alloc_f32(1)?;
        backend.write_f32(&mut loss, &[10.0])?;
        let batch = &batch;
        backend.head_loss(HeadLoss { loss: &mut loss, dx: Some(&mut *dx), x: &x, head: &head, batch, c, v })?;
        let (mut loss_out, mut dx_out) = (vec![0.0], vec![0.0; batch.t * c]);
        backend.read_f32(&loss, &mut loss_out)?;
        backend.read_act(dx, &mut dx_out)?;
        Ok([loss_out, dx_out])
    }
}

fn loss(shape: (usize, usize, usize, usize)) -> Outcome {
    let (t, c, v, _) = shape;
    let case = Case::new(shape);
    let mut cpu = Cpu::new(None);
    let [exact_loss, exact_dx] = case.run(&mut cpu, &mut vec![0.0; t * c], (t, c, v))?;
    let mut cuda = Cuda::open(0)?;
    cuda.prepare(&needs(shape))?;
    let padded = t.next_multiple_of(cuda.granularity());
    let mut found = vec![];
    for _ in 0..2 {
        let mut dx = poisoned::<bf16>(&cuda, padded * c)?;
        found.push(case.run(&mut cuda, &mut dx, (t, c, v))?);
    }
    same("loss again", &found[1][0], &found[0][0])?;
    same("dx again", &found[1][1], &found[0][1])?;
    let [loss, dx] = &found[0];
    assert!((loss[0] - exact_loss[0]).abs() <= 2e-3 * exact_loss[0].abs(), "loss {} for {}", loss[0], exact_loss[0]);
    same("dx of padding", &dx[t * c..], &vec![0.0; (padded - t) * c])?;
    within_twice("dx", &dx[..t * c], &plain_dx(&case, (t, c, v)), &exact_dx)
}

/// dx by a chain of bf16 ops: logits, softmax and gradient rounded.
fn plain_dx(case: &Case, (t, c, v): (usize, usize, usize)) -> Vec<f32> {
    let head = case.head.to_f32();
    let scale = 1.0 / case.targets.max(1) as f32;
    let mut dx = vec![0.0; t * c];
    for row in (0..t).filter(|&row| case.host.targets[row] != IGNORE) {
        let x = &case.x[row * c..(row + 1) * c];
        let dot = |w: &[f32]| w.iter().zip(x).map(|(w, x)| w * x).sum::<f32>();
        let z: Vec<f32> = head.chunks_exact(c).map(|w| round(dot(w))).collect();
        let top = z.iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b));
        let sum: f32 = z.iter().map(|z| (z - top).exp()).sum();
        let mut d = vec![0.0f32; c];
        for (j, z) in z.iter().enumerate() {
            let p = round((z - top).exp() / sum) - f32::from(u8::from(case.host.targets[row] as usize == j));
            let g = round(p * scale);
            d.iter_mut().zip(&head[j * c..(j + 1) * c]).for_each(|(d, w)| *d += g * w);
        }
        dx[row * c..(row + 1) * c].iter_mut().zip(d).for_each(|(to, d)| *to = round(d));
    }
    debug_assert_eq!(head.len(), v * c);
    dx
}

fn logits(m: usize) -> Outcome {
    let (t, c, v) = (150, 64, 1234);
    let case = Case::new((t, c, v, 0));
    let mut random = Random::new(m as u64);
    let rows: Vec<usize> = (0..m).map(|_| random.below(t)).collect();
    let mut cuda = Cuda::open(0)?;
    cuda.prepare(&needs((t, c, v, 0)))?;
    let mut x = cuda.alloc_act(t * c)?;
    cuda.write_act(&mut x, &case.x)?;
    let head = Backend::upload(&mut cuda, &case.head)?;
    let mut out = poisoned::<f32>(&cuda, m * v)?;
    cuda.head_logits(HeadLogits { logits: &mut out, x: &x, head: &head, rows: &rows, c, v })?;
    let mut exact = vec![0.0; m * v];
    let weights = case.head.to_f32();
    for (row, out) in rows.iter().zip(exact.chunks_exact_mut(v)) {
        let x = &case.x[row * c..(row + 1) * c];
        let dot = |w: &[f32]| w.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum::<f64>();
        out.iter_mut().zip(weights.chunks_exact(c)).for_each(|(out, w)| *out = dot(w) as f32);
    }
    let plain: Vec<f32> = exact.iter().map(|&z| round(z)).collect();
    within_twice("logits", &cuda.download(&out)?, &plain, &exact)
}
