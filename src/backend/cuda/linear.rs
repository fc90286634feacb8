//! The linear op in its three ways: NF4 decoded on its way into the tensor core, dequantised and then multiplied by our GEMM
//! or cuBLAS, or a matrix-vector kernel for few tokens. Which one runs follows from the number of tokens, the card, and what the
//! machine has; `HALFBYTE_LINEAR` and [`Cuda::with_linear`] name one instead.
//!
//! LoRA is R more columns of the same product where its operands are aligned for vector loads. Where they are not, and
//! behind products of cuBLAS over several projections at once, it is a pass of its own.

use half::bf16;

use super::cublas::{Products, matmul};
use super::matrix::{Data, Matrix};
use super::memory::{Buffer, View, ViewMut};
use super::ops::bias::{BiasRows, bias_rows};
use super::ops::decode::{MATVEC_MAX_PARTS, MATVEC_MAX_T, MatvecGroup, MatvecPart, Weight, matvec_group};
use super::ops::gemm::{Gemm, Out, Pair};
use super::ops::lora::{self, LoraBackward, LoraBackwardX, LoraExpand, LoraForward, LoraPart};
use super::ops::nf4::Nf4Weight;
use super::ops::nf4_gemm::{Direction, Nf4Gemm, nf4_gemm};
use super::scratch::{Scratch, mask};
use super::{Cuda, Kernels};
use crate::backend::shape::{at_least, check_linear};
use crate::backend::{Linear, LinearBackward, LinearForward, Lora};
use crate::error::{Error, Result};
use crate::nf4::BLOCK;

/// How a linear computes its large products.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinearKind {
    /// nf4_gemm: 16-bit weights never lie in memory.
    Fused,
    /// nf4_dequantize, then our GEMM.
    Slice,
    /// nf4_dequantize, then cuBLAS.
    SliceCublas,
    /// A matrix-vector product for each eight tokens; backward runs as [`LinearKind::Fused`].
    Matvec,
}

impl LinearKind {
    /// By the name that `HALFBYTE_LINEAR` takes.
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "fused" => Some(Self::Fused),
            "slice" => Some(Self::Slice),
            "slice_cublas" => Some(Self::SliceCublas),
            "matvec" => Some(Self::Matvec),
            _ => None,
        }
    }

    /// What `HALFBYTE_LINEAR` asks for.
    pub(super) fn from_environment() -> Result<Option<Self>> {
        match std::env::var("HALFBYTE_LINEAR").as_deref() {
            Err(_) | Ok("") => Ok(None),
            Ok(name) => {
                let unknown =
                    || Error::flag("HALFBYTE_LINEAR", format!("{name:?}"), "fused, slice, slice_cublas or matvec");
                Self::from_name(name).map(Some).ok_or_else(unknown)
            }
        }
    }
}

/// Fewer tokens than this leave the dequantised weights no time to pay for themselves.
const FUSED_BELOW: usize = 256;
/// From so many tokens on our product with LoRA's columns inside takes less time on Hopper than cuBLAS and a pass of LoRA.
const OWN_FROM: usize = 256;

impl Cuda {
    /// The same GPU, but every linear runs this way; None: as the table says.
    pub fn with_linear(mut self, kind: Option<LinearKind>) -> Self {
        self.use_linear(kind);
        self
    }

    /// [`Cuda::with_linear`] in place.
    pub fn use_linear(&mut self, kind: Option<LinearKind>) {
        self.linear = kind;
        self.graphs.forget();
    }

    /// The table: how a linear of `t` tokens runs. Measured on an H100 (bench/results: linear_forward, linear_backward);
    /// `one_sum`: all projections of a group add to one output, as in backward, where cuBLAS takes them as one product.
    fn linear_kind(&self, t: usize, one_sum: bool) -> Result<LinearKind> {
        let hopper = self.kernels == Kernels::Sm90;
        match self.linear {
            Some(LinearKind::SliceCublas) if self.cublas.is_none() => {
                let why = "libcublas is not to be found, or HALFBYTE_CUBLAS=0 hides it".into();
                Err(Error::Unavailable { what: "HALFBYTE_LINEAR=slice_cublas".into(), why })
            }
            Some(forced) => Ok(forced),
            None if t <= MATVEC_MAX_T => Ok(LinearKind::Matvec),
            None if t < FUSED_BELOW && !(hopper && self.cublas.is_some()) => Ok(LinearKind::Fused),
            None if hopper && t >= OWN_FROM && !one_sum => Ok(LinearKind::Slice),
            None if self.cublas.is_some() => Ok(LinearKind::SliceCublas),
            None => Ok(LinearKind::Slice),
        }
    }

