//! Documents into rows of at most `max_length` tokens. Documents of a row never see each other: `cu_seqlens` parts them.

use std::collections::BTreeMap;

use super::{Dataset, Document};
use crate::backend::{HostBatch, IGNORE};
use crate::rng::{self, Stream};

/// One row: documents laid end to end.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    pub batch: HostBatch,
    /// Index of each document in [`Dataset::documents`], in the order of the row.
    pub documents: Vec<usize>,
}

/// Packs every document into rows by best-fit decreasing: longest first, each into the fullest row that still has room.
/// With `packing` off each document is a row. The result depends on the documents alone, not on threads or time.
/// Panics if a document is longer than `max_length`: [`super::load`] made them no longer.
pub fn pack(dataset: &Dataset, max_length: usize, packing: bool) -> Vec<Row> {
    let docs = &dataset.documents;
    let bins: Vec<Vec<usize>> = if packing {
        best_fit_decreasing(&docs.iter().map(|d| d.tokens.len()).collect::<Vec<_>>(), max_length)
    } else {
        (0..docs.len()).map(|i| vec![i]).collect()
    };
    bins.into_iter()
        .map(|documents| {
            let mut batch = HostBatch::default();
            for &i in &documents {
                assert!(docs[i].tokens.len() <= max_length, "a document longer than max_length");
                batch.append(&docs[i].batch());
            }
            Row { batch, documents }
        })
        .collect()
}

/// Bins of indices, each sum of `lengths` at most `capacity`.
fn best_fit_decreasing(lengths: &[usize], capacity: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    order.sort_by_key(|&i| std::cmp::Reverse(lengths[i]));
    let mut bins: Vec<Vec<usize>> = Vec::new();
    // Bins by the room they have left.
    let mut room: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for i in order {
        let need = lengths[i];
        let (left, bin) = match room.range_mut(need..).next() {
            Some((&left, same)) => {
                let bin = same.pop().expect("a list of bins is dropped when it is empty");
                if same.is_empty() {
                    room.remove(&left);
                }
                (left, bin)
            }
            None => {
                bins.push(Vec::new());
                (capacity.max(need), bins.len() - 1)
            }
        };
        bins[bin].push(i);
        room.entry(left - need).or_default().push(bin);
    }
    bins
}

/// The order of `rows` rows in an epoch: the same for the same seed and epoch.
pub fn epoch_order(rows: usize, seed: u64, epoch: u32) -> Vec<usize> {
    rng::permutation(seed, Stream::Shuffle, epoch, rows)
}

impl Document {
    /// The document alone as a row: targets shifted, so that position t holds what it must predict.
    pub fn batch(&self) -> HostBatch {
        let n = self.tokens.len();
        let targets = (1..=n).map(|t| if t < n && self.is_target[t] { self.tokens[t] } else { IGNORE }).collect();
        HostBatch { tokens: self.tokens.clone(), targets, cu_seqlens: vec![0, n as i32] }
    }

    /// Number of tokens that count in the loss.
    pub fn target_count(&self) -> usize {
        self.is_target.iter().skip(1).filter(|&&t| t).count()
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use proptest::prelude::*;

    use super::*;

    /// Documents of the given lengths; token ids and targets tell which document and position they came from.
    fn dataset(lengths: &[usize]) -> Dataset {
        let documents = lengths
            .iter()
            .enumerate()
            .map(|(i, &n)| Document {
                tokens: (0..n).map(|t| (i * 1000 + t) as i32).collect(),
                is_target: (0..n).map(|t| t > 0 && (t + i) % 3 != 0).collect(),
                file: 0,
                line: i + 1,
            })
            .collect();
        Dataset { documents, files: vec![PathBuf::from("d.jsonl")], ..Dataset::default() }
    }

    proptest! {
        #[test]
        fn no_document_is_lost_and_no_row_overflows(lengths in prop::collection::vec(1usize..=64, 0..80), packing: bool) {
            let data = dataset(&lengths);
            let rows = pack(&data, 64, packing);
            let mut seen: Vec<usize> = rows.iter().flat_map(|r| r.documents.clone()).collect();
            seen.sort_unstable();
            prop_assert_eq!(seen, (0..lengths.len()).collect::<Vec<_>>());
            for row in &rows {
                prop_assert!(row.batch.tokens.len() <= 64);
                prop_assert!(packing || row.documents.len() == 1);
            }
        }

        #[test]
        fn targets_are_shifted_and_never_cross_documents(lengths in prop::collection::vec(1usize..=64, 1..40)) {
            let data = dataset(&lengths);
            for row in pack(&data, 64, true) {
                let b = &row.batch;
                prop_assert_eq!(b.cu_seqlens.len(), row.documents.len() + 1);
                for (k, &d) in row.documents.iter().enumerate() {
                    let (start, end) = (b.cu_seqlens[k] as usize, b.cu_seqlens[k + 1] as usize);
                    let doc = &data.documents[d];
                    prop_assert_eq!(&b.tokens[start..end], &doc.tokens[..]);
                    prop_assert_eq!(b.targets[end - 1], IGNORE);
                    for t in start..end - 1 {
                        let wants = if doc.is_target[t + 1 - start] { b.tokens[t + 1] } else { IGNORE };
                        prop_assert_eq!(b.targets[t], wants);
                    }
                }
                prop_assert_eq!(*b.cu_seqlens.last().unwrap() as usize, b.tokens.len());
            }
        }

        #[test]
        fn the_order_of_documents_does_not_change_how_full_the_rows_are(
            lengths in prop::collection::vec(1usize..=64, 1..60), seed: u64
        ) {
            let mixed: Vec<usize> = epoch_order(lengths.len(), seed, 0).into_iter().map(|i| lengths[i]).collect();
            let fill = |l: &[usize]| {
                let mut f: Vec<usize> = pack(&dataset(l), 64, true).iter().map(|r| r.batch.tokens.len()).collect();
                f.sort_unstable();
                f
            };
            prop_assert_eq!(fill(&lengths), fill(&mixed));
        }

        #[test]
        fn no_two_rows_would_fit_into_one_half_empty(lengths in prop::collection::vec(1usize..=64, 2..60)) {
            let rows = pack(&dataset(&lengths), 64, true);
            let half_empty = rows.iter().filter(|r| r.batch.tokens.len() * 2 <= 64).count();
            prop_assert!(half_empty <= 1, "{half_empty} rows at most half full");
        }
    }

    #[test]
    fn packing_and_not_packing_have_the_same_targets() {
        let data = dataset(&[5, 60, 1, 33, 30, 2, 64]);
        let count = |packing| pack(&data, 64, packing).iter().map(|r| r.batch.target_count()).sum::<usize>();
        assert_eq!(count(true), count(false));
        assert_eq!(count(true), data.documents.iter().map(Document::target_count).sum::<usize>());
    }

    #[test]
    fn an_order_depends_on_seed_and_epoch() {
        assert_eq!(epoch_order(50, 1, 2), epoch_order(50, 1, 2));
        assert_ne!(epoch_order(50, 1, 2), epoch_order(50, 1, 3));
        assert_ne!(epoch_order(50, 1, 2), epoch_order(50, 2, 2));
    }
}
