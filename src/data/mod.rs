//! From JSON lines to rows of tokens: reader, chat template, loss mask, tokeniser, packing, shuffle, split, cache.
//! No silent choices: what is left out, cut or refused is counted or named.

mod cache;
mod chat;
mod jsonl;
mod mask;
mod pack;
mod pyjson;
mod stats;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_mask;
mod tokenizer;

use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::PathBuf;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::rng::{self, Stream};
use jsonl::{Fault, Lines};

pub use chat::{ChatTemplate, RenderOptions};
pub use jsonl::{MAX_LINE, check_line};
pub use pack::{Row, epoch_order, pack};
pub use stats::{Cache, Quantiles, RowName, Stats, preview};
pub use tokenizer::{Message, Tokenizer};

/// What to do with a document of more than `max_length` tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Overlong {
    /// Stop and name it.
    #[default]
    Error,
    /// Leave it out.
    Drop,
    /// Keep its first `max_length` tokens.
    Truncate,
    /// Cut it into pieces of `max_length`; each starts with the last token of the one before, so that no target is lost.
    Split,
}

/// What to load and how. `completion_only_loss` and `assistant_only_loss` are TRL's keys, both on by default.
#[derive(Clone, Debug, PartialEq)]
pub struct DataOptions {
    /// JSON lines. A file holds one kind of row: `text`, `prompt` + `completion`, or `messages`.
    pub files: Vec<PathBuf>,
    /// Longest document in tokens, at least 2.
    pub max_length: usize,
    pub overlong: Overlong,
    /// `prompt` + `completion` rows: only the completion counts (of a list of messages, the assistant's); else everything.
    pub completion_only_loss: bool,
    /// `messages` rows: only the assistant's turns count; else everything.
    pub assistant_only_loss: bool,
    /// Folder of the token cache; None: no cache.
    pub cache_dir: Option<PathBuf>,
}

impl Default for DataOptions {
    fn default() -> Self {
        Self {
            files: Vec::new(),
            max_length: 1024,
            overlong: Overlong::Error,
            completion_only_loss: true,
            assistant_only_loss: true,
            cache_dir: None,
        }
    }
}

/// A sequence of tokens that attends to nothing but itself.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Document {
    pub tokens: Vec<i32>,
    /// Whether token i counts in the loss: position i - 1 must predict it. False for i = 0.
    pub is_target: Vec<bool>,
    /// Index in [`Dataset::files`].
    pub file: usize,
    /// Line of the row, counted from 1.
    pub line: usize,
}

/// Tokenised documents in the order of the files. Every one has a target.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Dataset {
    pub documents: Vec<Document>,
    pub files: Vec<PathBuf>,
    pub stats: Stats,
}

/// Rows tokenised at a time: enough to keep all cores busy, few enough to hold in memory.
const BATCH_ROWS: usize = 1024;
const BATCH_BYTES: usize = 16 << 20;

/// Reads, renders and tokenises the files on all cores. `progress` is told bytes done and bytes in all.
/// Errors name file and line: rows that are not what they must be, a document that is too long (with
/// [`Overlong::Error`]), conversations that the chat template refuses, files without rows, data without targets.
pub fn load(tok: &Tokenizer, opts: &DataOptions, progress: &dyn Fn(u64, u64)) -> Result<Dataset> {
    if opts.files.is_empty() {
        return Err(Error::flag("data", "no file", "at least one file of JSON lines"));
    }
    if opts.max_length < 2 {
        return Err(Error::flag("max_length", opts.max_length.to_string(), "at least 2: a token and its target"));
    }
    let mut total = 0;
    for file in &opts.files {
        let metadata = fs::metadata(file).map_err(Error::read("open", file))?;
        // A device such as /dev/zero may never end.
        let kind = metadata.file_type();
        if kind.is_dir() || kind.is_char_device() || kind.is_block_device() {
            return Err(Error::input(file, "the path", "no regular file", "a file of JSON lines"));
        }
        total += metadata.len();
    }
    // The last file may end with what was told already.
    let last = std::cell::Cell::new(None);
    let progress = |done: u64, total: u64| {
        if last.replace(Some(done)) != Some(done) {
            progress(done, total);
        }
    };
    progress(0, total);
    let cache = opts.cache_dir.as_ref().map(|dir| cache::path(dir, tok, opts)).transpose()?;
    if let Some((documents, mut stats)) = cache.as_deref().and_then(cache::read) {
        progress(total, total);
        stats.cache = Cache::Hit;
        return Ok(Dataset { documents, files: opts.files.clone(), stats });
    }
    let mut loader = Loader { tok, opts, documents: Vec::new(), lengths: Vec::new(), stats: Stats::default() };
    let mut done = 0;
    for index in 0..opts.files.len() {
        loader.file(index, &mut |bytes| progress((done + bytes).min(total), total))?;
        done += fs::metadata(&opts.files[index]).map_or(0, |m| m.len());
    }
    progress(total, total);
    let mut data = loader.finish()?;
    if let Some(path) = cache {
        data.stats.cache = match cache::write(&path, &data.documents, &data.stats) {
            Ok(()) => Cache::Written,
            Err(e) => Cache::Failed(format!("{}: {e}", path.display())),
        };
    }
    Ok(data)
}

