//! 8-bit AdamW against bitsandbytes: `adamw/bnb_8bit.safetensors` holds what 20 steps on two tensors gave.

use std::path::Path;

use halfbyte::backend::cpu::Cpu;
use halfbyte::backend::{Adamw, Backend, Moment, NewOptimizer, OptimKind, ParamGroup};
use libtest_mimic::{Failed, Trial};

use crate::files::{Fixture, near, near_l2};

const TENSORS: [usize; 2] = [4096, 5000];
const STEPS: u64 = 20;

pub fn cases(folder: &Path) -> Vec<Trial> {
    let path = folder.join("bnb_8bit.safetensors");
    vec![Trial::test("adamw/bnb_8bit", move || follows_bitsandbytes(&path))]
}

/// As scripts/make-adamw-fixture makes gradients (of steps from 1) and start values (step 1000).
fn numbers(step: u64) -> Vec<f32> {
    let number = |i: u64| {
        let low = 0xffff_ffff;
        let mut x = (i * 2_654_435_761 + step * 2_654_474_240) & low;
        x = (x * 2_246_822_519) & low;
        x ^= x >> 15;
        (((x >> 8) as f64 - f64::from(1 << 23)) / f64::from(1 << 24) * 0.5f64.powi((i / 512 % 7) as i32)) as f32
    };
    (0..TENSORS.iter().sum::<usize>() as u64).map(number).collect()
}

fn follows_bitsandbytes(path: &Path) -> Result<(), Failed> {
    let fixture = Fixture::open(path)?;
    let mut cpu = Cpu::new(Some(2));
    let init = numbers(1000);
    let of = NewOptimizer { kind: OptimKind::PagedAdamw8bit, init: &init, tensors: &TENSORS };
    let mut state = cpu.new_optimizer(of)?;
    let mut lora = vec![0.0; init.len()];
    let groups = [ParamGroup { range: 0..init.len(), lr: 1e-2, weight_decay: 0.1 }];
    for step in 1..=STEPS {
        cpu.adamw(Adamw {
            state: &mut state,
            lora: &mut lora,
            grads: &numbers(step),
            norm: &vec![1.0],
            groups: &groups,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            max_grad_norm: 0.0,
            step,
        })?;
    }
    let state = cpu.read_optimizer(&state)?;
    // Apart by what the signs of m below do to a few weights.
    near_l2("master", &state.master, &fixture.f32s("master")?, 2e-5)?;
    for (name, moment) in [("m", &state.m), ("v", &state.v)] {
        let Moment::U8 { codes, absmax } = moment else { return Err("in 32 bits".into()) };
        for (i, (&found, &expected)) in absmax.iter().zip(&fixture.f32s(&format!("{name}.absmax"))?).enumerate() {
            // 1 - beta2 is rounded to f32 here, to f64 there.
            near(&format!("{name}.absmax {i}"), found.into(), expected.into(), 2e-5)?;
        }
        let expected = fixture.require(name)?.bytes;
        assert_eq!(codes.len(), expected.len());
        // bitsandbytes on the GPU keeps the sign of m, and so do we; its CPU code lets a small negative value become 0.
        let differs = |(found, expected): (&u8, &u8)| found != expected && (*found, *expected) != (126, 127);
        let count = codes.iter().zip(expected).filter(|&pair| differs(pair)).count();
        // A value within rounding of a midpoint may fall to either side.
        assert!(count * 1000 <= codes.len(), "{name}: {count} codes differ");
    }
    Ok(())
}
