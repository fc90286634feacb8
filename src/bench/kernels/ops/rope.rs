//! rope_forward and rope_backward, in place.

use std::ops::Range;
use std::sync::Arc;

use super::Op;
use crate::backend::cpu::Cpu;
#[cfg(feature = "cuda")]
use crate::backend::cuda::ops::rope::{Rope, rope_backward, rope_forward};
use crate::backend::{Backend, Work};
use crate::bench::kernels::case::Element::{Bf16, F32, I32};
#[cfg(feature = "cuda")]
use crate::bench::kernels::case::Way;
use crate::bench::kernels::case::{Arg, Case, Expected, Fill, HostBuffer, Scalar, undeclared};
use crate::bench::kernels::models::Model;
use crate::bench::kernels::values::Inputs;

pub const OPS: &[Op] = &[
    Op {
        name: "rope_forward",
        about: "of each query and key head, a = positions[t] * inv_freq[i] in f32, in place: \
                (x_i, x_{i+d/2}) <- (x_i cos a - x_{i+d/2} sin a, x_{i+d/2} cos a + x_i sin a)",
        cases: |m, t| vec![case(m, t, "rope_forward", 1.0)],
        has_tokens: true,
        starter: Some(FORWARD),
    },
    Op {
        name: "rope_backward",
        about: "rope_forward by the negative angles",
        cases: |m, t| vec![case(m, t, "rope_backward", -1.0)],
        has_tokens: true,
        starter: Some(BACKWARD),
    },
];

/// `sign` 1 turns forward, -1 back.
fn case(m: &Model, t: usize, op: &'static str, sign: f64) -> Case {
    let heads = m.heads;
    let (d, half, width, turned) = (heads.d, heads.d / 2, heads.qkv(), heads.h + heads.g);
    let oracle = move |i: &Inputs, _: &str, span: Range<usize>| {
        let (qkv, positions, inv_freq) = (i.of("qkv"), i.of("positions"), i.of("inv_freq"));
        let element = |at: usize| {
            let own = qkv.at(at);
            if at % width >= turned * d {
                return Expected::exact(own);
            }
            let place = at % width % d;
            let angle = positions.at(at / width) as f32 * inv_freq.at(place % half) as f32;
            let (sin, cos) = f64::from(angle).sin_cos();
            let other = if place < half { -qkv.at(at + half) } else { qkv.at(at - half) };
            Expected::rounded(own * cos + other * sign * sin, Bf16, own.abs() + other.abs())
        };
        span.map(element).collect()
    };
    let frequencies = (0..half).map(|i| 1e4f32.powf(-2.0 * i as f32 / d as f32)).collect();
    let sizes = [("t", t), ("h", heads.h), ("g", heads.g), ("d", d)];
    Case {
        op,
        model: m.name,
        shape: format!("{t} heads {}:{}:{d}", heads.h, heads.g),
        tokens: Some(t),
        args: vec![
            // 16: a sine and a cosine.
            Arg::in_out("qkv", Bf16, &[("T", t), ("(H+2G)*D", width)], Fill::Random(1.0), 16),
            Arg::input("positions", I32, &dims!(T = t), Fill::List((0..t).map(|i| i as f32).collect())),
            Arg::input("inv_freq", F32, &[("D/2", half)], Fill::List(frequencies)),
        ],
        scalars: sizes.map(|(name, n)| (name, Scalar::U64(n as u64))).to_vec(),
        work: Work::rope(t, heads),
        oracle: Arc::new(oracle),
        #[cfg(feature = "cuda")]
        ways: vec![Way::own(move |cuda, set| {
            let [qkv, positions, inv_freq] = set.all();
            let (qkv, positions, inv_freq) = (qkv.bf16_mut(), positions.i32(), inv_freq.f32());
            let op = Rope { qkv, positions, inv_freq, t, heads };
            if sign > 0.0 { rope_forward(cuda, op) } else { rope_backward(cuda, op) }
        })],
        cpu: Some(Arc::new(move |cpu: &mut Cpu, buffers: &mut [HostBuffer]| {
            let [HostBuffer::F32(qkv), HostBuffer::I32(positions), HostBuffer::F32(inv_freq)] = buffers else {
                undeclared();
            };
            let op = crate::backend::Rope { qkv, positions, inv_freq, t, heads };
            if sign > 0.0 { cpu.rope_forward(op) } else { cpu.rope_backward(op) }
        })),
    }
}

const FORWARD: &str = r"// launch: rope_forward grid=t,h+g block=d/2
{
  // One block a head of a token, a thread a pair.
  const unsigned long long token = blockIdx.x, head = blockIdx.y, i = threadIdx.x;
  const unsigned long long at = (token * (h + 2 * g) + head) * d + i, pair = at + d / 2;
  float sine, cosine;
  sincosf(__fmul_rn(float(positions[token]), inv_freq[i]), &sine, &cosine);
  const float a = __bfloat162float(qkv[at]), b = __bfloat162float(qkv[pair]);
  qkv[at] = __float2bfloat16(a * cosine - b * sine);
  qkv[pair] = __float2bfloat16(b * cosine + a * sine);
}
";

const BACKWARD: &str = r"// launch: rope_backward grid=t,h+g block=d/2
{
  // One block a head of a token, a thread a pair.
  const unsigned long long token = blockIdx.x, head = blockIdx.y, i = threadIdx.x;
  const unsigned long long at = (token * (h + 2 * g) + head) * d + i, pair = at + d / 2;
  float sine, cosine;
  sincosf(__fmul_rn(float(positions[token]), inv_freq[i]), &sine, &cosine);
  const float a = __bfloat162float(qkv[at]), b = __bfloat162float(qkv[pair]);
  qkv[at] = __float2bfloat16(a * cosine + b * sine);
  qkv[pair] = __float2bfloat16(b * cosine - a * sine);
}
";
