//! Tests that need NVRTC and no GPU. Without one each is reported as ignored, with the reason in brackets before its name;
//! HALFBYTE_NVRTC names one: `pip install --target DIR nvidia-cuda-nvrtc nvidia-cuda-runtime` has it as
//! DIR/nvidia/cu13/lib/libnvrtc.so.13.

use std::path::{Path, PathBuf};

use halfbyte::Error;
use halfbyte::bench::candidate::launch;
use halfbyte::bench::candidate::nvrtc::{Nvrtc, kernels};
use halfbyte::bench::candidate::{Source, template::template};
use halfbyte::bench::kernels::ops::{self, Op};
use libtest_mimic::{Arguments, Failed, Trial};

/// The oldest card that this program runs on beside the one that it is written for.
const ARCHS: [&str; 2] = ["sm_90a", "sm_86"];

fn main() {
    let args = Arguments::from_args();
    let mut trials = vec![
        Trial::test("a_card_gets_code_for_all_that_it_can", archs),
        Trial::test("an_error_has_file_and_line_and_the_compilers_words", broken),
        Trial::test("a_header_that_is_missing_is_told", missing_header),
        Trial::test("headers_beside_the_file_are_found", beside),
        Trial::test("kernels_without_extern_c_show_their_real_names", mangled),
        Trial::test("assembly_that_is_none_is_refused", assembly),
    ];
    for name in ["good", "slow", "wrong"] {
        trials.push(Trial::test(format!("candidates/{name}"), move || compiles(&Nvrtc::open()?, &fixture(name)?)));
    }
    for op in ops::all().into_iter().chain(ops::toy::OPS.iter().copied()).filter(|op| op.starter.is_some()) {
        trials.push(Trial::test(format!("starters/{}", op.name), move || starter(&op, Nvrtc::open()?)));
        trials.push(Trial::test(format!("starters_without_cuda_headers/{}", op.name), move || {
            starter(&op, Nvrtc::open()?.without_includes())
        }));
    }
    let missing = Nvrtc::open().err().map(|why| why.to_string());
    let known = |trial: Trial| match &missing {
        Some(why) => trial.with_kind(why.clone()).with_ignored_flag(true),
        None => trial,
    };
    libtest_mimic::run(&args, trials.into_iter().map(known).collect()).exit();
}

fn starter(op: &Op, nvrtc: Nvrtc) -> Result<(), Failed> {
    compiles(&nvrtc, &Source { path: format!("{}.cu", op.name).into(), text: template(op)? })
}

/// To code without warnings that has every kernel of the launch lines.
fn compiles(nvrtc: &Nvrtc, source: &Source) -> Result<(), Failed> {
    for arch in ARCHS {
        let compiled = nvrtc.compile(source, arch)?;
        if !compiled.log.is_empty() {
            return Err(compiled.log.into());
        }
        let found = kernels(&compiled.cubin);
        for directive in launch::parse(&source.path, &source.text)? {
            if !found.contains(&directive.kernel) {
                return Err(format!("no kernel {} among {found:?}", directive.kernel).into());
            }
        }
    }
    Ok(())
}

fn fixture(name: &str) -> Result<Source, Error> {
    Source::read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/candidates").join(format!("{name}.cu")))
}

fn source(text: &str) -> Source {
    Source { path: PathBuf::from("dir/my.cu"), text: text.into() }
}

/// The error of a source, which is the user's.
fn refused(source: &Source) -> Result<String, Failed> {
    match Nvrtc::open()?.compile(source, "sm_90a") {
        Ok(_) => Err("it compiled".into()),
        Err(error) if error.exit_code() == 2 => Ok(error.to_string()),
        Err(other) => Err(other.to_string().into()),
    }
}

fn archs() -> Result<(), Failed> {
    let nvrtc = Nvrtc::open()?;
    for (capability, arch) in [((8, 0), "sm_80"), ((8, 6), "sm_86"), ((9, 0), "sm_90a")] {
        assert_eq!(nvrtc.arch(capability)?, arch);
    }
    assert_eq!(nvrtc.arch((9, 5))?, "sm_90", "what an unknown minor version runs");
    let error = nvrtc.arch((77, 0)).unwrap_err().to_string();
    assert!(error.contains("77.0") && error.contains("NVRTC"), "{error}");
    Ok(())
}

fn broken() -> Result<(), Failed> {
    let source = fixture("broken")?;
    let error = refused(&source)?;
    let path = source.path.display();
    assert!(error.starts_with(&format!("{path}: line 9: found identifier \"offset\" is undefined")), "{error}");
    assert!(error.contains(&format!("\n{path}(9): error: identifier")), "{error}");
    Ok(())
}

fn missing_header() -> Result<(), Failed> {
    let error = refused(&source("// one\n#include \"nowhere.h\"\n"))?;
    assert!(error.starts_with("dir/my.cu: line 2: ") && error.contains("nowhere.h"), "{error}");
    Ok(())
}

fn beside() -> Result<(), Failed> {
    let dir = tempfile::tempdir()?;
    std::fs::write(dir.path().join("one.h"), "#define ONE 1.0f\n")?;
    let text = "#include \"one.h\"\nextern \"C\" __global__ void k(float* y) { y[0] = ONE; }\n";
    let source = Source { path: dir.path().join("my.cu"), text: text.into() };
    assert_eq!(kernels(&Nvrtc::open()?.compile(&source, "sm_90a")?.cubin), ["k"]);
    Ok(())
}

fn mangled() -> Result<(), Failed> {
    let compiled = Nvrtc::open()?.compile(&source("__global__ void k(float* y) { y[0] = 1.0f; }\n"), "sm_90a")?;
    assert_eq!(kernels(&compiled.cubin), ["_Z1kPf"]);
    Ok(())
}

fn assembly() -> Result<(), Failed> {
    let error = refused(&source("extern \"C\" __global__ void k() { asm volatile(\"foo.bar;\"); }\n"))?;
    assert!(error.starts_with("dir/my.cu: the file: found errors") && error.contains("foo"), "{error}");
    Ok(())
}
