//! nf4_gemm against gemm on the dequantised weight, bit for bit, and against sums in f64. Both directions, blocks that
//! straddle rows, ragged and unaligned matrices, the pair, bias, accumulate. Outputs start as NaN where they are not read.

use half::bf16;
use halfbyte::Error;
use halfbyte::backend::cuda::matrix::{Data, Matrix};
use halfbyte::backend::cuda::ops::gemm::{Gemm, Out, Pair, gemm};
use halfbyte::backend::cuda::ops::nf4_gemm::{Direction, Nf4Gemm, Nf4Weight, nf4_gemm};
use halfbyte::backend::cuda::{Cuda, Kernels};
use halfbyte::nf4::{QuantType, quantize};
use halfbyte::tensor::{HostMatrix, HostTensor};
use libtest_mimic::{Failed, Trial};

use crate::support::{Outcome, Random, same, wide, within_twice};

/// gemm's kernel for Hopper adds up in another order.
fn open() -> Result<Cuda, Error> {
    Ok(Cuda::open(0)?.with_kernels(Kernels::Sm80))
}

pub fn trials() -> Vec<Trial> {
    let mut trials = vec![Trial::test("nf4_gemm/wrong_sizes_name_the_argument", wrong_sizes)];
    // (m, n, k, r): rows of whole blocks, n ragged or not; then k of which blocks straddle rows, and odd ones.
    let shapes = [
        (1, 1, 64, 0),
        (2, 64, 64, 16),
        (17, 70, 128, 8),
        (64, 128, 192, 64),
        (65, 127, 320, 1),
        (100, 130, 256, 100),
        (130, 300, 576, 16),
        (40, 72, 320, 8),
        (9, 40, 96, 16),
        (70, 33, 51, 3),
        (1, 1, 1, 0),
        (66, 129, 100, 0),
        (64, 64, 32, 256),
    ];
    for (m, n, k, r) in shapes {
        for direction in [Direction::Forward, Direction::Backward] {
            let shape = Shape { m, n, k, r, direction };
            trials.push(Trial::test(format!("nf4_gemm/{m}_{n}x{k}+{r}_{direction:?}"), move || all_forms(shape)));
        }
    }
    // Enough tiles of c for the large kind, in either direction.
    for (m, n, k, r) in [(1030, 2112, 320, 16), (1030, 200, 2112, 16), (2176, 1280, 1280, 0)] {
        for direction in [Direction::Forward, Direction::Backward] {
            let shape = Shape { m, n, k, r, direction };
            trials.push(Trial::test(format!("nf4_gemm/large/{m}_{n}x{k}+{r}_{direction:?}"), move || large(shape)));
        }
    }
    trials
}

#[derive(Clone, Copy)]
struct Shape {
    m: usize,
    n: usize,
    k: usize,
    r: usize,
    direction: Direction,
}

impl Shape {
    fn cols(&self) -> usize {
        if self.direction == Direction::Forward { self.n } else { self.k }
    }

    fn depth(&self) -> usize {
        if self.direction == Direction::Forward { self.k } else { self.n }
    }
}

struct Case {
    shape: Shape,
    w: Matrix,
    /// What W decodes to, (n, k).
    dense: Vec<bf16>,
    a: Vec<bf16>,
    a2: Vec<bf16>,
    b2: Vec<bf16>,
    bias: Vec<bf16>,
    c: Vec<bf16>,
}

