//! Training state, killed processes, full disks and folders that cannot be written.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::json;

use super::{assert_input, fixture, join, set_key, split};
use crate::backend::adamw::Blocks;
use crate::backend::{Moment, OptimizerState};
use crate::checkpoint::state::{self, TrainingState};
use crate::checkpoint::{ModelDir, QuantConfig, atomic, config, merge, peft, quantized};
use crate::error::Error;
use crate::model::{HostAdapter, LoraConfig, ModelConfig, TargetModules};
use crate::nf4::QuantType;

fn model() -> ModelConfig {
    config::read(&fixture("tiny-mistral")).unwrap().model
}

fn some_state(step: u64) -> TrainingState {
    let lora = LoraConfig {
        r: 4,
        lora_alpha: 8.0,
        lora_dropout: 0.1,
        target_modules: TargetModules::Pattern("all-linear".into()),
        rank_pattern: vec![],
        alpha_pattern: vec![],
        use_rslora: false,
    };
    let adapter = HostAdapter::init(lora, &model(), step).unwrap();
    let values = |x: f32| Moment::F32((0..adapter.layout.len).map(|i| x + i as f32 * 1e-3).collect());
    let optimizer = OptimizerState { master: adapter.weights.clone(), m: values(0.5), v: values(step as f32) };
    TrainingState { step, optimizer, trainer: json!({"epoch": 1.5, "rows": [1, 2], "seed": u64::MAX}), adapter }
}

fn names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).unwrap();
    let mut names: Vec<String> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_training_state_read_is_the_one_written() {
    let out = tempfile::tempdir().unwrap();
    let dir = state::path_of(out.path(), 12);
    let state = some_state(12);
    state::save(&dir, &state, "tiny-mistral").unwrap();
    assert_eq!(state::load(&dir, &model()).unwrap(), state);
    // It is a PEFT adapter as well.
    assert_eq!(peft::load(&dir, &model()).unwrap().weights, state.adapter.weights);
    let p = state.adapter.layout.len;
    let blocks = Blocks::new(p, &state.adapter.layout.tensor_lens()).unwrap().count();
    let moment = |x: u8| Moment::U8 {
        codes: (0..p).map(|i| (i as u8).wrapping_mul(x)).collect(),
        absmax: (0..blocks).map(|b| b as f32 / 3.0).collect(),
    };
    let optimizer = OptimizerState { master: state.adapter.weights.clone(), m: moment(3), v: moment(7) };
    let again = TrainingState { trainer: json!(null), optimizer, ..state };
    state::save(&dir, &again, "tiny-mistral").unwrap();
    assert_eq!(state::load(&dir, &model()).unwrap(), again);
    assert_eq!(names(out.path()), ["checkpoint-12"]);
}

#[test]
fn a_faulty_training_state_is_named() {
    let out = tempfile::tempdir().unwrap();
    let dir = state::path_of(out.path(), 1);
    let fresh = || state::save(&dir, &some_state(1), "m").unwrap();
    fresh();
    set_key(&dir.join(state::TRAINER), "version", Some(json!(9)));
    assert_input(state::load(&dir, &model()), &["trainer_state.json", "version", "9"]);
    fresh();
    set_key(&dir.join(state::TRAINER), "global_step", None);
    assert_input(state::load(&dir, &model()), &["trainer_state.json", "global_step"]);
    fresh();
    let optimizer = dir.join(state::OPTIMIZER);
    let (header, mut data) = split(&optimizer);
    data[..4].copy_from_slice(&f32::INFINITY.to_le_bytes());
    join(&optimizer, &serde_json::Value::Object(header).to_string(), &data);
    assert_input(state::load(&dir, &model()), &["optimizer.safetensors", "index 0", "finite"]);
    fresh();
    let mut other = model();
    other.intermediate_size = 96;
    assert_input(state::load(&dir, &other), &["adapter_model.safetensors", "another model"]);
    std::fs::remove_file(dir.join(state::OPTIMIZER)).unwrap();
    assert!(matches!(state::load(&dir, &model()).unwrap_err(), Error::Read { .. }));
}

#[test]
fn the_latest_checkpoint_is_the_newest_sound_one() {
    let out = tempfile::tempdir().unwrap();
    assert_eq!(state::latest(out.path()), None);
    assert_eq!(state::latest(&out.path().join("missing")), None);
    for step in [2, 9, 10] {
        state::save(&state::path_of(out.path(), step), &some_state(step), "m").unwrap();
    }
    std::fs::create_dir(out.path().join("checkpoint-11")).unwrap();
    std::fs::create_dir(out.path().join("checkpoint-best")).unwrap();
    std::fs::write(out.path().join("checkpoint-99"), "").unwrap();
    let steps: Vec<u64> = state::checkpoints(out.path()).into_iter().map(|c| c.0).collect();
    assert_eq!(steps, [2, 9, 10, 11]);
    assert_eq!(state::latest(out.path()), Some(out.path().join("checkpoint-10")));
    let file = out.path().join("checkpoint-10").join(state::OPTIMIZER);
    let bytes = std::fs::read(&file).unwrap();
    std::fs::write(&file, &bytes[..bytes.len() / 2]).unwrap();
    assert_eq!(state::latest(out.path()), Some(out.path().join("checkpoint-9")));
}