    /// Who computes products of 16-bit matrices.
    pub(super) fn products(&self) -> Products {
        match self.linear {
            None | Some(LinearKind::SliceCublas) => Products::Cublas,
            Some(_) => Products::Own,
        }
    }
}

/// A projection, its first column in y, and its LoRA with its first column in h.
struct Part<'a> {
    w: &'a Matrix,
    n: usize,
    y: usize,
    bias: Option<View<'a, bf16>>,
    lora: Option<(&'a Lora, usize)>,
}

impl Part<'_> {
    fn lora_part(&self) -> Option<LoraPart> {
        let (l, h) = self.lora?;
        Some(LoraPart { a: l.a, b: l.b, r: l.r, scale: l.scale, site: l.site, y: self.y, n: self.n, h })
    }

    /// The columns that LoRA adds to x Wᵀ: h Bᵀ, `r` the row stride of h. None if they are not aligned.
    fn forward_pair<'a>(&self, h: View<'a, bf16>, lora: Option<View<'a, bf16>>, r: usize) -> Option<Pair<'a>> {
        let (lora, (l, at)) = (lora?, self.lora?);
        let b = || lora.range(l.b..l.b + self.n * l.r);
        aligned(&[l.b, l.r, at, r]).then(|| Pair { a: h.range(at..h.len()), lda: r, b: b(), ldb: l.r, k: l.r })
    }

    /// The columns that LoRA adds to dy W: dh A.
    fn backward_pair<'a>(&self, dh: View<'a, bf16>, lora: View<'a, bf16>, r: usize) -> Option<Pair<'a>> {
        let ((l, at), k) = (self.lora?, self.w.k);
        let b = || lora.range(l.a..l.a + l.r * k);
        aligned(&[l.a, l.r, at, r, k]).then(|| Pair { a: dh.range(at..dh.len()), lda: r, b: b(), ldb: k, k: l.r })
    }
}

/// Whether these offsets and strides of bf16 are whole vectors of 16 bytes.
fn aligned(elements: &[usize]) -> bool {
    elements.iter().all(|e| e.is_multiple_of(8))
}

/// The parts side by side; without their LoRA unless it is wanted.
fn parts(w: &Linear<Cuda>, adapted: bool) -> Vec<Part<'_>> {
    let (mut y, mut h) = (0, 0);
    let part = |p: &'_ crate::backend::Projection<Cuda>| {
        let at = (y, h);
        y += p.n;
        h += p.lora.as_ref().map_or(0, |l| l.r);
        at
    };
    let at: Vec<_> = w.parts.iter().map(part).collect();
    let of = |(p, (y, h)): (_, (usize, usize))| {
        let p: &crate::backend::Projection<Cuda> = p;
        let lora = p.lora.as_ref().filter(|_| adapted).map(|l| (l, h));
        Part { w: &p.w, n: p.n, y, bias: p.bias.as_ref().map(|b| b.range(0..p.n)), lora }
    };
    w.parts.iter().zip(at).map(of).collect()
}

fn check(op: &'static str, w: &Linear<Cuda>, lora: Option<usize>) -> Result<()> {
    check_linear(op, w, lora, |w| (w.n, w.k), Buffer::len)
}

/// A matrix as the kernel for few tokens takes it.
pub(super) fn weight(w: &Matrix) -> Weight<'_> {
    let (n, k) = (w.n, w.k);
    match &w.data {
        Data::Bf16(dense) => Weight::Bf16 { w: dense.view(), n, k },
        Data::Nf4 { packed, absmax, quant_type } => {
            let (packed, absmax, quant_type) = (packed.view(), absmax.view(), *quant_type);
            Weight::Nf4(Nf4Weight { packed, absmax, quant_type, n, k })
        }
    }
}

