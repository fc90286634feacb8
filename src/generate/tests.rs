//! Generation by a tiny model with random weights.

use std::path::Path;

use super::*;
use crate::backend::cpu::Cpu;
use crate::backend::{Batch, HostBatch, IGNORE};
use crate::checkpoint::ModelDir;
use crate::model::ModelOptions;

struct Tiny {
    backend: Cpu,
    model: Model<Cpu>,
    tokenizer: Tokenizer,
}

const MAX_TOKENS: usize = 4;

fn tiny(max_tokens: usize) -> Tiny {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let dir = ModelDir::open(&fixtures.join("tiny-mistral")).unwrap();
    let tokenizer = Tokenizer::open(&fixtures.join("tiny-tokenizer"), dir.config().vocab_size).unwrap();
    let mut backend = Cpu::new(Some(1));
    let options = ModelOptions::inference(max_tokens);
    let mut source = dir.source(None).unwrap();
    let model = Model::load(&mut backend, dir.config(), &mut source, None, options, &mut |_| ()).unwrap();
    Tiny { backend, model, tokenizer }
}

fn generate(t: &mut Tiny, sampling: &Sampling) -> Generated {
    let prompt = t.tokenizer.encode("the prompt is longer than a chunk", true).unwrap();
    let mut shown = String::new();
    let on_text = &mut |text: &str| shown.push_str(text);
    let made = super::generate(&mut t.backend, &mut t.model, &t.tokenizer, &prompt, sampling, on_text).unwrap();
    assert_eq!(shown, made.text);
    made
}

/// The oracle runs the whole sequence anew for each token. The window of 8 is shorter than the prompt.
#[test]
fn tokens_from_the_cache_are_those_of_the_whole_sequence() {
    let mut compared = 0;
    let mut whole = tiny(64);
    for temperature in [0.0, 1.0] {
        let sampling = Sampling { temperature, max_new_tokens: 12, ..Default::default() };
        let made = generate(&mut tiny(MAX_TOKENS), &sampling);
        assert!(made.tokens.len() == 12 || made.stop == Stop::Eos);
        let mut ids = whole.tokenizer.encode("the prompt is longer than a chunk", true).unwrap();
        for (i, &expected) in made.tokens.iter().enumerate() {
            let tokens: Vec<i32> = ids.iter().map(|&i| i as i32).collect();
            let n = tokens.len();
            let host = HostBatch { tokens, targets: vec![IGNORE; n], cu_seqlens: vec![0, n as i32] };
            let mut batch = Batch::new(&mut whole.backend, n).unwrap();
            batch.fill(&mut whole.backend, &host, 1.0).unwrap();
            let logits = whole.model.logits(&mut whole.backend, &batch, &[n - 1]).unwrap();
            assert_eq!(sampling.choose(&logits, i as u64), expected as usize);
            ids.push(expected);
            compared += 1;
        }
    }
    assert!(compared > 8, "{compared} tokens are too few to tell");
}

#[test]
fn the_same_seed_gives_the_same_text_and_another_seed_another() {
    let sampling = Sampling { temperature: 1.0, max_new_tokens: 20, ..Default::default() };
    let mut t = tiny(MAX_TOKENS);
    let a = generate(&mut t, &sampling).tokens;
    assert_eq!(a, generate(&mut t, &sampling).tokens);
    assert_ne!(a, generate(&mut t, &Sampling { seed: 1, ..sampling }).tokens);
}

#[test]
fn a_stop_token_of_the_config_ends_the_text_and_is_not_shown() {
    let mut t = tiny(MAX_TOKENS);
    let made = generate(&mut t, &Sampling { max_new_tokens: 2, ..Default::default() });
    assert_eq!((made.stop, made.tokens.len()), (Stop::Length, 2));
    t.model.config.eos_token_ids = vec![made.tokens[0]];
    let made = generate(&mut t, &Sampling { max_new_tokens: 5, ..Default::default() });
    assert_eq!((made.stop, made.tokens.len(), made.text.as_str()), (Stop::Eos, 1, ""));
}

#[test]
fn prompts_without_tokens_or_with_unknown_ones_are_refused() {
    let mut t = tiny(MAX_TOKENS);
    for (prompt, expected) in [(vec![], "at least one token"), (vec![256], "vocabulary")] {
        let sampling = Sampling::default();
        let e =
            super::generate(&mut t.backend, &mut t.model, &t.tokenizer, &prompt, &sampling, &mut |_| ()).unwrap_err();
        assert!(e.exit_code() == 2 && e.to_string().contains(expected), "{e}");
    }
}
