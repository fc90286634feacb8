//! The ops of csrc/decode.cu against loops in f64 written here.

use half::bf16;
use halfbyte::Error;
use halfbyte::backend::Heads;
use halfbyte::backend::cuda::Cuda;
use halfbyte::backend::cuda::memory::Buffer;
use halfbyte::backend::cuda::ops::decode::{self as ops, AttentionDecode, Matvec, MatvecGroup, MatvecPart, Weight};
use halfbyte::backend::cuda::ops::gemm::Out;
use halfbyte::backend::cuda::ops::nf4::{self, Nf4Weight};
use halfbyte::nf4::{Absmax, QuantType, Quantized, quantize};
use halfbyte::tensor::HostTensor;
use libtest_mimic::Trial;

use crate::support::{Outcome, Random, poisoned, same, wide, within_twice};

/// Kinds of weight: the 4-bit ones name the code book and whether the absmax is quantised again.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Bf16,
    Bits4(QuantType, bool),
}

/// (T, N, K, R; 0: no LoRA)
const SHAPES: &[(usize, usize, usize, usize)] = &[
    (1, 64, 256, 16),
    (1, 1, 64, 1),
    (8, 40, 320, 17),
    (3, 33, 1088, 0),
    (5, 17, 64, 200),
    (7, 4500, 64, 0),
    (2, 19, 72, 3),
    (8, 21, 51, 16),
    (1, 1000, 4096, 16),
    (4, 96, 14_336, 32),
];

/// (past, T, capacity, H, G, D, window)
type Attention = (usize, usize, usize, usize, usize, usize, Option<usize>);
const ATTENTION: &[Attention] = &[
    (0, 1, 8, 2, 1, 16, None),
    (5, 1, 64, 4, 4, 64, None),
    (100, 1, 200, 32, 8, 128, None),
    (2100, 1, 2200, 8, 1, 64, None),
    (4000, 1, 4096, 4, 1, 128, None),
    (300, 1, 301, 20, 1, 96, None),
    (700, 1, 1000, 34, 1, 256, None),
    (60, 3, 80, 4, 2, 80, None),
    (40, 9, 64, 4, 2, 256, None),
    (0, 130, 130, 4, 2, 64, None),
    (200, 1, 300, 4, 2, 64, Some(33)),
    (130, 5, 140, 4, 2, 128, Some(50)),
    (64, 1, 65, 4, 1, 128, Some(1)),
    (33, 1, 40, 3, 1, 20, None),
];

pub fn trials() -> Vec<Trial> {
    let mut trials = vec![Trial::test("decode/wrong_sizes_name_the_op_and_the_argument", wrong_sizes)];
    let kinds = [
        ("bf16", Kind::Bf16),
        ("nf4", Kind::Bits4(QuantType::Nf4, false)),
        ("nf4_double", Kind::Bits4(QuantType::Nf4, true)),
        ("fp4_double", Kind::Bits4(QuantType::Fp4, true)),
    ];
    for &(t, n, k, r) in SHAPES {
        for (name, kind) in kinds {
            let name = format!("decode/matvec/{name}_{t}_{n}_{k}_{r}");
            trials.push(Trial::test(name, move || linear(kind, t, n, k, r)));
        }
    }
    for (name, pair) in
        [("nf4_double", [kinds[2].1; 2]), ("mixed", [kinds[0].1, kinds[1].1]), ("bf16", [kinds[0].1; 2])]
    {
        for t in [1, 5] {
            trials.push(Trial::test(format!("decode/matvec_group/{name}_{t}"), move || group(pair, t)));
        }
    }
    for &case in ATTENTION {
        let (past, t, _, h, g, d, window) = case;
        let window = window.map_or(String::new(), |w| format!("_window_{w}"));
        let name = format!("decode/attention/past_{past}_{t}_heads_{h}_{g}_{d}{window}");
        trials.push(Trial::test(name, move || attention(case)));
    }
    trials
}

fn round(x: f64) -> f64 {
    f64::from(bf16::from_f64(x).to_f32())
}

fn narrow(x: &[f64]) -> Vec<f32> {
    x.iter().map(|&v| v as f32).collect()
}

/// A 4-bit weight on the device.
struct Device {
    packed: Buffer<u8>,
    plain: Option<Buffer<f32>>,
    double: Option<(Buffer<u8>, Buffer<f32>, Buffer<f32>)>,
    quant_type: QuantType,
    n: usize,
    k: usize,
}

