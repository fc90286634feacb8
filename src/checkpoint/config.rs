//! config.json of transformers 4 and 5, with the defaults of its configuration classes.
//!
//! What a config asks for and we do not run is refused here: nothing is dropped in silence.

use std::path::Path;

use serde_json::{Map, Value};

use super::json::{Keys, parse_object, read_object, read_text, shorten};
use crate::error::{Error, Result};
use crate::model::{Family, ModelConfig, RopeScaling};
use crate::nf4::QuantType;

/// What config.json said.
#[derive(Clone, Debug, PartialEq)]
pub struct ConfigFile {
    pub model: ModelConfig,
    /// `quantization_config` of a 4-bit directory.
    pub quantization: Option<Bnb4bit>,
    /// The whole file, key order kept: what a written directory starts from.
    pub raw: Map<String, Value>,
}

/// bitsandbytes' 4-bit settings.
#[derive(Clone, Debug, PartialEq)]
pub struct Bnb4bit {
    pub quant_type: QuantType,
    pub double_quant: bool,
    /// `llm_int8_skip_modules`: modules left in 16 bits.
    pub skip_modules: Vec<String>,
}

/// Reads `dir/config.json`, and the end-of-turn tokens of `dir/generation_config.json` where there is one.
pub fn read(dir: &Path) -> Result<ConfigFile> {
    let path = dir.join("config.json");
    if !path.exists() && dir.join("adapter_config.json").exists() {
        return Err(Error::input(dir, "folder", "a PEFT adapter", "a model (give the adapter as --adapter)"));
    }
    let mut config = parse(&path, &read_text(&path)?)?;
    let path = dir.join("generation_config.json");
    if path.exists() {
        let map = read_object(&path)?;
        let keys = Keys { file: &path, prefix: "", map: &map };
        for id in token_ids(&keys, "eos_token_id", config.model.vocab_size)?.unwrap_or_default() {
            if !config.model.eos_token_ids.contains(&id) {
                config.model.eos_token_ids.push(id);
            }
        }
    }
    Ok(config)
}

/// Parses the text of a config.json; `file` only names it in errors.
/// Errors: malformed, a key missing or unusable, an architecture or feature that we do not run.
pub fn parse(file: &Path, text: &str) -> Result<ConfigFile> {
    let raw = parse_object(file, text)?;
    let keys = Keys { file, prefix: "", map: &raw };
    let family = family(&keys)?;
    refuse_unsupported(&keys, family)?;
    let model = model(&keys, family)?;
    let quantization = quantization(&keys)?;
    Ok(ConfigFile { model, quantization, raw })
}

fn family(keys: &Keys) -> Result<Family> {
    const EXPECTED: &str = "mistral, llama, qwen2 or qwen3";
    let family = match keys.text("model_type")? {
        "mistral" => Family::Mistral,
        "llama" => Family::Llama,
        "qwen2" => Family::Qwen2,
        "qwen3" => Family::Qwen3,
        other => return Err(keys.fault("model_type", format!("{other:?}"), EXPECTED)),
    };
    for name in keys.texts("architectures")? {
        if !name.ends_with("ForCausalLM") {
            return Err(keys.fault(
                "architectures",
                format!("{name:?}"),
                "a model with a language-model head (…ForCausalLM)",
            ));
        }
    }
    Ok(family)
}

