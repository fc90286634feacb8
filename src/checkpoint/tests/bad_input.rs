//! Files that are not what they must be: each fault is one error that names file, place, found and expected.

use std::path::Path;

use serde_json::{Value, json};

use super::{assert_input, copy_of, fixture, join, set_key, split};
use crate::backend::Backend;
use crate::backend::cpu::Cpu;
use crate::checkpoint::safetensors_file::{SafeTensors, parse};
use crate::checkpoint::{ModelDir, QuantConfig, config, peft};
use crate::error::Error;
use crate::model::{ModelConfig, WeightSource};
use crate::nf4::QuantType;

fn model(name: &str) -> ModelConfig {
    config::read(&fixture(name)).unwrap().model
}

/// Parses a file of this header and `data` zero bytes.
fn header(text: &str, data: usize) -> crate::Result<crate::checkpoint::safetensors_file::Header> {
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.extend(text.as_bytes());
    bytes.resize(bytes.len() + data, 0);
    parse("w.safetensors".as_ref(), &bytes)
}

fn tensor(dtype: &str, shape: &[u64], begin: u64, end: u64) -> Value {
    json!({"dtype": dtype, "shape": shape, "data_offsets": [begin, end]})
}

#[test]
fn a_truncated_safetensors_file_is_an_error_at_every_length() {
    let bytes = std::fs::read(fixture("tiny-mistral-lora/adapter_init/adapter_model.safetensors")).unwrap();
    parse("w".as_ref(), &bytes).unwrap();
    for n in (0..bytes.len()).step_by(97).chain([7, 8, 9, bytes.len() - 1]) {
        assert_input(parse("w.safetensors".as_ref(), &bytes[..n]), &["w.safetensors: "]);
    }
    let dir = copy_of("tiny-mistral");
    let file = dir.path().join("model.safetensors");
    let whole = std::fs::read(&file).unwrap();
    std::fs::write(&file, &whole[..whole.len() - 100]).unwrap();
    assert_input(ModelDir::open(dir.path()), &["model.safetensors", "truncated"]);
    std::fs::write(&file, b"").unwrap();
    assert_input(ModelDir::open(dir.path()), &["model.safetensors", "0 bytes"]);
}

#[test]
fn an_oversized_header_is_refused_unread() {
    for n in [100_000_001u64, 1 << 40, u64::MAX] {
        let mut bytes = n.to_le_bytes().to_vec();
        bytes.extend(b"{}");
        assert_input(parse("w.safetensors".as_ref(), &bytes), &["header length", &n.to_string(), "at most"]);
    }
    let mut bytes = 50u64.to_le_bytes().to_vec();
    bytes.extend(b"{}");
    assert_input(parse("w.safetensors".as_ref(), &bytes), &["header", "50 bytes", "truncated"]);
}

#[test]
fn tensors_that_overlap_leave_gaps_or_leave_the_file_are_errors() {
    let two = |a: Value, b: Value, data| header(&json!({"a": a, "b": b}).to_string(), data);
    two(tensor("F32", &[2], 0, 8), tensor("F32", &[2], 8, 16), 16).unwrap();
    assert_input(two(tensor("F32", &[2], 0, 8), tensor("F32", &[2], 4, 12), 12), &["tensor b", "inside that of a"]);
    assert_input(two(tensor("F32", &[2], 0, 8), tensor("F32", &[2], 0, 8), 8), &["overlap"]);
    assert_input(two(tensor("F32", &[2], 0, 8), tensor("F32", &[2], 12, 20), 20), &["tensor b", "4 unused bytes"]);
    assert_input(two(tensor("F32", &[2], 4, 12), tensor("F32", &[2], 12, 20), 20), &["tensor a", "the header"]);
    assert_input(two(tensor("F32", &[2], 0, 8), tensor("F32", &[2], 8, 16), 20), &["4 bytes after the last tensor"]);
    assert_input(two(tensor("F32", &[2], 0, 8), tensor("F32", &[2], 8, 16), 15), &["tensor b", "15 bytes"]);
    assert_input(two(tensor("F32", &[2], 0, 8), tensor("F32", &[2], 16, 8), 16), &["tensor b", "[16, 8]"]);
}

