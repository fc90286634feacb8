//! The linear op as the graph calls it, LoRA and all: the projections that share an x, each way that it can run.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use half::bf16;

use super::Op;
#[cfg(feature = "cuda")]
use super::linear_cuda::{backward_ways, forward_ways};
use super::lora::{Part, part_of, parts};
use super::nf4::{Decoder, weight_args, weight_bytes};
use super::sums::Terms;
use crate::backend::cpu::Cpu;
use crate::backend::{Backend, Linear, LinearBackward, LinearForward, LinearSize, Lora, Projection, Work};
use crate::bench::kernels::case::Element::{Bf16, F32};
use crate::bench::kernels::case::{Arg, Case, CpuLaunch, Expected, Fill, HostBuffer, Scalar, undeclared};
use crate::bench::kernels::models::{Model, R};
use crate::bench::kernels::values::Inputs;
use crate::error::{Error, Result};
use crate::nf4::{Absmax, BLOCK, NESTED_BLOCK, QuantType, Quantized};
use crate::tensor::{Dtype, HostMatrix};

pub const OPS: &[Op] = &[
    Op {
        name: "linear_forward",
        about: "h = x At, y = x Wt + h Bt: NF4 projections with LoRA that share x, side by side",
        cases: |m, t| m.linears().iter().map(|(name, widths, k)| forward(m, name, widths, *k, t)).collect(),
        has_tokens: true,
        starter: None,
    },
    Op {
        name: "linear_backward",
        about: "dh = dy B, dB += dyt h, dA += dht x, dx = dy W + dh A, of all projections that share x",
        cases: |m, t| m.linears().iter().map(|(name, widths, k)| backward(m, name, widths, *k, t)).collect(),
        has_tokens: true,
        starter: None,
    },
];

/// dy repeats after so many rows, a prime: no tile does.
const ROWS: usize = 61;

/// The adapter, and the weight of all parts below each other. LoRA's scale is 1.
fn weights(n: usize, k: usize, p: usize) -> impl Iterator<Item = Arg> {
    let lora = Arg::input("lora", Bf16, &dims!(P = p), Fill::Random(0.02));
    // No candidate races here: the code book stays away.
    [lora].into_iter().chain(weight_args((n, k)).into_iter().take(4))
}

fn round(value: f64) -> f64 {
    f64::from(bf16::from_f64(value).to_f32())
}

fn forward(m: &Model, group: &'static str, widths: &[usize], k: usize, t: usize) -> Case {
    let (parts, n, p) = parts(widths, k);
    let r = R * parts.len();
    let mut args = vec![
        Arg::output("y", Bf16, &dims!(T = t, N = n), 2 * k),
        Arg::output("h", Bf16, &dims!(T = t, R = r), k),
        Arg::input("x", Bf16, &dims!(T = t, K = k), Fill::Random(1.0)),
    ];
    args.extend(weights(n, k, p));
    let all = parts.clone();
    let oracle = move |i: &Inputs, output: &str, span: Range<usize>| {
        let (x, lora, w) = (i.of("x"), i.of("lora"), Decoder::new(i));
        let width = if output == "h" { r } else { n };
        let row = span.start / width;
        let h = |column: usize| -> Terms {
            let a = all[column / R].a + column % R * k;
            (0..k).map(|j| x.at(row * k + j) * lora.at(a + j)).collect()
        };
        if output == "h" {
            return span.map(|at| h(at % r).expected(Bf16)).collect();
        }
        let mut hs = vec![None; r];
        let element = |column: usize| {
            let part = all.iter().rfind(|part| part.y <= column).copied().unwrap_or(all[0]);
            let weights = w.rounded(column * k..(column + 1) * k).into_iter();
            let products: Terms = weights.enumerate().map(|(j, w)| x.at(row * k + j) * w).collect();
            // The matrix-vector kernel does not round the weights.
            let (mut value, mut magnitude, mut error) = (products.sum, products.magnitude, products.error(0.5));
            for j in 0..R {
                let h = *hs[part.h + j].get_or_insert_with(|| h(part.h + j).sum);
                let term = round(h) * lora.at(part.b + (column - part.y) * R + j);
                // h may be rounded the other way.
                (value, magnitude, error) = (value + term, magnitude + term.abs(), error + term.abs() / 128.0);
            }
            // Where cuBLAS adds to what LoRA has left in bf16, that was rounded once more.
            Expected::rounded(value, Bf16, magnitude).with_error(error)
        };
        span.map(|at| at % n).map(element).collect()
    };
    Case {
        op: "linear_forward",
        model: m.name,
        shape: format!("{group} {t}x{k} to {n} r=16"),
        tokens: Some(t),
        args,
        scalars: sizes(t, k, n),
        work: Work::linear_forward(size(t, k, n, r)),
        oracle: Arc::new(oracle),
        #[cfg(feature = "cuda")]
        ways: forward_ways(t, k, n, &parts),
        cpu: Some(cpu_forward(t, k, n, &parts)),
    }
}

