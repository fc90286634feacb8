//! grad_norm against a sum in f64.

use halfbyte::backend::cuda::Cuda;
use halfbyte::backend::cuda::ops::grad_norm::{GRAD_NORM_PARTIALS, GradNorm, grad_norm};
use libtest_mimic::Trial;

use crate::support::{Outcome, Random, poisoned, refused, same, within_twice};

/// Around vectors of 4, a CTA's round (4096), all CTAs' round (4,194,304).
const SIZES: [usize; 12] = [0, 1, 2, 3, 4, 5, 1000, 4096, 4099, 300_001, 4_194_304, 4_200_003];

pub fn trials() -> Vec<Trial> {
    let mut trials = vec![
        Trial::test("grad_norm/wrong_sizes_name_the_op_and_the_argument", wrong_sizes),
        Trial::test("grad_norm/of_a_gradient_with_nan_is_nan", || not_finite(f32::NAN)),
        Trial::test("grad_norm/of_a_gradient_with_infinity_is_infinite", || not_finite(f32::INFINITY)),
    ];
    for n in SIZES {
        for skip in [0, 1, 2] {
            trials.push(Trial::test(format!("grad_norm/{n}_from_{skip}"), move || agrees(n, skip)));
        }
    }
    trials
}

fn norm_of(cuda: &Cuda, grads: &[f32], skip: usize) -> Result<f32, halfbyte::Error> {
    let grads = cuda.upload(grads)?;
    let (mut norm, mut partial) = (poisoned::<f32>(cuda, 1)?, poisoned::<f64>(cuda, GRAD_NORM_PARTIALS)?);
    let op = GradNorm { norm: norm.view_mut(), grads: grads.range(skip..grads.len()), partial: partial.view_mut() };
    grad_norm(cuda, op)?;
    Ok(cuda.download(&norm)?[0])
}

fn agrees(n: usize, skip: usize) -> Outcome {
    let cuda = Cuda::open(0)?;
    let mut random = Random::new((n + skip) as u64);
    // Rare large ones, as gradients have.
    let mut grads = random.f32s(n + skip, 1e-4);
    grads.iter_mut().step_by(997).for_each(|g| *g *= 1e3);
    let exact = grads[skip..].iter().map(|&g| f64::from(g) * f64::from(g)).sum::<f64>().sqrt() as f32;
    let found = norm_of(&cuda, &grads, skip)?;
    within_twice("norm", &[found], &[exact], &[exact])?;
    same("norm, second run", &[norm_of(&cuda, &grads, skip)?], &[found])
}

fn not_finite(value: f32) -> Outcome {
    let cuda = Cuda::open(0)?;
    let mut grads = vec![0.5f32; 5001];
    for at in [0, 2500, 5000] {
        grads[at] = value;
        let found = norm_of(&cuda, &grads, 0)?;
        if found.is_finite() || found.is_nan() != value.is_nan() {
            return Err(format!("with {value} at {at} the norm is {found}").into());
        }
        grads[at] = 0.5;
    }
    Ok(())
}

fn wrong_sizes() -> Outcome {
    let cuda = Cuda::open(0)?;
    let (mut norm, grads) = (cuda.zeros::<f32>(1)?, cuda.zeros::<f32>(10)?);
    let mut partial = cuda.zeros::<f64>(GRAD_NORM_PARTIALS - 1)?;
    let op = GradNorm { norm: norm.view_mut(), grads: grads.view(), partial: partial.view_mut() };
    refused(grad_norm(&cuda, op), "grad_norm", "partial")
}
