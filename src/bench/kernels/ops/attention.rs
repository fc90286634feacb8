//! attention_forward and attention_backward, causal: over one sequence, and over several of 2048 tokens end to end.

use std::ops::Range;
use std::sync::Arc;

use super::Op;
use super::sums::{Terms, dot, row};
use crate::backend::cpu::Cpu;
#[cfg(feature = "cuda")]
use crate::backend::cuda::ops::attention::{
    AttentionBackward, AttentionForward, attention_backward, attention_forward,
};
use crate::backend::{Backend, Batch, Heads, Work};
use crate::bench::kernels::case::Element::{Bf16, F32, I32};
#[cfg(feature = "cuda")]
use crate::bench::kernels::case::Way;
use crate::bench::kernels::case::{Arg, Case, Expected, Fill, HostBuffer, Scalar, undeclared};
use crate::bench::kernels::models::Model;
use crate::bench::kernels::values::Inputs;
use crate::error::Result;

pub const OPS: &[Op] = &[
    Op {
        name: "attention_forward",
        about: "o = softmax(scale * q k^T) v, causal in each sequence; lse = log(sum_j exp(scale * q k_j))",
        cases: |m, t| lengths(m, t).map(|len| forward(m, t, len)).collect(),
        has_tokens: true,
        starter: Some(FORWARD),
    },
    Op {
        name: "attention_backward",
        about: "p = exp(scale * q k^T - lse), ds = p * (d_o v^T - sum_d(d_o * o)): \
                dq = scale * ds k, dk = scale * ds^T q, dv = p^T d_o",
        cases: |m, t| lengths(m, t).map(|len| backward(m, t, len)).collect(),
        has_tokens: true,
        starter: Some(BACKWARD),
    },
];

/// Length of the sequences that `t` tokens are cut into: not at all, and where there are many, into several as packing
/// does. The toy packs sooner, so that tests see it.
fn lengths(m: &Model, t: usize) -> impl Iterator<Item = usize> {
    let packed = if m.name == "toy" { 16 } else { 2048 };
    [t, packed].into_iter().take(if t > packed && t.is_multiple_of(packed) { 2 } else { 1 })
}

/// Tokens, the length of their sequences, heads.
#[derive(Clone, Copy)]
struct Shape {
    t: usize,
    len: usize,
    heads: Heads,
}

impl Shape {
    fn b(&self) -> usize {
        self.t / self.len
    }

    fn name(&self) -> String {
        let Heads { h, g, d, .. } = self.heads;
        format!("{}x{} heads {h}:{g}:{d} causal", self.b(), self.len)
    }

    /// Heads of q, k and v together.
    fn parts(&self) -> usize {
        self.heads.h + 2 * self.heads.g
    }

    /// Head number `part` of q|k|v begins here in a token's row.
    fn at(&self, token: usize, part: usize) -> usize {
        (token * self.parts() + part) * self.heads.d
    }

    /// Head number `head` begins here in a row of o.
    fn at_o(&self, token: usize, head: usize) -> usize {
        (token * self.heads.h + head) * self.heads.d
    }

    fn kv(&self, head: usize) -> usize {
        head / (self.heads.h / self.heads.g)
    }

    /// First token of the token's sequence.
    fn start(&self, token: usize) -> usize {
        token / self.len * self.len
    }

    fn starts(&self) -> Fill {
        Fill::List((0..=self.b()).map(|i| (i * self.len) as f32).collect())
    }

    fn lengths(&self) -> Vec<usize> {
        vec![self.len; self.b()]
    }

    fn scalars(&self) -> Vec<(&'static str, Scalar)> {
        let Heads { h, g, d, .. } = self.heads;
        let sizes = [("t", self.t), ("b", self.b()), ("h", h), ("g", g), ("d", d)];
        let sizes = sizes.into_iter().map(|(name, size)| (name, Scalar::U64(size as u64)));
        sizes.chain([("scale", Scalar::F32(self.heads.scale()))]).collect()
    }

