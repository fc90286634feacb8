//! Well-known models by name, and weights that are shapes alone: for planning and for benchmarks, without a file.

use super::WeightSource;
use super::config::{Family, ModelConfig, Proj, RopeScaling};
use crate::error::{Error, Result};
use crate::nf4::{Absmax, QuantConfig, QuantType, Quantized};
use crate::tensor::{Dtype, HostMatrix, HostTensor};

/// Names that [`shape`] knows.
pub const SHAPES: [&str; 9] = [
    "tiny",
    "smollm2-135m",
    "llama-3.2-1b",
    "llama-2-7b",
    "mistral-7b",
    "qwen2.5-7b",
    "llama-3-8b",
    "qwen3-8b",
    "llama-3-70b",
];

/// The configuration of a well-known model, as its config.json was published; `tiny` is for trying things out.
pub fn shape(name: &str) -> Option<ModelConfig> {
    let llama = ModelConfig {
        family: Family::Llama,
        hidden_size: 4096,
        intermediate_size: 14336,
        num_hidden_layers: 32,
        num_attention_heads: 32,
        num_key_value_heads: 8,
        head_dim: 128,
        vocab_size: 128_256,
        max_position_embeddings: 8192,
        rms_norm_eps: 1e-5,
        rope_theta: 500_000.0,
        rope_scaling: RopeScaling::Default,
        windows: vec![],
        qkv_bias: false,
        o_bias: false,
        mlp_bias: false,
        qk_norm: false,
        tie_word_embeddings: false,
        bos_token_id: None,
        eos_token_ids: vec![],
        pad_token_id: None,
    };
    let mut config = match name {
        "tiny" => ModelConfig {
            hidden_size: 64,
            intermediate_size: 192,
            num_hidden_layers: 4,
            num_attention_heads: 4,
            num_key_value_heads: 2,
            head_dim: 16,
            vocab_size: 256,
            max_position_embeddings: 2048,
            rope_theta: 10_000.0,
            ..llama
        },
        "smollm2-135m" => ModelConfig {
            hidden_size: 576,
            intermediate_size: 1536,
            num_hidden_layers: 30,
            num_attention_heads: 9,
            num_key_value_heads: 3,
            head_dim: 64,
            vocab_size: 49_152,
            rope_theta: 100_000.0,
            tie_word_embeddings: true,
            ..llama
        },
        "llama-3.2-1b" => ModelConfig {
            hidden_size: 2048,
            intermediate_size: 8192,
            num_hidden_layers: 16,
            head_dim: 64,
            max_position_embeddings: 131_072,
            rope_scaling: RopeScaling::Llama3 {
                factor: 32.0,
                low_freq_factor: 1.0,
                high_freq_factor: 4.0,
                original_max_position_embeddings: 8192,
            },
            tie_word_embeddings: true,
            ..llama
        },
        "llama-2-7b" => ModelConfig {
            intermediate_size: 11_008,
            num_key_value_heads: 32,
            vocab_size: 32_000,
            max_position_embeddings: 4096,
            rope_theta: 10_000.0,
            ..llama
        },
        // v0.2: no sliding window
        "mistral-7b" => ModelConfig {
            family: Family::Mistral,
            vocab_size: 32_000,
            max_position_embeddings: 32_768,
            rope_theta: 1e6,
            ..llama
        },
        "qwen2.5-7b" => ModelConfig {
            family: Family::Qwen2,
            hidden_size: 3584,
            intermediate_size: 18_944,
            num_hidden_layers: 28,
            num_attention_heads: 28,
            num_key_value_heads: 4,
            vocab_size: 152_064,
            max_position_embeddings: 32_768,
            rms_norm_eps: 1e-6,
            rope_theta: 1e6,
            qkv_bias: true,
            ..llama
        },
        "llama-3-8b" => llama,
        "qwen3-8b" => ModelConfig {
            family: Family::Qwen3,
            intermediate_size: 12_288,
            num_hidden_layers: 36,
            vocab_size: 151_936,
            max_position_embeddings: 40_960,
            rms_norm_eps: 1e-6,
            rope_theta: 1e6,
            qk_norm: true,
            ..llama
        },
        "llama-3-70b" => ModelConfig {
            hidden_size: 8192,
            intermediate_size: 28_672,
            num_hidden_layers: 80,
            num_attention_heads: 64,
            ..llama
        },
        _ => return None,
    };
    config.windows = vec![None; config.num_hidden_layers];
    Some(config)
}

