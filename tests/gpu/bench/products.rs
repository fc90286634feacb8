//! The large products at the shapes of Mistral-7B: gemm, beside cuBLAS where it is there, and nf4_gemm, forward and
//! backward, with LoRA's columns in the same loop; the skinny products of LoRA alone.

use half::bf16;
use halfbyte::Error;
use halfbyte::backend::cuda::memory::Buffer;
use halfbyte::backend::cuda::ops::gemm::{Gemm, Out, Pair, gemm};
use halfbyte::backend::cuda::ops::lora::{
    LoraBackward, LoraBackwardX, LoraForward, LoraPart, lora_backward, lora_backward_x, lora_forward, lora_scratch,
};
use halfbyte::backend::cuda::ops::nf4::Absmax;
use halfbyte::backend::cuda::ops::nf4_gemm::{Direction, Nf4Gemm, Nf4Weight, nf4_gemm};
use halfbyte::nf4::{BLOCK, NESTED_BLOCK, QuantType};
use libtest_mimic::Trial;

use super::{Bench, C, F, Row, T, bench};

/// (N, K) of q|k|v, o, gate|up, down.
const LINEARS: [(usize, usize); 4] = [(6144, C), (C, C), (2 * F, C), (C, F)];
/// The gate alone serves for the smaller ones.
const TOKENS: [usize; 2] = [2048, T];
const FEW_TOKENS: [usize; 4] = [16, 64, 256, 512];
/// Rank of LoRA.
const R: usize = 16;

pub fn trials() -> Vec<Trial> {
    vec![bench("gemm", dense), bench("nf4_gemm", quantized), bench("lora", lora)]
}

/// (N, K) and the numbers of tokens to time it with.
fn shapes() -> impl Iterator<Item = ((usize, usize), &'static [usize])> {
    let many = LINEARS.into_iter().map(|linear| (linear, &TOKENS[..]));
    std::iter::once(((F, C), &FEW_TOKENS[..])).chain(many)
}

fn dense(b: &mut Bench) -> Result<(), Error> {
    for ((n, k), tokens) in shapes() {
        let (x, h) = (b.activations(T * n.max(k), 1.0)?, b.activations(T * R, 1.0)?);
        let (w, lora) = (b.activations(n * k, 0.02)?, b.activations(n.max(k) * R, 0.02)?);
        let mut y = b.cuda.zeros::<bf16>(T * n.max(k))?;
        for &m in tokens {
            // c (m, n) = x (m, k) · Wᵀ and c (m, k) = dy (m, n) · W, with the columns of B or A.
            for (op, b_transposed, cols, depth) in [("gemm forward", true, n, k), ("gemm backward", false, k, n)] {
                let shape = format!("{m}x{cols}x{depth} r=16");
                let bytes = 2 * (m * (cols + depth + R) + n * k + cols * R);
                let row = Row { op, shape: &shape, implementation: "own", bytes, flops: flops(m, cols, depth + R) };
                b.row(row, |cuda, _| {
                    let ldb = if b_transposed { R } else { cols };
                    let g = Gemm {
                        c: Out::Bf16(y.view_mut()),
                        ldc: cols,
                        a: x.view(),
                        lda: depth,
                        b: w.view(),
                        ldb: k,
                        b_transposed,
                        pair: Some(Pair { a: h.view(), lda: R, b: lora.view(), ldb, k: R }),
                        bias: None,
                        alpha: 1.0,
                        accumulate: false,
                        m,
                        n: cols,
                        k: depth,
                    };
                    gemm(cuda, g)
                })?;
            }
            if b.cuda.has_cublas() {
                let (shape, flops) = (format!("{m}x{n}x{k}"), flops(m, n, k));
                let bytes = 2 * (m * (n + k) + n * k);
                let row = Row { op: "gemm forward", shape: &shape, implementation: "cublas", bytes, flops };
                b.row_of(row, |cuda| Ok(flops / cuda.gemm_rate(m, n, k)?))?;
            }
        }
    }
    Ok(())
}

fn flops(m: usize, n: usize, k: usize) -> f64 {
    2.0 * (m * n) as f64 * k as f64
}

/// A weight (n, k) in 4 bits, double-quantised.
pub struct Quantized {
    packed: Buffer<u8>,
    codes: Buffer<u8>,
    nested_absmax: Buffer<f32>,
    offset: Buffer<f32>,
    n: usize,
    k: usize,
}

impl Quantized {
    pub fn new(b: &Bench, n: usize, k: usize) -> Result<Self, Error> {
        let blocks = (n * k).div_ceil(BLOCK);
        Ok(Self {
            packed: b.bytes((n * k).div_ceil(2))?,
            codes: b.bytes(blocks)?,
            nested_absmax: b.cuda.upload(&vec![0.01f32; blocks.div_ceil(NESTED_BLOCK)])?,
            offset: b.cuda.upload(&[0.03f32])?,
            n,
            k,
        })
    }

