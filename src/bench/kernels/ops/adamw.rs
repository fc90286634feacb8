//! A step of AdamW on the adapter of all seven projections, state on the device: moments in 32 bits, and in 8.

use std::ops::Range;
use std::sync::Arc;

use super::Op;
use crate::backend::adamw::{M_ZERO, MOMENT_BLOCK, StepFactors};
use crate::backend::cpu::Cpu;
#[cfg(feature = "cuda")]
use crate::backend::cuda::memory::Buffer;
#[cfg(feature = "cuda")]
use crate::backend::cuda::ops::adamw::{Adamw8bit, Adamw32bit, Factors, Group, Tensor, adamw_8bit, adamw_32bit};
use crate::backend::{Adamw, Backend, Moment, NewOptimizer, OptimKind, OptimizerState, ParamGroup, Work};
use crate::bench::kernels::case::Element::{self, Bf16, F32, U8};
#[cfg(feature = "cuda")]
use crate::bench::kernels::case::Way;
use crate::bench::kernels::case::{Arg, Case, CpuLaunch, Expected, Fill, HostBuffer, Scalar, undeclared};
use crate::bench::kernels::models::{Model, R};
use crate::bench::kernels::values::Inputs;
use crate::nf4::codebook::{DYNAMIC, DYNAMIC_UNSIGNED, dynamic_code, dynamic_unsigned_code};

const BETA1: f32 = 0.9;
const BETA2: f32 = 0.999;
const EPS: f32 = 1e-8;
const MAX_GRAD_NORM: f32 = 0.3;
const STEP: u64 = 10;
/// The gradients' norm as the op is told it: clipping takes part.
const NORM: f32 = 1.0;

pub const OPS: &[Op] = &[
    Op {
        name: "adamw_32bit",
        about: "g = clip * grads; m = beta1 m + (1 - beta1) g; v = beta2 v + (1 - beta2) g^2; \
                master = decay master - rate m / (sqrt(v) / bias2_root + eps); lora = master",
        cases: |m, _| vec![in_32_bits(m)],
        has_tokens: false,
        starter: Some(STARTER_32),
    },
    Op {
        name: "adamw_8bit",
        about: "the same with moments value(code) * absmax of their block of 256; \
                codes and absmax are made anew from the new moments",
        cases: |m, _| vec![in_8_bits(m)],
        has_tokens: false,
        starter: Some(STARTER_8),
    },
];

/// Elements of A and B of each projection. With rank 16 each fills whole blocks of 256: block i holds weights 256 i on.
fn tensors(m: &Model) -> Vec<usize> {
    let layer: Vec<usize> =
        m.linears().iter().flat_map(|(_, widths, k)| widths.iter().flat_map(move |n| [R * k, n * R])).collect();
    layer.repeat(m.layers)
}

fn group(p: usize) -> ParamGroup {
    ParamGroup { range: 0..p, lr: 1e-4, weight_decay: 0.01 }
}

