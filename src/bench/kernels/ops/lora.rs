//! LoRA's skinny products, of the four groups of projections of a block: forward, both of backward, and expand.

use std::ops::Range;
use std::sync::Arc;

use super::Op;
use super::sums::{Terms, dot, row};
use crate::backend::Work;
#[cfg(feature = "cuda")]
use crate::backend::cuda::ops::lora::{
    LoraBackward, LoraBackwardX, LoraExpand, LoraForward, LoraPart, lora_backward, lora_backward_x, lora_expand,
    lora_forward,
};
use crate::backend::workspace::lora_scratch;
use crate::bench::kernels::case::Element::{Bf16, F32, I32};
#[cfg(feature = "cuda")]
use crate::bench::kernels::case::Way;
use crate::bench::kernels::case::{Arg, Case, Expected, Fill, Oracle, Scalar};
use crate::bench::kernels::models::{Model, R};
use crate::bench::kernels::values::Inputs;

const SCALE: f32 = 2.0;

pub const OPS: &[Op] = &[
    Op {
        name: "lora_forward",
        about: "h_p = scale * x A_p^T of each part p",
        cases: |m, t| groups(m, forward, t),
        has_tokens: true,
        starter: Some(FORWARD),
    },
    Op {
        name: "lora_expand",
        about: "y_p += h_p B_p^T of each part p",
        cases: |m, t| groups(m, expand, t),
        has_tokens: true,
        starter: Some(EXPAND),
    },
    Op {
        name: "lora_backward",
        about: "dh_p = scale * dy_p B_p; dB_p += dy_p^T h_p; dA_p += dh_p^T x, by dh as rounded; of each part p",
        cases: |m, t| groups(m, backward, t),
        has_tokens: true,
        starter: Some(BACKWARD),
    },
    Op {
        name: "lora_backward_x",
        about: "dx += sum over the parts p of dh_p A_p",
        cases: |m, t| groups(m, backward_x, t),
        has_tokens: true,
        starter: Some(BACKWARD_X),
    },
];

/// One projection: offsets of A (R, k) and B (n, R) in the flat vector, its columns in y and its first one in h.
#[derive(Clone, Copy)]
pub(super) struct Part {
    pub a: usize,
    pub b: usize,
    pub y: usize,
    pub n: usize,
    pub h: usize,
}

/// Projections of these widths that read one x (T, k), their N together, and the length of the flat vector, in which A and
/// B of the first lie ahead of those of the next.
pub(super) fn parts(widths: &[usize], k: usize) -> (Vec<Part>, usize, usize) {
    let (mut p, mut y, mut parts) = (0, 0, vec![]);
    for &n in widths {
        parts.push(Part { a: p, b: p + R * k, y, n, h: parts.len() * R });
        (p, y) = (p + R * (k + n), y + n);
    }
    (parts, y, p)
}

/// The part that holds this element of the flat vector.
pub(super) fn part_of(parts: &[Part], at: usize) -> Part {
    parts[parts.partition_point(|part| part.a <= at) - 1]
}

/// The same with all sizes.
#[derive(Clone)]
struct Group {
    model: &'static str,
    name: &'static str,
    parts: Vec<Part>,
    t: usize,
    k: usize,
    n: usize,
    r: usize,
    /// Elements of the flat vector.
    p: usize,
}

fn groups(m: &Model, case: fn(Group) -> Case, t: usize) -> Vec<Case> {
    let group = |(name, widths, k): (&'static str, Vec<usize>, usize)| {
        let (parts, n, p) = parts(&widths, k);
        Group { model: m.name, name, r: parts.len() * R, parts, t, k, n, p }
    };
    m.linears().into_iter().map(|linear| case(group(linear))).collect()
}

impl Group {
    fn lora(&self) -> Arg {
        Arg::input("lora", Bf16, &dims!(P = self.p), Fill::Random(0.02))
    }

    /// a, b, r, y, n, h of each part. Our launchers take them by value and do not look at this.
    fn table(&self) -> Arg {
        let table = self.parts.iter().flat_map(|p| [p.a, p.b, R, p.y, p.n, p.h].map(|v| v as f32)).collect();
        Arg::input("parts", I32, &dims!(S = self.parts.len(), E = 6), Fill::List(table))
    }

    #[cfg(feature = "cuda")]
    fn launched(&self) -> Vec<LoraPart> {
        let part = |(site, p): (usize, &Part)| {
            let Part { a, b, y, n, h } = *p;
            LoraPart { a, b, r: R, scale: SCALE, site: site as u32, y, n, h }
        };
        self.parts.iter().enumerate().map(part).collect()
    }

