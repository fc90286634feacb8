//! swiglu forward and backward against the CPU backend.

use half::bf16;
use halfbyte::backend::cpu::Cpu;
use halfbyte::backend::cuda::Cuda;
use halfbyte::backend::cuda::ops::swiglu::{SwigluBackward, SwigluForward, swiglu_backward, swiglu_forward};
use halfbyte::backend::{self, Backend};
use libtest_mimic::Trial;

use crate::support::{Outcome, Random, poisoned, refused, round, same, wide, within_twice};

/// (T, F): one element, odd widths, vectors of 8, more than a CTA's share (4096 elements), rows that end inside it.
const SHAPES: [(usize, usize); 11] =
    [(1, 1), (3, 7), (1, 8), (5, 8), (2, 64), (17, 1536), (9, 1000), (3, 4096), (3, 4097), (2, 14_336), (130, 264)];

pub fn trials() -> Vec<Trial> {
    let mut trials = vec![
        Trial::test("swiglu/wrong_sizes_name_the_op_and_the_argument", wrong_sizes),
        Trial::test("swiglu/gates_of_any_size", gates_of_any_size),
    ];
    for (t, f) in SHAPES {
        trials.push(Trial::test(format!("swiglu/{t}x{f}"), move || {
            let mut random = Random::new((t * f) as u64);
            agrees(t, f, &random.bf16s(2 * t * f, 2.0), &random.bf16s(t * f, 0.1), 0)
        }));
        trials.push(Trial::test(format!("swiglu/{t}x{f}_unaligned"), move || {
            let mut random = Random::new((t * f + 1) as u64);
            agrees(t, f, &random.bf16s(2 * t * f, 2.0), &random.bf16s(t * f, 0.1), 1)
        }));
    }
    trials
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

/// Both directions; the device's copies start `skip` elements into their buffers.
fn agrees(t: usize, f: usize, gate_up: &[bf16], dy: &[bf16], skip: usize) -> Outcome {
    let cuda = Cuda::open(0)?;
    let shifted = |x: &[bf16]| [vec![bf16::ONE; skip], x.to_vec()].concat();
    let run = || -> Result<(Vec<bf16>, Vec<bf16>), halfbyte::Error> {
        let mut both = cuda.upload(&shifted(gate_up))?;
        let dy = cuda.upload(&shifted(dy))?;
        let mut y = poisoned::<bf16>(&cuda, skip + t * f)?;
        let end = both.len();
        let op = SwigluForward { y: y.range_mut(skip..skip + t * f), gate_up: both.range(skip..end), t, f };
        swiglu_forward(&cuda, op)?;
        let op = SwigluBackward { gate_up: both.range_mut(skip..end), dy: dy.range(skip..skip + t * f), t, f };
        swiglu_backward(&cuda, op)?;
        Ok((cuda.download(&y)?[skip..].to_vec(), cuda.download(&both)?[skip..].to_vec()))
    };
    let (y, d_both) = run()?;
    let again = run()?;
    same("y, second run", &again.0, &y)?;
    same("d_gate_up, second run", &again.1, &d_both)?;

    let (inputs, dy) = (wide(gate_up), wide(dy));
    let mut cpu = Cpu::new(Some(1));
    let (mut exact_y, mut exact_d) = (vec![0.0; t * f], inputs.clone());
    cpu.swiglu_forward(backend::SwigluForward { y: &mut exact_y, gate_up: &inputs, t, f })?;
    cpu.swiglu_backward(backend::SwigluBackward { gate_up: &mut exact_d, dy: &dy, t, f })?;

    let (mut plain_y, mut plain_d) = (vec![0.0; t * f], vec![0.0; 2 * t * f]);
    for row in 0..t {
        for i in 0..f {
            let (at, gate_at) = (row * f + i, row * 2 * f + i);
            let (g, u, dy) = (inputs[gate_at], inputs[gate_at + f], dy[at]);
            let s = round(sigmoid(g));
            let silu = round(g * s);
            plain_y[at] = round(silu * u);
            let slope = round(s * round(1.0 + round(g * round(1.0 - s))));
            plain_d[gate_at] = round(round(dy * u) * slope);
            plain_d[gate_at + f] = round(dy * silu);
        }
    }
    within_twice("y", &wide(&y), &plain_y, &exact_y)?;
    within_twice("d_gate_up", &wide(&d_both), &plain_d, &exact_d)
}

/// Where e^-g overflows, where it vanishes, and all between.
fn gates_of_any_size() -> Outcome {
    let gates = [-1e4, -200.0, -100.0, -89.0, -88.0, -87.0, -20.0, -1.0, -0.0, 0.0, 1e-30, 1.0, 20.0, 88.0, 100.0, 1e4];
    let f = gates.len();
    let both: Vec<bf16> = gates.iter().chain(&[1.5; 16]).map(|&x: &f32| bf16::from_f32(x)).collect();
    let dy = vec![bf16::from_f32(0.25); f];
    agrees(1, f, &both, &dy, 0)?;
    // Small results by themselves, not beside large ones.
    let small: Vec<bf16> = [-20.0f32, -15.0, -10.0, -5.0, -2.0, -1.0, -0.5, 0.0].map(bf16::from_f32).to_vec();
    let both = [small, vec![bf16::from_f32(-3.0); 8]].concat();
    agrees(1, 8, &both, &[bf16::ONE; 8], 0)
}

fn wrong_sizes() -> Outcome {
    let cuda = Cuda::open(0)?;
    let (mut y, mut both) = (cuda.zeros::<bf16>(23)?, cuda.zeros::<bf16>(47)?);
    let op = SwigluForward { y: y.view_mut(), gate_up: both.view(), t: 3, f: 8 };
    refused(swiglu_forward(&cuda, op), "swiglu_forward", "y")?;
    let op = SwigluBackward { gate_up: both.view_mut(), dy: y.view(), t: 3, f: 8 };
    refused(swiglu_backward(&cuda, op), "swiglu_backward", "gate_up")
}
