//! bias_rows: rows bit for bit, and nothing between them.

use half::bf16;
use halfbyte::backend::cuda::Cuda;
use halfbyte::backend::cuda::ops::bias::{BiasRows, bias_rows};
use libtest_mimic::Trial;

use crate::support::{Outcome, Random, elements, poisoned, refused, same};

/// (T, N, row stride)
const SHAPES: [(usize, usize, usize); 6] =
    [(1, 1, 1), (3, 8, 8), (7, 65, 70), (33, 1536, 2048), (5, 4104, 4104), (300, 64, 65)];

pub fn trials() -> Vec<Trial> {
    let mut trials = vec![Trial::test("bias_rows/wrong_sizes_name_the_op_and_the_argument", wrong_sizes)];
    for (t, n, ld) in SHAPES {
        for skip in [0, 1] {
            let name = format!("bias_rows/{t}x{n}_stride_{ld}_from_{skip}");
            trials.push(Trial::test(name, move || fills_rows(t, n, ld, skip)));
        }
    }
    trials
}

fn fills_rows(t: usize, n: usize, ld: usize, skip: usize) -> Outcome {
    let cuda = Cuda::open(0)?;
    let bias = Random::new((t * n) as u64).bf16s(n + skip, 1.0);
    let mut expected = elements::<bf16>(&vec![0xa5; 2 * (skip + t * ld)]);
    for row in 0..t {
        expected[skip + row * ld..][..n].copy_from_slice(&bias[skip..]);
    }
    let mut y = poisoned::<bf16>(&cuda, skip + t * ld)?;
    let bias = cuda.upload(&bias)?;
    let (out, bias) = (y.range_mut(skip..skip + t * ld), bias.range(skip..skip + n));
    bias_rows(&cuda, BiasRows { y: out, ld, bias, t, n })?;
    same("y", &cuda.download(&y)?, &expected)
}

fn wrong_sizes() -> Outcome {
    let cuda = Cuda::open(0)?;
    let (mut y, bias) = (cuda.zeros::<bf16>(15)?, cuda.zeros::<bf16>(8)?);
    let op = BiasRows { y: y.view_mut(), ld: 8, bias: bias.view(), t: 2, n: 8 };
    refused(bias_rows(&cuda, op), "bias_rows", "y")?;
    let op = BiasRows { y: y.view_mut(), ld: 9, bias: bias.view(), t: 1, n: 9 };
    refused(bias_rows(&cuda, op), "bias_rows", "bias")?;
    let op = BiasRows { y: y.view_mut(), ld: 4, bias: bias.view(), t: 1, n: 8 };
    refused(bias_rows(&cuda, op), "bias_rows", "ld")
}
