//! head_norm_forward and head_norm_backward: RMSNorm over each head of q and k.

use std::ops::Range;
use std::sync::Arc;

use super::Op;
use crate::backend::cpu::Cpu;
#[cfg(feature = "cuda")]
use crate::backend::cuda::ops::rmsnorm::{HeadNormBackward, HeadNormForward, head_norm_backward, head_norm_forward};
use crate::backend::{Backend, Heads, Work};
use crate::bench::kernels::case::Element::{Bf16, F32};
#[cfg(feature = "cuda")]
use crate::bench::kernels::case::Way;
use crate::bench::kernels::case::{Arg, Case, Expected, Fill, HostBuffer, Scalar, undeclared};
use crate::bench::kernels::models::Model;
use crate::bench::kernels::values::Inputs;

const EPS: f32 = 1e-6;

pub const OPS: &[Op] = &[
    Op {
        name: "head_norm_forward",
        about: "y = x, but each query head is r * x * q_w and each key head r * x * k_w; r = 1 / sqrt(mean_d(x^2) + eps)",
        cases: |m, t| vec![forward(m, t)],
        has_tokens: true,
        starter: Some(FORWARD),
    },
    Op {
        name: "head_norm_backward",
        about: "of each query and key head, in place: dy <- r * dy * w - r^3 * x * mean_d(dy * w * x)",
        cases: |m, t| vec![backward(m, t)],
        has_tokens: true,
        starter: Some(BACKWARD),
    },
];

fn shape(t: usize, Heads { h, g, d, .. }: Heads) -> String {
    format!("{t} heads {h}:{g}:{d}")
}

fn sizes(t: usize, heads: Heads) -> Vec<(&'static str, Scalar)> {
    [("t", t), ("h", heads.h), ("g", heads.g), ("d", heads.d)].map(|(name, n)| (name, Scalar::U64(n as u64))).to_vec()
}

/// Whether element `at` of qkv belongs to a query head, to a key head, or (None) to a value head.
fn is_query(at: usize, heads: Heads) -> Option<bool> {
    let head = at % heads.qkv() / heads.d;
    (head < heads.h + heads.g).then_some(head < heads.h)
}

/// What `of` says of a head that starts at an element, of each head that `span` touches, in order.
fn of_heads<R>(span: &Range<usize>, d: usize, of: impl Fn(usize) -> R) -> Vec<R> {
    (span.start / d..span.end.div_ceil(d)).map(|head| of(head * d)).collect()
}

/// The mean of the squares of a head costs D; a span of 32 elements touches at most two heads.
fn cost(d: usize, own: usize) -> usize {
    (2 * d).div_ceil(32) + own
}