/// The 4-bit form of a matrix; None if it is in 16 bits.
fn quantized(w: &Matrix) -> Option<Nf4Weight<'_>> {
    match weight(w) {
        Weight::Nf4(w) => Some(w),
        Weight::Bf16 { .. } => None,
    }
}

/// The elements in bf16: where they lie, or dequantised into `buffer`.
pub(super) fn widened<'a>(
    cuda: &Cuda,
    op: &'static str,
    w: &'a Matrix,
    mut buffer: ViewMut<'a, bf16>,
) -> Result<View<'a, bf16>> {
    if let Some(dense) = w.dense() {
        return Ok(dense.range(0..w.len()));
    }
    at_least(op, "scratch (weights)", buffer.len(), w.len())?;
    cuda.widen_matrix(buffer.reborrow(), w)?;
    Ok(buffer.into_range(0..w.len()).into_view())
}

/// All parts dequantised below each other (N, K); None if they do not fit, or some are in 16 bits, or some would start
/// inside a vector.
fn widened_group<'a>(cuda: &Cuda, parts: &[Part], mut buffer: ViewMut<'a, bf16>) -> Result<Option<View<'a, bf16>>> {
    let len: usize = parts.iter().map(|p| p.w.len()).sum();
    let whole = |p: &Part| p.w.is_quantized() && p.w.len().is_multiple_of(BLOCK);
    if parts.len() < 2 || buffer.len() < len || !parts.iter().all(whole) {
        return Ok(None);
    }
    let mut start = 0;
    for part in parts {
        let end = start + part.w.len();
        cuda.widen_matrix(buffer.reborrow().into_range(start..end), part.w)?;
        start = end;
    }
    Ok(Some(buffer.into_range(0..len).into_view()))
}

