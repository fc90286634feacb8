//! Reading fixtures, by the safetensors crate and nothing of ours.

use std::path::{Path, PathBuf};

use half::{bf16, f16};
use libtest_mimic::Failed;
use safetensors::{Dtype, SafeTensors};

/// A safetensors file in memory.
pub struct Fixture {
    path: PathBuf,
    bytes: Vec<u8>,
    names: Vec<String>,
}

/// One tensor of it.
pub struct Stored<'a> {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub bytes: &'a [u8],
}

impl Fixture {
    pub fn open(path: &Path) -> Result<Self, Failed> {
        let bytes = std::fs::read(path).map_err(|e| format!("{}: {e}", path.display()))?;
        let parsed = SafeTensors::deserialize(&bytes).map_err(|e| format!("{}: {e}", path.display()))?;
        let mut names: Vec<String> = parsed.names().into_iter().map(str::to_owned).collect();
        names.sort();
        Ok(Self { path: path.to_owned(), bytes, names })
    }

    fn parsed(&self) -> SafeTensors<'_> {
        SafeTensors::deserialize(&self.bytes).expect("checked in open")
    }

    pub fn get(&self, name: &str) -> Option<Stored<'_>> {
        let view = self.parsed().tensor(name).ok()?;
        Some(Stored { dtype: view.dtype(), shape: view.shape().to_vec(), bytes: view.data() })
    }

    pub fn require(&self, name: &str) -> Result<Stored<'_>, Failed> {
        self.get(name).ok_or_else(|| format!("{}: no tensor {name}", self.path.display()).into())
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.names.iter().map(String::as_str)
    }

    /// Shape and values of token ids, labels or masks.
    pub fn i64s(&self, name: &str) -> Result<(Vec<usize>, Vec<i32>), Failed> {
        let t = self.require(name)?;
        if t.dtype != Dtype::I64 {
            return Err(format!("{}: {name} is {:?}, expected I64", self.path.display(), t.dtype).into());
        }
        let values = t.bytes.chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap()) as i32);
        Ok((t.shape, values.collect()))
    }

    /// Any float dtype, widened.
    pub fn f32s(&self, name: &str) -> Result<Vec<f32>, Failed> {
        let t = self.require(name)?;
        match t.dtype {
            Dtype::F32 => Ok(t.bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()),
            Dtype::BF16 => Ok(t.bytes.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect()),
            Dtype::F16 => Ok(t.bytes.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32()).collect()),
            other => Err(format!("{}: {name} is {other:?}, expected floats", self.path.display()).into()),
        }
    }
}

/// `Err` with a message unless `found` is within `tolerance` of `expected`, relative to `expected`.
pub fn near(what: &str, found: f64, expected: f64, tolerance: f64) -> Result<(), Failed> {
    let error = (found - expected).abs();
    if error <= tolerance * expected.abs() {
        return Ok(());
    }
    Err(format!("{what}: found {found}, expected {expected}: off by {error:e}, allowed {tolerance:e} relative").into())
}

/// `Err` unless the L2 norm of the difference is within `tolerance` of that of `expected`.
pub fn near_l2(what: &str, found: &[f32], expected: &[f32], tolerance: f64) -> Result<(), Failed> {
    if found.len() != expected.len() {
        return Err(format!("{what}: found {} values, expected {}", found.len(), expected.len()).into());
    }
    let square = |x: f64| x * x;
    let error: f64 = found.iter().zip(expected).map(|(&a, &b)| square(f64::from(a) - f64::from(b))).sum();
    let size: f64 = expected.iter().map(|&b| square(b.into())).sum();
    // Not `error > ...`: a NaN must fail.
    if error.sqrt() <= tolerance * size.sqrt() {
        return Ok(());
    }
    Err(format!("{what}: off by {:e} of its L2 norm, allowed {tolerance:e}", (error / size).sqrt()).into())
}

/// `Err` unless all bits are equal.
pub fn same_bits(what: &str, found: &[f32], expected: &[f32]) -> Result<(), Failed> {
    if found.len() != expected.len() {
        return Err(format!("{what}: found {} values, expected {}", found.len(), expected.len()).into());
    }
    match found.iter().zip(expected).position(|(a, b)| a.to_bits() != b.to_bits()) {
        None => Ok(()),
        Some(i) => Err(format!("{what}: index {i}: found {:e}, expected {:e}", found[i], expected[i]).into()),
    }
}

/// `Err` unless all bytes are equal.
pub fn same_bytes(what: &str, found: &[u8], expected: &[u8]) -> Result<(), Failed> {
    if found.len() != expected.len() {
        return Err(format!("{what}: found {} bytes, expected {}", found.len(), expected.len()).into());
    }
    match found.iter().zip(expected).position(|(a, b)| a != b) {
        None => Ok(()),
        Some(i) => Err(format!("{what}: byte {i}: found {:#04x}, expected {:#04x}", found[i], expected[i]).into()),
    }
}
