//! AdamW on the GPU against the CPU backend. Every operation is rounded by itself on both sides, so the bits are equal:
//! 32-bit and 8-bit moments, one launch or many windows, state on the device, on the host, or pinned.

use half::bf16;
use halfbyte::Error;
use halfbyte::backend::cpu::Cpu;
use halfbyte::backend::cuda::Cuda;
use halfbyte::backend::cuda::managed::{Placement, Region, pages_on_demand};
use halfbyte::backend::cuda::optimizer::{Optimizer, Step, WINDOW};
use halfbyte::backend::{Adamw, Backend, Moment, NewOptimizer, OptimKind, OptimizerState, ParamGroup};
use libtest_mimic::Trial;

use crate::support::{Outcome, Random, poisoned, same};

const PLACEMENTS: [Placement; 3] = [Placement::Device, Placement::Host, Placement::Pinned];
const KINDS: [(OptimKind, &str); 2] = [(OptimKind::PagedAdamw32bit, "32bit"), (OptimKind::PagedAdamw8bit, "8bit")];

pub fn trials() -> Vec<Trial> {
    let mut trials = vec![
        Trial::test("adamw/more_managed_memory_than_is_free_is_refused", refused),
        Trial::test("adamw/wrong_sizes_name_the_op_and_the_argument", wrong_sizes),
    ];
    // Sizes around a vector, a block, a CTA, a window of 1024; tensors that straddle none, some, all of them.
    let shapes: [(&str, &[usize]); 6] = [
        ("one", &[1]),
        ("three", &[1, 2, 4]),
        ("block", &[256, 256]),
        ("ragged", &[255, 257, 1, 4095, 4097]),
        ("lora", &[8 * 896, 896 * 8, 8 * 896, 128 * 8, 8 * 896, 4864 * 8]),
        ("odd", &[3 * 1001, 77 * 3, 50_021, 9]),
    ];
    for (kind, bits) in KINDS {
        for (name, tensors) in shapes {
            trials.push(Trial::test(format!("adamw/{bits}/{name}"), move || {
                follows_the_cpu(kind, tensors, Placement::Device, WINDOW, 20)
            }));
        }
        for placement in PLACEMENTS {
            let place = format!("{placement:?}").to_lowercase();
            for window in [1024, 10_000, WINDOW] {
                trials.push(Trial::test(format!("adamw/{bits}/{place}_in_windows_of_{window}"), move || {
                    follows_the_cpu(kind, &[8 * 2048, 2048 * 8, 333, 6000 * 8], placement, window, 5)
                }));
            }
            trials.push(Trial::test(format!("adamw/{bits}/large_{place}"), move || {
                follows_the_cpu(kind, &[2_000_000, 3_000_001, 777_777], placement, WINDOW, 3)
            }));
        }
        for bad in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN] {
            trials.push(Trial::test(format!("adamw/{bits}/nothing_is_updated_where_the_norm_is_{bad}"), move || {
                norm_not_finite(kind, bad)
            }));
        }
        trials.push(Trial::test(format!("adamw/{bits}/a_state_goes_out_and_in_unchanged"), move || round_trip(kind)));
    }
    trials
}

/// The sum of the tensors, start values, and groups: one for all, two that cut a tensor, or one for each tensor.
fn groups(tensors: &[usize], random: &mut Random, step: u64) -> Vec<ParamGroup> {
    let p: usize = tensors.iter().sum();
    let mut cuts = vec![0];
    match step % 3 {
        0 => {}
        1 => cuts.push(random.below(p + 1)),
        _ => cuts.extend(tensors.iter().scan(0, |end, len| {
            *end += len;
            Some(*end)
        })),
    }
    cuts.push(p);
    cuts.sort_unstable();
    let mut groups: Vec<ParamGroup> = (cuts.windows(2))
        .map(|cut| ParamGroup {
            range: cut[0]..cut[1],
            lr: 1e-3 * (1.0 + random.uniform()),
            weight_decay: if random.below(2) == 0 { 0.0 } else { 0.1 },
        })
        .collect();
    groups.reverse();
    groups
}

fn same_moment(what: &str, found: &Moment, expected: &Moment) -> Outcome {
    match (found, expected) {
        (Moment::F32(a), Moment::F32(b)) => same(what, a, b),
        (Moment::U8 { codes: a, absmax: x }, Moment::U8 { codes: b, absmax: y }) => {
            same(&format!("{what}.absmax"), x, y)?;
            same(what, a, b)
        }
        _ => Err(format!("{what}: another form").into()),
    }
}

fn same_state(found: &OptimizerState, expected: &OptimizerState) -> Outcome {
    same_moment("m", &found.m, &expected.m)?;
    same_moment("v", &found.v, &expected.v)?;
    same("master", &found.master, &expected.master)
}

