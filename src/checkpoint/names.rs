//! The tensors that a model of a given config consists of, by their names in transformers.

use crate::model::{ModelConfig, Proj};

/// What a tensor is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    Embedding,
    Norm,
    Bias,
    /// One of the seven projections of a layer: what quantisation and LoRA are about.
    Projection,
    /// lm_head, where it is not the embedding.
    Head,
}

/// One expected tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct Weight {
    pub name: String,
    pub shape: Vec<usize>,
    pub role: Role,
}

impl Weight {
    /// The module it belongs to: its name without ".weight".
    pub fn module(&self) -> &str {
        self.name.strip_suffix(".weight").unwrap_or(&self.name)
    }
}

/// All tensors of a model, in the order of the graph.
pub fn weights(config: &ModelConfig) -> Vec<Weight> {
    let (c, v, d) = (config.hidden_size, config.vocab_size, config.head_dim);
    let mut all = Vec::new();
    let mut add = |name: String, shape: Vec<usize>, role| all.push(Weight { name, shape, role });
    add("model.embed_tokens.weight".into(), vec![v, c], Role::Embedding);
    for layer in 0..config.num_hidden_layers {
        let norm = |name: &str| format!("model.layers.{layer}.{name}.weight");
        add(norm("input_layernorm"), vec![c], Role::Norm);
        for proj in Proj::ALL {
            let (n, k) = config.dims(proj);
            add(format!("{}.weight", proj.module(layer)), vec![n, k], Role::Projection);
            if config.has_bias(proj) {
                add(format!("{}.bias", proj.module(layer)), vec![n], Role::Bias);
            }
        }
        if config.qk_norm {
            add(norm("self_attn.q_norm"), vec![d], Role::Norm);
            add(norm("self_attn.k_norm"), vec![d], Role::Norm);
        }
        add(norm("post_attention_layernorm"), vec![c], Role::Norm);
    }
    add("model.norm.weight".into(), vec![c], Role::Norm);
    if !config.tie_word_embeddings {
        add("lm_head.weight".into(), vec![v, c], Role::Head);
    }
    all
}

/// Tensors that old files carry and transformers ignores too: rotary tables, and a copy of a tied head.
pub fn is_ignored(name: &str, config: &ModelConfig) -> bool {
    name.ends_with(".rotary_emb.inv_freq") || (name == "lm_head.weight" && config.tie_word_embeddings)
}
