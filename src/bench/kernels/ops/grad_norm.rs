//! grad_norm: the L2 norm of the gradients of all trainable weights.

use std::ops::Range;
use std::sync::Arc;

use super::Op;
use crate::backend::cpu::Cpu;
#[cfg(feature = "cuda")]
use crate::backend::cuda::ops::grad_norm::{GRAD_NORM_PARTIALS, GradNorm, grad_norm};
use crate::backend::{Backend, Work};
use crate::bench::kernels::case::Element::{F32, F64};
#[cfg(feature = "cuda")]
use crate::bench::kernels::case::Way;
use crate::bench::kernels::case::{Arg, Case, Expected, Fill, HostBuffer, Scalar, undeclared};
use crate::bench::kernels::models::Model;
use crate::bench::kernels::values::Inputs;

/// Elements of the scratch.
const PARTIALS: usize = 1024;
#[cfg(feature = "cuda")]
const _: () = assert!(PARTIALS == GRAD_NORM_PARTIALS);

pub const OPS: &[Op] = &[Op {
    name: "grad_norm",
    about: "norm = sqrt(sum of the squares of grads), the same bits in every run",
    cases: |m, _| vec![case(m)],
    has_tokens: false,
    starter: Some(STARTER),
}];

fn case(m: &Model) -> Case {
    let p = m.trainable();
    let oracle = move |i: &Inputs, _: &str, span: Range<usize>| {
        let period = i.of("grads").period();
        let squares = |g: &[f32]| g.iter().map(|&g| f64::from(g) * f64::from(g)).sum::<f64>();
        let (whole, rest) = (p / period.len(), p % period.len());
        let norm = (whole as f64 * squares(period) + squares(&period[..rest])).sqrt();
        // Short sums in f32 that join in f64 lose a quarter of what one long sum in f32 may.
        span.map(|_| Expected::rounded(norm, F32, norm / 4.0)).collect()
    };
    Case {
        op: "grad_norm",
        model: m.name,
        shape: p.to_string(),
        tokens: None,
        args: vec![
            Arg::output("norm", F32, &[("1", 1)], p),
            Arg::input("grads", F32, &dims!(P = p), Fill::Random(1e-3)),
            Arg::scratch("partial", F64, PARTIALS),
        ],
        scalars: vec![("p", Scalar::U64(p as u64))],
        work: Work::grad_norm(p),
        oracle: Arc::new(oracle),
        #[cfg(feature = "cuda")]
        ways: vec![Way::own(|cuda, set| {
            let [norm, grads, partial] = set.all();
            grad_norm(cuda, GradNorm { norm: norm.f32_mut(), grads: grads.f32(), partial: partial.f64_mut() })
        })],
        cpu: Some(Arc::new(|cpu: &mut Cpu, buffers: &mut [HostBuffer]| {
            let [HostBuffer::F32(norm), HostBuffer::F32(grads), _] = buffers else { undeclared() };
            cpu.grad_norm(norm, grads)
        })),
    }
}

const STARTER: &str = r"// launch: grad_norm grid=1 block=1024
{
  // One block for all.
  __shared__ double sums[1024];
  double sum = 0.0;
  for (unsigned long long i = threadIdx.x; i < p; i += blockDim.x) sum += double(grads[i]) * double(grads[i]);
  sums[threadIdx.x] = sum;
  __syncthreads();
  for (unsigned n = blockDim.x / 2; n > 0; n /= 2) {
    if (threadIdx.x < n) sums[threadIdx.x] += sums[threadIdx.x + n];
    __syncthreads();
  }
  if (threadIdx.x == 0) norm[0] = float(sqrt(sums[0]));
}
";
