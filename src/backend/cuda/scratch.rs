//! The scratch of the ops in device memory: what [`workspace`] counts.

use half::bf16;

use super::cublas::{self, Cublas};
use super::memory::Buffer;
use super::ops::lora::DropoutMask;
use super::{Cuda, driver_error};
use crate::backend::workspace::{Workspace, workspace};
use crate::backend::{Dropout, Needs};
use crate::error::{Error, Result};

/// A buffer for each size of [`Workspace`], which says what they are.
pub(super) struct Scratch {
    pub sizes: Workspace,
    pub weights: Buffer<bf16>,
    pub logits: Buffer<f32>,
    pub rows: Buffer<bf16>,
    pub d_rows: Buffer<bf16>,
    pub row_loss: Buffer<f32>,
    pub row_ids: Buffer<i32>,
    pub lora: Buffer<f32>,
    pub decode: Buffer<f32>,
    pub norm: Buffer<f64>,
    pub step: Buffer<u32>,
    /// What lies in `step`.
    dropout_step: u32,
}

impl Scratch {
    fn new(cuda: &Cuda, sizes: Workspace) -> Result<Self> {
        Ok(Self {
            sizes,
            weights: cuda.allocate(sizes.weights)?,
            logits: cuda.allocate(sizes.logits)?,
            rows: cuda.allocate(sizes.rows)?,
            d_rows: cuda.allocate(sizes.d_rows)?,
            row_loss: cuda.allocate(sizes.row_loss)?,
            row_ids: cuda.allocate(sizes.row_ids)?,
            lora: cuda.allocate(sizes.lora)?,
            decode: cuda.allocate(sizes.decode)?,
            norm: cuda.allocate(sizes.norm)?,
            step: cuda.zeros(sizes.step)?,
            dropout_step: 0,
        })
    }
}

/// The mask of a linear's dropout; None where there is none. The step lies on the device.
pub(super) fn mask(dropout: Option<Dropout>, step: &Buffer<u32>) -> Option<DropoutMask<'_>> {
    dropout.filter(|d| d.p > 0.0).map(|d| DropoutMask { p: d.p, seed: d.seed, step: step.view() })
}

/// An op was called that needs scratch, and there is none.
pub(super) fn missing(op: &str) -> Error {
    Error::Cuda { op: op.into(), detail: "its scratch was not prepared".into() }
}

impl Cuda {
    /// Makes the scratch of the ops, and opens cuBLAS if the machine has it. What was made before and is large enough stays.
    pub(crate) fn prepare_scratch(&mut self, needs: &Needs) -> Result<()> {
        if let Some(d) = needs.heads.map(|h| h.d).filter(|d| !d.is_multiple_of(8) || !(16..=256).contains(d)) {
            let why = "the kernels take multiples of 8 from 16 to 256".into();
            return Err(Error::Unavailable { what: format!("a head size of {d} on the GPU"), why });
        }
        let mut sizes = workspace(needs);
        if let Some(old) = &self.scratch {
            if old.sizes.covers(sizes) {
                return Ok(());
            }
            sizes = sizes.max(old.sizes);
        }
        // The weights have come.
        self.end_of_loading();
        // Records name the old scratch.
        self.graphs.forget();
        self.scratch = None;
        self.scratch = Some(Box::new(Scratch::new(self, sizes)?));
        if self.cublas.is_none() && !self.hide_cublas && cublas::is_present() {
            self.cublas = Some(Cublas::open(self, self.allocate(sizes.cublas)?)?);
        }
        Ok(())
    }

    /// Gives the scratch back, and what cuBLAS works in: [`Cuda::prepare_scratch`] then makes them anew, elsewhere maybe.
    pub(crate) fn drop_scratch(&mut self) {
        self.graphs.forget();
        self.scratch = None;
        self.cublas = None;
    }

    /// Puts the number of a micro-batch where the dropout kernels read it.
    pub(super) fn set_dropout_step(&mut self, step: u32) -> Result<()> {
        let address = match &self.scratch {
            Some(scratch) if scratch.dropout_step == step => return Ok(()),
            Some(scratch) => self.ptr(&scratch.step.view())? as u64,
            None => return Err(missing("dropout")),
        };
        if self.graphs.recording {
            let detail = "the number of the micro-batch changed inside one".into();
            return Err(Error::Cuda { op: "dropout".into(), detail });
        }
        self.set_words(address, step)?;
        if let Some(scratch) = &mut self.scratch {
            scratch.dropout_step = step;
        }
        Ok(())
    }

    /// Sets the 4 bytes at `address`, which lies in a live buffer of this backend. The value travels in the command itself:
    /// it may be recorded, and waits for nothing.
    pub(super) fn set_words(&self, address: u64, value: u32) -> Result<()> {
        self.bind()?;
        // SAFETY: the address is that of a live element of 4 bytes, written in stream order.
        let set = unsafe { cudarc::driver::sys::cuMemsetD32Async(address, value, 1, self.stream.cu_stream()) };
        set.result().map_err(|e| driver_error("cuMemsetD32Async", e))
    }
}
