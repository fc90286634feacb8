//! Frozen matrices on their way from a mapped file to the device. Pieces of a few MiB go through pinned buffers: all cores
//! fill one while the last is on its way over PCIe, and the device puts each into 4 bits, or rounds it, as it comes. So the
//! card never holds more of the 16-bit matrix than one piece, and the bytes of the file are read once.

use std::sync::PoisonError;

use bytemuck::Pod;
use cudarc::driver::{CudaEvent, result};
use half::{bf16, f16};
use rayon::prelude::*;

use super::managed::Pinned;
use super::matrix::{Absmax, Data, Matrix, dims};
use super::memory::{Buffer, ViewMut};
use super::ops::load::{LoadDense, load_dense};
use super::ops::nf4::{self, DOUBLE_QUANTIZE_SCRATCH, Nf4DoubleQuantize, Nf4Quantize, Source};
use super::{Cuda, driver_error};
use crate::error::{Error, Result};
use crate::nf4::{BLOCK, NESTED_BLOCK, QuantConfig, Quantized};
use crate::tensor::{Dtype, HostMatrix, HostTensor};

/// Bytes that travel at a time: whole blocks of 64 elements of any type.
const PIECE: usize = 8 << 20;

/// Pinned buffers.
const SLOTS: usize = 3;

/// Bytes that one thread copies at a time.
const TASK: usize = 256 << 10;

/// The pinned buffers of an upload.
pub(super) struct Loader {
    slots: Vec<(Pinned, CudaEvent)>,
    next: usize,
}

impl Loader {
    fn new(cuda: &Cuda) -> Result<Self> {
        let slot = || {
            let event = cuda.context.new_event(None).map_err(|e| driver_error("cuEventCreate", e))?;
            Ok((Pinned::new(cuda, PIECE)?, event))
        };
        Ok(Self { slots: (0..SLOTS).map(|_| slot()).collect::<Result<_>>()?, next: 0 })
    }

    /// Copies at most [`PIECE`] bytes to the device, behind all that was launched before.
    fn send<T: Pod>(&mut self, cuda: &Cuda, to: ViewMut<T>, bytes: &[u8]) -> Result<()> {
        let room = to.len() * size_of::<T>();
        if bytes.len() > room.min(PIECE) {
            return Err(Error::Shape {
                op: "upload",
                argument: "piece",
                found: bytes.len(),
                expected: room.min(PIECE),
            });
        }
        let (pinned, sent) = &mut self.slots[self.next];
        self.next = (self.next + 1) % SLOTS;
        sent.synchronize().map_err(|e| driver_error("cuEventSynchronize", e))?;
        let piece = &mut pinned.bytes_mut()[..bytes.len()];
        piece.par_chunks_mut(TASK).zip(bytes.par_chunks(TASK)).for_each(|(to, from)| to.copy_from_slice(from));
        let address = cuda.ptr_mut(&to)? as u64;
        // SAFETY: the view has room for the piece (checked above). The pinned bytes are left alone until `sent` has passed.
        unsafe { result::memcpy_htod_async(address, piece, cuda.stream.cu_stream()) }
            .map_err(|e| driver_error("cuMemcpyHtoDAsync", e))?;
        sent.record(&cuda.stream).map_err(|e| driver_error("cuEventRecord", e))
    }
}

/// Device memory of one upload.
struct Staging {
    /// [`PIECE`] bytes of the file.
    piece: u64,
    /// Absmax of each block of 64 before it goes into 8 bits.
    absmax: u64,
    partial: u64,
    bad: u64,
    /// Where it does not lie in the unused part of the arena.
    _own: Option<Buffer<u8>>,
}

/// Bytes of device memory that the upload of a matrix of `len` elements uses beside the matrix. They come from the unused
/// end of the arena where it has room.
pub fn staging_bytes(len: usize, quantized: bool) -> usize {
    let absmax = if quantized { 4 * len.div_ceil(BLOCK) } else { 0 };
    PIECE + absmax.next_multiple_of(256) + 8 * DOUBLE_QUANTIZE_SCRATCH + 256
}

impl Staging {
    fn new(cuda: &Cuda, len: usize, quantized: bool) -> Result<Self> {
        let bytes = staging_bytes(len, quantized);
        let (piece, own) = match cuda.arena_end(bytes) {
            Some(address) => (address, None),
            None => {
                let mut own = cuda.allocate_alone::<u8>(bytes)?;
                (cuda.ptr_mut(&own.view_mut())? as u64, Some(own))
            }
        };
        let absmax = piece + PIECE as u64;
        let bad = piece + (bytes - 256) as u64;
        Ok(Self { piece, absmax, partial: bad - 8 * DOUBLE_QUANTIZE_SCRATCH as u64, bad, _own: own })
    }

