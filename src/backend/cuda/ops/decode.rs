//! csrc/decode.cu behind checks.

use std::ptr::null;

use half::bf16;

use super::gemm::{Out, check_matrix, check_size};
use super::nf4::{self, Nf4Weight};
use super::{at_least, exactly, ffi};
use crate::backend::Heads;
use crate::backend::cuda::Cuda;
use crate::backend::cuda::memory::{View, ViewMut};
use crate::backend::workspace::attention_decode_splits;
use crate::error::{Error, Result};
use crate::nf4::QuantType;

pub use crate::backend::workspace::attention_decode_scratch;

/// The most tokens of a [`matvec`].
pub const MATVEC_MAX_T: usize = 8;
/// The most parts of a [`matvec_group`].
pub const MATVEC_MAX_PARTS: usize = ffi::decode::MATVEC_MAX_PARTS;

/// A frozen weight (n, k).
pub enum Weight<'a> {
    Nf4(Nf4Weight<'a>),
    Bf16 { w: View<'a, bf16>, n: usize, k: usize },
}

impl Weight<'_> {
    fn n(&self) -> usize {
        match self {
            Self::Nf4(w) => w.n,
            Self::Bf16 { n, .. } => *n,
        }
    }

    fn k(&self) -> usize {
        match self {
            Self::Nf4(w) => w.k,
            Self::Bf16 { k, .. } => *k,
        }
    }
}

/// `y = x Wᵀ (+ h Bᵀ) (+ bias)` for few tokens.
pub struct Matvec<'a> {
    /// (t, n) =, rows `ldy` elements apart
    pub y: Out<'a>,
    pub ldy: usize,
    /// (t, k)
    pub x: View<'a, bf16>,
    pub w: Weight<'a>,
    /// h (t, r), the stride of its rows, B (n, r), r. The scale is in h.
    pub h: Option<(View<'a, bf16>, usize, View<'a, bf16>, usize)>,
    /// (n)
    pub bias: Option<View<'a, bf16>>,
    /// At most [`MATVEC_MAX_T`].
    pub t: usize,
}

/// One projection of a [`MatvecGroup`].
pub struct MatvecPart<'a> {
    pub w: Weight<'a>,
    /// First column in y.
    pub y: usize,
    /// h (t, r), B (n, r), r. The scale is in h.
    pub h: Option<(View<'a, bf16>, View<'a, bf16>, usize)>,
    /// (n)
    pub bias: Option<View<'a, bf16>>,
}

/// Projections that read the same x, side by side in y.
pub struct MatvecGroup<'a> {
    /// (t, N) =, rows `ldy` elements apart
    pub y: Out<'a>,
    pub ldy: usize,
    /// (t, k)
    pub x: View<'a, bf16>,
    /// Row stride of each part's h.
    pub ldh: usize,
    /// 1 to [`MATVEC_MAX_PARTS`].
    pub parts: &'a [MatvecPart<'a>],
    /// At most [`MATVEC_MAX_T`].
    pub t: usize,
}

/// Row i of the t new tokens sits at `p = positions[i]`: its k and v are appended there, and it attends to the keys
/// `p - window < j <= p` of the cache. All rows are appended before any attends.
pub struct AttentionDecode<'a> {
    /// (t, H*D) =
    pub o: ViewMut<'a, bf16>,
    /// (capacity, G*D): rows `positions[i]` written
    pub k: ViewMut<'a, bf16>,
    /// (capacity, G*D): rows `positions[i]` written
    pub v: ViewMut<'a, bf16>,
    /// (t, (H+2G)*D), rotated
    pub qkv: View<'a, bf16>,
    /// (t) on the device, each in 0..capacity
    pub positions: View<'a, i32>,
    pub t: usize,
    pub capacity: usize,
    pub heads: Heads,
    /// ([`attention_decode_scratch`])
    pub scratch: ViewMut<'a, f32>,
}

pub fn matvec(cuda: &Cuda, a: Matvec) -> Result<()> {
    let (h, ldh) = match a.h {
        Some((h, ldh, b, r)) => (Some((h, b, r)), ldh),
        None => (None, 0),
    };
    let parts = &[MatvecPart { w: a.w, y: 0, h, bias: a.bias }];
    matvec_group(cuda, MatvecGroup { y: a.y, ldy: a.ldy, x: a.x, ldh, parts, t: a.t })
}

