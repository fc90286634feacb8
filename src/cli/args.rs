//! Arguments that mean the same in every command.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use halfbyte::memory::MAX_TOKENS;
use halfbyte::model::ModelConfig;
use halfbyte::model::shapes::{SHAPES, shape};
use halfbyte::{Error, Result};

use super::output::grouped;

/// `--device` and `--threads`.
#[derive(Args, Clone, Debug)]
pub struct DeviceArgs {
    /// Where to compute: auto takes the best device that this build can use (see `halfbyte info`)
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    pub device: Device,

    /// CPU threads [default: all cores]
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
}

#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    Auto,
    Cpu,
    Cuda,
}

impl Device {
    /// Of the run file's key `device`, whose values `TrainConfig` has checked.
    pub fn named(name: &str) -> Self {
        Self::from_str(name, false).unwrap_or(Self::Auto)
    }
}

/// How a 16/32-bit model is brought into 4 bits while it loads.
#[derive(Args, Clone, Debug)]
pub struct QuantizeArgs {
    /// Bring a 16-bit model's projections into 4 bits while loading, as `train` does by default. A 4-bit directory is
    /// used as it is
    #[arg(long)]
    pub load_in_4bit: bool,

    #[command(flatten)]
    pub bnb: BnbArgs,
}

/// The 4-bit format, with the names of transformers' BitsAndBytesConfig.
#[derive(Args, Clone, Debug)]
pub struct BnbArgs {
    /// 4-bit code book
    #[arg(long = "bnb-4bit-quant-type", value_name = "TYPE", default_value = "nf4")]
    pub quant_type: QuantTypeArg,

    /// Quantise the absmax of the blocks as well: 4.127 instead of 4.5 bits a weight
    #[arg(
        long = "bnb-4bit-use-double-quant",
        value_name = "BOOL",
        default_value_t = true,
        num_args = 0..=1,
        default_missing_value = "true",
        action = clap::ArgAction::Set
    )]
    pub double_quant: bool,
}

#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum QuantTypeArg {
    Nf4,
    Fp4,
}

/// `--out` and `--overwrite` of commands that write a directory as a whole.
#[derive(Args, Clone, Debug)]
pub struct OutArgs {
    /// Directory to write; it appears complete or not at all
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,

    /// Replace what --out holds already
    #[arg(long)]
    pub overwrite: bool,
}

impl OutArgs {
    /// Refuses an `--out` that would destroy something: see [`check_out`].
    pub fn check(&self, inputs: &[&Path]) -> Result<()> {
        check_out(&self.out, self.overwrite, inputs)
    }

    /// Lets `write` make the directory. One that is to be replaced stays until the new one is complete.
    pub fn write<T>(&self, write: impl FnOnce(&Path) -> Result<T>) -> Result<T> {
        if !self.out.is_dir() || is_empty(&self.out)? {
            return write(&self.out);
        }
        let real = self.out.canonicalize().map_err(Error::read("look at", &self.out))?;
        let beside = |what: &str| {
            let name = real.file_name().unwrap_or_default().to_string_lossy();
            real.with_file_name(format!(".{name}.{what}-{}", std::process::id()))
        };
        let (new, old) = (beside("new"), beside("old"));
        let result = write(&new)?;
        std::fs::rename(&real, &old).map_err(Error::write("replace", &self.out))?;
        if let Err(e) = std::fs::rename(&new, &real) {
            // Best effort: the first error is the one to tell.
            let _ = std::fs::rename(&old, &real);
            let _ = std::fs::remove_dir_all(&new);
            return Err(Error::write("replace", &self.out)(e));
        }
        std::fs::remove_dir_all(&old).map_err(Error::write("remove the replaced", &old))?;
        Ok(result)
    }
}

/// Files that say a directory was written by halfbyte, transformers or PEFT, and so may be replaced.
const MARKERS: [&str; 4] = ["config.json", "adapter_config.json", "metrics.jsonl", "trainer_state.json"];

/// An existing, non-empty `out` is an error unless `overwrite`; even then it must look like a model, an adapter or a
/// run, and must not be or contain one of the `inputs`.
pub fn check_out(out: &Path, overwrite: bool, inputs: &[&Path]) -> Result<()> {
    let wrong =
        |found: &str, expected: &str| Err(Error::flag("--out", format!("{}, {found}", out.display()), expected));
    let meta = match std::fs::metadata(out) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        other => other.map_err(Error::read("look at", out))?,
    };
    if !meta.is_dir() {
        return wrong("which is a file", "a directory");
    }
    if is_empty(out)? {
        return Ok(());
    }
    if !overwrite {
        return wrong("which is not empty", "a new or empty directory, or --overwrite");
    }
    let real = |p: &Path| p.canonicalize().map_err(Error::read("look at", p));
    let target = real(out)?;
    for input in inputs {
        if input.exists() && real(input)?.starts_with(&target) {
            return wrong(&format!("which holds the input {}", input.display()), "another directory");
        }
    }
    let checkpoint = |name: &std::ffi::OsStr| name.to_string_lossy().starts_with("checkpoint-");
    let known = MARKERS.iter().any(|m| out.join(m).exists()) || entries(out)?.iter().any(|name| checkpoint(name));
    if !known {
        return wrong(
            "which holds other files and no model, adapter or run",
            "a directory that halfbyte wrote (--overwrite replaces all of it)",
        );
    }
    Ok(())
}

fn entries(dir: &Path) -> Result<Vec<std::ffi::OsString>> {
    let list = std::fs::read_dir(dir).map_err(Error::read("list", dir))?;
    list.map(|e| e.map(|e| e.file_name())).collect::<Result<_, _>>().map_err(Error::read("list", dir))
}

fn is_empty(dir: &Path) -> Result<bool> {
    Ok(entries(dir)?.is_empty())
}

/// The tokens of `batch` rows of `length`. Errors name `flag`: more than any card will see.
pub fn micro_batch(flag: &str, batch: usize, length: usize) -> Result<usize> {
    batch.checked_mul(length).filter(|&t| t <= MAX_TOKENS).ok_or_else(|| {
        let found = format!("{batch} × {length} tokens");
        Error::flag(flag, found, format!("at most {} tokens in a micro-batch", grouped(MAX_TOKENS as u64)))
    })
}

/// Of flags that count things.
pub fn at_least_one(text: &str) -> std::result::Result<usize, String> {
    text.parse().ok().filter(|&n| n > 0).ok_or_else(|| "expected a whole number of at least 1".into())
}

/// The configuration of a well-known model.
pub fn named_shape(name: &str) -> Result<ModelConfig> {
    let unknown = || Error::flag("--shape", format!("{name:?}"), format!("one of {}", SHAPES.join(", ")));
    shape(name).ok_or_else(unknown)
}