#[test]
fn a_header_that_is_no_header_is_an_error() {
    for (text, part) in [
        ("", "malformed"),
        ("[]", "a JSON object of tensors"),
        ("{\"a\": 1}", "malformed"),
        ("{\"a\": {\"dtype\": \"F32\", \"shape\": [-1], \"data_offsets\": [0, 0]}}", "malformed"),
        ("{\"a\": {\"dtype\": \"F32\", \"shape\": [1]}}", "data_offsets"),
    ] {
        assert_input(header(text, 0), &["header", part]);
    }
    assert_input(header(&json!({"a": tensor("F31", &[1], 0, 4)}).to_string(), 4), &["tensor a", "F31"]);
    assert_input(header(&json!({"a": tensor("F32", &[3], 0, 4)}).to_string(), 4), &["tensor a", "4 bytes", "12 bytes"]);
    let huge = tensor("F32", &[1 << 40, 1 << 40], 0, 4);
    assert_input(header(&json!({"a": huge}).to_string(), 4), &["tensor a", "fits in memory"]);
    let twice = format!("{{\"a\": {0}, \"a\": {1}}}", tensor("U8", &[1], 0, 1), tensor("U8", &[1], 1, 2));
    assert_input(header(&twice, 2), &["tensor a", "the same name twice"]);
    assert_input(parse("w".as_ref(), &[2, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xfe]), &["UTF-8"]);
    header("{\"__metadata__\": {\"format\": \"pt\"}}    ", 0).unwrap();
}

#[test]
fn a_folder_a_missing_file_and_a_pickle_are_named() {
    let missing = fixture("no-such-model");
    let error = ModelDir::open(&missing).unwrap_err();
    assert!(matches!(&error, Error::Read { path, .. } if *path == missing), "{error:?}");
    assert_input(ModelDir::open(&fixture("tiny-mistral/config.json")), &["a folder with config.json"]);
    assert_input(ModelDir::open(&fixture("tiny-mistral-lora/adapter_init")), &["adapter_init", "PEFT adapter"]);
    let dir = copy_of("tiny-mistral");
    std::fs::remove_file(dir.path().join("model.safetensors")).unwrap();
    assert_input(ModelDir::open(dir.path()), &["no weights"]);
    std::fs::write(dir.path().join("pytorch_model.bin"), b"x").unwrap();
    assert_input(ModelDir::open(dir.path()), &["pytorch_model.bin"]);
    assert_input(SafeTensors::open(Path::new("/dev/null")), &["regular file"]);
}

