//! The real binary on the tiny models: output, errors and exit codes of every command.

mod bench;
mod compare;
mod eval;
mod generate;
mod info;
mod inspect;
mod kernels;
mod merge;
mod plan;
mod quantize;
mod train;
mod usage;

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use halfbyte::checkpoint::{ModelDir, peft};
use halfbyte::model::{HostAdapter, LoraConfig, ModelConfig, TargetModules};
use tempfile::TempDir;

/// What a finished process left.
#[derive(Debug)]
pub struct Run {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Run {
    /// Exit code 0; gives standard output.
    #[track_caller]
    pub fn ok(&self) -> &str {
        assert_eq!(self.code, Some(0), "{self:#?}");
        assert!(!self.stderr.contains("error:"), "{self:#?}");
        &self.stdout
    }

    /// This exit code, one `error:` on standard error that has all of `parts`, and no panic.
    #[track_caller]
    pub fn fails(&self, code: i32, parts: &[&str]) {
        assert_eq!(self.code, Some(code), "{self:#?}");
        let errors: Vec<&str> = self.stderr.lines().filter(|l| l.starts_with("error: ")).collect();
        assert_eq!(errors.len(), 1, "{self:#?}");
        for part in parts {
            assert!(self.stderr.contains(part), "{part:?} is not in {self:#?}");
        }
        assert!(!self.stderr.contains("panicked"), "{self:#?}");
    }

    /// Standard output as one JSON value.
    #[track_caller]
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(self.ok()).unwrap_or_else(|e| panic!("{e}: {self:#?}"))
    }
}

pub fn command<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Command {
    let mut c = Command::new(env!("CARGO_BIN_EXE_halfbyte"));
    c.args(args).stdin(Stdio::null());
    c
}

pub fn finish(mut c: Command) -> Run {
    let out = c.output().expect("the binary starts");
    let text = |b: Vec<u8>| String::from_utf8_lossy(&b).into_owned();
    Run { code: out.status.code(), stdout: text(out.stdout), stderr: text(out.stderr) }
}

pub fn halfbyte<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Run {
    finish(command(args))
}

/// Runs with text on standard input.
pub fn with_stdin<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>, input: &str) -> Run {
    let mut c = command(args);
    c.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = c.spawn().expect("the binary starts");
    child.stdin.take().expect("a pipe").write_all(input.as_bytes()).expect("the binary reads its input");
    let out = child.wait_with_output().expect("the binary ends");
    let text = |b: Vec<u8>| String::from_utf8_lossy(&b).into_owned();
    Run { code: out.status.code(), stdout: text(out.stdout), stderr: text(out.stderr) }
}

/// `args!["eval", "--model", dir]`: anything that is an OsStr.
#[macro_export]
macro_rules! args {
    ($($a:expr),* $(,)?) => { [$(std::ffi::OsString::from(AsRef::<std::ffi::OsStr>::as_ref(&$a))),*] };
}

pub fn fixtures() -> PathBuf {
    let default = || Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    std::env::var_os("HALFBYTE_FIXTURES").map_or_else(default, PathBuf::from)
}

pub fn copy_dir(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("a folder");
    for entry in fs::read_dir(from).unwrap_or_else(|e| panic!("{}: {e}", from.display())) {
        let entry = entry.expect("an entry");
        if entry.file_type().expect("a type").is_file() {
            fs::copy(entry.path(), to.join(entry.file_name())).expect("a copy");
        }
    }
}

/// A folder of its own for one test, with a tiny model and its tokenizer under `model`.
pub struct Place {
    dir: TempDir,
}

impl Place {
    pub fn empty() -> Self {
        Self { dir: tempfile::tempdir().expect("a folder") }
    }

    /// With a copy of a fixture model and the tiny tokenizer.
    pub fn with(model: &str) -> Self {
        let place = Self::empty();
        copy_dir(&fixtures().join(model), &place.path("model"));
        copy_dir(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tiny-tokenizer"), &place.path("model"));
        place
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn model(&self) -> PathBuf {
        self.path("model")
    }

    /// The fixture adapter of tiny-mistral that 20 steps have trained.
    pub fn adapter(&self) -> PathBuf {
        fixtures().join("tiny-mistral-lora/adapter_final")
    }

    /// An adapter of a model with another hidden size.
    pub fn adapter_of_another_model(&self) -> PathBuf {
        let dir = ModelDir::open(&fixtures().join("tiny-mistral")).expect("a model");
        let model = ModelConfig { hidden_size: 32, ..dir.config().clone() };
        let lora = LoraConfig {
            r: 2,
            lora_alpha: 2.0,
            lora_dropout: 0.0,
            target_modules: TargetModules::List(vec!["q_proj".into()]),
            rank_pattern: vec![],
            alpha_pattern: vec![],
            use_rslora: false,
        };
        let path = self.path("other-adapter");
        let adapter = HostAdapter::init(lora, &model, 0).expect("an adapter");
        peft::save(&path, &adapter, "another").expect("saved");
        path
    }

    pub fn write(&self, name: &str, text: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, text).expect("a file");
        path
    }

    /// A small data file of prompt + completion rows.
    pub fn data(&self) -> PathBuf {
        let row = |i: usize| format!("{{\"prompt\":\"say {i}: \",\"completion\":\"number {i}\"}}\n");
        self.write("data.jsonl", (0..8).map(row).collect::<String>())
    }

    /// Names in a folder, sorted.
    pub fn names(&self, dir: &str) -> Vec<OsString> {
        let list = fs::read_dir(self.path(dir)).expect("a folder");
        let mut names: Vec<OsString> = list.map(|e| e.expect("an entry").file_name()).collect();
        names.sort();
        names
    }
}