    /// All but the ways.
    fn case(&self, op: &'static str, args: Vec<Arg>, bytes: usize, oracle: Oracle) -> Case {
        let Self { t, k, n, r, .. } = *self;
        let sizes = [("t", t), ("k", k), ("n", n), ("r", r), ("count", self.parts.len())];
        let sizes = sizes.into_iter().map(|(name, size)| (name, Scalar::U64(size as u64)));
        Case {
            op,
            model: self.model,
            shape: format!("{} {t}x{k} to {n} r={R}", self.name),
            tokens: Some(t),
            args,
            scalars: sizes.chain([("scale", Scalar::F32(SCALE))]).collect(),
            work: Work::moves(bytes),
            oracle,
            #[cfg(feature = "cuda")]
            ways: vec![],
            // They are inside of its linears.
            cpu: None,
        }
    }
}

fn forward(group: Group) -> Case {
    let Group { t, k, r, .. } = group;
    let of = group.clone();
    let oracle = move |i: &Inputs, _: &str, span: Range<usize>| {
        let (lora, scale) = (i.of("lora"), i.scalar("scale"));
        let x = row(i.of("x"), span.start / r * k, k);
        let element = |at: usize| {
            let (part, j) = (of.parts[at % r / R], at % R);
            let (sum, magnitude) = dot(&x, &row(lora, part.a + j * k, k));
            Expected::rounded(scale * sum, Bf16, scale * magnitude)
        };
        span.map(element).collect()
    };
    let args = vec![
        Arg::output("h", Bf16, &dims!(T = t, R = r), k),
        Arg::input("x", Bf16, &dims!(T = t, K = k), Fill::Random(1.0)),
        group.lora(),
        group.table(),
        Arg::scratch("scratch", F32, lora_scratch(t, k, 0, r)),
    ];
    #[cfg(feature = "cuda")]
    let parts = group.launched();
    Case {
        #[cfg(feature = "cuda")]
        ways: vec![Way::own(move |cuda, set| {
            let [h, x, lora, _, scratch] = set.all();
            let (h, x, lora, scratch) = (h.bf16_mut(), x.bf16(), lora.bf16(), scratch.f32_mut());
            lora_forward(cuda, LoraForward { h, x, lora, parts: &parts, t, k, r, dropout: None, scratch })
        })],
        ..group.case("lora_forward", args, 2 * (t * (k + r) + r * k), Arc::new(oracle))
    }
}

fn expand(group: Group) -> Case {
    let Group { t, n, r, .. } = group;
    let of = group.clone();
    let oracle = move |i: &Inputs, _: &str, span: Range<usize>| {
        let (y, h, lora) = (i.of("y"), i.of("h"), i.of("lora"));
        let token = span.start / n;
        let element = |at: usize| {
            let part = of.parts[of.parts.partition_point(|part| part.y <= at % n) - 1];
            let b = row(lora, part.b + (at % n - part.y) * R, R);
            let (sum, magnitude) = dot(&row(h, token * r + part.h, R), &b);
            Expected::rounded(y.at(at) + sum, Bf16, y.at(at).abs() + magnitude)
        };
        span.map(element).collect()
    };
    let args = vec![
        Arg::in_out("y", Bf16, &dims!(T = t, N = n), Fill::Random(0.1), R),
        Arg::input("h", Bf16, &dims!(T = t, R = r), Fill::Random(1.0)),
        group.lora(),
        group.table(),
    ];
    #[cfg(feature = "cuda")]
    let parts = group.launched();
    Case {
        #[cfg(feature = "cuda")]
        ways: vec![Way::own(move |cuda, set| {
            let [y, h, lora, _] = set.all();
            let (y, h, lora) = (y.bf16_mut(), h.bf16(), lora.bf16());
            lora_expand(cuda, LoraExpand { y, h, lora, parts: &parts, t, n, r })
        })],
        ..group.case("lora_expand", args, 4 * t * n + 2 * t * r + 2 * R * n, Arc::new(oracle))
    }
}

/// Column j of dh for every token, by the formula: values, and what f32 arithmetic is relative to.
fn dh(i: &Inputs, group: &Group, part: Part, j: usize, tokens: Range<usize>) -> Vec<(f64, f64)> {
    let (lora, dy, scale) = (i.of("lora"), i.of("dy"), i.scalar("scale"));
    let b: Vec<f64> = (0..part.n).map(|c| scale * lora.at(part.b + c * R + j)).collect();
    tokens.map(|t| dot(&row(dy, t * group.n + part.y, part.n), &b)).collect()
}