    /// What the CPU's op reads of a batch.
    fn batch(&self, cpu: &mut Cpu, cu_seqlens: &[i32]) -> Result<Batch<Cpu>> {
        let mut batch = Batch::new(cpu, 0)?;
        batch.cu_seqlens = cu_seqlens.to_vec();
        (batch.t, batch.b, batch.lengths) = (self.t, self.b(), self.lengths());
        Ok(batch)
    }
}

/// One query's softmax over its keys.
pub struct Softmax {
    p: Vec<f64>,
    pub lse: f64,
    /// The largest sum of absolute values in a score.
    pub magnitude: f64,
}

impl Softmax {
    pub fn new(q: &[f64], scale: f64, keys: impl Iterator<Item = Vec<f64>>) -> Self {
        let (mut magnitude, mut p) = (0f64, vec![]);
        for key in keys {
            let (score, size) = dot(q, &key);
            magnitude = magnitude.max(scale * size);
            p.push(scale * score);
        }
        let top = p.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = p.iter().map(|s| (s - top).exp()).sum();
        p.iter_mut().for_each(|s| *s = (*s - top).exp() / sum);
        Self { p, lse: top + sum.ln(), magnitude }
    }

    /// An element of o: `v` gives that column of value number j. p is rounded to bf16 before this product.
    pub fn o(&self, v: impl Fn(usize) -> f64) -> Expected {
        let terms: Terms = self.p.iter().enumerate().map(|(j, p)| p * v(j)).collect();
        Expected::rounded(terms.sum, Bf16, terms.magnitude * (1.0 + self.magnitude)).with_error(terms.error(1.0))
    }
}

fn forward(m: &Model, t: usize, len: usize) -> Case {
    let heads = m.heads;
    let Heads { h, d, .. } = heads;
    let shape = Shape { t, len, heads };
    let oracle = move |i: &Inputs, output: &str, span: Range<usize>| {
        let (qkv, scale) = (i.of("qkv"), i.scalar("scale"));
        let softmax = |token: usize, head: usize| {
            let key = |j: usize| row(qkv, shape.at(j, h + shape.kv(head)), d);
            Softmax::new(&row(qkv, shape.at(token, head), d), scale, (shape.start(token)..=token).map(key))
        };
        if output == "lse" {
            return span
                .map(|at| softmax(at % t, at / t))
                .map(|s| Expected::rounded(s.lse, F32, s.lse.abs() + s.magnitude))
                .collect();
        }
        let (token, head) = (span.start / d / h, span.start / d % h);
        let (softmax, start) = (softmax(token, head), shape.start(token));
        let v = |j: usize, at: usize| qkv.at(shape.at(start + j, h + heads.g + shape.kv(head)) + at % d);
        span.map(|at| softmax.o(|j| v(j, at))).collect()
    };
    Case {
        op: "attention_forward",
        model: m.name,
        shape: shape.name(),
        tokens: Some(t),
        args: vec![
            // Rows are half as long as the longest, in the mean; a span shares the scores.
            Arg::output("o", Bf16, &dims!(T = t, H = h, D = d), (len * (d / 32 + 1)).div_ceil(2)),
            Arg::output("lse", F32, &dims!(H = h, T = t), (len * d).div_ceil(2)),
            Arg::input("qkv", Bf16, &dims!(T = t, N = shape.parts(), D = d), Fill::Random(1.0)),
            Arg::input("cu_seqlens", I32, &dims!(B = shape.b() + 1), shape.starts()),
        ],
        scalars: shape.scalars(),
        work: Work::attention_forward(&shape.lengths(), heads),
        oracle: Arc::new(oracle),
        #[cfg(feature = "cuda")]
        ways: Way::own(move |cuda, set| {
            let [o, lse, qkv, cu_seqlens] = set.all();
            let (o, lse, qkv, cu_seqlens) = (o.bf16_mut(), lse.f32_mut(), qkv.bf16(), cu_seqlens.i32());
            attention_forward(cuda, AttentionForward { o, lse, qkv, cu_seqlens, t, b: shape.b(), heads })
        })
        .both(),
        cpu: Some(Arc::new(move |cpu: &mut Cpu, buffers: &mut [HostBuffer]| {
            let [HostBuffer::F32(o), HostBuffer::F32(lse), HostBuffer::F32(qkv), HostBuffer::I32(starts)] = buffers
            else {
                undeclared();
            };
            let batch = &shape.batch(cpu, starts)?;
            cpu.attention_forward(crate::backend::AttentionForward { o, lse, qkv, batch, heads })
        })),
    }
}

