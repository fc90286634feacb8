//! cross_entropy against sums in f64; gather_rows, scatter_rows and add_loss bit for bit.

use half::bf16;
use halfbyte::Error;
use halfbyte::backend::IGNORE;
use halfbyte::backend::cuda::Cuda;
use halfbyte::backend::cuda::ops::cross_entropy::{self as ops, AddLoss, CrossEntropy, GatherRows, ScatterRows};
use libtest_mimic::Trial;

use crate::support::{Outcome, Random, poisoned, refused, round, same, within_twice};

/// (m, V): one logit, odd widths, around a CTA's chunk (4096), vocabularies of Mistral, Llama 3, Qwen 3, and one with a
/// token added.
const SHAPES: [(usize, usize); 14] = [
    (1, 1),
    (3, 2),
    (2, 7),
    (6, 8),
    (5, 1000),
    (3, 4095),
    (3, 4096),
    (3, 4097),
    (2, 4104),
    (3, 12_296),
    (7, 32_000),
    (3, 32_001),
    (2, 128_256),
    (3, 151_937),
];

pub fn trials() -> Vec<Trial> {
    let mut trials = vec![
        Trial::test("cross_entropy/wrong_sizes_name_the_op_and_the_argument", wrong_sizes),
        Trial::test("cross_entropy/equal_logits_lose_ln_v", equal_logits),
        Trial::test("cross_entropy/logits_of_any_size", logits_of_any_size),
        Trial::test("cross_entropy/large/512x32000", || agrees(512, 32_000, 4.0)),
    ];
    for (m, v) in SHAPES {
        trials.push(Trial::test(format!("cross_entropy/{m}x{v}"), move || agrees(m, v, 4.0)));
    }
    for (m, c) in [(1, 1), (5, 7), (33, 576), (9, 4096), (3, 8200), (300, 64)] {
        trials.push(Trial::test(format!("gather_rows/{m}x{c}"), move || gather(m, c)));
        trials.push(Trial::test(format!("scatter_rows/{m}x{c}"), move || scatter(m, c)));
    }
    for m in [0, 1, 511, 512, 8192, 100_003] {
        trials.push(Trial::test(format!("add_loss/{m}"), move || adds_losses(m)));
    }
    trials
}

/// Logits afterwards, and the losses.
fn run(cuda: &Cuda, logits: &[f32], ids: &[i32], scale: f32, gradient: bool) -> Result<(Vec<f32>, Vec<f32>), Error> {
    let (m, v) = (ids.len(), logits.len() / ids.len());
    let (mut z, ids, scale) = (cuda.upload(logits)?, cuda.upload(ids)?, cuda.upload(&[scale])?);
    let mut row_loss = poisoned::<f32>(cuda, m)?;
    let op = CrossEntropy {
        logits: z.view_mut(),
        row_loss: row_loss.view_mut(),
        ids: ids.view(),
        scale: scale.view(),
        gradient,
        m,
        v,
    };
    ops::cross_entropy(cuda, op)?;
    Ok((cuda.download(&z)?, cuda.download(&row_loss)?))
}

/// The gradient that lies where the logits were, (m, V).
fn gradient_of(logits: &[f32], v: usize) -> Vec<f32> {
    let narrow: &[bf16] = bytemuck::cast_slice(logits);
    narrow.chunks_exact(2 * v).flat_map(|row| &row[..v]).map(|g| g.to_f32()).collect()
}

fn agrees(m: usize, v: usize, spread: f32) -> Outcome {
    let mut random = Random::new((m * v) as u64);
    // Cheaper than a normal deviate: there are up to 16 million.
    let logits: Vec<f32> = (0..m * v).map(|_| spread * 2.0 * (random.uniform() + random.uniform() - 1.0)).collect();
    let mut ids: Vec<i32> = (0..m).map(|_| random.below(v) as i32).collect();
    if m > 2 {
        (ids[0], ids[m - 1]) = (IGNORE, v as i32 - 1);
    }
    if m > 4 {
        (ids[1], ids[2], ids[3]) = (-1, v as i32, 0);
    }
    holds(&logits, &ids, 0.37 / m as f32)
}

