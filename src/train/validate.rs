//! Ranges of the run file's keys, and the typed values that its texts stand for.

use super::config::TrainConfig;
use super::schedule::SchedulerType;
use crate::backend::OptimKind;
use crate::error::{Error, Result};
use crate::memory::parse_size;
use crate::model::LoraConfig;
use crate::nf4::QuantType;

/// When something that repeats during training happens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Every {
    No,
    /// That many steps; below 1, a share of all steps.
    Steps(f64),
    Epoch,
}

impl Every {
    /// Whether it is due after step `step` (from 1) of `total`; `epoch_end`: the step was the last of its epoch.
    pub fn due(self, step: u64, total: u64, epoch_end: bool) -> bool {
        match self {
            Self::No => false,
            Self::Steps(n) => step.is_multiple_of(resolve(n, total)),
            Self::Epoch => epoch_end,
        }
    }
}

/// Steps that a count or, below 1, a share of `total` stands for: at least 1.
pub fn resolve(n: f64, total: u64) -> u64 {
    (if n < 1.0 { (n * total as f64).ceil() } else { n } as u64).max(1)
}

fn require(holds: bool, key: &str, found: impl std::fmt::Display, expected: &str) -> Result<()> {
    if holds { Ok(()) } else { Err(Error::flag(key, found.to_string(), expected)) }
}

fn choice<T: Copy>(key: &str, found: &str, choices: &[(&str, T)]) -> Result<T> {
    choices.iter().find(|(name, _)| *name == found).map(|&(_, v)| v).ok_or_else(|| {
        let mut names: Vec<&str> = choices.iter().map(|c| c.0).collect();
        names.dedup();
        Error::flag(key, format!("{found:?}"), format!("one of {}", names.join(", ")))
    })
}

impl TrainConfig {
    /// Checks every range. `model`, `data` and `out` may still be empty: [`TrainConfig::require_paths`].
    pub fn validate(&self) -> Result<()> {
        let positive = |key: &str, v: usize| require(v >= 1, key, v, "a whole number of at least 1");
        let share = |key: &str, v: f64| require((0.0..1.0).contains(&v), key, v, "a number from 0 to below 1");
        let above_zero = |key: &str, v: f64| require(v > 0.0 && v.is_finite(), key, v, "a number above 0");
        let not_negative = |key: &str, v: f64| require(v >= 0.0 && v.is_finite(), key, v, "a number of at least 0");
        positive("r", self.r)?;
        positive("max_length", self.max_length)?;
        positive("per_device_train_batch_size", self.per_device_train_batch_size)?;
        positive("per_device_eval_batch_size", self.per_device_eval_batch_size)?;
        positive("gradient_accumulation_steps", self.gradient_accumulation_steps)?;
        for (key, text) in [("memory", &self.memory), ("host_memory", &self.host_memory)] {
            text.as_ref().map(|text| parse_size(key, text)).transpose()?;
        }
        if let Some(n) = self.save_total_limit {
            positive("save_total_limit", n)?;
        }
        if let Some(n) = self.threads {
            positive("threads", n)?;
        }
        above_zero("lora_alpha", self.lora_alpha)?;
        share("lora_dropout", f64::from(self.lora_dropout as f32))?;
        if let Some(ratio) = self.loraplus_lr_ratio {
            above_zero("loraplus_lr_ratio", ratio)?;
        }
        share("eval_fraction", self.eval_fraction)?;
        require(
            self.eval_fraction == 0.0 || self.eval_data.is_empty(),
            "eval_fraction",
            format!("{} beside eval_data", self.eval_fraction),
            "one of eval_fraction and eval_data",
        )?;
        not_negative("learning_rate", self.learning_rate)?;
        require((0.0..=1.0).contains(&self.warmup_ratio), "warmup_ratio", self.warmup_ratio, "a number from 0 to 1")?;
        let whole = |v: f64| v.is_finite() && v >= 0.0 && (v < 1.0 || v.fract() == 0.0);
        let steps = "a whole number of steps, or a share from 0 to below 1";
        require(whole(self.warmup_steps), "warmup_steps", self.warmup_steps, steps)?;
        for (key, value) in [
            ("logging_steps", self.logging_steps),
            ("save_steps", self.save_steps),
            ("eval_steps", self.eval_steps.unwrap_or(1.0)),
        ] {
            require(
                whole(value) && value > 0.0,
                key,
                value,
                "a whole number of at least 1, or a share between 0 and 1",
            )?;
        }
        not_negative("weight_decay", self.weight_decay)?;
        share("adam_beta1", self.adam_beta1)?;
        share("adam_beta2", self.adam_beta2)?;
        above_zero("adam_epsilon", self.adam_epsilon)?;
        not_negative("max_grad_norm", self.max_grad_norm)?;
        above_zero("num_train_epochs", self.num_train_epochs)?;
        require(self.max_steps == -1 || self.max_steps > 0, "max_steps", self.max_steps, "-1, or at least 1")?;
        self.quant_type()?;
        self.scheduler_type()?;
        self.optim_kind()?;
        choice("overlong", &self.overlong, &[("error", ()), ("drop", ()), ("truncate", ()), ("split", ())])?;
        choice("device", &self.device, &[("auto", ()), ("cpu", ()), ("cuda", ())])?;
        for name in &self.report_to {
            choice("report_to", name, &[("none", ()), ("tensorboard", ())])?;
        }
        self.saving()?;
        self.evaluating()?;
        if self.load_best_model_at_end {
            self.check_best()?;
        }
        Ok(())
    }

