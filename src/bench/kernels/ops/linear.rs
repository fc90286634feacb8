//! The linear op as the graph calls it, LoRA and all: the projections that share an x, each way that it can run.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use half::bf16;

use super::Op;
#[cfg(feature = "cuda")]
use super::linear_cuda::{backward_ways, forward_ways};
use crate::backend::cpu::Cpu;
use crate::backend::{Backend, Linear, LinearBackward, LinearForward, Lora, Projection};
use crate::bench::kernels::case::Element::{Bf16, F32, U8};
use crate::bench::kernels::case::{Arg, Case, CpuLaunch, Expected, Fill, HostBuffer, Scalar};
use crate::bench::kernels::models::{Model, R};
use crate::bench::kernels::values::Inputs;
use crate::error::{Error, Result};
use crate::nf4::codebook::{DYNAMIC, NF4};
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

/// Projections side by side: width, first column of y, first column of h, offsets of A and B in the flat vector.
#[derive(Clone, Copy, Debug)]
pub(super) struct Part {
    pub n: usize,
    pub y: usize,
    pub h: usize,
    pub a: usize,
    pub b: usize,
}

/// The parts, their N together, and the length of the flat vector.
pub(super) fn parts(widths: &[usize], k: usize) -> (Vec<Part>, usize, usize) {
    let (mut parts, mut y, mut at) = (vec![], 0, 0);
    for (i, &n) in widths.iter().enumerate() {
        parts.push(Part { n, y, h: i * R, a: at, b: at + R * k });
        y += n;
        at += R * (k + n);
    }
    (parts, y, at)
}

/// dy repeats after so many rows, a prime: no tile does.
const ROWS: usize = 61;

/// Bytes of a weight (N, K) with its constants.
fn packed_bytes(n: usize, k: usize) -> usize {
    n * k / 2 + n * k / BLOCK + 4 * (n * k).div_ceil(BLOCK * NESTED_BLOCK)
}

/// The weight of all parts below each other, and the adapter. LoRA's scale is 1.
fn weights(n: usize, k: usize, p: usize) -> Vec<Arg> {
    let blocks = n * k / BLOCK;
    vec![
        Arg::input("lora", Bf16, &dims!(P = p), Fill::Random(0.02)),
        Arg::input("packed", U8, &dims!(bytes = n * k / 2), Fill::Bytes),
        Arg::input("codes", U8, &dims!(blocks = blocks), Fill::Bytes),
        Arg::input("nested_absmax", F32, &dims!(nested = blocks.div_ceil(NESTED_BLOCK)), Fill::Const(0.01)),
        Arg::input("offset", F32, &dims!(one = 1), Fill::Const(0.03)),
    ]
}

/// Element `at` of the flattened weight, as it is dequantised to bf16.
fn weight(i: &Weight, at: usize) -> f64 {
    let byte = i.packed.at(at / 2) as usize;
    let code = if at.is_multiple_of(2) { byte >> 4 } else { byte & 15 };
    // A rounded product and a rounded sum, in f32.
    let absmax = DYNAMIC[i.codes.at(at / BLOCK) as usize] * i.nested + i.offset;
    f64::from(bf16::from_f32(NF4[code] * absmax).to_f32())
}

struct Weight<'a> {
    packed: &'a super::super::values::Column,
    codes: &'a super::super::values::Column,
    nested: f32,
    offset: f32,
}

