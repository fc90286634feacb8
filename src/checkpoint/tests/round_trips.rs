//! What is written is what was read: 4-bit directories, adapters, merged models.

use std::path::Path;

use half::{bf16, f16};
use serde_json::{Map, Value, json};

use super::{assert_input, copy_of, fixture, join, set_key, split};
use crate::checkpoint::merge::{MergeBase, merge, merge_in_shards};
use crate::checkpoint::{ModelDir, QuantConfig, SafeTensors, peft, quantized};
use crate::error::Error;
use crate::model::{HostAdapter, LoraConfig, TargetModules, WeightSource};
use crate::nf4::{QuantType, quantize};
use crate::tensor::HostMatrix;

const NF4: QuantConfig = QuantConfig { quant_type: QuantType::Nf4, double_quant: true };

fn open(name: &str) -> ModelDir {
    ModelDir::open(&fixture(name)).unwrap()
}

fn read_json(path: &Path) -> Map<String, Value> {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// Every tensor of two files, by name, dtype, shape and bytes.
#[track_caller]
fn assert_same_tensors(a: &Path, b: &Path) {
    let (a, b) = (SafeTensors::open(a).unwrap(), SafeTensors::open(b).unwrap());
    assert!(a.names().eq(b.names()));
    for name in a.names() {
        let (x, y) = (a.get(name).unwrap(), b.get(name).unwrap());
        assert_eq!((x.dtype, x.shape), (y.dtype, y.shape), "{name}");
        assert!(x.bytes == y.bytes, "bytes of {name}");
    }
}

#[test]
fn the_fixtures_of_all_families_open() {
    for (name, count, quantized) in [
        ("tiny-mistral", 21, false),
        ("tiny-llama-tied", 20, false),
        ("tiny-qwen2", 27, false),
        ("tiny-mistral-nf4-f32", 21, true),
        ("tiny-mistral-nf4-bf16", 21, true),
    ] {
        let dir = open(name);
        assert_eq!((dir.tensors().count(), dir.is_quantized()), (count, quantized), "{name}");
    }
    let info = open("tiny-mistral-nf4-bf16").tensors().find(|t| t.name.ends_with("0.mlp.up_proj.weight")).unwrap();
    // 5120 packed bytes, 160 of absmax, 4 of nested absmax, 1024 + 64 of code books, 169 of quant_state.
    assert_eq!((info.dtype.as_str(), info.shape.as_slice()), ("NF4", &[160, 64][..]));
    assert_eq!(info.bytes, 5120 + 160 + 4 + 1024 + 64 + 169);
}

#[test]
fn the_4_bit_directory_is_that_of_transformers_tensor_by_tensor() {
    let out = tempfile::tempdir().unwrap();
    let out = out.path().join("q");
    let mut seen = (0, 0);
    let summary = quantized::write(&open("tiny-mistral"), &out, NF4, &[], &mut |d, t| seen = (d, t)).unwrap();
    let theirs = fixture("tiny-mistral-nf4-bf16");
    assert_same_tensors(&out.join("model.safetensors"), &theirs.join("model.safetensors"));
    assert_eq!((summary.quantized, summary.shards, seen.0), (14, 1, seen.1));
    assert_eq!(summary.dense_elements, 2 * 256 * 64 + 5 * 64);
    let (ours, theirs) = (read_json(&out.join("config.json")), read_json(&theirs.join("config.json")));
    assert_eq!(ours["quantization_config"], theirs["quantization_config"]);
    assert_eq!(ours["torch_dtype"], "bfloat16");
    assert!(out.join("generation_config.json").exists());
    assert!(ModelDir::open(&out).unwrap().is_quantized());
    assert_input(
        quantized::write(&open("tiny-mistral-nf4-f32"), &out.join("x"), NF4, &[], &mut |_, _| ()),
        &["4 bits"],
    );
}

#[test]
fn a_sharded_4_bit_directory_and_one_of_each_kind_read_back() {
    let dir = open("tiny-qwen2");
    for quant_type in [QuantType::Nf4, QuantType::Fp4] {
        for double_quant in [true, false] {
            let config = QuantConfig { quant_type, double_quant };
            let out = tempfile::tempdir().unwrap();
            let out = out.path().join("q");
            let summary = quantized::write_in_shards(&dir, &out, config, &[], 60_000, &mut |_, _| ()).unwrap();
            assert!(summary.shards > 2);
            let index = read_json(&out.join("model.safetensors.index.json"));
            assert!(index["metadata"]["total_size"].as_u64().unwrap() > 0);
            let back = ModelDir::open(&out).unwrap();
            let q = back.quantization().unwrap();
            assert_eq!((q.quant_type, q.double_quant), (quant_type, double_quant));
            let (mut a, mut b) = (dir.source(Some(config)).unwrap(), back.source(None).unwrap());
            for t in dir.tensors() {
                if t.shape.len() == 1 {
                    assert_eq!(a.vector(&t.name).unwrap().bytes(), b.vector(&t.name).unwrap().bytes());
                    continue;
                }
                match (a.matrix(&t.name).unwrap().quantized().unwrap(), b.matrix(&t.name).unwrap()) {
                    (HostMatrix::Dense(x), HostMatrix::Dense(y)) => assert_eq!(x.bytes(), y.bytes()),
                    (HostMatrix::Quantized(x), HostMatrix::Quantized(y)) => assert_eq!(x, y, "{}", t.name),
                    other => panic!("{}: {other:?}", t.name),
                }
            }
        }
    }
}

#[test]
fn modules_left_in_16_bits_stay_so_through_writing_and_reading() {
    let out = tempfile::tempdir().unwrap();
    let out = out.path().join("q");
    let dir = open("tiny-mistral");
    let skip = ["down_proj".to_owned(), "model.layers.1.self_attn".to_owned(), "lm_head".to_owned()];
    let summary = quantized::write(&dir, &out, NF4, &skip, &mut |_, _| ()).unwrap();
    let expected = [
        "model.layers.0.mlp.down_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.k_proj",
        "model.layers.1.self_attn.v_proj",
        "model.layers.1.self_attn.o_proj",
        "model.layers.1.mlp.down_proj",
    ];
    assert_eq!((summary.quantized, summary.skipped.as_slice()), (8, &expected.map(str::to_owned)[..]));
    let list = &read_json(&out.join("config.json"))["quantization_config"]["llm_int8_skip_modules"];
    assert_eq!((list[0].as_str(), list[1].as_str()), (Some("lm_head"), Some(expected[0])));
    let back = ModelDir::open(&out).unwrap();
    let mut source = back.source(Some(NF4)).unwrap();
    for t in dir.tensors().filter(|t| t.shape.len() == 2) {
        let stays = expected.iter().any(|m| t.name == format!("{m}.weight")) || !t.name.contains("_proj");
        match source.matrix(&t.name).unwrap().quantized().unwrap() {
            HostMatrix::Quantize(..) => panic!("{} was left as it was", t.name),
            HostMatrix::Dense(w) => assert!(stays && w.bytes() == dir.dense(&t.name).unwrap().bytes(), "{}", t.name),
            HostMatrix::Quantized(q) => {
                assert!(!stays, "{}", t.name);
                assert_eq!(q, quantize(&dir.dense(&t.name).unwrap(), QuantType::Nf4, true));
            }
        }
    }
    let typo = ["dawn_proj".to_owned()];
    let error = quantized::write(&dir, &out.join("x"), NF4, &typo, &mut |_, _| ()).unwrap_err();
    assert!(matches!(error, Error::Flag { .. }) && error.to_string().contains("dawn_proj"), "{error}");
}

#[test]
fn a_broken_4_bit_directory_is_an_error_that_names_the_part() {
    let broken = |change: &dyn Fn(&Path)| {
        let dir = copy_of("tiny-mistral-nf4-bf16");
        change(dir.path());
        dir
    };
    let name = "model.layers.0.mlp.up_proj.weight";
    let rename = |from: String, to: &'static str| {
        broken(&move |dir| {
            let file = dir.join("model.safetensors");
            let (mut header, data) = split(&file);
            let entry = header.remove(&from).unwrap();
            header.insert(to.into(), entry);
            join(&file, &Value::Object(header).to_string(), &data);
        })
    };
    let dir = rename(format!("{name}.quant_state.bitsandbytes__nf4"), "other");
    assert_input(ModelDir::open(dir.path()), &[name, "U8", "BF16, F16 or F32"]);
    let dir = rename(format!("{name}.absmax"), "model.layers.0.mlp.up_proj.weight.quant_map2");
    assert_input(ModelDir::open(dir.path()), &["quant_map2", "an unknown tensor"]);
    let dir = rename(format!("{name}.absmax"), "model.layers.0.mlp.gate_proj.weight.quant_state.bitsandbytes__fp4");
    let open = ModelDir::open(dir.path()).unwrap();
    assert_input(open.quantized(name), &["model.safetensors", name, "absmax", "no such tensor"]);
    let dir = broken(&|dir| set_key(&dir.join("config.json"), "quantization_config", None));
    assert_input(ModelDir::open(dir.path()), &["config.json", "quantization_config", "no such key"]);
    let dir = broken(&|dir| set_key(&dir.join("config.json"), "intermediate_size", Some(json!(128))));
    assert_input(ModelDir::open(dir.path()), &["gate_proj.weight", "[160, 64]", "[128, 64]"]);
    let dir = copy_of("tiny-mistral");
    let q = read_json(&fixture("tiny-mistral-nf4-bf16/config.json"))["quantization_config"].clone();
    set_key(&dir.path().join("config.json"), "quantization_config", Some(q));
    assert_input(ModelDir::open(dir.path()), &["config.json", "quantization_config", "16 or 32-bit weights alone"]);
}

