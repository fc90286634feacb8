//! Golden tests: every case of the fixture folder is a test of its own, named after its folder or file.
//!
//! Cases are found by pattern in the folder that HALFBYTE_FIXTURES names (default `tests/fixtures`), and all that is
//! checked comes out of their files: `adamw/`, `nf4/index.json`, `NAME-nf4-*/`, `NAME-lora/` with expected.json.

mod adamw;
mod files;
mod model;
mod nf4;

use std::path::{Path, PathBuf};

use halfbyte::backend::cpu::Cpu;
use libtest_mimic::{Arguments, Failed, Trial};

/// The CPU backend, with the tolerances of the fixtures' README.
struct OnCpu;

impl model::Device for OnCpu {
    type Backend = Cpu;
    const TOLERANCE: model::Tolerance = model::Tolerance {
        loss: 1e-5,
        logits: 1e-5,
        gradient: 1e-4,
        norm: 1e-4,
        training: 1e-4,
        adapter: 1e-4,
        update: 1e-3,
        packed: 1e-5,
    };
    fn open() -> Result<Cpu, Failed> {
        Ok(Cpu::new(Some(2)))
    }
}

fn main() {
    let args = Arguments::from_args();
    let root = match std::env::var_os("HALFBYTE_FIXTURES") {
        Some(folder) => PathBuf::from(folder),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures"),
    };
    let trials = match find(&root) {
        Ok(trials) => trials,
        // No fixtures is a failure, never a silent pass.
        Err(error) => vec![Trial::test("fixtures", move || Err(error))],
    };
    libtest_mimic::run(&args, trials).exit();
}

/// All cases below `root`, sorted by name.
fn find(root: &Path) -> Result<Vec<Trial>, Failed> {
    let entries = std::fs::read_dir(root).map_err(|e| format!("{}: {e}", root.display()))?;
    let mut names: Vec<String> = entries.flatten().map(|e| e.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    let mut trials = Vec::new();
    for name in names {
        if name == "adamw" {
            trials.extend(adamw::cases(&root.join("adamw")));
        } else if name == "nf4" {
            trials.extend(nf4::cases(&root.join("nf4"))?);
        } else if name.contains("-nf4-") {
            trials.extend(named(model::four_bit_cases::<OnCpu>(root, &name)?));
        } else if name.ends_with("-lora") {
            trials.extend(named(model::lora_cases::<OnCpu>(root, &name)?));
        }
    }
    if trials.is_empty() {
        return Err(format!("{}: no case found", root.display()).into());
    }
    Ok(trials)
}

fn named(cases: model::Cases) -> impl Iterator<Item = Trial> {
    cases.into_iter().map(|(name, run)| Trial::test(name, run))
}
