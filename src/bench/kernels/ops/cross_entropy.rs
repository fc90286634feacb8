//! cross_entropy, the loss alone and with the gradient in place of the logits, and add_loss.

use std::ops::Range;
use std::sync::Arc;

use half::bf16;

use super::Op;
#[cfg(feature = "cuda")]
use crate::backend::cuda::ops::cross_entropy::{AddLoss, CrossEntropy, add_loss, cross_entropy};
use crate::backend::workspace::workspace;
use crate::backend::{IGNORE, Needs, Work};
use crate::bench::kernels::case::Element::{Bf16, F32, I32};
#[cfg(feature = "cuda")]
use crate::bench::kernels::case::Way;
use crate::bench::kernels::case::{Arg, Case, Expected, Fill, Scalar};
use crate::bench::kernels::models::{Model, TOKENS};
use crate::bench::kernels::values::{Column, Inputs};

pub const OPS: &[Op] = &[
    Op {
        name: "cross_entropy",
        about: "row_loss = logsumexp(logits) - logits[id]; 0 where the id is outside 0..v",
        cases: |m, t| rows_of_chunk(m, t).map(|rows| loss(m, rows)).into_iter().collect(),
        has_tokens: true,
        starter: Some(LOSS),
    },
    Op {
        name: "cross_entropy_gradient",
        about: "the same, and scale * (softmax(logits) - onehot(id)), zeros where the id is outside 0..v, in place: a row of \
                logits is v floats, behind it their gradient as v bf16, and its second half as it was",
        cases: |m, t| rows_of_chunk(m, t).map(|rows| gradient(m, rows)).into_iter().collect(),
        has_tokens: true,
        starter: Some(GRADIENT),
    },
    Op {
        name: "add_loss",
        about: "loss += scale * sum of row_loss, in f64",
        cases: |m, t| vec![add(m, t)],
        has_tokens: true,
        starter: Some(ADD),
    },
];

/// Rows of logits that the program has at a time with `t` target tokens. None where a smaller count of the table has as
/// many: the rest come in further launches.
pub(super) fn rows_of_chunk(m: &Model, t: usize) -> Option<usize> {
    let chunk = workspace(&Needs { t, c: m.c, v: m.v, ..Needs::default() }).head_rows;
    let before = TOKENS.into_iter().rfind(|&count| count < t).unwrap_or(0);
    (before < chunk).then_some(t.min(chunk))
}

/// One each row, in no order; where there are many the last has none.
pub(super) fn spread(rows: usize, limit: usize) -> Vec<i32> {
    let last = |i: usize| i + 1 == rows && rows >= 64;
    (0..rows).map(|i| if last(i) { IGNORE } else { (i * 4999 % limit) as i32 }).collect()
}

/// An argument that holds these.
pub(super) fn list(values: &[i32]) -> Fill {
    Fill::List(values.iter().map(|&v| v as f32).collect())
}

/// A row of logits: its maximum, and the sum of e^(z - maximum).
struct Row {
    z: Vec<f64>,
    top: f64,
    sum: f64,
}

impl Row {
    fn new(z: Vec<f64>) -> Self {
        let top = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum = z.iter().map(|z| (z - top).exp()).sum();
        Self { z, top, sum }
    }

    /// `id`: of the target, outside the row for none.
    fn loss(&self, id: f64) -> Expected {
        if id < 0.0 {
            return Expected::exact(0.0);
        }
        let (log, z) = (self.sum.ln(), self.z[id as usize]);
        // The sum may be off by 2^-17 of itself: it is as long as the vocabulary, of fast exponentials.
        Expected::rounded(log + self.top - z, F32, log.abs() + self.top.abs() + z.abs() + 8.0)
    }

    fn gradient(&self, column: usize, id: f64, scale: f64) -> Expected {
        if id < 0.0 {
            return Expected::exact(0.0);
        }
        let (p, hit) = ((self.z[column] - self.top).exp() / self.sum, f64::from(u8::from(column == id as usize)));
        Expected::rounded(scale * (p - hit), Bf16, 16.0 * scale * (p + hit))
    }
}

/// An exponential as multiply-adds.
const EXP: usize = 4;

/// What both have beside the logits, behind them.
fn others(m: usize, v: usize) -> [Arg; 3] {
    [
        Arg::output("row_loss", F32, &dims!(M = m), EXP * v),
        Arg::input("ids", I32, &dims!(M = m), list(&spread(m, v))),
        Arg::input("scale", F32, &[("1", 1)], Fill::Const(1.0 / m as f32)),
    ]
}

