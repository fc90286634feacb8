//! The buffers of a case on the device.

use std::any::Any;

use half::bf16;

use super::case::{Arg, Element};
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
            Element::Bf16 => Self::Bf16(cuda.zeros(len)?),
            Element::F32 => Self::F32(cuda.zeros(len)?),
            Element::F64 => Self::F64(cuda.zeros(len)?),
            Element::I32 => Self::I32(cuda.zeros(len)?),
            Element::U8 => Self::U8(cuda.zeros(len)?),
        })
    }

    views!(bf16 bf16_mut Bf16 bf16, f32 f32_mut F32 f32, f64 f64_mut F64 f64, i32 i32_mut I32 i32, u8 u8_mut U8 u8);
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