/// Steps of both; state and working copy have the same bits after each.
fn follows_the_cpu(kind: OptimKind, tensors: &[usize], placement: Placement, window: usize, steps: u64) -> Outcome {
    let cuda = Cuda::open(0)?;
    if placement != Placement::Pinned && !pages_on_demand(&cuda)? {
        let of = NewOptimizer { kind, init: &[1.0], tensors: &[1] };
        let error = Optimizer::placed(&cuda, of, placement, window).err().ok_or("made without paging")?;
        assert!(error.to_string().contains("page on demand"), "{error}");
        return Ok(());
    }
    let p = tensors.iter().sum();
    let mut random = Random::new(p as u64);
    let init: Vec<f32> = (0..p).map(|_| (random.uniform() - 0.5) * 0.1).collect();
    let of = NewOptimizer { kind, init: &init, tensors };
    let mut cpu = Cpu::new(None);
    let (mut expected, mut found) = (cpu.new_optimizer(of)?, Optimizer::placed(&cuda, of, placement, window)?);
    same_state(&found.read(&cuda)?, &cpu.read_optimizer(&expected)?)?;
    assert_eq!(found.placement(), placement);
    let (mut lora, mut gpu_lora) = (vec![0.0; p], poisoned::<bf16>(&cuda, p)?);
    for step in 1..=steps {
        let scale = 10f32.powi(random.below(6) as i32 - 5);
        let mut grads: Vec<f32> = (0..p).map(|_| (random.uniform() - 0.5) * scale).collect();
        // Gradients of 0 and of tiny size, whole blocks of them too.
        for _ in 0..4 {
            let (start, len) = (random.below(p), random.below(600));
            grads[start..(start + len).min(p)].fill([0.0, -0.0, 1e-30, -1e-12][random.below(4)]);
        }
        let mut norm = vec![0.0f32];
        cpu.grad_norm(&mut norm, &grads)?;
        let groups = groups(tensors, &mut random, step);
        let max_grad_norm = [0.3, 0.0, 1e9][random.below(3)];
        let (beta1, beta2, eps) = (0.9, 0.999, 1e-8);
        cpu.adamw(Adamw {
            state: &mut expected,
            lora: &mut lora,
            grads: &grads,
            norm: &norm,
            groups: &groups,
            beta1,
            beta2,
            eps,
            max_grad_norm,
            step,
        })?;
        let (gpu_grads, gpu_norm) = (cuda.upload(&grads)?, cuda.upload(&norm)?);
        if step % 2 == 0 {
            found.prefetch(&cuda)?;
        }
        found.adamw(
            &cuda,
            Step {
                lora: gpu_lora.view_mut(),
                grads: gpu_grads.view(),
                norm: gpu_norm.view(),
                groups: &groups,
                beta1,
                beta2,
                eps,
                max_grad_norm,
                step,
            },
        )?;
        // Without a look at the state between, windows of two steps are under way together.
        if step % 3 != 1 || step == steps {
            same_state(&found.read(&cuda)?, &cpu.read_optimizer(&expected)?)?;
            let rounded: Vec<bf16> = lora.iter().map(|&w| bf16::from_f32(w)).collect();
            same("lora", &cuda.download(&gpu_lora)?, &rounded)?;
            same("grads", &cuda.download(&gpu_grads)?, &grads)?;
        } else {
            cuda.synchronize()?;
        }
    }
    let traffic = found.traffic()?;
    if placement == Placement::Host {
        let state = found.read(&cuda)?;
        let bytes = |m: &Moment| match m {
            Moment::F32(values) => 4 * values.len(),
            Moment::U8 { codes, absmax } => codes.len() + 4 * absmax.len(),
        };
        let all = (4 * p + bytes(&state.m) + bytes(&state.v)) as u64 * steps;
        assert_eq!((traffic.up, traffic.down), (all, all), "every byte goes up and down once a step");
    } else {
        assert_eq!((traffic.up, traffic.down), (0, 0));
    }
    assert!(traffic.timed > 0 && traffic.milliseconds > 0.0, "{traffic:?}");
    Ok(())
}

fn norm_not_finite(kind: OptimKind, bad: f32) -> Outcome {
    let cuda = Cuda::open(0)?;
    let tensors = [300, 5000];
    let init: Vec<f32> = (0..5300).map(|i| i as f32).collect();
    let mut optimizer =
        Optimizer::new(&cuda, NewOptimizer { kind, init: &init, tensors: &tensors }, Placement::Device)?;
    let before = optimizer.read(&cuda)?;
    let mut lora = poisoned::<bf16>(&cuda, 5300)?;
    let lora_before = cuda.download(&lora)?;
    let (grads, norm) = (cuda.upload(&vec![1.0f32; 5300])?, cuda.upload(&[bad])?);
    let groups = [ParamGroup { range: 0..5300, lr: 1.0, weight_decay: 0.1 }];
    optimizer.adamw(&cuda, step(&mut lora, &grads, &norm, &groups))?;
    same_state(&optimizer.read(&cuda)?, &before)?;
    same("lora", &cuda.download(&lora)?, &lora_before)
}

