//! rmsnorm_forward, alone and with the residual added first, and rmsnorm_backward.

use std::ops::Range;
use std::sync::Arc;

use super::Op;
use crate::backend::cpu::Cpu;
#[cfg(feature = "cuda")]
use crate::backend::cuda::ops::rmsnorm::{RmsNormBackward, RmsNormForward, rmsnorm_backward, rmsnorm_forward};
use crate::backend::{Backend, Work};
use crate::bench::kernels::case::Element::{Bf16, F32};
#[cfg(feature = "cuda")]
use crate::bench::kernels::case::Way;
use crate::bench::kernels::case::{Arg, Case, Expected, Fill, HostBuffer, Scalar, undeclared};
use crate::bench::kernels::models::Model;
use crate::bench::kernels::values::Inputs;

const EPS: f32 = 1e-5;

pub const OPS: &[Op] = &[
    Op {
        name: "rmsnorm_forward",
        about: "rstd = 1 / sqrt(mean_c(x^2) + eps), y = rstd * x * w",
        cases: |m, t| vec![forward(m, t)],
        has_tokens: true,
        starter: Some(FORWARD),
    },
    Op {
        name: "rmsnorm_forward_residual",
        about: "s = x + delta, rounded to bf16; rstd = 1 / sqrt(mean_c(s^2) + eps), y = rstd * s * w",
        cases: |m, t| vec![residual(m, t)],
        has_tokens: true,
        starter: Some(RESIDUAL),
    },
    Op {
        name: "rmsnorm_backward",
        about: "dx += rstd * dy * w - rstd^3 * x * mean_c(dy * w * x)",
        cases: |m, t| vec![backward(m, t)],
        has_tokens: true,
        starter: Some(BACKWARD),
    },
];

/// 1 / sqrt(mean + eps) of a row.
fn rstd(row: &[f64], eps: f64) -> f64 {
    1.0 / (row.iter().map(|v| v * v).sum::<f64>() / row.len() as f64 + eps).sqrt()
}

fn forward(m: &Model, t: usize) -> Case {
    let c = m.c;
    let oracle = move |i: &Inputs, output: &str, span: Range<usize>| {
        let (x, w, eps) = (i.of("x"), i.of("w"), i.scalar("eps"));
        let row = |t: usize| (0..c).map(|j| x.at(t * c + j)).collect::<Vec<_>>();
        if output == "rstd" {
            return span.map(|t| Expected::rounded(rstd(&row(t), eps), F32, 1.0)).collect();
        }
        let row = row(span.start / c);
        let r = rstd(&row, eps);
        let value = |at: usize| r * row[at % c] * w.at(at % c);
        span.map(|at| Expected::rounded(value(at), Bf16, value(at).abs())).collect()
    };
    Case {
        op: "rmsnorm_forward",
        model: m.name,
        shape: format!("{t}x{c}"),
        tokens: Some(t),
        args: vec![
            Arg::output("y", Bf16, &dims!(T = t, C = c), 3),
            Arg::output("rstd", F32, &dims!(T = t), c),
            Arg::input("x", Bf16, &dims!(T = t, C = c), Fill::Random(1.0)),
            Arg::input("w", Bf16, &dims!(C = c), Fill::Random(1.0)),
        ],
        scalars: vec![("t", Scalar::U64(t as u64)), ("c", Scalar::U64(c as u64)), ("eps", Scalar::F32(EPS))],
        work: Work::rmsnorm_forward(t, c, false),
        oracle: Arc::new(oracle),
        #[cfg(feature = "cuda")]
        ways: vec![Way::own(move |cuda, set| {
            let [y, rstd, x, w] = set.all();
            let (y, rstd) = (y.bf16_mut(), rstd.f32_mut());
            rmsnorm_forward(cuda, RmsNormForward { y, rstd, x: x.bf16(), residual: None, w: w.bf16(), t, c, eps: EPS })
        })],
        cpu: Some(Arc::new(move |cpu: &mut Cpu, buffers: &mut [HostBuffer]| {
            let [HostBuffer::F32(y), HostBuffer::F32(rstd), HostBuffer::F32(x), HostBuffer::F32(w)] = buffers else {
                undeclared();
            };
            let op = crate::backend::RmsNormForward { y, rstd, x, residual: None, w, t, c, eps: EPS };
            cpu.rmsnorm_forward(op)
        })),
    }
}