/// h = scale * dropout(x) Aᵀ, then y = x Wᵀ + h Bᵀ (+ bias), projection by projection.
pub(super) fn forward(cuda: &Cuda, s: &mut Scratch, a: LinearForward<Cuda>) -> Result<()> {
    let op = "linear_forward";
    let (t, w) = (a.t, a.w);
    let (k, n, r) = (w.k, w.n, w.r);
    check(op, w, a.lora.map(|l| l.len()))?;
    at_least(op, "y", a.y.len(), t * n)?;
    at_least(op, "x", a.x.len(), t * k)?;
    if t == 0 || n == 0 {
        return Ok(());
    }
    let x = a.x.range(0..t * k);
    let lora = a.lora.filter(|_| r > 0).map(|l| l.view());
    let parts = parts(w, lora.is_some());
    if let Some(lora) = lora {
        at_least(op, "h", a.h.len(), t * r)?;
        let adapted: Vec<LoraPart> = parts.iter().filter_map(Part::lora_part).collect();
        let (h, dropout, scratch) = (a.h.view_mut(), mask(a.dropout, &s.step), s.lora.view_mut());
        lora::lora_forward(cuda, LoraForward { h, x, lora, parts: &adapted, t, k, r, dropout, scratch })?;
    }
    let h = a.h.view();
    let pairs: Vec<Option<Pair>> = parts.iter().map(|p| p.forward_pair(h, lora, r)).collect();
    let left: Vec<LoraPart> =
        parts.iter().zip(&pairs).filter(|(_, pair)| pair.is_none()).filter_map(|(p, _)| p.lora_part()).collect();
    let mut y = a.y.range_mut(0..t * n);

    match cuda.linear_kind(t, false)? {
        LinearKind::Matvec => {
            for row in (0..t).step_by(MATVEC_MAX_T) {
                let rows = MATVEC_MAX_T.min(t - row);
                let mut group = vec![];
                for (part, pair) in parts.iter().zip(&pairs) {
                    let h = pair.as_ref().map(|p| (p.a.range(row * r..p.a.len()), p.b, p.k));
                    group.push(MatvecPart { w: weight(part.w), y: part.y, h, bias: part.bias });
                }
                for parts in group.chunks(MATVEC_MAX_PARTS) {
                    let (y, x) = (Out::Bf16(y.reborrow().into_range(row * n..t * n)), x.range(row * k..t * k));
                    matvec_group(cuda, MatvecGroup { y, ldy: n, x, ldh: r, parts, t: rows })?;
                }
            }
        }
        LinearKind::Fused => {
            for (part, pair) in parts.iter().zip(pairs) {
                let (c, bias) = (y.reborrow().into_range(part.y..t * n), part.bias);
                match quantized(part.w) {
                    Some(w) => {
                        let direction = Direction::Forward;
                        let product =
                            Nf4Gemm { c, ldc: n, a: x, lda: k, w, direction, pair, bias, accumulate: false, m: t };
                        nf4_gemm(cuda, product)?;
                    }
                    None => {
                        let b = widened(cuda, op, part.w, s.weights.view_mut())?;
                        matmul(cuda, cuda.products(), of_part(c, n, (x, k), b, pair, bias, (t, part.n, k)))?;
                    }
                }
            }
        }
        kind @ (LinearKind::Slice | LinearKind::SliceCublas) => {
            let by = if kind == LinearKind::Slice { Products::Own } else { Products::Cublas };
            // One product for the whole group, if its parts have nothing of their own, or all have what can come first.
            let mut own = pairs.iter().zip(&parts).map(|(pair, part)| pair.is_some() || part.bias.is_some());
            let bare = own.clone().all(|own| !own);
            let first = by == Products::Cublas && own.all(|own| own);
            let group = if bare || first { widened_group(cuda, &parts, s.weights.view_mut())? } else { None };
            match group {
                Some(b) => {
                    for (part, pair) in parts.iter().zip(pairs) {
                        let y = y.reborrow().into_range(part.y..t * n);
                        match (pair, part.bias) {
                            (Some(p), bias) => {
                                let product = of_part(y, n, (p.a, p.lda), p.b, None, bias, (t, part.n, p.k));
                                matmul(cuda, Products::Own, product)?;
                            }
                            (None, Some(bias)) => bias_rows(cuda, BiasRows { y, ld: n, bias, t, n: part.n })?,
                            (None, None) => {}
                        }
                    }
                    let product = of_part(y.reborrow(), n, (x, k), b, None, None, (t, n, k));
                    matmul(cuda, by, Gemm { accumulate: !bare, ..product })?;
                }
                None => {
                    for (part, pair) in parts.iter().zip(pairs) {
                        let c = y.reborrow().into_range(part.y..t * n);
                        let b = widened(cuda, op, part.w, s.weights.view_mut())?;
                        matmul(cuda, by, of_part(c, n, (x, k), b, pair, part.bias, (t, part.n, k)))?;
                    }
                }
            }
        }
    }
    match lora {
        Some(lora) if !left.is_empty() => lora::lora_expand(cuda, LoraExpand { y, h, lora, parts: &left, t, n, r }),
        _ => Ok(()),
    }
}

/// c (m, n) = a · b (n, k)ᵀ + the pair + the bias.
fn of_part<'a>(
    c: ViewMut<'a, bf16>,
    ldc: usize,
    (a, lda): (View<'a, bf16>, usize),
    b: View<'a, bf16>,
    pair: Option<Pair<'a>>,
    bias: Option<View<'a, bf16>>,
    (m, n, k): (usize, usize, usize),
) -> Gemm<'a> {
    let c = Out::Bf16(c);
    Gemm { c, ldc, a, lda, b, ldb: k, b_transposed: true, pair, bias, alpha: 1.0, accumulate: false, m, n, k }
}

/// c (m, n) = a · b (k, n) + the pair (+ c).
fn of_dx<'a>(
    c: ViewMut<'a, bf16>,
    (a, lda): (View<'a, bf16>, usize),
    b: View<'a, bf16>,
    pair: Option<Pair<'a>>,
    accumulate: bool,
    (m, n, k): (usize, usize, usize),
) -> Gemm<'a> {
    let c = Out::Bf16(c);
    Gemm { c, ldc: n, a, lda, b, ldb: n, b_transposed: false, pair, bias: None, alpha: 1.0, accumulate, m, n, k }
}

