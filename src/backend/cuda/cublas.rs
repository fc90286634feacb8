//! cuBLAS, where the machine has it: large products of bf16 matrices. Opened at run time; nothing depends on it.

use std::ffi::{c_int, c_void};
use std::sync::{Arc, OnceLock};

use cudarc::cublas::{result, sys};
use cudarc::driver::CudaStream;
use half::bf16;

use super::Cuda;
use super::memory::{Buffer, View};
use super::ops::bias::{BiasRows, bias_rows};
use super::ops::gemm::{Gemm, Out};
use crate::error::{Error, Result};

/// Workspace of a cuBLAS that is opened without a model.
pub(super) const ALONE_BYTES: usize = 32 << 20;

/// A handle of cuBLAS on the backend's stream, with scratch of its own: a product then allocates nothing, may be captured,
/// and gives the same bits every time.
pub struct Cublas {
    handle: sys::cublasHandle_t,
    /// Keeps the stream alive as long as the handle.
    _stream: Arc<CudaStream>,
    _scratch: Buffer<u8>,
}

impl Drop for Cublas {
    fn drop(&mut self) {
        // SAFETY: the handle was made by `open` and is used nowhere else. What it answers is of no use here.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

/// A call of cuBLAS that failed.
fn error(op: &str, e: result::CublasError) -> Error {
    Error::Cuda { op: op.into(), detail: format!("{e}") }
}

/// Whether the library can be opened.
pub fn is_present() -> bool {
    static PRESENT: OnceLock<bool> = OnceLock::new();
    // SAFETY: opens the library and closes it again; NVIDIA's does nothing on loading that we rely on.
    *PRESENT.get_or_init(|| unsafe { sys::is_culib_present() })
}

impl Cublas {
    /// A handle with `scratch` as its workspace. The caller has seen that the library is there.
    pub(super) fn open(cuda: &Cuda, scratch: Buffer<u8>) -> Result<Self> {
        cuda.bind()?;
        let handle = result::create_handle().map_err(|e| error("cublasCreate", e))?;
        let this = Self { handle, _stream: cuda.stream.clone(), _scratch: scratch };
        let address = cuda.ptr(&this._scratch.view())?.cast_mut().cast::<c_void>();
        // SAFETY: the handle is live, and so are stream and scratch as long as it. The stream comes first: setting it
        // takes the workspace away.
        let set = unsafe {
            result::set_stream(handle, cuda.stream.cu_stream().cast())
                .and_then(|()| sys::cublasSetWorkspace_v2(handle, address, this._scratch.len()).result())
                .and_then(|()| {
                    sys::cublasSetAtomicsMode(handle, sys::cublasAtomicsMode_t::CUBLAS_ATOMICS_NOT_ALLOWED).result()
                })
                .and_then(|()| {
                    let exact = sys::cublasMath_t::CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION;
                    sys::cublasSetMathMode(handle, exact).result()
                })
        };
        set.map_err(|e| error("setting up cuBLAS", e))?;
        Ok(this)
    }

    /// c = alpha * a·op(b) [+ c]; the pair and the bias are not looked at. `g` was checked by [`check`].
    pub(super) fn product(&self, cuda: &Cuda, g: &Gemm) -> Result<()> {
        use sys::cublasOperation_t::{CUBLAS_OP_N, CUBLAS_OP_T};
        let (c, c_type) = match &g.c {
            Out::Bf16(c) => (cuda.ptr_mut(c)?.cast::<c_void>(), sys::cudaDataType_t::CUDA_R_16BF),
            Out::F32(c) => (cuda.ptr_mut(c)?.cast::<c_void>(), sys::cudaDataType_t::CUDA_R_32F),
        };
        let (a, b) = (cuda.ptr(&g.a)?.cast::<c_void>(), cuda.ptr(&g.b)?.cast::<c_void>());
        let (alpha, beta) = (g.alpha, if g.accumulate { 1.0f32 } else { 0.0 });
        // cuBLAS is column-major, where our c is (n, m) and a product of bᵀ and aᵀ: the operands change places.
        let op_b = if g.b_transposed { CUBLAS_OP_T } else { CUBLAS_OP_N };
        let kind = sys::cudaDataType_t::CUDA_R_16BF;
        // SAFETY: the views hold all elements that the shapes name (checked), alpha and beta are read before the call
        // returns, and the handle works on the stream that orders every use of these buffers.
        let status = unsafe {
            sys::cublasGemmEx(
                self.handle,
                op_b,
                CUBLAS_OP_N,
                int("n", g.n)?,
                int("m", g.m)?,
                int("k", g.k)?,
                (&raw const alpha).cast(),
                b,
                kind,
                int("ldb", g.ldb)?,
                a,
                kind,
                int("lda", g.lda)?,
                (&raw const beta).cast(),
                c,
                c_type,
                int("ldc", g.ldc)?,
                sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
            )
        };
        status.result().map_err(|e| error("cublasGemmEx", e))
    }
}

impl Cuda {
    /// Opens cuBLAS, where no model has, with a workspace beside the arena: for [`Cuda::cublas_product`].
    /// [`Error::Unavailable`] if libcublas is not there.
    pub fn open_cublas(&mut self) -> Result<()> {
        if self.cublas.is_none() {
            if !self.has_cublas() {
                return Err(missing());
            }
            self.cublas = Some(Cublas::open(self, self.allocate_alone(ALONE_BYTES)?)?);
        }
        Ok(())
    }

    /// c = alpha * a·op(b) (+ c) by cuBLAS, whatever the alignment. [`Error::Unavailable`] before [`Cuda::open_cublas`];
    /// [`Error::Shape`] for a product with a pair or a bias, which cuBLAS has not.
    pub fn cublas_product(&self, g: &Gemm) -> Result<()> {
        let cublas = self.cublas.as_ref().ok_or_else(missing)?;
        for (argument, is_there) in [("pair", g.pair.is_some()), ("bias", g.bias.is_some())] {
            if is_there {
                return Err(Error::Shape { op: "cublas_product", argument, found: 1, expected: 0 });
            }
        }
        if g.m == 0 || g.n == 0 {
            return Ok(());
        }
        check(g)?;
        cublas.product(self, g)
    }
}

fn missing() -> Error {
    let why = "libcublas is not to be found, or HALFBYTE_CUBLAS=0 hides it, or it was not opened".into();
    Error::Unavailable { what: "cuBLAS".into(), why }
}

/// cuBLAS counts in 32 bits.
fn int(argument: &'static str, value: usize) -> Result<c_int> {
    let too_large = |_| Error::Shape { op: "gemm", argument, found: value, expected: c_int::MAX as usize };
    c_int::try_from(value).map_err(too_large)
}

/// Whether `rows` rows of `width` elements, `ld` apart, lie in `len` elements.
fn lies(argument: &'static str, len: usize, (rows, width, ld): (usize, usize, usize)) -> Result<()> {
    if ld < width {
        return Err(Error::Shape { op: "gemm", argument, found: ld, expected: width });
    }
    let expected = if rows == 0 { 0 } else { (rows - 1) * ld + width };
    if len >= expected { Ok(()) } else { Err(Error::Shape { op: "gemm", argument, found: len, expected }) }
}

fn check(g: &Gemm) -> Result<()> {
    let c = match &g.c {
        Out::Bf16(c) => c.len(),
        Out::F32(c) => c.len(),
    };
    lies("c", c, (g.m, g.n, g.ldc))?;
    lies("a", g.a.len(), (g.m, g.k, g.lda))?;
    lies("b", g.b.len(), if g.b_transposed { (g.n, g.k, g.ldb) } else { (g.k, g.n, g.ldb) })
}

/// Who computes a dense product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Products {
    /// csrc/gemm.cu
    Own,
    /// cuBLAS, if it was found; else ours.
    Cublas,
}

/// As [`super::ops::gemm::gemm`]. cuBLAS has no second pair and no bias: both come first, by our kernel,
/// and cuBLAS adds to them.
pub(super) fn matmul(cuda: &Cuda, by: Products, mut g: Gemm) -> Result<()> {
    // Rows that do not start at 16 bytes are ours: cuBLAS is slow on them.
    let aligned = [g.lda, g.ldb, g.ldc].iter().all(|ld| ld.is_multiple_of(8));
    let Some(cublas) = cuda.cublas.as_ref().filter(|_| by == Products::Cublas && aligned) else {
        return super::ops::gemm::gemm(cuda, g);
    };
    if g.m == 0 || g.n == 0 {
        return Ok(());
    }
    check(&g)?;
    match (g.pair.take(), g.bias.take()) {
        (None, None) => {}
        (Some(pair), bias) => {
            let c = match &mut g.c {
                Out::Bf16(c) => Out::Bf16(c.reborrow()),
                Out::F32(c) => Out::F32(c.reborrow()),
            };
            let (a, lda, b, ldb, k) = (pair.a, pair.lda, pair.b, pair.ldb, pair.k);
            let Gemm { ldc, b_transposed, alpha, accumulate, m, n, .. } = g;
            let first = Gemm { c, ldc, a, lda, b, ldb, b_transposed, pair: None, bias, alpha, accumulate, m, n, k };
            super::ops::gemm::gemm(cuda, first)?;
            g.accumulate = true;
        }
        (None, Some(bias)) => match &mut g.c {
            Out::Bf16(y) if !g.accumulate && g.alpha == 1.0 => {
                bias_rows(cuda, BiasRows { y: y.reborrow(), ld: g.ldc, bias, t: g.m, n: g.n })?;
                g.accumulate = true;
            }
            _ => return super::ops::gemm::gemm(cuda, Gemm { bias: Some(bias), ..g }),
        },
    }
    cublas.product(cuda, &g)
}

/// The usual product: c (m, n) bf16 or f32 = a (m, k) · b (n, k)ᵀ, or · b (k, n).
pub(super) fn plain<'a>(
    c: Out<'a>,
    (a, lda): (View<'a, bf16>, usize),
    (b, b_transposed): (View<'a, bf16>, bool),
    (m, n, k): (usize, usize, usize),
) -> Gemm<'a> {
    let ldb = if b_transposed { k } else { n };
    Gemm { c, ldc: n, a, lda, b, ldb, b_transposed, pair: None, bias: None, alpha: 1.0, accumulate: false, m, n, k }
}
