//! swiglu_forward and swiglu_backward.

use std::ops::Range;
use std::sync::Arc;

use super::Op;
use crate::backend::cpu::Cpu;
#[cfg(feature = "cuda")]
use crate::backend::cuda::ops::swiglu::{SwigluBackward, SwigluForward, swiglu_backward, swiglu_forward};
use crate::backend::{Backend, Work};
use crate::bench::kernels::case::Element::Bf16;
#[cfg(feature = "cuda")]
use crate::bench::kernels::case::Way;
use crate::bench::kernels::case::{Arg, Case, Expected, Fill, HostBuffer, Scalar, undeclared};
use crate::bench::kernels::models::Model;
use crate::bench::kernels::values::Inputs;

/// Of an element: an exponential and a division among them.
const COST: usize = 16;
/// A fast exponential of |x| < 4 and a fast division may lose up to four times what [`Expected::rounded`] allows by itself.
const FAST: f64 = 4.0;

pub const OPS: &[Op] = &[
    Op {
        name: "swiglu_forward",
        about: "y = gate * up / (1 + e^-gate); a row of gate_up is gate, then up",
        cases: |m, t| vec![forward(m, t)],
        has_tokens: true,
        starter: Some(FORWARD),
    },
    Op {
        name: "swiglu_backward",
        about: "in place, s = 1 / (1 + e^-gate): gate <- dy * up * s * (1 + gate * (1 - s)), up <- dy * gate * s",
        cases: |m, t| vec![backward(m, t)],
        has_tokens: true,
        starter: Some(BACKWARD),
    },
];

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

fn forward(m: &Model, t: usize) -> Case {
    let f = m.f;
    let oracle = move |i: &Inputs, _: &str, span: Range<usize>| {
        let both = i.of("gate_up");
        let element = |at: usize| {
            let gate_at = at / f * 2 * f + at % f;
            let (gate, up) = (both.at(gate_at), both.at(gate_at + f));
            let value = gate * sigmoid(gate) * up;
            Expected::rounded(value, Bf16, FAST * value.abs())
        };
        span.map(element).collect()
    };
    Case {
        op: "swiglu_forward",
        model: m.name,
        shape: format!("{t}x{f}"),
        tokens: Some(t),
        args: vec![
            Arg::output("y", Bf16, &dims!(T = t, F = f), COST),
            Arg::input("gate_up", Bf16, &[("T", t), ("2F", 2 * f)], Fill::Random(2.0)),
        ],
        scalars: vec![("t", Scalar::U64(t as u64)), ("f", Scalar::U64(f as u64))],
        work: Work::swiglu_forward(t, f),
        oracle: Arc::new(oracle),
        #[cfg(feature = "cuda")]
        ways: vec![Way::own(move |cuda, set| {
            let [y, gate_up] = set.all();
            swiglu_forward(cuda, SwigluForward { y: y.bf16_mut(), gate_up: gate_up.bf16(), t, f })
        })],
        cpu: Some(Arc::new(move |cpu: &mut Cpu, buffers: &mut [HostBuffer]| {
            let [HostBuffer::F32(y), HostBuffer::F32(gate_up)] = buffers else { undeclared() };
            cpu.swiglu_forward(crate::backend::SwigluForward { y, gate_up, t, f })
        })),
    }
}

fn backward(m: &Model, t: usize) -> Case {
    let f = m.f;
    let oracle = move |i: &Inputs, _: &str, span: Range<usize>| {
        let (both, dy) = (i.of("gate_up"), i.of("dy"));
        let element = |at: usize| {
            let (row, column) = (at / (2 * f), at % (2 * f));
            let gate_at = row * 2 * f + column % f;
            let (gate, up, dy) = (both.at(gate_at), both.at(gate_at + f), dy.at(row * f + column % f));
            let s = sigmoid(gate);
            if column >= f {
                let value = dy * gate * s;
                return Expected::rounded(value, Bf16, FAST * value.abs());
            }
            let (factor, rest) = (dy * up * s, gate * (1.0 - s));
            Expected::rounded(factor * (1.0 + rest), Bf16, FAST * factor.abs() * (1.0 + rest.abs()))
        };
        span.map(element).collect()
    };
    Case {
        op: "swiglu_backward",
        model: m.name,
        shape: format!("{t}x{f}"),
        tokens: Some(t),
        args: vec![
            Arg::in_out("gate_up", Bf16, &[("T", t), ("2F", 2 * f)], Fill::Random(2.0), COST),
            Arg::input("dy", Bf16, &dims!(T = t, F = f), Fill::Random(0.1)),
        ],
        scalars: vec![("t", Scalar::U64(t as u64)), ("f", Scalar::U64(f as u64))],
        work: Work::swiglu_backward(t, f),
        oracle: Arc::new(oracle),
        #[cfg(feature = "cuda")]
        ways: vec![Way::own(move |cuda, set| {
            let [gate_up, dy] = set.all();
            swiglu_backward(cuda, SwigluBackward { gate_up: gate_up.bf16_mut(), dy: dy.bf16(), t, f })
        })],
        cpu: Some(Arc::new(move |cpu: &mut Cpu, buffers: &mut [HostBuffer]| {
            let [HostBuffer::F32(gate_up), HostBuffer::F32(dy)] = buffers else { undeclared() };
            cpu.swiglu_backward(crate::backend::SwigluBackward { gate_up, dy, t, f })
        })),
    }
}

const FORWARD: &str = r"// launch: swiglu_forward grid=ceil_div(t*f,256) block=256
{
  // A thread an element of y.
  const unsigned long long n = blockIdx.x * 256ull + threadIdx.x;
  if (n >= t * f) return;
  const unsigned long long at = n / f * 2 * f + n % f;
  const float gate = __bfloat162float(gate_up[at]), up = __bfloat162float(gate_up[at + f]);
  y[n] = __float2bfloat16(gate / (1.0f + expf(-gate)) * up);
}
";

const BACKWARD: &str = r"// launch: swiglu_backward grid=ceil_div(t*f,256) block=256
{
  // A thread an element of dy, and so a pair of gate and up.
  const unsigned long long n = blockIdx.x * 256ull + threadIdx.x;
  if (n >= t * f) return;
  const unsigned long long at = n / f * 2 * f + n % f;
  const float gate = __bfloat162float(gate_up[at]), up = __bfloat162float(gate_up[at + f]);
  const float d = __bfloat162float(dy[n]), s = 1.0f / (1.0f + expf(-gate));
  gate_up[at] = __float2bfloat16(d * up * s * (1.0f + gate * (1.0f - s)));
  gate_up[at + f] = __float2bfloat16(d * gate * s);
}
";
