//! LoRA: which projections get an adapter, and where each lies in the flat vector of trainable weights.

use serde::{Deserialize, Serialize};

use super::config::{ModelConfig, Proj};
use crate::error::{Error, Result};
use crate::rng::{self, Stream};

/// `target_modules` of PEFT: a list of name endings, one regex over the whole module name, or "all-linear".
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum TargetModules {
    List(Vec<String>),
    /// A regex that must match the full module name; the word "all-linear" means every projection.
    Pattern(String),
}

/// The LoRA settings of PEFT's `LoraConfig` that we run. Field names are PEFT's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LoraConfig {
    pub r: usize,
    pub lora_alpha: f64,
    pub lora_dropout: f32,
    pub target_modules: TargetModules,
    /// Module-name patterns with a rank of their own, in file order.
    pub rank_pattern: Vec<(String, usize)>,
    pub alpha_pattern: Vec<(String, f64)>,
    pub use_rslora: bool,
}

/// One adapted projection. A (r, k) starts at `a` in the flat vector, B (n, r) at `b`.
#[derive(Clone, Debug, PartialEq)]
pub struct Site {
    pub layer: usize,
    pub proj: Proj,
    pub n: usize,
    pub k: usize,
    pub r: usize,
    /// alpha / r, or alpha / sqrt(r) with rsLoRA.
    pub scale: f32,
    pub a: usize,
    pub b: usize,
    /// Index of the projection in the model, 7 * layer + proj: its stream of random numbers.
    pub site: u32,
}

impl Site {
    /// Range of A in the flat vector.
    pub fn a_range(&self) -> std::ops::Range<usize> {
        self.a..self.a + self.r * self.k
    }

    /// Range of B in the flat vector.
    pub fn b_range(&self) -> std::ops::Range<usize> {
        self.b..self.b + self.n * self.r
    }

    /// PEFT's tensor name: "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" (`which` is 'A' or 'B').
    pub fn peft_name(&self, which: char) -> String {
        format!("base_model.model.{}.lora_{which}.weight", self.proj.module(self.layer))
    }
}

/// All adapted projections and P, the number of trainable weights. The flat vector holds A then B of each site, in order.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct AdapterLayout {
    pub sites: Vec<Site>,
    pub len: usize,
}

impl AdapterLayout {
    /// Elements of each tensor in the order of the flat vector: A, then B of each site.
    pub fn tensor_lens(&self) -> Vec<usize> {
        self.sites.iter().flat_map(|s| [s.a_range().len(), s.b_range().len()]).collect()
    }
}

/// Adapter weights on the host.
#[derive(Clone, Debug, PartialEq)]
pub struct HostAdapter {
    pub config: LoraConfig,
    pub layout: AdapterLayout,
    /// (P) f32
    pub weights: Vec<f32>,
}

impl HostAdapter {
    /// A fresh adapter: A uniform in ±1/sqrt(k) (PEFT's kaiming_uniform with a = sqrt(5)), B zero.
    pub fn init(config: LoraConfig, model: &ModelConfig, seed: u64) -> Result<Self> {
        let layout = AdapterLayout::new(&config, model)?;
        let mut weights = Vec::new();
        if weights.try_reserve_exact(layout.len).is_err() {
            let found = format!("{} ({} trainable weights)", config.r, layout.len);
            return Err(Error::flag("r", found, "a rank whose weights fit the memory"));
        }
        weights.resize(layout.len, 0.0);
        for s in &layout.sites {
            let bound = 1.0 / (s.k as f32).sqrt();
            for (i, w) in weights[s.a_range()].iter_mut().enumerate() {
                *w = (2.0 * rng::uniform(seed, Stream::Init, s.site, i as u64) - 1.0) * bound;
            }
        }
        Ok(Self { config, layout, weights })
    }
}

/// PEFT's match of a pattern key against a module name: the whole name, or its end after a dot.
fn key_matches(key: &str, module: &str) -> Result<bool> {
    full_match("rank_pattern / alpha_pattern", &format!(r"(?:.*\.)?(?:{key})"), module)
}

