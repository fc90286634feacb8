//! Golden tests: every case of the fixture folder is a test of its own, named after its folder or file.
//!
//! Cases are found by pattern in the folder that HALFBYTE_FIXTURES names (default `tests/fixtures`), and all that is
//! checked comes out of their files: `nf4/index.json`, `NAME-nf4-*/`, `NAME-lora/` with expected.json.

mod files;
mod model;
mod nf4;

use std::path::{Path, PathBuf};

use libtest_mimic::{Arguments, Failed, Trial};

/// How near is near enough, from the fixtures' README. Relative to the expected value; tensors by their L2 norm.
mod tolerance {
    pub const LOSS: f64 = 1e-5;
    pub const LOGITS: f64 = 1e-5;
    pub const GRADIENT: f64 = 1e-4;
    /// Losses, gradient norms and the adapter over 20 steps of AdamW.
    pub const TRAINING: f64 = 1e-4;
    /// What those steps changed.
    pub const UPDATE: f64 = 1e-3;
    /// transformers in bf16 against us in f32.
    pub const LOSS_IN_BF16: f64 = 5e-3;
    /// Weights quantised anew: a different offset of the last place, nothing else.
    pub const REQUANTISED: f64 = 1e-6;
    /// Offset of double quantisation: the order of its sum is free.
    pub const NESTED_OFFSET: f64 = 1e-6;
    pub const NESTED_ABSMAX: f64 = 1e-5;
    /// A double-quantised absmax may be one code off only this near a midpoint, in units of nested_absmax.
    pub const NESTED_TIE: f32 = 1e-5;
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
        if name == "nf4" {
            trials.extend(nf4::cases(&root.join("nf4"))?);
        } else if name.contains("-nf4-") {
            trials.extend(model::four_bit_cases(root, &name)?);
        } else if name.ends_with("-lora") {
            trials.extend(model::lora_cases(root, &name)?);
        }
    }
    if trials.is_empty() {
        return Err(format!("{}: no case found", root.display()).into());
    }
    Ok(trials)
}
