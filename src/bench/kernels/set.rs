//! The buffers of a case on the device.

use std::any::Any;
use std::ops::Range;

use bytemuck::Pod;
use half::bf16;
use rayon::prelude::*;

use super::case::{Arg, Element};
use super::values::Column;
use crate::backend::cuda::Cuda;
use crate::backend::cuda::memory::{Buffer, View, ViewMut};
use crate::error::Result;

/// A buffer of any element type.
pub enum Dev {
    Bf16(Buffer<bf16>),
    F32(Buffer<f32>),
    F64(Buffer<f64>),
    I32(Buffer<i32>),
    U8(Buffer<u8>),
}

/// `name`, `name_mut`: the buffer as one of these elements.
macro_rules! views {
    ($($name:ident $name_mut:ident $variant:ident $type:ty),+) => {$(
        /// To read. Panics if the argument was declared with another type: a mistake in the op's file.
        pub fn $name(&self) -> View<'_, $type> {
            match self { Self::$variant(b) => b.view(), _ => panic!("the argument is not {}", stringify!($type)) }
        }
        /// To write. Panics as the one above.
        pub fn $name_mut(&mut self) -> ViewMut<'_, $type> {
            match self { Self::$variant(b) => b.view_mut(), _ => panic!("the argument is not {}", stringify!($type)) }
        }
    )+};
}

impl Dev {
    /// Of an argument's size, holding anything.
    pub fn new(cuda: &Cuda, arg: &Arg) -> Result<Self> {
        let len = arg.len();
        Ok(match arg.element {
            Element::Bf16 => Self::Bf16(cuda.allocate(len)?),
            Element::F32 => Self::F32(cuda.allocate(len)?),
            Element::F64 => Self::F64(cuda.allocate(len)?),
            Element::I32 => Self::I32(cuda.allocate(len)?),
            Element::U8 => Self::U8(cuda.allocate(len)?),
        })
    }

    views!(bf16 bf16_mut Bf16 bf16, f32 f32_mut F32 f32, f64 f64_mut F64 f64, i32 i32_mut I32 i32, u8 u8_mut U8 u8);
}

impl Dev {
    /// Fills it with what a column repeats.
    pub fn fill(&mut self, cuda: &Cuda, column: &Column) -> Result<()> {
        let values = column.period();
        match self {
            Self::Bf16(b) => fill(cuda, b, values, bf16::from_f32),
            Self::F32(b) => fill(cuda, b, values, |v| v),
            Self::F64(b) => fill(cuda, b, values, f64::from),
            Self::I32(b) => fill(cuda, b, values, |v| v as i32),
            Self::U8(b) => fill(cuda, b, values, |v| v as u8),
        }
    }

    /// Another buffer that holds the same.
    pub fn copied(&self, cuda: &Cuda) -> Result<Self> {
        Ok(match self {
            Self::Bf16(b) => Self::Bf16(copied(cuda, b)?),
            Self::F32(b) => Self::F32(copied(cuda, b)?),
            Self::F64(b) => Self::F64(copied(cuda, b)?),
            Self::I32(b) => Self::I32(copied(cuda, b)?),
            Self::U8(b) => Self::U8(copied(cuda, b)?),
        })
    }

    /// The elements of these ranges, one range behind the other, widened. Waits for what was launched.
    pub fn read(&self, cuda: &Cuda, ranges: &[Range<usize>]) -> Result<Vec<f64>> {
        match self {
            Self::Bf16(b) => read(cuda, b, ranges, |v| f64::from(v.to_f32())),
            Self::F32(b) => read(cuda, b, ranges, f64::from),
            Self::F64(b) => read(cuda, b, ranges, |v| v),
            Self::I32(b) => read(cuda, b, ranges, f64::from),
            Self::U8(b) => read(cuda, b, ranges, f64::from),
        }
    }
}

fn copied<T: Pod>(cuda: &Cuda, from: &Buffer<T>) -> Result<Buffer<T>> {
    let mut to = cuda.allocate(from.len())?;
    cuda.copy(to.view_mut(), from.view())?;
    Ok(to)
}

/// Gathered on the device: one wait, however many ranges.
fn read<T: Pod>(cuda: &Cuda, b: &Buffer<T>, ranges: &[Range<usize>], widen: impl Fn(T) -> f64) -> Result<Vec<f64>> {
    let mut gathered = cuda.allocate(ranges.iter().map(ExactSizeIterator::len).sum())?;
    let mut end = 0;
    for range in ranges {
        let start = end;
        end += range.len();
        cuda.copy(gathered.range_mut(start..end), b.range(range.clone()))?;
    }
    Ok(cuda.download(&gathered)?.into_iter().map(widen).collect())
}

/// Uploads the values once and doubles them; poison if there are none.
fn fill<T: Pod + Send>(
    cuda: &Cuda,
    to: &mut Buffer<T>,
    values: &[f32],
    narrow: impl Fn(f32) -> T + Sync,
) -> Result<()> {
    let len = to.len();
    let values: Vec<T> = match values {
        [] => vec![poison(); len.min(1 << 16)],
        values => values[..values.len().min(len)].par_iter().map(|&v| narrow(v)).collect(),
    };
    if values.is_empty() {
        return Ok(());
    }
    cuda.write(to.range_mut(0..values.len()), &values)?;
    let mut filled = values.len();
    while filled < len {
        // A multiple of the period, but for the rest.
        let count = filled.min(len - filled);
        let (from, into) = to.split(filled);
        cuda.copy(into.into_range(0..count), from.range(0..count))?;
        filled += count;
    }
    Ok(())
}

/// Bytes that no op leaves behind by chance; in bf16 and f32 about -3e-16.
fn poison<T: Pod>() -> T {
    let mut value = T::zeroed();
    bytemuck::bytes_of_mut(&mut value).fill(0xa5);
    value
}

/// The buffers of one launch, in the order of the case's arguments.
pub struct Set {
    pub args: Vec<Dev>,
    /// What the way's `set_up` has made.
    pub extra: Option<Box<dyn Any>>,
}

impl Set {
    /// All buffers: `let [y, x, w] = set.all();`. Panics if the case has another number of arguments.
    pub fn all<const N: usize>(&mut self) -> [&mut Dev; N] {
        let found = self.args.len();
        match <&mut [Dev; N]>::try_from(&mut self.args[..]) {
            Ok(all) => all.each_mut(),
            Err(_) => panic!("{found} arguments, expected {N}"),
        }
    }
}