fn residual(m: &Model, t: usize) -> Case {
    let c = m.c;
    let oracle = move |i: &Inputs, output: &str, span: Range<usize>| {
        let (x, delta, w, eps) = (i.of("x"), i.of("delta"), i.of("w"), i.scalar("eps"));
        let sum = |at: usize| f64::from(half::bf16::from_f64(x.at(at) + delta.at(at)).to_f32());
        let row = |t: usize| (0..c).map(|j| sum(t * c + j)).collect::<Vec<_>>();
        match output {
            "rstd" => span.map(|t| Expected::rounded(rstd(&row(t), eps), F32, 1.0)).collect(),
            "s" => span.map(|at| Expected::exact(sum(at))).collect(),
            _ => {
                let row = row(span.start / c);
                let r = rstd(&row, eps);
                let value = |at: usize| r * row[at % c] * w.at(at % c);
                span.map(|at| Expected::rounded(value(at), Bf16, value(at).abs())).collect()
            }
        }
    };
    Case {
        op: "rmsnorm_forward_residual",
        model: m.name,
        shape: format!("{t}x{c}"),
        tokens: Some(t),
        args: vec![
            Arg::output("y", Bf16, &dims!(T = t, C = c), 3),
            Arg::output("rstd", F32, &dims!(T = t), c),
            Arg::output("s", Bf16, &dims!(T = t, C = c), 1),
            Arg::input("x", Bf16, &dims!(T = t, C = c), Fill::Random(1.0)),
            Arg::input("delta", Bf16, &dims!(T = t, C = c), Fill::Random(0.1)),
            Arg::input("w", Bf16, &dims!(C = c), Fill::Random(1.0)),
        ],
        scalars: vec![("t", Scalar::U64(t as u64)), ("c", Scalar::U64(c as u64)), ("eps", Scalar::F32(EPS))],
        work: Work::rmsnorm_forward(t, c, true),
        oracle: Arc::new(oracle),
        #[cfg(feature = "cuda")]
        ways: vec![Way::own(move |cuda, set| {
            let [y, rstd, s, x, delta, w] = set.all();
            let (y, rstd, residual) = (y.bf16_mut(), rstd.f32_mut(), Some((delta.bf16(), s.bf16_mut())));
            rmsnorm_forward(cuda, RmsNormForward { y, rstd, x: x.bf16(), residual, w: w.bf16(), t, c, eps: EPS })
        })],
        // Its sum is not rounded there.
        cpu: None,
    }
}

fn backward(m: &Model, t: usize) -> Case {
    let c = m.c;
    let oracle = move |i: &Inputs, _: &str, span: Range<usize>| {
        let (dx, dy, x, w, rstd) = (i.of("dx"), i.of("dy"), i.of("x"), i.of("w"), i.of("rstd"));
        let row = span.start / c;
        let products = (0..c).map(|j| dy.at(row * c + j) * w.at(j) * x.at(row * c + j));
        let (mean, r) = (products.sum::<f64>() / c as f64, rstd.at(row));
        let element = |at: usize| {
            let terms = [dx.at(at), r * dy.at(at) * w.at(at % c), -r.powi(3) * x.at(at) * mean];
            let (value, magnitude) = (terms.iter().sum(), terms.iter().map(|v| v.abs()).sum());
            Expected::rounded(value, Bf16, magnitude)
        };
        span.map(element).collect()
    };
    Case {
        op: "rmsnorm_backward",
        model: m.name,
        shape: format!("{t}x{c}"),
        tokens: Some(t),
        args: vec![
            Arg::in_out("dx", Bf16, &dims!(T = t, C = c), Fill::Random(0.1), 6),
            Arg::input("dy", Bf16, &dims!(T = t, C = c), Fill::Random(0.1)),
            Arg::input("x", Bf16, &dims!(T = t, C = c), Fill::Random(1.0)),
            Arg::input("w", Bf16, &dims!(C = c), Fill::Random(1.0)),
            Arg::input("rstd", F32, &dims!(T = t), Fill::Random(1.0)),
        ],
        scalars: vec![("t", Scalar::U64(t as u64)), ("c", Scalar::U64(c as u64))],
        work: Work::rmsnorm_backward(t, c),
        oracle: Arc::new(oracle),
        #[cfg(feature = "cuda")]
        ways: vec![Way::own(move |cuda, set| {
            let [dx, dy, x, w, rstd] = set.all();
            let (dx, dy, x, w, rstd) = (dx.bf16_mut(), dy.bf16(), x.bf16(), w.bf16(), rstd.f32());
            rmsnorm_backward(cuda, RmsNormBackward { dx, dy, x, w, rstd, t, c })
        })],
        cpu: Some(Arc::new(move |cpu: &mut Cpu, buffers: &mut [HostBuffer]| {
            use HostBuffer::F32;
            let [F32(dx), F32(dy), F32(x), F32(w), F32(rstd)] = buffers else { undeclared() };
            cpu.rmsnorm_backward(crate::backend::RmsNormBackward { dx, dy, x, w, rstd, t, c })
        })),
    }
}