impl Device {
    fn new(cuda: &Cuda, q: &Quantized) -> Result<Self, Error> {
        let (plain, double) = match &q.absmax {
            Absmax::Plain(absmax) => (Some(cuda.upload(absmax)?), None),
            Absmax::Double { codes, nested_absmax, offset } => {
                (None, Some((cuda.upload(codes)?, cuda.upload(nested_absmax)?, cuda.upload(&[*offset])?)))
            }
        };
        let packed = cuda.upload(&q.packed)?;
        Ok(Self { packed, plain, double, quant_type: q.quant_type, n: q.shape[0], k: q.shape[1] })
    }

    fn view(&self) -> Weight<'_> {
        let absmax = match (&self.plain, &self.double) {
            (_, Some((codes, nested, offset))) => {
                nf4::Absmax::Double { codes: codes.view(), nested_absmax: nested.view(), offset: offset.view() }
            }
            (Some(plain), _) => nf4::Absmax::Plain(plain.view()),
            (None, None) => unreachable!("one of both"),
        };
        Weight::Nf4(Nf4Weight { packed: self.packed.view(), absmax, quant_type: self.quant_type, n: self.n, k: self.k })
    }
}

fn linear(kind: Kind, t: usize, n: usize, k: usize, r: usize) -> Outcome {
    let cuda = Cuda::open(0)?;
    let mut random = Random::new((n * 7 + k) as u64);
    let (x, bias) = (random.bf16s(t * k, 1.0), random.bf16s(n, 1.0));
    // The rows of h lie among others.
    let ldh = r + 3;
    let (h, b) = (random.bf16s(t * ldh, 1.0), random.bf16s(n * r, 0.3));
    let dense = random.bf16s(n * k, 0.05);
    let quantized = match kind {
        Kind::Bf16 => None,
        Kind::Bits4(quant_type, double) => {
            Some(quantize(&HostTensor::from_f32(vec![n, k], &wide(&dense)), quant_type, double))
        }
    };
    let exact_w = quantized.as_ref().map_or_else(|| wide(&dense), Quantized::dequantize);

    let (device_x, device_bias) = (cuda.upload(&x)?, cuda.upload(&bias)?);
    let (device_h, device_b) = (cuda.upload(&h)?, cuda.upload(&b)?);
    let device_dense = cuda.upload(&dense)?;
    let device_4bit = quantized.as_ref().map(|q| Device::new(&cuda, q)).transpose()?;
    let ldy = n + 5;
    let run = |in_f32: bool, with_bias: bool| -> Result<Vec<f32>, Error> {
        let len = (t - 1) * ldy + n;
        let (mut narrow, mut full) = (poisoned::<bf16>(&cuda, len)?, poisoned::<f32>(&cuda, len)?);
        let op = Matvec {
            y: if in_f32 { Out::F32(full.view_mut()) } else { Out::Bf16(narrow.view_mut()) },
            ldy,
            x: device_x.view(),
            w: match &device_4bit {
                Some(w) => w.view(),
                None => Weight::Bf16 { w: device_dense.view(), n, k },
            },
            h: (r > 0).then(|| (device_h.view(), ldh, device_b.view(), r)),
            bias: with_bias.then(|| device_bias.view()),
            t,
        };
        ops::matvec(&cuda, op)?;
        Ok(if in_f32 { cuda.download(&full)? } else { wide(&cuda.download(&narrow)?) })
    };
    let row = |y: &[f32]| -> Vec<f32> { (0..t).flat_map(|i| y[i * ldy..][..n].to_vec()).collect() };

    for with_bias in [false, true] {
        let (mut exact, mut plain) = (vec![], vec![]);
        for (x, h) in wide(&x).chunks_exact(k).zip(wide(&h).chunks_exact(ldh)) {
            for j in 0..n {
                let dot = |a: &[f32], b: &mut dyn Iterator<Item = f64>| -> f64 {
                    a.iter().zip(b).map(|(&a, b)| f64::from(a) * b).sum()
                };
                let w = &exact_w[j * k..][..k];
                let product = dot(x, &mut w.iter().map(|&v| f64::from(v)));
                let rounded = dot(x, &mut w.iter().map(|&v| round(f64::from(v))));
                let side = dot(&h[..r], &mut b[j * r..][..r].iter().map(|v| v.to_f64()));
                let bias = if with_bias { bias[j].to_f64() } else { 0.0 };
                exact.push(product + side + bias);
                plain.push(round(round(round(rounded) + round(side)) + bias));
            }
        }
        for in_f32 in [false, true] {
            let found = run(in_f32, with_bias)?;
            same("y, second run", &run(in_f32, with_bias)?, &found)?;
            within_twice(&format!("y (f32 {in_f32})"), &row(&found), &narrow(&plain), &narrow(&exact))?;
            if t > 1 {
                let poison = if in_f32 { f32::from_bits(0xa5a5_a5a5) } else { bf16::from_bits(0xa5a5).to_f32() };
                same("y between its rows", &found[n..ldy], &[poison; 5])?;
            }
        }
    }
    Ok(())
}

