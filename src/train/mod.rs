//! Training: the loop around the graph, its settings, data order, schedule, metrics, checkpoints and resume.

pub mod config;
pub mod data_order;
pub mod interrupt;
pub mod metrics;
pub mod optimizer;
pub mod schedule;
pub mod ui;
pub mod validate;

pub use config::{KEYS, Key, Kind, Resume, TrainConfig, known_keys};
pub use ui::{PlainUi, StepReport, Ui};