fn size(t: usize, k: usize, n: usize, r: usize) -> LinearSize {
    LinearSize { t, n, k, r, b: n * R, weights: weight_bytes((n, k)) }
}

fn sizes(t: usize, k: usize, n: usize) -> Vec<(&'static str, Scalar)> {
    vec![("t", Scalar::U64(t as u64)), ("k", Scalar::U64(k as u64)), ("n", Scalar::U64(n as u64))]
}

fn backward(m: &Model, group: &'static str, widths: &[usize], k: usize, t: usize) -> Case {
    let (parts, n, p) = parts(widths, k);
    let r = R * parts.len();
    let widest = widths.iter().copied().max().unwrap_or(0);
    let mut args = vec![
        Arg::output("dx", Bf16, &dims!(T = t, K = k), 4 * n),
        Arg::output("dh", Bf16, &dims!(T = t, R = r), widest),
        Arg::in_out("d_lora", F32, &dims!(P = p), Fill::Random(1e-3), 2 * t + ROWS * widest / 32),
        Arg::input("dy", Bf16, &dims!(T = t, N = n), Fill::Periodic(0.1, ROWS * n)),
        Arg::input("x", Bf16, &dims!(T = t, K = k), Fill::Random(1.0)),
        Arg::input("h", Bf16, &dims!(T = t, R = r), Fill::Random(1.0)),
    ];
    args.extend(weights(n, k, p));
    let all = parts.clone();
    let oracle = move |i: &Inputs, output: &str, span: Range<usize>| {
        let (dy, x, h, lora, w) = (i.of("dy"), i.of("x"), i.of("h"), i.of("lora"), Decoder::new(i));
        let dh = |row: usize, column: usize| -> Terms {
            let part = &all[column / R];
            (0..part.n).map(|j| dy.at(row * n + part.y + j) * lora.at(part.b + j * R + column % R)).collect()
        };
        match output {
            "dh" => span.map(|at| dh(at / r, at % r).expected(Bf16)).collect(),
            "d_lora" => {
                // dh repeats with dy.
                let mut rows: Vec<Option<Vec<f64>>> = vec![None; r];
                let mut of_a = |at: usize, part: Part| {
                    let (column, j) = (part.h + (at - part.a) / k, (at - part.a) % k);
                    let dh = rows[column]
                        .get_or_insert_with(|| (0..ROWS.min(t)).map(|row| round(dh(row, column).sum)).collect());
                    let terms: Terms = (0..t).map(|row| dh[row % ROWS] * x.at(row * k + j)).collect();
                    // dh may be rounded the other way.
                    (terms, terms.error(2.0))
                };
                let of_b = |at: usize, part: Part| {
                    let (j, column) = ((at - part.b) / R, part.h + (at - part.b) % R);
                    let terms: Terms = (0..t).map(|row| dy.at(row * n + part.y + j) * h.at(row * r + column)).collect();
                    (terms, 0.0)
                };
                let before = i.of("d_lora");
                span.map(|at| {
                    let part = part_of(&all, at);
                    let (mut terms, error) = if at < part.b { of_a(at, part) } else { of_b(at, part) };
                    terms.add(before.at(at));
                    terms.expected(F32).with_error(error)
                })
                .collect()
            }
            _ => {
                let row = span.start / k;
                let dhs: Vec<f64> = (0..r).map(|column| round(dh(row, column).sum)).collect();
                let element = |j: usize| {
                    let (mut value, mut magnitude, mut error) = (0.0, 0.0, 0.0);
                    for part in &all {
                        let weight = |column: usize| w.rounded(column * k + j..column * k + j + 1)[0];
                        let products: Terms =
                            (part.y..part.y + part.n).map(|column| dy.at(row * n + column) * weight(column)).collect();
                        // Not every way rounds the weights.
                        let mut own = products.sum;
                        (magnitude, error) = (magnitude + products.magnitude, error + products.error(0.5));
                        // dh may be rounded the other way.
                        for a in 0..R {
                            let term = dhs[part.h + a] * lora.at(part.a + a * k + j);
                            (own, magnitude, error) = (own + term, magnitude + term.abs(), error + term.abs() / 128.0);
                        }
                        // Parts add to one output, which is bf16 in between.
                        value += own;
                        error += (value.abs() + own.abs()) / 256.0;
                    }
                    Expected::rounded(value, Bf16, magnitude).with_error(error)
                };
                span.map(|at| at % k).map(element).collect()
            }
        }
    };
    Case {
        op: "linear_backward",
        model: m.name,
        shape: format!("{group} {t}x{k} to {n} r=16"),
        tokens: Some(t),
        args,
        scalars: sizes(t, k, n),
        work: Work::linear_backward(size(t, k, n, r), true),
        oracle: Arc::new(oracle),
        #[cfg(feature = "cuda")]
        ways: backward_ways(t, k, n, &parts),
        cpu: Some(cpu_backward(t, k, n, &parts)),
    }
}

