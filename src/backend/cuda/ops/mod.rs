//! The launchers of csrc/*.cu behind checks, a module for each .cu file: an op looks at the sizes of its arguments once,
//! and names itself and the argument that is wrong. Launches are asynchronous; [`Cuda::synchronize`] waits for them.

pub mod adamw;
pub mod attention;
pub mod bias;
pub mod cross_entropy;
pub mod decode;
pub mod embedding;
pub mod gemm;
pub mod grad_norm;
pub mod load;
pub mod lora;
pub mod nf4;
pub mod nf4_gemm;
pub mod rmsnorm;
pub mod rope;
pub mod swiglu;

use super::{Cuda, ffi};
use crate::backend::Heads;
use crate::backend::shape::{at_least, exactly};
use crate::error::{Error, Result};

impl Cuda {
    /// The stream, with this GPU's context made current: the CUDA runtime launches into the thread's current context.
    fn stream_for_launch(&self) -> Result<ffi::Stream> {
        self.bind()?;
        Ok(self.stream.cu_stream().cast())
    }
}

/// H query heads in groups of H/G, an even head size, a window that sees something.
fn check_heads(op: &'static str, heads: Heads) -> Result<()> {
    at_least(op, "heads.d", heads.d, 1)?;
    exactly(op, "heads.d (even)", heads.d % 2, 0)?;
    if heads.g == 0 || !heads.h.is_multiple_of(heads.g) {
        return Err(Error::Shape { op, argument: "heads", found: heads.h, expected: heads.g });
    }
    at_least(op, "window", heads.window.unwrap_or(1), 1)
}