fn refuse_unsupported(keys: &Keys, family: Family) -> Result<()> {
    let act = keys.text_or("hidden_act", "silu")?;
    if act != "silu" && act != "swish" {
        return Err(keys.fault("hidden_act", format!("{act:?}"), "\"silu\": other activations are not supported"));
    }
    for key in ["num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok"] {
        if keys.number_or(key, 0.0)? > 1.0 {
            return Err(keys.fault(
                key,
                shorten(&keys.map[key]),
                "no experts: mixture-of-experts models are not supported",
            ));
        }
    }
    for key in ["attn_logit_softcapping", "final_logit_softcapping", "attention_logit_softcapping", "logit_softcapping"]
    {
        keys.must_be_off(key, "no softcapping: it is not supported")?;
    }
    for key in ["attention_dropout", "hidden_dropout", "residual_dropout"] {
        keys.must_be_off(key, "0: dropout inside the base model is not supported")?;
    }
    if keys.number_or("pretraining_tp", 1.0)? > 1.0 {
        let found = shorten(&keys.map["pretraining_tp"]);
        return Err(keys.fault("pretraining_tp", found, "1: sliced matrix products are not supported"));
    }
    if matches!(family, Family::Mistral | Family::Qwen2) {
        keys.must_be_off("attention_bias", "no such bias in this architecture")?;
    }
    if family != Family::Llama {
        keys.must_be_off("mlp_bias", "no such bias in this architecture")?;
    }
    Ok(())
}

fn model(keys: &Keys, family: Family) -> Result<ModelConfig> {
    let hidden_size = keys.size("hidden_size")?;
    let layers = keys.size("num_hidden_layers")?;
    if layers > 4096 {
        return Err(keys.fault("num_hidden_layers", layers.to_string(), "at most 4096"));
    }
    let heads = keys.size("num_attention_heads")?;
    // Llama 1 and 2 wrote no such key where every head has its own keys and values.
    let kv_heads = match keys.size_or_null("num_key_value_heads")? {
        Some(n) => n,
        None if family == Family::Llama || keys.map.contains_key("num_key_value_heads") => heads,
        None => keys.size("num_key_value_heads")?,
    };
    if heads % kv_heads != 0 {
        let expected = format!("a divisor of num_attention_heads, {heads}");
        return Err(keys.fault("num_key_value_heads", kv_heads.to_string(), expected));
    }
    let head_dim = match keys.size_or_null("head_dim")? {
        Some(d) => d,
        None if family == Family::Qwen3 && !keys.map.contains_key("head_dim") => 128,
        None if hidden_size % heads == 0 => hidden_size / heads,
        None => {
            let expected = format!("a multiple of num_attention_heads, {heads}, or a head_dim");
            return Err(keys.fault("hidden_size", hidden_size.to_string(), expected));
        }
    };
    if head_dim % 2 != 0 || heads.saturating_mul(head_dim) > 1 << 28 {
        let found = format!("{head_dim} for each of {heads} heads");
        return Err(keys.fault("head_dim", found, "an even size, and at most 2^28 for all heads together"));
    }
    let vocab_size = keys.size("vocab_size")?;
    let (rope_theta, rope_scaling) = rope(keys)?;
    let attention_bias = keys.flag("attention_bias", false)?;
    // MistralConfig and LlamaConfig name 1 and 2 themselves; a null in the file says there is none.
    let named = matches!(family, Family::Mistral | Family::Llama);
    let default = |key: &str, id: u32| if named && !keys.map.contains_key(key) { vec![id] } else { vec![] };
    let bos = token_ids(keys, "bos_token_id", vocab_size)?.unwrap_or_else(|| default("bos_token_id", 1));
    let eos = token_ids(keys, "eos_token_id", vocab_size)?.unwrap_or_else(|| default("eos_token_id", 2));
    // A pad token beyond the embedding is common (added without a resize) and harmless: nothing here is ever padded.
    let pad = keys.get("pad_token_id").and_then(Value::as_u64).filter(|&id| id < vocab_size as u64);
    Ok(ModelConfig {
        family,
        hidden_size,
        intermediate_size: keys.size("intermediate_size")?,
        num_hidden_layers: layers,
        num_attention_heads: heads,
        num_key_value_heads: kv_heads,
        head_dim,
        vocab_size,
        max_position_embeddings: keys.size("max_position_embeddings")?,
        rms_norm_eps: keys.positive("rms_norm_eps")? as f32,
        rope_theta,
        rope_scaling,
        windows: windows(keys, family, layers)?,
        qkv_bias: family == Family::Qwen2 || attention_bias,
        o_bias: family != Family::Qwen2 && attention_bias,
        mlp_bias: keys.flag("mlp_bias", false)?,
        qk_norm: family == Family::Qwen3,
        tie_word_embeddings: keys.flag("tie_word_embeddings", false)?,
        bos_token_id: bos.first().copied(),
        eos_token_ids: eos,
        pad_token_id: pad.map(|id| id as u32),
    })
}