impl Case {
    fn new(cuda: &Cuda, shape: Shape, quant_type: QuantType, double_quant: bool) -> Result<Self, Error> {
        let Shape { m, n, k, r, .. } = shape;
        let mut random = Random::new((m * 7 + n * 3 + k) as u64);
        let values: Vec<f32> = (0..n * k).map(|i| random.normal() * (1.0 + (i / 64 % 13) as f32) / 8.0).collect();
        let host = quantize(&HostTensor::from_f32(vec![n, k], &values), quant_type, double_quant);
        let dense = host.dequantize().iter().map(|&v| bf16::from_f32(v)).collect();
        Ok(Self {
            shape,
            w: cuda.upload_matrix(&HostMatrix::Quantized(host))?,
            dense,
            a: random.bf16s(m * shape.depth(), 1.0),
            a2: random.bf16s(m * r, 1.0),
            b2: random.bf16s(r * shape.cols(), 1.0),
            bias: random.bf16s(shape.cols(), 4.0),
            c: random.bf16s(m * shape.cols(), 4.0),
        })
    }

    /// The op's output, and gemm's on the dequantised weight. `offset`: elements before a, so that it is unaligned.
    fn run(&self, cuda: &Cuda, extras: bool, offset: usize) -> Result<[Vec<bf16>; 2], Failed> {
        let Shape { m, n, k, r, direction } = self.shape;
        let (cols, depth) = (self.shape.cols(), self.shape.depth());
        let Data::Nf4 { packed, absmax, quant_type } = &self.w.data else { return Err("the weight is dense".into()) };
        let w = Nf4Weight { packed: packed.view(), absmax: absmax.view(), quant_type: *quant_type, n, k };
        let a = cuda.upload(&[&vec![bf16::NAN; offset], &self.a[..]].concat())?;
        let (a2, b2, bias) = (cuda.upload(&self.a2)?, cuda.upload(&self.b2)?, cuda.upload(&self.bias)?);
        let forward = direction == Direction::Forward;
        let ldb = if forward { r } else { k };
        let pair = (r > 0).then(|| Pair { a: a2.view(), lda: r, b: b2.view(), ldb, k: r });
        let bias = extras.then(|| bias.view());
        let old = if extras { self.c.clone() } else { vec![bf16::NAN; m * cols] };
        let a_view = a.range(offset..a.len());

        let mut c = cuda.upload(&old)?;
        let op = Nf4Gemm {
            c: c.view_mut(),
            ldc: cols,
            a: a_view,
            lda: depth,
            w,
            direction,
            pair,
            bias,
            accumulate: extras,
            m,
        };
        nf4_gemm(cuda, op)?;
        let found = cuda.download(&c)?;

        let dense = cuda.upload(&self.dense)?;
        let mut c = cuda.upload(&old)?;
        let op = Gemm {
            c: Out::Bf16(c.view_mut()),
            ldc: cols,
            a: a_view,
            lda: depth,
            b: dense.view(),
            ldb: k,
            b_transposed: forward,
            pair,
            bias,
            alpha: 1.0,
            accumulate: extras,
            m,
            n: cols,
            k: depth,
        };
        gemm(cuda, op)?;
        Ok([found, cuda.download(&c)?])
    }

    /// c in f64.
    fn exact(&self, extras: bool) -> Vec<f32> {
        let Shape { m, k, r, direction, .. } = self.shape;
        let (cols, depth) = (self.shape.cols(), self.shape.depth());
        let forward = direction == Direction::Forward;
        let mut out = Vec::with_capacity(m * cols);
        for i in 0..m {
            for j in 0..cols {
                let mut sum = 0.0f64;
                for l in 0..depth {
                    let w = self.dense[if forward { j * k + l } else { l * k + j }];
                    sum += f64::from(self.a[i * depth + l].to_f32()) * f64::from(w.to_f32());
                }
                for l in 0..r {
                    let b = self.b2[if forward { j * r + l } else { l * k + j }];
                    sum += f64::from(self.a2[i * r + l].to_f32()) * f64::from(b.to_f32());
                }
                let more = if extras { self.bias[j].to_f32() + self.c[i * cols + j].to_f32() } else { 0.0 };
                out.push((sum + f64::from(more)) as f32);
            }
        }
        out
    }
}