/// What backward reads of a query's row.
struct Query {
    q: Vec<f64>,
    d_o: Vec<f64>,
    /// sum_d(d_o * o), and of the absolute values.
    delta: (f64, f64),
    lse: f64,
}

/// One query and one key: p and ds, each with what f32 arithmetic is relative to.
struct Pair {
    p: (f64, f64),
    ds: (f64, f64),
}

impl Query {
    fn new(i: &Inputs, shape: Shape, token: usize, head: usize) -> Self {
        let (d, at) = (shape.heads.d, shape.at_o(token, head));
        let (q, d_o) = (row(i.of("qkv"), shape.at(token, head), d), row(i.of("d_o"), at, d));
        let delta = dot(&d_o, &row(i.of("o"), at, d));
        Self { q, d_o, delta, lse: i.of("lse").at(head * shape.t + token) }
    }

    fn with(&self, k: &[f64], v: &[f64], scale: f64) -> Pair {
        let ((score, size), (dp, dp_size)) = (dot(&self.q, k), dot(&self.d_o, v));
        let (p, of_dp) = ((scale * score - self.lse).exp(), dp - self.delta.0);
        let p_size = p * (1.0 + scale * size + self.lse.abs());
        Pair { p: (p, p_size), ds: (p * of_dp, p_size * of_dp.abs() + p * (dp_size + self.delta.1)) }
    }
}

