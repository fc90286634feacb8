//! config.json: both spellings, each family, the defaults of transformers, what is refused.

use serde_json::{Map, Value, json};

use super::{assert_input, fixture};
use crate::checkpoint::config::{self, ConfigFile};
use crate::model::{Family, RopeScaling};
use crate::nf4::QuantType;

/// A small config of a family with `changes` made to it (null removes nothing: it is written as null).
fn parse(model_type: &str, changes: Value) -> crate::Result<ConfigFile> {
    let mut map: Map<String, Value> = serde_json::from_value(json!({
        "model_type": model_type,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 256,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
    }))
    .unwrap();
    map.extend(changes.as_object().unwrap().clone());
    config::parse("config.json".as_ref(), &Value::Object(map).to_string())
}

fn windows(model_type: &str, changes: Value) -> Vec<Option<usize>> {
    parse(model_type, changes).unwrap().model.windows
}

#[test]
fn the_fixtures_of_all_families_are_read() {
    let mistral = config::read(&fixture("tiny-mistral")).unwrap().model;
    assert_eq!(mistral.family, Family::Mistral);
    assert_eq!((mistral.hidden_size, mistral.intermediate_size, mistral.vocab_size), (64, 160, 256));
    assert_eq!((mistral.num_attention_heads, mistral.num_key_value_heads, mistral.head_dim), (4, 2, 16));
    assert_eq!(mistral.windows, [Some(8), Some(8)]);
    assert_eq!(
        (mistral.bos_token_id, mistral.eos_token_ids.as_slice(), mistral.pad_token_id),
        (Some(1), &[2][..], None)
    );
    assert!(!mistral.qkv_bias && !mistral.o_bias && !mistral.mlp_bias && !mistral.qk_norm);
    assert!(!mistral.tie_word_embeddings);

    let llama = config::read(&fixture("tiny-llama-tied")).unwrap().model;
    assert_eq!(llama.family, Family::Llama);
    assert_eq!((llama.rope_theta, llama.rope_scaling, llama.windows), (1e4, RopeScaling::Default, vec![None, None]));
    assert!(llama.tie_word_embeddings && !llama.qkv_bias);

    let qwen = config::read(&fixture("tiny-qwen2")).unwrap().model;
    assert_eq!((qwen.family, qwen.head_dim, qwen.windows), (Family::Qwen2, 16, vec![None, None]));
    assert!(qwen.qkv_bias && !qwen.o_bias);

    let packed = config::read(&fixture("tiny-mistral-nf4-bf16")).unwrap();
    let q = packed.quantization.unwrap();
    assert_eq!((q.quant_type, q.double_quant, q.skip_modules.len()), (QuantType::Nf4, true, 0));
    assert_eq!(packed.model, mistral);
}

