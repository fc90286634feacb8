//! The training loop.

use std::path::{Path, PathBuf};
use std::time::Instant;

use super::config::{Resume, TrainConfig};
use super::data_order::{DataOrder, StepRows};
use super::eval::{self, EvalResult};
use super::metrics::{self, EvalRow, MetricsFile, TrainRow};
use super::resume::{self, Best, TrainerState};
use super::schedule::Schedule;
use super::setup::{self, Data};
use super::tensorboard::EventWriter;
use super::ui::{StepReport, Ui};
use super::validate::{Every, resolve};
use super::{checkpoints, optimizer};
use crate::backend::{Backend, Batch, Dropout, HostBatch, Item, NewOptimizer, Scope};
use crate::checkpoint::state::{self, TrainingState};
use crate::checkpoint::{ModelDir, peft};
use crate::error::{Error, Result};
use crate::memory;
use crate::model::{HostAdapter, Model};

/// How a run ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// Optimizer steps done, of `total`.
    pub step: u64,
    pub total: u64,
    /// Stopped by a signal: `out` holds a checkpoint, but no final adapter.
    pub interrupted: bool,
    /// The newest checkpoint.
    pub checkpoint: Option<PathBuf>,
    /// The last evaluation of this process.
    pub eval: Option<EvalResult>,
    /// The saved step with the lowest held-out loss.
    pub best: Option<Best>,
    /// Input tokens since step 1.
    pub tokens: u64,
    /// Of the optimizer steps of this process.
    pub tokens_per_second: f64,
}

/// Trains as `config` says and leaves adapter, checkpoints and metrics.jsonl in `config.out`.
///
/// Errors: a setting or input at fault; a loss or gradient that is not finite ([`Error::NotFinite`]; the checkpoints stay);
/// a file that cannot be written (the previous checkpoint stays); those of the backend.
pub fn run<B: Backend>(backend: &mut B, config: &TrainConfig, ui: &mut dyn Ui) -> Result<Outcome> {
    config.validate()?;
    config.require_paths()?;
    let dir = ModelDir::open(&config.model)?;
    let _lock = checkpoints::prepare(config, config.resume != Resume::Latest(false))?;
    let found = resume::find(config, dir.config(), ui)?;
    let mut before = None;
    if let Some((path, found)) = &found {
        let state = TrainerState::read(path, found)?;
        state.check_config(config, found.step)?;
        before = Some(state);
    }
    let data = setup::data(config, &dir, ui)?;
    let fingerprints = setup::fingerprints(config, &data)?;
    let order = DataOrder::new(data.rows.len(), config);
    let total = order.total();
    let state = match before {
        Some(before) => {
            before.check_inputs(&fingerprints)?;
            // A best that is not in this folder cannot be taken at the end.
            let best = before.best.filter(|best| state::path_of(&config.out, best.step).is_dir());
            TrainerState { best, config: resume::config_texts(config), total_steps: total, ..before }
        }
        None => TrainerState {
            config: resume::config_texts(config),
            fingerprints,
            total_steps: total,
            epoch: 0.0,
            tokens: 0,
            loss_sum: 0.0,
            loss_steps: 0,
            best: None,
            eval_pending: false,
        },
    };
    let (checkpoint, found) = found.unzip();
    let (step, adapter, saved) = match found {
        Some(TrainingState { step, adapter, optimizer, .. }) => (step, adapter, Some(optimizer)),
        None => (0, setup::adapter(config, &dir)?, None),
    };

    let train_tokens = eval::most_tokens(&data.rows, config.per_device_train_batch_size);
    let max_tokens = train_tokens.max(eval::most_tokens(&data.eval_rows, 1));
    let plan = setup::plan(backend, config, &dir, &adapter, max_tokens, ui)?;
    let mut model = setup::model(backend, config, &dir, &adapter, max_tokens, plan.as_ref(), ui)?;
    backend.label(Item::Batch);
    let batch = Batch::new(backend, max_tokens)?;
    let tensors = adapter.layout.tensor_lens();
    backend.label(Item::Optimizer);
    let mut optimizer = backend.new_optimizer(NewOptimizer {
        kind: config.optim_kind()?,
        init: &adapter.weights,
        tensors: &tensors,
    })?;
    memory::check(backend)?;
    if let Some(saved) = &saved {
        backend.write_optimizer(&mut optimizer, saved)?;
        model.write_adapter(backend, &saved.master)?;
    }
    drop(saved);
    if let Some(text) = backend.optimizer_report(&mut optimizer)? {
        ui.note(&text);
    }
    introduce(config, &backend.describe(), &adapter, &data, &order, max_tokens, ui);
    if let Some(path) = &checkpoint {
        ui.note(&format!("resuming {} at step {}", path.display(), step + 1));
    } else if config.overwrite_output_dir {
        checkpoints::clear(&config.out)?;
    }
    let metrics = MetricsFile::open(&config.out, checkpoint.is_some().then_some(step))?;
    let schedule = Schedule::new(config, total)?;
    let tensorboard = config.report_to.iter().any(|name| name == "tensorboard");
    let trainer = Trainer {
        saved_step: checkpoint.is_some().then_some(step),
        adapter,
        backend,
        batch,
        board: tensorboard.then(|| EventWriter::new(&config.out, step)).transpose()?,
        checkpoint,
        config,
        data: &data,
        eval: None,
        last: Last::default(),
        metrics,
        model,
        optimizer,
        order,
        schedule,
        seconds: 0.0,
        state,
        step,
        steps_here: 0,
        tokens_here: 0,
        ui,
        window: (0, 0.0),
    };
    trainer.train(&dir)
}

