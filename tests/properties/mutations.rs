//! The fuzz targets without a fuzzer: all seeds of `fuzz/corpus` and some thousand mutations of each set, the same on
//! every run. None may panic, and an error must be an answer (see `fuzz/src/lib.rs`).

use std::path::Path;

use halfbyte::rng::{Stream, word};

#[path = "../../fuzz/src/lib.rs"]
mod targets;

/// Mutations tried for each target.
const TRIES: u64 = 4000;

/// Bytes and words that readers trip over.
const TOKENS: [&[u8]; 24] = [
    b"\"",
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"\\",
    b"\0",
    b"\xff",
    b"-",
    b"0",
    b"-1",
    b"1e999",
    b"NaN",
    b"null",
    b"true",
    b"\"\"",
    b"[]",
    b"{}",
    b"18446744073709551615",
    b"9223372036854775808",
    b"\\ud800",
    b"4294967296",
];

/// A sequence of random numbers for one try.
struct Draw {
    seed: u64,
    next: u64,
}

impl Draw {
    fn below(&mut self, n: usize) -> usize {
        self.next += 1;
        ((u64::from(word(self.seed, Stream::Sampling, 1, self.next)) * n as u64) >> 32) as usize
    }
}

/// One to eight changes: a bit, a byte, a cut, a repeat, a token put in or in place of a number, a piece of another seed.
fn mutate(seeds: &[Vec<u8>], draw: &mut Draw) -> Vec<u8> {
    let mut bytes = seeds[draw.below(seeds.len())].clone();
    for _ in 0..=draw.below(8) {
        let at = draw.below(bytes.len() + 1);
        let end = (at + 1 + draw.below(12)).min(bytes.len());
        let token = TOKENS[draw.below(TOKENS.len())];
        match draw.below(7) {
            0 if at < bytes.len() => bytes[at] ^= 1 << draw.below(8),
            1 if at < bytes.len() => bytes[at] = draw.below(256) as u8,
            2 => drop(bytes.drain(at..end)),
            3 => bytes.truncate(at),
            4 => drop(bytes.splice(at..at, token.iter().copied())),
            5 => {
                let digits = bytes[at..].iter().take_while(|b| b.is_ascii_digit()).count();
                bytes.splice(at..at + digits, token.iter().copied());
            }
            _ => {
                let other = &seeds[draw.below(seeds.len())];
                let from = draw.below(other.len() + 1);
                let piece = &other[from..(from + draw.below(40)).min(other.len())];
                bytes.splice(at..at, piece.iter().copied());
            }
        }
    }
    bytes
}

fn run(name: &str, target: fn(&[u8])) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name);
    let mut paths: Vec<_> = std::fs::read_dir(&folder).expect("a folder of seeds").map(|e| e.unwrap().path()).collect();
    paths.sort();
    let seeds: Vec<Vec<u8>> = paths.iter().map(|p| std::fs::read(p).expect("a seed")).collect();
    assert!(seeds.len() >= 5, "seeds in {}", folder.display());
    seeds.iter().for_each(|seed| target(seed));
    for seed in 0..TRIES {
        let bytes = mutate(&seeds, &mut Draw { seed, next: 0 });
        let panicked = std::panic::catch_unwind(|| target(&bytes)).is_err();
        assert!(!panicked, "{name}: try {seed} panicked on {:?}", String::from_utf8_lossy(&bytes));
    }
}

#[test]
fn no_safetensors_bytes_panic() {
    run("safetensors", targets::safetensors);
}

#[test]
fn no_quant_state_bytes_panic() {
    run("quant_state", targets::quant_state);
}

#[test]
fn no_model_config_bytes_panic() {
    run("model_config", targets::model_config);
}

#[test]
fn no_jsonl_row_bytes_panic() {
    run("jsonl_row", targets::jsonl_row);
}

#[test]
fn no_peft_config_bytes_panic() {
    run("peft_config", targets::peft_config);
}
