//! What is fuzzed: every reader of bytes that come from a user, each as one function that must return for any bytes.
//!
//! `cargo +nightly fuzz run TARGET` drives one of them from the seeds in `corpus/TARGET`; `tests/properties` runs all
//! seeds and some thousand mutations of each on every test run. An answer may be an error, but an error must say what
//! is wrong in a line of sensible length, and count as bad input.

use std::path::Path;

use halfbyte::checkpoint::{config, peft, safetensors_file};
use halfbyte::nf4::serialize::QuantState;
use halfbyte::{Error, Result, data};

fn answered<T>(result: Result<T>) {
    if let Err(error) = result {
        assert!(matches!(error, Error::Input { .. } | Error::Flag { .. } | Error::Unavailable { .. }), "{error:?}");
        assert!(error.to_string().len() < 4096, "an error of {} bytes", error.to_string().len());
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A whole safetensors file: header and layout.
pub fn safetensors(bytes: &[u8]) {
    answered(safetensors_file::parse(Path::new("model.safetensors"), bytes));
}

/// The JSON tensor beside a 4-bit weight.
pub fn quant_state(bytes: &[u8]) {
    let parse = |bytes: &[u8]| QuantState::parse(Path::new("model.safetensors"), "w.quant_state", bytes);
    let state = parse(bytes);
    if let Ok(state) = &state {
        // What was understood is understood again when we write it.
        let again = parse(state.to_json().as_bytes()).expect("our own JSON");
        assert_eq!(&again, state);
    }
    answered(state);
}

/// config.json of a model.
pub fn model_config(bytes: &[u8]) {
    answered(config::parse(Path::new("config.json"), &text(bytes)));
}

/// One line of a data file.
pub fn jsonl_row(bytes: &[u8]) {
    answered(data::check_line(Path::new("train.jsonl"), 1, bytes));
}

/// adapter_config.json of PEFT.
pub fn peft_config(bytes: &[u8]) {
    answered(peft::parse_config(Path::new("adapter_config.json"), &text(bytes)));
}
