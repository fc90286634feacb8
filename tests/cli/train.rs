//! `halfbyte train`: run files, flags, what it writes, and bad input.

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use crate::{Place, Run, args, command, halfbyte};

/// Two quick steps on the tiny model; `more` flags go last.
fn train(place: &Place, out: &str, more: &[&str]) -> Run {
    let (data, out) = (place.data(), place.path(out));
    let mut a = args!["train", "--model", place.model(), "--data", data, "--out", out].to_vec();
    a.extend(args!["--max-steps", "2", "--max-length", "64", "--logging-steps", "1"]);
    a.extend(more.iter().map(Into::into));
    halfbyte(a)
}

#[test]
fn flags_alone_train_an_adapter() {
    let place = Place::with("tiny-mistral");
    let run = train(&place, "run", &[]);
    run.ok();
    assert!(run.stdout.contains("run"), "the adapter's path is printed: {run:#?}");
    for name in ["adapter_config.json", "adapter_model.safetensors", "metrics.jsonl"] {
        assert!(place.path("run").join(name).exists(), "{name}: {:?}", place.names("run"));
    }
    for part in ["step 1/2", "step 2/2", "loss", "tok/s", "left"] {
        assert!(run.stderr.contains(part), "{part}: {run:#?}");
    }
    assert!(!run.stderr.contains('\r') && !run.stderr.contains('\u{1b}'), "plain lines without a terminal: {run:#?}");
    let metrics = fs::read_to_string(place.path("run/metrics.jsonl")).expect("metrics");
    assert_eq!(metrics.lines().filter(|l| l.contains("\"loss\"")).count(), 2, "{metrics}");
}

#[test]
fn a_run_file_trains_and_flags_override_it() {
    let place = Place::with("tiny-mistral");
    let data = place.data();
    let text = format!(
        "# a comment\nmodel = {:?}\ndata = {data:?}\noutput_dir = {:?}\nlora_r = 4\nmax_steps = 1\nmax_length = 64\n",
        place.model(),
        place.path("from-file"),
    );
    let file = place.write("run.toml", text);
    halfbyte(args!["train", file]).ok();
    assert!(place.path("from-file/adapter_config.json").exists());
    halfbyte(args!["train", file, "--out", place.path("from-flag"), "--r", "2", "--lora_alpha", "3"]).ok();
    let config = fs::read_to_string(place.path("from-flag/adapter_config.json")).expect("a config");
    let config: serde_json::Value = serde_json::from_str(&config).expect("JSON");
    assert_eq!((&config["r"], &config["lora_alpha"]), (&2.into(), &3.into()));
}

#[test]
fn both_spellings_of_a_flag_are_taken() {
    let place = Place::with("tiny-mistral");
    train(&place, "kebab", &["--learning-rate", "1e-3", "--lora-r", "2"]).ok();
    train(&place, "snake", &["--learning_rate", "1e-3", "--lora_r", "2"]).ok();
    let adapter = |out: &str| fs::read(place.path(out).join("adapter_model.safetensors")).expect("an adapter");
    assert_eq!(adapter("kebab"), adapter("snake"));
}

#[test]
fn an_unknown_key_names_file_line_and_the_nearest_key() {
    let place = Place::empty();
    let file = place.write("run.toml", "model = \"m\"\n\nlearning_rat = 1e-4\n");
    halfbyte(args!["train", file]).fails(2, &["run.toml", "line 3", "\"learning_rat\"", "\"learning_rate\""]);
    halfbyte(["train", "--learning-rat", "1"]).fails(2, &["--learning-rat", "--learning-rate"]);
}

#[test]
fn a_value_of_the_wrong_type_or_range_names_line_found_and_expected() {
    let place = Place::empty();
    for (line, parts) in [
        ("learning_rate = \"fast\"", ["learning_rate", "found \"fast\"", "expected a number"]),
        ("r = 0", ["r: found 0", "0", "expected a whole number of at least 1"]),
        ("packing = 1", ["packing", "found 1", "expected true or false"]),
        ("optim = \"sgd\"", ["optim", "found \"sgd\"", "paged_adamw_32bit"]),
        ("lora_r = 1.5", ["r: found 1.5", "1.5", "expected a whole number"]),
    ] {
        let file = place.write("run.toml", format!("seed = 1\n{line}\n"));
        let run = halfbyte(args!["train", file]);
        run.fails(2, &["run.toml", "line 2"]);
        run.fails(2, &parts);
    }
    halfbyte(["train", "--r", "many"]).fails(2, &["--r", "found \"many\"", "a whole number"]);
    halfbyte(["train", "--lora-dropout", "2"]).fails(2, &["--lora-dropout", "found 2", "below 1"]);
}

#[test]
fn a_run_file_that_is_not_toml_or_not_there() {
    let place = Place::empty();
    halfbyte(args!["train", place.write("run.toml", "a = 1\nr = = 3\n")]).fails(2, &["run.toml", "line 2"]);
    halfbyte(args!["train", place.write("bin.toml", b"\xff\xfe")]).fails(2, &["bin.toml", "UTF-8"]);
    halfbyte(args!["train", place.path("none.toml")]).fails(2, &["none.toml", "No such file"]);
    halfbyte(args!["train", place.path("")]).fails(2, &["cannot read"]);
    let twice = place.write("twice.toml", "r = 1\nlora_r = 2\n");
    halfbyte(args!["train", twice]).fails(2, &["twice.toml", "line 2", "line 1"]);
}

