//! What a model is made of, independent of the file that said so (`checkpoint::config` reads config.json).

use serde::{Deserialize, Serialize};

/// The families we run. They differ in biases, q/k norms and defaults only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    Mistral,
    Llama,
    Qwen2,
    Qwen3,
}

/// Frequencies of the rotary embedding.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum RopeScaling {
    /// `inv_freq[i] = theta^(-2i/D)`
    Default,
    /// inv_freq / factor
    Linear { factor: f64 },
    /// Llama 3.1: long wavelengths divided by `factor`, short ones kept, a smooth step between.
    Llama3 { factor: f64, low_freq_factor: f64, high_freq_factor: f64, original_max_position_embeddings: usize },
}

/// A decoder of `layers` blocks: RMSNorm, grouped-query attention with RoPE, RMSNorm, SwiGLU.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelConfig {
    pub family: Family,
    /// C
    pub hidden_size: usize,
    /// F
    pub intermediate_size: usize,
    /// L
    pub num_hidden_layers: usize,
    /// H
    pub num_attention_heads: usize,
    /// G; divides H
    pub num_key_value_heads: usize,
    /// D; even
    pub head_dim: usize,
    /// V, rows of the embedding
    pub vocab_size: usize,
    pub max_position_embeddings: usize,
    pub rms_norm_eps: f32,
    pub rope_theta: f64,
    pub rope_scaling: RopeScaling,
    /// Window of each layer (length L): query i sees keys j with i - window < j <= i; None: all.
    pub windows: Vec<Option<usize>>,
    /// Biases on q, k, v.
    pub qkv_bias: bool,
    /// Bias on o (Llama with attention_bias).
    pub o_bias: bool,
    /// Biases on gate, up, down (Llama with mlp_bias).
    pub mlp_bias: bool,
    /// RMSNorm over each head of q and k (Qwen3).
    pub qk_norm: bool,
    /// lm_head is the embedding.
    pub tie_word_embeddings: bool,
    pub bos_token_id: Option<u32>,
    /// All ids that end a turn, of config.json.
    pub eos_token_ids: Vec<u32>,
    pub pad_token_id: Option<u32>,
}

/// The seven projections of a layer, in the order of the graph.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Proj {
    Q,
    K,
    V,
    O,
    Gate,
    Up,
    Down,
}

impl Proj {
    pub const ALL: [Proj; 7] = [Self::Q, Self::K, Self::V, Self::O, Self::Gate, Self::Up, Self::Down];

    /// "q_proj" and so on.
    pub fn short_name(self) -> &'static str {
        match self {
            Self::Q => "q_proj",
            Self::K => "k_proj",
            Self::V => "v_proj",
            Self::O => "o_proj",
            Self::Gate => "gate_proj",
            Self::Up => "up_proj",
            Self::Down => "down_proj",
        }
    }

    /// The module's name in transformers: "model.layers.3.self_attn.q_proj".
    pub fn module(self, layer: usize) -> String {
        let block = if matches!(self, Self::Gate | Self::Up | Self::Down) { "mlp" } else { "self_attn" };
        format!("model.layers.{layer}.{block}.{}", self.short_name())
    }
}

impl ModelConfig {
    /// (N, K) of a projection.
    pub fn dims(&self, p: Proj) -> (usize, usize) {
        let (c, f) = (self.hidden_size, self.intermediate_size);
        let (q, kv) = (self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim);
        match p {
            Proj::Q => (q, c),
            Proj::K | Proj::V => (kv, c),
            Proj::O => (c, q),
            Proj::Gate | Proj::Up => (f, c),
            Proj::Down => (c, f),
        }
    }

    /// Whether a projection carries a bias.
    pub fn has_bias(&self, p: Proj) -> bool {
        match p {
            Proj::Q | Proj::K | Proj::V => self.qkv_bias,
            Proj::O => self.o_bias,
            Proj::Gate | Proj::Up | Proj::Down => self.mlp_bias,
        }
    }

    /// (D/2) rotary frequencies, in f32 from f32 arithmetic as transformers computes them.
    pub fn inv_freq(&self) -> Vec<f32> {
        let d = self.head_dim;
        let base: Vec<f32> =
            (0..d / 2).map(|i| 1.0 / (self.rope_theta as f32).powf(2.0 * i as f32 / d as f32)).collect();
        match self.rope_scaling {
            RopeScaling::Default => base,
            RopeScaling::Linear { factor } => base.iter().map(|f| f / factor as f32).collect(),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
                let (factor, low, high) = (factor as f32, low_freq_factor as f32, high_freq_factor as f32);
                let original = original_max_position_embeddings as f32;
                let scale = |f: f32| {
                    let wavelength = 2.0 * std::f32::consts::PI / f;
                    if wavelength < original / high {
                        f
                    } else if wavelength > original / low {
                        f / factor
                    } else {
                        let smooth = (original / wavelength - low) / (high - low);
                        (1.0 - smooth) * f / factor + smooth * f
                    }
                };
                base.into_iter().map(scale).collect()
            }
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Two layers, grouped queries, a head size that is not C / H.
    pub(crate) fn tiny() -> ModelConfig {
        ModelConfig {
            family: Family::Mistral,
            hidden_size: 24,
            intermediate_size: 40,
            num_hidden_layers: 2,
            num_attention_heads: 4,
            num_key_value_heads: 2,
            head_dim: 8,
            vocab_size: 50,
            max_position_embeddings: 64,
            rms_norm_eps: 1e-5,
            rope_theta: 10000.0,
            rope_scaling: RopeScaling::Default,
            windows: vec![None, None],
            qkv_bias: false,
            o_bias: false,
            mlp_bias: false,
            qk_norm: false,
            tie_word_embeddings: false,
            bos_token_id: None,
            eos_token_ids: Vec::new(),
            pad_token_id: None,
        }
    }

    #[test]
    fn frequencies_fall_from_one_by_the_root_of_theta() {
        let f = tiny().inv_freq();
        assert_eq!(f.len(), 4);
        for (f, want) in f.iter().zip([1.0, 0.1, 0.01, 0.001]) {
            assert!((f / want - 1.0).abs() < 1e-6, "{f} against {want}");
        }
    }

    /// Llama 3.1's own settings: the fastest frequencies stay, the slowest are divided by 8, none rises.
    #[test]
    fn llama3_scaling_keeps_fast_frequencies_and_divides_slow_ones() {
        let mut c = tiny();
        (c.head_dim, c.rope_theta) = (128, 500_000.0);
        let base = c.inv_freq();
        c.rope_scaling = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 8192,
        };
        let scaled = c.inv_freq();
        assert_eq!(scaled[0], base[0]);
        assert_eq!(scaled[63], base[63] / 8.0);
        assert!(scaled.windows(2).all(|w| w[1] < w[0]), "still falling");
        assert!(scaled.iter().zip(&base).all(|(s, b)| s <= b && *s >= b / 8.0));
    }
}
