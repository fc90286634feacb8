//! Generation: the prompt into the KV cache, then a token at a time, streamed as text.

pub mod sampling;
pub mod stream;

use std::time::Instant;

use serde::Serialize;

pub use sampling::Sampling;
use stream::TextStream;

use crate::backend::Backend;
use crate::data::Tokenizer;
use crate::error::{Error, Result};
use crate::model::Model;

/// Why generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Stop {
    /// The model ended its turn.
    Eos,
    /// `max_new_tokens`.
    Length,
}

/// What was generated.
#[derive(Clone, Debug, PartialEq)]
pub struct Generated {
    /// Without special tokens; the pieces given to `on_text`, joined.
    pub text: String,
    /// The new tokens; one that ended the turn comes last.
    pub tokens: Vec<u32>,
    pub stop: Stop,
    /// Of the prompt, and of the new tokens after the first.
    pub prompt_tokens_per_second: f64,
    pub tokens_per_second: f64,
}

/// Continues `prompt`. `on_text` gets the text as soon as it is whole, never half a UTF-8 character.
///
/// Ends at a stop token of the tokenizer, at one of config.json's `eos_token_id`, or after `max_new_tokens`.
/// Errors: an empty prompt, a token without an embedding, a setting out of range, those of the backend.
pub fn generate<B: Backend>(
    backend: &mut B,
    model: &mut Model<B>,
    tokenizer: &Tokenizer,
    prompt: &[u32],
    sampling: &Sampling,
    on_text: &mut dyn FnMut(&str),
) -> Result<Generated> {
    sampling.validate()?;
    if prompt.is_empty() {
        return Err(Error::flag("prompt", "no tokens", "a text of at least one token"));
    }
    if let Some(id) = prompt.iter().find(|&&id| id as usize >= model.config.vocab_size) {
        let vocab = model.config.vocab_size;
        return Err(Error::flag("prompt", format!("token {id}"), format!("tokens below the vocabulary's {vocab}")));
    }
    let mut stops = tokenizer.stop_ids();
    stops.extend(&model.config.eos_token_ids);

    let mut stream = TextStream::new(|ids: &[u32]| tokenizer.decode(ids, true));
    let mut made = Generated {
        text: String::new(),
        tokens: vec![],
        stop: Stop::Length,
        prompt_tokens_per_second: 0.0,
        tokens_per_second: 0.0,
    };
    let mut show = |text: String, made: &mut Generated| {
        if !text.is_empty() {
            on_text(&text);
            made.text.push_str(&text);
        }
    };
    let start = Instant::now();
    let mut cache = model.new_cache(backend, prompt.len() + sampling.max_new_tokens)?;
    let ids: Vec<i32> = prompt.iter().map(|&id| id as i32).collect();
    let mut logits = model.decode(backend, &mut cache, &ids)?;
    made.prompt_tokens_per_second = prompt.len() as f64 / start.elapsed().as_secs_f64().max(1e-9);
    let start = Instant::now();
    loop {
        let id = sampling.choose(&logits, made.tokens.len() as u64) as u32;
        made.tokens.push(id);
        if stops.contains(&id) {
            made.stop = Stop::Eos;
            break;
        }
        show(stream.push(id)?, &mut made);
        if made.tokens.len() == sampling.max_new_tokens {
            break;
        }
        logits = model.decode(backend, &mut cache, &[id as i32])?;
    }
    show(stream.finish()?, &mut made);
    made.tokens_per_second = (made.tokens.len() - 1) as f64 / start.elapsed().as_secs_f64().max(1e-9);
    Ok(made)
}

#[cfg(test)]
mod tests;