fn all_forms(shape: Shape) -> Outcome {
    let cuda = open()?;
    for quant_type in [QuantType::Nf4, QuantType::Fp4] {
        for double_quant in [false, true] {
            let case = Case::new(&cuda, shape, quant_type, double_quant)?;
            for extras in [false, true] {
                let what = format!("{quant_type:?}, double {double_quant}, bias and accumulate {extras}");
                let [found, dense] = case.run(&cuda, extras, 0)?;
                let exact = case.exact(extras);
                let plain: Vec<f32> = exact.iter().map(|&v| bf16::from_f32(v).to_f32()).collect();
                within_twice(&what, &wide(&found), &plain, &exact)?;
                same(&format!("{what}: gemm on the dequantised weight"), &found, &dense)?;
                same(&format!("{what}: second run"), &case.run(&cuda, extras, 0)?[0], &found)?;
                same(&format!("{what}: unaligned a"), &case.run(&cuda, extras, 1)?[0], &found)?;
            }
        }
    }
    Ok(())
}

fn large(shape: Shape) -> Outcome {
    let cuda = open()?;
    let case = Case::new(&cuda, shape, QuantType::Nf4, true)?;
    let [found, dense] = case.run(&cuda, true, 0)?;
    same("gemm on the dequantised weight", &found, &dense)?;
    let [unaligned, _] = case.run(&cuda, true, 1)?;
    same("unaligned a", &unaligned, &found)
}

fn wrong_sizes() -> Outcome {
    let cuda = open()?;
    let x = cuda.zeros::<bf16>(1024)?;
    let mut c = cuda.zeros::<bf16>(256)?;
    let host = quantize(&HostTensor::from_f32(vec![16, 64], &[1.0; 1024]), QuantType::Nf4, true);
    let w = cuda.upload_matrix(&HostMatrix::Quantized(host))?;
    let Data::Nf4 { packed, absmax, quant_type } = &w.data else { return Err("the weight is dense".into()) };
    let w = Nf4Weight { packed: packed.view(), absmax: absmax.view(), quant_type: *quant_type, n: 16, k: 64 };
    let mut refused = |argument: &str, change: fn(&mut Nf4Gemm)| {
        let pair = Some(Pair { a: x.view(), lda: 8, b: x.view(), ldb: 8, k: 8 });
        let mut op = Nf4Gemm {
            c: c.view_mut(),
            ldc: 16,
            a: x.view(),
            lda: 64,
            w,
            direction: Direction::Forward,
            pair,
            bias: Some(x.view()),
            accumulate: false,
            m: 16,
        };
        change(&mut op);
        let error = nf4_gemm(&cuda, op).err();
        let named = matches!(&error, Some(Error::Shape { op: "nf4_gemm", argument: found, .. }) if *found == argument);
        assert!(named, "expected {argument}, found {error:?}");
    };
    refused("c", |g| g.m = 17);
    refused("ldc", |g| g.ldc = 15);
    refused("ldc", |g| g.direction = Direction::Backward);
    refused("lda", |g| g.lda = 63);
    refused("a", |g| g.a = g.a.range(1..1024));
    refused("w.k", |g| g.w.k = 0);
    refused("w.packed", |g| g.w.n = 15);
    refused("codes", |g| g.w.absmax = absmax_without_its_last(g.w.absmax));
    refused("bias", |g| g.bias = g.bias.map(|b| b.range(0..15)));
    refused("pair.ldb", |g| g.pair.iter_mut().for_each(|p| p.ldb = 7));
    Ok(())
}

fn absmax_without_its_last(
    absmax: halfbyte::backend::cuda::ops::nf4::Absmax<'_>,
) -> halfbyte::backend::cuda::ops::nf4::Absmax<'_> {
    use halfbyte::backend::cuda::ops::nf4::Absmax;
    match absmax {
        Absmax::Plain(absmax) => Absmax::Plain(absmax.range(1..absmax.len())),
        Absmax::Double { codes, nested_absmax, offset } => {
            Absmax::Double { codes: codes.range(1..codes.len()), nested_absmax, offset }
        }
    }
}
