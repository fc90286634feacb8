//! What the tests of the ops share: random inputs, poisoned outputs, and the rule of tolerance.

use bytemuck::Pod;
use half::bf16;
use halfbyte::Error;
use halfbyte::backend::cuda::Cuda;
use halfbyte::backend::cuda::memory::Buffer;
use libtest_mimic::{Failed, Trial};

/// What a test returns: the message of a failure converts into it.
pub type Outcome = Result<(), Failed>;

/// The trial; reported as ignored, with the reason in brackets before its name, where something that it needs is missing.
pub fn unless(missing: Option<&String>, trial: Trial) -> Trial {
    match missing {
        Some(why) => trial.with_kind(why.clone()).with_ignored_flag(true),
        None => trial,
    }
}

/// Fails unless the two are equal, bit for bit; names the first place where they are not.
pub fn same<T: bytemuck::Pod>(what: &str, found: &[T], expected: &[T]) -> Outcome {
    if found.len() != expected.len() {
        return Err(format!("{what}: {} elements, expected {}", found.len(), expected.len()).into());
    }
    let differs = |(a, b): (&T, &T)| bytemuck::bytes_of(a) != bytemuck::bytes_of(b);
    let Some(first) = found.iter().zip(expected).position(differs) else { return Ok(()) };
    let count = found.iter().zip(expected).filter(|&pair| differs(pair)).count();
    let hex = |x: &T| bytemuck::bytes_of(x).iter().rev().map(|b| format!("{b:02x}")).collect::<String>();
    let (a, b) = (hex(&found[first]), hex(&expected[first]));
    Err(format!("{what}: {count} of {} differ, the first is {first}: 0x{a}, expected 0x{b}", found.len()).into())
}

/// An output full of bytes that no op leaves behind by chance (in bf16 and f32: about -3e-16).
pub fn poisoned<T: Pod>(cuda: &Cuda, len: usize) -> Result<Buffer<T>, Error> {
    cuda.upload(&elements::<T>(&vec![0xa5; len * size_of::<T>()]))
}

pub fn elements<T: Pod>(bytes: &[u8]) -> Vec<T> {
    let mut all = vec![T::zeroed(); bytes.len() / size_of::<T>()];
    bytemuck::cast_slice_mut(&mut all).copy_from_slice(bytes);
    all
}

/// Numbers from a seed (splitmix64): the same on every machine.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x5851_f42d_4c95_7f2d)
    }

    pub fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// Below `n`.
    pub fn below(&mut self, n: usize) -> usize {
        (self.word() % n as u64) as usize
    }

    /// In [0, 1).
    pub fn uniform(&mut self) -> f32 {
        (self.word() >> 40) as f32 / (1 << 24) as f32
    }

    /// About normal, mean 0, deviation 1 (a sum of twelve).
    pub fn normal(&mut self) -> f32 {
        (0..12).map(|_| self.uniform()).sum::<f32>() - 6.0
    }

    /// `n` bf16 values of deviation `scale`.
    pub fn bf16s(&mut self, n: usize, scale: f32) -> Vec<bf16> {
        (0..n).map(|_| bf16::from_f32(self.normal() * scale)).collect()
    }

    /// `n` f32 values of deviation `scale`.
    pub fn f32s(&mut self, n: usize, scale: f32) -> Vec<f32> {
        (0..n).map(|_| self.normal() * scale).collect()
    }
}

/// Rounds to bf16 and widens again: what a chain of bf16 ops does to every intermediate.
pub fn round(x: f32) -> f32 {
    bf16::from_f32(x).to_f32()
}

/// Fails unless `result` is [`Error::Shape`] of this op and argument.
pub fn refused(result: Result<(), Error>, op: &str, argument: &str) -> Outcome {
    match result {
        Err(Error::Shape { op: o, argument: a, .. }) if (o, a) == (op, argument) => Ok(()),
        Err(other) => Err(format!("expected {op} to refuse {argument}, found: {other}").into()),
        Ok(()) => Err(format!("{op} took a wrong {argument}").into()),
    }
}

/// Widens.
pub fn wide(x: &[bf16]) -> Vec<f32> {
    x.iter().map(|v| v.to_f32()).collect()
}

/// Relative L2 distance of `found` from `exact` (absolute where `exact` is zero).
pub fn distance(found: &[f32], exact: &[f32]) -> f64 {
    assert_eq!(found.len(), exact.len());
    let square = |x: f64| x * x;
    let error: f64 = found.iter().zip(exact).map(|(&a, &b)| square(f64::from(a) - f64::from(b))).sum();
    let norm: f64 = exact.iter().map(|&b| square(f64::from(b))).sum();
    error.sqrt() / if norm > 0.0 { norm.sqrt() } else { 1.0 }
}

/// The rule of tolerance: `found` may be at most twice as far from `exact` (f32 or better) as `plain` is, a plain bf16
/// computation of the same op (rounded wherever a chain of bf16 ops would round). Distances are relative L2.
pub fn within_twice(what: &str, found: &[f32], plain: &[f32], exact: &[f32]) -> Outcome {
    if let Some(i) = found.iter().position(|x| !x.is_finite()) {
        return Err(format!("{what}: element {i} is {}", found[i]).into());
    }
    let (ours, bound) = (distance(found, exact), 2.0 * distance(plain, exact));
    // The floor: f32 sums in another order, where the plain computation happens to be exact.
    if ours <= bound.max(2e-6) {
        return Ok(());
    }
    let worst = |i: &usize| (found[*i] - exact[*i]).abs();
    let at = (0..exact.len()).max_by(|i, j| worst(i).total_cmp(&worst(j))).unwrap_or(0);
    Err(format!(
        "{what}: error {ours:.3e}, at most {bound:.3e} allowed; worst at {at}: {} for {}",
        found[at], exact[at]
    )
    .into())
}
