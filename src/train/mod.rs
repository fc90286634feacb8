//! Training: the loop around the graph, its settings, data order, schedule, metrics, checkpoints and resume.

mod checkpoints;
pub mod config;
pub mod data_order;
pub mod eval;
pub mod interrupt;
pub mod metrics;
pub mod optimizer;
pub mod resume;
mod run;
pub mod schedule;
mod setup;
pub mod tensorboard;
pub mod ui;
pub mod validate;

pub use config::{KEYS, Key, Kind, Resume, TrainConfig, known_keys};
pub use eval::{EvalResult, evaluate};
pub use run::{Outcome, run};
pub use ui::{PlainUi, StepReport, Ui};