/// `rope_theta` and `rope_scaling` of transformers 4, or `rope_parameters` of transformers 5.
/// Where both are given, `rope_scaling` wins, as in transformers.
fn rope(keys: &Keys) -> Result<(f64, RopeScaling)> {
    if keys.number_or("partial_rotary_factor", 1.0)? != 1.0 {
        let found = shorten(&keys.map["partial_rotary_factor"]);
        return Err(keys.fault("partial_rotary_factor", found, "1: partial rotary embeddings are not supported"));
    }
    let (prefix, map) = match (keys.object("rope_scaling")?, keys.object("rope_parameters")?) {
        (Some(map), _) => ("rope_scaling.", map),
        (None, Some(map)) => ("rope_parameters.", map),
        (None, None) => {
            let theta = if keys.get("rope_theta").is_some() { keys.positive("rope_theta")? } else { 10_000.0 };
            return Ok((theta, RopeScaling::Default));
        }
    };
    let inner = Keys { file: keys.file, prefix, map };
    if let Some((key, value)) = map.iter().find(|(_, v)| v.is_object()) {
        return Err(inner.fault(key, shorten(value), "one set of parameters: RoPE by layer type is not supported"));
    }
    if inner.number_or("partial_rotary_factor", 1.0)? != 1.0 {
        let found = shorten(&map["partial_rotary_factor"]);
        return Err(inner.fault("partial_rotary_factor", found, "1: partial rotary embeddings are not supported"));
    }
    let theta = if inner.get("rope_theta").is_some() {
        inner.positive("rope_theta")?
    } else if keys.get("rope_theta").is_some() {
        keys.positive("rope_theta")?
    } else {
        10_000.0
    };
    let (key, kind) = match inner.get("rope_type") {
        Some(_) => ("rope_type", inner.text("rope_type")?),
        None => ("type", inner.text_or("type", "default")?),
    };
    let scaling = match kind {
        "default" => RopeScaling::Default,
        "linear" => RopeScaling::Linear { factor: inner.positive("factor")? },
        "llama3" => {
            let (low, high) = (inner.positive("low_freq_factor")?, inner.positive("high_freq_factor")?);
            if low >= high {
                let found = format!("{high}, where low_freq_factor is {low}");
                return Err(inner.fault("high_freq_factor", found, "a larger number than low_freq_factor"));
            }
            RopeScaling::Llama3 {
                factor: inner.positive("factor")?,
                low_freq_factor: low,
                high_freq_factor: high,
                original_max_position_embeddings: inner.size("original_max_position_embeddings")?,
            }
        }
        other => return Err(inner.fault(key, format!("{other:?}"), "default, linear or llama3")),
    };
    Ok((theta, scaling))
}