fn scalars(sizes: &[(&'static str, usize)], p: usize) -> Vec<(&'static str, Scalar)> {
    let step = StepFactors::new(BETA1, BETA2, STEP);
    let (decay, rate) = step.of_group(&group(p));
    let numbers = [
        ("decay", decay),
        ("rate", rate),
        ("beta1", BETA1),
        ("beta2", BETA2),
        ("eps", EPS),
        ("bias2_root", step.bias2_root),
        ("max_grad_norm", MAX_GRAD_NORM),
    ];
    let sizes = sizes.iter().map(|&(name, size)| (name, Scalar::U64(size as u64)));
    sizes.chain(numbers.map(|(name, number)| (name, Scalar::F32(number)))).collect()
}

/// So many numbers spread over `from * (0, 1]`, of no order.
fn positive(count: usize, from: f32) -> Fill {
    Fill::List((0..count).map(|i| from * ((i * 389) % count + 1) as f32 / count as f32).collect())
}

/// A number, and what f32 arithmetic on the way to it is relative to.
type Found = (f64, f64);

/// m, v and the weight behind the step.
fn step(i: &Inputs, at: usize, m: f64, v: f64) -> [Found; 3] {
    let [decay, rate, beta1, beta2] = ["decay", "rate", "beta1", "beta2"].map(|name| i.scalar(name));
    let clip = (i.scalar("max_grad_norm") / (i.of("norm").at(0) + 1e-6)).min(1.0);
    let g = i.of("grads").at(at) * clip;
    let terms = [beta1 * m, (1.0 - beta1) * g];
    let (m, m_size) = (terms[0] + terms[1], terms[0].abs() + terms[1].abs());
    let v = beta2 * v + (1.0 - beta2) * g * g;
    let root = v.sqrt() / i.scalar("bias2_root") + i.scalar("eps");
    let old = decay * i.of("master").at(at);
    [(m, m_size), (v, v), (old - rate * m / root, old.abs() + rate * m_size / root)]
}

fn rounded((value, size): Found, element: Element) -> Expected {
    Expected::rounded(value, element, size)
}

/// Master weights and gradients, of some shape.
fn shared(dims: &[(&'static str, usize)], cost: usize) -> [Arg; 4] {
    [
        Arg::in_out("master", F32, dims, Fill::Random(0.02), cost),
        Arg::output("lora", Bf16, dims, cost),
        Arg::input("grads", F32, dims, Fill::Random(1e-3)),
        Arg::input("norm", F32, &dims!(E = 1), Fill::Const(NORM)),
    ]
}

/// What a launch needs beside the buffers: one group of weights, and the tensors.
#[cfg(feature = "cuda")]
struct Tables {
    groups: Buffer<Group>,
    tensors: Buffer<Tensor>,
}

/// A way on the buffers and the tables, which `set_up` makes.
#[cfg(feature = "cuda")]
fn way<const N: usize>(
    m: &Model,
    launch: impl Fn(&crate::backend::cuda::Cuda, [&mut super::super::set::Dev; N], &Tables) -> crate::error::Result<()>
    + Send
    + Sync
    + 'static,
) -> Way {
    let (tensors, p) = (tensors(m), m.trainable());
    let own = Way::own(move |cuda, set| {
        let extra = set.extra.take();
        let done = match extra.as_ref().and_then(|extra| extra.downcast_ref::<Tables>()) {
            Some(tables) => launch(cuda, set.all(), tables),
            None => panic!("set_up has not run"),
        };
        set.extra = extra;
        done
    });
    let set_up = move |cuda: &mut crate::backend::cuda::Cuda, set: &mut super::super::set::Set| {
        let (decay, rate) = StepFactors::new(BETA1, BETA2, STEP).of_group(&group(p));
        // Not the trait's upload.
        let cuda = &*cuda;
        let blocks = crate::backend::adamw::Blocks::new(p, &tensors)?;
        let starts = blocks.starts().iter();
        let starts: Vec<_> =
            starts.map(|&(start, block)| Tensor { start: start as u64, block: block as u64 }).collect();
        let groups = cuda.upload(&[Group { start: 0, decay, rate }])?;
        set.extra = Some(Box::new(Tables { groups, tensors: cuda.upload(&starts)? }));
        Ok(())
    };
    Way { set_up: Some(Arc::new(set_up)), ..own }
}

#[cfg(feature = "cuda")]
fn factors<'a>(grads: &'a super::super::set::Dev, norm: &'a super::super::set::Dev, tables: &'a Tables) -> Factors<'a> {
    Factors {
        grads: grads.f32(),
        norm: norm.f32(),
        groups: tables.groups.view(),
        beta1: BETA1,
        beta2: BETA2,
        eps: EPS,
        bias2_root: StepFactors::new(BETA1, BETA2, STEP).bias2_root,
        max_grad_norm: MAX_GRAD_NORM,
    }
}

/// One step of the CPU backend. In tests alone: its state comes and goes by copies, which would be timed too.
fn on_cpu(kind: OptimKind, m: &Model) -> Option<CpuLaunch> {
    let (tensors, groups) = (tensors(m), [group(m.trainable())]);
    let run = move |cpu: &mut Cpu, buffers: &mut [HostBuffer]| {
        use HostBuffer::{F32, U8};
        let (state, rest) = match buffers {
            [F32(master), F32(m), F32(v), rest @ ..] => {
                let (m, v) = (Moment::F32(m.clone()), Moment::F32(v.clone()));
                (OptimizerState { master: master.clone(), m, v }, rest)
            }
            [F32(master), U8(m), U8(v), F32(m_absmax), F32(v_absmax), rest @ ..] => {
                let [m, v] = [(m, m_absmax), (v, v_absmax)]
                    .map(|(codes, absmax)| Moment::U8 { codes: codes.clone(), absmax: absmax.clone() });
                (OptimizerState { master: master.clone(), m, v }, rest)
            }
            _ => undeclared(),
        };
        let [F32(lora), F32(grads), F32(norm), ..] = rest else { undeclared() };
        let mut optimizer = cpu.new_optimizer(NewOptimizer { kind, init: &state.master, tensors: &tensors })?;
        cpu.write_optimizer(&mut optimizer, &state)?;
        cpu.adamw(Adamw {
            state: &mut optimizer,
            lora,
            grads,
            norm,
            groups: &groups,
            beta1: BETA1,
            beta2: BETA2,
            eps: EPS,
            max_grad_norm: MAX_GRAD_NORM,
            step: STEP,
        })?;
        let new = cpu.read_optimizer(&optimizer)?;
        buffers[0] = F32(new.master);
        for (n, moment) in [(1, new.m), (2, new.v)] {
            match moment {
                Moment::F32(values) => buffers[n] = F32(values),
                Moment::U8 { codes, absmax } => (buffers[n], buffers[n + 2]) = (U8(codes), F32(absmax)),
            }
        }
        Ok(())
    };
    if cfg!(test) { Some(Arc::new(run)) } else { None }
}

fn name(m: &Model) -> String {
    format!("{} in {} tensors", m.trainable(), tensors(m).len())
}

fn in_32_bits(m: &Model) -> Case {
    let p = m.trainable();
    let oracle = |i: &Inputs, output: &str, span: Range<usize>| {
        let element = |at: usize| {
            let [m, v, w] = step(i, at, i.of("m").at(at), i.of("v").at(at));
            match output {
                "m" => rounded(m, F32),
                "v" => rounded(v, F32),
                "master" => rounded(w, F32),
                _ => rounded(w, Bf16),
            }
        };
        span.map(element).collect()
    };
    let dims = dims!(P = p);
    let [master, lora, grads, norm] = shared(&dims, 8);
    Case {
        op: "adamw_32bit",
        model: m.name,
        shape: name(m),
        tokens: None,
        args: vec![
            master,
            Arg::in_out("m", F32, &dims, Fill::Random(3e-4), 8),
            Arg::in_out("v", F32, &dims, positive(1009, 1e-7), 8),
            lora,
            grads,
            norm,
        ],
        scalars: scalars(&[("p", p)], p),
        work: Work::adamw(p, 12 * p),
        oracle: Arc::new(oracle),
        #[cfg(feature = "cuda")]
        ways: vec![way(m, move |cuda, [master, m, v, lora, grads, norm], tables| {
            let (master, m, v, lora) = (master.f32_mut(), m.f32_mut(), v.f32_mut(), lora.bf16_mut());
            let factors = factors(grads, norm, tables);
            adamw_32bit(cuda, Adamw32bit { master, m, v, lora, factors, window: 0..p })
        })],
        cpu: on_cpu(OptimKind::PagedAdamw32bit, m),
    }
}

/// What is negative keeps its sign.
fn signed_code(share: f64) -> u8 {
    let code = dynamic_code(share as f32);
    if code == M_ZERO && share < 0.0 { code - 1 } else { code }
}

/// The code of a moment whose block has this absmax. Where f32 arithmetic may leave it on either side of a midpoint of the
/// map, both neighbours are right; elsewhere one is.
fn code_of(code: fn(f64) -> u8, (value, size): Found, absmax: f64) -> Expected {
    // 2^-20 of what arithmetic is relative to, as for all sums; absmax has an error of its own.
    let error = (size + value.abs()) / f64::from(1u32 << 20);
    let [low, high] = [value - error, value + error].map(|value| f64::from(code(value / absmax)));
    Expected { value: (low + high) / 2.0, tolerance: (high - low) / 2.0 }
}

fn in_8_bits(m: &Model) -> Case {
    const BLOCK: usize = MOMENT_BLOCK;
    let p = m.trainable();
    let blocks = p / BLOCK;
    let oracle = |i: &Inputs, output: &str, span: Range<usize>| {
        let moments = |at: usize| {
            let m = f64::from(DYNAMIC[i.of("m").at(at) as usize]) * i.of("m_absmax").at(at / BLOCK);
            let v = f64::from(DYNAMIC_UNSIGNED[i.of("v").at(at) as usize]) * i.of("v_absmax").at(at / BLOCK);
            step(i, at, m, v)
        };
        // The largest of moment number `n` in a block, and what it is relative to.
        let absmax = |block: usize, n: usize| {
            let all = (block * BLOCK..(block + 1) * BLOCK).map(|at| moments(at)[n]);
            all.fold((0f64, 0f64), |(most, size), (x, of)| (most.max(x.abs()), size.max(of)))
        };
        let block = span.start / BLOCK;
        match output {
            "m_absmax" => span.map(|block| rounded(absmax(block, 0), F32)).collect(),
            "v_absmax" => span.map(|block| rounded(absmax(block, 1), F32)).collect(),
            "m" => {
                let most = absmax(block, 0).0;
                span.map(|at| code_of(signed_code, moments(at)[0], most)).collect()
            }
            "v" => {
                let most = absmax(block, 1).0;
                span.map(|at| code_of(|share| dynamic_unsigned_code(share as f32), moments(at)[1], most)).collect()
            }
            _ => {
                let element = if output == "lora" { Bf16 } else { F32 };
                span.map(|at| rounded(moments(at)[2], element)).collect()
            }
        }
    };
    let dims = dims!(B = blocks, E = BLOCK);
    let [master, lora, grads, norm] = shared(&dims, 8);
    // A span makes the moments of its block.
    let cost = 8 * (BLOCK / 32 + 1);
    Case {
        op: "adamw_8bit",
        model: m.name,
        shape: name(m),
        tokens: None,
        args: vec![
            master,
            Arg::in_out("m", U8, &dims, Fill::Bytes, cost),
            Arg::in_out("v", U8, &dims, Fill::Bytes, cost),
            Arg::in_out("m_absmax", F32, &dims!(B = blocks), positive(13, 1e-3), 8 * BLOCK),
            Arg::in_out("v_absmax", F32, &dims!(B = blocks), positive(17, 1e-6), 8 * BLOCK),
            lora,
            grads,
            norm,
            // Values of the codes. Our kernels have them built in.
            Arg::input("m_map", F32, &dims!(E = 256), Fill::List(DYNAMIC.into())),
            Arg::input("v_map", F32, &dims!(E = 256), Fill::List(DYNAMIC_UNSIGNED.into())),
        ],
        scalars: scalars(&[("p", p), ("blocks", blocks)], p),
        work: Work::adamw(p, 6 * p + 8 * blocks),
        oracle: Arc::new(oracle),
        #[cfg(feature = "cuda")]
        ways: vec![way(m, move |cuda, [master, m, v, m_absmax, v_absmax, lora, grads, norm, _, _], tables| {
            let op = Adamw8bit {
                master: master.f32_mut(),
                m: m.u8_mut(),
                v: v.u8_mut(),
                m_absmax: m_absmax.f32_mut(),
                v_absmax: v_absmax.f32_mut(),
                lora: lora.bf16_mut(),
                factors: factors(grads, norm, tables),
                tensors: tables.tensors.view(),
                window: 0..blocks,
            };
            adamw_8bit(cuda, op)
        })],
        cpu: on_cpu(OptimKind::PagedAdamw8bit, m),
    }
}

const STARTER_32: &str = r"// launch: adamw_32bit grid=ceil_div(p,256) block=256
{
  // One thread a weight.
  const unsigned long long i = blockIdx.x * 256ull + threadIdx.x;
  if (i >= p || !isfinite(norm[0])) return;
  const float clip = max_grad_norm > 0.0f ? fminf(max_grad_norm / (norm[0] + 1e-6f), 1.0f) : 1.0f, g = grads[i] * clip;
  m[i] = beta1 * m[i] + (1.0f - beta1) * g;
  v[i] = beta2 * v[i] + (1.0f - beta2) * g * g;
  master[i] = master[i] * decay - rate * (m[i] / (sqrtf(v[i]) / bias2_root + eps));
  lora[i] = __float2bfloat16(master[i]);
}
";

const STARTER_8: &str = r"// launch: adamw_8bit grid=blocks block=256
{
  // One CTA a block, one thread a weight. A code is the number of the map's midpoints below moment / absmax.
  const unsigned long long i = blockIdx.x * 256ull + threadIdx.x;
  if (!isfinite(norm[0])) return;
  const float clip = max_grad_norm > 0.0f ? fminf(max_grad_norm / (norm[0] + 1e-6f), 1.0f) : 1.0f, g = grads[i] * clip;
  const float new_m = beta1 * (m_map[m[i]] * m_absmax[blockIdx.x]) + (1.0f - beta1) * g;
  const float new_v = beta2 * (v_map[v[i]] * v_absmax[blockIdx.x]) + (1.0f - beta2) * g * g;
  master[i] = master[i] * decay - rate * (new_m / (sqrtf(new_v) / bias2_root + eps));
  lora[i] = __float2bfloat16(master[i]);
  __shared__ float largest[2][256];
  largest[0][threadIdx.x] = fabsf(new_m);
  largest[1][threadIdx.x] = new_v;
  __syncthreads();
  for (unsigned n = 128; n > 0; n /= 2) {
    if (threadIdx.x < n)
      for (int x = 0; x < 2; ++x) largest[x][threadIdx.x] = fmaxf(largest[x][threadIdx.x], largest[x][threadIdx.x + n]);
    __syncthreads();
  }
  const float m_share = largest[0][0] > 0.0f ? new_m / largest[0][0] : 0.0f;
  const float v_share = largest[1][0] > 0.0f ? new_v / largest[1][0] : 0.0f;
  int m_code = 0, v_code = 0;
  while (m_code < 255 && m_share > (m_map[m_code] + m_map[m_code + 1]) * 0.5f) ++m_code;
  while (v_code < 255 && v_share > (v_map[v_code] + v_map[v_code + 1]) * 0.5f) ++v_code;
  // What is negative does not become the code of 0, which is 127.
  m[i] = m_code == 127 && m_share < 0.0f ? 126 : m_code;
  v[i] = v_code;
  if (threadIdx.x == 0) m_absmax[blockIdx.x] = largest[0][0], v_absmax[blockIdx.x] = largest[1][0];
}
";
