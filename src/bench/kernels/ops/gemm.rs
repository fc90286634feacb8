//! gemm: products of 16-bit matrices, forward and backward, and forward with LoRA's columns in the same sum. What the
//! oracles of all products share is here too.

use std::ops::Range;
use std::sync::Arc;

use super::Op;
use super::sums::Terms;
use crate::backend::Work;
#[cfg(feature = "cuda")]
use crate::backend::cuda::ops::gemm::{Gemm, Out, Pair, gemm};
use crate::bench::kernels::case::Element::Bf16;
use crate::bench::kernels::case::{Arg, Case, Fill, Scalar};
#[cfg(feature = "cuda")]
use crate::bench::kernels::case::{Launch, Way};
use crate::bench::kernels::models::{Model, R};
#[cfg(feature = "cuda")]
use crate::bench::kernels::set::Set;
use crate::bench::kernels::values::{Column, Inputs};

pub const OPS: &[Op] = &[
    Op {
        name: "gemm_forward",
        about: "y (T, N) = x (T, K) W^T, W (N, K) in bf16",
        cases: |m, t| cases("gemm_forward", Kind::Forward, m, t),
        has_tokens: true,
        starter: Some(concat!(
            "// launch: gemm_forward grid=ceil_div(n,16),ceil_div(t,16) block=16,16\n{\n",
            forward_tiles!("w[at * k + first + tx]"),
            "  if (row < t && col < n) y[row * n + col] = __float2bfloat16(sum);\n}\n"
        )),
    },
    Op {
        name: "gemm_backward",
        about: "dx (T, K) = dy (T, N) W, W (N, K) in bf16",
        cases: |m, t| cases("gemm_backward", Kind::Backward, m, t),
        has_tokens: true,
        starter: Some(concat!(
            "// launch: gemm_backward grid=ceil_div(k,16),ceil_div(t,16) block=16,16\n{\n",
            backward_tiles!("w[(first + ty) * k + col]"),
            "  if (row < t && col < k) dx[row * k + col] = __float2bfloat16(sum);\n}\n"
        )),
    },
    Op {
        name: "gemm_lora_forward",
        about: "y (T, N) = x (T, K) W^T + h (T, R) B^T, W (N, K) and B (N, R) in bf16",
        cases: |m, t| cases("gemm_lora_forward", Kind::LoraForward, m, t),
        has_tokens: true,
        starter: Some(concat!(
            "// launch: gemm_lora_forward grid=ceil_div(n,16),ceil_div(t,16) block=16,16\n{\n",
            forward_tiles!("w[at * k + first + tx]"),
            "  if (row < t && col < n) {\n",
            "    for (unsigned long long j = 0; j < r; ++j)\n",
            "      sum += __bfloat162float(h[row * r + j]) * __bfloat162float(b[col * r + j]);\n",
            "    y[row * n + col] = __float2bfloat16(sum);\n  }\n}\n"
        )),
    },
];