    /// `len` elements of the piece.
    fn piece<'a, T>(&self, cuda: &'a Cuda, len: usize) -> ViewMut<'a, T> {
        debug_assert!(len * size_of::<T>() <= PIECE);
        ViewMut::at(self.piece, len, &cuda.stream)
    }

    fn bad<'a>(&self, cuda: &'a Cuda) -> ViewMut<'a, u32> {
        ViewMut::at(self.bad, 1, &cuda.stream)
    }
}

/// Where the parts of a dense tensor go, piece by piece.
enum Sink<'a> {
    /// (n)
    Bf16(ViewMut<'a, bf16>),
    FourBit {
        packed: ViewMut<'a, u8>,
        absmax: ViewMut<'a, f32>,
        config: QuantConfig,
    },
}

impl Cuda {
    /// Moves a matrix to the device: 4-bit stays 4-bit, what is to be put in 4 bits is put there on the device, everything
    /// else becomes bf16. A weight that is not finite is [`Error::Input`], with file and tensor. Waits for the device.
    pub fn upload_matrix(&self, w: &HostMatrix) -> Result<Matrix> {
        // What a panic left there is as good as new: a slot is waited for before it is used.
        let mut kept = self.loader.lock().unwrap_or_else(PoisonError::into_inner);
        let loader = match &mut *kept {
            Some(loader) => loader,
            none => none.insert(Loader::new(self)?),
        };
        match w {
            HostMatrix::Dense(t) => self.load_dense(loader, t),
            HostMatrix::Quantize(t, config) => self.load_quantized(loader, t, *config),
            HostMatrix::Quantized(q) => self.load_packed(loader, q),
        }
    }

