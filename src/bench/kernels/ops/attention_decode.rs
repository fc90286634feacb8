//! attention_decode: one new token over a cache.

use std::ops::Range;
use std::sync::Arc;

use super::Op;
use super::attention::Softmax;
use super::sums::row;
use crate::backend::cpu::Cpu;
#[cfg(feature = "cuda")]
use crate::backend::cuda::ops::decode::{AttentionDecode, attention_decode};
use crate::backend::workspace::attention_decode_scratch;
use crate::backend::{Backend, Heads, KvCache, Work};
use crate::bench::kernels::case::Element::{Bf16, F32, I32};
#[cfg(feature = "cuda")]
use crate::bench::kernels::case::Way;
use crate::bench::kernels::case::{Arg, Case, Expected, Fill, HostBuffer, Scalar, undeclared};
use crate::bench::kernels::models::Model;
use crate::bench::kernels::values::Inputs;

/// Keys that the token sees, its own among them.
const PASTS: [usize; 3] = [512, 2048, 8192];

pub const OPS: &[Op] = &[Op {
    name: "attention_decode",
    about: "k[p] = the new key, v[p] = the new value, p = positions[0]; o = softmax(scale * q k^T) v over the keys up to p",
    // One new token: the counts of the table are those of the cache.
    cases: |m, t| if t == 1 { PASTS.map(|past| decode(m, past)).into() } else { vec![] },
    has_tokens: true,
    starter: Some(STARTER),
}];

fn decode(m: &Model, past: usize) -> Case {
    let heads = m.heads;
    let Heads { h, g, d, .. } = heads;
    let last = past - 1;
    let oracle = move |i: &Inputs, output: &str, span: Range<usize>| {
        let qkv = i.of("qkv");
        if output != "o" {
            let (cache, new) = (i.of(output), if output == "k" { h * d } else { (h + g) * d });
            let value = |at: usize| if at / (g * d) == last { qkv.at(new + at % (g * d)) } else { cache.at(at) };
            return span.map(|at| Expected::exact(value(at))).collect();
        }
        let head = span.start / d;
        let (kv, k, v) = (head / (h / g), i.of("k"), i.of("v"));
        let key = |j: usize| if j == last { row(qkv, (h + kv) * d, d) } else { row(k, (j * g + kv) * d, d) };
        let softmax = Softmax::new(&row(qkv, head * d, d), i.scalar("scale"), (0..past).map(key));
        let value = |j: usize, e: usize| {
            if j == last { qkv.at((h + g + kv) * d + e) } else { v.at((j * g + kv) * d + e) }
        };
        span.map(|at| softmax.o(|j| value(j, at % d))).collect()
    };
    let sizes = [("capacity", past), ("h", h), ("g", g), ("d", d)];
    let sizes = sizes.into_iter().map(|(name, size)| (name, Scalar::U64(size as u64)));
    Case {
        op: "attention_decode",
        model: m.name,
        shape: format!("1 over {past} heads {h}:{g}:{d}"),
        tokens: Some(past),
        args: vec![
            Arg::output("o", Bf16, &dims!(H = h, D = d), past * (d / 32 + 1)),
            Arg::in_out("k", Bf16, &dims!(S = past, G = g, D = d), Fill::Random(1.0), 1),
            Arg::in_out("v", Bf16, &dims!(S = past, G = g, D = d), Fill::Random(1.0), 1),
            Arg::input("qkv", Bf16, &dims!(N = h + 2 * g, D = d), Fill::Random(1.0)),
            Arg::input("positions", I32, &dims!(T = 1), Fill::Const(last as f32)),
            Arg::scratch("scratch", F32, attention_decode_scratch(1, heads)),
        ],
        scalars: sizes.chain([("scale", Scalar::F32(heads.scale()))]).collect(),
        work: Work::attention_decode(1, last, heads),
        oracle: Arc::new(oracle),
        #[cfg(feature = "cuda")]
        ways: vec![Way::own(move |cuda, set| {
            let [o, k, v, qkv, positions, scratch] = set.all();
            let op = AttentionDecode {
                o: o.bf16_mut(),
                k: k.bf16_mut(),
                v: v.bf16_mut(),
                qkv: qkv.bf16(),
                positions: positions.i32(),
                t: 1,
                capacity: past,
                heads,
                scratch: scratch.f32_mut(),
            };
            attention_decode(cuda, op)
        })],
        cpu: Some(Arc::new(move |cpu: &mut Cpu, buffers: &mut [HostBuffer]| {
            let [HostBuffer::F32(o), HostBuffer::F32(k), HostBuffer::F32(v), HostBuffer::F32(qkv), rest @ ..] = buffers
            else {
                undeclared();
            };
            let Some(HostBuffer::I32(positions)) = rest.first() else { undeclared() };
            let mut cache = KvCache { k: std::mem::take(k), v: std::mem::take(v) };
            let op = crate::backend::AttentionDecode { o, cache: &mut cache, qkv, positions, t: 1, past: last, heads };
            let done = cpu.attention_decode(op);
            (*k, *v) = (cache.k, cache.v);
            done
        })),
    }
}

const STARTER: &str = r"// launch: attention_decode grid=h block=256
{
  // One block a head, d <= 256: the scores of 256 keys at a time, then a thread a column of o. The new row comes from
  // qkv: another block may not have appended it yet.
  const unsigned long long head = blockIdx.x, group = h / g, kv = head / group, width = g * d;
  const unsigned long long last = positions[0];
  const __nv_bfloat16 *new_k = qkv + (h + kv) * d, *new_v = qkv + (h + g + kv) * d;
  if (head % group == 0 && threadIdx.x < d && last < capacity) {
    k[last * width + kv * d + threadIdx.x] = new_k[threadIdx.x];
    v[last * width + kv * d + threadIdx.x] = new_v[threadIdx.x];
  }
  __shared__ float score[256];
  float top = -1e30f, sum = 0.0f, out = 0.0f;
  for (unsigned long long first = 0; first <= last; first += 256) {
    const unsigned long long key = first + threadIdx.x;
    const __nv_bfloat16 *row = key == last ? new_k : k + key * width + kv * d;
    float s = 0.0f;
    if (key <= last)
      for (unsigned long long e = 0; e < d; ++e) s += __bfloat162float(qkv[head * d + e]) * __bfloat162float(row[e]);
    __syncthreads();
    score[threadIdx.x] = s * scale;
    __syncthreads();
    const unsigned count = last + 1 - first < 256 ? (unsigned)(last + 1 - first) : 256u;
    float now = top;
    for (unsigned j = 0; j < count; ++j) now = fmaxf(now, score[j]);
    sum *= expf(top - now);
    out *= expf(top - now);
    top = now;
    for (unsigned j = 0; j < count; ++j) {
      const float p = expf(score[j] - now);
      sum += p;
      const __nv_bfloat16 *value = first + j == last ? new_v : v + (first + j) * width + kv * d;
      if (threadIdx.x < d) out += p * __bfloat162float(value[threadIdx.x]);
    }
  }
  if (threadIdx.x < d) o[head * d + threadIdx.x] = __float2bfloat16(out / sum);
}
";