/// Python's `re.fullmatch`, look-around included.
fn full_match(flag: &str, pattern: &str, module: &str) -> Result<bool> {
    let wrong = |e| Error::flag(flag, format!("{pattern:?} ({e})"), "a regular expression");
    fancy_regex::Regex::new(&format!("^(?:{pattern})$")).and_then(|re| re.is_match(module)).map_err(wrong)
}

impl AdapterLayout {
    /// Resolves target modules and patterns against a model. Errors: rank 0, a bad regex, a name that matches nothing
    /// or something that is not one of the seven projections.
    pub fn new(config: &LoraConfig, model: &ModelConfig) -> Result<Self> {
        let mut layout = Self::default();
        for layer in 0..model.num_hidden_layers {
            for (i, proj) in Proj::ALL.into_iter().enumerate() {
                let module = proj.module(layer);
                if !config.targets(proj, &module)? {
                    continue;
                }
                let (r, alpha) = config.rank_and_alpha(&module)?;
                let (n, k) = model.dims(proj);
                let (a, b) = (layout.len, layout.len + r * k);
                layout.len = b + n * r;
                let scale = if config.use_rslora { alpha / (r as f64).sqrt() } else { alpha / r as f64 } as f32;
                let site = (7 * layer + i) as u32;
                layout.sites.push(Site { layer, proj, n, k, r, scale, a, b, site });
            }
        }
        if layout.sites.is_empty() {
            return Err(Error::flag("target_modules", config.target_modules.to_string(), TARGETS));
        }
        if let TargetModules::List(names) = &config.target_modules {
            for name in names {
                let short = name.rsplit('.').next().unwrap_or(name);
                if !Proj::ALL.iter().any(|p| p.short_name() == short) {
                    return Err(Error::flag("target_modules", format!("{name:?}"), TARGETS));
                }
            }
        }
        Ok(layout)
    }
}

/// Far above any rank in use; keeps the count of trainable weights from overflowing.
const MAX_RANK: usize = 65_536;

const TARGETS: &str = "names or a regex that match some of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, or \"all-linear\"";

impl std::fmt::Display for TargetModules {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        match self {
            Self::List(names) => write!(f, "{names:?}"),
            Self::Pattern(p) => write!(f, "{p:?}"),
        }
    }
}

impl LoraConfig {
    fn targets(&self, proj: Proj, module: &str) -> Result<bool> {
        match &self.target_modules {
            TargetModules::List(names) => Ok(names.iter().any(|n| {
                n == proj.short_name()
                    || n == module
                    || module.strip_suffix(n.as_str()).is_some_and(|rest| rest.ends_with('.'))
            })),
            TargetModules::Pattern(p) if p == "all-linear" => Ok(true),
            TargetModules::Pattern(p) => full_match("target_modules", p, module),
        }
    }

