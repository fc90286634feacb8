//! A model directory of random bf16 weights, as large as a real one: for timing how it loads.

use std::path::Path;

use half::bf16;
use serde_json::{Map, Value, json};

use super::atomic::DirWriter;
use super::names::{Role, weights};
use super::output;
use super::safetensors_file::FileDtype;
use super::safetensors_write::{SHARD_BYTES, Spec, StreamWriter, shard_name, shards};
use crate::error::{Error, Result};
use crate::model::{Family, ModelConfig};
use crate::rng::{Stream, word};

/// Writes the directory `out` (it appears complete or not at all), sharded as transformers does; `progress(done, all)` in
/// bytes. No tokenizer. Errors: a model of another family than Llama and Mistral ([`Error::Flag`]), and those of writing.
pub fn write(out: &Path, config: &ModelConfig, progress: &mut dyn FnMut(u64, u64)) -> Result<()> {
    let (architecture, model_type) = match config.family {
        Family::Llama => ("LlamaForCausalLM", "llama"),
        Family::Mistral => ("MistralForCausalLM", "mistral"),
        other => return Err(Error::flag("shape", format!("{other:?}"), "a shape of Llama or Mistral")),
    };
    let specs: Vec<(Spec, Role)> =
        weights(config).into_iter().map(|w| (Spec::new(w.name, FileDtype::BF16, w.shape), w.role)).collect();
    let sizes: Vec<u64> = specs.iter().map(|(s, _)| s.bytes()).collect();
    let all = sizes.iter().sum();
    let ranges = shards(&sizes, SHARD_BYTES);
    let run = random_run();
    let writer = DirWriter::new(out)?;
    let (mut names, mut done) = (Vec::new(), 0);
    for (i, range) in ranges.iter().enumerate() {
        let file = shard_name(i, ranges.len());
        let failed = |e| Error::write("write", out.join(&file))(e);
        let shard = &specs[range.clone()];
        let list: Vec<Spec> = shard.iter().map(|(s, _)| s.clone()).collect();
        names.push(list.iter().map(|s| s.name.clone()).collect::<Vec<_>>());
        let mut stream = StreamWriter::create(&writer.path().join(&file), list, &[]).map_err(failed)?;
        for (j, (spec, role)) in shard.iter().enumerate() {
            let len = spec.bytes() as usize;
            let bytes: Vec<u8> = match role {
                Role::Norm => bf16::ONE.to_le_bytes().repeat(len / 2),
                // Each tensor starts at another place of the run.
                _ => repeated(&run, 2 * 7919 * (j % 97), len),
            };
            stream.put(j, &bytes).map_err(failed)?;
            done += spec.bytes();
            progress(done, all);
        }
        stream.finish().map_err(failed)?;
    }
    output::write_index(&writer, &names, all)?;
    output::write_config(&writer, &config_json(config, architecture, model_type))?;
    writer.commit()
}

/// `len` bytes of `run` over and over, from `start` on.
pub fn repeated(run: &[u8], start: usize, len: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(len);
    let mut from = start % run.len();
    while bytes.len() < len {
        let n = (run.len() - from).min(len - bytes.len());
        bytes.extend_from_slice(&run[from..from + n]);
        from = 0;
    }
    bytes
}

/// 2 MiB of bf16 values, uniform in ±0.035.
fn random_run() -> Vec<u8> {
    let unit = |i: u64| (word(1, Stream::Init, 0, i) >> 8) as f32 / (1 << 23) as f32 - 1.0;
    (0..1 << 20).flat_map(|i| bf16::from_f32(0.035 * unit(i)).to_le_bytes()).collect()
}

/// config.json as transformers writes it.
fn config_json(c: &ModelConfig, architecture: &str, model_type: &str) -> Map<String, Value> {
    let value = json!({
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_hidden_layers,
        "num_attention_heads": c.num_attention_heads,
        "num_key_value_heads": c.num_key_value_heads,
        "head_dim": c.head_dim,
        "vocab_size": c.vocab_size,
        "max_position_embeddings": c.max_position_embeddings,
        "rms_norm_eps": c.rms_norm_eps,
        "rope_theta": c.rope_theta,
        "hidden_act": "silu",
        "tie_word_embeddings": c.tie_word_embeddings,
        "sliding_window": null,
        "torch_dtype": "bfloat16",
    });
    match value {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::ModelDir;
    use crate::model::WeightSource;
    use crate::model::shapes::shape;

    #[test]
    fn what_is_written_opens_as_the_model_it_was_made_for() {
        let dir = tempfile::tempdir().unwrap();
        let config = shape("tiny").unwrap();
        let out = dir.path().join("m");
        write(&out, &config, &mut |_, _| ()).unwrap();
        let opened = ModelDir::open(&out).unwrap();
        assert_eq!(opened.config().num_hidden_layers, config.num_hidden_layers);
        assert_eq!(opened.config().head_dim, config.head_dim);
        let mut source = opened.source(None).unwrap();
        let values = source.matrix("model.layers.1.mlp.up_proj.weight").unwrap().to_f32();
        assert!(values.iter().all(|v| v.abs() <= 0.0351) && values.iter().any(|v| v.abs() > 0.03));
        assert!(source.vector("model.norm.weight").unwrap().to_f32().iter().all(|v| *v == 1.0));
    }
}
