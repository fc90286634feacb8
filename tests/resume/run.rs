//! Runs inside this process.

use std::fs;

use halfbyte::Error;
use halfbyte::train::{Resume, TrainConfig};

use crate::place::*;

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
