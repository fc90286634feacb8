//! Tensors on the host: plain row-major bytes with a dtype and a shape, owned or inside a memory-mapped file.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use half::bf16;
use memmap2::{Mmap, UncheckedAdvice};
use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::nf4::{QuantConfig, Quantized, quantize};

/// Element type of a dense tensor in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dtype {
    F32,
    Bf16,
    F16,
}

impl Dtype {
    /// Bytes an element takes.
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
        }
    }

    /// The name PyTorch, transformers and bitsandbytes use: "float32", "bfloat16", "float16".
    pub fn torch_name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::Bf16 => "bfloat16",
            Self::F16 => "float16",
        }
    }

    /// The inverse of [`Dtype::torch_name`]; None for any other name.
    pub fn from_torch_name(name: &str) -> Option<Self> {
        [Self::F32, Self::Bf16, Self::F16].into_iter().find(|d| d.torch_name() == name)
    }
}

#[derive(Clone, Debug)]
enum Bytes {
    Owned(Arc<[u8]>),
    Mapped(Arc<Mmap>, Range<usize>),
    /// The tensor is a shape alone.
    Unknown,
}

/// A dense tensor: `shape` elements of `dtype`, row-major, little-endian. Cloning shares the bytes.
#[derive(Clone, Debug)]
pub struct HostTensor {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    bytes: Bytes,
    /// File and name, for errors.
    origin: Option<Arc<(PathBuf, String)>>,
}

impl HostTensor {
    /// A tensor over owned bytes. Panics if the byte count is not `shape` × `dtype`: the caller has checked.
    pub fn owned(dtype: Dtype, shape: Vec<usize>, bytes: Vec<u8>) -> Self {
        assert_eq!(bytes.len(), shape.iter().product::<usize>() * dtype.size(), "bytes against shape");
        Self { dtype, shape, bytes: Bytes::Owned(bytes.into()), origin: None }
    }

    /// A tensor over a range of a mapped file. Panics if the range is not `shape` × `dtype` bytes or leaves the map.
    pub fn mapped(dtype: Dtype, shape: Vec<usize>, map: Arc<Mmap>, range: Range<usize>) -> Self {
        assert_eq!(range.len(), shape.iter().product::<usize>() * dtype.size(), "bytes against shape");
        assert!(range.end <= map.len(), "range inside the map");
        Self { dtype, shape, bytes: Bytes::Mapped(map, range), origin: None }
    }

    /// A tensor of which nothing but dtype and shape is known: for counting. It has no bytes to read.
    pub fn shape_only(dtype: Dtype, shape: Vec<usize>) -> Self {
        Self { dtype, shape, bytes: Bytes::Unknown, origin: None }
    }

    /// The same tensor, called `name` of `file` in errors.
    pub fn named(mut self, file: &Path, name: &str) -> Self {
        self.origin = Some(Arc::new((file.into(), name.into())));
        self
    }

    /// An f32 tensor from values.
    pub fn from_f32(shape: Vec<usize>, values: &[f32]) -> Self {
        Self::owned(Dtype::F32, shape, bytemuck::cast_slice(values).to_vec())
    }

    pub fn bytes(&self) -> &[u8] {
        match &self.bytes {
            Bytes::Owned(b) => b,
            Bytes::Mapped(map, r) => &map[r.clone()],
            Bytes::Unknown => &[],
        }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The index of the first NaN or infinity. All cores look: reading the file is the limit.
    pub fn first_not_finite(&self) -> Option<usize> {
        const CHUNK: usize = 1 << 20;
        let size = self.dtype.size();
        self.bytes().par_chunks(CHUNK).enumerate().find_map_first(|(i, bytes)| {
            // Values whose exponent bits are all ones. Counting first keeps the loop free of branches.
            let at = match self.dtype {
                Dtype::F32 => position(bytes, |b: [u8; 4]| u32::from_le_bytes(b) & 0x7F80_0000 == 0x7F80_0000),
                Dtype::Bf16 => position(bytes, |b: [u8; 2]| u16::from_le_bytes(b) & 0x7F80 == 0x7F80),
                Dtype::F16 => position(bytes, |b: [u8; 2]| u16::from_le_bytes(b) & 0x7C00 == 0x7C00),
            };
            at.map(|at| i * (CHUNK / size) + at)
        })
    }

    /// [`Error::Input`] with file, tensor and index if a value is NaN or infinite.
    pub fn check_finite(&self) -> Result<()> {
        let Some(i) = self.first_not_finite() else { return Ok(()) };
        let mut value = [0.0];
        self.widen(i, &mut value);
        let (file, name) = match &self.origin {
            Some(origin) => (origin.0.as_path(), origin.1.as_str()),
            None => (Path::new("memory"), "without a name"),
        };
        Err(Error::input(file, format!("tensor {name}"), format!("{} at index {i}", value[0]), "finite weights"))
    }

    /// Gives back the pages of a mapped tensor whose values now live elsewhere.
    pub fn release(&self) {
        if let Bytes::Mapped(map, range) = &self.bytes {
            // SAFETY: the map is a read-only view of a file. MADV_DONTNEED drops its pages from this process; whoever
            // touches one again (a neighbour on the same page, too) gets the same bytes from the file.
            let _ = unsafe { map.unchecked_advise_range(UncheckedAdvice::DontNeed, range.start, range.len()) };
        }
    }

    /// All elements widened to f32 (exact).
    pub fn to_f32(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.len()];
        self.widen(0, &mut out);
        out
    }

