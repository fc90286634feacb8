//! The run file: every key of `halfbyte train`, named as PEFT, TRL, bitsandbytes and transformers name it.
//!
//! [`KEYS`] is made from the same text as [`TrainConfig`], so that the run file, the command-line flags and their help
//! cannot drift apart. Defaults are those of TRL's `SFTConfig`/`ModelConfig` except where a key's text says "TRL: …".

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use crate::error::{Error, Result};
use crate::model::TargetModules;
use crate::names::nearest;

/// What a key holds; tells the command line how to read a flag's text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Bool,
    /// A whole number.
    Int,
    /// Any number.
    Float,
    Text,
    Path,
    /// One path or a list of them.
    Paths,
    /// One text or a list of them.
    List,
    /// A map from module name (a regular expression) to number.
    Map,
    /// true, false, or a path.
    BoolOrPath,
}

impl Kind {
    /// What a value of this kind looks like, for error messages.
    pub fn expected(self) -> &'static str {
        match self {
            Self::Bool => "true or false",
            Self::Int => "a whole number",
            Self::Float => "a number",
            Self::Text => "a text",
            Self::Path => "a path",
            Self::Paths => "a path or a list of paths",
            Self::List => "a text or a list of texts",
            Self::Map => "a table of module name = number",
            Self::BoolOrPath => "true, false, or the path of a checkpoint",
        }
    }
}

/// One key of the run file.
#[derive(Clone, Copy, Debug)]
pub struct Key {
    pub name: &'static str,
    /// Other spellings that are taken.
    pub aliases: &'static [&'static str],
    pub kind: Kind,
    /// Lines of help, as in the documentation of the field.
    pub help: &'static [&'static str],
}

