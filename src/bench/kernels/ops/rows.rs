//! gather_rows and scatter_rows: the rows of a chunk of target tokens, out of x and back into its gradient.

use std::ops::Range;
use std::sync::Arc;

use super::Op;
use super::cross_entropy::{list, rows_of_chunk, spread};
use crate::backend::Work;
#[cfg(feature = "cuda")]
use crate::backend::cuda::ops::cross_entropy::{GatherRows, ScatterRows, gather_rows, scatter_rows};
use crate::bench::kernels::case::Element::{Bf16, I32};
#[cfg(feature = "cuda")]
use crate::bench::kernels::case::Way;
use crate::bench::kernels::case::{Arg, Case, Expected, Fill, Scalar};
use crate::bench::kernels::models::Model;
use crate::bench::kernels::values::Inputs;

pub const OPS: &[Op] = &[
    Op {
        name: "gather_rows",
        about: "out[i] = x[rows[i]]; zeros where the row is outside 0..t",
        cases: |m, t| rows_of_chunk(m, t).map(|rows| gather(m, rows)).into_iter().collect(),
        has_tokens: true,
        starter: Some(GATHER),
    },
    Op {
        name: "scatter_rows",
        about: "dx[rows[i]] = d_rows[i]; rows outside 0..t are passed over, none is named twice, the rest of dx stays",
        cases: |m, t| rows_of_chunk(m, t).map(|rows| scatter(m, rows)).into_iter().collect(),
        has_tokens: true,
        starter: Some(SCATTER),
    },
];

/// Tokens of a micro-batch with so many targets: some are none.
fn tokens(m: usize) -> usize {
    2 * m
}

fn sizes(m: usize, c: usize) -> Vec<(&'static str, Scalar)> {
    [("m", m), ("c", c), ("t", tokens(m))].map(|(name, n)| (name, Scalar::U64(n as u64))).to_vec()
}

/// Rows written and rows read, and the numbers of the rows.
fn work(written: usize, read: usize, c: usize, m: usize) -> Work {
    Work::moves(2 * written * c + 2 * read * c + 4 * m)
}

fn gather(model: &Model, m: usize) -> Case {
    let (c, t) = (model.c, tokens(m));
    let rows = spread(m, t);
    let named = rows.iter().filter(|&&row| row >= 0).count();
    let oracle = move |i: &Inputs, _: &str, span: Range<usize>| {
        let (x, row) = (i.of("x"), i.of("rows").at(span.start / c));
        let value = |at: usize| if row < 0.0 { 0.0 } else { x.at(row as usize * c + at % c) };
        span.map(|at| Expected::exact(value(at))).collect()
    };
    Case {
        op: "gather_rows",
        model: model.name,
        shape: format!("{m}x{c}"),
        tokens: Some(m),
        args: vec![
            Arg::output("out", Bf16, &dims!(M = m, C = c), 1),
            Arg::input("x", Bf16, &dims!(T = t, C = c), Fill::Random(1.0)),
            Arg::input("rows", I32, &dims!(M = m), list(&rows)),
        ],
        scalars: sizes(m, c),
        work: work(m, named, c, m),
        oracle: Arc::new(oracle),
        #[cfg(feature = "cuda")]
        ways: vec![Way::own(move |cuda, set| {
            let [out, x, rows] = set.all();
            gather_rows(cuda, GatherRows { out: out.bf16_mut(), x: x.bf16(), rows: rows.i32(), m, c, t })
        })],
        cpu: None,
    }
}

fn scatter(model: &Model, m: usize) -> Case {
    let (c, t) = (model.c, tokens(m));
    let rows = spread(m, t);
    let named = rows.iter().filter(|&&row| row >= 0).count();
    let fill = list(&rows);
    let oracle = move |i: &Inputs, _: &str, span: Range<usize>| {
        let (dx, d_rows, row) = (i.of("dx"), i.of("d_rows"), (span.start / c) as i32);
        let from = rows.iter().position(|&named| named == row);
        let value = |at: usize| from.map_or_else(|| dx.at(at), |from| d_rows.at(from * c + at % c));
        span.map(|at| Expected::exact(value(at))).collect()
    };
    Case {
        op: "scatter_rows",
        model: model.name,
        shape: format!("{m}x{c}"),
        tokens: Some(m),
        args: vec![
            // The search for a row's number, shared by a span of 32.
            Arg::in_out("dx", Bf16, &dims!(T = t, C = c), Fill::Random(1.0), m.div_ceil(32) + 1),
            Arg::input("d_rows", Bf16, &dims!(M = m, C = c), Fill::Random(1.0)),
            Arg::input("rows", I32, &dims!(M = m), fill),
        ],
        scalars: sizes(m, c),
        work: work(named, named, c, m),
        oracle: Arc::new(oracle),
        #[cfg(feature = "cuda")]
        ways: vec![Way::own(move |cuda, set| {
            let [dx, d_rows, rows] = set.all();
            scatter_rows(cuda, ScatterRows { dx: dx.bf16_mut(), d_rows: d_rows.bf16(), rows: rows.i32(), m, c, t })
        })],
        cpu: None,
    }
}

const GATHER: &str = r"// launch: gather_rows grid=m block=256
{
  // One block a row.
  const unsigned long long to = blockIdx.x * c;
  const int row = rows[blockIdx.x];
  const bool there = row >= 0 && (unsigned long long)row < t;
  for (unsigned long long i = threadIdx.x; i < c; i += blockDim.x)
    out[to + i] = there ? x[(unsigned long long)row * c + i] : __float2bfloat16(0.0f);
}
";

const SCATTER: &str = r"// launch: scatter_rows grid=m block=256
{
  // One block a row.
  const unsigned long long from = blockIdx.x * c;
  const int row = rows[blockIdx.x];
  if (row < 0 || (unsigned long long)row >= t) return;
  for (unsigned long long i = threadIdx.x; i < c; i += blockDim.x)
    dx[(unsigned long long)row * c + i] = d_rows[from + i];
}
";