    /// Elements `start .. start + out.len()` widened to f32 (exact) into `out`.
    #[inline(always)] // into loops compiled for wider vectors than the crate's
    pub fn widen(&self, start: usize, out: &mut [f32]) {
        let size = self.dtype.size();
        let bytes = &self.bytes()[start * size..(start + out.len()) * size];
        match self.dtype {
            Dtype::F32 => {
                for (o, b) in out.iter_mut().zip(bytes.chunks_exact(4)) {
                    *o = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
                }
            }
            Dtype::Bf16 => {
                for (o, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                    *o = bf16::from_le_bytes([b[0], b[1]]).to_f32();
                }
            }
            Dtype::F16 => {
                for (o, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                    *o = f16_to_f32(u16::from_le_bytes([b[0], b[1]]));
                }
            }
        }
    }
}

fn position<const S: usize>(bytes: &[u8], bad: impl Fn([u8; S]) -> bool) -> Option<usize> {
    let (values, _) = bytes.as_chunks::<S>();
    let any = values.iter().fold(false, |any, &v| any | bad(v));
    if any { values.iter().position(|&v| bad(v)) } else { None }
}

/// f16 bits to f32 without a branch, so that a loop over it vectorises (`half` asks the processor at every element).
#[inline(always)]
fn f16_to_f32(bits: u16) -> f32 {
    let magnitude = u32::from(bits & 0x7fff);
    // The exponent's bias differs by 112; the product also normalises what is subnormal in f16.
    let finite = (f32::from_bits(magnitude << 13) * f32::from_bits(0x7780_0000)).to_bits();
    let special = if magnitude >= 0x7c00 { 0x7f80_0000 } else { 0 };
    f32::from_bits(finite | special | u32::from(bits & 0x8000) << 16)
}

/// A frozen weight matrix (N, K) as a checkpoint holds it: 16/32-bit, or in 4 bits.
#[derive(Clone, Debug)]
pub enum HostMatrix {
    Dense(HostTensor),
    /// Dense as yet: the device puts it in 4 bits as it takes it.
    Quantize(HostTensor, QuantConfig),
    Quantized(Quantized),
}

impl HostMatrix {
    /// (N, K).
    pub fn dims(&self) -> (usize, usize) {
        let shape = match self {
            Self::Dense(t) | Self::Quantize(t, _) => &t.shape,
            Self::Quantized(q) => &q.shape,
        };
        assert_eq!(shape.len(), 2, "a weight matrix has two dimensions");
        (shape[0], shape[1])
    }

    /// All N*K elements in f32, row-major (dequantised if in 4 bits).
    pub fn to_f32(&self) -> Vec<f32> {
        match self {
            Self::Dense(t) => t.to_f32(),
            Self::Quantize(t, config) => quantize(t, config.quant_type, config.double_quant).dequantize(),
            Self::Quantized(q) => q.dequantize(),
        }
    }

    /// The same matrix, in 4 bits if that is what it is to be. [`Error::Input`] if a weight is NaN or infinite.
    pub fn quantized(self) -> Result<Self> {
        match &self {
            Self::Dense(t) => t.check_finite().map(|()| self),
            Self::Quantize(t, config) => {
                t.check_finite()?;
                let q = quantize(t, config.quant_type, config.double_quant);
                t.release();
                Ok(Self::Quantized(q))
            }
            Self::Quantized(_) => Ok(self),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_f16_widens_exactly() {
        for bits in 0..=u16::MAX {
            let (ours, theirs) = (f16_to_f32(bits), half::f16::from_bits(bits).to_f32());
            assert!(ours.to_bits() == theirs.to_bits() || (ours.is_nan() && theirs.is_nan()), "{bits:#06x}");
        }
    }
}