const FORWARD: &str = r"// launch: rmsnorm_forward grid=t block=256
{
  // One block a row.
  const unsigned long long row = blockIdx.x;
  __shared__ float partial[256];
  float sum = 0.0f;
  for (unsigned long long i = threadIdx.x; i < c; i += blockDim.x) {
    const float v = __bfloat162float(x[row * c + i]);
    sum += v * v;
  }
  partial[threadIdx.x] = sum;
  __syncthreads();
  for (unsigned n = blockDim.x / 2; n > 0; n /= 2) {
    if (threadIdx.x < n) partial[threadIdx.x] += partial[threadIdx.x + n];
    __syncthreads();
  }
  const float r = rsqrtf(partial[0] / c + eps);
  if (threadIdx.x == 0) rstd[row] = r;
  for (unsigned long long i = threadIdx.x; i < c; i += blockDim.x)
    y[row * c + i] = __float2bfloat16(r * __bfloat162float(x[row * c + i]) * __bfloat162float(w[i]));
}
";

const RESIDUAL: &str = r"// launch: rmsnorm_forward_residual grid=t block=256
{
  // One block a row.
  const unsigned long long row = blockIdx.x;
  __shared__ float partial[256];
  float sum = 0.0f;
  for (unsigned long long i = threadIdx.x; i < c; i += blockDim.x) {
    const unsigned long long at = row * c + i;
    s[at] = __float2bfloat16(__bfloat162float(x[at]) + __bfloat162float(delta[at]));
    const float v = __bfloat162float(s[at]);
    sum += v * v;
  }
  partial[threadIdx.x] = sum;
  __syncthreads();
  for (unsigned n = blockDim.x / 2; n > 0; n /= 2) {
    if (threadIdx.x < n) partial[threadIdx.x] += partial[threadIdx.x + n];
    __syncthreads();
  }
  const float r = rsqrtf(partial[0] / c + eps);
  if (threadIdx.x == 0) rstd[row] = r;
  for (unsigned long long i = threadIdx.x; i < c; i += blockDim.x)
    y[row * c + i] = __float2bfloat16(r * __bfloat162float(s[row * c + i]) * __bfloat162float(w[i]));
}
";

const BACKWARD: &str = r"// launch: rmsnorm_backward grid=t block=256
{
  // One block a row.
  const unsigned long long row = blockIdx.x;
  __shared__ float partial[256];
  float sum = 0.0f;
  for (unsigned long long i = threadIdx.x; i < c; i += blockDim.x) {
    const unsigned long long at = row * c + i;
    sum += __bfloat162float(dy[at]) * __bfloat162float(w[i]) * __bfloat162float(x[at]);
  }
  partial[threadIdx.x] = sum;
  __syncthreads();
  for (unsigned n = blockDim.x / 2; n > 0; n /= 2) {
    if (threadIdx.x < n) partial[threadIdx.x] += partial[threadIdx.x + n];
    __syncthreads();
  }
  const float r = rstd[row], mean = partial[0] / c;
  for (unsigned long long i = threadIdx.x; i < c; i += blockDim.x) {
    const unsigned long long at = row * c + i;
    const float d = r * __bfloat162float(dy[at]) * __bfloat162float(w[i]);
    dx[at] = __float2bfloat16(__bfloat162float(dx[at]) + d - r * r * r * __bfloat162float(x[at]) * mean);
  }
}
";
