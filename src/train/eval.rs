//! Loss of held-out rows.

use crate::backend::{Backend, Batch, HostBatch};
use crate::data::Row;
use crate::error::Result;
use crate::model::Model;

/// What an evaluation found.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct EvalResult {
    /// Mean over all target tokens.
    pub loss: f64,
    /// exp(loss)
    pub perplexity: f64,
    /// Target tokens.
    pub tokens: u64,
    pub rows: u64,
}

/// Ranges of `rows` that run together: at most `batch_size` rows and, unless one row alone is longer, `max_tokens` tokens.
fn batches(rows: &[Row], batch_size: usize, max_tokens: usize) -> Vec<std::ops::Range<usize>> {
    let mut out = vec![];
    let (mut start, mut tokens) = (0, 0);
    for (i, row) in rows.iter().enumerate() {
        let n = row.batch.tokens.len();
        if i > start && (i - start == batch_size || tokens + n > max_tokens) {
            out.push(start..i);
            (start, tokens) = (i, 0);
        }
        tokens += n;
    }
    if start < rows.len() {
        out.push(start..rows.len());
    }
    out
}

/// Loss of `rows`, in batches of at most `batch_size` rows and `batch.capacity` tokens (the longest row must fit).
///
/// `progress` is told rows done and rows in all; it answers false to stop, and then there is no result.
/// Batching changes the result by rounding only. The model's gradients are lost. Errors: those of the backend.
pub fn evaluate<B: Backend>(
    backend: &mut B,
    model: &mut Model<B>,
    batch: &mut Batch<B>,
    rows: &[Row],
    batch_size: usize,
    progress: &mut dyn FnMut(u64, u64) -> bool,
) -> Result<Option<EvalResult>> {
    let (mut sum, mut tokens) = (0.0, 0);
    for range in batches(rows, batch_size, batch.capacity) {
        let mut host = HostBatch::default();
        rows[range.clone()].iter().for_each(|r| host.append(&r.batch));
        let targets = host.target_count();
        if targets > 0 {
            // The mean of a batch is read and summed in f64: a sum over all rows would drown in f32.
            model.zero_grad(backend)?;
            batch.fill(backend, &host, 1.0 / targets as f32)?;
            model.loss(backend, batch)?;
            sum += f64::from(model.read_loss(backend)?) * targets as f64;
            tokens += targets as u64;
        }
        if !progress(range.end as u64, rows.len() as u64) {
            return Ok(None);
        }
    }
    let loss = sum / tokens as f64;
    Ok(Some(EvalResult { loss, perplexity: loss.exp(), tokens, rows: rows.len() as u64 }))
}

/// Tokens of the largest batch of `batch_size` rows that could be drawn.
pub fn most_tokens(rows: &[Row], batch_size: usize) -> usize {
    let mut lengths: Vec<usize> = rows.iter().map(|r| r.batch.tokens.len()).collect();
    lengths.sort_unstable_by(|a, b| b.cmp(a));
    lengths.iter().take(batch_size).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(lengths: &[usize]) -> Vec<Row> {
        let row = |&n| Row {
            batch: HostBatch { tokens: vec![1; n], targets: vec![1; n], cu_seqlens: vec![0, n as i32] },
            documents: vec![],
        };
        lengths.iter().map(row).collect()
    }

    #[test]
    fn batches_hold_all_rows_within_rows_and_tokens() {
        assert_eq!(batches(&rows(&[3, 3, 3, 3, 9, 1]), 3, 8), [0..2, 2..4, 4..5, 5..6]);
        assert_eq!(batches(&rows(&[1, 1, 1, 1]), 3, 8), [0..3, 3..4]);
        assert!(batches(&[], 3, 8).is_empty());
    }

    #[test]
    fn the_largest_batch_is_that_of_the_longest_rows() {
        assert_eq!(most_tokens(&rows(&[3, 9, 1, 7]), 2), 16);
        assert_eq!(most_tokens(&rows(&[3]), 2), 3);
    }
}
