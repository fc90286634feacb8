//! load_dense: weights of a file on their way to the device.

use std::ops::Range;
use std::sync::Arc;

use super::Op;
use crate::backend::Work;
#[cfg(feature = "cuda")]
use crate::backend::cuda::ops::load::{LoadDense, load_dense};
#[cfg(feature = "cuda")]
use crate::backend::cuda::ops::nf4::Source;
use crate::bench::kernels::case::Element::{Bf16, I32};
#[cfg(feature = "cuda")]
use crate::bench::kernels::case::Way;
use crate::bench::kernels::case::{Arg, Case, Expected, Fill, Scalar};
use crate::bench::kernels::models::Model;
use crate::bench::kernels::values::Inputs;

pub const OPS: &[Op] = &[Op {
    name: "load_dense",
    about: "out = x, in bf16 as nearly all files have it; bad = 1 if an element is NaN or infinite, else it stays",
    cases: |m, _| m.linears().into_iter().map(|(_, widths, k)| case(m, widths.iter().sum(), k)).collect(),
    has_tokens: false,
    starter: Some(STARTER),
}];

fn case(m: &Model, n: usize, k: usize) -> Case {
    let oracle = |i: &Inputs, output: &str, span: Range<usize>| match output {
        // All elements are finite.
        "bad" => vec![Expected::exact(0.0)],
        _ => span.map(|at| Expected::exact(i.of("x").at(at))).collect(),
    };
    Case {
        op: "load_dense",
        model: m.name,
        shape: format!("{n}x{k}"),
        tokens: None,
        args: vec![
            Arg::output("out", Bf16, &dims!(N = n, K = k), 1),
            Arg::input("x", Bf16, &dims!(N = n, K = k), Fill::Random(0.02)),
            Arg::in_out("bad", I32, &[("1", 1)], Fill::Const(0.0), 1),
        ],
        scalars: vec![("n", Scalar::U64((n * k) as u64))],
        work: Work::moves(4 * n * k),
        oracle: Arc::new(oracle),
        #[cfg(feature = "cuda")]
        ways: vec![Way::own(|cuda, set| {
            let [out, x, bad] = set.all();
            let (out, x, bad) = (Some(out.bf16_mut()), Source::Bf16(x.bf16()), bad.i32_mut().into_u32());
            load_dense(cuda, LoadDense { out, x, bad })
        })],
        cpu: None,
    }
}

const STARTER: &str = r"// launch: load_dense grid=ceil_div(n,256) block=256
{
  // A thread an element; whoever writes bad writes the same.
  const unsigned long long i = blockIdx.x * 256ull + threadIdx.x;
  if (i >= n) return;
  if (!(fabsf(__bfloat162float(x[i])) <= 3.4028234e38f)) bad[0] = 1;
  out[i] = x[i];
}
";