/// Loss and gradient of these logits, with and without gradient, twice.
fn holds(logits: &[f32], ids: &[i32], scale: f32) -> Outcome {
    let cuda = Cuda::open(0)?;
    let v = logits.len() / ids.len();
    let (after, row_loss) = run(&cuda, logits, ids, scale, true)?;
    let again = run(&cuda, logits, ids, scale, true)?;
    same("gradient, second run", &again.0, &after)?;
    same("row_loss, second run", &again.1, &row_loss)?;
    let (untouched, loss_alone) = run(&cuda, logits, ids, scale, false)?;
    same("logits without gradient", &untouched, logits)?;
    same("row_loss without gradient", &loss_alone, &row_loss)?;

    let found = gradient_of(&after, v);
    let (mut exact_loss, mut exact, mut plain) = (vec![], vec![], vec![]);
    for (row, (z, &id)) in logits.chunks_exact(v).zip(ids).enumerate() {
        let Some(id) = usize::try_from(id).ok().filter(|&id| id < v) else {
            exact_loss.push(0.0);
            exact.extend(vec![0.0; v]);
            plain.extend(vec![0.0; v]);
            same(&format!("gradient of row {row} without a target"), &found[row * v..(row + 1) * v], &vec![0.0; v])?;
            continue;
        };
        let top = z.iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b));
        let sum: f64 = z.iter().map(|&z| f64::from(z - top).exp()).sum();
        exact_loss.push((sum.ln() + f64::from(top) - f64::from(z[id])) as f32);
        for (i, &z) in z.iter().enumerate() {
            let p = f64::from(z - top).exp() / sum;
            let target = if i == id { 1.0 } else { 0.0 };
            exact.push((f64::from(scale) * (p - f64::from(target))) as f32);
            plain.push(round(round(round(p as f32) - target) * scale));
        }
    }
    near("row_loss", &row_loss, &exact_loss)?;
    within_twice("gradient", &found, &plain, &exact)
}

/// The f32 bound of a loss: what it is near zero is the difference of numbers of order 1.
fn near(what: &str, found: &[f32], exact: &[f32]) -> Outcome {
    let off = |(a, b): (&f32, &f32)| (a - b).is_nan() || (a - b).abs() > 1e-6 + 2e-6 * b.abs();
    match found.iter().zip(exact).position(off) {
        Some(i) => Err(format!("{what}: element {i} is {}, expected {}", found[i], exact[i]).into()),
        None => Ok(()),
    }
}

fn equal_logits() -> Outcome {
    let cuda = Cuda::open(0)?;
    for v in [1usize, 8, 9, 5000, 32_000] {
        let (_, row_loss) = run(&cuda, &vec![-3.25; 2 * v], &[0, v as i32 - 1], 1.0, true)?;
        near(&format!("row_loss, V = {v}"), &row_loss, &[(v as f32).ln(); 2])?;
    }
    Ok(())
}

fn logits_of_any_size() -> Outcome {
    let v = 5000;
    let mut random = Random::new(5);
    let mut row = |scale: f32, shift: f32| (0..v).map(|_| shift + scale * random.normal()).collect::<Vec<f32>>();
    let mut rows = [row(1e-3, 0.0), row(100.0, 0.0), row(1.0, 1e4), row(1.0, -1e4), row(1e30, 0.0), row(1.0, 0.0)];
    rows[5][17] = f32::NEG_INFINITY; // a masked token
    for (i, z) in rows.iter().enumerate() {
        for id in [0, 16, 4999] {
            holds(z, &[id], 0.5).map_err(|e| format!("row {i}, id {id}: {}", e.message().unwrap_or("?")))?;
        }
    }
    Ok(())
}

/// m rows of a matrix of 3m + 1, some of them absent.
fn choose(random: &mut Random, m: usize) -> (usize, Vec<i32>) {
    let rows = (0..m).map(|i| if i % 5 == 4 { -1 } else { (3 * i + random.below(3)) as i32 });
    (3 * m + 1, rows.collect())
}