/// Side by side in y and h, at any column: the bits of one part alone.
fn group(kinds: [Kind; 2], t: usize) -> Outcome {
    let cuda = Cuda::open(0)?;
    let (k, sizes, r) = (192, [33, 50, 17], [5, 16, 0]);
    let (ldy, ldh) = (sizes.iter().sum::<usize>() + 2, 21);
    let mut random = Random::new(8);
    let (x, h) = (cuda.upload(&random.bf16s(t * k, 1.0))?, cuda.upload(&random.bf16s(t * ldh, 1.0))?);
    let bias = cuda.upload(&random.bf16s(50, 1.0))?;
    let (mut b, mut dense, mut packed) = (vec![], vec![], vec![]);
    for (i, &n) in sizes.iter().enumerate() {
        b.push(cuda.upload(&random.bf16s(n * r[i], 0.3))?);
        let values = random.bf16s(n * k, 0.05);
        dense.push(cuda.upload(&values)?);
        packed.push(match kinds[i % 2] {
            Kind::Bf16 => None,
            Kind::Bits4(quant_type, double) => {
                let quantized = quantize(&HostTensor::from_f32(vec![n, k], &wide(&values)), quant_type, double);
                Some(Device::new(&cuda, &quantized)?)
            }
        });
    }
    let part = |i: usize| {
        let w = match &packed[i] {
            Some(w) => w.view(),
            None => Weight::Bf16 { w: dense[i].view(), n: sizes[i], k },
        };
        let h = (r[i] > 0).then(|| (h.range(5 * i..h.len()), b[i].view(), r[i]));
        MatvecPart { w, y: 1 + sizes[..i].iter().sum::<usize>(), h, bias: (i == 1).then(|| bias.view()) }
    };
    let run = |groups: &[&[usize]]| -> Result<Vec<bf16>, Error> {
        let mut y = poisoned::<bf16>(&cuda, t * ldy)?;
        for group in groups {
            let parts: Vec<MatvecPart> = group.iter().map(|&i| part(i)).collect();
            let op = MatvecGroup { y: Out::Bf16(y.view_mut()), ldy, x: x.view(), ldh, parts: &parts, t };
            ops::matvec_group(&cuda, op)?;
        }
        cuda.download(&y)
    };
    same("y", &run(&[&[0, 1, 2]])?, &run(&[&[1], &[2], &[0]])?)
}