fn forward(m: &Model, t: usize) -> Case {
    let heads = m.heads;
    let (d, width, normed) = (heads.d, heads.qkv(), heads.h + heads.g);
    let oracle = move |i: &Inputs, output: &str, span: Range<usize>| -> Vec<Expected> {
        let (x, q_w, k_w, eps) = (i.of("x"), i.of("q_w"), i.of("k_w"), i.scalar("eps"));
        let rstd = |start: usize| {
            let squares = (start..start + d).map(|at| x.at(at) * x.at(at)).sum::<f64>();
            1.0 / (squares / d as f64 + eps).sqrt()
        };
        if output == "rstd" {
            let of_head = |at: usize| rstd(at / normed * width + at % normed * d);
            return span.map(|at| Expected::rounded(of_head(at), F32, of_head(at))).collect();
        }
        let (all, first) = (of_heads(&span, d, rstd), span.start / d);
        let element = |at: usize| {
            let Some(query) = is_query(at, heads) else { return Expected::exact(x.at(at)) };
            let w = if query { q_w } else { k_w };
            let value = all[at / d - first] * x.at(at) * w.at(at % d);
            Expected::rounded(value, Bf16, value.abs())
        };
        span.map(element).collect()
    };
    Case {
        op: "head_norm_forward",
        model: m.name,
        shape: shape(t, heads),
        tokens: Some(t),
        args: vec![
            Arg::output("y", Bf16, &[("T", t), ("(H+2G)*D", width)], cost(d, 3)),
            Arg::output("rstd", F32, &[("T", t), ("H+G", normed)], 2 * d),
            Arg::input("x", Bf16, &[("T", t), ("(H+2G)*D", width)], Fill::Random(1.0)),
            Arg::input("q_w", Bf16, &dims!(D = d), Fill::Random(1.0)),
            Arg::input("k_w", Bf16, &dims!(D = d), Fill::Random(1.0)),
        ],
        scalars: [sizes(t, heads), vec![("eps", Scalar::F32(EPS))]].concat(),
        work: Work::head_norm_forward(t, heads),
        oracle: Arc::new(oracle),
        #[cfg(feature = "cuda")]
        ways: vec![Way::own(move |cuda, set| {
            let [y, rstd, x, q_w, k_w] = set.all();
            let (y, rstd, x, q_w, k_w) = (y.bf16_mut(), rstd.f32_mut(), x.bf16(), q_w.bf16(), k_w.bf16());
            head_norm_forward(cuda, HeadNormForward { y, rstd, x, q_w, k_w, t, heads, eps: EPS })
        })],
        cpu: Some(Arc::new(move |cpu: &mut Cpu, buffers: &mut [HostBuffer]| {
            use HostBuffer::F32;
            let [F32(y), F32(rstd), F32(x), F32(q_w), F32(k_w)] = buffers else { undeclared() };
            cpu.head_norm_forward(crate::backend::HeadNormForward { y, rstd, x, q_w, k_w, t, heads, eps: EPS })
        })),
    }
}

fn backward(m: &Model, t: usize) -> Case {
    let heads = m.heads;
    let (d, width, normed) = (heads.d, heads.qkv(), heads.h + heads.g);
    let oracle = move |i: &Inputs, _: &str, span: Range<usize>| -> Vec<Expected> {
        let (dy, x, rstd, q_w, k_w) = (i.of("dqkv"), i.of("x"), i.of("rstd"), i.of("q_w"), i.of("k_w"));
        let w = |at: usize| if is_query(at, heads) == Some(true) { q_w.at(at % d) } else { k_w.at(at % d) };
        // Of the products dy * w * x of a head: their mean, and that of their absolute values.
        let means = |start: usize| {
            let products = || (start..start + d).map(|at| dy.at(at) * w(at) * x.at(at));
            (products().sum::<f64>() / d as f64, products().map(f64::abs).sum::<f64>() / d as f64)
        };
        let (all, first) = (of_heads(&span, d, means), span.start / d);
        let element = |at: usize| {
            if is_query(at, heads).is_none() {
                return Expected::exact(dy.at(at));
            }
            let r = rstd.at(at / width * normed + at % width / d);
            let (mean, of_absolutes) = all[at / d - first];
            let (own, factor) = (r * dy.at(at) * w(at), r.powi(3) * x.at(at));
            Expected::rounded(own - factor * mean, Bf16, own.abs() + factor.abs() * of_absolutes)
        };
        span.map(element).collect()
    };
    Case {
        op: "head_norm_backward",
        model: m.name,
        shape: shape(t, heads),
        tokens: Some(t),
        args: vec![
            Arg::in_out("dqkv", Bf16, &[("T", t), ("(H+2G)*D", width)], Fill::Random(0.1), cost(4 * d, 6)),
            Arg::input("x", Bf16, &[("T", t), ("(H+2G)*D", width)], Fill::Random(1.0)),
            Arg::input("rstd", F32, &[("T", t), ("H+G", normed)], Fill::Random(1.0)),
            Arg::input("q_w", Bf16, &dims!(D = d), Fill::Random(1.0)),
            Arg::input("k_w", Bf16, &dims!(D = d), Fill::Random(1.0)),
        ],
        scalars: sizes(t, heads),
        // v stays where it is.
        work: Work::head_norm_backward(t, heads),
        oracle: Arc::new(oracle),
        #[cfg(feature = "cuda")]
        ways: vec![Way::own(move |cuda, set| {
            let [dqkv, x, rstd, q_w, k_w] = set.all();
            let (dqkv, x, rstd, q_w, k_w) = (dqkv.bf16_mut(), x.bf16(), rstd.f32(), q_w.bf16(), k_w.bf16());
            head_norm_backward(cuda, HeadNormBackward { dqkv, x, rstd, q_w, k_w, t, heads })
        })],
        cpu: Some(Arc::new(move |cpu: &mut Cpu, buffers: &mut [HostBuffer]| {
            use HostBuffer::F32;
            let [F32(dqkv), F32(x), F32(rstd), F32(q_w), F32(k_w)] = buffers else { undeclared() };
            cpu.head_norm_backward(crate::backend::HeadNormBackward { dqkv, x, rstd, q_w, k_w, t, heads })
        })),
    }
}