/// How a weight matrix is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// bf16 on a GPU.
    Dense,
    /// Blocks of 64, their absmax quantised again or not.
    FourBit { double_quant: bool },
}

impl Format {
    /// Of the matrix `name` where `quantize` says how projections go into 4 bits; embedding and head stay in 16.
    pub fn of(name: &str, quantize: Option<QuantConfig>) -> Self {
        let projection = !name.contains("embed_tokens") && !name.contains("lm_head");
        match quantize.filter(|_| projection) {
            Some(q) => Self::FourBit { double_quant: q.double_quant },
            None => Self::Dense,
        }
    }

    /// Of the random weights of the benchmarks: NF4 with double quantisation.
    pub fn of_random(name: &str) -> Self {
        Self::of(name, Some(QuantConfig { quant_type: QuantType::Nf4, double_quant: true }))
    }
}

/// A source of weights that are shapes alone, each matrix in the format that `format` gives for its name.
/// Only a backend that does nothing but count can load it.
pub struct ShapeSource<'a> {
    pub config: &'a ModelConfig,
    pub format: &'a dyn Fn(&str) -> Format,
}

/// (N, K) of the projection that the tensor `name` belongs to.
pub fn projection_dims(config: &ModelConfig, name: &str) -> Option<(usize, usize)> {
    let of = |p: &Proj| name.split('.').any(|part| part == p.short_name());
    Proj::ALL.iter().find(|p| of(p)).map(|&p| config.dims(p))
}

/// Elements of the norm or bias `name`.
pub fn vector_len(config: &ModelConfig, name: &str) -> Option<usize> {
    match projection_dims(config, name) {
        Some((n, _)) => Some(n),
        None if name.ends_with("q_norm.weight") || name.ends_with("k_norm.weight") => Some(config.head_dim),
        None if name.ends_with("norm.weight") => Some(config.hidden_size),
        None => None,
    }
}

impl WeightSource for ShapeSource<'_> {
    fn vector(&mut self, name: &str) -> Result<HostTensor> {
        let unknown = || Error::input("shapes", name, "an unknown vector", "a norm or a bias");
        let len = vector_len(self.config, name).ok_or_else(unknown)?;
        Ok(HostTensor::from_f32(vec![len], &vec![0.0; len]))
    }

    fn matrix(&mut self, name: &str) -> Result<HostMatrix> {
        let (v, c) = (self.config.vocab_size, self.config.hidden_size);
        let (n, k) = projection_dims(self.config, name).unwrap_or((v, c));
        let (shape, source_dtype) = (vec![n, k], Dtype::Bf16);
        let absmax = match (self.format)(name) {
            Format::Dense => return Ok(HostMatrix::Dense(HostTensor::shape_only(source_dtype, shape))),
            Format::FourBit { double_quant: true } => {
                Absmax::Double { codes: vec![], nested_absmax: vec![], offset: 0.0 }
            }
            Format::FourBit { double_quant: false } => Absmax::Plain(vec![]),
        };
        let (quant_type, packed) = (QuantType::Nf4, vec![]);
        Ok(HostMatrix::Quantized(Quantized { quant_type, shape, source_dtype, packed, absmax }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Weights without norms: the figures of the model cards.
    #[test]
    fn the_shapes_have_the_published_number_of_weights() {
        for (name, billions) in [
            ("smollm2-135m", 0.1345),
            ("llama-3.2-1b", 1.2358),
            ("llama-2-7b", 6.738),
            ("mistral-7b", 7.2415),
            ("qwen2.5-7b", 7.615),
            ("llama-3-8b", 8.030),
            ("qwen3-8b", 8.190),
            ("llama-3-70b", 70.553),
        ] {
            let c = shape(name).unwrap();
            let layer: usize = Proj::ALL.iter().map(|&p| c.dims(p).0 * c.dims(p).1).sum();
            let tables = if c.tie_word_embeddings { 1 } else { 2 };
            let total = layer * c.num_hidden_layers + tables * c.vocab_size * c.hidden_size;
            assert!((total as f64 / 1e9 / billions - 1.0).abs() < 1e-3, "{name}: {total}");
        }
        for name in SHAPES {
            let c = shape(name).unwrap();
            assert_eq!(c.windows.len(), c.num_hidden_layers, "{name}");
            assert_eq!(c.num_attention_heads % c.num_key_value_heads, 0, "{name}");
        }
        assert_eq!(shape("no-such-model"), None);
    }
}