impl<'a> Weight<'a> {
    fn of(i: &'a Inputs) -> Self {
        let (nested, offset) = (i.of("nested_absmax").at(0) as f32, i.of("offset").at(0) as f32);
        Self { packed: i.of("packed"), codes: i.of("codes"), nested, offset }
    }
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
        let (x, lora, w) = (i.of("x"), i.of("lora"), Weight::of(i));
        let width = if output == "h" { r } else { n };
        let row = span.start / width;
        // Value and sum of absolute terms of h at a column.
        let h = |column: usize| {
            let a = all[column / R].a + column % R * k;
            let terms = (0..k).map(|j| x.at(row * k + j) * lora.at(a + j));
            terms.fold((0.0, 0.0), |(sum, all), v| (sum + v, all + v.abs()))
        };
        if output == "h" {
            return span.map(|at| h(at % r)).map(|(v, all)| Expected::rounded(v, Bf16, all)).collect();
        }
        let mut hs = vec![None; r];
        let element = |column: usize| {
            let part = all.iter().rfind(|part| part.y <= column).copied().unwrap_or(all[0]);
            let products = (0..k).map(|j| x.at(row * k + j) * weight(&w, column * k + j));
            // The matrix-vector kernel does not round the weights.
            let (mut value, mut magnitude, mut error) = sum(products, 1.0 / 512.0);
            for j in 0..R {
                let (h, _) = *hs[part.h + j].get_or_insert_with(|| h(part.h + j));
                let term = round(h) * lora.at(part.b + (column - part.y) * R + j);
                // h may be rounded the other way.
                (value, magnitude, error) = (value + term, magnitude + term.abs(), error + term.abs() / 128.0);
            }
            // Where cuBLAS adds to what LoRA has left in bf16, that was rounded once more.
            Expected::rounded(value, Bf16, magnitude).with_error(error)
        };
        span.map(|at| at % n).map(element).collect()
    };
    let lora_flops = 2.0 * t as f64 * (r * k + R * n) as f64;
    Case {
        op: "linear_forward",
        model: m.name,
        shape: format!("{group} {t}x{k} to {n} r=16"),
        tokens: Some(t),
        args,
        scalars: sizes(t, k, n),
        bytes: (2 * t * (k + n) + packed_bytes(n, k) + 2 * p) as f64,
        flops: 2.0 * (t * n) as f64 * k as f64 + lora_flops,
        oracle: Arc::new(oracle),
        #[cfg(feature = "cuda")]
        ways: forward_ways(t, k, n, &parts),
        cpu: Some(cpu_forward(t, k, n, &parts)),
    }
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
        let (dy, x, h, lora, w) = (i.of("dy"), i.of("x"), i.of("h"), i.of("lora"), Weight::of(i));
        let dh = |row: usize, column: usize| {
            let part = &all[column / R];
            let terms = (0..part.n).map(|j| dy.at(row * n + part.y + j) * lora.at(part.b + j * R + column % R));
            terms.fold((0.0, 0.0), |(sum, all), v| (sum + v, all + v.abs()))
        };
        match output {
            "dh" => span.map(|at| dh(at / r, at % r)).map(|(v, all)| Expected::rounded(v, Bf16, all)).collect(),
            "d_lora" => {
                // dh repeats with dy.
                let mut rows: Vec<Option<Vec<f64>>> = vec![None; r];
                let of_a = |at: usize, rows: &mut Vec<Option<Vec<f64>>>, part: &Part| {
                    let (column, j) = (part.h + (at - part.a) / k, (at - part.a) % k);
                    let dh = rows[column]
                        .get_or_insert_with(|| (0..ROWS.min(t)).map(|row| round(dh(row, column).0)).collect());
                    sum((0..t).map(|row| dh[row % ROWS] * x.at(row * k + j)), 1.0 / 128.0)
                };
                let of_b = |at: usize, part: &Part| {
                    let (j, column) = ((at - part.b) / R, part.h + (at - part.b) % R);
                    sum((0..t).map(|row| dy.at(row * n + part.y + j) * h.at(row * r + column)), 0.0)
                };
                let before = i.of("d_lora");
                span.map(|at| {
                    let part = all.iter().rfind(|part| part.a <= at).unwrap_or(&all[0]);
                    let (value, magnitude, error) =
                        if at < part.b { of_a(at, &mut rows, part) } else { of_b(at, part) };
                    Expected::rounded(before.at(at) + value, F32, magnitude + before.at(at).abs()).with_error(error)
                })
                .collect()
            }
            _ => {
                let row = span.start / k;
                let dhs: Vec<f64> = (0..r).map(|column| round(dh(row, column).0)).collect();
                let element = |j: usize| {
                    let (mut value, mut magnitude, mut error) = (0.0, 0.0, 0.0);
                    for part in &all {
                        let products = (part.y..part.y + part.n)
                            .map(|column| dy.at(row * n + column) * weight(&w, column * k + j));
                        // Not every way rounds the weights.
                        let (mut own, terms, inexact) = sum(products, 1.0 / 512.0);
                        (magnitude, error) = (magnitude + terms, error + inexact);
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
    let lora_flops = 4.0 * t as f64 * (r * k + R * n) as f64;
    Case {
        op: "linear_backward",
        model: m.name,
        shape: format!("{group} {t}x{k} to {n} r=16"),
        tokens: Some(t),
        args,
        scalars: sizes(t, k, n),
        bytes: (2 * t * (2 * k + n + 2 * r) + packed_bytes(n, k) + 2 * p + 8 * p) as f64,
        flops: 2.0 * (t * n) as f64 * k as f64 + lora_flops,
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
        let [F32(y), F32(h), F32(x), F32(lora), ..] = buffers else { return Ok(()) };
        cpu.linear_forward(LinearForward { y, h, x, w, lora: Some(lora), t, dropout: None })
    })
}

fn cpu_backward(t: usize, k: usize, n: usize, parts: &[Part]) -> CpuLaunch {
    use HostBuffer::F32;
    with_linear((k, n), parts, 7, move |cpu, w, buffers| {
        let [F32(dx), F32(dh), F32(d_lora), F32(dy), F32(x), F32(h), F32(lora), ..] = buffers else { return Ok(()) };
        let dx = Some(dx);
        cpu.linear_backward(LinearBackward { dx, d_lora, dh, dy, x, h, w, lora, t, dropout: None })
    })
}

/// A sum, that of the absolute terms, and what `relative` errors of the terms, independent of each other, may come to.
fn sum(terms: impl Iterator<Item = f64>, relative: f64) -> (f64, f64, f64) {
    let (sum, all, squares) =
        terms.fold((0.0, 0.0, 0.0), |(sum, all, squares), v| (sum + v, all + v.abs(), squares + v * v));
    (sum, all, 4.0 * relative * squares.sqrt())
}
