//! Parameter groups of AdamW.

use super::config::TrainConfig;
use crate::backend::ParamGroup;
use crate::model::{AdamwSettings, AdapterLayout};

/// Settings of optimizer step `step` (from 1) at learning rate `lr`.
///
/// Weight decay holds for A and B alike, as in PEFT under transformers' Trainer (only biases and norms are exempt there,
/// and an adapter has neither). With LoRA+ the rate of B is `loraplus_lr_ratio` times that of A.
pub fn settings(config: &TrainConfig, layout: &AdapterLayout, lr: f64, step: u64) -> AdamwSettings {
    let group = |range, lr: f64| ParamGroup { range, lr: lr as f32, weight_decay: config.weight_decay as f32 };
    let groups = match config.loraplus_lr_ratio {
        None => vec![group(0..layout.len, lr)],
        Some(ratio) => {
            layout.sites.iter().flat_map(|s| [group(s.a_range(), lr), group(s.b_range(), lr * ratio)]).collect()
        }
    };
    AdamwSettings {
        groups,
        beta1: config.adam_beta1 as f32,
        beta2: config.adam_beta2 as f32,
        eps: config.adam_epsilon as f32,
        max_grad_norm: config.max_grad_norm as f32,
        step,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Proj, Site};

    fn layout() -> AdapterLayout {
        let site = |a, site| Site { layer: 0, proj: Proj::Q, n: 3, k: 5, r: 2, scale: 1.0, a, b: a + 10, site };
        AdapterLayout { sites: vec![site(0, 0), site(16, 1)], len: 32 }
    }

    #[test]
    fn one_group_covers_all_weights() {
        let config = TrainConfig { weight_decay: 0.5, ..Default::default() };
        let s = settings(&config, &layout(), 0.25, 3);
        assert_eq!(s.groups, [ParamGroup { range: 0..32, lr: 0.25, weight_decay: 0.5 }]);
        assert_eq!(s.step, 3);
    }

    #[test]
    fn loraplus_raises_the_rate_of_b_and_the_groups_still_tile_the_weights() {
        let config = TrainConfig { loraplus_lr_ratio: Some(16.0), ..Default::default() };
        let s = settings(&config, &layout(), 0.25, 1);
        let found: Vec<_> = s.groups.iter().map(|g| (g.range.clone(), g.lr)).collect();
        assert_eq!(found, [(0..10, 0.25), (10..16, 4.0), (16..26, 0.25), (26..32, 4.0)]);
    }
}