fn backward(group: Group) -> Case {
    let Group { t, k, n, r, p, .. } = group;
    let of = group.clone();
    let oracle = move |i: &Inputs, output: &str, span: Range<usize>| {
        let (d_lora, dy, x, h) = (i.of("d_lora"), i.of("dy"), i.of("x"), i.of("h"));
        if output == "dh" {
            let token = span.start / r;
            let element = |at: usize| dh(i, &of, of.parts[at % r / R], at % R, token..token + 1)[0];
            return span.map(element).map(|(sum, size)| Expected::rounded(sum, Bf16, size)).collect();
        }
        // The column of dh that the elements of a row of dA share.
        let (mut column_of, mut column) = (None, vec![]);
        let mut element = |at: usize| {
            let (part, old) = (part_of(&of.parts, at), d_lora.at(at));
            let (mut terms, mut size, mut roundings) = (Terms::default(), old.abs(), 0.0);
            if at < part.b {
                let (j, w) = ((at - part.a) / k, (at - part.a) % k);
                if column_of != Some((part.a, j)) {
                    (column_of, column) = (Some((part.a, j)), dh(i, &of, part, j, 0..t));
                }
                for (t, (value, relative_to)) in column.iter().enumerate() {
                    terms.add(value * x.at(t * k + w));
                    size += relative_to * x.at(t * k + w).abs();
                }
                roundings = 1.0;
            } else {
                let (c, j) = (part.y + (at - part.b) / R, part.h + (at - part.b) % R);
                terms = (0..t).map(|t| dy.at(t * n + c) * h.at(t * r + j)).collect();
            }
            Expected::rounded(old + terms.sum, F32, size + terms.magnitude).with_error(terms.error(roundings))
        };
        span.map(&mut element).collect()
    };
    // An element of dA or dB is a sum over the tokens; a row of dA shares a column of dh.
    let of_dh: usize = group.parts.iter().map(|part| R * k * part.n).sum();
    let args = vec![
        Arg::output("dh", Bf16, &dims!(T = t, R = r), n.div_ceil(group.parts.len())),
        Arg::in_out("d_lora", F32, &dims!(P = p), Fill::Random(0.1), t + t * (of_dh / p) / 32),
        Arg::input("dy", Bf16, &dims!(T = t, N = n), Fill::Random(0.1)),
        Arg::input("x", Bf16, &dims!(T = t, K = k), Fill::Random(1.0)),
        Arg::input("h", Bf16, &dims!(T = t, R = r), Fill::Random(1.0)),
        group.lora(),
        group.table(),
        Arg::scratch("scratch", F32, lora_scratch(t, k, n, r)),
    ];
    // Of `lora` the B matrices alone; gradients are read and written.
    let bytes = 2 * t * (k + n + 2 * r) + 2 * R * n + 8 * p;
    #[cfg(feature = "cuda")]
    let parts = group.launched();
    Case {
        #[cfg(feature = "cuda")]
        ways: vec![Way::own(move |cuda, set| {
            let [dh, d_lora, dy, x, h, lora, _, scratch] = set.all();
            let op = LoraBackward {
                dh: dh.bf16_mut(),
                d_lora: d_lora.f32_mut(),
                dy: dy.bf16(),
                x: x.bf16(),
                h: h.bf16(),
                lora: lora.bf16(),
                parts: &parts,
                t,
                k,
                n,
                r,
                dropout: None,
                scratch: scratch.f32_mut(),
            };
            lora_backward(cuda, op)
        })],
        ..group.case("lora_backward", args, bytes, Arc::new(oracle))
    }
}

fn backward_x(group: Group) -> Case {
    let Group { t, k, r, .. } = group;
    let of = group.clone();
    let oracle = move |i: &Inputs, _: &str, span: Range<usize>| {
        let (dx, lora) = (i.of("dx"), i.of("lora"));
        let dh = row(i.of("dh"), span.start / k * r, r);
        let element = |at: usize| {
            let a = |j: usize| lora.at(of.parts[j / R].a + j % R * k + at % k);
            let (sum, magnitude) = dot(&dh, &(0..r).map(a).collect::<Vec<_>>());
            Expected::rounded(dx.at(at) + sum, Bf16, dx.at(at).abs() + magnitude)
        };
        span.map(element).collect()
    };
    let args = vec![
        Arg::in_out("dx", Bf16, &dims!(T = t, K = k), Fill::Random(0.1), r),
        Arg::input("dh", Bf16, &dims!(T = t, R = r), Fill::Random(1.0)),
        group.lora(),
        group.table(),
    ];
    #[cfg(feature = "cuda")]
    let parts = group.launched();
    Case {
        #[cfg(feature = "cuda")]
        ways: vec![Way::own(move |cuda, set| {
            let [dx, dh, lora, _] = set.all();
            let (dx, dh, lora) = (dx.bf16_mut(), dh.bf16(), lora.bf16());
            lora_backward_x(cuda, LoraBackwardX { dx, dh, lora, parts: &parts, t, k, r, dropout: None })
        })],
        ..group.case("lora_backward_x", args, 4 * t * k + 2 * t * r + 2 * r * k, Arc::new(oracle))
    }
}

