//! AdamW as every backend runs it: the state it keeps, and the numbers that the host works out once a step.

use std::ops::Range;

use crate::error::{Error, Result};

/// Weights that share one absmax where the moments are in 8 bits, as in bitsandbytes.
pub const MOMENT_BLOCK: usize = 256;

/// `optim` of the run file. All 32-bit kinds compute the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum OptimKind {
    AdamwTorch,
    PagedAdamw32bit,
    /// m and v in 8 bits, blocks of 256, as bitsandbytes keeps them.
    PagedAdamw8bit,
}

/// What an optimizer is made from.
#[derive(Clone, Copy, Debug)]
pub struct NewOptimizer<'a> {
    pub kind: OptimKind,
    /// (P) f32 master weights at the start; m = v = 0.
    pub init: &'a [f32],
    /// Elements of each tensor of the adapter, in the order of the flat vector; their sum is P. Blocks of 8-bit moments
    /// start anew with each tensor.
    pub tensors: &'a [usize],
}

/// One moment of all P weights, in the form that the device keeps it in: a resumed run starts from the same bits.
#[derive(Clone, Debug, PartialEq)]
pub enum Moment {
    /// (P)
    F32(Vec<f32>),
    /// A value is `map[code] * absmax[block]`, with the dynamic map of [`crate::nf4::codebook`]: signed for m, unsigned for v.
    U8 {
        /// (P)
        codes: Vec<u8>,
        /// (blocks), see [`Blocks`]
        absmax: Vec<f32>,
    },
}

/// AdamW's state of all P trainable weights, on the host.
#[derive(Clone, Debug, PartialEq)]
pub struct OptimizerState {
    /// (P) f32 master copy.
    pub master: Vec<f32>,
    /// First moment.
    pub m: Moment,
    /// Second moment.
    pub v: Moment,
}

impl OptimizerState {
    /// Master = `init`, m = v = 0. [`Error::Shape`] if the tensors do not add up to P.
    pub fn new(of: NewOptimizer) -> Result<Self> {
        let p = of.init.len();
        let blocks = Blocks::new(p, of.tensors)?.count();
        let zero = |code: u8| match of.kind {
            OptimKind::AdamwTorch | OptimKind::PagedAdamw32bit => Moment::F32(vec![0.0; p]),
            OptimKind::PagedAdamw8bit => Moment::U8 { codes: vec![code; p], absmax: vec![0.0; blocks] },
        };
        Ok(Self { master: of.init.to_vec(), m: zero(M_ZERO), v: zero(V_ZERO) })
    }

    /// Copies `from` over this state. [`Error::Shape`] unless both have the same form.
    pub fn copy_from(&mut self, op: &'static str, from: &Self) -> Result<()> {
        copy(op, "master", &mut self.master, &from.master)?;
        copy_moment(op, ["m", "m.absmax"], &mut self.m, &from.m)?;
        copy_moment(op, ["v", "v.absmax"], &mut self.v, &from.v)
    }
}

/// The code of 0 in the signed and in the unsigned dynamic map.
pub const M_ZERO: u8 = 127;
pub const V_ZERO: u8 = 0;

fn copy<T: Copy>(op: &'static str, argument: &'static str, to: &mut [T], from: &[T]) -> Result<()> {
    if to.len() != from.len() {
        return Err(Error::Shape { op, argument, found: from.len(), expected: to.len() });
    }
    to.copy_from_slice(from);
    Ok(())
}

fn copy_moment(op: &'static str, names: [&'static str; 2], to: &mut Moment, from: &Moment) -> Result<()> {
    match (to, from) {
        (Moment::F32(to), Moment::F32(from)) => copy(op, names[0], to, from),
        (Moment::U8 { codes, absmax }, Moment::U8 { codes: from_codes, absmax: from_absmax }) => {
            copy(op, names[0], codes, from_codes)?;
            copy(op, names[1], absmax, from_absmax)
        }
        (_, Moment::F32(_)) => Err(Error::Shape { op, argument: "moments (bits)", found: 32, expected: 8 }),
        (_, Moment::U8 { .. }) => Err(Error::Shape { op, argument: "moments (bits)", found: 8, expected: 32 }),
    }
}

/// How the flat vector of P weights falls into blocks of 256 that start anew with each tensor; the last block of a tensor
/// may be shorter.
#[derive(Clone, Debug, PartialEq)]
pub struct Blocks {
    /// First weight of each tensor that has any, and number of its first block.
    starts: Vec<(usize, usize)>,
    p: usize,
    count: usize,
}

impl Blocks {
    /// [`Error::Shape`] if the tensors do not add up to `p`.
    pub fn new(p: usize, tensors: &[usize]) -> Result<Self> {
        let (mut starts, mut at, mut count) = (Vec::with_capacity(tensors.len()), 0usize, 0usize);
        for &len in tensors.iter().filter(|&&len| len > 0) {
            starts.push((at, count));
            at = at.saturating_add(len);
            count += len.div_ceil(MOMENT_BLOCK);
        }
        if at != p {
            return Err(Error::Shape { op: "new_optimizer", argument: "tensors", found: at, expected: p });
        }
        Ok(Self { starts, p, count })
    }

    /// Number of blocks.
    pub fn count(&self) -> usize {
        self.count
    }

    /// First weight and first block of each tensor.
    pub fn starts(&self) -> &[(usize, usize)] {
        &self.starts
    }

    /// The weights of a block. Panics if there is no such block.
    pub fn range(&self, block: usize) -> Range<usize> {
        assert!(block < self.count, "block {block} of {}", self.count);
        let tensor = self.starts.partition_point(|&(_, first)| first <= block) - 1;
        let (start, first) = self.starts[tensor];
        let end = self.starts.get(tensor + 1).map_or(self.p, |&(next, _)| next);
        let at = start + (block - first) * MOMENT_BLOCK;
        at..(at + MOMENT_BLOCK).min(end)
    }
}

