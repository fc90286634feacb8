//! The linear op as the graph calls it, each way it can run, LoRA and all: what the table of `cuda/linear.rs` goes by.
//! The operations counted are those of the frozen product alone.

use half::bf16;
use halfbyte::Error;
use halfbyte::backend::cuda::{Cuda, LinearKind};
use halfbyte::backend::{Backend, Linear, LinearBackward, LinearForward, Lora, Needs, Projection};
use halfbyte::nf4::{Absmax, BLOCK, NESTED_BLOCK, QuantType, Quantized};
use halfbyte::tensor::{Dtype, HostMatrix};
use libtest_mimic::Trial;

use super::{Bench, C, F, Row, T, bench_with};

/// Widths of the projections that share an x, and K.
const GROUPS: [(&str, &[usize], usize); 4] =
    [("q|k|v", &[C, 1024, 1024], C), ("o", &[C], C), ("gate|up", &[F, F], C), ("down", &[C], F)];
const R: usize = 16;

pub fn trials() -> Vec<Trial> {
    let kinds = [
        ("fused", LinearKind::Fused, &[64, 256, 512, 2048, T][..]),
        ("slice", LinearKind::Slice, &[64, 256, 512, 2048, T]),
        ("slice_cublas", LinearKind::SliceCublas, &[64, 256, 512, 2048, T]),
        ("matvec", LinearKind::Matvec, &[1, 8]),
    ];
    let trial = |(name, kind, tokens)| {
        bench_with(
            &format!("linear_{name}"),
            move |cuda| cuda.with_linear(Some(kind)),
            move |b| {
                // Where there is no cuBLAS there is nothing to time.
                if kind == LinearKind::SliceCublas && !b.cuda.has_cublas() {
                    return Ok(());
                }
                prepare(&mut b.cuda)?;
                GROUPS.into_iter().try_for_each(|(group, widths, k)| run(b, name, group, widths, k, tokens))
            },
        )
    };
    kinds.into_iter().map(trial).collect()
}

fn prepare(cuda: &mut Cuda) -> Result<(), Error> {
    let (n, k) = (2 * F, F);
    let trainable = R * (2 * F + 2 * C);
    cuda.prepare(&Needs {
        t: T,
        c: C,
        v: 8,
        part: F * C,
        group: 2 * F * C,
        n,
        k,
        r: 3 * R,
        trainable,
        heads: None,
        train: true,
        dropout: false,
    })
}

/// Any bytes make a weight: its time does not depend on them.
fn weight(n: usize, k: usize) -> HostMatrix {
    let bytes = |len: usize| (0..len).map(|i| ((i as u32).wrapping_mul(0x9e37_79b9) >> 24) as u8).collect::<Vec<_>>();
    let blocks = (n * k).div_ceil(BLOCK);
    let nested_absmax = vec![0.01; blocks.div_ceil(NESTED_BLOCK)];
    let absmax = Absmax::Double { codes: bytes(blocks), nested_absmax, offset: 0.03 };
    let packed = bytes((n * k).div_ceil(2));
    let (quant_type, shape, source_dtype) = (QuantType::Nf4, vec![n, k], Dtype::Bf16);
    HostMatrix::Quantized(Quantized { quant_type, shape, source_dtype, packed, absmax })
}

fn run(b: &mut Bench, way: &str, group: &str, widths: &[usize], k: usize, tokens: &[usize]) -> Result<(), Error> {
    let (mut at, mut parts) = (0, vec![]);
    for (i, &n) in widths.iter().enumerate() {
        let lora = Lora { a: at, b: at + R * k, r: R, scale: 2.0, site: i as u32 };
        parts.push(Projection { n, w: b.cuda.upload_matrix(&weight(n, k))?, bias: None, lora: Some(lora) });
        at += R * (k + n);
    }
    let (n, r) = (widths.iter().sum::<usize>(), R * widths.len());
    let w = Linear { k, n, r, parts };
    let (x, dy, lora) = (b.activations(T * k, 1.0)?, b.activations(T * n, 0.1)?, b.activations(at, 0.02)?);
    let (mut y, mut dx) = (b.cuda.zeros::<bf16>(T * n)?, b.cuda.zeros::<bf16>(T * k)?);
    let (mut h, mut dh) = (b.cuda.zeros::<bf16>(T * r)?, b.cuda.zeros::<bf16>(T * r)?);
    let mut d_lora = b.cuda.zeros::<f32>(at)?;
    let packed = n * k / 2 + n * k / BLOCK;
    for &t in tokens {
        let shape = format!("{group} {t}x{k} to {n} r=16");
        let (bytes, flops) = (2 * t * (k + n) + packed, 2.0 * (t * n) as f64 * k as f64);
        let row = |op| Row { op, shape: &shape, implementation: way, bytes, flops };
        b.row(row("linear_forward"), |cuda, _| {
            let (y, h) = (&mut y, &mut h);
            cuda.linear_forward(LinearForward { y, h, x: &x, w: &w, lora: Some(&lora), t, dropout: None })
        })?;
        if way == "matvec" {
            continue; // its backward is that of the fused way
        }
        b.row(row("linear_backward"), |cuda, _| {
            let (dx, d_lora, dh) = (Some(&mut dx), &mut d_lora, &mut dh);
            let (dy, x, h) = (&dy, &x, &h);
            cuda.linear_backward(LinearBackward { dx, d_lora, dh, dy, x, h, w: &w, lora: &lora, t, dropout: None })
        })?;
    }
    Ok(())
}