fn loss(model: &Model, m: usize) -> Case {
    let v = model.v;
    let oracle = move |i: &Inputs, _: &str, span: Range<usize>| {
        let (logits, ids) = (i.of("logits"), i.of("ids"));
        let row = |row: usize| Row::new((0..v).map(|j| logits.at(row * v + j)).collect());
        span.map(|at| row(at).loss(ids.at(at))).collect()
    };
    let logits = Arg::input("logits", F32, &dims!(M = m, V = v), Fill::Random(2.0));
    Case {
        op: "cross_entropy",
        model: model.name,
        shape: format!("{m}x{v}"),
        tokens: Some(m),
        args: [logits].into_iter().chain(others(m, v)).collect(),
        scalars: vec![("m", Scalar::U64(m as u64)), ("v", Scalar::U64(v as u64))],
        work: Work::moves(4 * m * v + 8 * m),
        oracle: Arc::new(oracle),
        #[cfg(feature = "cuda")]
        ways: vec![Way::own(move |cuda, set| {
            let [logits, row_loss, ids, scale] = set.all();
            // Read alone without a gradient.
            let (logits, row_loss, ids, scale) = (logits.f32_mut(), row_loss.f32_mut(), ids.i32(), scale.f32());
            cross_entropy(cuda, CrossEntropy { logits, row_loss, ids, scale, gradient: false, m, v })
        })],
        cpu: None,
    }
}

/// The float that two bf16 of the column are.
fn float_at(column: &Column, i: usize) -> f64 {
    let bits = |i: usize| u32::from(bf16::from_f64(column.at(i)).to_bits());
    f64::from(f32::from_bits(bits(2 * i + 1) << 16 | bits(2 * i)))
}

fn gradient(model: &Model, m: usize) -> Case {
    let v = model.v;
    let oracle = move |i: &Inputs, output: &str, span: Range<usize>| -> Vec<Expected> {
        let (logits, ids, scale) = (i.of("logits"), i.of("ids"), i.of("scale").at(0));
        let row = |row: usize| Row::new((0..v).map(|j| float_at(logits, row * v + j)).collect());
        if output == "row_loss" {
            return span.map(|at| row(at).loss(ids.at(at))).collect();
        }
        let (t, start) = (span.start / (2 * v), span.start % (2 * v));
        let of_row = (start < v).then(|| row(t));
        let element = |at: usize| match (at % (2 * v), &of_row) {
            (column, Some(row)) if column < v => row.gradient(column, ids.at(t), scale),
            _ => Expected::exact(logits.at(at)),
        };
        span.map(element).collect()
    };
    // As bf16, which they are behind the op; two of them make a logit, whose upper half is the second.
    let cost = EXP * v.div_ceil(32) + EXP;
    let logits = Arg::in_out("logits", Bf16, &[("M", m), ("2V", 2 * v)], Fill::Random(2.0), cost);
    let targets = spread(m, v).iter().filter(|&&id| id >= 0).count();
    Case {
        op: "cross_entropy_gradient",
        model: model.name,
        shape: format!("{m}x{v}"),
        tokens: Some(m),
        args: [logits].into_iter().chain(others(m, v)).collect(),
        scalars: vec![("m", Scalar::U64(m as u64)), ("v", Scalar::U64(v as u64))],
        work: Work::moves(4 * targets * v + 2 * m * v + 8 * m),
        oracle: Arc::new(oracle),
        #[cfg(feature = "cuda")]
        ways: vec![Way::own(move |cuda, set| {
            let [logits, row_loss, ids, scale] = set.all();
            let (logits, row_loss) = (logits.bf16_mut().into_f32(), row_loss.f32_mut());
            let (ids, scale) = (ids.i32(), scale.f32());
            cross_entropy(cuda, CrossEntropy { logits, row_loss, ids, scale, gradient: true, m, v })
        })],
        cpu: None,
    }
}

fn add(model: &Model, m: usize) -> Case {
    let oracle = move |i: &Inputs, _: &str, _: Range<usize>| {
        let (row_loss, loss, scale) = (i.of("row_loss"), i.of("loss").at(0), i.of("scale").at(0));
        let sum: f64 = (0..m).map(|at| row_loss.at(at)).sum();
        let magnitude: f64 = loss.abs() + scale * (0..m).map(|at| row_loss.at(at).abs()).sum::<f64>();
        // Rounded once: f64 loses next to nothing.
        vec![Expected::rounded(loss + scale * sum, F32, 0.0).with_error(1e-12 * magnitude)]
    };
    Case {
        op: "add_loss",
        model: model.name,
        shape: m.to_string(),
        tokens: Some(m),
        args: vec![
            Arg::in_out("loss", F32, &[("1", 1)], Fill::Const(2.5), m),
            Arg::input("row_loss", F32, &dims!(M = m), Fill::Random(1.0)),
            Arg::input("scale", F32, &[("1", 1)], Fill::Const(0.5)),
        ],
        scalars: vec![("m", Scalar::U64(m as u64))],
        work: Work::moves(4 * m + 12),
        oracle: Arc::new(oracle),
        #[cfg(feature = "cuda")]
        ways: vec![Way::own(move |cuda, set| {
            let [loss, row_loss, scale] = set.all();
            add_loss(cuda, AddLoss { loss: loss.f32_mut(), row_loss: row_loss.f32(), scale: scale.f32(), m })
        })],
        cpu: None,
    }
}