    /// Checks that `model`, `data` and `out` are set.
    pub fn require_paths(&self) -> Result<()> {
        require(!self.model.as_os_str().is_empty(), "model", "nothing", "a model directory")?;
        require(!self.data.is_empty(), "data", "nothing", "one or more JSONL files")?;
        require(!self.out.as_os_str().is_empty(), "out", "nothing", "a directory to write to")
    }

    /// The best checkpoint can only be loaded if each checkpoint comes with an evaluation (as transformers demands).
    fn check_best(&self) -> Result<()> {
        let key = "load_best_model_at_end";
        require(self.has_eval_data(), key, "true without held-out data", "eval_data or eval_fraction")?;
        let fits = match (self.saving()?, self.evaluating()?) {
            (Every::Epoch, Every::Epoch) => true,
            (Every::Steps(s), Every::Steps(e)) if s >= 1.0 && e >= 1.0 => s % e == 0.0,
            (Every::Steps(s), Every::Steps(e)) => s == e,
            _ => false,
        };
        require(
            fits,
            key,
            "true, but checkpoints are saved without an evaluation",
            "eval_strategy equal to save_strategy, and save_steps a multiple of eval_steps",
        )
    }

    /// Whether rows are held out, from a file or by share.
    pub fn has_eval_data(&self) -> bool {
        !self.eval_data.is_empty() || self.eval_fraction > 0.0
    }

    /// When checkpoints are saved.
    pub fn saving(&self) -> Result<Every> {
        let steps = Every::Steps(self.save_steps);
        choice("save_strategy", &self.save_strategy, &[("no", Every::No), ("steps", steps), ("epoch", Every::Epoch)])
    }

    /// When the held-out rows are evaluated.
    pub fn evaluating(&self) -> Result<Every> {
        let steps = Every::Steps(self.eval_steps.unwrap_or(self.logging_steps));
        if let (false, Some(n)) = (self.has_eval_data(), self.eval_steps) {
            return Err(Error::flag("eval_steps", format!("{n} without held-out data"), "eval_data or eval_fraction"));
        }
        let unset = match (self.has_eval_data(), self.eval_steps, self.load_best_model_at_end) {
            (false, ..) => Every::No,
            (_, Some(_), _) => steps,
            // Each checkpoint needs its evaluation.
            (_, None, true) => self.saving()?,
            (_, None, false) => Every::Epoch,
        };
        let Some(name) = &self.eval_strategy else { return Ok(unset) };
        let every = choice("eval_strategy", name, &[("no", Every::No), ("steps", steps), ("epoch", Every::Epoch)])?;
        require(
            every == Every::No || self.has_eval_data(),
            "eval_strategy",
            format!("{name:?} without held-out data"),
            "eval_data or eval_fraction",
        )?;
        Ok(every)
    }

    /// `lr_scheduler_type`.
    pub fn scheduler_type(&self) -> Result<SchedulerType> {
        choice(
            "lr_scheduler_type",
            &self.lr_scheduler_type,
            &[
                ("linear", SchedulerType::Linear),
                ("cosine", SchedulerType::Cosine),
                ("constant", SchedulerType::Constant),
                ("constant_with_warmup", SchedulerType::ConstantWithWarmup),
            ],
        )
    }

    /// `optim`.
    pub fn optim_kind(&self) -> Result<OptimKind> {
        choice(
            "optim",
            &self.optim,
            &[
                ("paged_adamw_32bit", OptimKind::PagedAdamw32bit),
                ("paged_adamw_8bit", OptimKind::PagedAdamw8bit),
                ("paged_adamw", OptimKind::PagedAdamw32bit),
                ("adamw_torch", OptimKind::AdamwTorch),
                ("adamw_torch_fused", OptimKind::AdamwTorch),
            ],
        )
    }

    /// `bnb_4bit_quant_type`.
    pub fn quant_type(&self) -> Result<QuantType> {
        choice("bnb_4bit_quant_type", &self.bnb_4bit_quant_type, &[("nf4", QuantType::Nf4), ("fp4", QuantType::Fp4)])
    }

    /// The LoRA settings of a fresh adapter.
    pub fn lora(&self) -> LoraConfig {
        LoraConfig {
            r: self.r,
            lora_alpha: self.lora_alpha,
            lora_dropout: self.lora_dropout as f32,
            target_modules: self.target_modules.clone(),
            rank_pattern: self.rank_pattern.iter().map(|(k, &v)| (k.clone(), v)).collect(),
            alpha_pattern: self.alpha_pattern.iter().map(|(k, &v)| (k.clone(), v)).collect(),
            use_rslora: self.use_rslora,
        }
    }
}
