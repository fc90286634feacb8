//! What a checkpoint keeps for the loop, and whether a run may continue from it.
//!
//! A resumed run is the uninterrupted one, bit for bit. So whatever decides the bits (settings, rows, base weights) must
//! be what it was; where it is not, the error names the key.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use toml::Table;

use super::config::{Resume, TrainConfig};
use super::schedule::Schedule;
use super::ui::Ui;
use crate::checkpoint::state::{self, TrainingState};
use crate::data::Row;
use crate::error::{Error, Result};
use crate::model::ModelConfig;

/// The loop's part of a checkpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainerState {
    /// The run file: the TOML text of each key that is set.
    pub config: BTreeMap<String, String>,
    pub fingerprints: Fingerprints,
    /// Steps of the whole run.
    pub total_steps: u64,
    /// Epochs done.
    pub epoch: f64,
    /// Input tokens so far.
    pub tokens: u64,
    /// Sum of the losses since the last line of metrics, and of how many steps.
    #[serde(with = "bits")]
    pub loss_sum: f64,
    pub loss_steps: u64,
    /// The saved step with the lowest held-out loss.
    pub best: Option<Best>,
    /// The run was stopped between this step and the evaluation that follows it.
    pub eval_pending: bool,
}

/// A saved step and its held-out loss.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Best {
    pub step: u64,
    #[serde(with = "bits")]
    pub eval_loss: f64,
}

/// SHA-256 of what a run reads.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Fingerprints {
    /// Of the safetensors files: names, sizes, and the first and last MiB of each.
    pub model: String,
    /// Of all tokens and targets.
    pub train_rows: String,
    pub eval_rows: String,
}

/// An f64 as the hexadecimal of its bits: decimal text may come back a bit off.
mod bits {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub fn serialize<S: Serializer>(x: &f64, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&format!("{:016x}", x.to_bits()))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<f64, D::Error> {
        u64::from_str_radix(&String::deserialize(d)?, 16).map(f64::from_bits).map_err(D::Error::custom)
    }
}

/// Keys that decide the bits of a run, apart from those of the schedule.
const FIXED: &[&str] = &[
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "loraplus_lr_ratio",
    "load_in_4bit",
    "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant",
    "max_length",
    "packing",
    "overlong",
    "completion_only_loss",
    "assistant_only_loss",
    "eval_fraction",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "optim",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "seed",
];

/// Keys that decide the learning rates. They may change as long as every step done had the rate it would have now.
const SCHEDULE: &[&str] =
    &["learning_rate", "lr_scheduler_type", "warmup_ratio", "warmup_steps", "max_steps", "num_train_epochs"];

/// The TOML text of each key that is set.
pub fn config_texts(config: &TrainConfig) -> BTreeMap<String, String> {
    // A config of plain values always makes a table.
    let table = Table::try_from(config).unwrap_or_default();
    table.into_iter().map(|(key, value)| (key, value.to_string())).collect()
}

impl TrainerState {
    /// The loop's part of a checkpoint in `dir`. Errors: not one.
    pub fn read(dir: &Path, state: &TrainingState) -> Result<Self> {
        serde_json::from_value(state.trainer.clone()).map_err(|e| {
            Error::input(
                dir.join(state::TRAINER),
                "trainer",
                e.to_string(),
                "what the training loop of this version keeps",
            )
        })
    }

