//! An op for trying out candidates, not in the table: what it is raced against is its starter, which is easily beaten.

use std::ops::Range;
use std::sync::Arc;

use super::Op;
use crate::backend::Work;
#[cfg(feature = "cuda")]
use crate::bench::candidate::{Source, program, template::Contract};
use crate::bench::kernels::case::Element::F32;
use crate::bench::kernels::case::{Arg, Case, Expected, Fill, Scalar};
use crate::bench::kernels::models::Model;
use crate::bench::kernels::values::Inputs;

const ABOUT: &str = "y = 2 * x + 1; not in the table, for trying out candidates";

pub const OPS: &[Op] =
    &[Op { name: "toy", about: ABOUT, cases: |m, t| vec![toy(m, t)], has_tokens: true, starter: Some(STARTER) }];

/// Of every model: wide enough for something to go wrong far from the edges.
const C: usize = 4096;

fn toy(m: &Model, t: usize) -> Case {
    let oracle = |i: &Inputs, _: &str, span: Range<usize>| {
        let value = |at: usize| 2.0 * i.of("x").at(at) + 1.0;
        span.map(|at| Expected::rounded(value(at), F32, value(at).abs())).collect()
    };
    let args = vec![
        Arg::output("y", F32, &dims!(T = t, C = C), 1),
        Arg::input("x", F32, &dims!(T = t, C = C), Fill::Random(1.0)),
    ];
    let scalars = vec![("t", Scalar::U64(t as u64)), ("c", Scalar::U64(C as u64))];
    Case {
        op: "toy",
        model: m.name,
        shape: format!("{t}x{C}"),
        tokens: Some(t),
        #[cfg(feature = "cuda")]
        ways: {
            let contract = Contract { op: "toy", about: ABOUT, args: &args, scalars: &scalars, tokens: Some(t) };
            let source = Source { path: "toy.cu".into(), text: contract.file(STARTER) };
            vec![program::lazy_way("starter", source, &args, &scalars)]
        },
        args,
        scalars,
        work: Work::moves(8 * t * C),
        oracle: Arc::new(oracle),
        cpu: None,
    }
}

const STARTER: &str = r"// launch: toy grid=ceil_div(t,32) block=32
{
  // One thread a row: neighbours read far apart.
  const unsigned long long row = blockIdx.x * 32ull + threadIdx.x;
  if (row >= t) return;
  for (unsigned long long i = 0; i < c; i++) y[row * c + i] = 2.0f * x[row * c + i] + 1.0f;
}
";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::kernels::models::TOY;

    #[test]
    fn its_oracle_knows_the_formula() {
        let case = toy(&TOY, 3);
        let inputs = Inputs::new(&case.args, &case.scalars);
        let expected = (case.oracle)(&inputs, "y", C + 777..C + 778)[0];
        assert_eq!(expected.value, 2.0 * inputs.of("x").at(C + 777) + 1.0);
        assert!(expected.holds(expected.value) && !expected.holds(expected.value + 1e-4));
    }
}
