//! Kernels of a user's file: compiled by NVRTC, checked against the oracle, ranked. Needs NVRTC beside the GPU.

use std::path::{Path, PathBuf};

use halfbyte::backend::cuda::Cuda;
use halfbyte::bench::candidate::Source;
use halfbyte::bench::candidate::nvrtc::Nvrtc;
use halfbyte::bench::candidate::program::Program;
use halfbyte::bench::candidate::verdict::{Finish, verdict};
use halfbyte::bench::kernels::case::{Case, Way};
use halfbyte::bench::kernels::check::Difference;
use halfbyte::bench::kernels::gpu::Gpu;
use halfbyte::bench::kernels::models::{Model, TOY};
use halfbyte::bench::kernels::ops;
use halfbyte::{Error, Result};
use libtest_mimic::Trial;

use crate::support::{Outcome, unless};

pub fn trials() -> Vec<Trial> {
    let missing = Nvrtc::get().err().map(|why| why.to_string());
    let trials = vec![
        Trial::test("candidate/a_good_one_wins", good),
        Trial::test("candidate/a_slow_one_is_ranked_behind", slow),
        Trial::test("candidate/a_wrong_one_is_refused_at_its_first_wrong_element", wrong),
        Trial::test("candidate/a_broken_one_shows_file_and_line", broken),
        Trial::test("candidate/other_parameters_are_refused", parameters),
        Trial::test("candidate/a_kernel_that_is_not_there_is_told", no_kernel),
        Trial::test("candidate/more_than_the_card_has_is_refused", too_much),
        Trial::test("candidate/large_shared_memory_is_granted", shared),
        Trial::test("candidate/several_launches_run_in_order", several),
        Trial::test("candidate/the_statistics_are_those_of_the_code", statistics),
    ];
    trials.into_iter().map(|trial| unless(missing.as_ref(), trial)).collect()
}

fn toy() -> Result<Case, String> {
    let op = ops::named("toy").ok_or("no toy")?;
    let model = Model::named("7b").map_err(|e| e.to_string())?;
    (op.cases)(&model, 128).pop().ok_or("no case".into())
}

fn file(name: &str) -> PathBuf {
    let root = match std::env::var_os("HALFBYTE_FIXTURES") {
        Some(folder) => PathBuf::from(folder),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures"),
    };
    root.join("candidates").join(format!("{name}.cu"))
}

/// The toy with another body; its first line is number 1.
fn source(launch: &str, body: &str) -> Source {
    let text = format!(
        "{launch}\nextern \"C\" __global__ void toy(float* y, const float* x, unsigned long long t, unsigned long long c) {{\n\
         {body}\n}}\n"
    );
    Source { path: "my.cu".into(), text }
}

/// The first difference of one run, if any.
fn check(cuda: &mut Cuda, case: &Case, way: &Way) -> Result<Option<Difference>> {
    Gpu::unmeasured(cuda, &Model::needs(&[TOY], 128))?.check(case, way)
}

/// What the program tells of a race of the toy's ways and a file's.
fn race(name: &str) -> Result<String> {
    let mut cuda = Cuda::open(0)?;
    let mut case = toy().map_err(|why| Error::Cuda { op: "toy".into(), detail: why })?;
    case.ways.push(Program::build(&cuda, &Source::read(&file(name))?)?.way(&cuda, &case, "candidate")?);
    let outcomes = Gpu::unmeasured(&mut cuda, &Model::needs(&[TOY], 128))?.race(&[case], &|_| true, &mut || {})?;
    let finishes: Vec<Finish> = outcomes.iter().map(Finish::from).collect();
    let refused = finishes.iter().filter_map(|f| f.refused.as_ref().map(ToString::to_string));
    Ok(refused.chain([verdict(&finishes, "candidate")]).collect::<Vec<_>>().join("; "))
}

fn good() -> Outcome {
    let text = race("good")?;
    assert!(text.starts_with("winner: candidate, ") && text.ends_with(" x as fast as starter"), "{text}");
    Ok(())
}

fn slow() -> Outcome {
    let text = race("slow")?;
    assert!(text.starts_with("winner: starter, ") && text.contains("candidate is 2nd of 2"), "{text}");
    Ok(())
}

fn wrong() -> Outcome {
    let text = race("wrong")?;
    assert!(text.starts_with("y[0, 777] is 100.0, expected ") && text.contains("(128 of 524288 elements"), "{text}");
    Ok(())
}

/// The error of building or preparing a source for the toy, which is the user's.
fn refused(source: &Source, parts: &[&str]) -> Outcome {
    let cuda = Cuda::open(0)?;
    let case = toy()?;
    let result = Program::build(&cuda, source).and_then(|program| program.way(&cuda, &case, "candidate"));
    let error = result.err().ok_or("it was taken")?;
    let text = error.to_string();
    assert_eq!(error.exit_code(), 2, "{text}");
    for part in parts {
        assert!(text.contains(part), "{part:?} is not in {text}");
    }
    Ok(())
}

