//! The table of kernels: every op at a toy's shapes and at a 1B's, each way it can run, against the oracle of its case;
//! and that a race finds wrong kernels and times right ones.

use std::sync::Arc;

use halfbyte::backend::cuda::Cuda;
use halfbyte::bench::candidate::Source;
use halfbyte::bench::candidate::nvrtc::Nvrtc;
use halfbyte::bench::candidate::program::Program;
use halfbyte::bench::candidate::template::template;
use halfbyte::bench::kernels::case::{Case, Way};
use halfbyte::bench::kernels::gpu::Gpu;
use halfbyte::bench::kernels::models::{MODELS, Model, TOY};
use halfbyte::bench::kernels::ops::{self, Op};
use libtest_mimic::Trial;

use crate::support::{Outcome, unless};

pub fn trials() -> Vec<Trial> {
    let mut trials: Vec<Trial> = ops::all()
        .into_iter()
        .map(|op| {
            Trial::test(format!("kernels/{}", op.name), move || {
                let mut cuda = Cuda::open(0)?;
                every_way(&mut cuda, op, &TOY, &[1, 8, 61, 130])?;
                every_way(&mut cuda, op, &MODELS[0], &[300])
            })
        })
        .collect();
    let missing = Nvrtc::get().err().map(|why| why.to_string());
    for op in ops::all().into_iter().filter(|op| op.starter.is_some()) {
        let trial = Trial::test(format!("starters/{}", op.name), move || starter(op));
        trials.push(unless(missing.as_ref(), trial));
    }
    trials.push(Trial::test("kernels/a_wrong_kernel_is_refused_and_a_right_one_timed", refusal));
    trials
}

fn every_way(cuda: &mut Cuda, op: Op, model: &Model, tokens: &[usize]) -> Outcome {
    let cublas = cuda.has_cublas();
    let cases: Vec<Case> = tokens.iter().flat_map(|&t| (op.cases)(model, t)).collect();
    let mut gpu = Gpu::unmeasured(cuda, &Model::needs(&[*model], 512))?;
    for case in cases {
        for way in case.ways.iter().filter(|way| cublas || !way.needs_cublas) {
            if let Some(difference) = gpu.check(&case, way)? {
                return Err(format!("{} {} {}: {difference}", case.op, case.shape, way.name).into());
            }
        }
    }
    Ok(())
}

/// The file that `--print-template` writes compiles and is right.
fn starter(op: Op) -> Outcome {
    let mut cuda = Cuda::open(0)?;
    let source = Source { path: format!("{}.cu", op.name).into(), text: template(&op)? };
    let program = Program::build(&cuda, &source)?;
    let cases: Vec<Case> = [1, 8, 61, 130].into_iter().flat_map(|t| (op.cases)(&TOY, t)).collect();
    let mut gpu = Gpu::unmeasured(&mut cuda, &Model::needs(&[TOY], 130))?;
    for case in cases {
        let way = program.way(gpu.cuda, &case, "candidate")?;
        if let Some(difference) = gpu.check(&case, &way)? {
            return Err(format!("{} {}: {difference}", case.op, case.shape).into());
        }
    }
    Ok(())
}

fn refusal() -> Outcome {
    let mut cuda = Cuda::open(0)?;
    let op = ops::all().into_iter().find(|op| op.name == "rmsnorm_forward").ok_or("no rmsnorm_forward")?;
    let mut case = (op.cases)(&TOY, 64).remove(0);
    let right = case.ways[0].clone();
    let launch = right.launch.clone();
    let wrong = move |cuda: &mut Cuda, set: &mut halfbyte::bench::kernels::set::Set| {
        launch(cuda, set)?;
        // Row 3, column 7.
        cuda.write(set.args[0].bf16_mut().into_range(3 * 256 + 7..3 * 256 + 8), &[half::bf16::from_f32(1e3)])
    };
    case.ways.push(Way { name: "wrong", launch: Arc::new(wrong), ..right });
    let mut gpu = Gpu::unmeasured(&mut cuda, &Model::needs(&[TOY], 64))?;
    let outcomes = gpu.race(&[case], &|_| true, &mut || {})?;
    let [first, second] = &outcomes[..] else { return Err(format!("{} outcomes", outcomes.len()).into()) };
    let place = second.refused.as_ref().map(|d| d.place.as_str());
    if place != Some("y[3, 7]") || first.refused.is_some() {
        return Err(format!("refused {place:?} and {:?}", first.refused).into());
    }
    let row = &first.row;
    if row.samples < 30 || !(0.0 < row.least_us && row.least_us <= row.median_us && row.median_us <= row.most_us) {
        return Err(format!("{row:?}").into());
    }
    let known = row.launches == Some(1) && row.local_bytes == Some(0) && row.registers > Some(8);
    if !known || !row.occupancy.is_some_and(|o| 0.0 < o && o <= 1.0) || first.launched[0].kernel.is_empty() {
        return Err(format!("{row:?}, {:?}", first.launched).into());
    }
    Ok(())
}