struct Loader<'a> {
    tok: &'a Tokenizer,
    opts: &'a DataOptions,
    documents: Vec<Document>,
    /// Of all documents, before `overlong`.
    lengths: Vec<usize>,
    stats: Stats,
}

impl Loader<'_> {
    fn file(&mut self, index: usize, progress: &mut dyn FnMut(u64)) -> Result<()> {
        let path = &self.opts.files[index];
        let loss = mask::Loss {
            completion_only: self.opts.completion_only_loss,
            assistant_only: self.opts.assistant_only_loss,
        };
        let mut lines = Lines::open(path)?;
        // Line and kind of the first row: a file holds one kind.
        let mut first: Option<(usize, &'static str)> = None;
        loop {
            let (mut batch, mut bytes) = (Vec::new(), 0);
            while batch.len() < BATCH_ROWS && bytes < BATCH_BYTES {
                let Some((number, line)) = lines.next_line()? else { break };
                bytes += line.len();
                batch.push((number, line));
            }
            if batch.is_empty() {
                break;
            }
            let tok = self.tok;
            let rows: Vec<Result<_, Fault>> = batch
                .par_iter()
                .map(|(number, line)| {
                    let Some(row) = jsonl::parse(*number, line)? else { return Ok(None) };
                    Ok(Some((row.kind(), mask::tokenize(tok, &row, loss)?)))
                })
                .collect();
            for ((line, _), row) in batch.iter().zip(rows) {
                let Some((kind, documents)) = row.map_err(|fault| fault.into_error(path, *line))? else { continue };
                let (first_line, first_kind) = *first.get_or_insert((*line, kind));
                if kind != first_kind {
                    let expected = format!("{first_kind} as in line {first_line}: a file holds one kind of row");
                    return Err(Fault::new(format!("a row with {kind}"), expected).into_error(path, *line));
                }
                self.row(index, *line, documents)?;
            }
            progress(lines.bytes);
        }
        match first {
            Some(_) => Ok(()),
            None => Err(Error::input(path, "whole file", "no rows", "at least one row of JSON")),
        }
    }

    fn row(&mut self, file: usize, line: usize, documents: Vec<mask::Tokens>) -> Result<()> {
        self.stats.rows += 1;
        self.stats.rows_by_turn += usize::from(documents.len() > 1);
        let mut teaches = false;
        for mask::Tokens { ids: tokens, is_target } in documents {
            let doc = Document { tokens, is_target, file, line };
            if doc.target_count() > 0 {
                teaches = true;
                self.lengths.push(doc.tokens.len());
                self.fit(doc)?;
            }
        }
        if !teaches {
            self.stats.without_targets.push(RowName { file, line });
        }
        Ok(())
    }

    /// Applies `overlong`.
    fn fit(&mut self, mut doc: Document) -> Result<()> {
        let (n, max) = (doc.tokens.len(), self.opts.max_length);
        if n <= max {
            self.documents.push(doc);
            return Ok(());
        }
        match self.opts.overlong {
            Overlong::Error => {
                let expected = format!("at most {max} (max_length); overlong = drop, truncate or split accepts it");
                return Err(
                    Fault::new(format!("{n} tokens"), expected).into_error(&self.opts.files[doc.file], doc.line)
                );
            }
            Overlong::Drop => self.stats.dropped += 1,
            Overlong::Truncate => {
                self.stats.truncated += 1;
                doc.tokens.truncate(max);
                doc.is_target.truncate(max);
                self.keep_piece(doc);
            }
            Overlong::Split => {
                self.stats.split += 1;
                for start in (0..n - 1).step_by(max - 1) {
                    let range = start..(start + max).min(n);
                    let tokens = doc.tokens[range.clone()].to_vec();
                    let mut is_target = doc.is_target[range].to_vec();
                    is_target[0] = false;
                    self.keep_piece(Document { tokens, is_target, ..doc });
                }
            }
        }
        Ok(())
    }

    fn keep_piece(&mut self, piece: Document) {
        if piece.target_count() > 0 {
            self.documents.push(piece);
        } else {
            self.stats.cut_without_targets += 1;
        }
    }

    fn finish(mut self) -> Result<Dataset> {
        self.stats.lengths = Quantiles::of(self.lengths);
        let mut data = Dataset { documents: self.documents, files: self.opts.files.clone(), stats: self.stats };
        data.count();
        if data.documents.is_empty() {
            let notes = data.summary();
            let file = &self.opts.files[0];
            let rows = data.stats.rows;
            return Err(Error::input(
                file,
                format!("all {rows} rows of {} file(s)", self.opts.files.len()),
                format!("no target token ({})", notes[2..].join("; ")),
                "at least one token to learn",
            ));
        }
        Ok(data)
    }
}