type Buffer<T> = halfbyte::backend::cuda::memory::Buffer<T>;

fn step<'a>(
    lora: &'a mut Buffer<bf16>,
    grads: &'a Buffer<f32>,
    norm: &'a Buffer<f32>,
    groups: &'a [ParamGroup],
) -> Step<'a> {
    let (lora, grads, norm) = (lora.view_mut(), grads.view(), norm.view());
    Step { lora, grads, norm, groups, beta1: 0.9, beta2: 0.999, eps: 1e-8, max_grad_norm: 1.0, step: 1 }
}

fn round_trip(kind: OptimKind) -> Outcome {
    let cuda = Cuda::open(0)?;
    let tensors = [300, 1000, 7];
    let mut random = Random::new(5);
    let mut state = OptimizerState::new(NewOptimizer { kind, init: &random.f32s(1307, 1.0), tensors: &tensors })?;
    for moment in [&mut state.m, &mut state.v] {
        match moment {
            Moment::F32(values) => *values = random.f32s(values.len(), 1e-3),
            Moment::U8 { codes, absmax } => {
                codes.iter_mut().for_each(|c| *c = random.below(256) as u8);
                *absmax = random.f32s(absmax.len(), 1e-3);
            }
        }
    }
    for placement in PLACEMENTS {
        if placement != Placement::Pinned && !pages_on_demand(&cuda)? {
            continue;
        }
        let of = NewOptimizer { kind, init: &[0.0; 1307], tensors: &tensors };
        let mut optimizer = Optimizer::placed(&cuda, of, placement, 1024)?;
        optimizer.write(&cuda, &state)?;
        same_state(&optimizer.read(&cuda)?, &state)?;
    }
    Ok(())
}

/// The guard stands before the call: had the driver been asked for this, it would have said yes, or hung.
fn refused() -> Outcome {
    let cuda = Cuda::open(0)?;
    for placement in [Placement::Device, Placement::Host] {
        let (free, total) = cuda.memory()?;
        for bytes in [free + (1 << 20), total + 1, 2 * total] {
            let error = Region::new(&cuda, bytes, placement).err().ok_or("allocated")?;
            let text = error.to_string();
            assert!(matches!(error, Error::Cuda { .. }) && text.contains(&bytes.to_string()), "{text}");
        }
        assert_eq!(cuda.memory()?.1, total);
    }
    Ok(())
}

fn wrong_sizes() -> Outcome {
    let cuda = Cuda::open(0)?;
    for (kind, _) in KINDS {
        let of = NewOptimizer { kind, init: &[1.0; 8], tensors: &[4, 5] };
        let error = Optimizer::new(&cuda, of, Placement::Device).err().ok_or("made")?;
        assert!(matches!(error, Error::Shape { argument: "tensors", .. }), "{error}");
        let of = NewOptimizer { kind, init: &[1.0; 8], tensors: &[4, 4] };
        let mut optimizer = Optimizer::new(&cuda, of, Placement::Device)?;
        let group = |range| ParamGroup { range, lr: 1.0, weight_decay: 0.0 };
        let (all, short) = ([group(0..8)], [group(0..7)]);
        let mut run = |lora: usize, grads: usize, norm: usize, groups: &[ParamGroup]| -> Result<String, Error> {
            let (mut lora, grads) = (poisoned::<bf16>(&cuda, lora)?, cuda.upload(&vec![0.0f32; grads])?);
            let norm = cuda.upload(&vec![0.0f32; norm])?;
            match optimizer.adamw(&cuda, step(&mut lora, &grads, &norm, groups)) {
                Err(Error::Shape { argument, .. }) => Ok(argument.into()),
                Err(other) => Err(other),
                Ok(()) => Ok("none".into()),
            }
        };
        let found = [run(8, 8, 1, &all)?, run(7, 8, 1, &all)?, run(8, 7, 1, &all)?, run(8, 8, 0, &all)?];
        assert_eq!(found, ["none", "lora", "grads", "norm"]);
        assert_eq!(run(8, 8, 1, &short)?, "groups (weights covered)");
        assert_eq!(run(8, 8, 1, &[group(0..4), group(5..9)])?, "groups (end)");
    }
    Ok(())
}