macro_rules! keys {
    ($( $(#[doc = $doc:literal])* $name:ident : $ty:ty = $default:expr, $kind:ident $(, $alias:literal)* ; )*) => {
        /// Settings of a training run. See [`KEYS`] for other spellings of a key.
        #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
        #[serde(default, deny_unknown_fields)]
        pub struct TrainConfig { $( $(#[doc = $doc])* pub $name: $ty, )* }

        impl Default for TrainConfig {
            fn default() -> Self {
                Self { $( $name: $default, )* }
            }
        }

        /// Every key, in the order of the documentation.
        pub const KEYS: &[Key] = &[ $( Key {
            name: stringify!($name), aliases: &[$($alias),*], kind: Kind::$kind, help: &[$($doc),*],
        }, )* ];
    };
}

keys! {
    /// Model directory: config.json, safetensors, tokenizer.json. 16/32-bit weights, or 4-bit ones of bitsandbytes.
    model: PathBuf = PathBuf::new(), Path, "model_name_or_path";
    /// Training data: JSONL files with `text`, `prompt` + `completion`, or `messages`.
    data: Vec<PathBuf> = vec![], Paths, "train_file", "dataset_name";
    /// Held-out data. Without it, `eval_fraction` of the training rows can be set aside.
    eval_data: Vec<PathBuf> = vec![], Paths, "validation_file";
    /// Share of the training rows held out for evaluation, by `seed`: 0 (none) to below 1.
    eval_fraction: f64 = 0.0, Float;
    /// Where the adapter, the checkpoints and metrics.jsonl go.
    out: PathBuf = PathBuf::new(), Path, "output_dir";
    /// Start afresh in an `out` that already holds a run: its checkpoints and metrics are removed.
    overwrite_output_dir: bool = false, Bool, "overwrite";
    /// Start from this PEFT adapter instead of a fresh one; its own LoRA settings hold.
    adapter: Option<PathBuf> = None, Path;
    /// Where tokenised data is kept between runs. Default: `.cache` in `out`.
    cache_dir: Option<PathBuf> = None, Path;

    /// Rank of the LoRA matrices.
    r: usize = 16, Int, "lora_r";
    /// LoRA scale: alpha / r (alpha / sqrt(r) with use_rslora).
    lora_alpha: f64 = 32.0, Float;
    /// Dropout on the input of A: 0 to below 1.
    lora_dropout: f64 = 0.05, Float;
    /// Modules to adapt: names, one regular expression, or "all-linear". TRL: PEFT's default for the model, often q_proj and v_proj alone.
    #[doc = "QLoRA adapts all seven projections, and so does this default."]
    target_modules: TargetModules = TargetModules::Pattern("all-linear".into()), List, "lora_target_modules";
    /// Ranks of single modules: a table of module name (or regular expression) = rank.
    rank_pattern: BTreeMap<String, usize> = BTreeMap::new(), Map;
    /// lora_alpha of single modules: a table of module name (or regular expression) = alpha.
    alpha_pattern: BTreeMap<String, f64> = BTreeMap::new(), Map;
    /// Scale by alpha / sqrt(r).
    use_rslora: bool = false, Bool;
    /// Learning rate of B over that of A (LoRA+). Default: none, the same for both.
    loraplus_lr_ratio: Option<f64> = None, Float;

    /// Put 16/32-bit projections into 4 bits while loading. TRL: false.
    load_in_4bit: bool = true, Bool;
    /// "nf4" or "fp4".
    bnb_4bit_quant_type: String = "nf4".into(), Text;
    /// Quantise the block scales too: 4.127 instead of 4.5 bits a weight. TRL: false.
    bnb_4bit_use_double_quant: bool = true, Bool, "use_bnb_nested_quant";

    /// Longest row in tokens, and the length of a packed row.
    max_length: usize = 1024, Int, "max_seq_length", "max_seq_len";
    /// Put several documents into a row of max_length; they never see each other.
    packing: bool = false, Bool;
    /// What to do with a document longer than max_length: "error", "drop", "truncate" or "split". TRL: truncate.
    overlong: String = "error".into(), Text;
    /// Loss on the completion of prompt + completion rows only. Default: true for such rows.
    completion_only_loss: Option<bool> = None, Bool;
    /// Loss on the assistant's turns of `messages` rows only. TRL: false.
    assistant_only_loss: bool = true, Bool;

    /// Peak learning rate. TRL: 2e-5, meant for full fine-tuning.
    learning_rate: f64 = 2e-4, Float;
    /// "linear", "cosine", "constant" or "constant_with_warmup".
    lr_scheduler_type: String = "linear".into(), Text;
    /// Share of all steps over which the learning rate rises from 0. warmup_steps goes first.
    warmup_ratio: f64 = 0.0, Float;
    /// Steps over which the learning rate rises from 0; below 1, a share of all steps.
    warmup_steps: f64 = 0.0, Float;
    /// Decoupled weight decay, on A and B alike.
    weight_decay: f64 = 0.0, Float;
    /// AdamW's beta1.
    adam_beta1: f64 = 0.9, Float;
    /// AdamW's beta2.
    adam_beta2: f64 = 0.999, Float;
    /// AdamW's epsilon.
    adam_epsilon: f64 = 1e-8, Float;
    /// Clip the gradient to this global norm; 0: no clipping.
    max_grad_norm: f64 = 1.0, Float;
    /// "paged_adamw_32bit", "paged_adamw_8bit" (moments in 8 bits) or "adamw_torch" (as the first). TRL: adamw_torch_fused.
    optim: String = "paged_adamw_32bit".into(), Text;

    /// Passes over the data; a fraction is allowed.
    num_train_epochs: f64 = 3.0, Float;
    /// Optimizer steps; overrides num_train_epochs unless -1.
    max_steps: i64 = -1, Int;
    /// Rows of a micro-batch.
    per_device_train_batch_size: usize = 8, Int;
    /// Rows of an evaluation batch (fewer where they would take more memory than training does).
    per_device_eval_batch_size: usize = 8, Int;
    /// Micro-batches of an optimizer step; the last step of an epoch may have fewer.
    gradient_accumulation_steps: usize = 1, Int;
    /// true: keep only each layer's input and recompute the rest in backward; false: recompute nothing. Default: on a GPU the fastest that fits, on the CPU true. TRL: true.
    #[doc = "The same bits in any case."]
    gradient_checkpointing: Option<bool> = None, Bool;
    /// Device memory that the run may take, such as "24GiB". Default: what the GPU has free. No limit on the CPU.
    memory: Option<String> = None, Text;
    /// Pinned host memory that activations may take. Default: half of what is available.
    host_memory: Option<String> = None, Text;

    /// Steps between two lines of metrics; below 1, a share of all steps.
    logging_steps: f64 = 10.0, Float;
    /// Log the first step too.
    logging_first_step: bool = false, Bool;
    /// "no", "steps" or "epoch". Default: "steps" if eval_steps is set, else "epoch" if there is held-out data. TRL: no.
    eval_strategy: Option<String> = None, Text, "evaluation_strategy";
    /// Steps between two evaluations; below 1, a share of all steps. Default: logging_steps.
    eval_steps: Option<f64> = None, Float;
    /// Evaluate before step 1 too.
    eval_on_start: bool = false, Bool;
    /// "no", "steps" or "epoch".
    save_strategy: String = "steps".into(), Text;
    /// Steps between two checkpoints; below 1, a share of all steps.
    save_steps: f64 = 500.0, Float;
    /// Checkpoints to keep: the newest, and always the best. Default: all.
    save_total_limit: Option<usize> = None, Int;
    /// Take the adapter from the checkpoint with the lowest held-out loss.
    load_best_model_at_end: bool = false, Bool;
    /// Where metrics go besides metrics.jsonl: "none" or "tensorboard".
    report_to: Vec<String> = vec![], List;

    /// Covers adapter init, shuffle, dropout and the split.
    seed: u64 = 42, Int;
    /// Continue from a checkpoint: true takes the newest valid one in `out` (none there: start at step 1), a path that one.
    resume: Resume = Resume::Latest(false), BoolOrPath, "resume_from_checkpoint";
    /// "auto", "cpu" or "cuda".
    device: String = "auto".into(), Text;
    /// CPU threads. Default: as many as the machine has.
    threads: Option<usize> = None, Int;
}

/// `resume`: whether and from where a run continues.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Resume {
    /// true: the newest valid checkpoint in `out`; false: start afresh.
    Latest(bool),
    /// This checkpoint.
    From(PathBuf),
}

/// All names that the run file knows, aliases included.
pub fn known_keys() -> impl Iterator<Item = &'static str> {
    KEYS.iter().flat_map(|k| std::iter::once(k.name).chain(k.aliases.iter().copied()))
}

/// The key of a name or an alias.
pub fn find_key(name: &str) -> Option<&'static Key> {
    KEYS.iter().find(|k| k.name == name || k.aliases.contains(&name))
}

/// The known name nearest to `name`, if any is near.
pub fn nearest_key(name: &str) -> Option<&'static str> {
    nearest(name, known_keys()).first().copied()
}

impl TrainConfig {
    /// Reads a run file. Relative paths in it are relative to the working directory, as those of flags are.
    /// Errors name the file with line and column, or the key.
    pub fn read_table(file: &Path) -> Result<Table> {
        let text = std::fs::read_to_string(file).map_err(Error::read("read the run file", file))?;
        let table: Table = toml::from_str(&text).map_err(|e| {
            let start = e.span().map_or(0, |s| s.start.min(text.len()));
            let line = text.as_bytes()[..start].iter().filter(|&&b| b == b'\n').count() + 1;
            Error::input(file, format!("line {line}"), e.message().to_string(), "TOML (key = value)")
        })?;
        for name in table.keys() {
            if find_key(name).is_none() {
                return Err(unknown(Some(file), name));
            }
        }
        Ok(table)
    }

    /// Makes a configuration of a table of keys (run file, then flags laid over it with [`set`]) and checks it.
    pub fn from_table(table: &Table) -> Result<Self> {
        let mut canonical = Table::new();
        for (name, value) in table {
            let key = find_key(name).ok_or_else(|| unknown(None, name))?;
            let wrong = |e: String| Error::flag(key.name, format!("{value} ({e})"), key.kind.expected());
            let value = key.normalise(value.clone()).ok_or_else(|| wrong("wrong type".into()))?;
            // One key at a time, so that an error can name it.
            let alone = Table::from_iter([(key.name.to_string(), value.clone())]);
            Self::deserialize(alone).map_err(|e| wrong(e.message().trim().to_string()))?;
            if canonical.insert(key.name.into(), value).is_some() {
                return Err(Error::flag(key.name, format!("the same key twice (as {name})"), "one of its spellings"));
            }
        }
        let config = Self::deserialize(canonical).map_err(|e| Error::flag("run file", e.to_string(), "known keys"))?;
        config.validate()?;
        Ok(config)
    }
}

/// Lays the text of a flag over a table, replacing any other spelling of its key.
pub fn set(table: &mut Table, name: &str, text: &str) -> Result<()> {
    let key = find_key(name).ok_or_else(|| unknown(None, name))?;
    let value = key.parse(text).ok_or_else(|| Error::flag(key.name, format!("{text:?}"), key.kind.expected()))?;
    for other in std::iter::once(&key.name).chain(key.aliases) {
        table.remove(*other);
    }
    table.insert(key.name.into(), value);
    Ok(())
}

fn unknown(file: Option<&Path>, name: &str) -> Error {
    let hint = match nearest_key(name) {
        Some(near) => format!("a known key; the nearest is {near:?}"),
        None => "a known key (halfbyte train --help lists them)".into(),
    };
    match file {
        Some(file) => Error::input(file, format!("key {name:?}"), "an unknown key", hint),
        None => Error::flag(name, "an unknown key", hint),
    }
}

impl Key {
    /// The value of a flag's text; None if it is not of this key's kind.
    pub fn parse(&self, text: &str) -> Option<Value> {
        let list = |text: &str| Value::Array(text.split(',').map(|s| Value::String(s.trim().into())).collect());
        Some(match self.kind {
            Kind::Bool => Value::Boolean(text.parse().ok()?),
            Kind::Int => Value::Integer(text.parse().ok()?),
            Kind::Float => Value::Float(text.parse().ok()?),
            Kind::Text | Kind::Path => Value::String(text.into()),
            Kind::Paths => Value::Array(vec![Value::String(text.into())]),
            // "q_proj,v_proj" is a list; a text without a comma stays one: it may be a regular expression.
            Kind::List if text.contains(',') => list(text),
            Kind::List => Value::String(text.into()),
            Kind::Map => Value::Table(toml::from_str(&text.replace(',', "\n")).ok()?),
            Kind::BoolOrPath => text.parse().map_or_else(|_| Value::String(text.into()), Value::Boolean),
        })
    }

    /// Widens what users may write: one text where a list is meant, a whole number where any number is.
    fn normalise(&self, value: Value) -> Option<Value> {
        let value = match (self.kind, value) {
            (Kind::Paths, v @ Value::String(_)) => Value::Array(vec![v]),
            (Kind::List, Value::String(s)) if self.name == "report_to" => match s.as_str() {
                "none" => Value::Array(vec![]),
                _ => Value::Array(vec![Value::String(s)]),
            },
            (Kind::Float, Value::Integer(i)) => Value::Float(i as f64),
            (Kind::Map, Value::Table(t)) if self.name == "alpha_pattern" => {
                let widen = |v| if let Value::Integer(i) = v { Value::Float(i as f64) } else { v };
                Value::Table(t.into_iter().map(|(k, v)| (k, widen(v))).collect())
            }
            (Kind::Int, v @ Value::Integer(_)) => v,
            (Kind::Int, _) => return None,
            (_, v) => v,
        };
        Some(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<TrainConfig> {
        TrainConfig::from_table(&toml::from_str(text).unwrap())
    }

    fn message(text: &str) -> String {
        let e = parse(text).unwrap_err();
        assert_eq!(e.exit_code(), 2);
        e.to_string()
    }

    #[test]
    fn every_key_has_help_and_a_name_of_its_own() {
        let mut names: Vec<_> = known_keys().collect();
        names.sort_unstable();
        let count = names.len();
        names.dedup();
        assert_eq!(names.len(), count);
        assert!(KEYS.iter().all(|k| k.help.iter().any(|h| !h.trim().is_empty())));
    }

    #[test]
    fn the_defaults_are_valid_and_survive_a_round_trip() {
        let config = TrainConfig::default();
        config.validate().unwrap();
        let table = Table::try_from(&config).unwrap();
        assert_eq!(TrainConfig::from_table(&table).unwrap(), config);
    }

    #[test]
    fn a_run_file_in_peft_and_trl_terms_is_read() {
        let c = parse(
            r#"
            model_name_or_path = "m"
            data = "a.jsonl"
            output_dir = "o"
            lora_r = 8
            lora_alpha = 16
            target_modules = ["q_proj", "v_proj"]
            rank_pattern = { "layers.0.q_proj" = 4 }
            alpha_pattern = { q_proj = 2 }
            resume_from_checkpoint = true
            report_to = "tensorboard"
            warmup_steps = 5
            "#,
        )
        .unwrap();
        assert_eq!((c.r, c.lora_alpha, c.warmup_steps), (8, 16.0, 5.0));
        assert_eq!(c.data, [PathBuf::from("a.jsonl")]);
        assert_eq!(c.target_modules, TargetModules::List(vec!["q_proj".into(), "v_proj".into()]));
        assert_eq!(c.lora().alpha_pattern, [("q_proj".to_string(), 2.0)]);
        assert_eq!(c.resume, Resume::Latest(true));
        assert_eq!(c.report_to, ["tensorboard"]);
    }

    #[test]
    fn an_unknown_key_suggests_the_nearest() {
        let e = message("learning_rat = 1");
        assert!(e.contains("learning_rat") && e.contains("\"learning_rate\""), "{e}");
        assert_eq!(nearest_key("lora_droput"), Some("lora_dropout"));
        assert_eq!(nearest_key("zzz"), None);
        assert!(!message("zzz = 1").contains("nearest"));
    }

    #[test]
    fn a_run_file_error_names_file_and_line() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("run.toml");
        std::fs::write(&file, "r = 8\nseed = = 3\n").unwrap();
        let e = TrainConfig::read_table(&file).unwrap_err().to_string();
        assert!(e.contains("run.toml") && e.contains("line 2"), "{e}");
        std::fs::write(&file, "max_step = 3\n").unwrap();
        let e = TrainConfig::read_table(&file).unwrap_err().to_string();
        assert!(e.contains("run.toml") && e.contains("\"max_steps\""), "{e}");
        assert_eq!(TrainConfig::read_table(Path::new("missing.toml")).unwrap_err().exit_code(), 2);
    }

    #[test]
    fn a_value_of_the_wrong_type_or_range_names_key_and_expectation() {
        for (text, key, expected) in [
            ("r = \"8\"", "r: ", "whole number"),
            ("r = 0", "r: ", "at least 1"),
            ("r = -1", "r: ", "whole number"),
            ("seed = 1.5", "seed: ", "whole number"),
            ("lora_dropout = 1.0", "lora_dropout: ", "below 1"),
            ("learning_rate = \"fast\"", "learning_rate: ", "number"),
            ("learning_rate = nan", "learning_rate: ", "at least 0"),
            ("packing = 1", "packing: ", "true or false"),
            ("optim = \"sgd\"", "optim: ", "paged_adamw_32bit, paged_adamw_8bit, paged_adamw"),
            ("lr_scheduler_type = \"poly\"", "lr_scheduler_type: ", "cosine"),
            ("bnb_4bit_quant_type = \"int4\"", "bnb_4bit_quant_type: ", "nf4, fp4"),
            ("overlong = \"cut\"", "overlong: ", "truncate"),
            ("max_steps = 0", "max_steps: ", "-1, or at least 1"),
            ("logging_steps = 0", "logging_steps: ", "at least 1"),
            ("save_steps = 2.5", "save_steps: ", "whole number"),
            ("eval_strategy = \"steps\"", "eval_strategy: ", "eval_data"),
            ("eval_steps = 5", "eval_steps: ", "eval_data"),
            ("eval_fraction = 1.0", "eval_fraction: ", "below 1"),
            ("eval_fraction = 0.5\neval_data = \"x\"", "eval_fraction: ", "one of"),
            ("load_best_model_at_end = true", "load_best_model_at_end: ", "eval_data"),
            ("report_to = [\"wandb\"]", "report_to: ", "tensorboard"),
            ("r = 8\nlora_r = 8", "r: ", "one of its spellings"),
            ("target_modules = 3", "target_modules: ", "list of texts"),
        ] {
            let e = message(text);
            assert!(e.starts_with(key) && e.contains(expected), "{text}: {e}");
        }
    }

    #[test]
    fn load_best_model_at_end_needs_an_evaluation_with_every_checkpoint() {
        let with = |rest: &str| parse(&format!("load_best_model_at_end = true\neval_data = \"e\"\n{rest}"));
        assert!(with("eval_steps = 10\nsave_steps = 20").is_ok());
        assert!(with("eval_steps = 10\nsave_steps = 25").is_err());
        assert!(with("save_strategy = \"epoch\"").is_ok());
        assert!(with("save_steps = 7").is_ok(), "eval_strategy follows save_strategy");
        assert!(with("save_strategy = \"no\"").is_err());
    }

    #[test]
    fn flags_lie_over_the_file_whatever_their_spelling() {
        let mut table: Table = toml::from_str("lora_r = 8\nlearning_rate = 1e-3").unwrap();
        set(&mut table, "r", "4").unwrap();
        set(&mut table, "learning_rate", "2e-4").unwrap();
        set(&mut table, "lora_target_modules", "q_proj,v_proj").unwrap();
        set(&mut table, "target_modules", "q_proj, k_proj").unwrap();
        set(&mut table, "rank_pattern", "q_proj=2,v_proj=3").unwrap();
        set(&mut table, "resume", "out/checkpoint-3").unwrap();
        set(&mut table, "eval_steps", "5").unwrap();
        set(&mut table, "eval_data", "e.jsonl").unwrap();
        let c = TrainConfig::from_table(&table).unwrap();
        assert_eq!((c.r, c.learning_rate, c.eval_steps), (4, 2e-4, Some(5.0)));
        assert_eq!(c.target_modules, TargetModules::List(vec!["q_proj".into(), "k_proj".into()]));
        assert_eq!(c.rank_pattern.into_iter().collect::<Vec<_>>(), [("q_proj".into(), 2), ("v_proj".into(), 3)]);
        assert_eq!(c.resume, Resume::From("out/checkpoint-3".into()));
        assert!(set(&mut table, "r", "many").unwrap_err().to_string().contains("whole number"));
        assert!(set(&mut table, "rr", "1").is_err());
    }

    /// docs/run-file.md is written by hand; this holds it to the keys and defaults of the code, both ways.
    #[test]
    fn the_page_on_the_run_file_has_every_key_with_its_default() {
        let page = include_str!("../../docs/run-file.md");
        let rows: BTreeMap<&str, &str> = page
            .lines()
            .filter_map(|line| line.strip_prefix("| `")?.split_once("` |"))
            .filter_map(|(key, rest)| Some((key, rest.split_once(" |")?.0.trim().trim_matches('`'))))
            .collect();
        // The tables of files further down have rows of the same shape.
        let is_key = |key: &&&str| key.chars().all(|c| c == '_' || c.is_ascii_alphanumeric());
        let number = |v: &toml::Value| v.as_float().or(v.as_integer().map(|i| i as f64));
        let defaults = toml::Table::try_from(TrainConfig::default()).unwrap();
        for key in KEYS {
            let cell = *rows.get(key.name).unwrap_or_else(|| panic!("no row for {}", key.name));
            let default = defaults.get(key.name).filter(|v| {
                v.as_str() != Some("")
                    && !v.as_array().is_some_and(Vec::is_empty)
                    && !v.as_table().is_some_and(|t| t.is_empty())
            });
            let Some(default) = default else {
                assert!(["", "required"].contains(&cell), "{}: {cell:?}, but it has no default", key.name);
                continue;
            };
            let said: toml::Table = format!("x = {cell}").parse().unwrap_or_else(|e| panic!("{}: {e}", key.name));
            match (number(&said["x"]), number(default)) {
                (Some(a), Some(b)) => assert_eq!(a as f32, b as f32, "{}", key.name),
                _ => assert_eq!(&said["x"], default, "{}", key.name),
            }
        }
        for key in rows.keys().filter(is_key) {
            assert!(find_key(key).is_some(), "docs/run-file.md has {key}, which is no key");
        }
    }
}