impl Dataset {
    /// Sets the counts that follow from the documents.
    fn count(&mut self) {
        self.stats.documents = self.documents.len();
        self.stats.tokens = self.documents.iter().map(|d| d.tokens.len()).sum();
        self.stats.targets = self.documents.iter().map(Document::target_count).sum();
    }
}

/// How much of a data set is held out.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum EvalSize {
    /// Share of the rows, above 0 and below 1; at least one row.
    Fraction(f64),
    Rows(usize),
}

/// (training, held-out): rows drawn by `seed`, the order inside each part kept. All documents of a row go to one side.
/// The counts of what loading left out stay with the training part. Errors: a size that leaves either part empty.
pub fn split(data: Dataset, eval: EvalSize, seed: u64) -> Result<(Dataset, Dataset)> {
    let mut names: Vec<(usize, usize)> = data.documents.iter().map(|d| (d.file, d.line)).collect();
    names.dedup();
    let n = names.len();
    let (flag, wanted) = match eval {
        EvalSize::Fraction(f) if f > 0.0 && f < 1.0 => ("eval_fraction", ((f * n as f64).round() as usize).max(1)),
        EvalSize::Fraction(f) => {
            return Err(Error::flag("eval_fraction", f.to_string(), "a number above 0 and below 1"));
        }
        EvalSize::Rows(rows) => ("eval_rows", rows),
    };
    if wanted == 0 || wanted >= n {
        let found = format!("{wanted} held-out rows of {n}");
        return Err(Error::flag(flag, found, "at least one row to train on and one to hold out"));
    }
    let mut held = vec![false; n];
    for &row in &rng::permutation(seed, Stream::Split, 0, n)[..wanted] {
        held[row] = true;
    }
    let (mut train, mut eval) = (Vec::new(), Vec::new());
    let mut row = 0;
    for doc in data.documents {
        while names[row] != (doc.file, doc.line) {
            row += 1;
        }
        if held[row] { eval.push(doc) } else { train.push(doc) }
    }
    let part = |documents: Vec<Document>, stats: Stats, rows: usize| {
        let lengths = Quantiles::of(documents.iter().map(|d| d.tokens.len()).collect());
        let mut part = Dataset { documents, files: data.files.clone(), stats: Stats { rows, lengths, ..stats } };
        part.count();
        part
    };
    let left_out = data.stats.rows.saturating_sub(n);
    let cache = data.stats.cache.clone();
    let train = part(train, data.stats, n - wanted + left_out);
    Ok((train, part(eval, Stats { cache, ..Stats::default() }, wanted)))
}