fn broken() -> Outcome {
    let source = Source::read(&file("broken"))?;
    let path = source.path.display().to_string();
    refused(&source, &["line 9", "\"offset\" is undefined", &format!("{path}(9): error: ")])
}

fn parameters() -> Outcome {
    let text = |parameters: &str| Source {
        path: "my.cu".into(),
        text: format!("\n// launch: toy grid=1 block=1\nextern \"C\" __global__ void toy({parameters}) {{}}\n"),
    };
    refused(&text("float* y, const float* x"), &["my.cu: line 2, kernel toy", "2 parameters", "4: y, x, t, c"])?;
    let number = "float* y, const float* x, unsigned t, unsigned long long c";
    refused(&text(number), &["t, parameter 3, has 4 bytes", "8 bytes"])?;
    let more = "float* y, const float* x, unsigned long long t, unsigned long long c, float more";
    refused(&text(more), &["5 parameters", "4: y, x, t, c"])
}

fn no_kernel() -> Outcome {
    let text = "// launch: toy grid=1 block=1\n__global__ void toy(float* y) { y[0] = 1.0f; }\n";
    let source = Source { path: "my.cu".into(), text: text.into() };
    refused(&source, &["my.cu: line 1", "_Z3toyPf", "extern \"C\" __global__ void toy"])
}

fn too_much() -> Outcome {
    let launch = "// launch: toy grid=1 block=32 shared=512*1024";
    refused(&source(launch, "  y[0] = x[0];"), &["line 1", "bytes of shared memory", "at most"])?;
    let bounds = "extern \"C\" __global__ void __launch_bounds__(64) toy(float* y, const float* x, unsigned long long t, \
                  unsigned long long c) { y[0] = x[0]; }\n";
    let text = format!("// launch: toy grid=1 block=128\n{bounds}");
    refused(&Source { path: "my.cu".into(), text }, &["line 1", "blocks of 128 threads", "at most 64"])
}

fn shared() -> Outcome {
    let mut cuda = Cuda::open(0)?;
    let case = toy()?;
    let body = "  extern __shared__ float row[];
  const unsigned long long first = blockIdx.x * c;
  for (unsigned i = threadIdx.x; i < c; i += blockDim.x) row[i + 12 * 1024] = x[first + i];
  __syncthreads();
  for (unsigned i = threadIdx.x; i < c; i += blockDim.x) y[first + i] = 2.0f * row[i + 12 * 1024] + 1.0f;";
    let source = source("// launch: toy grid=t block=256 shared=4*c+48*1024", body);
    let way = Program::build(&cuda, &source)?.way(&cuda, &case, "candidate")?;
    assert_eq!(check(&mut cuda, &case, &way)?, None);
    Ok(())
}

fn several() -> Outcome {
    let mut cuda = Cuda::open(0)?;
    let case = toy()?;
    let kernel = |name: &str, formula: &str| {
        let at = "const unsigned long long i = blockIdx.x * 256ull + threadIdx.x;";
        format!(
            "// launch: {name} grid=t*c/256 block=256\nextern \"C\" __global__ void {name}(float* y, const float* x, \
             unsigned long long t, unsigned long long c) {{ {at} if (i < t * c) y[i] = {formula}; }}\n"
        )
    };
    let text = kernel("twice", "2.0f * x[i]") + &kernel("and_one", "y[i] + 1.0f");
    let way = Program::build(&cuda, &Source { path: "my.cu".into(), text })?.way(&cuda, &case, "candidate")?;
    assert_eq!(check(&mut cuda, &case, &way)?, None);
    Ok(())
}

fn statistics() -> Outcome {
    let mut cuda = Cuda::open(0)?;
    let mut case = toy()?;
    let body = "  __shared__ float part[256];
  part[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = part[255 - threadIdx.x];";
    let source = source("// launch: toy grid=t block=256 shared=2048", body);
    case.ways = vec![Program::build(&cuda, &source)?.way(&cuda, &case, "candidate")?];
    let outcomes = Gpu::unmeasured(&mut cuda, &Model::needs(&[TOY], 128))?.race(&[case], &|_| true, &mut || {})?;
    let [one] = &outcomes[0].launched[..] else { return Err("not one launch".into()) };
    assert!(outcomes[0].refused.is_some(), "it computes something else");
    assert_eq!((one.kernel.as_str(), one.grid, one.block), ("toy", [128, 1, 1], [256, 1, 1]), "{one:?}");
    let bytes = (one.attributes.static_shared_bytes, one.dynamic_shared_bytes, one.attributes.local_bytes);
    assert_eq!(bytes, (1024, 2048, 0), "{one:?}");
    assert!((1..=255).contains(&one.attributes.registers), "{one:?}");
    assert!((1..=8).contains(&one.blocks_per_multiprocessor), "{one:?}");
    assert!(one.occupancy > 0.0 && one.occupancy <= 1.0, "{one:?}");
    Ok(())
}