/// One launch where the parts are all of one kind and aligned.
pub fn matvec_group(cuda: &Cuda, a: MatvecGroup) -> Result<()> {
    const OP: &str = "matvec";
    if a.t == 0 {
        return Ok(());
    }
    if a.t > MATVEC_MAX_T {
        return Err(Error::Shape { op: OP, argument: "t", found: a.t, expected: MATVEC_MAX_T });
    }
    let (first, count) = match a.parts {
        [first, ..] if a.parts.len() <= MATVEC_MAX_PARTS => (first, a.parts.len()),
        _ => return Err(Error::Shape { op: OP, argument: "parts", found: a.parts.len(), expected: MATVEC_MAX_PARTS }),
    };
    let k = first.w.k();
    check_size(OP, "k", k)?;
    at_least(OP, "x", a.x.len(), a.t * k)?;
    let (y, y_len, y_is_f32) = match &a.y {
        Out::Bf16(y) => (cuda.ptr_mut(y)?.cast(), y.len(), 0),
        Out::F32(y) => (cuda.ptr_mut(y)?.cast(), y.len(), 1),
    };
    let nothing = ffi::nf4::Nf4Absmax { absmax: null(), codes: null(), nested_absmax: null(), offset: null() };
    let mut parts = [ffi::decode::MatvecPart {
        packed: null(),
        absmax: nothing,
        w: null(),
        h: null(),
        b: null(),
        bias: null(),
        y: 0,
        n: 0,
        r: 0,
        quant_type: nf4::quant_type(QuantType::Nf4),
    }; MATVEC_MAX_PARTS];
    for (part, out) in a.parts.iter().zip(&mut parts) {
        exactly(OP, "k of a part", part.w.k(), k)?;
        let n = part.w.n();
        check_size(OP, "n", n)?;
        check_matrix(OP, ["y", "ldy"], y_len, (a.t, part.y.saturating_add(n)), a.ldy)?;
        match &part.w {
            Weight::Nf4(w) => {
                out.absmax = nf4::check_weight(cuda, OP, w)?;
                out.packed = cuda.ptr(&w.packed)?;
                out.quant_type = nf4::quant_type(w.quant_type);
            }
            Weight::Bf16 { w, .. } => {
                at_least(OP, "w", w.len(), n.saturating_mul(k))?;
                out.w = cuda.ptr(w)?;
            }
        }
        if let Some((h, b, r)) = &part.h {
            check_size(OP, "r", *r)?;
            check_matrix(OP, ["h", "ldh"], h.len(), (a.t, *r), a.ldh)?;
            at_least(OP, "b", b.len(), n * r)?;
            (out.h, out.b, out.r) = (cuda.ptr(h)?, cuda.ptr(b)?, *r as i32);
        }
        if let Some(bias) = &part.bias {
            at_least(OP, "bias", bias.len(), n)?;
            out.bias = cuda.ptr(bias)?;
        }
        (out.y, out.n) = (part.y as i32, n as i32);
    }
    let args = ffi::decode::Matvec {
        y,
        x: cuda.ptr(&a.x)?,
        ldy: a.ldy as u64,
        ldh: a.ldh as u64,
        parts,
        count: count as i32,
        t: a.t as i32,
        k: k as i32,
        y_is_f32,
    };
    // SAFETY: `args` lives through the call. The buffers have the sizes that the launcher's contract asks for (checked
    // above), and outlive the kernels: freeing is ordered behind them on the stream.
    unsafe { ffi::decode::matvec(&args, cuda.stream_for_launch()?) }.check(OP)
}

pub fn attention_decode(cuda: &Cuda, a: AttentionDecode) -> Result<()> {
    const OP: &str = "attention_decode";
    /// The grid's limit.
    const MOST: usize = 65_535;
    let (t, heads) = (a.t, a.heads);
    let Heads { h, g, d, window } = heads;
    let shape = |argument, found, expected| Err(Error::Shape { op: OP, argument, found, expected });
    if g == 0 || h == 0 || h % g != 0 || h > MOST {
        return shape("heads", h, g.max(1));
    }
    if !(1..=256).contains(&d) {
        return shape("heads.d", d, d.clamp(1, 256));
    }
    if window == Some(0) {
        return shape("window", 0, 1);
    }
    if t > MOST {
        return shape("t", t, MOST);
    }
    check_size(OP, "capacity", a.capacity)?;
    at_least(OP, "o", a.o.len(), t * h * d)?;
    at_least(OP, "k", a.k.len(), a.capacity.saturating_mul(g * d))?;
    at_least(OP, "v", a.v.len(), a.capacity.saturating_mul(g * d))?;
    at_least(OP, "qkv", a.qkv.len(), t * heads.qkv())?;
    at_least(OP, "positions", a.positions.len(), t)?;
    at_least(OP, "scratch", a.scratch.len(), attention_decode_scratch(t, heads))?;
    let args = ffi::decode::AttentionDecode {
        o: cuda.ptr_mut(&a.o)?,
        k: cuda.ptr_mut(&a.k)?,
        v: cuda.ptr_mut(&a.v)?,
        qkv: cuda.ptr(&a.qkv)?,
        positions: cuda.ptr(&a.positions)?,
        scratch: cuda.ptr_mut(&a.scratch)?,
        t: t as i32,
        capacity: a.capacity as i32,
        h: h as i32,
        g: g as i32,
        d: d as i32,
        window: window.map_or(0, |w| w.min(a.capacity) as i32),
        splits: attention_decode_splits(t) as i32,
        scale: heads.scale(),
    };
    // SAFETY: as in matvec; the kernels write no row of the cache outside 0..capacity, whatever the positions.
    unsafe { ffi::decode::attention_decode(&args, cuda.stream_for_launch()?) }.check(OP)
}
