//! nf4_gemm: products with a weight in 4 bits, forward and backward, with LoRA's columns in the same sum.

use std::ops::Range;
use std::sync::Arc;

use super::Op;
use super::gemm::{add_pair, backward_sums, backward_tiles, forward_sums, forward_tiles};
#[cfg(feature = "cuda")]
use super::nf4::weight;
use super::nf4::{Decoder, projections, weight_args, weight_bytes, weight_of};
use crate::backend::Work;
#[cfg(feature = "cuda")]
use crate::backend::cuda::ops::gemm::Pair;
#[cfg(feature = "cuda")]
use crate::backend::cuda::ops::nf4_gemm::{Direction, Nf4Gemm, nf4_gemm};
use crate::bench::kernels::case::Element::Bf16;
#[cfg(feature = "cuda")]
use crate::bench::kernels::case::Way;
use crate::bench::kernels::case::{Arg, Case, Fill, Scalar};
use crate::bench::kernels::models::{Model, R};
use crate::bench::kernels::values::Inputs;

pub const OPS: &[Op] = &[
    Op {
        name: "nf4_gemm_forward",
        about: "y (T, N) = x (T, K) W^T + h (T, R) B^T, W (N, K) in NF4, double-quantised, each weight rounded to bf16",
        cases: |m, t| projections(m).into_iter().map(|shape| case(m, t, shape, true)).collect(),
        has_tokens: true,
        starter: Some(concat!(
            "// launch: nf4_gemm_forward grid=ceil_div(n,16),ceil_div(t,16) block=16,16\n{\n",
            weight_of!(),
            forward_tiles!("weight(at * k + first + tx)"),
            "  if (row < t && col < n) {\n",
            "    for (unsigned long long j = 0; j < r; ++j)\n",
            "      sum += __bfloat162float(h[row * r + j]) * __bfloat162float(b[col * r + j]);\n",
            "    y[row * n + col] = __float2bfloat16(sum);\n  }\n}\n"
        )),
    },
    Op {
        name: "nf4_gemm_backward",
        about: "dx (T, K) = dy (T, N) W + dh (T, R) A, W (N, K) in NF4, double-quantised, each weight rounded to bf16",
        cases: |m, t| projections(m).into_iter().map(|shape| case(m, t, shape, false)).collect(),
        has_tokens: true,
        starter: Some(concat!(
            "// launch: nf4_gemm_backward grid=ceil_div(k,16),ceil_div(t,16) block=16,16\n{\n",
            weight_of!(),
            backward_tiles!("weight((first + ty) * k + col)"),
            "  if (row < t && col < k) {\n",
            "    for (unsigned long long j = 0; j < r; ++j)\n",
            "      sum += __bfloat162float(dh[row * r + j]) * __bfloat162float(a[j * k + col]);\n",
            "    dx[row * k + col] = __float2bfloat16(sum);\n  }\n}\n"
        )),
    },
];

fn case(m: &Model, t: usize, (n, k): (usize, usize), forward: bool) -> Case {
    let oracle = move |i: &Inputs, _: &str, span: Range<usize>| {
        let w = Decoder::new(i);
        let weight = |row: usize, columns: Range<usize>| w.rounded(row * k + columns.start..row * k + columns.end);
        let sums = if forward {
            let mut sums = forward_sums(span.clone(), (n, k), i.of("x"), weight);
            let b = i.of("b");
            add_pair(&mut sums, span, n, i.of("h"), |column, j| b.at(column * R + j));
            sums
        } else {
            let mut sums = backward_sums(span.clone(), (n, k), i.of("dy"), weight);
            let a = i.of("a");
            add_pair(&mut sums, span, k, i.of("dh"), |column, j| a.at(j * k + column));
            sums
        };
        sums.into_iter().map(|sum| sum.expected(Bf16)).collect()
    };
    let (first, last) = if forward {
        let y = Arg::output("y", Bf16, &dims!(T = t, N = n), 2 * k);
        let x = Arg::input("x", Bf16, &dims!(T = t, K = k), Fill::Random(1.0));
        let h = Arg::input("h", Bf16, &dims!(T = t, R = R), Fill::Random(1.0));
        ([y, x], [h, Arg::input("b", Bf16, &dims!(N = n, R = R), Fill::Random(0.02))])
    } else {
        let dx = Arg::output("dx", Bf16, &dims!(T = t, K = k), 2 * n);
        let dy = Arg::input("dy", Bf16, &dims!(T = t, N = n), Fill::Random(0.1));
        let dh = Arg::input("dh", Bf16, &dims!(T = t, R = R), Fill::Random(0.1));
        ([dx, dy], [dh, Arg::input("a", Bf16, &dims!(R = R, K = k), Fill::Random(0.02))])
    };
    let (cols, depth) = if forward { (n, k) } else { (k, n) };
    let number = |value: usize| Scalar::U64(value as u64);
    Case {
        op: if forward { "nf4_gemm_forward" } else { "nf4_gemm_backward" },
        model: m.name,
        shape: format!("{t}x{cols}x{depth} r={R}"),
        tokens: Some(t),
        args: first.into_iter().chain(weight_args((n, k))).chain(last).collect(),
        scalars: vec![("t", number(t)), ("n", number(n)), ("k", number(k)), ("r", number(R))],
        work: Work::product(2 * t * (n + k + R) + weight_bytes((n, k)) + 2 * cols * R, (t, cols, depth + R)),
        oracle: Arc::new(oracle),
        // One kernel for all cards: there is no "sm80" beside it.
        #[cfg(feature = "cuda")]
        ways: vec![Way::own(move |cuda, set| {
            let [c, a, packed, codes, nested_absmax, offset, _, h, b] = set.all();
            // B (n, r) forward, A (r, k) backward.
            let (direction, ldb) = if forward { (Direction::Forward, R) } else { (Direction::Backward, k) };
            let op = Nf4Gemm {
                c: c.bf16_mut(),
                ldc: cols,
                a: a.bf16(),
                lda: depth,
                w: weight([packed, codes, nested_absmax, offset], (n, k)),
                direction,
                pair: Some(Pair { a: h.bf16(), lda: R, b: b.bf16(), ldb, k: R }),
                bias: None,
                accumulate: false,
                m: t,
            };
            nf4_gemm(cuda, op)
        })],
        cpu: None,
    }
}
