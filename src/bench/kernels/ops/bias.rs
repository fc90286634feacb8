//! bias_rows: what a product without a bias of its own adds to.

use std::ops::Range;
use std::sync::Arc;

use super::Op;
use crate::backend::Work;
#[cfg(feature = "cuda")]
use crate::backend::cuda::ops::bias::{BiasRows, bias_rows};
use crate::bench::kernels::case::Element::Bf16;
#[cfg(feature = "cuda")]
use crate::bench::kernels::case::Way;
use crate::bench::kernels::case::{Arg, Case, Expected, Fill, Scalar};
use crate::bench::kernels::models::Model;
use crate::bench::kernels::values::Inputs;

pub const OPS: &[Op] = &[Op {
    name: "bias_rows",
    about: "y[t] = bias, rows ld elements apart",
    cases: |m, t| vec![case(m, t)],
    has_tokens: true,
    starter: Some(STARTER),
}];

/// On q|k|v, the one group that has biases in the models that have any.
fn case(m: &Model, t: usize) -> Case {
    let n = m.heads.qkv();
    let oracle = move |i: &Inputs, _: &str, span: Range<usize>| {
        let bias = i.of("bias");
        span.map(|at| Expected::exact(bias.at(at % n))).collect()
    };
    Case {
        op: "bias_rows",
        model: m.name,
        shape: format!("{t}x{n}"),
        tokens: Some(t),
        args: vec![
            Arg::output("y", Bf16, &dims!(T = t, N = n), 1),
            Arg::input("bias", Bf16, &dims!(N = n), Fill::Random(1.0)),
        ],
        scalars: vec![("t", Scalar::U64(t as u64)), ("n", Scalar::U64(n as u64)), ("ld", Scalar::U64(n as u64))],
        work: Work::moves(2 * t * n + 2 * n),
        oracle: Arc::new(oracle),
        #[cfg(feature = "cuda")]
        ways: vec![Way::own(move |cuda, set| {
            let [y, bias] = set.all();
            bias_rows(cuda, BiasRows { y: y.bf16_mut(), ld: n, bias: bias.bf16(), t, n })
        })],
        cpu: None,
    }
}

const STARTER: &str = r"// launch: bias_rows grid=t block=256
{
  // One block a row.
  for (unsigned long long i = threadIdx.x; i < n; i += blockDim.x) y[blockIdx.x * ld + i] = bias[i];
}
";