    /// Whether a run with `config` may continue from here, at step `step`. Errors name the key that differs.
    pub fn check_config(&self, config: &TrainConfig, step: u64) -> Result<()> {
        let now = config_texts(config);
        let text = |map: &BTreeMap<String, String>, key: &str| map.get(key).cloned().unwrap_or_else(|| "unset".into());
        let differs = |key: &&&str| text(&now, key) != text(&self.config, key);
        let wrong = |key: &str| {
            let was = text(&self.config, key);
            Error::flag(key, text(&now, key), format!("{was}, as in the run that is resumed"))
        };
        if let Some(key) = FIXED.iter().find(differs) {
            return Err(wrong(key));
        }
        if let Some(key) = SCHEDULE.iter().find(differs) {
            let text: String = self.config.iter().map(|(k, v)| format!("{k} = {v}\n")).collect();
            let old = toml::from_str(&text).ok().and_then(|table: Table| TrainConfig::from_table(&table).ok());
            let Some(old) = old else { return Err(wrong(key)) };
            // The new total follows from the new keys: epochs of the same rows have as many steps as before.
            let total = match config.max_steps {
                n if n > 0 => n as f64,
                _ if old.max_steps > 0 => return Err(wrong(key)),
                _ => (config.num_train_epochs * self.total_steps as f64 / old.num_train_epochs).ceil(),
            };
            if !Schedule::new(config, total as u64)?.agrees(&Schedule::new(&old, self.total_steps)?, step) {
                return Err(wrong(key));
            }
        }
        Ok(())
    }

    /// Whether rows and base weights are those of the checkpoint. Errors name the key.
    pub fn check_inputs(&self, now: &Fingerprints) -> Result<()> {
        let was = &self.fingerprints;
        for (key, now, was) in [
            ("model", &now.model, &was.model),
            ("data", &now.train_rows, &was.train_rows),
            ("eval_data", &now.eval_rows, &was.eval_rows),
        ] {
            if now != was {
                let short = |hash: &String| hash.chars().take(12).collect::<String>();
                let what = if key == "model" { "weights" } else { "rows" };
                return Err(Error::flag(
                    key,
                    format!("{what} with SHA-256 {}…", short(now)),
                    format!("the {what} of the run that is resumed (SHA-256 {}…)", short(was)),
                ));
            }
        }
        Ok(())
    }
}

/// The checkpoint that `resume` asks for, if there is one. A newest checkpoint that does not load is passed over with a
/// note. Errors: the named checkpoint is faulty; every checkpoint in `out` is; a named one is older than the newest in
/// `out`, whose metrics would then go astray.
pub fn find(config: &TrainConfig, model: &ModelConfig, ui: &mut dyn Ui) -> Result<Option<(PathBuf, TrainingState)>> {
    match &config.resume {
        Resume::Latest(false) => Ok(None),
        Resume::From(path) => {
            let found = state::load(path, model)?;
            if let Some(newest) = state::latest(&config.out)
                && state::load(&newest, model).is_ok_and(|s| s.step > found.step)
            {
                return Err(Error::flag(
                    "resume",
                    format!("{}, older than {}", path.display(), newest.display()),
                    "the newest checkpoint, or another out",
                ));
            }
            Ok(Some((path.clone(), found)))
        }
        Resume::Latest(true) => {
            let mut first_fault = None;
            for (_, path) in state::checkpoints(&config.out).into_iter().rev() {
                match state::load(&path, model) {
                    Ok(found) => return Ok(Some((path, found))),
                    Err(e) => {
                        ui.note(&format!("passing over {}: {e}", path.display()));
                        first_fault.get_or_insert(e);
                    }
                }
            }
            match first_fault {
                Some(e) => Err(e),
                None => {
                    ui.note(&format!("no checkpoint in {}: starting at step 1", config.out.display()));
                    Ok(None)
                }
            }
        }
    }
}

/// SHA-256 over tokens, targets and borders of all rows, in order.
pub fn rows_fingerprint(rows: &[Row]) -> String {
    let mut hash = Sha256::new();
    for row in rows {
        for list in [&row.batch.tokens, &row.batch.targets, &row.batch.cu_seqlens] {
            hash.update((list.len() as u64).to_le_bytes());
            hash.update(bytemuck::cast_slice::<i32, u8>(list));
        }
    }
    hex(hash)
}

