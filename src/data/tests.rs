//! Whole loads over the tiny tokenizer of `tests/fixtures`.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use super::*;

const TINY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/tiny-tokenizer");

fn tiny() -> Tokenizer {
    Tokenizer::open(Path::new(TINY), 256).unwrap()
}

/// A folder with one data file.
struct Files {
    dir: tempfile::TempDir,
    opts: DataOptions,
}

fn files(contents: &[&str]) -> Files {
    let dir = tempfile::tempdir().unwrap();
    let mut opts = DataOptions { max_length: 512, ..DataOptions::default() };
    for (i, text) in contents.iter().enumerate() {
        let path = dir.path().join(format!("{i}.jsonl"));
        fs::write(&path, text).unwrap();
        opts.files.push(path);
    }
    Files { dir, opts }
}

fn load_tiny(f: &Files) -> Result<Dataset> {
    load(&tiny(), &f.opts, &|_, _| {})
}

/// What the targets of a document say.
fn targets(tok: &Tokenizer, doc: &Document) -> String {
    let ids: Vec<u32> = doc.tokens.iter().zip(&doc.is_target).filter(|(_, t)| **t).map(|(&id, _)| id as u32).collect();
    tok.decode(&ids, false).unwrap()
}

fn whole(tok: &Tokenizer, doc: &Document) -> String {
    let ids: Vec<u32> = doc.tokens.iter().map(|&id| id as u32).collect();
    tok.decode(&ids, false).unwrap()
}

const CHAT: &str = r#"{"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi é"}, {"role": "assistant", "content": "the 日本 an"}, {"role": "user", "content": "more"}, {"role": "assistant", "content": "no"}]}"#;

#[test]
fn answers_and_their_stop_tokens_are_the_targets() {
    let data = load_tiny(&files(&[CHAT])).unwrap();
    let tok = tiny();
    let doc = &data.documents[0];
    assert_eq!(
        whole(&tok, doc),
        "<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi é<|im_end|>\n<|im_start|>assistant\n\
         the 日本 an<|im_end|>\n<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\nno<|im_end|>\n"
    );
    assert_eq!(targets(&tok, doc), "the 日本 an<|im_end|>no<|im_end|>");
    assert_eq!(doc.tokens.iter().filter(|&&t| t == 1).count(), 1, "one BOS");
}