/// This test binary again, running one ignored test of this file, with `dir` for it to work in.
fn child_test(name: &str, dir: &Path, shell: Option<&str>) -> Command {
    let exe = std::env::current_exe().unwrap();
    let mut command = match shell {
        Some(script) => {
            let mut sh = Command::new("sh");
            sh.args(["-c", script]).arg(exe);
            sh
        }
        None => Command::new(exe),
    };
    command.args(["--ignored", "--exact", "--nocapture", &format!("checkpoint::tests::crashes::{name}")]);
    command.env("HALFBYTE_TEST_DIR", dir).stdin(Stdio::null());
    command
}

fn child_dir() -> PathBuf {
    std::env::var_os("HALFBYTE_TEST_DIR").expect("started by its parent test").into()
}

#[test]
#[ignore = "the child of a_process_killed_at_any_moment_leaves_the_last_checkpoint_loadable"]
fn child_saves_until_it_is_killed() {
    let dir = child_dir();
    atomic::clean(&dir).unwrap();
    let mut step = match state::latest(&dir) {
        Some(path) => state::load(&path, &model()).unwrap().step,
        None => 0,
    };
    loop {
        step += 1;
        state::save(&state::path_of(&dir, step), &some_state(step), "m").unwrap();
        // The same step again: a replacement must be as safe as a new folder.
        state::save(&state::path_of(&dir, step), &some_state(step), "m").unwrap();
        for (_, old) in state::checkpoints(&dir).into_iter().rev().skip(2) {
            atomic::remove_dir(&old).unwrap();
        }
    }
}

struct KilledOnDrop(Child);

impl Drop for KilledOnDrop {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_process_killed_at_any_moment_leaves_the_last_checkpoint_loadable() {
    let out = tempfile::tempdir().unwrap();
    let mut newest = 0;
    for round in 0..12u64 {
        let mut command = child_test("child_saves_until_it_is_killed", out.path(), None);
        let child = KilledOnDrop(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap());
        // The first round waits for a checkpoint, the others strike anywhere.
        let waits = if round == 0 { 600 } else { 1 };
        for _ in 0..waits {
            std::thread::sleep(Duration::from_millis(50 + 17 * round));
            if state::latest(out.path()).is_some() {
                break;
            }
        }
        drop(child);
        let path = state::latest(out.path()).expect("a checkpoint");
        let state = state::load(&path, &model()).unwrap();
        assert_eq!(state, some_state(state.step));
        assert!(state.step >= newest, "{} after {newest}", state.step);
        newest = state.step;
        // What is there under its own name is whole.
        for (step, path) in state::checkpoints(out.path()) {
            assert_eq!(state::load(&path, &model()).unwrap().step, step);
        }
    }
    atomic::clean(out.path()).unwrap();
    assert!(names(out.path()).iter().all(|n| n.starts_with("checkpoint-")), "{:?}", names(out.path()));
}

/// Every kind of save into `dir`, by name.
fn saves(dir: &Path) -> Vec<(&'static str, crate::Result<()>)> {
    let base = ModelDir::open(&fixture("tiny-mistral")).unwrap();
    let config = QuantConfig { quant_type: QuantType::Nf4, double_quant: true };
    let state = some_state(3);
    vec![
        ("state", state::save(&dir.join("checkpoint-3"), &state, "m")),
        ("adapter", peft::save(&dir.join("adapter"), &state.adapter, "m")),
        ("quantize", quantized::write(&base, &dir.join("q"), config, &[], &mut |_, _| ()).map(drop)),
        ("merge", merge::merge(&base, None, &state.adapter, &dir.join("m"), &mut |_, _| ()).map(drop)),
    ]
}

#[test]
#[ignore = "the child of a_full_disk_is_a_write_error_and_leaves_nothing_behind"]
fn child_saves_to_a_full_disk() {
    for (what, result) in saves(&child_dir()) {
        let error = result.expect_err(what);
        assert!(matches!(error, Error::Write { .. }), "{what}: {error:?}");
        assert_eq!(error.exit_code(), 1);
        println!("refused {what}: {error}");
    }
}

#[test]
fn a_full_disk_is_a_write_error_and_leaves_nothing_behind() {
    let out = tempfile::tempdir().unwrap();
    let state = some_state(2);
    state::save(&state::path_of(out.path(), 2), &state, "m").unwrap();
    // A limit of 8 blocks on the size of any file stands in for the full disk: the same failing writes.
    let script = "trap '' XFSZ; ulimit -f 8; exec \"$0\" \"$@\"";
    let output = child_test("child_saves_to_a_full_disk", out.path(), Some(script)).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(text.matches("refused ").count(), 4, "{text}");
    assert_eq!(names(out.path()), ["checkpoint-2"]);
    assert_eq!(state::load(&state::latest(out.path()).unwrap(), &model()).unwrap(), state);
}

#[test]
fn an_unwritable_folder_is_a_write_error_that_names_it() {
    let out = tempfile::tempdir().unwrap();
    // A path below a regular file: no one may write there, root included.
    let file = out.path().join("file");
    std::fs::write(&file, "").unwrap();
    for (what, result) in saves(&file) {
        let error = result.expect_err(what);
        assert!(matches!(error, Error::Write { .. }), "{what}: {error:?}");
        assert!(error.to_string().contains(file.to_str().unwrap()), "{error}");
    }
    assert_eq!(names(out.path()), ["file"]);
}