#[test]
fn an_adapter_written_is_the_adapter_read() {
    let theirs = fixture("tiny-mistral-lora/adapter_final");
    let model = open("tiny-mistral");
    let adapter = peft::load(&theirs, model.config()).unwrap();
    assert_eq!((adapter.config.r, adapter.config.lora_alpha, adapter.layout.sites.len()), (8, 16.0, 14));
    assert!(adapter.layout.sites.iter().all(|s| s.scale == 2.0));
    let out = tempfile::tempdir().unwrap();
    let dir = out.path().join("adapter");
    peft::save(&dir, &adapter, "tiny-mistral").unwrap();
    assert_same_tensors(&dir.join(peft::WEIGHTS), &theirs.join(peft::WEIGHTS));
    assert_eq!(peft::load(&dir, model.config()).unwrap(), adapter);
    let (ours, theirs) = (read_json(&dir.join(peft::CONFIG)), read_json(&theirs.join(peft::CONFIG)));
    for (key, value) in &ours {
        if key != "use_dora" && key != "layers_pattern" {
            assert_eq!(value, &theirs[key], "{key}");
        }
    }
    // Into a folder that holds other things: they stay.
    std::fs::write(dir.join("metrics.jsonl"), "{}").unwrap();
    peft::save(&dir, &adapter, "tiny-mistral").unwrap();
    assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 3);
    assert_eq!(peft::load(&dir, model.config()).unwrap(), adapter);
}

