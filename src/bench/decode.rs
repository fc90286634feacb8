//! Generation of one token after another with random weights: `halfbyte bench decode`.

use std::time::Instant;

use super::random_weights::RandomWeights;
use crate::backend::Backend;
use crate::error::Result;
use crate::model::{HostAdapter, Model, ModelConfig, ModelOptions};

/// Tokens of the prompt that run at a time, as the plan and the model must agree.
pub const CHUNK: usize = 8;

/// Wall-clock seconds of each of `tokens` tokens behind `past` others, sorted. The logits come to the host each time, as
/// sampling needs them. Errors: those of the backend.
pub fn run<B: Backend>(
    backend: &mut B,
    config: &ModelConfig,
    adapter: Option<&HostAdapter>,
    past: usize,
    tokens: usize,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Vec<f64>> {
    const WARM_UP: usize = 5;
    let mut source = RandomWeights::new(config);
    let options = ModelOptions::inference(CHUNK);
    let mut model = Model::load(backend, config, &mut source, adapter, options, &mut |_| {})?;
    let mut cache = model.new_cache(backend, capacity(past, tokens))?;
    // What the cache holds costs the same whatever it is.
    cache.len = past;
    let mut seconds = Vec::with_capacity(tokens);
    for i in 0..WARM_UP + tokens {
        let token = (i * 7919 % config.vocab_size) as i32;
        let start = Instant::now();
        model.decode(backend, &mut cache, &[token])?;
        if i >= WARM_UP {
            seconds.push(start.elapsed().as_secs_f64());
        }
        progress(i + 1, WARM_UP + tokens);
    }
    seconds.sort_by(f64::total_cmp);
    Ok(seconds)
}

/// Tokens that the cache must have room for.
pub fn capacity(past: usize, tokens: usize) -> usize {
    past + tokens + CHUNK
}