/// Where master weights and moments lie in the one allocation that a GPU keeps them in. Sections start at multiples of
/// 2 MiB, the unit that managed memory moves in.
#[derive(Clone, Debug, PartialEq)]
pub struct StateLayout {
    /// Bytes of the master weights, of m and of v.
    pub master: Range<usize>,
    pub m: Range<usize>,
    pub v: Range<usize>,
    /// Bytes of the absmax of 8-bit moments; empty for 32-bit ones.
    pub m_absmax: Range<usize>,
    pub v_absmax: Range<usize>,
    /// Size of the allocation.
    pub bytes: usize,
}

impl StateLayout {
    /// Of `p` weights in `blocks` blocks.
    pub fn new(kind: OptimKind, p: usize, blocks: usize) -> Self {
        let (moment, absmax) = match kind {
            OptimKind::AdamwTorch | OptimKind::PagedAdamw32bit => (4, 0),
            OptimKind::PagedAdamw8bit => (1, 4),
        };
        let mut end = 0usize;
        let mut section = |bytes: usize| {
            let start = end.next_multiple_of(2 << 20);
            end = start + bytes;
            start..end
        };
        let (master, m, v) = (section(4 * p), section(moment * p), section(moment * p));
        let (m_absmax, v_absmax) = (section(absmax * blocks), section(absmax * blocks));
        Self { master, m, v, m_absmax, v_absmax, bytes: end }
    }
}

/// Parameter groups there is room for at least on a device.
pub const MIN_GROUPS: usize = 64;
/// Bytes of a row of a device's tables: of a group, of a tensor.
pub const TABLE_ROW: usize = 16;

/// Bytes of the tables of groups and of tensors that a device keeps beside the state, for an adapter of `tensors` tensors.
pub fn tables(tensors: usize) -> [usize; 2] {
    [tensors.max(MIN_GROUPS) * TABLE_ROW, tensors.max(1) * TABLE_ROW]
}

/// A range of the trainable weights with settings of its own.
#[derive(Clone, Debug, PartialEq)]
pub struct ParamGroup {
    pub range: Range<usize>,
    pub lr: f32,
    pub weight_decay: f32,
}

/// Fails unless the groups cover 0..p, each weight once. Answers with their order by rising start, the empty ones left out.
pub fn sorted_groups(groups: &[ParamGroup], p: usize) -> Result<Vec<&ParamGroup>> {
    let op = "adamw";
    let found = groups.iter().map(|g| g.range.len()).sum();
    if found != p {
        return Err(Error::Shape { op, argument: "groups (weights covered)", found, expected: p });
    }
    let mut sorted: Vec<&ParamGroup> = groups.iter().filter(|g| !g.range.is_empty()).collect();
    sorted.sort_by_key(|g| g.range.start);
    let mut at = 0;
    for g in &sorted {
        if g.range.end > p {
            return Err(Error::Shape { op, argument: "groups (end)", found: g.range.end, expected: p });
        }
        if g.range.start != at {
            return Err(Error::Shape { op, argument: "groups (overlap)", found: g.range.start, expected: at });
        }
        at = g.range.end;
    }
    Ok(sorted)
}

/// What the host works out for one step, in f64 as PyTorch does it: 1 - beta^step loses digits in f32.
#[derive(Clone, Copy, Debug)]
pub struct StepFactors {
    /// 1 - beta1^step
    bias1: f64,
    /// sqrt(1 - beta2^step)
    pub bias2_root: f32,
}

impl StepFactors {
    pub fn new(beta1: f32, beta2: f32, step: u64) -> Self {
        let power = |b: f32| 1.0 - f64::from(b).powf(step as f64);
        Self { bias1: power(beta1), bias2_root: power(beta2).sqrt() as f32 }
    }

    /// What the weights of a group are multiplied by, and the factor of their update: 1 - lr * wd, lr / (1 - beta1^step).
    pub fn of_group(&self, g: &ParamGroup) -> (f32, f32) {
        let decay = (1.0 - f64::from(g.lr) * f64::from(g.weight_decay)) as f32;
        (decay, (f64::from(g.lr) / self.bias1) as f32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_start_anew_with_each_tensor() {
        let blocks = Blocks::new(1300, &[300, 0, 256, 1, 743]).unwrap();
        let ranges: Vec<_> = (0..blocks.count()).map(|b| blocks.range(b)).collect();
        assert_eq!(ranges, [0..256, 256..300, 300..556, 556..557, 557..813, 813..1069, 1069..1300]);
        assert_eq!(Blocks::new(0, &[]).unwrap().count(), 0);
        assert!(matches!(Blocks::new(3, &[1, 1]), Err(Error::Shape { argument: "tensors", found: 2, .. })));
    }

    #[test]
    fn a_state_takes_another_of_the_same_form_alone() {
        let make = |kind, p| OptimizerState::new(NewOptimizer { kind, init: &vec![1.0; p], tensors: &[p] }).unwrap();
        let (mut wide, narrow) = (make(OptimKind::PagedAdamw32bit, 300), make(OptimKind::PagedAdamw8bit, 300));
        assert!(matches!(wide.copy_from("x", &narrow), Err(Error::Shape { argument: "moments (bits)", .. })));
        assert!(matches!(
            wide.copy_from("x", &make(OptimKind::AdamwTorch, 301)),
            Err(Error::Shape { argument: "master", .. })
        ));
        wide.copy_from("x", &make(OptimKind::AdamwTorch, 300)).unwrap();
    }
}