/// See [`Fingerprints::model`]: a whole 7B model would take a minute to read.
pub fn model_fingerprint(dir: &Path) -> Result<String> {
    const END: u64 = 1 << 20;
    let mut files: Vec<PathBuf> = fs::read_dir(dir)
        .and_then(|entries| entries.map(|e| e.map(|e| e.path())).collect::<io::Result<_>>())
        .map_err(Error::read("list", dir))?;
    files.retain(|f| f.extension().is_some_and(|e| e == "safetensors"));
    files.sort();
    let mut hash = Sha256::new();
    for path in files {
        let ends = || -> io::Result<(u64, Vec<u8>)> {
            let mut file = File::open(&path)?;
            let len = file.metadata()?.len();
            let mut bytes = vec![];
            (&mut file).take(END).read_to_end(&mut bytes)?;
            file.seek(SeekFrom::Start(len.saturating_sub(END).max(bytes.len() as u64)))?;
            file.read_to_end(&mut bytes)?;
            Ok((len, bytes))
        };
        let (len, bytes) = ends().map_err(Error::read("read", &path))?;
        hash.update(path.file_name().unwrap_or_default().as_encoded_bytes());
        hash.update(len.to_le_bytes());
        hash.update(bytes);
    }
    Ok(hex(hash))
}

fn hex(hash: Sha256) -> String {
    hash.finalize().iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(config: &TrainConfig) -> TrainerState {
        TrainerState {
            config: config_texts(config),
            fingerprints: Fingerprints { model: "a".into(), train_rows: "b".into(), eval_rows: "c".into() },
            total_steps: 30,
            epoch: 0.1,
            tokens: 3,
            loss_sum: 0.1 + 0.2,
            loss_steps: 1,
            best: Some(Best { step: 2, eval_loss: 1.0 / 3.0 }),
            eval_pending: false,
        }
    }

    #[test]
    fn it_survives_json_bit_for_bit() {
        let s = state(&TrainConfig::default());
        let text = serde_json::to_string(&s).unwrap();
        assert_eq!(serde_json::from_str::<TrainerState>(&text).unwrap(), s);
    }

    #[test]
    fn every_fixed_key_exists_and_a_changed_one_is_named() {
        let config = TrainConfig::default();
        for key in FIXED.iter().chain(SCHEDULE) {
            assert!(super::super::config::find_key(key).is_some(), "{key}");
        }
        let s = state(&config);
        s.check_config(&config, 10).unwrap();
        for (key, changed) in [
            ("seed", TrainConfig { seed: 1, ..config.clone() }),
            ("r", TrainConfig { r: 4, ..config.clone() }),
            ("loraplus_lr_ratio", TrainConfig { loraplus_lr_ratio: Some(16.0), ..config.clone() }),
            ("learning_rate", TrainConfig { learning_rate: 1.0, ..config.clone() }),
            ("max_steps", TrainConfig { max_steps: 60, ..config.clone() }),
            ("num_train_epochs", TrainConfig { num_train_epochs: 6.0, ..config.clone() }),
        ] {
            let e = s.check_config(&changed, 10).unwrap_err();
            assert!(e.to_string().starts_with(&format!("{key}: ")) && e.exit_code() == 2, "{e}");
        }
        let other = TrainConfig { out: "elsewhere".into(), logging_steps: 1.0, threads: Some(1), ..config };
        s.check_config(&other, 10).unwrap();
    }

    #[test]
    fn a_constant_schedule_may_grow_longer() {
        let config = TrainConfig { lr_scheduler_type: "constant".into(), ..Default::default() };
        let s = state(&config);
        s.check_config(&TrainConfig { num_train_epochs: 6.0, ..config.clone() }, 30).unwrap();
        s.check_config(&TrainConfig { max_steps: 60, ..config.clone() }, 30).unwrap();
        assert!(s.check_config(&TrainConfig { learning_rate: 1.0, ..config }, 30).is_err());
    }

    #[test]
    fn changed_inputs_are_named() {
        let s = state(&TrainConfig::default());
        s.check_inputs(&s.fingerprints).unwrap();
        let e = s.check_inputs(&Fingerprints { train_rows: "x".into(), ..s.fingerprints.clone() }).unwrap_err();
        assert!(e.to_string().starts_with("data: "), "{e}");
    }
}