/// tiny-mistral with its tensors spread over two shards.
fn sharded() -> tempfile::TempDir {
    let dir = copy_of("tiny-mistral");
    let whole = SafeTensors::open(&dir.path().join("model.safetensors")).unwrap();
    let names: Vec<&str> = whole.names().collect();
    let mut weight_map = serde_json::Map::new();
    for (i, names) in names.chunks(names.len() / 2 + 1).enumerate() {
        let file = format!("model-0000{}-of-00002.safetensors", i + 1);
        let (mut head, mut data) = (serde_json::Map::new(), Vec::new());
        for name in names {
            let v = whole.get(name).unwrap();
            let begin = data.len() as u64;
            data.extend(v.bytes);
            let shape: Vec<u64> = v.shape.iter().map(|&d| d as u64).collect();
            head.insert(name.to_string(), tensor(&v.dtype.to_string(), &shape, begin, data.len() as u64));
            weight_map.insert(name.to_string(), json!(file));
        }
        join(&dir.path().join(&file), &Value::Object(head).to_string(), &data);
    }
    let index = json!({"metadata": {"total_size": 1}, "weight_map": weight_map});
    std::fs::write(dir.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
    std::fs::remove_file(dir.path().join("model.safetensors")).unwrap();
    dir
}

#[test]
fn a_sharded_directory_equals_the_single_file() {
    let dir = sharded();
    let (shards, single) = (ModelDir::open(dir.path()).unwrap(), ModelDir::open(&fixture("tiny-mistral")).unwrap());
    assert_eq!(shards.tensors().count(), 21);
    for t in single.tensors() {
        assert_eq!(shards.dense(&t.name).unwrap().bytes(), single.dense(&t.name).unwrap().bytes());
    }
}

#[test]
fn a_missing_shard_or_a_tensor_missing_from_its_shard_is_named() {
    let dir = sharded();
    let shard = dir.path().join("model-00002-of-00002.safetensors");
    let bytes = std::fs::read(&shard).unwrap();
    std::fs::remove_file(&shard).unwrap();
    assert_input(ModelDir::open(dir.path()), &["index.json", "model-00002-of-00002.safetensors", "missing"]);
    std::fs::write(&shard, bytes).unwrap();

    let index = dir.path().join("model.safetensors.index.json");
    let good = std::fs::read_to_string(&index).unwrap();
    let swapped = good.replacen("model-00001-of", "model-00002-of", 1);
    std::fs::write(&index, swapped).unwrap();
    assert_input(ModelDir::open(dir.path()), &["model-00002-of-00002.safetensors", "lm_head.weight", "no such tensor"]);
    std::fs::write(&index, good.replacen("model-00001-of", "../model-00001-of", 1)).unwrap();
    assert_input(ModelDir::open(dir.path()), &["tensor lm_head.weight", "../model-00001", "same folder"]);
    std::fs::write(&index, good.replacen("lm_head.weight", "lm_feet.weight", 1)).unwrap();
    assert_input(ModelDir::open(dir.path()), &["lm_feet.weight", "no such tensor"]);
    std::fs::write(&index, "{}").unwrap();
    assert_input(ModelDir::open(dir.path()), &["index.json", "weight_map"]);
}

/// Rewrites one tensor's header entry in a copy of tiny-mistral.
fn with_header(change: impl FnOnce(&mut serde_json::Map<String, Value>)) -> tempfile::TempDir {
    let dir = copy_of("tiny-mistral");
    let file = dir.path().join("model.safetensors");
    let (mut header, data) = split(&file);
    change(&mut header);
    join(&file, &Value::Object(header).to_string(), &data);
    dir
}

const GATE: &str = "model.layers.1.mlp.gate_proj.weight";

#[test]
fn a_wrong_shape_dtype_or_name_is_an_error_that_names_tensor_found_and_expected() {
    let dir = with_header(|h| h[GATE]["shape"] = json!([64, 160]));
    assert_input(ModelDir::open(dir.path()), &[GATE, "[64, 160]", "[160, 64]", "config.json"]);
    let dir = with_header(|h| h[GATE]["dtype"] = json!("I16"));
    assert_input(ModelDir::open(dir.path()), &[GATE, "dtype I16", "BF16, F16 or F32"]);
    let dir = with_header(|h| {
        let t = h.remove(GATE).unwrap();
        h.insert("model.layers.1.mlp.gate_proj.bias".into(), t);
    });
    assert_input(ModelDir::open(dir.path()), &["model.safetensors", GATE, "no such tensor"]);

    let dir = copy_of("tiny-mistral");
    set_key(&dir.path().join("config.json"), "vocab_size", Some(json!(300)));
    assert_input(ModelDir::open(dir.path()), &["model.embed_tokens.weight", "[256, 64]", "[300, 64]"]);
    let dir = copy_of("tiny-mistral");
    set_key(&dir.path().join("config.json"), "num_hidden_layers", Some(json!(3)));
    assert_input(ModelDir::open(dir.path()), &["model.layers.2.input_layernorm.weight", "no such tensor"]);
    let dir = copy_of("tiny-mistral");
    set_key(&dir.path().join("config.json"), "num_hidden_layers", Some(json!(1)));
    assert_input(ModelDir::open(dir.path()), &["model.layers.1.", "an unknown tensor", "1 layers"]);
    // Biases that the architecture does not have are never dropped.
    let dir = copy_of("tiny-qwen2");
    set_key(&dir.path().join("config.json"), "model_type", Some(json!("llama")));
    assert_input(ModelDir::open(dir.path()), &["k_proj.bias", "an unknown tensor", "llama"]);
}

#[test]
fn nan_and_infinite_weights_are_named_when_they_are_read() {
    let quantize = QuantConfig { quant_type: QuantType::Nf4, double_quant: true };
    for (bits, shown) in [(0x7FC0u16, "NaN"), (0x7F80, "inf"), (0xFF80, "-inf")] {
        let dir = copy_of("tiny-mistral");
        let file = dir.path().join("model.safetensors");
        let (header, mut data) = split(&file);
        for (name, index) in [(GATE, 77), ("model.norm.weight", 5)] {
            let at = header[name]["data_offsets"][0].as_u64().unwrap() as usize + 2 * index;
            data[at..at + 2].copy_from_slice(&bits.to_le_bytes());
        }
        join(&file, &Value::Object(header).to_string(), &data);
        let model = ModelDir::open(dir.path()).unwrap();
        let mut source = model.source(Some(quantize)).unwrap();
        let mut cpu = Cpu::new(Some(1));
        assert_input(
            cpu.upload(&source.matrix(GATE).unwrap()),
            &["model.safetensors", GATE, &format!("{shown} at index 77"), "finite"],
        );
        assert_input(source.vector("model.norm.weight"), &[&format!("{shown} at index 5")]);
        cpu.upload(&source.matrix("lm_head.weight").unwrap()).unwrap();
    }
}

#[test]
fn an_adapter_for_another_model_names_tensor_found_and_expected() {
    let adapter = fixture("tiny-mistral-lora/adapter_init");
    peft::load(&adapter, &model("tiny-mistral")).unwrap();
    let mut wide = model("tiny-mistral");
    wide.hidden_size = 128;
    assert_input(
        peft::load(&adapter, &wide),
        &[
            "adapter_model.safetensors",
            "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
            "[8, 64]",
            "[8, 128]",
            "another model",
        ],
    );
    let mut deep = model("tiny-mistral");
    deep.num_hidden_layers = 3;
    assert_input(peft::load(&adapter, &deep), &["model.layers.2.", "no such tensor", "another model"]);
    let mut shallow = model("tiny-mistral");
    shallow.num_hidden_layers = 1;
    assert_input(peft::load(&adapter, &shallow), &["model.layers.1.", "an unknown tensor", "another model"]);
}

#[test]
fn adapter_settings_that_we_do_not_run_are_refused_by_name() {
    let dir = copy_of("tiny-mistral-lora/adapter_init");
    let file = dir.path().join(peft::CONFIG);
    let good = std::fs::read(&file).unwrap();
    for (key, value) in [
        ("use_dora", json!(true)),
        ("modules_to_save", json!(["lm_head"])),
        ("bias", json!("all")),
        ("peft_type", json!("LOHA")),
        ("task_type", json!("SEQ_CLS")),
        ("layers_to_transform", json!([0])),
        ("lora_bias", json!(true)),
        ("exclude_modules", json!(["q_proj"])),
        ("trainable_token_indices", json!([1, 2])),
        ("use_qalora", json!(true)),
        ("layer_replication", json!([[0, 2]])),
        ("target_parameters", json!(["w"])),
        ("fan_in_fan_out", json!(true)),
        ("init_lora_weights", json!("pissa_niter_4")),
        ("some_future_setting", json!({"on": true})),
        ("r", json!(0)),
        ("r", json!("8")),
        ("lora_alpha", json!(null)),
        ("lora_dropout", json!(1.0)),
        ("target_modules", json!(null)),
        ("target_modules", json!(["q_proj", "lm_head"])),
        ("target_modules", json!("(")),
        ("rank_pattern", json!({"q_proj": 0})),
    ] {
        set_key(&file, key, Some(value));
        assert_input(peft::load(dir.path(), &model("tiny-mistral")), &[peft::CONFIG, key]);
        std::fs::write(&file, &good).unwrap();
    }
    for (key, value) in [
        ("some_future_setting", json!(null)),
        ("another", json!(false)),
        ("a_list", json!([])),
        ("loftq_config", json!({"loftq_bits": 4})),
        ("init_lora_weights", json!("gaussian")),
        ("target_modules", json!("all-linear")),
        ("target_modules", json!(r".*\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj")),
    ] {
        set_key(&file, key, Some(value));
        peft::load(dir.path(), &model("tiny-mistral")).unwrap();
        std::fs::write(&file, &good).unwrap();
    }
    // One target fewer than the file has tensors for, and one more.
    set_key(&file, "target_modules", Some(json!(["q_proj"])));
    assert_input(peft::load(dir.path(), &model("tiny-mistral")), &["an unknown tensor", "targets"]);
    set_key(&file, "rank_pattern", Some(json!({})));
    std::fs::write(&file, &good).unwrap();
    set_key(&file, "rank_pattern", Some(json!({"q_proj": 4})));
    assert_input(peft::load(dir.path(), &model("tiny-mistral")), &["q_proj.lora_A", "[8, 64]", "[4, 64]"]);
}

#[test]
fn a_nan_in_an_adapter_is_named() {
    let dir = copy_of("tiny-mistral-lora/adapter_init");
    let file = dir.path().join(peft::WEIGHTS);
    let (header, mut data) = split(&file);
    let name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight";
    let at = header[name]["data_offsets"][0].as_u64().unwrap() as usize + 12;
    data[at..at + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    join(&file, &Value::Object(header).to_string(), &data);
    assert_input(peft::load(dir.path(), &model("tiny-mistral")), &[name, "NaN at index 3", "finite"]);
}
