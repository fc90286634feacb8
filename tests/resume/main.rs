//! Training as a whole on a tiny model: stopping, killing and resuming, and what checkpoints survive.

mod place;
mod process;
mod run;