#[test]
fn adapter_settings_survive_the_round_trip() {
    let model = open("tiny-qwen2");
    let config = LoraConfig {
        r: 4,
        lora_alpha: 6.5,
        lora_dropout: 0.05,
        target_modules: TargetModules::Pattern(r".*\.(q_proj|down_proj)".into()),
        rank_pattern: vec![("layers.1.self_attn.q_proj".into(), 2)],
        alpha_pattern: vec![("down_proj".into(), 32.0)],
        use_rslora: true,
    };
    let adapter = HostAdapter::init(config, model.config(), 7).unwrap();
    let out = tempfile::tempdir().unwrap();
    let dir = out.path().join("adapter");
    peft::save(&dir, &adapter, "base").unwrap();
    assert_eq!(peft::load(&dir, model.config()).unwrap(), adapter);
    let json = read_json(&dir.join(peft::CONFIG));
    assert_eq!((&json["lora_dropout"], &json["lora_alpha"]), (&json!(0.05), &json!(6.5)));

    let all = LoraConfig { target_modules: TargetModules::Pattern("all-linear".into()), ..adapter.config };
    let adapter = HostAdapter { config: LoraConfig { rank_pattern: vec![], alpha_pattern: vec![], ..all }, ..adapter };
    let text = peft::config_text(&adapter.config, "base");
    assert!(!text.contains("all-linear") && text.contains("gate_proj"), "{text}");
}