const FORWARD: &str = r"// launch: head_norm_forward grid=t,h+2*g block=64
{
  // One block a head of a token: query heads, then key heads, then value heads.
  const unsigned long long token = blockIdx.x, head = blockIdx.y;
  const unsigned long long start = (token * (h + 2 * g) + head) * d;
  if (head >= h + g) {
    for (unsigned long long i = threadIdx.x; i < d; i += blockDim.x) y[start + i] = x[start + i];
    return;
  }
  const __nv_bfloat16 *w = head < h ? q_w : k_w;
  __shared__ float partial[64];
  float sum = 0.0f;
  for (unsigned long long i = threadIdx.x; i < d; i += blockDim.x) {
    const float f = __bfloat162float(x[start + i]);
    sum += f * f;
  }
  partial[threadIdx.x] = sum;
  __syncthreads();
  for (unsigned n = blockDim.x / 2; n > 0; n /= 2) {
    if (threadIdx.x < n) partial[threadIdx.x] += partial[threadIdx.x + n];
    __syncthreads();
  }
  const float r = rsqrtf(partial[0] / d + eps);
  if (threadIdx.x == 0) rstd[token * (h + g) + head] = r;
  for (unsigned long long i = threadIdx.x; i < d; i += blockDim.x)
    y[start + i] = __float2bfloat16(r * __bfloat162float(x[start + i]) * __bfloat162float(w[i]));
}
";

const BACKWARD: &str = r"// launch: head_norm_backward grid=t,h+g block=64
{
  // One block a head of a token: query heads, then key heads.
  const unsigned long long token = blockIdx.x, head = blockIdx.y;
  const unsigned long long start = (token * (h + 2 * g) + head) * d;
  const __nv_bfloat16 *w = head < h ? q_w : k_w;
  __shared__ float partial[64];
  float sum = 0.0f;
  for (unsigned long long i = threadIdx.x; i < d; i += blockDim.x)
    sum += __bfloat162float(dqkv[start + i]) * __bfloat162float(w[i]) * __bfloat162float(x[start + i]);
  partial[threadIdx.x] = sum;
  __syncthreads();
  for (unsigned n = blockDim.x / 2; n > 0; n /= 2) {
    if (threadIdx.x < n) partial[threadIdx.x] += partial[threadIdx.x + n];
    __syncthreads();
  }
  const float r = rstd[token * (h + g) + head], mean = partial[0] / d;
  for (unsigned long long i = threadIdx.x; i < d; i += blockDim.x) {
    const float own = r * __bfloat162float(dqkv[start + i]) * __bfloat162float(w[i]);
    dqkv[start + i] = __float2bfloat16(own - r * r * r * __bfloat162float(x[start + i]) * mean);
  }
}
";
