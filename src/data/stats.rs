//! What a user should know about the data before step 0: counts, lengths, and one sample with its targets marked.

use serde::{Deserialize, Serialize};

use super::tokenizer::Tokenizer;
use super::{Dataset, Document};
use crate::error::Result;

/// Where a row stands: index of its file in [`Dataset::files`], line counted from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct RowName {
    pub file: usize,
    pub line: usize,
}

/// Counts of a load. A row is a line of a file, a document what it became.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Stats {
    /// Rows read, blank lines not counted.
    pub rows: usize,
    /// Documents, tokens and target tokens that are left to train on.
    pub documents: usize,
    pub tokens: usize,
    pub targets: usize,
    /// Documents longer than max_length, by what was done with them.
    pub dropped: usize,
    pub truncated: usize,
    pub split: usize,
    /// Of the truncated, and of the pieces of the split: how many went because no target was left in them.
    pub cut_without_targets: usize,
    /// Conversations that became one document an answer, since the template's renderings do not nest.
    pub rows_by_turn: usize,
    /// Rows that had no targets from the start; they are left out.
    pub without_targets: Vec<RowName>,
    /// Lengths in tokens before `overlong` was applied.
    pub lengths: Quantiles,
    pub cache: Cache,
}

/// Lengths in tokens, by nearest rank.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Quantiles {
    pub min: usize,
    pub p10: usize,
    pub p50: usize,
    pub p90: usize,
    pub p95: usize,
    pub p99: usize,
    pub max: usize,
}

/// What became of the cache of token ids.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub enum Cache {
    #[default]
    Off,
    Hit,
    Written,
    /// Tokenised, but not kept, and why. The run goes on.
    Failed(String),
}

impl Quantiles {
    pub fn of(mut lengths: Vec<usize>) -> Self {
        lengths.sort_unstable();
        let Some(last) = lengths.len().checked_sub(1) else { return Self::default() };
        let at = |percent: usize| lengths[(lengths.len() * percent).div_ceil(100).saturating_sub(1).min(last)];
        Self { min: lengths[0], p10: at(10), p50: at(50), p90: at(90), p95: at(95), p99: at(99), max: lengths[last] }
    }
}

impl std::fmt::Display for Quantiles {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { min, p10, p50, p90, p95, p99, max } = self;
        write!(f, "min {min} · 10% {p10} · 50% {p50} · 90% {p90} · 95% {p95} · 99% {p99} · max {max}")
    }
}

impl Dataset {
    /// A few lines for the log: what was read, what was left out and why.
    pub fn summary(&self) -> Vec<String> {
        let s = &self.stats;
        let mut out = vec![
            format!("{} rows, {} documents, {} tokens, {} of them targets", s.rows, s.documents, s.tokens, s.targets),
            format!("tokens a document: {}", s.lengths),
        ];
        let mut note = |n: usize, what: &str| {
            if n > 0 {
                out.push(format!("{n} {what}"));
            }
        };
        note(s.dropped, "documents longer than max_length dropped");
        note(s.truncated, "documents truncated to max_length");
        note(s.split, "documents longer than max_length split");
        note(s.cut_without_targets, "pieces without targets left out after cutting");
        note(
            s.rows_by_turn,
            "conversations laid out one document an answer, as the chat template rewrites earlier turns",
        );
        if !s.without_targets.is_empty() {
            const SHOWN: usize = 10;
            let names: Vec<String> = s.without_targets.iter().take(SHOWN).map(|r| self.name(r.file, r.line)).collect();
            let more = s.without_targets.len().saturating_sub(SHOWN);
            let more = if more > 0 { format!(" and {more} more") } else { String::new() };
            out.push(format!("{} rows without targets left out: {}{more}", s.without_targets.len(), names.join(", ")));
        }
        if let Cache::Failed(why) = &s.cache {
            out.push(format!("token cache not written: {why}"));
        }
        out
    }

    /// "train.jsonl:17".
    pub fn name(&self, file: usize, line: usize) -> String {
        match self.files.get(file) {
            Some(path) => format!("{}:{line}", path.display()),
            None => format!("line {line}"),
        }
    }

    /// "train.jsonl:17", the row that document `i` came from.
    pub fn document_name(&self, i: usize) -> String {
        self.name(self.documents[i].file, self.documents[i].line)
    }
}

/// Longest run of tokens of one kind that a preview shows whole.
const RUN: usize = 160;

/// A document as text with its targets between ⟦ and ⟧, or in green where `ansi` is set. Long runs are shortened.
pub fn preview(tok: &Tokenizer, doc: &Document, ansi: bool) -> Result<String> {
    let (open, close) = if ansi { ("\x1b[32m", "\x1b[0m") } else { ("⟦", "⟧") };
    let mut out = String::new();
    let mut at = 0;
    while at < doc.tokens.len() {
        let target = doc.is_target[at];
        let end = at + doc.is_target[at..].iter().take_while(|&&t| t == target).count();
        let text = if end - at > RUN {
            let half = RUN / 2;
            let (head, tail) = (decode_range(tok, doc, at, at + half)?, decode_range(tok, doc, end - half, end)?);
            format!("{head} …({} more tokens)… {tail}", end - at - RUN)
        } else {
            decode_range(tok, doc, at, end)?
        };
        let (open, close) = if target { (open, close) } else { ("", "") };
        out.push_str(&format!("{open}{text}{close}"));
        at = end;
    }
    Ok(out)
}

/// The text of tokens `start..end`, with the spaces that decoders take from the start of a text.
fn decode_range(tok: &Tokenizer, doc: &Document, start: usize, end: usize) -> Result<String> {
    let ids = |range: &[i32]| range.iter().map(|&t| t as u32).collect::<Vec<u32>>();
    let context = start.saturating_sub(8);
    let before = tok.decode(&ids(&doc.tokens[context..start]), false)?;
    let whole = tok.decode(&ids(&doc.tokens[context..end]), false)?;
    match whole.strip_prefix(&before) {
        Some(text) => Ok(text.to_string()),
        None => tok.decode(&ids(&doc.tokens[start..end]), false),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_nearest_rank() {
        let q = Quantiles::of((1..=200).rev().collect());
        assert_eq!(q, Quantiles { min: 1, p10: 20, p50: 100, p90: 180, p95: 190, p99: 198, max: 200 });
        assert_eq!(Quantiles::of(vec![7]), Quantiles { min: 7, p10: 7, p50: 7, p90: 7, p95: 7, p99: 7, max: 7 });
        assert_eq!(Quantiles::of(vec![]), Quantiles::default());
    }
}
