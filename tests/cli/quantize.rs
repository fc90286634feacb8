//! `halfbyte quantize`.

use std::fs;

use halfbyte::checkpoint::SafeTensors;

use crate::{Place, args, finish, fixtures, halfbyte};

#[test]
fn tiny_mistral_becomes_what_transformers_and_bitsandbytes_write() {
    let place = Place::with("tiny-mistral");
    let run = halfbyte(args!["quantize", "--model", place.model(), "--out", place.path("q")]);
    for part in ["nf4", "double quantisation", "bits a weight", "14 modules"] {
        assert!(run.ok().contains(part), "{part}: {run:#?}");
    }
    let ours = SafeTensors::open(&place.path("q/model.safetensors")).expect("ours");
    let theirs = SafeTensors::open(&fixtures().join("tiny-mistral-nf4-bf16/model.safetensors")).expect("theirs");
    assert_eq!(ours.names().collect::<Vec<_>>(), theirs.names().collect::<Vec<_>>());
    for name in theirs.names() {
        let (a, b) = (ours.get(name).expect("ours"), theirs.get(name).expect("theirs"));
        assert_eq!((a.dtype, a.shape), (b.dtype, b.shape), "{name}");
        // The offset is a mean whose order of summation is free, and the nested absmax follows it: see the README.
        let float = name.ends_with("nested_absmax") || name.contains("quant_state");
        assert!(float || a.bytes == b.bytes, "{name}");
    }
    for file in ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
        assert!(place.path("q").join(file).exists(), "{file}: {:?}", place.names("q"));
    }
    assert!(halfbyte(args!["inspect", place.path("q")]).ok().contains("nf4, with double quantisation"));
}

#[test]
fn the_format_can_be_chosen() {
    let place = Place::with("tiny-mistral");
    let fp4 = args!["quantize", "--model", place.model(), "--out", place.path("q"), "--bnb-4bit-quant-type", "fp4"];
    halfbyte([&fp4[..], &args!["--bnb_4bit_use_double_quant", "false", "--skip-modules", "o_proj"]].concat()).ok();
    let facts = halfbyte(args!["inspect", "--json", place.path("q")]).json();
    assert_eq!(facts["quantization"]["bnb_4bit_quant_type"], "fp4");
    assert_eq!(facts["quantization"]["bnb_4bit_use_double_quant"], false);
    let list = facts["tensors"].as_array().expect("tensors").clone();
    let dtype = |name: &str| list.iter().find(|t| t["name"] == name).expect("a tensor")["dtype"].clone();
    assert_eq!(dtype("model.layers.0.self_attn.o_proj.weight"), "BF16");
    assert_eq!(dtype("model.layers.0.self_attn.q_proj.weight"), "FP4");
}

#[test]
fn refusals_name_flag_and_reason() {
    let place = Place::with("tiny-mistral");
    let (model, out) = (place.model(), place.path("q"));
    let quantize = |more: &[std::ffi::OsString]| halfbyte([&args!["quantize"][..], more].concat());
    quantize(&args!["--model", place.path("none"), "--out", out]).fails(2, &["none", "No such file"]);
    quantize(&args!["--model", fixtures().join("tiny-mistral-nf4-bf16"), "--out", out]).fails(2, &["4 bits"]);
    quantize(&args!["--model", model, "--out", out, "--bnb-4bit-quant-type", "int4"]).fails(2, &["int4", "nf4"]);
    quantize(&args!["--model", model, "--out", model]).fails(2, &["--out", "not empty"]);
    quantize(&args!["--model", model, "--out", model, "--overwrite"]).fails(2, &["--out", "holds the input"]);
    quantize(&args!["--model", model, "--out", place.path(""), "--overwrite"]).fails(2, &["--out", "holds the input"]);
    fs::create_dir(&out).expect("a folder");
    place.write("q/precious.txt", "x");
    quantize(&args!["--model", model, "--out", out, "--overwrite"]).fails(2, &["--out", "other files"]);
    assert!(out.join("precious.txt").exists());
    quantize(&args!["--model", model, "--out", place.write("file", "")]).fails(2, &["--out", "which is a file"]);
}

#[test]
fn overwrite_replaces_a_model_directory() {
    let place = Place::with("tiny-mistral");
    let (model, out) = (place.model(), place.path("q"));
    halfbyte(args!["quantize", "--model", model, "--out", out]).ok();
    halfbyte(args!["quantize", "--model", model, "--out", out]).fails(2, &["--out", "not empty", "--overwrite"]);
    halfbyte(args!["quantize", "--model", model, "--out", out, "--overwrite", "--bnb-4bit-quant-type", "fp4"]).ok();
    let facts = halfbyte(args!["inspect", "--json", out]).json();
    assert_eq!(facts["quantization"]["bnb_4bit_quant_type"], "fp4");
}

#[test]
fn an_unwritable_folder_is_exit_code_1_and_leaves_nothing() {
    let place = Place::with("tiny-mistral");
    // /proc takes no new folder from anyone, root included.
    let run = halfbyte(args!["quantize", "--model", place.model(), "--out", "/proc/halfbyte-out"]);
    run.fails(1, &["/proc"]);
}

#[test]
fn a_full_disk_is_exit_code_1_and_leaves_nothing() {
    let place = Place::with("tiny-mistral");
    let adapter = place.adapter();
    for (command, more) in [("quantize", vec![]), ("merge", args!["--adapter", adapter].to_vec())] {
        // No file may grow beyond 16 blocks of 512 bytes: writing fails as on a full disk.
        let mut c = std::process::Command::new("sh");
        c.args(["-c", "trap '' XFSZ; ulimit -f 16; exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_halfbyte"), command]);
        c.args(args!["--model", place.model(), "--out", place.path("o")]).args(more);
        finish(c).fails(1, &["model.safetensors", "cannot write"]);
        assert_eq!(place.names(""), ["model"], "{command}");
    }
}