    pub fn view(&self) -> Nf4Weight<'_> {
        let (codes, nested_absmax, offset) = (self.codes.view(), self.nested_absmax.view(), self.offset.view());
        let absmax = Absmax::Double { codes, nested_absmax, offset };
        Nf4Weight { packed: self.packed.view(), absmax, quant_type: QuantType::Nf4, n: self.n, k: self.k }
    }

    pub fn bytes(&self) -> usize {
        self.packed.len() + self.codes.len() + 4 * self.nested_absmax.len()
    }
}

fn quantized(b: &mut Bench) -> Result<(), Error> {
    for ((n, k), tokens) in shapes() {
        let w = Quantized::new(b, n, k)?;
        let (x, h) = (b.activations(T * n.max(k), 1.0)?, b.activations(T * R, 1.0)?);
        let lora = b.activations(n.max(k) * R, 0.02)?;
        let mut y = b.cuda.zeros::<bf16>(T * n.max(k))?;
        for &m in tokens {
            let ways =
                [("nf4_gemm forward", Direction::Forward, n, k), ("nf4_gemm backward", Direction::Backward, k, n)];
            for (op, direction, cols, depth) in ways {
                let shape = format!("{m}x{cols}x{depth} r=16");
                let bytes = 2 * m * (cols + depth + R) + w.bytes() + 2 * cols * R;
                let row = Row { op, shape: &shape, implementation: "own", bytes, flops: flops(m, cols, depth + R) };
                b.row(row, |cuda, _| {
                    // B (n, r) forward, A (r, k) backward.
                    let ldb = if direction == Direction::Forward { R } else { cols };
                    let g = Nf4Gemm {
                        c: y.view_mut(),
                        ldc: cols,
                        a: x.view(),
                        lda: depth,
                        w: w.view(),
                        direction,
                        pair: Some(Pair { a: h.view(), lda: R, b: lora.view(), ldb, k: R }),
                        bias: None,
                        accumulate: false,
                        m,
                    };
                    nf4_gemm(cuda, g)
                })?;
            }
        }
    }
    Ok(())
}

/// The parts of a group, laid one behind another in the flat vector: A, then B, of each.
fn parts(widths: &[usize], k: usize) -> (Vec<LoraPart>, usize) {
    let (mut at, mut y, mut parts) = (0, 0, vec![]);
    for (i, &n) in widths.iter().enumerate() {
        parts.push(LoraPart { a: at, b: at + R * k, r: R, scale: 2.0, site: i as u32, y, n, h: i * R });
        at += R * (k + n);
        y += n;
    }
    (parts, at)
}

fn lora(b: &mut Bench) -> Result<(), Error> {
    let groups: [(&str, &[usize], usize); 4] =
        [("q|k|v", &[C, 1024, 1024], C), ("o", &[C], C), ("gate|up", &[F, F], C), ("down", &[C], F)];
    for (name, widths, k) in groups {
        let (parts, p) = parts(widths, k);
        let (t, n, r) = (T, widths.iter().sum::<usize>(), R * widths.len());
        let (x, dy, lora) = (b.activations(t * k, 1.0)?, b.activations(t * n, 0.1)?, b.activations(p, 0.02)?);
        let (mut h, mut dh) = (b.cuda.zeros::<bf16>(t * r)?, b.cuda.zeros::<bf16>(t * r)?);
        let (mut dx, mut d_lora) = (b.cuda.zeros::<bf16>(t * k)?, b.cuda.zeros::<f32>(p)?);
        let mut scratch = b.cuda.zeros::<f32>(lora_scratch(t, k, n, r))?;
        let shape = format!("{name} {t}x{k} to {n} r=16");
        let row = |op, bytes, flops| Row { op, shape: &shape, implementation: "own", bytes, flops };
        b.row(row("lora_forward", 2 * t * (k + r) + 2 * r * k, 0.0), |cuda, _| {
            let (h, x, lora, scratch) = (h.view_mut(), x.view(), lora.view(), scratch.view_mut());
            lora_forward(cuda, LoraForward { h, x, lora, parts: &parts, t, k, r, dropout: None, scratch })
        })?;
        b.row(row("lora_backward", 2 * t * (k + n + 2 * r) + 12 * p, 0.0), |cuda, _| {
            let op = LoraBackward {
                dh: dh.view_mut(),
                d_lora: d_lora.view_mut(),
                dy: dy.view(),
                x: x.view(),
                h: h.view(),
                lora: lora.view(),
                parts: &parts,
                t,
                k,
                n,
                r,
                dropout: None,
                scratch: scratch.view_mut(),
            };
            lora_backward(cuda, op)
        })?;
        b.row(row("lora_backward_x", 4 * t * k + 2 * t * r + 2 * r * k, 0.0), |cuda, _| {
            let (dx, dh, lora) = (dx.view_mut(), dh.view(), lora.view());
            lora_backward_x(cuda, LoraBackwardX { dx, dh, lora, parts: &parts, t, k, r, dropout: None })
        })?;
    }
    Ok(())
}