#[test]
fn adapters_in_16_bits_are_read() {
    let model = open("tiny-mistral");
    let whole = peft::load(&fixture("tiny-mistral-lora/adapter_init"), model.config()).unwrap();
    for dtype in ["BF16", "F16"] {
        let dir = copy_of("tiny-mistral-lora/adapter_init");
        let file = dir.path().join(peft::WEIGHTS);
        let (mut header, data) = split(&file);
        let round = |x: f32| match dtype {
            "BF16" => bf16::from_f32(x).to_le_bytes(),
            _ => f16::from_f32(x).to_le_bytes(),
        };
        let data: Vec<u8> =
            data.chunks_exact(4).flat_map(|b| round(f32::from_le_bytes(b.try_into().unwrap()))).collect();
        for (_, entry) in header.iter_mut().filter(|(name, _)| *name != "__metadata__") {
            entry["dtype"] = json!(dtype);
            for i in 0..2 {
                entry["data_offsets"][i] = json!(entry["data_offsets"][i].as_u64().unwrap() / 2);
            }
        }
        join(&file, &Value::Object(header).to_string(), &data);
        let adapter = peft::load(dir.path(), model.config()).unwrap();
        assert_eq!(adapter.layout, whole.layout);
        for (a, b) in adapter.weights.iter().zip(&whole.weights) {
            assert!((a - b).abs() <= b.abs() / 128.0 + 1e-6, "{a} {b}");
        }
    }
}

/// bf16(W + scale·B·A) of one weight, computed the slow way in f64.
fn merged_by_hand(w: Vec<f32>, adapter: &HostAdapter, name: &str) -> Vec<f64> {
    let mut w: Vec<f64> = w.into_iter().map(f64::from).collect();
    if let Some(s) = adapter.layout.sites.iter().find(|s| name == format!("{}.weight", s.proj.module(s.layer))) {
        let (a, b) = (&adapter.weights[s.a_range()], &adapter.weights[s.b_range()]);
        for n in 0..s.n {
            for k in 0..s.k {
                let sum: f64 = (0..s.r).map(|r| f64::from(b[n * s.r + r]) * f64::from(a[r * s.k + k])).sum();
                w[n * s.k + k] += f64::from(s.scale) * sum;
            }
        }
    }
    w
}