#[test]
fn rope_is_read_in_both_spellings() {
    let rope = |changes| {
        let c = parse("llama", changes).unwrap().model;
        (c.rope_theta, c.rope_scaling)
    };
    let llama3 = RopeScaling::Llama3 {
        factor: 32.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 8192,
    };
    let fields = json!({"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192});
    assert_eq!(rope(json!({"rope_theta": 5e5, "rope_scaling": fields})), (5e5, llama3.clone()));
    let mut v5 = fields.clone();
    v5["rope_theta"] = json!(5e5);
    assert_eq!(rope(json!({"rope_theta": null, "rope_parameters": v5})), (5e5, llama3));
    assert_eq!(rope(json!({})), (1e4, RopeScaling::Default));
    assert_eq!(rope(json!({"rope_theta": null})), (1e4, RopeScaling::Default));
    assert_eq!(rope(json!({"rope_theta": 1000000})), (1e6, RopeScaling::Default));
    let linear = RopeScaling::Linear { factor: 4.0 };
    assert_eq!(rope(json!({"rope_scaling": {"type": "linear", "factor": 4.0}})), (1e4, linear));
    for kind in ["yarn", "dynamic", "longrope", "su"] {
        assert_input(
            parse("llama", json!({"rope_scaling": {"rope_type": kind, "factor": 2.0}})),
            &["config.json: key rope_scaling.rope_type", kind, "default, linear or llama3"],
        );
    }
    assert_input(parse("llama", json!({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}})), &["low_freq_factor"]);
    assert_input(
        parse("llama", json!({"rope_parameters": {"full_attention": {"rope_type": "default"}}})),
        &["rope_parameters.full_attention"],
    );
    assert_input(parse("llama", json!({"partial_rotary_factor": 0.5})), &["partial_rotary_factor", "0.5"]);
}

#[test]
fn windows_follow_the_rules_of_each_family() {
    assert_eq!(windows("mistral", json!({})), [Some(4096); 4]);
    assert_eq!(windows("mistral", json!({"sliding_window": null})), [None; 4]);
    assert_eq!(windows("llama", json!({"sliding_window": 8})), [None; 4]);
    let off = json!({"use_sliding_window": false, "sliding_window": 8, "max_window_layers": 0});
    assert_eq!(windows("qwen2", off), [None; 4]);
    let on = json!({"use_sliding_window": true, "sliding_window": 8, "max_window_layers": 3});
    assert_eq!(windows("qwen2", on), [None, None, None, Some(8)]);
    let few = json!({"use_sliding_window": true, "sliding_window": 8});
    assert_eq!(windows("qwen3", few), [None; 4], "max_window_layers is 28 where it is not given");
    let typed = json!({"use_sliding_window": true, "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]});
    assert_eq!(windows("qwen2", typed), [Some(8), None, None, Some(8)]);
    let contradiction = json!({"use_sliding_window": false, "layer_types": vec!["sliding_attention"; 4]});
    assert_input(parse("qwen2", contradiction), &["layer_types", "layer 0"]);
    assert_input(parse("qwen2", json!({"layer_types": ["full_attention"]})), &["layer_types", "1 entries", "4"]);
    assert_input(parse("qwen2", json!({"layer_types": vec!["chunked_attention"; 4]})), &["chunked_attention"]);
    let mixed = ["sliding_attention", "full_attention", "full_attention", "full_attention"];
    assert_input(parse("mistral", json!({"sliding_window": 8, "layer_types": mixed})), &["layer_types"]);
}

#[test]
fn biases_norms_heads_and_head_sizes_follow_each_family() {
    let flags = |model_type, changes| {
        let c = parse(model_type, changes).unwrap().model;
        (c.qkv_bias, c.o_bias, c.mlp_bias, c.qk_norm, c.head_dim)
    };
    assert_eq!(flags("mistral", json!({})), (false, false, false, false, 16));
    assert_eq!(flags("mistral", json!({"head_dim": 32})), (false, false, false, false, 32));
    assert_eq!(flags("llama", json!({"head_dim": null})), (false, false, false, false, 16));
    assert_eq!(flags("llama", json!({"attention_bias": true})), (true, true, false, false, 16));
    assert_eq!(flags("llama", json!({"mlp_bias": true})), (false, false, true, false, 16));
    assert_eq!(flags("qwen2", json!({})), (true, false, false, false, 16));
    assert_eq!(flags("qwen3", json!({"head_dim": 32})), (false, false, false, true, 32));
    assert_eq!(flags("qwen3", json!({})), (false, false, false, true, 128));
    assert_eq!(flags("qwen3", json!({"attention_bias": true})), (true, true, false, true, 128));
    for family in ["mistral", "llama", "qwen2", "qwen3"] {
        assert!(!parse(family, json!({})).unwrap().model.tie_word_embeddings);
        assert!(parse(family, json!({"tie_word_embeddings": true})).unwrap().model.tie_word_embeddings);
    }
    assert_eq!(parse("llama", json!({"num_key_value_heads": null})).unwrap().model.num_key_value_heads, 4);
}

#[test]
fn end_tokens_are_an_id_a_list_or_in_generation_config() {
    let eos = |changes| parse("llama", changes).unwrap().model.eos_token_ids;
    assert_eq!(eos(json!({})), [2]);
    assert_eq!(eos(json!({"eos_token_id": 7})), [7]);
    assert_eq!(eos(json!({"eos_token_id": [7, 9]})), [7, 9]);
    assert!(eos(json!({"eos_token_id": null})).is_empty());
    assert_eq!(parse("llama", json!({"pad_token_id": -1})).unwrap().model.pad_token_id, None);
    assert_input(parse("llama", json!({"eos_token_id": 256})), &["eos_token_id", "256", "vocab_size"]);

    let dir = super::copy_of("tiny-mistral");
    super::set_key(&dir.path().join("generation_config.json"), "eos_token_id", Some(json!([5, 2])));
    assert_eq!(config::read(dir.path()).unwrap().model.eos_token_ids, [2, 5]);
}

#[test]
fn what_we_do_not_run_is_one_error_that_names_the_key() {
    for (model_type, changes, parts) in [
        ("mixtral", json!({}), ["model_type", "\"mixtral\""]),
        ("gemma2", json!({}), ["model_type", "mistral, llama, qwen2 or qwen3"]),
        ("llama", json!({"architectures": ["LlamaForSequenceClassification"]}), ["architectures", "head"]),
        ("llama", json!({"hidden_act": "gelu"}), ["hidden_act", "gelu"]),
        ("llama", json!({"num_local_experts": 8}), ["num_local_experts", "mixture-of-experts"]),
        ("llama", json!({"final_logit_softcapping": 30.0}), ["final_logit_softcapping", "30.0"]),
        ("llama", json!({"attention_dropout": 0.1}), ["attention_dropout", "0.1"]),
        ("llama", json!({"pretraining_tp": 2}), ["pretraining_tp", "2"]),
        ("qwen2", json!({"mlp_bias": true}), ["mlp_bias", "true"]),
        ("llama", json!({"num_key_value_heads": 3}), ["num_key_value_heads", "divisor"]),
        ("llama", json!({"num_attention_heads": 3, "num_key_value_heads": 1}), ["hidden_size", "multiple"]),
        ("llama", json!({"head_dim": 15}), ["head_dim", "even"]),
        ("llama", json!({"vocab_size": 0}), ["vocab_size", "0"]),
        ("llama", json!({"hidden_size": "64"}), ["hidden_size", "\"64\""]),
        ("llama", json!({"num_hidden_layers": 1_000_000}), ["num_hidden_layers", "4096"]),
        ("llama", json!({"rms_norm_eps": 0.0}), ["rms_norm_eps", "above 0"]),
        ("llama", json!({"quantization_config": {"quant_method": "gptq", "bits": 4}}), ["quant_method", "gptq"]),
        ("llama", json!({"quantization_config": {"load_in_8bit": true}}), ["load_in_8bit", "8-bit"]),
        (
            "llama",
            json!({"quantization_config": {"load_in_4bit": true, "bnb_4bit_quant_storage": "bfloat16"}}),
            ["bnb_4bit_quant_storage", "bfloat16"],
        ),
    ] {
        assert_input(parse(model_type, changes), &parts);
    }
}

#[test]
fn a_config_lacking_a_key_names_it() {
    let text = std::fs::read_to_string(fixture("tiny-qwen2/config.json")).unwrap();
    for key in [
        "model_type",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
        "max_position_embeddings",
        "rms_norm_eps",
    ] {
        let mut map: Map<String, Value> = serde_json::from_str(&text).unwrap();
        map.remove(key);
        let text = Value::Object(map).to_string();
        assert_input(config::parse("config.json".as_ref(), &text), &[&format!("key {key}: found no such key")]);
    }
    assert_input(config::parse("config.json".as_ref(), "{\"a\": "), &["line 1", "malformed"]);
    assert_input(config::parse("config.json".as_ref(), "[]"), &["JSON object"]);
}