fn backward(m: &Model, t: usize, len: usize) -> Case {
    let heads = m.heads;
    let Heads { h, g, d, .. } = heads;
    let shape = Shape { t, len, heads };
    let parts = shape.parts();
    let oracle = move |i: &Inputs, _: &str, span: Range<usize>| {
        let (qkv, scale) = (i.of("qkv"), i.scalar("scale"));
        let (token, part) = (span.start / d / parts, span.start / d % parts);
        let start = shape.start(token);
        let k_and_v = |j: usize, kv: usize| (row(qkv, shape.at(j, h + kv), d), row(qkv, shape.at(j, h + g + kv), d));
        // Factor of each row that the sum goes over, what it is relative to, and where the row begins.
        let mut rows: Vec<((f64, f64), usize)> = vec![];
        if part < h {
            let query = Query::new(i, shape, token, part);
            for j in start..=token {
                let (k, v) = k_and_v(j, shape.kv(part));
                rows.push((query.with(&k, &v, scale).ds, shape.at(j, h + shape.kv(part))));
            }
        } else {
            let kv = (part - h) % g;
            let (k, v) = k_and_v(token, kv);
            for (head, query) in
                (kv * (h / g)..(kv + 1) * (h / g)).flat_map(|n| (token..start + len).map(move |q| (n, q)))
            {
                let pair = Query::new(i, shape, query, head).with(&k, &v, scale);
                let of_k = (pair.ds, shape.at(query, head));
                rows.push(if part < h + g { of_k } else { (pair.p, shape.at_o(query, head)) });
            }
        }
        // p, and so dv's factors, are rounded to bf16 once; ds, which may be taken from a rounded p, twice.
        let (from, scale, roundings) = if part < h + g { (qkv, scale, 2.0) } else { (i.of("d_o"), 1.0, 1.0) };
        let element = |at: usize| {
            let (mut terms, mut size) = (Terms::default(), 0.0);
            for ((factor, relative_to), row) in &rows {
                let x = scale * from.at(row + at % d);
                terms.add(factor * x);
                size += relative_to * x.abs();
            }
            Expected::rounded(terms.sum, Bf16, size + terms.magnitude).with_error(terms.error(roundings))
        };
        span.map(element).collect()
    };
    // The probabilities of a row then add up to about 1: exp(q k^T * scale) is e^0.5 in the mean.
    let lse = (0..len).map(|i| ((i + 1) as f32).ln() + 0.5).collect();
    // A row of dq meets len / 2 keys in the mean, one of dk or dv the same of each query head of its group.
    let pairs = 3 * h * len / (2 * parts);
    Case {
        op: "attention_backward",
        model: m.name,
        shape: shape.name(),
        tokens: Some(t),
        args: vec![
            Arg::output("dqkv", Bf16, &dims!(T = t, N = parts, D = d), (pairs * (3 * d / 32 + 1)).max(1)),
            Arg::scratch("delta", F32, h * t),
            Arg::input("d_o", Bf16, &dims!(T = t, H = h, D = d), Fill::Random(0.1)),
            Arg::input("o", Bf16, &dims!(T = t, H = h, D = d), Fill::Random(0.3)),
            Arg::input("lse", F32, &dims!(H = h, T = t), Fill::List(lse)),
            Arg::input("qkv", Bf16, &dims!(T = t, N = parts, D = d), Fill::Random(1.0)),
            Arg::input("cu_seqlens", I32, &dims!(B = shape.b() + 1), shape.starts()),
        ],
        scalars: shape.scalars(),
        work: Work::attention_backward(&shape.lengths(), heads),
        oracle: Arc::new(oracle),
        #[cfg(feature = "cuda")]
        ways: Way::own(move |cuda, set| {
            let [dqkv, delta, d_o, o, lse, qkv, cu_seqlens] = set.all();
            let op = AttentionBackward {
                dqkv: dqkv.bf16_mut(),
                delta: delta.f32_mut(),
                d_o: d_o.bf16(),
                o: o.bf16(),
                lse: lse.f32(),
                qkv: qkv.bf16(),
                cu_seqlens: cu_seqlens.i32(),
                t,
                b: shape.b(),
                heads,
            };
            attention_backward(cuda, op)
        })
        .both(),
        cpu: Some(Arc::new(move |cpu: &mut Cpu, buffers: &mut [HostBuffer]| {
            use HostBuffer::{F32, I32};
            let [F32(dqkv), F32(delta), F32(d_o), F32(o), F32(lse), F32(qkv), I32(starts)] = buffers else {
                undeclared();
            };
            let batch = &shape.batch(cpu, starts)?;
            cpu.attention_backward(crate::backend::AttentionBackward { dqkv, delta, d_o, o, lse, qkv, batch, heads })
        })),
    }
}

const FORWARD: &str = r"// launch: attention_forward grid=t,h block=256
{
  // One block a row of one head, d <= 256: the scores of 256 keys at a time, then a thread a column of o.
  const unsigned long long token = blockIdx.x, head = blockIdx.y, kv = head / (h / g), width = (h + 2 * g) * d;
  unsigned long long start = 0;
  for (unsigned long long i = 0; i < b; ++i)
    if ((unsigned long long)cu_seqlens[i] <= token) start = cu_seqlens[i];
  __shared__ float score[256];
  const __nv_bfloat16 *query = qkv + token * width + head * d;
  float top = -1e30f, sum = 0.0f, out = 0.0f;
  for (unsigned long long first = start; first <= token; first += 256) {
    const unsigned long long key = first + threadIdx.x;
    float s = 0.0f;
    if (key <= token)
      for (unsigned long long e = 0; e < d; ++e)
        s += __bfloat162float(query[e]) * __bfloat162float(qkv[key * width + (h + kv) * d + e]);
    __syncthreads();
    score[threadIdx.x] = s * scale;
    __syncthreads();
    const unsigned count = token + 1 - first < 256 ? (unsigned)(token + 1 - first) : 256u;
    float now = top;
    for (unsigned j = 0; j < count; ++j) now = fmaxf(now, score[j]);
    sum *= expf(top - now);
    out *= expf(top - now);
    top = now;
    for (unsigned j = 0; j < count; ++j) {
      const float p = expf(score[j] - now);
      sum += p;
      if (threadIdx.x < d) out += p * __bfloat162float(qkv[(first + j) * width + (h + g + kv) * d + threadIdx.x]);
    }
  }
  if (threadIdx.x < d) o[(token * h + head) * d + threadIdx.x] = __float2bfloat16(out / sum);
  if (threadIdx.x == 0) lse[head * t + token] = top + logf(sum);
}
";

