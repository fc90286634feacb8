//! Elementwise functions and sums as vector code.
//!
//! [`simd`] compiles its closure for AVX2 and for the baseline, and picks at run time: loops without a sum become vector
//! code by themselves. The compiler will not reorder a sum of floats, so sums name their vectors: [`UNROLL`] partial sums
//! of one register each, added in a fixed order.

use pulp::{Arch, Simd, WithSimd};

/// Registers of partial sums: enough to hide the latency of an addition.
const UNROLL: usize = 4;

/// Runs `f` compiled for the widest vectors of this machine. Write `simd(#[inline(always)] || ...)`: what is not
/// inlined into `f` is compiled for the baseline. So inside it: `for` loops, and no closures for iterators to call.
#[inline(always)]
pub fn simd<R>(f: impl FnOnce() -> R) -> R {
    Arch::new().dispatch(f)
}

/// e^x to about 1 ulp; 0 below 2^-125, infinity above the finite one, NaN for NaN.
///
/// x = n ln 2 + r with |r| <= ln 2 / 2; e^r is its Taylor sum to r^7 (the rest is below 2^-27), 2^n is made of bits.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    // 1.5 * 2^23: adding it leaves round(x / ln 2) in the low bits of the sum.
    const MAGIC: f32 = 12_582_912.0;
    // ln 2 in two pieces; n times the first is exact.
    const LN2_HI: f32 = 355.0 / 512.0;
    const LN2_LO: f32 = -2.121_944_4e-4;
    let t = x.mul_add(std::f32::consts::LOG2_E, MAGIC);
    let n = t - MAGIC;
    let r = n.mul_add(-LN2_LO, n.mul_add(-LN2_HI, x));
    let mut p = 1.0 / 5040.0;
    p = r.mul_add(p, 1.0 / 720.0);
    p = r.mul_add(p, 1.0 / 120.0);
    p = r.mul_add(p, 1.0 / 24.0);
    p = r.mul_add(p, 1.0 / 6.0);
    p = r.mul_add(p, 0.5);
    let e = (r * r).mul_add(p, r) + 1.0;
    // 2^n as half of it twice: n reaches 128 just below the overflow of e^x.
    let half = f32::from_bits((t.to_bits() << 23).wrapping_add(126 << 23));
    let y = e * half * 2.0;
    if x < -86.98 {
        0.0
    } else if x > 88.722_84 {
        f32::INFINITY
    } else {
        y
    }
}

/// 1 / (1 + e^-x)
#[inline(always)]
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// What a sum adds up: `one` for vectors, `rest` for the elements behind the last whole vector.
trait Term<const N: usize>: Copy {
    fn one<S: Simd>(self, simd: S, x: [S::f32s; N], sum: S::f32s) -> S::f32s;
    fn rest(self, x: [f32; N], sum: f32) -> f32;
}

struct Sum<'a, const N: usize, T> {
    of: [&'a [f32]; N],
    term: T,
}

impl<const N: usize, T: Term<N>> WithSimd for Sum<'_, N, T> {
    type Output = f32;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> f32 {
        let vectors = self.of.map(|x| S::as_simd_f32s(x).0);
        let rests = self.of.map(|x| S::as_simd_f32s(x).1);
        let n = vectors.iter().map(|v| v.len()).min().unwrap_or(0);
        let vectors = vectors.map(|v| &v[..n]);
        let mut acc = [simd.splat_f32s(0.0); UNROLL];
        let whole = n / UNROLL * UNROLL;
        for at in (0..whole).step_by(UNROLL) {
            for (i, acc) in acc.iter_mut().enumerate() {
                *acc = self.term.one(simd, vectors.map(|v| v[at + i]), *acc);
            }
        }
        for at in whole..n {
            acc[0] = self.term.one(simd, vectors.map(|v| v[at]), acc[0]);
        }
        let mut rest = 0.0;
        for at in 0..rests[0].len() {
            rest = self.term.rest(rests.map(|r| r[at]), rest);
        }
        let [a, b, c, d] = acc;
        simd.reduce_sum_f32s(simd.add_f32s(simd.add_f32s(a, b), simd.add_f32s(c, d))) + rest
    }
}

#[derive(Clone, Copy)]
struct Plain;

impl Term<1> for Plain {
    #[inline(always)]
    fn one<S: Simd>(self, simd: S, [x]: [S::f32s; 1], sum: S::f32s) -> S::f32s {
        simd.add_f32s(x, sum)
    }

    #[inline(always)]
    fn rest(self, [x]: [f32; 1], sum: f32) -> f32 {
        x + sum
    }
}

#[derive(Clone, Copy)]
struct Product;

impl Term<2> for Product {
    #[inline(always)]
    fn one<S: Simd>(self, simd: S, [x, y]: [S::f32s; 2], sum: S::f32s) -> S::f32s {
        simd.mul_add_f32s(x, y, sum)
    }

    #[inline(always)]
    fn rest(self, [x, y]: [f32; 2], sum: f32) -> f32 {
        x.mul_add(y, sum)
    }
}

impl Term<3> for Product {
    #[inline(always)]
    fn one<S: Simd>(self, simd: S, [x, y, z]: [S::f32s; 3], sum: S::f32s) -> S::f32s {
        simd.mul_add_f32s(simd.mul_f32s(x, y), z, sum)
    }

    #[inline(always)]
    fn rest(self, [x, y, z]: [f32; 3], sum: f32) -> f32 {
        (x * y).mul_add(z, sum)
    }
}

/// sum a
#[inline(always)]
pub fn sum(a: &[f32]) -> f32 {
    Arch::new().dispatch(Sum { of: [a], term: Plain })
}

/// sum a*b
#[inline(always)]
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    Arch::new().dispatch(Sum { of: [a, b], term: Product })
}

/// sum a*b*c
#[inline(always)]
pub fn dot3(a: &[f32], b: &[f32], c: &[f32]) -> f32 {
    Arch::new().dispatch(Sum { of: [a, b, c], term: Product })
}

struct Max<'a>(&'a [f32]);

impl WithSimd for Max<'_> {
    type Output = f32;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> f32 {
        let (vectors, rest) = S::as_simd_f32s(self.0);
        let mut acc = [simd.splat_f32s(f32::NEG_INFINITY); UNROLL];
        let (whole, single) = vectors.as_chunks::<UNROLL>();
        for x in whole {
            for i in 0..UNROLL {
                acc[i] = simd.max_f32s(x[i], acc[i]);
            }
        }
        for x in single {
            acc[0] = simd.max_f32s(*x, acc[0]);
        }
        let [a, b, c, d] = acc;
        let mut top = simd.reduce_max_f32s(simd.max_f32s(simd.max_f32s(a, b), simd.max_f32s(c, d)));
        for x in rest {
            top = top.max(*x);
        }
        top
    }
}

/// The largest element, -infinity if there is none. A NaN may or may not be passed over.
#[inline(always)]
pub fn max(a: &[f32]) -> f32 {
    Arch::new().dispatch(Max(a))
}

/// x = e^(x - shift) in place; returns the sum.
#[inline(always)]
pub fn exp_sum(x: &mut [f32], shift: f32) -> f32 {
    simd(
        #[inline(always)]
        || {
            for x in x.iter_mut() {
                *x = exp(*x - shift);
            }
        },
    );
    sum(x)
}