    fn rank_and_alpha(&self, module: &str) -> Result<(usize, f64)> {
        let mut rank = self.r;
        for (key, r) in &self.rank_pattern {
            if key_matches(key, module)? {
                rank = *r;
                break;
            }
        }
        let mut alpha = self.lora_alpha;
        for (key, a) in &self.alpha_pattern {
            if key_matches(key, module)? {
                alpha = *a;
                break;
            }
        }
        if !(1..=MAX_RANK).contains(&rank) {
            return Err(Error::flag("r", rank.to_string(), format!("a rank from 1 to {MAX_RANK}")));
        }
        Ok((rank, alpha))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::config::tests::tiny;

    fn config(target_modules: TargetModules) -> LoraConfig {
        LoraConfig {
            r: 8,
            lora_alpha: 16.0,
            lora_dropout: 0.0,
            target_modules,
            rank_pattern: Vec::new(),
            alpha_pattern: Vec::new(),
            use_rslora: false,
        }
    }

    fn list(names: &[&str]) -> TargetModules {
        TargetModules::List(names.iter().map(|s| (*s).to_string()).collect())
    }

    fn modules(layout: &AdapterLayout) -> Vec<String> {
        layout.sites.iter().map(|s| s.proj.module(s.layer)).collect()
    }

    #[test]
    fn a_list_matches_whole_names_and_endings_after_a_dot() {
        let layout = AdapterLayout::new(&config(list(&["q_proj", "layers.1.mlp.up_proj"])), &tiny()).unwrap();
        assert_eq!(
            modules(&layout),
            ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"]
        );
    }

    #[test]
    fn a_regex_must_match_the_whole_name() {
        let pattern = |p: &str| AdapterLayout::new(&config(TargetModules::Pattern(p.into())), &tiny());
        assert_eq!(modules(&pattern(r".*layers\.0.*v_proj").unwrap()), ["model.layers.0.self_attn.v_proj"]);
        let modules_of = modules(&pattern(r"(?!.*layers\.0).*\.(k|v)_proj").unwrap());
        assert_eq!(modules_of, ["model.layers.1.self_attn.k_proj", "model.layers.1.self_attn.v_proj"], "look-around");
        assert!(pattern("v_proj").is_err(), "an ending alone is no full match");
        assert_eq!(pattern("(").unwrap_err().exit_code(), 2);
    }

    #[test]
    fn all_linear_takes_every_projection_and_leaves_no_gap() {
        let layout = AdapterLayout::new(&config(TargetModules::Pattern("all-linear".into())), &tiny()).unwrap();
        assert_eq!(layout.sites.len(), 14);
        let mut end = 0;
        for s in &layout.sites {
            assert_eq!(s.a_range(), end..end + s.r * s.k);
            assert_eq!(s.b_range(), s.a_range().end..s.a_range().end + s.n * s.r);
            end = s.b_range().end;
        }
        assert_eq!(layout.len, end);
    }

    #[test]
    fn patterns_give_ranks_and_alphas_of_their_own() {
        let mut c = config(list(&["q_proj", "v_proj"]));
        c.rank_pattern = vec![("layers.1.self_attn.q_proj".into(), 4), ("^model.layers.0.self_attn.v_proj".into(), 2)];
        c.alpha_pattern = vec![("v_proj".into(), 32.0)];
        let layout = AdapterLayout::new(&c, &tiny()).unwrap();
        let seen: Vec<_> = layout.sites.iter().map(|s| (s.layer, s.proj, s.r, s.scale)).collect();
        assert_eq!(seen, [(0, Proj::Q, 8, 2.0), (0, Proj::V, 2, 16.0), (1, Proj::Q, 4, 4.0), (1, Proj::V, 8, 4.0)]);
    }

    #[test]
    fn rslora_divides_by_the_root_of_the_rank() {
        let mut c = config(list(&["q_proj"]));
        (c.r, c.use_rslora) = (16, true);
        assert_eq!(AdapterLayout::new(&c, &tiny()).unwrap().sites[0].scale, 4.0);
    }

    #[test]
    fn unknown_targets_and_ranks_out_of_range_are_errors() {
        for names in [&["lm_head"][..], &["q_proj", "typo_proj"], &[]] {
            assert_eq!(AdapterLayout::new(&config(list(names)), &tiny()).unwrap_err().exit_code(), 2, "{names:?}");
        }
        for r in [0, usize::MAX] {
            let c = LoraConfig { r, ..config(list(&["q_proj"])) };
            assert_eq!(AdapterLayout::new(&c, &tiny()).unwrap_err().exit_code(), 2, "{r}");
        }
    }

    #[test]
    fn a_fresh_adapter_has_bounded_a_and_zero_b_and_depends_on_the_seed_alone() {
        let init = |seed| HostAdapter::init(config(list(&["q_proj", "down_proj"])), &tiny(), seed).unwrap();
        let (one, again, other) = (init(1), init(1), init(2));
        assert_eq!(one, again);
        assert_ne!(one.weights, other.weights);
        for s in &one.layout.sites {
            let bound = 1.0 / (s.k as f32).sqrt();
            let a = &one.weights[s.a_range()];
            assert!(a.iter().all(|w| w.abs() <= bound) && a.iter().any(|w| w.abs() > 0.9 * bound));
            assert!(one.weights[s.b_range()].iter().all(|&w| w == 0.0));
        }
    }
}