/// The start of a naive kernel's body: `sum` = element (`row`, `col`) of x Wᵀ. The argument: a weight, row `at` of W,
/// column `first + tx`.
macro_rules! forward_tiles {
    ($weight:literal) => {
        concat!(
            "  // A block makes 16 x 16 elements of y, by tiles of x and W in shared memory.
  __shared__ float xs[16][17], ws[16][17];
  const unsigned tx = threadIdx.x, ty = threadIdx.y;
  const unsigned long long row = blockIdx.y * 16ull + ty, col = blockIdx.x * 16ull + tx;
  const unsigned long long at = blockIdx.x * 16ull + ty;
  float sum = 0.0f;
  for (unsigned long long first = 0; first < k; first += 16) {
    const bool inside = first + tx < k;
    xs[ty][tx] = inside && row < t ? __bfloat162float(x[row * k + first + tx]) : 0.0f;
    ws[ty][tx] = inside && at < n ? __bfloat162float(",
            $weight,
            ") : 0.0f;
    __syncthreads();
    for (int j = 0; j < 16; ++j) sum += xs[ty][j] * ws[tx][j];
    __syncthreads();
  }
"
        )
    };
}

/// The same of dy W. The argument: a weight, row `first + ty` of W, column `col`.
macro_rules! backward_tiles {
    ($weight:literal) => {
        concat!(
            "  // A block makes 16 x 16 elements of dx, by tiles of dy and W in shared memory.
  __shared__ float ds[16][17], ws[16][17];
  const unsigned tx = threadIdx.x, ty = threadIdx.y;
  const unsigned long long row = blockIdx.y * 16ull + ty, col = blockIdx.x * 16ull + tx;
  float sum = 0.0f;
  for (unsigned long long first = 0; first < n; first += 16) {
    ds[ty][tx] = first + tx < n && row < t ? __bfloat162float(dy[row * n + first + tx]) : 0.0f;
    ws[ty][tx] = first + ty < n && col < k ? __bfloat162float(",
            $weight,
            ") : 0.0f;
    __syncthreads();
    for (int j = 0; j < 16; ++j) sum += ds[ty][j] * ws[j][tx];
    __syncthreads();
  }
"
        )
    };
}
pub(super) use {backward_tiles, forward_tiles};

/// Elements `span`, of one row, of a (T, K) · W (N, K)ᵀ. `weight`: some columns of a row of W.
pub(super) fn forward_sums(
    span: Range<usize>,
    (n, k): (usize, usize),
    a: &Column,
    weight: impl Fn(usize, Range<usize>) -> Vec<f64>,
) -> Vec<Terms> {
    let row = span.start / n * k;
    let row: Vec<f64> = (row..row + k).map(|i| a.at(i)).collect();
    let element = |at: usize| {
        let mut sum = Terms::default();
        row.iter().zip(weight(at % n, 0..k)).for_each(|(a, w)| sum.add(a * w));
        sum
    };
    span.map(element).collect()
}

/// Elements `span`, of one row, of a (T, N) · W (N, K).
pub(super) fn backward_sums(
    span: Range<usize>,
    (n, k): (usize, usize),
    a: &Column,
    weight: impl Fn(usize, Range<usize>) -> Vec<f64>,
) -> Vec<Terms> {
    let (row, first) = (span.start / k, span.start % k);
    let mut sums = vec![Terms::default(); span.len()];
    for i in 0..n {
        let a = a.at(row * n + i);
        sums.iter_mut().zip(weight(i, first..first + span.len())).for_each(|(sum, w)| sum.add(a * w));
    }
    sums
}

/// Adds LoRA's columns: `sums` are the elements `span` of rows of `width`, h is (T, R), `b(column, j)` the other factor.
pub(super) fn add_pair(
    sums: &mut [Terms],
    span: Range<usize>,
    width: usize,
    h: &Column,
    b: impl Fn(usize, usize) -> f64,
) {
    for (sum, at) in sums.iter_mut().zip(span) {
        (0..R).for_each(|j| sum.add(h.at(at / width * R + j) * b(at % width, j)));
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Forward,
    Backward,
    LoraForward,
}

/// Each linear of a block, its projections as one matrix, where no other has its shape.
fn cases(op: &'static str, kind: Kind, m: &Model, t: usize) -> Vec<Case> {
    let mut shapes: Vec<(usize, usize)> = vec![];
    for (_, widths, k) in m.linears() {
        let shape = (widths.iter().sum(), k);
        if !shapes.contains(&shape) {
            shapes.push(shape);
        }
    }
    shapes.into_iter().map(|shape| case(op, kind, m, t, shape)).collect()
}

fn case(op: &'static str, kind: Kind, m: &Model, t: usize, (n, k): (usize, usize)) -> Case {
    let forward = kind != Kind::Backward;
    let oracle = move |i: &Inputs, _: &str, span: Range<usize>| {
        let w = i.of("w");
        let weight = |row: usize, columns: Range<usize>| columns.map(|j| w.at(row * k + j)).collect::<Vec<_>>();
        let mut sums = match kind {
            Kind::Backward => backward_sums(span.clone(), (n, k), i.of("dy"), weight),
            _ => forward_sums(span.clone(), (n, k), i.of("x"), weight),
        };
        if kind == Kind::LoraForward {
            let b = i.of("b");
            add_pair(&mut sums, span, n, i.of("h"), |column, j| b.at(column * R + j));
        }
        sums.into_iter().map(|sum| sum.expected(Bf16)).collect()
    };
    let w = Arg::input("w", Bf16, &dims!(N = n, K = k), Fill::Random(0.02));
    let mut args = if forward {
        let x = Arg::input("x", Bf16, &dims!(T = t, K = k), Fill::Random(1.0));
        vec![Arg::output("y", Bf16, &dims!(T = t, N = n), k), x, w]
    } else {
        let dy = Arg::input("dy", Bf16, &dims!(T = t, N = n), Fill::Random(0.1));
        vec![Arg::output("dx", Bf16, &dims!(T = t, K = k), n), dy, w]
    };
    let mut scalars = vec![("t", Scalar::U64(t as u64)), ("n", Scalar::U64(n as u64)), ("k", Scalar::U64(k as u64))];
    let (cols, depth) = if forward { (n, k) } else { (k, n) };
    let mut shape = format!("{t}x{cols}x{depth}");
    let mut r = 0;
    if kind == Kind::LoraForward {
        r = R;
        shape += &format!(" r={r}");
        args.push(Arg::input("h", Bf16, &dims!(T = t, R = r), Fill::Random(1.0)));
        args.push(Arg::input("b", Bf16, &dims!(N = n, R = r), Fill::Random(0.02)));
        scalars.push(("r", Scalar::U64(r as u64)));
    }
    Case {
        op,
        model: m.name,
        shape,
        tokens: Some(t),
        args,
        scalars,
        work: Work::product(2 * (t * (n + k) + n * k + r * (t + n)), (t, cols, depth + r)),
        oracle: Arc::new(oracle),
        #[cfg(feature = "cuda")]
        ways: ways(kind, (t, n, k)),
        cpu: None,
    }
}

#[cfg(feature = "cuda")]
fn ways(kind: Kind, shape: (usize, usize, usize)) -> Vec<Way> {
    let own = Way::own(move |cuda, set| gemm(cuda, product(set, kind, shape)));
    // Below a tile's rows the kernels for Hopper do not serve: both ways would be one.
    let mut ways = if shape.0 >= 128 { own.both() } else { vec![own] };
    if kind != Kind::LoraForward {
        let open: Launch = Arc::new(|cuda, _| cuda.open_cublas());
        let cublas = Way::new("cublas", move |cuda, set| cuda.cublas_product(&product(set, kind, shape)));
        ways.push(Way { needs_cublas: true, set_up: Some(open), ..cublas });
    }
    ways
}

#[cfg(feature = "cuda")]
fn product(set: &mut Set, kind: Kind, (t, n, k): (usize, usize, usize)) -> Gemm<'_> {
    let (c, a, b, pair) = if kind == Kind::LoraForward {
        let [y, x, w, h, b] = set.all();
        (y, x, w, Some(Pair { a: h.bf16(), lda: R, b: b.bf16(), ldb: R, k: R }))
    } else {
        let [c, a, w] = set.all();
        (c, a, w, None)
    };
    let b_transposed = kind != Kind::Backward;
    let (cols, depth) = if b_transposed { (n, k) } else { (k, n) };
    Gemm {
        c: Out::Bf16(c.bf16_mut()),
        ldc: cols,
        a: a.bf16(),
        lda: depth,
        b: b.bf16(),
        ldb: k,
        b_transposed,
        pair,
        bias: None,
        alpha: 1.0,
        accumulate: false,
        m: t,
        n: cols,
        k: depth,
    }
}
