//! `halfbyte inspect`.

use std::fs;

use crate::{Place, args, fixtures, halfbyte};

#[test]
fn a_model_directory() {
    let place = Place::with("tiny-mistral");
    let run = halfbyte(args!["inspect", place.model()]);
    let text = run.ok();
    for part in [
        "model directory",
        "mistral",
        "2 layers, hidden 64, MLP 160, 4 heads of 16 (2 for keys and values), vocabulary 256",
        "sliding window 8",
        "model.layers.*.self_attn.q_proj.weight",
        "64 x 64",
        "BF16",
        "16.000",
        "total: ",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert!(!text.contains("model.layers.0."), "layers share a line: {text}");
    let run = halfbyte(args!["inspect", "--tensors", place.model()]);
    assert!(run.ok().contains("model.layers.1.mlp.down_proj.weight"), "{run:#?}");
    assert_eq!(halfbyte(args!["inspect", "--model", place.model()]).ok(), text);
}

#[test]
fn a_4bit_directory_shows_bits_a_weight() {
    let facts = halfbyte(args!["inspect", "--json", fixtures().join("tiny-mistral-nf4-bf16")]).json();
    assert_eq!(facts["quantization"]["bnb_4bit_quant_type"], "nf4");
    assert_eq!(facts["quantization"]["bnb_4bit_use_double_quant"], true);
    // 14 projections: half a byte a weight, one byte of absmax a block, and the books and states beside them.
    let weights = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 160);
    assert_eq!(facts["total_4bit"]["values"], weights);
    let bytes = facts["total_4bit"]["bytes"].as_u64().expect("bytes");
    assert!(bytes > weights / 2 + weights / 64, "{bytes}");
    let first = |name: &str| {
        let list = facts["tensors"].as_array().expect("tensors");
        list.iter().find(|t| t["name"] == name).cloned().expect("a tensor")
    };
    assert_eq!(first("model.layers.0.self_attn.q_proj.weight")["dtype"], "NF4");
    assert_eq!(first("model.embed_tokens.weight")["dtype"], "BF16");
    let run = halfbyte(args!["inspect", fixtures().join("tiny-mistral-nf4-bf16")]);
    for part in ["in 4 bits (bitsandbytes)", "nf4, with double quantisation", "in 4 bits: "] {
        assert!(run.ok().contains(part), "{part}: {run:#?}");
    }
}

#[test]
fn an_adapter_and_one_file() {
    let dir = fixtures().join("tiny-mistral-lora/adapter_init");
    let run = halfbyte(args!["inspect", dir]);
    for part in
        ["PEFT adapter", "r 8, lora_alpha 16", "base_model.model.model.layers.*.mlp.up_proj.lora_A.weight", "F32"]
    {
        assert!(run.ok().contains(part), "{part}: {run:#?}");
    }
    assert_eq!(halfbyte(args!["inspect", "--adapter", dir]).ok(), run.ok());
    let facts = halfbyte(args!["inspect", "--json", dir.join("adapter_model.safetensors")]).json();
    assert_eq!(facts["tensors"].as_array().map(Vec::len), Some(2 * 7 * 2));
    assert_eq!(facts["kind"], "safetensors file");
}

#[test]
fn a_run_and_its_checkpoints() {
    let place = Place::with("tiny-mistral");
    let (model, data, out) = (place.model(), place.data(), place.path("run"));
    let train = args!["train", "--model", model, "--data", data, "--out", out, "--max-steps", "2", "--save-steps", "1"];
    halfbyte(train).ok();
    let run = halfbyte(args!["inspect", out]);
    assert!(run.ok().contains("PEFT adapter") && run.ok().contains("checkpoint-1, checkpoint-2"), "{run:#?}");
    let facts = halfbyte(args!["inspect", "--json", out.join("checkpoint-2")]).json();
    assert_eq!(facts["step"], 2);
    let names: Vec<&str> =
        facts["tensors"].as_array().expect("tensors").iter().filter_map(|t| t["name"].as_str()).collect();
    assert!(["master", "m", "v"].iter().all(|n| names.contains(n)), "{names:?}");
    fs::remove_file(out.join("adapter_config.json")).expect("removed");
    let run = halfbyte(args!["inspect", out]);
    assert!(run.ok().contains("run without a finished adapter"), "{run:#?}");
}

#[test]
fn what_is_no_model_says_what_was_expected() {
    let place = Place::empty();
    halfbyte(args!["inspect", place.path("missing")]).fails(2, &["missing", "No such file"]);
    halfbyte(args!["inspect", place.path("")]).fails(2, &["config.json", "adapter_config.json"]);
    halfbyte(args!["inspect", place.write("a.txt", "0123456789")]).fails(2, &["a.txt", "header"]);
    halfbyte(args!["inspect", "--model", fixtures().join("tiny-mistral-lora/adapter_init")]).fails(2, &["--adapter"]);
}

#[test]
fn a_damaged_model_names_file_and_place() {
    let place = Place::with("tiny-mistral");
    let weights = place.path("model/model.safetensors");
    let bytes = fs::read(&weights).expect("weights");
    fs::write(&weights, &bytes[..bytes.len() - 10]).expect("a file");
    halfbyte(args!["inspect", place.model()]).fails(2, &["model.safetensors", "truncated"]);
    fs::remove_file(&weights).expect("removed");
    halfbyte(args!["inspect", place.model()]).fails(2, &["model.safetensors"]);
    fs::write(place.path("model/config.json"), "{\"model_type\": \"mistral\"}").expect("a file");
    halfbyte(args!["inspect", place.model()]).fails(2, &["config.json", "found", "expected"]);
}