/// What the reader should know before step 1.
fn introduce(
    config: &TrainConfig,
    device: &str,
    adapter: &HostAdapter,
    data: &Data,
    order: &DataOrder,
    max_tokens: usize,
    ui: &mut dyn Ui,
) {
    ui.note(&format!("device: {device}"));
    ui.note(&format!(
        "adapter: r {}, alpha {}, dropout {}, {} modules, {} trainable weights",
        adapter.config.r,
        adapter.config.lora_alpha,
        adapter.config.lora_dropout,
        adapter.layout.sites.len(),
        adapter.layout.len
    ));
    ui.note(&format!(
        "{} steps, {} an epoch: {} rows by {} × {}, at most {max_tokens} tokens at a time; {} rows held out",
        order.total(),
        order.steps_per_epoch(),
        data.rows.len(),
        config.per_device_train_batch_size,
        config.gradient_accumulation_steps,
        data.eval_rows.len()
    ));
}

/// Figures of the last optimizer step.
#[derive(Clone, Copy, Default)]
struct Last {
    loss: f32,
    grad_norm: f32,
    learning_rate: f64,
}

/// Whether the loop goes on.
#[derive(Clone, Copy, PartialEq)]
enum Go {
    On,
    Stop,
}

struct Trainer<'a, B: Backend> {
    adapter: HostAdapter,
    backend: &'a mut B,
    batch: Batch<B>,
    board: Option<EventWriter>,
    /// The newest checkpoint, and its step if this run wrote or loaded it.
    checkpoint: Option<PathBuf>,
    saved_step: Option<u64>,
    config: &'a TrainConfig,
    data: &'a Data,
    eval: Option<EvalResult>,
    last: Last,
    metrics: MetricsFile,
    model: Model<B>,
    optimizer: B::Optimizer,
    order: DataOrder,
    schedule: Schedule,
    /// Seconds, steps and tokens of this process.
    seconds: f64,
    steps_here: u64,
    tokens_here: u64,
    state: TrainerState,
    /// Optimizer steps done.
    step: u64,
    ui: &'a mut dyn Ui,
    /// Tokens and seconds since the last line of metrics.
    window: (u64, f64),
}

