//! Elementwise functions and sums that the compiler turns into vector code.
//!
//! [`simd`] compiles its closure for AVX-512, AVX2 and the baseline, and picks at run time. A sum keeps [`LANES`]
//! partial sums whatever the machine, and [`f32::mul_add`] rounds once on every machine: the bits do not depend on it.

use pulp::Arch;

/// Partial sums of [`dot`] and friends: two AVX-512 registers, enough to hide the latency of an addition.
pub const LANES: usize = 32;

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
    const LN2_HI: f32 = 0.693_359_375;
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

#[inline(always)]
fn fold(lanes: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    let mut s = lanes;
    while width > 0 {
        for i in 0..width {
            s[i] += s[i + width];
        }
        width /= 2;
    }
    s[0]
}

/// Sum of f(a[i], b[i], sum) from lane-wise partial sums: `f` adds to the partial sum it is given.
#[inline(always)]
fn reduce2(a: &[f32], b: &[f32], f: impl Fn(f32, f32, f32) -> f32) -> f32 {
    let mut acc = [0.0f32; LANES];
    let (ca, cb) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let (ra, rb) = (ca.remainder(), cb.remainder());
    for (x, y) in ca.zip(cb) {
        for i in 0..LANES {
            acc[i] = f(x[i], y[i], acc[i]);
        }
    }
    for (s, (x, y)) in acc.iter_mut().zip(ra.iter().zip(rb)) {
        *s = f(*x, *y, *s);
    }
    fold(acc)
}

/// sum a*b
#[inline(always)]
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    reduce2(
        a,
        b,
        #[inline(always)]
        |x, y, s| x.mul_add(y, s),
    )
}

/// sum a*b*c
#[inline(always)]
pub fn dot3(a: &[f32], b: &[f32], c: &[f32]) -> f32 {
    let n = a.len() / LANES * LANES;
    let mut acc = [0.0f32; LANES];
    for ((x, y), z) in a.chunks_exact(LANES).zip(b.chunks_exact(LANES)).zip(c.chunks_exact(LANES)) {
        for i in 0..LANES {
            acc[i] = (x[i] * y[i]).mul_add(z[i], acc[i]);
        }
    }
    for (s, ((x, y), z)) in acc.iter_mut().zip(a[n..].iter().zip(&b[n..]).zip(&c[n..])) {
        *s = (x * y).mul_add(*z, *s);
    }
    fold(acc)
}

/// The larger; a NaN of either side stays.
#[inline(always)]
fn pick(m: f32, x: f32) -> f32 {
    if m >= x || m.is_nan() { m } else { x }
}

/// The largest element; NaN if any is NaN, -infinity if there is none.
#[inline(always)]
pub fn max(a: &[f32]) -> f32 {
    let mut acc = [f32::NEG_INFINITY; LANES];
    let chunks = a.chunks_exact(LANES);
    let rest = chunks.remainder();
    for x in chunks {
        for i in 0..LANES {
            acc[i] = pick(acc[i], x[i]);
        }
    }
    for (m, x) in acc.iter_mut().zip(rest) {
        *m = pick(*m, *x);
    }
    let mut top = acc[0];
    for m in &acc[1..] {
        top = pick(top, *m);
    }
    top
}

/// x = e^(x - shift) in place; returns the sum.
#[inline(always)]
pub fn exp_sum(x: &mut [f32], shift: f32) -> f32 {
    let mut acc = [0.0f32; LANES];
    let mut chunks = x.chunks_exact_mut(LANES);
    for c in &mut chunks {
        for i in 0..LANES {
            c[i] = exp(c[i] - shift);
            acc[i] += c[i];
        }
    }
    for (s, v) in acc.iter_mut().zip(chunks.into_remainder()) {
        *v = exp(*v - shift);
        *s += *v;
    }
    fold(acc)
}
