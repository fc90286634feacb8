//! embedding: rows of the table of tokens.

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use half::bf16;

use super::Op;
use crate::backend::cpu::Cpu;
#[cfg(feature = "cuda")]
use crate::backend::cuda::ops::embedding::{Embedding, embedding};
use crate::backend::{Backend, Work};
use crate::bench::kernels::case::Element::{Bf16, I32};
#[cfg(feature = "cuda")]
use crate::bench::kernels::case::Way;
use crate::bench::kernels::case::{Arg, Case, Expected, Fill, HostBuffer, Scalar, undeclared};
use crate::bench::kernels::models::Model;
use crate::bench::kernels::values::Inputs;
use crate::tensor::{Dtype, HostMatrix, HostTensor};

pub const OPS: &[Op] = &[Op {
    name: "embedding",
    about: "x[t] = table[tokens[t]]; zeros for a token outside 0..v",
    cases: |m, t| vec![case(m, t)],
    has_tokens: true,
    starter: Some(STARTER),
}];

fn case(m: &Model, t: usize) -> Case {
    let (c, v) = (m.c, m.v);
    let oracle = move |i: &Inputs, _: &str, span: Range<usize>| {
        let (tokens, table) = (i.of("tokens"), i.of("table"));
        span.map(|at| Expected::exact(table.at(tokens.at(at / c) as usize * c + at % c))).collect()
    };
    // As the program holds it, made at the first run.
    let widened = OnceLock::new();
    Case {
        op: "embedding",
        model: m.name,
        shape: format!("{t}x{c} of {v}"),
        tokens: Some(t),
        args: vec![
            Arg::output("x", Bf16, &dims!(T = t, C = c), 1),
            // Different rows, in no order.
            Arg::input("tokens", I32, &dims!(T = t), Fill::List((0..t).map(|i| (i * 4999 % v) as f32).collect())),
            Arg::input("table", Bf16, &dims!(V = v, C = c), Fill::Random(0.02)),
        ],
        scalars: vec![("t", Scalar::U64(t as u64)), ("c", Scalar::U64(c as u64)), ("v", Scalar::U64(v as u64))],
        work: Work::embedding(t, c),
        oracle: Arc::new(oracle),
        #[cfg(feature = "cuda")]
        ways: vec![Way::own(move |cuda, set| {
            let [x, tokens, table] = set.all();
            embedding(cuda, Embedding { x: x.bf16_mut(), tokens: tokens.i32(), table: table.bf16(), t, c, v })
        })],
        cpu: Some(Arc::new(move |cpu: &mut Cpu, buffers: &mut [HostBuffer]| {
            let [HostBuffer::F32(x), HostBuffer::I32(tokens), HostBuffer::F32(values)] = buffers else {
                undeclared();
            };
            let table = match widened.get() {
                Some(table) => table,
                None => {
                    let bytes = values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect();
                    let matrix = cpu.upload(&HostMatrix::Dense(HostTensor::owned(Dtype::Bf16, vec![v, c], bytes)))?;
                    widened.get_or_init(|| matrix)
                }
            };
            cpu.embedding(crate::backend::Embedding { x, tokens, table, t, c })
        })),
    }
}

const STARTER: &str = r"// launch: embedding grid=t block=256
{
  // One block a row.
  const unsigned long long row = blockIdx.x;
  const int token = tokens[row];
  const bool known = token >= 0 && (unsigned long long)token < v;
  for (unsigned long long i = threadIdx.x; i < c; i += blockDim.x)
    x[row * c + i] = known ? table[(unsigned long long)token * c + i] : __float2bfloat16(0.0f);
}
";
