//! rope forward and backward against the CPU backend, at positions up to 131,071.

use half::bf16;
use halfbyte::backend::cpu::Cpu;
use halfbyte::backend::cuda::Cuda;
use halfbyte::backend::cuda::ops::rope::{Rope, rope_backward, rope_forward};
use halfbyte::backend::{self, Backend, Heads};
use libtest_mimic::Trial;

use crate::support::{Outcome, Random, poisoned, refused, round, same, wide, within_twice};

/// (H, G, D): every grouping, head sizes of vectors and of none, more than one vector-load's depth (H+G > 32).
const HEADS: [(usize, usize, usize); 11] = [
    (1, 1, 2),
    (2, 2, 16),
    (2, 1, 20),
    (4, 1, 64),
    (9, 3, 64),
    (8, 1, 96),
    (32, 8, 128),
    (8, 8, 128),
    (2, 1, 256),
    (40, 5, 32),
    (1, 1, 520),
];

pub fn trials() -> Vec<Trial> {
    let mut trials = vec![Trial::test("rope/wrong_sizes_name_the_op_and_the_argument", wrong_sizes)];
    for (h, g, d) in HEADS {
        for t in [1, 5, 67] {
            let heads = Heads { h, g, d, window: None };
            trials.push(Trial::test(format!("rope/{t}_tokens_heads_{h}_{g}_{d}"), move || agrees(t, heads, 0)));
        }
    }
    let heads = Heads { h: 4, g: 2, d: 64, window: None };
    trials.push(Trial::test("rope/unaligned", move || agrees(9, heads, 1)));
    trials
}

fn agrees(t: usize, heads: Heads, skip: usize) -> Outcome {
    let cuda = Cuda::open(0)?;
    let (width, half) = (heads.qkv(), heads.d / 2);
    let mut random = Random::new((t * width) as u64);
    let positions: Vec<i32> = (0..t)
        .map(|i| match i % 3 {
            0 => 131_071 - i as i32,
            1 => i as i32,
            _ => random.below(131_072) as i32,
        })
        .collect();
    let inv_freq: Vec<f32> = (0..half).map(|i| 10_000f32.powf(-2.0 * i as f32 / heads.d as f32)).collect();
    let input = random.bf16s(skip + t * width, 1.0);
    let (on_device, freq) = (cuda.upload(&positions)?, cuda.upload(&inv_freq)?);
    let run = |back: bool| -> Result<Vec<bf16>, halfbyte::Error> {
        let mut qkv = poisoned::<bf16>(&cuda, input.len())?;
        cuda.write(qkv.view_mut(), &input)?;
        let part = qkv.range_mut(skip..skip + t * width);
        let op = Rope { qkv: part, positions: on_device.view(), inv_freq: freq.view(), t, heads };
        if back {
            rope_backward(&cuda, op)?
        } else {
            rope_forward(&cuda, op)?
        }
        Ok(cuda.download(&qkv)?[skip..].to_vec())
    };
    let input = wide(&input[skip..]);
    for (back, sign) in [(false, 1.0), (true, -1.0)] {
        let what = if back { "backward" } else { "forward" };
        let found = run(back)?;
        same(&format!("{what}, second run"), &run(back)?, &found)?;
        let mut exact = input.clone();
        let op = backend::Rope { qkv: &mut exact, positions: &positions, inv_freq: &inv_freq, t, heads };
        let mut cpu = Cpu::new(Some(1));
        if back {
            cpu.rope_backward(op)?
        } else {
            cpu.rope_forward(op)?
        }

        let mut plain = input.clone();
        for (token, row) in plain.chunks_exact_mut(width).enumerate() {
            for head in row[..(heads.h + heads.g) * heads.d].chunks_exact_mut(heads.d) {
                for i in 0..half {
                    let angle = f64::from(positions[token] as f32 * inv_freq[i]);
                    let (sin, cos) = (sign * angle.sin() as f32, angle.cos() as f32);
                    let (x, y) = (head[i], head[i + half]);
                    head[i] = round(x * cos - y * sin);
                    head[i + half] = round(y * cos + x * sin);
                }
            }
        }
        let found = wide(&found);
        within_twice(what, &found, &plain, &exact)?;
        for (token, row) in found.chunks_exact(width).enumerate() {
            let v = (heads.h + heads.g) * heads.d;
            same(&format!("{what}: v of token {token}"), &row[v..], &input[token * width + v..(token + 1) * width])?;
        }
    }
    Ok(())
}

fn wrong_sizes() -> Outcome {
    let cuda = Cuda::open(0)?;
    let heads = Heads { h: 2, g: 1, d: 16, window: None };
    let (mut qkv, positions, freq) = (cuda.zeros::<bf16>(128)?, cuda.zeros::<i32>(2)?, cuda.zeros::<f32>(7)?);
    let mut run = |t: usize, heads: Heads| {
        rope_forward(&cuda, Rope { qkv: qkv.view_mut(), positions: positions.view(), inv_freq: freq.view(), t, heads })
    };
    refused(run(3, heads), "rope_forward", "qkv")?;
    refused(run(2, heads), "rope_forward", "inv_freq")?;
    refused(run(2, Heads { d: 15, ..heads }), "rope_forward", "heads.d (even)")?;
    refused(run(2, Heads { h: 3, g: 2, ..heads }), "rope_forward", "heads")
}
