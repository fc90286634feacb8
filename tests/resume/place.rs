//! A run in a folder of its own, and what is asked of what it leaves.

use std::fs;
use std::path::{Path, PathBuf};

use halfbyte::backend::cpu::Cpu;
use halfbyte::checkpoint::{ModelDir, state};
use halfbyte::rng::{self, Stream};
use halfbyte::train::metrics::{EvalRow, TrainRow};
use halfbyte::train::{self, Outcome, Resume, StepReport, TrainConfig, Ui};
use serde_json::Value;

pub const FIXTURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures");
pub const ADAPTER: &str = "adapter_model.safetensors";
pub const OPTIMIZER: &str = "optimizer.safetensors";

/// A folder with a model, data, and settings of a run that uses dropout, accumulation, evaluation and uneven rows.
pub struct Place {
    pub dir: tempfile::TempDir,
}

impl Place {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let place = Self { dir };
        fs::create_dir(place.path("model")).unwrap();
        for (from, name) in [
            ("tiny-mistral", "config.json"),
            ("tiny-mistral", "model.safetensors"),
            ("tiny-tokenizer", "tokenizer.json"),
            ("tiny-tokenizer", "tokenizer_config.json"),
        ] {
            fs::copy(format!("{FIXTURES}/{from}/{name}"), place.path("model").join(name)).unwrap();
        }
        place.write_rows("data.jsonl", 13, 1);
        place.write_rows("held-out.jsonl", 5, 2);
        place
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn write_rows(&self, name: &str, rows: u32, seed: u64) {
        let row = |i: u32| {
            let n = 2 + rng::word(seed, Stream::Sampling, 0, i.into()) % 7;
            let words: Vec<String> = (0..n).map(|w| format!("w{}", (i * 7 + w * w) % 23)).collect();
            serde_json::json!({"messages": [
                {"role": "user", "content": format!("say {i}")},
                {"role": "assistant", "content": words.join(" ")},
            ]})
        };
        let text: String = (0..rows).map(|i| format!("{}\n", row(i))).collect();
        fs::write(self.path(name), text).unwrap();
    }

    pub fn config(&self, out: &str) -> TrainConfig {
        TrainConfig {
            model: self.path("model"),
            data: vec![self.path("data.jsonl")],
            eval_data: vec![self.path("held-out.jsonl")],
            out: self.path(out),
            r: 4,
            lora_dropout: 0.1,
            learning_rate: 5e-3,
            lr_scheduler_type: "cosine".into(),
            warmup_steps: 2.0,
            max_steps: 9,
            per_device_train_batch_size: 2,
            gradient_accumulation_steps: 3,
            max_length: 256,
            logging_steps: 2.0,
            eval_steps: Some(3.0),
            save_steps: 4.0,
            threads: Some(1),
            ..Default::default()
        }
    }
}

/// Asks to stop after a step, or in the middle of an evaluation; keeps what was shown.
#[derive(Default)]
pub struct TestUi {
    pub stop_after: Option<u64>,
    pub stop_in_eval: Option<u64>,
    pub step: u64,
    pub evaluations: u64,
    pub stop: bool,
    pub notes: String,
}

impl Ui for TestUi {
    fn note(&mut self, text: &str) {
        self.notes += text;
        self.notes += "\n";
    }

    fn work(&mut self, label: &str, _unit: &'static str, _done: u64, _total: u64) {
        if label == "evaluating" && self.stop_in_eval == Some(self.evaluations) {
            self.stop = true;
        }
    }

    fn step(&mut self, report: &StepReport) {
        self.step = report.step;
        self.stop |= Some(self.step) == self.stop_after;
    }

    fn train_row(&mut self, _row: &TrainRow, _report: &StepReport) {}

    fn eval_row(&mut self, _row: &EvalRow) {
        self.evaluations += 1;
    }

    fn stop_requested(&self) -> bool {
        self.stop
    }
}

pub fn run_with(config: &TrainConfig, ui: &mut TestUi) -> halfbyte::Result<Outcome> {
    train::run(&mut Cpu::new(config.threads), config, ui)
}

pub fn run(config: &TrainConfig) -> halfbyte::Result<Outcome> {
    run_with(config, &mut TestUi::default())
}

pub fn resumed(config: &TrainConfig) -> TrainConfig {
    TrainConfig { resume: Resume::Latest(true), ..config.clone() }
}

/// metrics.jsonl without timings and memory.
pub fn metrics(out: &Path) -> Vec<Value> {
    let text = fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    let row = |line: &str| {
        let mut row: Value = serde_json::from_str(line).unwrap();
        for key in ["tokens_per_second", "memory", "memory_peak", "eval_runtime"] {
            row.as_object_mut().unwrap().remove(key);
        }
        row
    };
    text.lines().map(row).collect()
}

/// Final adapter, last optimizer state and metrics are the same, bit for bit.
pub fn assert_equal_runs(a: &Path, b: &Path, last: u64) {
    assert_eq!(metrics(a), metrics(b));
    let last = format!("checkpoint-{last}");
    for name in [ADAPTER.to_string(), format!("{last}/{ADAPTER}"), format!("{last}/{OPTIMIZER}")] {
        assert!(fs::read(a.join(&name)).unwrap() == fs::read(b.join(&name)).unwrap(), "{name} differs");
    }
}

pub fn steps_of(out: &Path) -> Vec<u64> {
    state::checkpoints(out).iter().map(|c| c.0).collect()
}

/// Every checkpoint folder in `out` loads, and nothing half-written bears such a name.
pub fn assert_checkpoints_load(config: &TrainConfig) {
    let model = ModelDir::open(&config.model).unwrap();
    for (step, path) in state::checkpoints(&config.out) {
        assert_eq!(state::load(&path, model.config()).unwrap().step, step);
    }
}

pub fn message(result: halfbyte::Result<Outcome>) -> String {
    let e = result.unwrap_err();
    assert_eq!(e.exit_code(), 2, "{e}");
    e.to_string()
}
