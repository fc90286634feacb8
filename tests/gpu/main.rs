//! Tests that need an NVIDIA GPU. Without one each is reported as ignored, with the reason in brackets before its name.
//! `scripts/gpu-test` packs this binary for a machine that has a GPU and nothing else.
//!
//! Fixture cases come from the folder that HALFBYTE_FIXTURES names (default `tests/fixtures`).

mod adamw;
mod attention;
mod bias;
mod candidate;
mod cross_entropy;
mod decode;
mod device;
mod embedding;
mod fault;
#[path = "../golden/files.rs"]
mod files;
mod gemm;
#[path = "../golden/model.rs"]
mod golden;
mod grad_norm;
mod head;
mod head_norm;
mod kernels;
mod linear;
mod load;
mod lora;
mod model;
mod nf4;
mod nf4_gemm;
mod plan;
mod rmsnorm;
mod rope;
mod runtime;
mod step_ops;
mod support;
mod swiglu;
#[path = "../properties/tiny.rs"]
mod tiny;

use std::path::{Path, PathBuf};

use halfbyte::backend::cuda::Cuda;
use libtest_mimic::{Arguments, Trial};

fn main() {
    if std::env::var_os(fault::CHILD).is_some() {
        if let Err(why) = fault::child() {
            println!("{why}");
        }
        return;
    }
    let args = Arguments::from_args();
    let root = match std::env::var_os("HALFBYTE_FIXTURES") {
        Some(folder) => PathBuf::from(folder),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures"),
    };
    let mut trials = nf4::trials(&root.join("nf4"));
    trials.extend(device::trials());
    trials.extend(model::trials(&root));
    trials.extend(adamw::trials());
    trials.extend(attention::trials());
    trials.extend(bias::trials());
    trials.extend(cross_entropy::trials());
    trials.extend(decode::trials());
    trials.extend(embedding::trials());
    trials.extend(fault::trials());
    trials.extend(gemm::trials());
    trials.extend(grad_norm::trials());
    trials.extend(load::trials());
    trials.extend(head_norm::trials());
    trials.extend(head::trials());
    trials.extend(linear::trials());
    trials.extend(lora::trials());
    trials.extend(nf4_gemm::trials());
    trials.extend(rmsnorm::trials());
    trials.extend(rope::trials());
    trials.extend(swiglu::trials());
    let mut alone = model::recorded_trials();
    alone.extend(runtime::trials());
    alone.extend(plan::trials());
    alone.extend(step_ops::trials());
    alone.extend(kernels::trials());
    // Its races are timed.
    alone.extend(candidate::trials());

    let missing = Cuda::open(0).err().map(|why| why.to_string());
    let known = |trial: Trial| support::unless(missing.as_ref(), trial);
    let beside_each_other = libtest_mimic::run(&args, trials.into_iter().map(known).collect());
    let one_by_one = Arguments { test_threads: Some(1), ..args };
    let alone = libtest_mimic::run(&one_by_one, alone.into_iter().map(known).collect());
    if beside_each_other.has_failed() {
        beside_each_other.exit();
    }
    alone.exit();
}