const FORWARD: &str = r"// launch: lora_forward grid=ceil_div(t*r,256) block=256
{
  // One thread an element of h.
  const unsigned long long i = blockIdx.x * 256ull + threadIdx.x, row = i / r, column = i % r;
  if (i >= t * r) return;
  const int *part = parts; // a, b, r, y, n, h
  for (unsigned long long p = 1; p < count; ++p)
    if ((unsigned long long)parts[6 * p + 5] <= column) part = parts + 6 * p;
  const __nv_bfloat16 *a = lora + part[0] + (column - part[5]) * k;
  float sum = 0.0f;
  for (unsigned long long c = 0; c < k; ++c) sum += __bfloat162float(x[row * k + c]) * __bfloat162float(a[c]);
  h[i] = __float2bfloat16(scale * sum);
}
";

const EXPAND: &str = r"// launch: lora_expand grid=ceil_div(t*n,256) block=256
{
  // One thread an element of y.
  const unsigned long long i = blockIdx.x * 256ull + threadIdx.x, row = i / n, column = i % n;
  if (i >= t * n) return;
  const int *part = parts; // a, b, r, y, n, h
  for (unsigned long long p = 1; p < count; ++p)
    if ((unsigned long long)parts[6 * p + 3] <= column) part = parts + 6 * p;
  const __nv_bfloat16 *b = lora + part[1] + (column - part[3]) * part[2];
  float sum = __bfloat162float(y[i]);
  for (int j = 0; j < part[2]; ++j) sum += __bfloat162float(h[row * r + part[5] + j]) * __bfloat162float(b[j]);
  y[i] = __float2bfloat16(sum);
}
";

const BACKWARD: &str = r"// launch: lora_backward grid=r block=256
{
  // One block a column of dh: 256 tokens of it at a time, a token a warp's turn; their share of a row of dA; at last the
  // column's part of dB. A thread alone adds to an element.
  const unsigned long long column = blockIdx.x;
  const int *part = parts; // a, b, r, y, n, h
  for (unsigned long long p = 1; p < count; ++p)
    if ((unsigned long long)parts[6 * p + 5] <= column) part = parts + 6 * p;
  const unsigned long long j = column - part[5], rank = part[2], width = part[4];
  const __nv_bfloat16 *b = lora + part[1] + j;
  float *da = d_lora + part[0] + j * k, *db = d_lora + part[1] + j;
  __shared__ float of_token[256];
  const unsigned lane = threadIdx.x % 32;
  for (unsigned long long first = 0; first < t; first += 256) {
    const unsigned tokens = t - first < 256 ? (unsigned)(t - first) : 256u;
    for (unsigned i = threadIdx.x / 32; i < tokens; i += 8) {
      float sum = 0.0f;
      for (unsigned long long c = lane; c < width; c += 32)
        sum += __bfloat162float(dy[(first + i) * n + part[3] + c]) * __bfloat162float(b[c * rank]);
      for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, d);
      const __nv_bfloat16 rounded = __float2bfloat16(scale * sum);
      if (lane == 0) {
        of_token[i] = __bfloat162float(rounded);
        dh[(first + i) * r + column] = rounded;
      }
    }
    __syncthreads();
    for (unsigned long long c = threadIdx.x; c < k; c += 256) {
      float sum = 0.0f;
      for (unsigned i = 0; i < tokens; ++i) sum += of_token[i] * __bfloat162float(x[(first + i) * k + c]);
      da[c] += sum;
    }
    __syncthreads();
  }
  for (unsigned long long c = threadIdx.x; c < width; c += 256) {
    float sum = 0.0f;
    for (unsigned long long i = 0; i < t; ++i)
      sum += __bfloat162float(dy[i * n + part[3] + c]) * __bfloat162float(h[i * r + column]);
    db[c * rank] += sum;
  }
}
";

const BACKWARD_X: &str = r"// launch: lora_backward_x grid=ceil_div(t*k,256) block=256
{
  // One thread an element of dx.
  const unsigned long long i = blockIdx.x * 256ull + threadIdx.x, row = i / k, column = i % k;
  if (i >= t * k) return;
  float sum = __bfloat162float(dx[i]);
  for (unsigned long long p = 0; p < count; ++p) {
    const int *part = parts + 6 * p; // a, b, r, y, n, h
    for (int j = 0; j < part[2]; ++j)
      sum += __bfloat162float(dh[row * r + part[5] + j]) * __bfloat162float(lora[part[0] + j * k + column]);
  }
  dx[i] = __float2bfloat16(sum);
}
";
