//! Training as a whole on a tiny model: stopping, killing and resuming, and what checkpoints survive.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use halfbyte::Error;
use halfbyte::backend::cpu::Cpu;
use halfbyte::checkpoint::{ModelDir, state};
use halfbyte::rng::{self, Stream};
use halfbyte::train::metrics::{EvalRow, TrainRow};
use halfbyte::train::{self, Outcome, Resume, StepReport, TrainConfig, Ui};
use serde_json::Value;

const FIXTURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures");
const ADAPTER: &str = "adapter_model.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";

/// A folder with a model, data, and settings of a run that uses dropout, accumulation, evaluation and uneven rows.
struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
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

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn write_rows(&self, name: &str, rows: u32, seed: u64) {
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

    fn config(&self, out: &str) -> TrainConfig {
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
struct TestUi {
    stop_after: Option<u64>,
    stop_in_eval: Option<u64>,
    step: u64,
    evaluations: u64,
    stop: bool,
    notes: String,
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

fn run_with(config: &TrainConfig, ui: &mut TestUi) -> halfbyte::Result<Outcome> {
    train::run(&mut Cpu::new(config.threads), config, ui)
}

fn run(config: &TrainConfig) -> halfbyte::Result<Outcome> {
    run_with(config, &mut TestUi::default())
}

fn resumed(config: &TrainConfig) -> TrainConfig {
    TrainConfig { resume: Resume::Latest(true), ..config.clone() }
}

/// metrics.jsonl without timings and memory.
fn metrics(out: &Path) -> Vec<Value> {
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
fn assert_equal_runs(a: &Path, b: &Path, last: u64) {
    assert_eq!(metrics(a), metrics(b));
    let last = format!("checkpoint-{last}");
    for name in [ADAPTER.to_string(), format!("{last}/{ADAPTER}"), format!("{last}/{OPTIMIZER}")] {
        assert!(fs::read(a.join(&name)).unwrap() == fs::read(b.join(&name)).unwrap(), "{name} differs");
    }
}

fn steps_of(out: &Path) -> Vec<u64> {
    state::checkpoints(out).iter().map(|c| c.0).collect()
}

/// Every checkpoint folder in `out` loads, and nothing half-written bears such a name.
fn assert_checkpoints_load(config: &TrainConfig) {
    let model = ModelDir::open(&config.model).unwrap();
    for (step, path) in state::checkpoints(&config.out) {
        assert_eq!(state::load(&path, model.config()).unwrap().step, step);
    }
}

fn message(result: halfbyte::Result<Outcome>) -> String {
    let e = result.unwrap_err();
    assert_eq!(e.exit_code(), 2, "{e}");
    e.to_string()
}

#[test]
fn a_stopped_and_resumed_run_equals_one_that_never_stopped() {
    let place = Place::new();
    let whole = place.config("whole");
    let outcome = run(&whole).unwrap();
    assert_eq!((outcome.step, outcome.interrupted), (9, false));
    assert_eq!(steps_of(&whole.out), [4, 8, 9]);
    for k in 1..9 {
        let config = place.config(&format!("stopped-{k}"));
        let mut ui = TestUi { stop_after: Some(k), ..Default::default() };
        let outcome = run_with(&config, &mut ui).unwrap();
        assert_eq!((outcome.step, outcome.interrupted), (k, true));
        assert!(ui.notes.contains("--resume") && ui.notes.contains(&format!("checkpoint-{k}")), "{}", ui.notes);
        assert!(!config.out.join(ADAPTER).exists(), "no final adapter yet");
        let outcome = run(&resumed(&config)).unwrap();
        assert!(!outcome.interrupted);
        assert_equal_runs(&whole.out, &config.out, 9);
    }
}

/// The moments go into a checkpoint and out of it as the codes that they are.
#[test]
fn an_8_bit_optimizer_resumes_to_the_same_bits() {
    let place = Place::new();
    let eight_bit = |out: &str| TrainConfig { optim: "paged_adamw_8bit".into(), ..place.config(out) };
    let whole = eight_bit("whole");
    run(&whole).unwrap();
    for k in [1, 5] {
        let config = eight_bit(&format!("stopped-{k}"));
        run_with(&config, &mut TestUi { stop_after: Some(k), ..Default::default() }).unwrap();
        let file = config.out.join(format!("checkpoint-{k}")).join(OPTIMIZER);
        let header = String::from_utf8_lossy(&fs::read(file).unwrap()).into_owned();
        assert!(header.contains(r#""m":{"dtype":"U8""#) && header.contains("v.absmax"), "{}", &header[..200]);
        let other = TrainConfig { optim: "adamw_torch".into(), ..resumed(&config) };
        assert!(message(run(&other)).starts_with("optim: "));
        run(&resumed(&config)).unwrap();
        assert_equal_runs(&whole.out, &config.out, 9);
    }
}

#[test]
fn a_run_stopped_inside_an_evaluation_evaluates_when_resumed() {
    let place = Place::new();
    let whole = place.config("whole");
    run(&whole).unwrap();
    let config = place.config("stopped");
    let outcome = run_with(&config, &mut TestUi { stop_in_eval: Some(1), ..Default::default() }).unwrap();
    assert_eq!((outcome.step, outcome.interrupted), (6, true));
    let outcome = run_with(&resumed(&config), &mut TestUi { stop_in_eval: Some(0), ..Default::default() }).unwrap();
    assert_eq!((outcome.step, outcome.interrupted), (6, true), "and may be stopped there again");
    run(&resumed(&config)).unwrap();
    assert_equal_runs(&whole.out, &config.out, 9);
}

#[test]
fn a_finished_run_resumes_to_itself_and_an_empty_folder_to_a_whole_run() {
    let place = Place::new();
    let whole = place.config("whole");
    run(&whole).unwrap();
    let config = resumed(&place.config("new"));
    let mut ui = TestUi::default();
    run_with(&config, &mut ui).unwrap();
    assert!(ui.notes.contains("no checkpoint"), "{}", ui.notes);
    fs::remove_file(config.out.join(ADAPTER)).unwrap();
    assert_eq!(run(&config).unwrap().step, 9);
    assert_equal_runs(&whole.out, &config.out, 9);
}

#[test]
fn a_broken_newest_checkpoint_is_passed_over() {
    let place = Place::new();
    let whole = place.config("whole");
    run(&whole).unwrap();
    let config = place.config("broken");
    run_with(&config, &mut TestUi { stop_after: Some(8), ..Default::default() }).unwrap();
    fs::write(config.out.join("checkpoint-8").join(OPTIMIZER), "torn").unwrap();
    let mut ui = TestUi::default();
    run_with(&resumed(&config), &mut ui).unwrap();
    assert!(ui.notes.contains("passing over") && ui.notes.contains("checkpoint-8"), "{}", ui.notes);
    assert_equal_runs(&whole.out, &config.out, 9);
}

#[test]
fn a_checkpoint_can_be_named_and_continues_in_another_folder() {
    let place = Place::new();
    let whole = place.config("whole");
    run(&whole).unwrap();
    let from = Resume::From(whole.out.join("checkpoint-4"));
    let e = message(run(&TrainConfig { resume: from.clone(), ..whole.clone() }));
    assert!(e.starts_with("resume: ") && e.contains("checkpoint-9"), "{e}");
    let config = TrainConfig { resume: from, ..place.config("branch") };
    run(&config).unwrap();
    let (a, b) = (whole.out.join("checkpoint-9"), config.out.join("checkpoint-9"));
    assert!(fs::read(a.join(OPTIMIZER)).unwrap() == fs::read(b.join(OPTIMIZER)).unwrap());
}

#[test]
fn resuming_with_other_settings_or_inputs_names_the_key() {
    let place = Place::new();
    let config = place.config("run");
    run_with(&config, &mut TestUi { stop_after: Some(4), ..Default::default() }).unwrap();
    let resume = resumed(&config);
    for (key, changed) in [
        ("seed", TrainConfig { seed: 7, ..resume.clone() }),
        ("r", TrainConfig { r: 8, ..resume.clone() }),
        ("lora_dropout", TrainConfig { lora_dropout: 0.0, ..resume.clone() }),
        ("learning_rate", TrainConfig { learning_rate: 1.0, ..resume.clone() }),
        ("gradient_accumulation_steps", TrainConfig { gradient_accumulation_steps: 1, ..resume.clone() }),
        ("eval_data", TrainConfig { eval_data: vec![place.path("data.jsonl")], ..resume.clone() }),
    ] {
        let e = message(run(&changed));
        assert!(e.starts_with(&format!("{key}: ")), "{e}");
    }
    place.write_rows("data.jsonl", 13, 99);
    let e = message(run(&resume));
    assert!(e.starts_with("data: "), "{e}");
    place.write_rows("data.jsonl", 13, 1);

    let weights = place.path("model").join("model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&weights, bytes).unwrap();
    let e = message(run(&resume));
    assert!(e.starts_with("model: "), "{e}");
}

#[test]
fn a_folder_that_holds_a_run_is_not_overwritten_unasked() {
    let place = Place::new();
    let config = place.config("run");
    run(&config).unwrap();
    let e = message(run(&config));
    assert!(e.starts_with("out: ") && e.contains("resume"), "{e}");
    let again = TrainConfig { overwrite_output_dir: true, max_steps: 3, ..config };
    run(&again).unwrap();
    assert_eq!(steps_of(&again.out), [3]);
    assert!(metrics(&again.out).iter().all(|row| row["step"].as_u64() <= Some(3)));
}

#[test]
fn two_runs_never_share_a_folder() {
    let place = Place::new();
    let config = place.config("run");
    run_with(&config, &mut TestUi { stop_after: Some(1), ..Default::default() }).unwrap();
    let lock = fs::File::open(config.out.join(".lock")).unwrap();
    lock.lock().unwrap();
    let e = message(run(&resumed(&config)));
    assert!(e.starts_with("out: ") && e.contains("another run"), "{e}");
    drop(lock);
    run(&resumed(&config)).unwrap();
}

#[test]
fn a_loss_that_is_not_finite_stops_with_step_rows_and_last_checkpoint() {
    let place = Place::new();
    let config = TrainConfig {
        learning_rate: 1e30,
        warmup_steps: 0.0,
        lr_scheduler_type: "constant".into(),
        save_steps: 1.0,
        eval_strategy: Some("no".into()),
        eval_steps: None,
        ..place.config("run")
    };
    let e = run(&config).unwrap_err();
    assert_eq!(e.exit_code(), 1);
    let Error::NotFinite { step, rows, checkpoint, .. } = &e else { panic!("{e}") };
    assert_eq!(*step, 2);
    assert!(rows.contains("data.jsonl:"), "{rows}");
    assert!(checkpoint.ends_with("checkpoint-1"), "{checkpoint}");
    assert_checkpoints_load(&config);
}

#[test]
fn save_total_limit_keeps_the_newest_and_the_best_and_the_best_is_taken_at_the_end() {
    let place = Place::new();
    // Held-out answers of letters that training makes ever less likely.
    let row = |i| format!("{{\"prompt\": \"say {i}\", \"completion\": \"{}\"}}\n", "ZQXJ".repeat(8));
    fs::write(place.path("held-out.jsonl"), (0..3).map(row).collect::<String>()).unwrap();
    let config = TrainConfig {
        learning_rate: 0.05,
        lr_scheduler_type: "constant".into(),
        warmup_steps: 0.0,
        eval_steps: Some(1.0),
        save_steps: 1.0,
        save_total_limit: Some(2),
        load_best_model_at_end: true,
        ..place.config("run")
    };
    let outcome = run(&config).unwrap();
    let best = outcome.best.unwrap();
    let losses: Vec<(u64, f64)> = metrics(&config.out)
        .iter()
        .filter_map(|row| Some((row["step"].as_u64()?, row.get("eval_loss")?.as_f64()?)))
        .collect();
    let lowest = losses.iter().min_by(|a, b| a.1.total_cmp(&b.1)).unwrap();
    assert_eq!(best.step, lowest.0);
    assert_ne!(best.step, 9, "the test wants a best that is not the last");
    assert_eq!(steps_of(&config.out), [best.step, 9]);
    let best = config.out.join(format!("checkpoint-{}", best.step)).join(ADAPTER);
    assert!(fs::read(best).unwrap() == fs::read(config.out.join(ADAPTER)).unwrap());
}

#[test]
fn one_gradient_norm_however_the_rows_of_a_step_are_cut() {
    let place = Place::new();
    place.write_rows("data.jsonl", 4, 3);
    let first = |name: &str, batch, accumulate, packing| {
        let config = TrainConfig {
            per_device_train_batch_size: batch,
            gradient_accumulation_steps: accumulate,
            packing,
            lora_dropout: 0.0,
            max_steps: 2,
            warmup_steps: 0.0,
            logging_steps: 1.0,
            eval_data: vec![],
            eval_steps: None,
            ..place.config(name)
        };
        run(&config).unwrap();
        let row = &metrics(&config.out)[1];
        (row["loss"].as_f64().unwrap(), row["grad_norm"].as_f64().unwrap())
    };
    let (loss, norm) = first("4x1", 4, 1, false);
    for other in [first("1x4", 1, 4, false), first("3x2", 3, 2, false), first("packed", 4, 1, true)] {
        assert!((other.0 / loss - 1.0).abs() < 1e-5, "loss {loss} and {}", other.0);
        assert!((other.1 / norm - 1.0).abs() < 1e-4, "norm {norm} and {}", other.1);
    }
}

// ---- the process ---------------------------------------------------------------------------------------------------

/// Writes the run file and starts `halfbyte train` on it, through `sh` with `before` run first.
fn spawn(config: &TrainConfig, before: &str) -> Child {
    let file = config.out.with_extension("toml");
    fs::write(&file, toml::to_string(config).unwrap()).unwrap();
    Command::new("sh")
        .args(["-c", &format!("{before}exec \"$0\" train \"$1\""), env!("CARGO_BIN_EXE_halfbyte")])
        .arg(&file)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Exit status, and all output.
fn wait(child: Child) -> (ExitStatus, String) {
    let output = child.wait_with_output().unwrap();
    (output.status, String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned())
}

fn signal(child: &Child, name: &str) {
    assert!(Command::new("kill").args([name, &child.id().to_string()]).status().unwrap().success());
}

fn nap() {
    std::thread::sleep(Duration::from_millis(1));
}

/// Waits until metrics.jsonl says more than `step`, or the process ends.
fn wait_for_step(child: &mut Child, out: &Path, step: u64) {
    loop {
        let ended = child.try_wait().unwrap().is_some();
        let text = fs::read_to_string(out.join("metrics.jsonl")).unwrap_or_default();
        let rows = text.lines().filter_map(|l| serde_json::from_str::<Value>(l).ok()?["step"].as_u64());
        if rows.max().unwrap_or(0) > step || ended {
            return;
        }
        nap();
    }
}

#[test]
fn a_process_killed_at_any_moment_leaves_loadable_checkpoints_and_resumes_to_the_same_end() {
    let place = Place::new();
    let lively = |out: &str| TrainConfig {
        max_steps: 40,
        save_steps: 1.0,
        logging_steps: 1.0,
        save_total_limit: Some(3),
        ..place.config(out)
    };
    let whole = lively("whole");
    let start = Instant::now();
    run(&whole).unwrap();
    let cycle = start.elapsed() / 40;
    let config = resumed(&lively("killed"));
    let newest = || steps_of(&config.out).last().copied().unwrap_or(0);
    let (mut kills, mut stalls) = (0, 0);
    for i in 0..100 {
        let before = newest();
        let mut child = spawn(&config, "");
        wait_for_step(&mut child, &config.out, before);
        // Anywhere in the steps and saves that follow; later where a loaded machine came to nothing.
        std::thread::sleep(cycle.mul_f32(3.0 * rng::uniform(5, Stream::Sampling, 1, i)) + cycle * stalls);
        let ended = child.try_wait().unwrap().is_some();
        child.kill().unwrap();
        let (status, text) = wait(child);
        if ended {
            assert!(status.success(), "{text}");
            break;
        }
        kills += 1;
        assert_checkpoints_load(&config);
        stalls = if newest() > before { 0 } else { stalls + 1 };
    }
    assert!(kills >= 2, "the run ended after {kills} kills");
    let (status, text) = wait(spawn(&config, ""));
    assert!(status.success(), "{text}");
    assert_equal_runs(&whole.out, &config.out, 40);
    let left: Vec<String> =
        fs::read_dir(&config.out).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    assert!(!left.iter().any(|name| name.contains(".tmp-") || name.contains(".old-")), "{left:?}");
}

#[test]
fn ctrl_c_and_sigterm_save_and_exit_with_0() {
    let place = Place::new();
    for name in ["-INT", "-TERM"] {
        let endless = TrainConfig {
            max_steps: 1_000_000,
            logging_steps: 1.0,
            save_steps: 1e6,
            eval_strategy: Some("no".into()),
            ..place.config(&format!("run{name}"))
        };
        let mut child = spawn(&endless, "");
        wait_for_step(&mut child, &endless.out, 1);
        signal(&child, name);
        let (status, text) = wait(child);
        assert_eq!(status.code(), Some(0), "{text}");
        assert!(text.contains("--resume"), "{text}");
        assert_eq!(steps_of(&endless.out).len(), 1);
        assert_checkpoints_load(&endless);
    }
}

/// The data comes from a pipe that nobody writes to, so the process waits and cannot end by itself.
#[test]
fn a_second_ctrl_c_exits_at_once_with_130() {
    let place = Place::new();
    let pipe = place.path("pipe.jsonl");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let mut child = spawn(&TrainConfig { data: vec![pipe], ..place.config("run") }, "");
    let catches = |child: &Child| {
        let status = fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap_or_default();
        let mask = status.lines().find_map(|l| l.strip_prefix("SigCgt:")).unwrap_or_default().trim().to_string();
        u64::from_str_radix(&mask, 16).unwrap_or(0) >> 1 & 1 == 1
    };
    let name = |child: &Child| fs::read_to_string(format!("/proc/{}/comm", child.id())).unwrap_or_default();
    while !(name(&child).starts_with("halfbyte") && catches(&child)) {
        assert!(child.try_wait().unwrap().is_none(), "{}", wait(child).1);
        nap();
    }
    let mut code = None;
    // The first is taken as a wish; any later one ends it.
    for _ in 0..2000 {
        signal(&child, "-INT");
        for _ in 0..5 {
            nap();
        }
        code = child.try_wait().unwrap();
        if code.is_some() {
            break;
        }
    }
    child.kill().unwrap();
    assert_eq!(code.and_then(|c| c.code()), Some(130));
}

#[test]
fn a_full_disk_is_one_clear_error_and_the_previous_checkpoint_stays() {
    let place = Place::new();
    let constant = |out: &str, max_steps| TrainConfig {
        lr_scheduler_type: "constant".into(),
        max_steps,
        save_steps: 2.0,
        eval_data: vec![],
        eval_steps: None,
        ..place.config(out)
    };
    run(&constant("whole", 6)).unwrap();
    run(&constant("full", 2)).unwrap();
    let config = resumed(&constant("full", 6));
    // No file may grow beyond 16 blocks of 512 bytes: writing the checkpoint fails as on a full disk.
    let (status, text) = wait(spawn(&config, "trap '' XFSZ; ulimit -f 16; "));
    assert_eq!(status.code(), Some(1), "{text}");
    let errors: Vec<&str> = text.lines().filter(|l| l.contains("error")).collect();
    assert!(errors.len() == 1 && errors[0].contains("checkpoint-4"), "{text}");
    assert_eq!(steps_of(&config.out), [2]);
    assert_checkpoints_load(&config);
    let (status, text) = wait(spawn(&config, ""));
    assert!(status.success(), "{text}");
    let optimizer = |out: &str| fs::read(place.path(out).join("checkpoint-6").join(OPTIMIZER)).unwrap();
    assert!(optimizer("whole") == optimizer("full"));
}

#[test]
fn an_output_folder_that_cannot_be_made_is_named() {
    let place = Place::new();
    fs::write(place.path("file"), "").unwrap();
    let (status, text) = wait(spawn(&place.config("file"), ""));
    assert_eq!(status.code(), Some(2), "{text}");
    assert!(text.contains(&place.path("file").display().to_string()), "{text}");
}