#[test]
fn merged_weights_are_base_plus_scaled_product_rounded_once() {
    let (dense, packed) = (open("tiny-mistral"), open("tiny-mistral-nf4-f32"));
    let adapter = peft::load(&fixture("tiny-mistral-lora/adapter_final"), dense.config()).unwrap();
    for (base, original, kind) in [
        (&dense, None, MergeBase::Dense),
        (&packed, Some(&dense), MergeBase::Original),
        (&packed, None, MergeBase::Dequantized),
    ] {
        let out = tempfile::tempdir().unwrap();
        let out = out.path().join("merged");
        let mut seen = (0, 0);
        let report = merge(base, original, &adapter, &out, &mut |d, t| seen = (d, t)).unwrap();
        assert_eq!((report.base, report.tensors, report.merged, report.shards), (kind, 21, 14, 1));
        assert_eq!((seen.0, seen.1), (report.bytes, report.bytes));
        let merged = ModelDir::open(&out).unwrap();
        assert!(!merged.is_quantized() && merged.config() == base.config());
        let from = original.unwrap_or(base);
        for t in merged.tensors() {
            assert_eq!(t.dtype, "BF16");
            let w = if from.is_packed(&t.name) {
                from.quantized(&t.name).unwrap().dequantize()
            } else {
                from.dense(&t.name).unwrap().to_f32()
            };
            let expected = merged_by_hand(w, &adapter, &t.name);
            let mut changed = false;
            for (x, y) in merged.dense(&t.name).unwrap().to_f32().into_iter().zip(expected) {
                // Half a unit in the last place of bf16, and the rounding of the f32 sum.
                assert!((f64::from(x) - y).abs() <= y.abs() / 256.0 + 1e-6, "{}: {x} {y}", t.name);
                changed |= f64::from(x) != y;
            }
            assert_eq!(changed, t.name.contains("_proj"), "{}", t.name);
        }
        let config = read_json(&out.join("config.json"));
        assert!(!config.contains_key("quantization_config"));
        assert_eq!(config.get("torch_dtype").or(config.get("dtype")), Some(&json!("bfloat16")));
        assert_eq!(config.contains_key("rope_theta"), from.raw_config().contains_key("rope_theta"));
        assert!(out.join("generation_config.json").exists());
    }
}

#[test]
fn a_merge_in_shards_equals_one_file_and_brings_the_tokenizer() {
    let base = copy_of("tiny-llama-tied");
    for name in ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "optimizer.pt"] {
        std::fs::write(base.path().join(name), name).unwrap();
    }
    let base = ModelDir::open(base.path()).unwrap();
    let adapter = peft::load(&fixture("tiny-llama-tied-lora/adapter_init"), base.config()).unwrap();
    let out = tempfile::tempdir().unwrap();
    let (one, many) = (out.path().join("one"), out.path().join("many"));
    merge(&base, None, &adapter, &one, &mut |_, _| ()).unwrap();
    let report = merge_in_shards(&base, None, &adapter, &many, 50_000, &mut |_, _| ()).unwrap();
    assert!(report.shards > 2);
    let (a, b) = (ModelDir::open(&one).unwrap(), ModelDir::open(&many).unwrap());
    for t in a.tensors() {
        assert_eq!(a.dense(&t.name).unwrap().bytes(), b.dense(&t.name).unwrap().bytes());
    }
    let index = read_json(&many.join("model.safetensors.index.json"));
    assert_eq!(index["metadata"]["total_size"].as_u64(), Some(report.bytes));
    assert!(many.join(format!("model-00001-of-{:05}.safetensors", report.shards)).exists());
    assert!(!SafeTensors::open(&one.join("model.safetensors")).unwrap().contains("lm_head.weight"));
    for name in ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"] {
        assert_eq!(std::fs::read_to_string(one.join(name)).unwrap(), name);
    }
    assert!(!one.join("optimizer.pt").exists());
}

#[test]
fn a_merge_with_the_weights_of_another_model_is_refused() {
    let packed = open("tiny-mistral-nf4-bf16");
    let adapter = peft::load(&fixture("tiny-mistral-lora/adapter_init"), packed.config()).unwrap();
    let out = tempfile::tempdir().unwrap();
    let out = out.path().join("merged");
    let merge = |original: &ModelDir| merge(&packed, Some(original), &adapter, &out, &mut |_, _| ());
    assert_input(merge(&open("tiny-qwen2")), &["tiny-qwen2/config.json", "key family", "qwen2", "mistral"]);
    assert_input(merge(&open("tiny-mistral-nf4-f32")), &["quantization_config", "original 16-bit weights"]);
    assert!(!out.exists());
}