impl<B: Backend> Trainer<'_, B> {
    fn train(mut self, dir: &ModelDir) -> Result<Outcome> {
        if self.steps()? == Go::Stop {
            if self.step > 0 && self.saved_step != Some(self.step) {
                self.save()?;
            }
            self.ui.note(&match &self.checkpoint {
                Some(path) => format!(
                    "stopped after step {} of {}, saved in {}; continue with the same command and --resume",
                    self.step,
                    self.order.total(),
                    path.display()
                ),
                None => "stopped before step 1: nothing to save".to_string(),
            });
            return Ok(self.outcome(true));
        }
        self.finish(dir)?;
        Ok(self.outcome(false))
    }

    fn outcome(self, interrupted: bool) -> Outcome {
        Outcome {
            step: self.step,
            total: self.order.total(),
            interrupted,
            checkpoint: self.checkpoint,
            eval: self.eval,
            best: self.state.best,
            tokens: self.state.tokens,
            tokens_per_second: self.tokens_here as f64 / self.seconds.max(1e-9),
        }
    }

    fn steps(&mut self) -> Result<Go> {
        let total = self.order.total();
        if self.step == 0
            && self.config.eval_on_start
            && !self.data.eval_rows.is_empty()
            && self.evaluate()? == Go::Stop
        {
            return Ok(Go::Stop);
        }
        if self.state.eval_pending {
            let rows = self.order.step(self.step.saturating_sub(1));
            if self.evaluate_and_save(&rows)? == Go::Stop {
                return Ok(Go::Stop);
            }
        }
        while self.step < total {
            if self.ui.stop_requested() {
                return Ok(Go::Stop);
            }
            let rows = self.order.step(self.step);
            self.optimizer_step(&rows)?;
            self.report(total)?;
            if self.evaluate_and_save(&rows)? == Go::Stop {
                return Ok(Go::Stop);
            }
        }
        Ok(Go::On)
    }

    fn optimizer_step(&mut self, rows: &StepRows) -> Result<()> {
        let start = Instant::now();
        let join = |numbers: &Vec<usize>| {
            let mut host = HostBatch::default();
            numbers.iter().for_each(|&row| host.append(&self.data.rows[row].batch));
            host
        };
        let micro_batches: Vec<HostBatch> = rows.micro_batches.iter().map(join).collect();
        let targets: usize = micro_batches.iter().map(HostBatch::target_count).sum();
        if targets == 0 {
            return Err(Error::flag(
                "data",
                format!("no target tokens in step {} (rows {})", self.step + 1, self.row_names(rows)),
                "at least one token that counts in the loss",
            ));
        }
        self.backend.enter(Scope::Step(self.step + 1));
        self.model.zero_grad(self.backend)?;
        for (i, host) in micro_batches.iter().enumerate() {
            if i + 1 == micro_batches.len() {
                self.backend.prefetch_optimizer(&mut self.optimizer)?;
            }
            if host.target_count() == 0 {
                continue; // it adds 0
            }
            self.batch.fill(self.backend, host, 1.0 / targets as f32)?;
            let p = self.adapter.config.lora_dropout;
            let step = (rows.first + i as u64) as u32;
            let dropout = (p > 0.0).then_some(Dropout { p, seed: self.config.seed, step });
            self.model.loss_and_grad(self.backend, &self.batch, dropout)?;
        }
        let (loss, grad_norm) = self.model.read_loss_and_norm(self.backend)?;
        for (what, value) in [("the loss", loss), ("the gradient norm", grad_norm)] {
            if !value.is_finite() {
                return Err(self.not_finite(self.step + 1, what, value, self.row_names(rows)));
            }
        }
        let learning_rate = self.schedule.rate(self.step);
        let settings = optimizer::settings(self.config, &self.adapter.layout, learning_rate, self.step + 1);
        self.model.optimizer_step(self.backend, &mut self.optimizer, &settings)?;
        self.backend.leave();

        let tokens: u64 = micro_batches.iter().map(|h| h.tokens.len() as u64).sum();
        let seconds = start.elapsed().as_secs_f64();
        self.step += 1;
        self.steps_here += 1;
        self.tokens_here += tokens;
        self.seconds += seconds;
        self.window = (self.window.0 + tokens, self.window.1 + seconds);
        self.last = Last { loss, grad_norm, learning_rate };
        self.state.epoch = rows.epoch;
        self.state.tokens += tokens;
        self.state.loss_sum += f64::from(loss);
        self.state.loss_steps += 1;
        Ok(())
    }

    /// Tells the user interface, and metrics.jsonl where a line is due.
    fn report(&mut self, total: u64) -> Result<()> {
        let (step, epoch) = (self.step, self.state.epoch);
        let tokens_per_second = self.window.0 as f64 / self.window.1.max(1e-9);
        let seconds_left = (total - step) as f64 * self.seconds / self.steps_here.max(1) as f64;
        let report = StepReport { step, total, epoch, loss: self.last.loss, tokens_per_second, seconds_left };
        self.ui.step(&report);
        let every = resolve(self.config.logging_steps, total);
        if !(step.is_multiple_of(every) || step == total || step == 1 && self.config.logging_first_step) {
            return Ok(());
        }
        let (memory, memory_peak) = metrics::memory();
        let row = TrainRow {
            step,
            epoch,
            loss: self.state.loss_sum / self.state.loss_steps as f64,
            grad_norm: self.last.grad_norm,
            learning_rate: self.last.learning_rate,
            tokens: self.state.tokens,
            tokens_per_second,
            memory,
            memory_peak,
        };
        self.metrics.append(&row)?;
        if let Some(board) = &mut self.board {
            board.scalars(
                step,
                &[
                    ("train/loss", row.loss),
                    ("train/grad_norm", row.grad_norm.into()),
                    ("train/learning_rate", row.learning_rate),
                    ("train/epoch", epoch),
                    ("train/tokens_per_second", tokens_per_second),
                ],
            )?;
        }
        self.ui.train_row(&row, &report);
        (self.state.loss_sum, self.state.loss_steps, self.window) = (0.0, 0, (0, 0.0));
        Ok(())
    }

    /// What is due after the step that took `rows`. A stop request during the evaluation leaves it pending.
    fn evaluate_and_save(&mut self, rows: &StepRows) -> Result<Go> {
        let (step, total) = (self.step, self.order.total());
        let (evaluating, saving) = (self.config.evaluating()?, self.config.saving()?);
        let due = |every: Every| every != Every::No && (every.due(step, total, rows.epoch_end) || step == total);
        let mut fresh = None;
        self.state.eval_pending = false;
        if due(evaluating) {
            self.state.eval_pending = true;
            if self.evaluate()? == Go::Stop {
                return Ok(Go::Stop);
            }
            self.state.eval_pending = false;
            fresh = self.eval;
        }
        if due(saving) {
            if let Some(e) = fresh
                && self.state.best.is_none_or(|best| e.loss < best.eval_loss)
            {
                self.state.best = Some(Best { step, eval_loss: e.loss });
            }
            self.save()?;
            if let Some(limit) = self.config.save_total_limit {
                checkpoints::prune(&self.config.out, limit, self.state.best.map(|b| b.step))?;
            }
        }
        Ok(Go::On)
    }

    fn evaluate(&mut self) -> Result<Go> {
        let start = Instant::now();
        let (rows, size) = (&self.data.eval_rows, self.config.per_device_eval_batch_size);
        let ui = &mut *self.ui;
        let mut progress = |done, all| {
            ui.work("evaluating", "rows", done, all);
            !ui.stop_requested()
        };
        let result = eval::evaluate(self.backend, &mut self.model, &mut self.batch, rows, size, &mut progress)?;
        let Some(e) = result else { return Ok(Go::Stop) };
        if !e.loss.is_finite() {
            return Err(self.not_finite(self.step, "the held-out loss", e.loss as f32, "the held-out rows".into()));
        }
        let row = EvalRow {
            step: self.step,
            epoch: self.state.epoch,
            eval_loss: e.loss,
            eval_perplexity: e.perplexity,
            eval_tokens: e.tokens,
            eval_rows: e.rows,
            eval_runtime: start.elapsed().as_secs_f64(),
        };
        self.metrics.append(&row)?;
        if let Some(board) = &mut self.board {
            board.scalars(self.step, &[("eval/loss", e.loss), ("eval/perplexity", e.perplexity)])?;
        }
        self.ui.eval_row(&row);
        self.eval = Some(e);
        Ok(Go::On)
    }

    fn save(&mut self) -> Result<()> {
        // The metrics up to here belong to the checkpoint: they must not be younger than it.
        self.metrics.sync()?;
        let optimizer = self.backend.read_optimizer(&self.optimizer)?;
        self.adapter.weights.clone_from(&optimizer.master);
        let trainer =
            serde_json::to_value(&self.state).map_err(|e| Error::write("save", &self.config.out)(e.into()))?;
        let state = TrainingState { step: self.step, adapter: self.adapter.clone(), optimizer, trainer };
        let path = state::path_of(&self.config.out, self.step);
        state::save(&path, &state, &self.base_model())?;
        self.checkpoint = Some(path);
        self.saved_step = Some(self.step);
        Ok(())
    }

    /// The final adapter goes to `out` itself.
    fn finish(&mut self, dir: &ModelDir) -> Result<()> {
        self.metrics.sync()?;
        if let Some(text) = self.backend.optimizer_report(&mut self.optimizer)? {
            self.ui.note(&text);
        }
        let out = &self.config.out;
        let best = self.state.best.filter(|_| self.config.load_best_model_at_end);
        match best {
            Some(best) if best.step != self.step => {
                let path = state::path_of(out, best.step);
                self.adapter = state::load(&path, dir.config())?.adapter;
                self.ui.note(&format!(
                    "taking the adapter of {} (held-out loss {:.4})",
                    path.display(),
                    best.eval_loss
                ));
            }
            _ => self.adapter.weights = self.backend.read_optimizer(&self.optimizer)?.master,
        }
        peft::save(out, &self.adapter, &self.base_model())?;
        self.ui.note(&format!("adapter saved in {}", out.display()));
        Ok(())
    }

    fn base_model(&self) -> String {
        self.config.model.to_string_lossy().into_owned()
    }

    fn not_finite(&self, step: u64, what: &'static str, value: f32, rows: String) -> Error {
        let none = "none (save_steps comes later)";
        let checkpoint = self.checkpoint.as_deref().map_or(none.into(), |p: &Path| p.display().to_string());
        Error::NotFinite { step, what, value, rows, checkpoint }
    }

    /// "a.jsonl:3, a.jsonl:17 and 5 more".
    fn row_names(&self, rows: &StepRows) -> String {
        const SHOWN: usize = 16;
        let documents = rows.micro_batches.iter().flatten().flat_map(|&row| &self.data.rows[row].documents);
        let mut names: Vec<String> = documents.map(|&d| self.data.train.document_name(d)).collect();
        names.dedup();
        let more = names.len().saturating_sub(SHOWN);
        names.truncate(SHOWN);
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        format!("{}{more}", names.join(", "))
    }
}