fn attention((past, t, capacity, h, g, d, window): Attention) -> Outcome {
    let cuda = Cuda::open(0)?;
    let heads = Heads { h, g, d, window };
    let (width, kv) = (heads.qkv(), g * d);
    let mut random = Random::new((past * 31 + d) as u64);
    let qkv = random.bf16s(t * width, 0.8);
    // Behind the past nothing may be read.
    let mut cache = || -> Vec<bf16> {
        let mut rows = random.bf16s(past * kv, 0.8);
        rows.resize(capacity * kv, bf16::NAN);
        rows
    };
    let (k, v) = (cache(), cache());
    let positions: Vec<i32> = (0..t).map(|i| (past + i) as i32).collect();
    let (device_qkv, device_positions) = (cuda.upload(&qkv)?, cuda.upload(&positions)?);
    let run = || -> Result<[Vec<bf16>; 3], Error> {
        let mut o = poisoned::<bf16>(&cuda, t * h * d)?;
        let (mut device_k, mut device_v) = (cuda.upload(&k)?, cuda.upload(&v)?);
        let mut scratch = poisoned::<f32>(&cuda, ops::attention_decode_scratch(t, heads))?;
        let op = AttentionDecode {
            o: o.view_mut(),
            k: device_k.view_mut(),
            v: device_v.view_mut(),
            qkv: device_qkv.view(),
            positions: device_positions.view(),
            t,
            capacity,
            heads,
            scratch: scratch.view_mut(),
        };
        ops::attention_decode(&cuda, op)?;
        Ok([cuda.download(&o)?, cuda.download(&device_k)?, cuda.download(&device_v)?])
    };
    let [found, found_k, found_v] = run()?;
    same("o, second run", &run()?[0], &found)?;
    let appended = |cache: &[bf16], first: usize| -> Vec<bf16> {
        let mut cache = cache.to_vec();
        for (i, row) in qkv.chunks_exact(width).enumerate() {
            cache[(past + i) * kv..][..kv].copy_from_slice(&row[first..first + kv]);
        }
        cache
    };
    let (k, v) = (appended(&k, h * d), appended(&v, h * d + kv));
    same("k of the cache", &found_k, &k)?;
    same("v of the cache", &found_v, &v)?;

    let (qkv, k, v) = (wide(&qkv), wide(&k), wide(&v));
    let (mut exact, mut plain) = (vec![0.0; t * h * d], vec![0.0; t * h * d]);
    for i in 0..t {
        let keys = (past + i + 1).saturating_sub(window.unwrap_or(usize::MAX))..past + i + 1;
        for head in 0..h {
            let (q, at) = (&qkv[i * width + head * d..][..d], head / (h / g) * d);
            let score = |j: usize| -> f64 {
                let dot: f64 = q.iter().zip(&k[j * kv + at..]).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
                dot / (d as f64).sqrt()
            };
            let scores: Vec<f64> = keys.clone().map(score).collect();
            let attend = |out: &mut [f64], by: &dyn Fn(f64) -> f64| {
                let scores: Vec<f64> = scores.iter().map(|&s| by(s)).collect();
                let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let powers: Vec<f64> = scores.iter().map(|s| (s - top).exp()).collect();
                let sum: f64 = powers.iter().sum();
                for (j, power) in keys.clone().zip(&powers) {
                    let weight = by(power / sum);
                    out.iter_mut().zip(&v[j * kv + at..]).for_each(|(o, &v)| *o += weight * f64::from(v));
                }
                out.iter_mut().for_each(|o| *o = by(*o));
            };
            attend(&mut exact[(i * h + head) * d..][..d], &|v| v);
            attend(&mut plain[(i * h + head) * d..][..d], &round);
        }
    }
    within_twice("o", &wide(&found), &narrow(&plain), &narrow(&exact))
}

fn wrong_sizes() -> Outcome {
    let cuda = Cuda::open(0)?;
    let (x, w) = (cuda.zeros::<bf16>(9 * 8)?, cuda.zeros::<bf16>(4 * 8)?);
    let mut y = cuda.zeros::<bf16>(9 * 4)?;
    let mut run = |t: usize, n: usize, ldy: usize| {
        let w = Weight::Bf16 { w: w.view(), n, k: 8 };
        let y = Out::Bf16(y.view_mut());
        ops::matvec(&cuda, Matvec { y, ldy, x: x.view(), w, h: None, bias: None, t }).err()
    };
    let errors = [(run(9, 4, 4), "t"), (run(2, 5, 5), "w"), (run(2, 4, 3), "ldy"), (run(8, 4, 100), "y")];
    for (error, expected) in errors {
        match error {
            Some(Error::Shape { op: "matvec", argument, .. }) if argument == expected => {}
            other => return Err(format!("expected an error about {expected}, found {other:?}").into()),
        }
    }
    let heads = Heads { h: 2, g: 1, d: 16, window: None };
    let (mut o, mut k, mut v) = (cuda.zeros::<bf16>(32)?, cuda.zeros::<bf16>(64)?, cuda.zeros::<bf16>(64)?);
    let (qkv, positions) = (cuda.zeros::<bf16>(64)?, cuda.zeros::<i32>(1)?);
    let mut scratch = cuda.zeros::<f32>(ops::attention_decode_scratch(1, heads))?;
    let op = AttentionDecode {
        o: o.view_mut(),
        k: k.view_mut(),
        v: v.view_mut(),
        qkv: qkv.view(),
        positions: positions.view(),
        t: 1,
        capacity: 5,
        heads,
        scratch: scratch.view_mut(),
    };
    match ops::attention_decode(&cuda, op) {
        Err(Error::Shape { op: "attention_decode", argument: "k", found: 64, expected: 80 }) => Ok(()),
        other => Err(format!("expected an error about k, found {other:?}").into()),
    }
}
