//! Runs of the program: signals, full disks.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use halfbyte::rng::{self, Stream};
use halfbyte::train::TrainConfig;
use serde_json::Value;

use crate::place::*;

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