fn gather(m: usize, c: usize) -> Outcome {
    let cuda = Cuda::open(0)?;
    let mut random = Random::new((m * c) as u64);
    let (t, rows) = choose(&mut random, m);
    let x = random.bf16s(t * c, 1.0);
    let absent = vec![bf16::ZERO; c];
    let row = |r: i32| usize::try_from(r).map_or(&absent[..], |r| &x[r * c..(r + 1) * c]);
    let expected: Vec<bf16> = rows.iter().flat_map(|&r| row(r)).copied().collect();
    let (gpu_x, rows) = (cuda.upload(&x)?, cuda.upload(&rows)?);
    let mut out = poisoned::<bf16>(&cuda, m * c)?;
    ops::gather_rows(&cuda, GatherRows { out: out.view_mut(), x: gpu_x.view(), rows: rows.view(), m, c, t })?;
    same("out", &cuda.download(&out)?, &expected)
}

fn scatter(m: usize, c: usize) -> Outcome {
    let cuda = Cuda::open(0)?;
    let mut random = Random::new((m * c) as u64);
    let (t, rows) = choose(&mut random, m);
    let (d_rows, before) = (random.bf16s(m * c, 1.0), random.bf16s(t * c, 1.0));
    let mut expected = before.clone();
    for (i, &r) in rows.iter().enumerate() {
        if let Ok(r) = usize::try_from(r) {
            expected[r * c..(r + 1) * c].copy_from_slice(&d_rows[i * c..(i + 1) * c]);
        }
    }
    let (mut dx, d_rows, rows) = (cuda.upload(&before)?, cuda.upload(&d_rows)?, cuda.upload(&rows)?);
    let op = ScatterRows { dx: dx.view_mut(), d_rows: d_rows.view(), rows: rows.view(), m, c, t };
    ops::scatter_rows(&cuda, op)?;
    same("dx", &cuda.download(&dx)?, &expected)
}

fn adds_losses(m: usize) -> Outcome {
    let cuda = Cuda::open(0)?;
    let mut random = Random::new(m as u64);
    let losses: Vec<f32> = (0..m).map(|_| 12.0 * random.uniform()).collect();
    let scale = 1.0 / (m + 1) as f32;
    let exact = (0.75 + f64::from(scale) * losses.iter().map(|&l| f64::from(l)).sum::<f64>()) as f32;
    let (row_loss, scale) = (cuda.upload(&losses)?, cuda.upload(&[scale])?);
    let run = || -> Result<Vec<f32>, Error> {
        let mut loss = cuda.upload(&[0.75f32])?;
        ops::add_loss(&cuda, AddLoss { loss: loss.view_mut(), row_loss: row_loss.view(), scale: scale.view(), m })?;
        cuda.download(&loss)
    };
    let found = run()?;
    same("loss, second run", &run()?, &found)?;
    within_twice("loss", &found, &[exact], &[exact])
}

fn wrong_sizes() -> Outcome {
    let cuda = Cuda::open(0)?;
    let (mut z, mut row_loss) = (cuda.zeros::<f32>(20)?, cuda.zeros::<f32>(2)?);
    let (ids, scale) = (cuda.zeros::<i32>(3)?, cuda.zeros::<f32>(1)?);
    let mut run = |m, v| {
        let op = CrossEntropy {
            logits: z.view_mut(),
            row_loss: row_loss.view_mut(),
            ids: ids.view(),
            scale: scale.view(),
            gradient: true,
            m,
            v,
        };
        ops::cross_entropy(&cuda, op)
    };
    refused(run(2, 11), "cross_entropy", "logits")?;
    refused(run(3, 2), "cross_entropy", "row_loss")?;
    refused(run(1, 0), "cross_entropy", "v")?;
    let (mut out, x) = (cuda.zeros::<bf16>(16)?, cuda.zeros::<bf16>(24)?);
    let op = GatherRows { out: out.view_mut(), x: x.view(), rows: ids.view(), m: 3, c: 8, t: 3 };
    refused(ops::gather_rows(&cuda, op), "gather_rows", "out")?;
    let op = ScatterRows { dx: out.view_mut(), d_rows: x.view(), rows: ids.view(), m: 3, c: 8, t: 3 };
    refused(ops::scatter_rows(&cuda, op), "scatter_rows", "dx")?;
    let op = AddLoss { loss: z.view_mut(), row_loss: row_loss.view(), scale: scale.view(), m: 3 };
    refused(ops::add_loss(&cuda, op), "add_loss", "row_loss")
}
