//! What is said when something goes wrong: too much memory asked for, and a kernel that faults. A fault is the end of its
//! process, so it happens in a child: this binary again, told by the environment variable `CHILD`.

use std::process::Command;

use half::bf16;
use halfbyte::Error;
use halfbyte::backend::cuda::Cuda;
use halfbyte::backend::cuda::ops::adamw::{Adamw8bit, Factors, Group, Tensor, adamw_8bit};
use libtest_mimic::Trial;

use crate::support::Outcome;

pub const CHILD: &str = "HALFBYTE_TEST_FAULT";

pub fn trials() -> Vec<Trial> {
    vec![
        // "large": not under the sanitizer, which would report these faults.
        Trial::test("fault/large_more_memory_than_the_card_has_is_told_with_what_is_free", too_much),
        Trial::test("fault/large_an_illegal_address_is_found_at_its_launch", || fault("1")),
        Trial::test("fault/large_without_waiting_it_says_how_to_find_the_launch", || fault("0")),
    ]
}

fn too_much() -> Outcome {
    let mut cuda = Cuda::open(0)?;
    let (_, total) = cuda.memory()?;
    let error = cuda.reserve(total + (1 << 30)).err().ok_or("reserved")?;
    let text = error.to_string();
    assert!(matches!(error, Error::Cuda { .. }) && text.contains("are free") && text.contains("nvidia-smi"), "{text}");
    assert!(!text.contains('\n'), "{text}");
    // The device is as good as before.
    let buffer = cuda.upload(&[1.0f32, 2.0])?;
    assert_eq!(cuda.download(&buffer)?, [1.0, 2.0]);
    Ok(())
}

fn fault(synchronous: &str) -> Outcome {
    let mut command = Command::new(std::env::current_exe()?);
    let output = command.env(CHILD, "1").env("HALFBYTE_SYNC", synchronous).output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    match synchronous {
        "1" => assert!(text.starts_with("CUDA: adamw_8bit: cudaError"), "{text}"),
        _ => assert!(text.contains("HALFBYTE_SYNC=1"), "{text}"),
    }
    Ok(())
}

/// The child: prints the error that a kernel's illegal address leads to.
pub fn child() -> Result<(), Error> {
    let cuda = Cuda::open(0)?;
    let mut floats = [0, 1, 2].map(|_| cuda.zeros::<f32>(256)).into_iter().collect::<Result<Vec<_>, _>>()?;
    let mut codes = [0, 1].map(|_| cuda.zeros::<u8>(256)).into_iter().collect::<Result<Vec<_>, _>>()?;
    let mut lora = cuda.zeros::<bf16>(256)?;
    let (grads, norm) = (cuda.zeros::<f32>(256)?, cuda.zeros::<f32>(1)?);
    let groups = cuda.upload(&[Group { start: 0, decay: 1.0, rate: 0.0 }])?;
    // A table that names a tensor far outside of all memory.
    let tensors = cuda.upload(&[Tensor { start: 1 << 40, block: 0 }])?;
    let [master, m_absmax, v_absmax] = &mut floats[..] else { unreachable!() };
    let [m, v] = &mut codes[..] else { unreachable!() };
    let launched = adamw_8bit(
        &cuda,
        Adamw8bit {
            master: master.view_mut(),
            m: m.view_mut(),
            v: v.view_mut(),
            m_absmax: m_absmax.range_mut(0..1),
            v_absmax: v_absmax.range_mut(0..1),
            lora: lora.view_mut(),
            factors: Factors {
                grads: grads.view(),
                norm: norm.view(),
                groups: groups.view(),
                beta1: 0.9,
                beta2: 0.999,
                eps: 1e-8,
                bias2_root: 1.0,
                max_grad_norm: 0.0,
            },
            tensors: tensors.view(),
            window: 0..1,
        },
    );
    match launched.and_then(|()| cuda.synchronize()) {
        Err(error) => println!("{error}"),
        Ok(()) => println!("no fault"),
    }
    Ok(())
}