/// dh = scale * dy B, dB += dyᵀ h, dA += dhᵀ dropout(x), then dx = dy W + dropout'(dh A).
pub(super) fn backward(cuda: &Cuda, s: &mut Scratch, a: LinearBackward<Cuda>) -> Result<()> {
    let op = "linear_backward";
    let (t, w) = (a.t, a.w);
    let (k, n, r) = (w.k, w.n, w.r);
    check(op, w, Some(a.lora.len().min(a.d_lora.len())))?;
    at_least(op, "dy", a.dy.len(), t * n)?;
    at_least(op, "x", a.x.len(), t * k)?;
    at_least(op, "dh", a.dh.len(), t * r)?;
    at_least(op, "h", a.h.len(), t * r)?;
    if let Some(dx) = &a.dx {
        at_least(op, "dx", dx.len(), t * k)?;
    }
    if t == 0 {
        return Ok(());
    }
    let (dy, lora) = (a.dy.range(0..t * n), a.lora.view());
    let parts = parts(w, r > 0);
    let adapted: Vec<LoraPart> = parts.iter().filter_map(Part::lora_part).collect();
    let dropout = a.dropout.filter(|d| d.p > 0.0);
    if r > 0 {
        let (dh, d_lora, x, h) = (a.dh.view_mut(), a.d_lora.view_mut(), a.x.range(0..t * k), a.h.view());
        let (dropout, scratch, parts) = (mask(dropout, &s.step), s.lora.view_mut(), &adapted);
        let all = LoraBackward { dh, d_lora, dy, x, h, lora, parts, t, k, n, r, dropout, scratch };
        lora::lora_backward(cuda, all)?;
    }
    let Some(dx) = a.dx else { return Ok(()) };
    let mut dx = dx.range_mut(0..t * k);
    let dh = a.dh.view();
    let kind = cuda.linear_kind(t, parts.len() > 1)?;
    let by = if kind == LinearKind::SliceCublas { Products::Cublas } else { Products::Own };
    let fused = matches!(kind, LinearKind::Fused | LinearKind::Matvec);
    let group = if fused { None } else { widened_group(cuda, &parts, s.weights.view_mut())? };

    // LoRA as more columns: not through dropout, and not where a pass over all parts at once moves less.
    let apart = dropout.is_some() || group.is_some() || (kind == LinearKind::SliceCublas && parts.len() > 1);
    let pairs: Vec<Option<Pair>> =
        parts.iter().map(|p| if apart { None } else { p.backward_pair(dh, lora, r) }).collect();
    let left: Vec<LoraPart> =
        parts.iter().zip(&pairs).filter(|(_, pair)| pair.is_none()).filter_map(|(p, _)| p.lora_part()).collect();
    match group {
        Some(b) => matmul(cuda, by, of_dx(dx.reborrow(), (dy, n), b, None, false, (t, k, n)))?,
        None => {
            for (i, (part, pair)) in parts.iter().zip(pairs).enumerate() {
                let (c, a, accumulate) = (dx.reborrow(), dy.range(part.y..t * n), i > 0);
                match quantized(part.w).filter(|_| fused) {
                    Some(w) => {
                        let direction = Direction::Backward;
                        let all = Nf4Gemm { c, ldc: k, a, lda: n, w, direction, pair, bias: None, accumulate, m: t };
                        nf4_gemm(cuda, all)?;
                    }
                    None => {
                        let b = widened(cuda, op, part.w, s.weights.view_mut())?;
                        let by = if fused { cuda.products() } else { by };
                        matmul(cuda, by, of_dx(c, (a, n), b, pair, accumulate, (t, k, part.n)))?;
                    }
                }
            }
        }
    }
    if left.is_empty() {
        return Ok(());
    }
    let dropout = mask(dropout, &s.step);
    lora::lora_backward_x(cuda, LoraBackwardX { dx, dh, lora, parts: &left, t, k, r, dropout })
}
