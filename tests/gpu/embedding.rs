//! embedding: rows bit for bit, a token outside the table a row of zeros.

use half::bf16;
use halfbyte::backend::cuda::Cuda;
use halfbyte::backend::cuda::ops::embedding::{Embedding, embedding};
use libtest_mimic::Trial;

use crate::support::{Outcome, Random, poisoned, refused, same};

/// (T, C, V): one element, odd widths, widths of less and more than a CTA's share (4096).
const SHAPES: [(usize, usize, usize); 8] =
    [(1, 1, 1), (1, 8, 3), (7, 7, 5), (33, 576, 100), (70, 4096, 9), (5, 4104, 17), (3, 9000, 4), (300, 64, 1000)];

pub fn trials() -> Vec<Trial> {
    let mut trials = vec![Trial::test("embedding/wrong_sizes_name_the_op_and_the_argument", wrong_sizes)];
    for (t, c, v) in SHAPES {
        for unaligned in [false, true] {
            let name = format!("embedding/{t}x{c}_of_{v}{}", if unaligned { "_unaligned" } else { "" });
            trials.push(Trial::test(name, move || moves_rows(t, c, v, unaligned)));
        }
    }
    trials
}

fn moves_rows(t: usize, c: usize, v: usize, unaligned: bool) -> Outcome {
    let cuda = Cuda::open(0)?;
    let mut random = Random::new((t * c + v) as u64);
    let skip = usize::from(unaligned);
    let table = random.bf16s(v * c + skip, 1.0);
    let mut tokens: Vec<i32> = (0..t).map(|_| random.below(v) as i32).collect();
    if t > 2 {
        (tokens[0], tokens[t - 1]) = (-1, v as i32);
    }
    let mut expected = vec![];
    for &token in &tokens {
        match usize::try_from(token) {
            Ok(token) if token < v => expected.extend_from_slice(&table[skip + token * c..skip + (token + 1) * c]),
            _ => expected.extend(vec![bf16::ZERO; c]),
        }
    }
    let (table, tokens) = (cuda.upload(&table)?, cuda.upload(&tokens)?);
    let mut x = poisoned::<bf16>(&cuda, skip + t * c)?;
    let table = table.range(skip..skip + v * c);
    embedding(&cuda, Embedding { x: x.range_mut(skip..skip + t * c), tokens: tokens.view(), table, t, c, v })?;
    same("x", &cuda.download(&x)?[skip..], &expected)
}

fn wrong_sizes() -> Outcome {
    let cuda = Cuda::open(0)?;
    let (mut x, table, tokens) = (cuda.zeros::<bf16>(15)?, cuda.zeros::<bf16>(40)?, cuda.zeros::<i32>(2)?);
    let op = Embedding { x: x.view_mut(), tokens: tokens.view(), table: table.view(), t: 2, c: 8, v: 5 };
    refused(embedding(&cuda, op), "embedding", "x")?;
    let op = Embedding { x: x.view_mut(), tokens: tokens.view(), table: table.view(), t: 1, c: 8, v: 6 };
    refused(embedding(&cuda, op), "embedding", "table")
}