/// The attention window of each layer.
fn windows(keys: &Keys, family: Family, layers: usize) -> Result<Vec<Option<usize>>> {
    let window = match family {
        Family::Llama => None,
        // MistralConfig has a default of its own; v0.2 and later write null.
        Family::Mistral if !keys.map.contains_key("sliding_window") => Some(4096),
        Family::Mistral => keys.size_or_null("sliding_window")?,
        Family::Qwen2 | Family::Qwen3 if !keys.flag("use_sliding_window", false)? => None,
        Family::Qwen2 | Family::Qwen3 if !keys.map.contains_key("sliding_window") => Some(4096),
        Family::Qwen2 | Family::Qwen3 => keys.size_or_null("sliding_window")?,
    };
    // Qwen: the first max_window_layers layers see everything, the rest through the window.
    let first = match family {
        Family::Qwen2 | Family::Qwen3 => match keys.get("max_window_layers") {
            Some(v) => v
                .as_u64()
                .ok_or_else(|| keys.fault("max_window_layers", shorten(v), "a number of layers"))?
                .min(layers as u64) as usize,
            None => 28,
        },
        _ => 0,
    };
    let by_rule: Vec<_> = (0..layers).map(|i| window.filter(|_| i >= first)).collect();
    let types = keys.texts("layer_types")?;
    if types.is_empty() {
        return Ok(by_rule);
    }
    if types.len() != layers {
        let expected = format!("{layers}, one for each of num_hidden_layers");
        return Err(keys.fault("layer_types", format!("{} entries", types.len()), expected));
    }
    let mut by_type = Vec::with_capacity(layers);
    for (i, t) in types.iter().enumerate() {
        by_type.push(match (t.as_str(), window) {
            ("full_attention", _) => None,
            ("sliding_attention", Some(w)) => Some(w),
            ("sliding_attention", None) => {
                let expected = "a sliding_window that is switched on, or full_attention";
                return Err(keys.fault("layer_types", format!("\"sliding_attention\" at layer {i}"), expected));
            }
            _ => {
                let expected = "full_attention or sliding_attention";
                return Err(keys.fault("layer_types", format!("{t:?} at layer {i}"), expected));
            }
        });
    }
    // transformers builds Mistral and Llama without a look at layer_types.
    if matches!(family, Family::Mistral | Family::Llama) && by_type != by_rule {
        return Err(keys.fault("layer_types", shorten(&keys.map["layer_types"]), "all layers as sliding_window says"));
    }
    Ok(by_type)
}

/// An id or a list of ids; None where the key is missing or null. -1 is an old spelling of null.
fn token_ids(keys: &Keys, key: &str, vocab_size: usize) -> Result<Option<Vec<u32>>> {
    let Some(value) = keys.get(key) else { return Ok(None) };
    let items = match value {
        Value::Array(items) => items.as_slice(),
        one => std::slice::from_ref(one),
    };
    let mut ids = Vec::new();
    for item in items {
        match item.as_i64() {
            Some(-1) => {}
            Some(id) if (0..vocab_size as i64).contains(&id) => ids.push(id as u32),
            _ => return Err(keys.fault(key, shorten(item), format!("token ids below vocab_size, {vocab_size}"))),
        }
    }
    Ok(Some(ids))
}

fn quantization(keys: &Keys) -> Result<Option<Bnb4bit>> {
    let Some(map) = keys.object("quantization_config")? else { return Ok(None) };
    let q = Keys { file: keys.file, prefix: "quantization_config.", map };
    let method = q.text_or("quant_method", "bitsandbytes")?;
    if method != "bitsandbytes" {
        return Err(q.fault("quant_method", format!("{method:?}"), "\"bitsandbytes\""));
    }
    if q.flag("load_in_8bit", false)? || q.flag("_load_in_8bit", false)? {
        return Err(q.fault("load_in_8bit", "true", "4-bit weights: 8-bit ones are not supported"));
    }
    if !q.flag("load_in_4bit", false)? && !q.flag("_load_in_4bit", false)? {
        return Err(q.fault("load_in_4bit", "false", "true"));
    }
    let storage = q.text_or("bnb_4bit_quant_storage", "uint8")?;
    if storage != "uint8" {
        return Err(q.fault("bnb_4bit_quant_storage", format!("{storage:?}"), "\"uint8\""));
    }
    let quant_type = match q.text_or("bnb_4bit_quant_type", "fp4")? {
        "nf4" => QuantType::Nf4,
        "fp4" => QuantType::Fp4,
        other => return Err(q.fault("bnb_4bit_quant_type", format!("{other:?}"), "\"nf4\" or \"fp4\"")),
    };
    Ok(Some(Bnb4bit {
        quant_type,
        double_quant: q.flag("bnb_4bit_use_double_quant", false)?,
        skip_modules: q.texts("llm_int8_skip_modules")?,
    }))
}
