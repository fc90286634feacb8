//! What is timed: a case is one op at one shape, told as data. From the list of its arguments follow the buffers, their
//! inputs, the check against the oracle, the C signature of a candidate's kernel, and the columns of the table.

use std::ops::Range;
use std::sync::Arc;

#[cfg(feature = "cuda")]
use super::set::Set;
use super::values::Inputs;
use crate::backend::Work;
use crate::backend::cpu::Cpu;
#[cfg(feature = "cuda")]
use crate::backend::cuda::Kernels;
use crate::error::Result;

/// Type of the elements of an argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Element {
    Bf16,
    F32,
    F64,
    I32,
    U8,
}

impl Element {
    /// Bytes of one.
    pub fn size(self) -> usize {
        match self {
            Self::U8 => 1,
            Self::Bf16 => 2,
            Self::F32 | Self::I32 => 4,
            Self::F64 => 8,
        }
    }

    /// Its name in CUDA C++.
    pub fn c_name(self) -> &'static str {
        match self {
            Self::Bf16 => "__nv_bfloat16",
            Self::F32 => "float",
            Self::F64 => "double",
            Self::I32 => "int",
            Self::U8 => "unsigned char",
        }
    }

    /// What rounding may be off, relative to the number: 2^-8 for bf16, 2^-24 for f32.
    pub fn half_ulp(self) -> f64 {
        match self {
            Self::Bf16 => 1.0 / 256.0,
            Self::F32 => 1.0 / f64::from(1u32 << 24),
            Self::F64 | Self::I32 | Self::U8 => 0.0,
        }
    }
}

/// What an op does with an argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Only read.
    Input,
    /// Written whole, read never: it starts poisoned.
    Output,
    /// Read and written.
    InOut,
    /// Holds nothing before and nothing of use behind.
    Scratch,
}

/// What an argument holds before the op runs. Always the same for the same case.
#[derive(Clone, Debug)]
pub enum Fill {
    /// Random, evenly spread, mean 0, of this standard deviation; rounded to the element's type.
    Random(f32),
    /// The same, repeating after so many elements: an oracle that sums over all rows then needs few different ones.
    Periodic(f32, usize),
    /// Random bytes, each of 0..256.
    Bytes,
    Const(f32),
    /// These, over and over.
    List(Arc<[f32]>),
    /// Nothing that may be used: bytes 0xa5.
    Poison,
}

/// An argument that is a buffer.
#[derive(Clone, Debug)]
pub struct Arg {
    pub name: &'static str,
    pub role: Role,
    pub element: Element,
    /// Letter and size of each dimension, the outermost first; row-major.
    pub dims: Vec<(&'static str, usize)>,
    pub fill: Fill,
    /// Of an output: multiply-adds that the oracle spends on one element, its share of what a row has in common included.
    pub cost: usize,
}

impl Arg {
    pub fn input(name: &'static str, element: Element, dims: &[(&'static str, usize)], fill: Fill) -> Self {
        Self { name, role: Role::Input, element, dims: dims.to_vec(), fill, cost: 0 }
    }

    pub fn output(name: &'static str, element: Element, dims: &[(&'static str, usize)], cost: usize) -> Self {
        Self { name, role: Role::Output, element, dims: dims.to_vec(), fill: Fill::Poison, cost }
    }

    pub fn in_out(
        name: &'static str,
        element: Element,
        dims: &[(&'static str, usize)],
        fill: Fill,
        cost: usize,
    ) -> Self {
        Self { name, role: Role::InOut, element, dims: dims.to_vec(), fill, cost }
    }

    pub fn scratch(name: &'static str, element: Element, len: usize) -> Self {
        Self { name, role: Role::Scratch, element, dims: vec![("scratch", len)], fill: Fill::Poison, cost: 0 }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.dims.iter().map(|d| d.1).product()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn bytes(&self) -> usize {
        self.len() * self.element.size()
    }

    /// Elements of a row: the innermost dimension.
    pub fn width(&self) -> usize {
        self.dims.last().map_or(1, |d| d.1).max(1)
    }

    /// Whether the oracle tells what it holds behind the op.
    pub fn is_checked(&self) -> bool {
        matches!(self.role, Role::Output | Role::InOut)
    }

    /// "y[0, 777]": the place of an element.
    pub fn place(&self, element: usize) -> String {
        let mut rest = element;
        let mut at: Vec<String> = vec![];
        for (_, size) in self.dims.iter().rev() {
            at.push((rest % (*size).max(1)).to_string());
            rest /= (*size).max(1);
        }
        at.reverse();
        format!("{}[{}]", self.name, at.join(", "))
    }
}

/// An argument that is a number.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scalar {
    U64(u64),
    F32(f32),
}

impl Scalar {
    pub fn c_name(self) -> &'static str {
        match self {
            Self::U64(_) => "unsigned long long",
            Self::F32(_) => "float",
        }
    }
}