#[test]
fn what_is_missing_is_named() {
    let place = Place::with("tiny-mistral");
    halfbyte(["train"]).fails(2, &["--model", "a model directory"]);
    halfbyte(args!["train", "--model", place.model(), "--out", place.path("o")]).fails(2, &["--data"]);
    halfbyte(args!["train", "--model", place.model(), "--data", place.data()]).fails(2, &["--out"]);
    let out = place.path("o");
    halfbyte(args!["train", "--model", place.path("none"), "--data", place.data(), "--out", out])
        .fails(2, &["none", "No such file"]);
    halfbyte(args!["train", "--model", place.model(), "--data", place.path("none.jsonl"), "--out", out])
        .fails(2, &["none.jsonl", "No such file"]);
    assert!(!out.join("adapter_config.json").exists());
}

#[test]
fn bad_rows_are_named_by_file_and_line() {
    let place = Place::with("tiny-mistral");
    let good = "{\"prompt\":\"a\",\"completion\":\"b\"}\n";
    for (name, text, parts) in [
        ("malformed", format!("{good}{{\"prompt\": \n").into_bytes(), ["line 2", "JSON"]),
        ("no-keys", format!("{good}{{\"foo\": 1}}\n").into_bytes(), ["line 2", "text"]),
        ("not-utf8", [good.as_bytes(), b"{\"text\":\"\xff\"}\n"].concat(), ["line 2", "UTF-8"]),
        ("empty", Vec::new(), ["empty", "expected"]),
    ] {
        let file = place.write(&format!("{name}.jsonl"), text);
        let run = halfbyte(args!["train", "--model", place.model(), "--data", file, "--out", place.path("o")]);
        run.fails(2, &[&format!("{name}.jsonl")]);
        run.fails(2, &parts);
    }
}

#[test]
fn a_row_longer_than_max_length_is_an_error_unless_told_otherwise() {
    let place = Place::with("tiny-mistral");
    train(&place, "o", &["--max-length", "4"]).fails(2, &["data.jsonl", "line 1", "overlong"]);
    train(&place, "o", &["--max-length", "12", "--overlong", "truncate"]).ok();
}

#[test]
fn an_out_that_holds_something_is_refused() {
    let place = Place::with("tiny-mistral");
    train(&place, "run", &[]).ok();
    train(&place, "run", &[]).fails(2, &["--out", "--overwrite"]);
    train(&place, "run", &["--overwrite"]).ok();
    train(&place, "run", &["--resume"]).ok();
    train(&place, "run", &["--resume", "--r", "3"]).fails(2, &["--r", "found 3", "in the run that is resumed"]);
    let file = place.write("a-file", "");
    let (model, data) = (place.model(), place.data());
    halfbyte(args!["train", "--model", model, "--data", data, "--out", file])
        .fails(2, &["--out", "a-file", "a directory"]);
}

#[test]
fn devices_and_threads_that_are_not_there_are_refused_with_the_reason() {
    let place = Place::with("tiny-mistral");
    train(&place, "o", &["--device", "cuda"]).fails(2, &["--device cuda", "not available"]);
    train(&place, "o", &["--threads", "1000000000"]).fails(2, &["--threads", "from 1 to 4096"]);
    train(&place, "o", &["--device", "tpu"]).fails(2, &["--device", "tpu", "auto"]);
}

#[test]
fn ctrl_c_saves_and_the_same_command_with_resume_goes_on() {
    let place = Place::with("tiny-mistral");
    let out = place.path("run");
    let a = args!["train", "--model", place.model(), "--data", place.data(), "--out", out, "--max-length", "64"];
    let steps = args!["--max-steps", "1000000", "--logging-steps", "1", "--lr-scheduler-type", "constant"];
    let mut c = command([&a[..], &steps[..]].concat());
    c.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = c.spawn().expect("the binary starts");
    let mut lines = BufReader::new(child.stderr.take().expect("a pipe")).lines().map(|l| l.expect("text"));
    assert!(lines.any(|l| l.starts_with("step 2/")));
    let id = child.id().to_string();
    assert!(Command::new("kill").args(["-INT", &id]).status().expect("kill").success());
    let rest: Vec<String> = lines.collect();
    assert!(rest.iter().any(|l| l.contains("--resume")), "{rest:?}");
    assert_eq!(child.wait().expect("an end").code(), Some(0));
    let names = place.names("run");
    let saved = names.iter().find_map(|n| n.to_str()?.strip_prefix("checkpoint-")).expect("a checkpoint");
    let next = (saved.parse::<u64>().expect("a step") + 1).to_string();
    let run = halfbyte([&a[..], &args!["--lr-scheduler-type", "constant", "--max-steps", next, "--resume"]].concat());
    run.ok();
    assert!(run.stderr.contains(&format!("resuming {}/checkpoint-{saved} at step {next}", out.display())), "{run:#?}");
    assert!(place.path("run/adapter_model.safetensors").exists());
}