const LOSS: &str = r"// launch: cross_entropy grid=m block=256
{
  // One block a row: the maximum, then the sum.
  const float *z = logits + blockIdx.x * v;
  const int id = ids[blockIdx.x];
  if (id < 0 || (unsigned long long)id >= v) {
    if (threadIdx.x == 0) row_loss[blockIdx.x] = 0.0f;
    return;
  }
  __shared__ float partial[256];
  float top = z[0], sum = 0.0f;
  for (unsigned long long i = threadIdx.x; i < v; i += blockDim.x) top = fmaxf(top, z[i]);
  partial[threadIdx.x] = top;
  __syncthreads();
  for (unsigned n = blockDim.x / 2; n > 0; n /= 2) {
    if (threadIdx.x < n) partial[threadIdx.x] = fmaxf(partial[threadIdx.x], partial[threadIdx.x + n]);
    __syncthreads();
  }
  top = partial[0];
  __syncthreads();
  for (unsigned long long i = threadIdx.x; i < v; i += blockDim.x) sum += expf(z[i] - top);
  partial[threadIdx.x] = sum;
  __syncthreads();
  for (unsigned n = blockDim.x / 2; n > 0; n /= 2) {
    if (threadIdx.x < n) partial[threadIdx.x] += partial[threadIdx.x + n];
    __syncthreads();
  }
  if (threadIdx.x == 0) row_loss[blockIdx.x] = logf(partial[0]) + (top - z[id]);
}
";

const GRADIENT: &str = r"// launch: cross_entropy_gradient grid=m block=256
{
  // One block a row: the maximum, the sum, then the gradient from left to right.
  __nv_bfloat16 *gradient = logits + blockIdx.x * 2 * v;
  const float *z = reinterpret_cast<const float *>(gradient);
  const int id = ids[blockIdx.x];
  if (id < 0 || (unsigned long long)id >= v) {
    if (threadIdx.x == 0) row_loss[blockIdx.x] = 0.0f;
    for (unsigned long long i = threadIdx.x; i < v; i += blockDim.x) gradient[i] = __float2bfloat16(0.0f);
    return;
  }
  __shared__ float partial[256];
  float top = z[0], sum = 0.0f;
  for (unsigned long long i = threadIdx.x; i < v; i += blockDim.x) top = fmaxf(top, z[i]);
  partial[threadIdx.x] = top;
  __syncthreads();
  for (unsigned n = blockDim.x / 2; n > 0; n /= 2) {
    if (threadIdx.x < n) partial[threadIdx.x] = fmaxf(partial[threadIdx.x], partial[threadIdx.x + n]);
    __syncthreads();
  }
  top = partial[0];
  __syncthreads();
  for (unsigned long long i = threadIdx.x; i < v; i += blockDim.x) sum += expf(z[i] - top);
  partial[threadIdx.x] = sum;
  __syncthreads();
  for (unsigned n = blockDim.x / 2; n > 0; n /= 2) {
    if (threadIdx.x < n) partial[threadIdx.x] += partial[threadIdx.x + n];
    __syncthreads();
  }
  sum = partial[0];
  if (threadIdx.x == 0) row_loss[blockIdx.x] = logf(sum) + (top - z[id]);
  for (unsigned long long start = 0; start < v; start += blockDim.x) {
    // All logits of a step are read before its gradients go over logits of this step and of earlier ones.
    const unsigned long long i = start + threadIdx.x;
    const float logit = i < v ? z[i] : 0.0f;
    __syncthreads();
    const float p = expf(logit - top) / sum, hit = i == (unsigned long long)id ? 1.0f : 0.0f;
    if (i < v) gradient[i] = __float2bfloat16(scale[0] * (p - hit));
  }
}
";

const ADD: &str = r"// launch: add_loss grid=1 block=256
{
  // One block for all.
  __shared__ double sums[256];
  double sum = 0.0;
  for (unsigned long long i = threadIdx.x; i < m; i += blockDim.x) sum += double(row_loss[i]);
  sums[threadIdx.x] = sum;
  __syncthreads();
  for (unsigned n = blockDim.x / 2; n > 0; n /= 2) {
    if (threadIdx.x < n) sums[threadIdx.x] += sums[threadIdx.x + n];
    __syncthreads();
  }
  if (threadIdx.x == 0) loss[0] = float(double(loss[0]) + double(scale[0]) * sums[0]);
}
";
