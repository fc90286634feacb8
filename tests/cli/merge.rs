//! `halfbyte merge`.

use crate::{Place, args, fixtures, halfbyte};

#[test]
fn the_merged_model_says_what_base_and_adapter_say() {
    let place = Place::with("tiny-mistral");
    let (model, adapter, out) = (place.model(), place.adapter(), place.path("merged"));
    let run = halfbyte(args!["merge", "--model", model, "--adapter", adapter, "--out", out]);
    for part in ["base", "the model's own 16 or 32-bit weights", "14 of 21 tensors", "probe", "max", "mean"] {
        assert!(run.ok().contains(part), "{part}: {run:#?}");
    }
    let text = |more: &[std::ffi::OsString]| {
        let a = args!["generate", "--prompt", "hello", "--max-new-tokens", "8"];
        halfbyte([&a[..], more].concat()).ok().to_string()
    };
    assert_eq!(text(&args!["--model", out]), text(&args!["--model", model, "--adapter", adapter]));
    let facts = halfbyte(args!["inspect", "--json", out]).json();
    assert_eq!(facts["kind"], "model directory");
    assert!(facts["tensors"].as_array().is_some_and(|t| t.iter().all(|t| t["dtype"] == "BF16")));
    assert!(out.join("tokenizer.json").exists());
}

#[test]
fn a_4bit_base_is_dequantised_unless_the_original_is_given() {
    let place = Place::with("tiny-mistral-nf4-bf16");
    let original = fixtures().join("tiny-mistral");
    let merge = |out: &str, more: &[std::ffi::OsString]| {
        let a =
            args!["merge", "--model", place.model(), "--adapter", place.adapter(), "--out", place.path(out), "--json"];
        halfbyte([&a[..], more].concat()).json()
    };
    let from_4bit = merge("a", &[]);
    let from_16bit = merge("b", &args!["--base-16bit", original]);
    assert_eq!((&from_4bit["base"], &from_16bit["base"]), (&"4-bit".into(), &"16-bit".into()));
    let far = |j: &serde_json::Value| j["probe"]["mean_difference"].as_f64().expect("a number");
    // The adapter was trained over the 4-bit weights: the other base is further away.
    assert!(far(&from_4bit) < far(&from_16bit), "{from_4bit} {from_16bit}");
    let read = |out: &str| std::fs::read(place.path(out).join("model.safetensors")).expect("weights");
    assert_ne!(read("a"), read("b"));
    assert!(merge("c", &args!["--no-probe"])["probe"].is_null());
}

#[test]
fn bad_input_is_named() {
    let place = Place::with("tiny-mistral");
    let merge = |adapter: std::path::PathBuf, more: &[std::ffi::OsString]| {
        let a = args!["merge", "--model", place.model(), "--adapter", adapter, "--out", place.path("o")];
        halfbyte([&a[..], more].concat())
    };
    merge(place.path("none"), &[]).fails(2, &["none", "No such file"]);
    merge(place.adapter_of_another_model(), &[]).fails(2, &["another model"]);
    merge(place.adapter(), &args!["--base-16bit", fixtures().join("tiny-llama-tied")]).fails(2, &["found", "expected"]);
    merge(place.adapter(), &args!["--base-16bit", place.path("none")]).fails(2, &["none"]);
    merge(place.adapter(), &args!["--device", "cuda"]).fails(2, &["not available"]);
    assert!(!place.path("o").exists());
}
