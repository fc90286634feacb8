//! matvec: the linear of few tokens, on a weight in 4 bits with LoRA's columns, and on the bf16 head.

use std::ops::Range;
use std::sync::Arc;

use super::Op;
use super::gemm::{add_pair, forward_sums};
#[cfg(feature = "cuda")]
use super::nf4::weight;
use super::nf4::{Decoder, projections, weight_args, weight_bytes, weight_of};
use crate::backend::Work;
#[cfg(feature = "cuda")]
use crate::backend::cuda::ops::decode::{Matvec, Weight, matvec};
#[cfg(feature = "cuda")]
use crate::backend::cuda::ops::gemm::Out;
use crate::bench::kernels::case::Element::{Bf16, F32};
#[cfg(feature = "cuda")]
use crate::bench::kernels::case::Way;
use crate::bench::kernels::case::{Arg, Case, Fill, Scalar};
use crate::bench::kernels::models::{Model, R};
use crate::bench::kernels::values::Inputs;

/// Token counts of their own, all at the table's first.
const FEW: [usize; 4] = [1, 2, 4, 8];

pub const OPS: &[Op] = &[
    Op {
        name: "matvec",
        about: "y (T, N) = x (T, K) W^T + h (T, R) B^T for T <= 8, W (N, K) in NF4, double-quantised; \
                a weight may be rounded to bf16, or its code's value",
        cases: |m, t| {
            let few = if t == 1 { &FEW[..] } else { &[] };
            few.iter().flat_map(|&t| projections(m).into_iter().map(move |shape| quantized(m, t, shape))).collect()
        },
        has_tokens: true,
        starter: Some(concat!(
            "// launch: matvec grid=n,t block=32\n{\n",
            "  // A warp an element.\n",
            weight_of!(),
            "  const unsigned long long row = blockIdx.x, token = blockIdx.y;\n",
            "  float sum = 0.0f;\n",
            "  for (unsigned long long i = threadIdx.x; i < k; i += 32)\n",
            "    sum += __bfloat162float(x[token * k + i]) * __bfloat162float(weight(row * k + i));\n",
            "  for (unsigned long long j = threadIdx.x; j < r; j += 32)\n",
            "    sum += __bfloat162float(h[token * r + j]) * __bfloat162float(b[row * r + j]);\n",
            "  for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, d);\n",
            "  if (threadIdx.x == 0) y[token * n + row] = __float2bfloat16(sum);\n}\n"
        )),
    },
    Op {
        name: "matvec_bf16",
        about: "y (T, V) = x (T, C) W^T in f32 for T = 1, W (V, C) in bf16: the head of a token",
        cases: |m, t| if t == 1 { vec![head(m)] } else { vec![] },
        has_tokens: true,
        starter: Some(HEAD),
    },
];

fn number(value: usize) -> Scalar {
    Scalar::U64(value as u64)
}

fn quantized(m: &Model, t: usize, (n, k): (usize, usize)) -> Case {
    let oracle = move |i: &Inputs, _: &str, span: Range<usize>| {
        let (w, b) = (Decoder::new(i), i.of("b"));
        let weight = |row: usize, columns: Range<usize>| {
            let range = row * k + columns.start..row * k + columns.end;
            w.decode(range).into_iter().map(f64::from).collect::<Vec<_>>()
        };
        let mut sums = forward_sums(span.clone(), (n, k), i.of("x"), weight);
        add_pair(&mut sums, span, n, i.of("h"), |column, j| b.at(column * R + j));
        // Rounded weights, or rounded values of the code book, are off by 1.7e-3 of their size, in either direction: six
        // deviations of such a sum do not happen.
        sums.into_iter().map(|sum| sum.expected(Bf16).with_error(3.0 * Bf16.half_ulp() * sum.squares.sqrt())).collect()
    };
    let y = Arg::output("y", Bf16, &dims!(T = t, N = n), 2 * k);
    let x = Arg::input("x", Bf16, &dims!(T = t, K = k), Fill::Random(1.0));
    let h = Arg::input("h", Bf16, &dims!(T = t, R = R), Fill::Random(1.0));
    let b = Arg::input("b", Bf16, &dims!(N = n, R = R), Fill::Random(0.02));
    Case {
        op: "matvec",
        model: m.name,
        shape: format!("{t}x{n}x{k} nf4 r={R}"),
        tokens: Some(t),
        args: [y, x].into_iter().chain(weight_args((n, k))).chain([h, b]).collect(),
        scalars: vec![("t", number(t)), ("n", number(n)), ("k", number(k)), ("r", number(R))],
        work: Work::product(2 * t * (n + k + R) + weight_bytes((n, k)) + 2 * n * R, (t, n, k + R)),
        oracle: Arc::new(oracle),
        #[cfg(feature = "cuda")]
        ways: vec![Way::own(move |cuda, set| {
            let [y, x, packed, codes, nested_absmax, offset, _, h, b] = set.all();
            let w = Weight::Nf4(weight([packed, codes, nested_absmax, offset], (n, k)));
            let (y, h) = (Out::Bf16(y.bf16_mut()), Some((h.bf16(), R, b.bf16(), R)));
            matvec(cuda, Matvec { y, ldy: n, x: x.bf16(), w, h, bias: None, t })
        })],
        cpu: None,
    }
}

fn head(m: &Model) -> Case {
    let (t, n, k) = (1, m.v, m.c);
    let oracle = move |i: &Inputs, _: &str, span: Range<usize>| {
        let w = i.of("w");
        let weight = |row: usize, columns: Range<usize>| columns.map(|j| w.at(row * k + j)).collect::<Vec<_>>();
        forward_sums(span, (n, k), i.of("x"), weight).into_iter().map(|sum| sum.expected(F32)).collect()
    };
    Case {
        op: "matvec_bf16",
        model: m.name,
        shape: format!("{t}x{n}x{k} bf16"),
        tokens: Some(t),
        args: vec![
            Arg::output("y", F32, &dims!(T = t, V = n), k),
            Arg::input("x", Bf16, &dims!(T = t, C = k), Fill::Random(1.0)),
            Arg::input("w", Bf16, &dims!(V = n, C = k), Fill::Random(0.02)),
        ],
        scalars: vec![("t", number(t)), ("v", number(n)), ("c", number(k))],
        work: Work::head_logits(t, k, n, 2 * n * k),
        oracle: Arc::new(oracle),
        #[cfg(feature = "cuda")]
        ways: vec![Way::own(move |cuda, set| {
            let [y, x, w] = set.all();
            let (y, w) = (Out::F32(y.f32_mut()), Weight::Bf16 { w: w.bf16(), n, k });
            matvec(cuda, Matvec { y, ldy: n, x: x.bf16(), w, h: None, bias: None, t })
        })],
        cpu: None,
    }
}

const HEAD: &str = r"// launch: matvec_bf16 grid=v,t block=32
{
  // A warp an element.
  const unsigned long long row = blockIdx.x, token = blockIdx.y;
  float sum = 0.0f;
  for (unsigned long long i = threadIdx.x; i < c; i += 32)
    sum += __bfloat162float(x[token * c + i]) * __bfloat162float(w[row * c + i]);
  for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, d);
  if (threadIdx.x == 0) y[token * v + row] = sum;
}
";
