//! Tests that need an NVIDIA GPU. Without one each is reported as ignored, with the reason in brackets before its name.
//! `scripts/gpu-test` packs this binary for a machine that has a GPU and nothing else; `--bench` times the kernels.
//!
//! Fixture cases come from the folder that HALFBYTE_FIXTURES names (default `tests/fixtures`).

mod bench;
mod device;
mod nf4;

use std::path::{Path, PathBuf};

use halfbyte::backend::cuda::Cuda;
use libtest_mimic::{Arguments, Failed};

/// What a test returns: the message of a failure converts into it.
type Outcome = Result<(), Failed>;

fn main() {
    let args = Arguments::from_args();
    let root = match std::env::var_os("HALFBYTE_FIXTURES") {
        Some(folder) => PathBuf::from(folder),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures"),
    };
    let mut trials = nf4::trials(&root.join("nf4"));
    trials.extend(device::trials());
    // Only where asked for: nextest does not know libtest-mimic's word for a bench.
    if args.bench {
        trials.extend(bench::trials());
    }
    let gpu = Cuda::open(0);
    if let Err(why) = &gpu {
        let why = why.to_string();
        trials = trials.into_iter().map(|t| t.with_kind(why.clone()).with_ignored_flag(true)).collect();
    }
    libtest_mimic::run(&args, trials).exit();
}

/// Fails unless the two are equal, bit for bit; names the first place where they are not.
fn same<T: bytemuck::Pod>(what: &str, found: &[T], expected: &[T]) -> Outcome {
    if found.len() != expected.len() {
        return Err(format!("{what}: {} elements, expected {}", found.len(), expected.len()).into());
    }
    let differs = |(a, b): (&T, &T)| bytemuck::bytes_of(a) != bytemuck::bytes_of(b);
    let Some(first) = found.iter().zip(expected).position(differs) else { return Ok(()) };
    let count = found.iter().zip(expected).filter(|&pair| differs(pair)).count();
    let hex = |x: &T| bytemuck::bytes_of(x).iter().rev().map(|b| format!("{b:02x}")).collect::<String>();
    let (a, b) = (hex(&found[first]), hex(&expected[first]));
    Err(format!("{what}: {count} of {} differ, the first is {first}: 0x{a}, expected 0x{b}", found.len()).into())
}
