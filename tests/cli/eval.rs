//! `halfbyte eval`.

use crate::{Place, args, halfbyte};

#[test]
fn loss_perplexity_and_counts_are_printed() {
    let place = Place::with("tiny-mistral");
    let base = args!["eval", "--model", place.model(), "--data", place.data()];
    let json = halfbyte([&base[..], &args!["--json"]].concat()).json();
    let (loss, perplexity) = (json["loss"].as_f64().expect("loss"), json["perplexity"].as_f64().expect("perplexity"));
    assert!((loss.exp() / perplexity - 1.0).abs() < 1e-6, "{json}");
    assert!(loss > 1.0 && loss < 20.0, "{json}");
    assert_eq!(json["rows"], 8);
    assert!(json["tokens"].as_u64().is_some_and(|n| n > 8), "{json}");
    let run = halfbyte(base.clone());
    for part in ["loss", "perplexity", "tokens", "rows", &format!("{loss:.4}")] {
        assert!(run.ok().contains(part), "{part}: {run:#?}");
    }
}

#[test]
fn adapter_and_4_bits_change_the_loss() {
    let place = Place::with("tiny-mistral");
    let loss = |more: &[std::ffi::OsString]| {
        let a = args!["eval", "--model", place.model(), "--data", place.data(), "--json"];
        halfbyte([&a[..], more].concat()).json()["loss"].as_f64().expect("loss")
    };
    let base = loss(&[]);
    assert_ne!(base, loss(&args!["--adapter", place.adapter()]));
    assert_ne!(base, loss(&args!["--load-in-4bit"]));
}

#[test]
fn the_number_of_threads_does_not_change_the_loss() {
    let place = Place::with("tiny-mistral");
    let a = args!["eval", "--model", place.model(), "--data", place.data(), "--json"];
    let one = halfbyte([&a[..], &args!["--threads", "1"]].concat()).json();
    let two = halfbyte([&a[..], &args!["--threads", "2"]].concat()).json();
    let (one, two) = (one["loss"].as_f64().expect("loss"), two["loss"].as_f64().expect("loss"));
    assert!((one / two - 1.0).abs() < 1e-5, "{one} {two}");
}

#[test]
fn bad_input_is_named() {
    let place = Place::with("tiny-mistral");
    let eval = |more: &[std::ffi::OsString]| halfbyte([&args!["eval"][..], more].concat());
    let (model, data) = (place.model(), place.data());
    eval(&args!["--model", model]).fails(2, &["--data"]);
    eval(&args!["--model", model, "--data", place.path("none.jsonl")]).fails(2, &["none.jsonl", "No such file"]);
    let bad = place.write("bad.jsonl", "{\"text\": \"a b c\"}\n{\"text\": 3}\n");
    eval(&args!["--model", model, "--data", bad]).fails(2, &["bad.jsonl", "line 2", "found", "expected"]);
    eval(&args!["--model", model, "--data", data, "--max-length", "3"]).fails(2, &["data.jsonl", "line 1"]);
    eval(&args!["--model", model, "--data", data, "--overlong", "x"]).fails(2, &["overlong", "truncate"]);
    let other = place.adapter_of_another_model();
    eval(&args!["--model", model, "--data", data, "--adapter", other]).fails(2, &["another model"]);
}

#[test]
fn the_loss_is_the_one_that_training_reported() {
    let place = Place::with("tiny-mistral");
    let (model, data, out) = (place.model(), place.data(), place.path("run"));
    let train = args!["train", "--model", model, "--data", data, "--eval-data", data, "--out", out];
    halfbyte([&train[..], &args!["--max-steps", "2", "--max-length", "64"]].concat()).ok();
    let metrics = std::fs::read_to_string(out.join("metrics.jsonl")).expect("metrics");
    let rows = metrics.lines().map(|l| serde_json::from_str::<serde_json::Value>(l).expect("JSON"));
    let reported = rows.filter_map(|r| r["eval_loss"].as_f64()).next_back().expect("an evaluation");
    for adapter in [out.clone(), out.join("checkpoint-2")] {
        let eval = args!["eval", "--model", model, "--adapter", adapter, "--load-in-4bit", "--data", data, "--json"];
        let loss = halfbyte(eval).json()["loss"].as_f64().expect("loss");
        assert!((loss / reported - 1.0).abs() < 1e-5, "{loss} {reported}");
    }
}