    /// Gives the pinned buffers of uploads back.
    pub(super) fn end_of_loading(&self) {
        *self.loader.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    fn load_dense(&self, loader: &mut Loader, t: &HostTensor) -> Result<Matrix> {
        let (n, k) = dims(&t.shape)?;
        let mut out = self.allocate::<bf16>(n * k)?;
        let staging = Staging::new(self, n * k, false)?;
        self.stream_tensor(loader, &staging, t, Sink::Bf16(out.view_mut()))?;
        Ok(Matrix { n, k, data: Data::Bf16(out) })
    }

    fn load_quantized(&self, loader: &mut Loader, t: &HostTensor, config: QuantConfig) -> Result<Matrix> {
        let (n, k) = dims(&t.shape)?;
        let blocks = (n * k).div_ceil(BLOCK);
        let mut packed = self.allocate::<u8>((n * k).div_ceil(2))?;
        let absmax = if config.double_quant {
            let mut codes = self.allocate::<u8>(blocks)?;
            let mut nested_absmax = self.allocate::<f32>(blocks.div_ceil(NESTED_BLOCK))?;
            let mut offset = self.zeros::<f32>(1)?;
            let staging = Staging::new(self, n * k, true)?;
            let plain = || ViewMut::<f32>::at(staging.absmax, blocks, &self.stream);
            let sink = Sink::FourBit { packed: packed.view_mut(), absmax: plain(), config };
            self.stream_tensor(loader, &staging, t, sink)?;
            nf4::nf4_double_quantize(
                self,
                Nf4DoubleQuantize {
                    codes: codes.view_mut(),
                    nested_absmax: nested_absmax.view_mut(),
                    offset: offset.view_mut(),
                    scratch: ViewMut::at(staging.partial, DOUBLE_QUANTIZE_SCRATCH, &self.stream),
                    absmax: plain().as_view(),
                },
            )?;
            Absmax::Double { codes, nested_absmax, offset }
        } else {
            let mut absmax = self.allocate::<f32>(blocks)?;
            let staging = Staging::new(self, n * k, false)?;
            let sink = Sink::FourBit { packed: packed.view_mut(), absmax: absmax.view_mut(), config };
            self.stream_tensor(loader, &staging, t, sink)?;
            Absmax::Plain(absmax)
        };
        Ok(Matrix { n, k, data: Data::Nf4 { packed, absmax, quant_type: config.quant_type } })
    }

    fn load_packed(&self, loader: &mut Loader, q: &Quantized) -> Result<Matrix> {
        let (n, k) = dims(&q.shape)?;
        let packed = self.load_bytes(loader, &q.packed)?;
        let absmax = match &q.absmax {
            crate::nf4::Absmax::Plain(absmax) => Absmax::Plain(self.load_bytes(loader, absmax)?),
            crate::nf4::Absmax::Double { codes, nested_absmax, offset } => Absmax::Double {
                codes: self.load_bytes(loader, codes)?,
                nested_absmax: self.load_bytes(loader, nested_absmax)?,
                offset: self.upload(&[*offset])?,
            },
        };
        Ok(Matrix { n, k, data: Data::Nf4 { packed, absmax, quant_type: q.quant_type } })
    }

    /// A buffer of copies of `values`.
    fn load_bytes<T: Pod>(&self, loader: &mut Loader, values: &[T]) -> Result<Buffer<T>> {
        let mut buffer = self.allocate::<T>(values.len())?;
        let elements = PIECE / size_of::<T>();
        for (i, piece) in values.chunks(elements).enumerate() {
            let to = buffer.range_mut(i * elements..i * elements + piece.len());
            loader.send(self, to, bytemuck::cast_slice(piece))?;
        }
        Ok(buffer)
    }

    /// Sends a tensor piece by piece, then waits and gives back the pages of its file.
    fn stream_tensor(&self, loader: &mut Loader, staging: &Staging, t: &HostTensor, sink: Sink) -> Result<()> {
        self.zero(staging.bad(self))?;
        match t.dtype {
            Dtype::F32 => self.stream_pieces::<f32>(loader, staging, t, sink)?,
            Dtype::Bf16 => self.stream_pieces::<bf16>(loader, staging, t, sink)?,
            Dtype::F16 => self.stream_pieces::<f16>(loader, staging, t, sink)?,
        }
        let mut bad = [0u32];
        self.read(staging.bad(self).as_view(), &mut bad)?;
        if bad[0] != 0 {
            t.check_finite()?;
            // The host, which looked for the place, disagrees: a fault of the machine.
            let detail = "the device found a weight that is not finite, the host did not".into();
            return Err(Error::Cuda { op: "load_dense".into(), detail });
        }
        t.release();
        Ok(())
    }

    fn stream_pieces<T: Element>(
        &self,
        loader: &mut Loader,
        staging: &Staging,
        t: &HostTensor,
        mut sink: Sink,
    ) -> Result<()> {
        let elements = PIECE / size_of::<T>();
        for (i, bytes) in t.bytes().chunks(PIECE).enumerate() {
            let (start, len) = (i * elements, bytes.len() / size_of::<T>());
            match &mut sink {
                // What is bf16 already goes where it belongs.
                Sink::Bf16(out) if t.dtype == Dtype::Bf16 => {
                    let mut to = out.reborrow().into_range(start..start + len);
                    loader.send(self, to.reborrow(), bytes)?;
                    load_dense(self, LoadDense { out: None, x: Source::Bf16(to.as_view()), bad: staging.bad(self) })?;
                }
                Sink::Bf16(out) => {
                    loader.send(self, staging.piece::<T>(self, len), bytes)?;
                    let out = Some(out.reborrow().into_range(start..start + len));
                    let x = T::source(staging.piece(self, len));
                    load_dense(self, LoadDense { out, x, bad: staging.bad(self) })?;
                }
                Sink::FourBit { packed, absmax, config } => {
                    loader.send(self, staging.piece::<T>(self, len), bytes)?;
                    let x = || T::source(staging.piece(self, len));
                    load_dense(self, LoadDense { out: None, x: x(), bad: staging.bad(self) })?;
                    let packed = packed.reborrow().into_range(start / 2..start / 2 + len.div_ceil(2));
                    let absmax = absmax.reborrow().into_range(start / BLOCK..start / BLOCK + len.div_ceil(BLOCK));
                    let quant_type = config.quant_type;
                    nf4::nf4_quantize(self, Nf4Quantize { packed, absmax, x: x(), quant_type })?;
                }
            }
        }
        Ok(())
    }
}

/// An element type of a dense tensor.
trait Element: Pod {
    fn source(view: ViewMut<Self>) -> Source;
}

impl Element for f32 {
    fn source(view: ViewMut<Self>) -> Source {
        Source::F32(view.into_view())
    }
}

impl Element for bf16 {
    fn source(view: ViewMut<Self>) -> Source {
        Source::Bf16(view.into_view())
    }
}

impl Element for f16 {
    fn source(view: ViewMut<Self>) -> Source {
        Source::F16(view.into_view())
    }
}
