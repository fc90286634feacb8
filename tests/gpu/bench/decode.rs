//! What a generated token costs: matvec on the weights of Mistral-7B, and attention over a cache. Four sets of buffers take
//! turns, so that weights and cache come from memory.

use half::bf16;
use halfbyte::Error;
use halfbyte::backend::Heads;
use halfbyte::backend::cuda::ops::decode::{
    AttentionDecode, Matvec, Weight, attention_decode, attention_decode_scratch, matvec,
};
use halfbyte::backend::cuda::ops::gemm::Out;
use libtest_mimic::Trial;

use super::products::Quantized;
use super::{Bench, C, F, Row, V, bench};

const SETS: usize = 4;
const R: usize = 16;
const HEADS: Heads = Heads { h: 32, g: 8, d: 128, window: None };

pub fn trials() -> Vec<Trial> {
    vec![bench("matvec", quantized), bench("matvec_head", head), bench("attention_decode", attention)]
}

fn quantized(b: &mut Bench) -> Result<(), Error> {
    for (n, k) in [(6144, C), (C, C), (F, C), (C, F)] {
        let weights = (0..SETS).map(|_| Quantized::new(b, n, k)).collect::<Result<Vec<_>, _>>()?;
        let (x, h, lora) = (b.activations(8 * k, 1.0)?, b.activations(8 * R, 1.0)?, b.activations(n * R, 0.02)?);
        let mut y = b.cuda.zeros::<bf16>(8 * n)?;
        for t in [1, 2, 4, 8] {
            let shape = format!("{t}x{n}x{k} nf4 r=16");
            let bytes = weights[0].bytes() + 2 * t * (n + k) + 2 * n * R;
            b.row(Row { op: "matvec", shape: &shape, implementation: "own", bytes, flops: 0.0 }, |cuda, i| {
                let (y, w) = (Out::Bf16(y.view_mut()), Weight::Nf4(weights[i % SETS].view()));
                let h = Some((h.view(), R, lora.view(), R));
                matvec(cuda, Matvec { y, ldy: n, x: x.view(), w, h, bias: None, t })
            })?;
        }
    }
    Ok(())
}

/// lm_head: larger than the cache by itself.
fn head(b: &mut Bench) -> Result<(), Error> {
    let (n, k) = (V, C);
    let (w, x, mut y) = (b.activations(n * k, 0.02)?, b.activations(k, 1.0)?, b.cuda.zeros::<f32>(n)?);
    let row = Row { op: "matvec", shape: "1x32000x4096 bf16", implementation: "own", bytes: 2 * n * k, flops: 0.0 };
    b.row(row, |cuda, _| {
        let (y, w) = (Out::F32(y.view_mut()), Weight::Bf16 { w: w.view(), n, k });
        matvec(cuda, Matvec { y, ldy: n, x: x.view(), w, h: None, bias: None, t: 1 })
    })
}

fn attention(b: &mut Bench) -> Result<(), Error> {
    let (t, heads, capacity) = (1, HEADS, 8192);
    let width = heads.g * heads.d;
    let mut cache = vec![];
    for _ in 0..SETS {
        cache.push((b.activations(capacity * width, 1.0)?, b.activations(capacity * width, 1.0)?));
    }
    let qkv = b.activations(heads.qkv(), 1.0)?;
    let mut o = b.cuda.zeros::<bf16>(heads.h * heads.d)?;
    let mut scratch = b.cuda.zeros::<f32>(attention_decode_scratch(t, heads))?;
    for past in [512, 2048, capacity] {
        let positions = b.cuda.upload(&[past as i32 - 1])?;
        let (shape, bytes) = (format!("1 over {past} heads 32:8:128"), 4 * past * width);
        b.row(Row { op: "attention_decode", shape: &shape, implementation: "own", bytes, flops: 0.0 }, |cuda, i| {
            let (k, v) = &mut cache[i % SETS];
            let op = AttentionDecode {
                o: o.view_mut(),
                k: k.view_mut(),
                v: v.view_mut(),
                qkv: qkv.view(),
                positions: positions.view(),
                t,
                capacity,
                heads,
                scratch: scratch.view_mut(),
            };
            attention_decode(cuda, op)
        })?;
    }
    Ok(())
}