const BACKWARD: &str = r"// launch: attention_backward grid=t,h+2*g block=256
{
  // One block a head of a row of dqkv, d <= 256: the factors of 256 rows at a time, then a thread a column. delta is
  // computed again wherever it is needed.
  const unsigned long long token = blockIdx.x, part = blockIdx.y, width = (h + 2 * g) * d, group = h / g;
  unsigned long long start = 0, end = t;
  for (unsigned long long i = 0; i < b; ++i)
    if ((unsigned long long)cu_seqlens[i] <= token) start = cu_seqlens[i], end = cu_seqlens[i + 1];
  const bool is_q = part < h, is_v = part >= h + g;
  const unsigned long long kv = is_q ? part / group : (part - h) % g;
  const unsigned long long from = is_q ? start : token, to = is_q ? token + 1 : end;
  __shared__ float factor[256];
  float out = 0.0f;
  for (unsigned long long n = 0; n < (is_q ? 1 : group); ++n) {
    const unsigned long long head = is_q ? part : kv * group + n;
    for (unsigned long long first = from; first < to; first += 256) {
      const unsigned long long row = first + threadIdx.x, query = is_q ? token : row, key = is_q ? row : token;
      float f = 0.0f;
      if (row < to) {
        float s = 0.0f, dp = 0.0f, sum = 0.0f;
        for (unsigned long long e = 0; e < d; ++e) {
          const float by = __bfloat162float(d_o[(query * h + head) * d + e]);
          s += __bfloat162float(qkv[query * width + head * d + e]) * __bfloat162float(qkv[key * width + (h + kv) * d + e]);
          dp += by * __bfloat162float(qkv[key * width + (h + g + kv) * d + e]);
          sum += by * __bfloat162float(o[(query * h + head) * d + e]);
        }
        const float p = expf(scale * s - lse[head * t + query]);
        f = is_v ? p : p * (dp - sum) * scale;
      }
      __syncthreads();
      factor[threadIdx.x] = f;
      __syncthreads();
      const unsigned count = to - first < 256 ? (unsigned)(to - first) : 256u;
      if (threadIdx.x < d)
        for (unsigned j = 0; j < count; ++j) {
          const unsigned long long at = first + j;
          out += factor[j] * __bfloat162float(is_q   ? qkv[at * width + (h + kv) * d + threadIdx.x]
                                              : is_v ? d_o[(at * h + head) * d + threadIdx.x]
                                                     : qkv[at * width + head * d + threadIdx.x]);
        }
    }
  }
  if (threadIdx.x < d) dqkv[token * width + part * d + threadIdx.x] = __float2bfloat16(out);
}
";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::kernels::models::MODELS;

    #[test]
    fn what_an_element_may_be_off_by_is_little_beside_the_elements() {
        let t = 2048;
        for (case, output) in [(forward(&MODELS[1], t, t), "o"), (backward(&MODELS[1], t, t), "dqkv")] {
            let inputs = Inputs::new(&case.args, &case.scalars);
            let Heads { h, g, d, .. } = MODELS[1].heads;
            let parts = if output == "o" { vec![3] } else { vec![3, h + 1, h + g + 1] };
            for part in parts {
                let width = if output == "o" { h } else { h + 2 * g };
                let at = (t / 2 * width + part) * d;
                let all = (case.oracle)(&inputs, output, at..at + 32);
                let rms = |of: fn(&Expected) -> f64| (all.iter().map(|e| of(e).powi(2)).sum::<f64>() / 32.0).sqrt();
                let (value, tolerance) = (rms(|e| e.value), rms(|e| e.tolerance));
                assert!(tolerance < 0.05 * value, "{} head {part}: {tolerance:.3e} of {value:.3e}", case.op);
            }
        }
    }
}