/// What an element must be: `value`, give or take `tolerance`. NaN is never right.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Expected {
    pub value: f64,
    pub tolerance: f64,
}

impl Expected {
    /// These bits and no others.
    pub fn exact(value: f64) -> Self {
        Self { value, tolerance: 0.0 }
    }

    /// `value` rounded to `element` once, on top of what f32 arithmetic loses in sums whose terms have absolute values
    /// that add up to `magnitude`.
    pub fn rounded(value: f64, element: Element, magnitude: f64) -> Self {
        // 2^-20: sixteen times the rounding of one f32 operation.
        Self { value, tolerance: element.half_ulp() * value.abs() + magnitude / f64::from(1u32 << 20) + 1e-30 }
    }

    /// The same where numbers were rounded to bf16 on the way: `error` is what that may come to.
    pub fn with_error(self, error: f64) -> Self {
        Self { tolerance: self.tolerance + error, ..self }
    }

    pub fn holds(self, found: f64) -> bool {
        (found - self.value).abs() <= self.tolerance
    }
}

/// What the elements `span` of the output named must be; a span lies inside one row.
pub type Oracle = Arc<dyn Fn(&Inputs, &str, Range<usize>) -> Vec<Expected> + Send + Sync>;

/// One launch of the op on the buffers of a set, in the order of the case's arguments.
#[cfg(feature = "cuda")]
pub type Launch = Arc<dyn Fn(&mut crate::backend::cuda::Cuda, &mut Set) -> Result<()> + Send + Sync>;

/// One of several ways to run an op on a GPU.
#[cfg(feature = "cuda")]
#[derive(Clone)]
pub struct Way {
    /// Its name in the table: "own", "sm80", "cublas", "fused", "slice", "slice_cublas", "matvec".
    pub name: &'static str,
    /// Forces these kernels; None: those that the card runs best.
    pub kernels: Option<Kernels>,
    /// Runs only where the machine has cuBLAS.
    pub needs_cublas: bool,
    /// What a set holds beside its buffers, made once for each set.
    pub set_up: Option<Launch>,
    pub launch: Launch,
}

#[cfg(feature = "cuda")]
impl Way {
    pub fn new(
        name: &'static str,
        launch: impl Fn(&mut crate::backend::cuda::Cuda, &mut Set) -> Result<()> + Send + Sync + 'static,
    ) -> Self {
        Self { name, kernels: None, needs_cublas: false, set_up: None, launch: Arc::new(launch) }
    }

    /// "own": our kernels as the program would run them.
    pub fn own(
        launch: impl Fn(&mut crate::backend::cuda::Cuda, &mut Set) -> Result<()> + Send + Sync + 'static,
    ) -> Self {
        Self::new("own", launch)
    }

    /// This way ("own"), and on a card whose own kernels are for Hopper the same by the kernels for every card ("sm80").
    pub fn both(self) -> Vec<Self> {
        vec![Self { name: "sm80", kernels: Some(Kernels::Sm80), ..self.clone() }, self]
    }
}

/// Buffers of the CPU: bf16 widened to f32, as [`Cpu`] computes.
#[derive(Clone, Debug)]
pub enum HostBuffer {
    F32(Vec<f32>),
    I32(Vec<i32>),
    U8(Vec<u8>),
}

/// Where a launch gets buffers that are not those of its case's arguments: a mistake in the op's file, which its test finds.
pub fn undeclared() -> ! {
    panic!("the buffers are not of the types that the case declares")
}

/// One run of the op by the CPU backend, on buffers in the order of the case's arguments.
pub type CpuLaunch = Arc<dyn Fn(&mut Cpu, &mut [HostBuffer]) -> Result<()> + Send + Sync>;

/// An op at a shape.
#[derive(Clone)]
pub struct Case {
    pub op: &'static str,
    /// "1b", "7b", "13b", "toy"
    pub model: &'static str,
    /// Its name in the table; no commas.
    pub shape: String,
    /// None where the op has no tokens.
    pub tokens: Option<usize>,
    pub args: Vec<Arg>,
    pub scalars: Vec<(&'static str, Scalar)>,
    /// Its floor.
    pub work: Work,
    pub oracle: Oracle,
    #[cfg(feature = "cuda")]
    pub ways: Vec<Way>,
    /// None where the CPU backend has no such op.
    pub cpu: Option<CpuLaunch>,
}

impl Case {
    /// Bytes of one set of buffers.
    pub fn set_bytes(&self) -> usize {
        self.args.iter().map(|a| a.bytes().next_multiple_of(256)).sum()
    }
}