/// The parts as matrices of the CPU backend, and the adapter.
fn host_linear(cpu: &mut Cpu, weights: &[HostBuffer], parts: &[Part], k: usize, n: usize) -> Result<Linear<Cpu>> {
    let [HostBuffer::U8(packed), HostBuffer::U8(codes), HostBuffer::F32(nested), HostBuffer::F32(offset)] = weights
    else {
        return Err(Error::Shape { op: "linear", argument: "weights", found: weights.len(), expected: 4 });
    };
    let mut projections = vec![];
    for (i, part) in parts.iter().enumerate() {
        let (start, len) = (part.y * k, part.n * k);
        let absmax = Absmax::Double {
            codes: codes[start / BLOCK..(start + len) / BLOCK].to_vec(),
            nested_absmax: nested[..(len / BLOCK).div_ceil(NESTED_BLOCK)].to_vec(),
            offset: offset[0],
        };
        let packed = packed[start / 2..(start + len) / 2].to_vec();
        let (quant_type, shape, source_dtype) = (QuantType::Nf4, vec![part.n, k], Dtype::Bf16);
        let w = cpu.upload(&HostMatrix::Quantized(Quantized { quant_type, shape, source_dtype, packed, absmax }))?;
        let lora = Lora { a: part.a, b: part.b, r: R, scale: 1.0, site: i as u32 };
        projections.push(Projection { n: part.n, w, bias: None, lora: Some(lora) });
    }
    Ok(Linear { k, n, r: R * parts.len(), parts: projections })
}

/// `f` with the linear, which is made at the first call: before the clock runs.
fn with_linear(
    t: (usize, usize),
    parts: &[Part],
    at: usize,
    f: impl Fn(&mut Cpu, &Linear<Cpu>, &mut [HostBuffer]) -> Result<()> + Send + Sync + 'static,
) -> CpuLaunch {
    let (parts, (k, n), made) = (parts.to_vec(), t, Mutex::new(None));
    Arc::new(move |cpu: &mut Cpu, buffers: &mut [HostBuffer]| {
        let mut made = made.lock().unwrap_or_else(PoisonError::into_inner);
        let w = match made.take() {
            Some(w) => w,
            None => host_linear(cpu, &buffers[at..], &parts, k, n)?,
        };
        let done = f(cpu, &w, buffers);
        *made = Some(w);
        done
    })
}

fn cpu_forward(t: usize, k: usize, n: usize, parts: &[Part]) -> CpuLaunch {
    use HostBuffer::F32;
    with_linear((k, n), parts, 4, move |cpu, w, buffers| {
        let [F32(y), F32(h), F32(x), F32(lora), ..] = buffers else { undeclared() };
        cpu.linear_forward(LinearForward { y, h, x, w, lora: Some(lora), t, dropout: None })
    })
}

fn cpu_backward(t: usize, k: usize, n: usize, parts: &[Part]) -> CpuLaunch {
    use HostBuffer::F32;
    with_linear((k, n), parts, 7, move |cpu, w, buffers| {
        let [F32(dx), F32(dh), F32(d_lora), F32(dy), F32(x), F32(h), F32(lora), ..] = buffers else { undeclared() };
        let dx = Some(dx);
        cpu.linear_backward(LinearBackward { dx, d_lora, dh, dy, x, h, w, lora, t, dropout: None })
    })
}
