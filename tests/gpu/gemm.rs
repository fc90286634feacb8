//! gemm against sums in f64: both orientations of b, ragged and unaligned matrices, the pair, bias, alpha, accumulate.
//! Gaps between rows are NaN in the inputs and must stay as they were in the output. Every case runs twice.

use half::bf16;
use halfbyte::Error;
use halfbyte::backend::cuda::Cuda;
use halfbyte::backend::cuda::memory::View;
use halfbyte::backend::cuda::ops::gemm::{Gemm, Out, Pair, gemm};
use libtest_mimic::Trial;

use crate::support::{Outcome, Random, distance, same, wide, within_twice};

pub fn trials() -> Vec<Trial> {
    let mut trials = vec![
        Trial::test("gemm/wrong_sizes_name_the_argument", wrong_sizes),
        Trial::test("gemm/no_rows_launch_nothing", no_rows),
    ];
    // (m, n, k, k2): around a vector, a step of 16, a tile of either kind; single rows and columns; k shorter than a tile.
    let shapes = [
        (1, 1, 1, 0),
        (1, 129, 65, 1),
        (3, 8, 16, 16),
        (16, 64, 64, 8),
        (63, 65, 130, 16),
        (64, 64, 192, 64),
        (65, 40, 7, 0),
        (127, 257, 200, 100),
        (128, 128, 128, 0),
        (130, 136, 328, 256),
        (200, 16, 1000, 0),
        (33, 72, 576, 16),
    ];
    for (m, n, k, k2) in shapes {
        for b_transposed in [true, false] {
            let shape = Shape { m, n, k, k2, b_transposed };
            let name = format!("gemm/{m}x{n}x{k}+{k2}_{}", if b_transposed { "nk" } else { "kn" });
            trials.push(Trial::test(name, move || all_forms(shape)));
        }
    }
    // Enough of them for the large tile on any card.
    for (m, n, k, k2) in [(1537, 2048, 264, 16), (2047, 2185, 100, 0), (128, 33_000, 72, 8)] {
        for b_transposed in [true, false] {
            let shape = Shape { m, n, k, k2, b_transposed };
            let name = format!("gemm/large/{m}x{n}x{k}+{k2}_{}", if b_transposed { "nk" } else { "kn" });
            trials.push(Trial::test(name, move || large(shape)));
        }
    }
    trials
}

#[derive(Clone, Copy)]
struct Shape {
    m: usize,
    n: usize,
    k: usize,
    k2: usize,
    b_transposed: bool,
}

impl Shape {
    fn b(&self, k: usize) -> (usize, usize) {
        if self.b_transposed { (self.n, k) } else { (k, self.n) }
    }
}

/// What varies beside the shape.
#[derive(Clone, Copy)]
struct Form {
    bias: bool,
    alpha: f32,
    accumulate: bool,
    f32_out: bool,
    /// Elements between rows, and before the first.
    gap: usize,
    offset: usize,
}

const PLAIN: Form = Form { bias: false, alpha: 1.0, accumulate: false, f32_out: false, gap: 0, offset: 0 };

/// The operands, dense.
struct Operands {
    shape: Shape,
    a: Vec<bf16>,
    b: Vec<bf16>,
    a2: Vec<bf16>,
    b2: Vec<bf16>,
    bias: Vec<bf16>,
    c: Vec<bf16>,
}

impl Operands {
    fn new(shape: Shape, seed: u64) -> Self {
        let Shape { m, n, k, k2, .. } = shape;
        let mut random = Random::new(seed);
        Self {
            shape,
            a: random.bf16s(m * k, 1.0),
            b: random.bf16s(n * k, 0.5),
            a2: random.bf16s(m * k2, 1.0),
            b2: random.bf16s(n * k2, 1.0),
            bias: random.bf16s(n, 4.0),
            c: random.bf16s(m * n, 4.0),
        }
    }

    /// Row i of c in f64.
    fn row(&self, i: usize, form: Form) -> Vec<f32> {
        let Shape { n, k, k2, b_transposed, .. } = self.shape;
        let mut sum = vec![0.0f64; n];
        for (a, b, k) in [(&self.a, &self.b, k), (&self.a2, &self.b2, k2)] {
            for l in 0..k {
                let x = f64::from(a[i * k + l].to_f32());
                for (j, sum) in sum.iter_mut().enumerate() {
                    *sum += x * f64::from(b[if b_transposed { j * k + l } else { l * n + j }].to_f32());
                }
            }
        }
        let finish = |(j, sum): (usize, f64)| {
            let bias = if form.bias { self.bias[j].to_f32() } else { 0.0 };
            let old = if form.accumulate { self.c[i * n + j].to_f32() } else { 0.0 };
            (f64::from(form.alpha) * sum + f64::from(bias) + f64::from(old)) as f32
        };
        sum.into_iter().enumerate().map(finish).collect()
    }
}

/// A matrix laid out with gaps; its buffer's elements, and the distance of its rows.
fn spread<T: Copy>(dense: &[T], cols: usize, form: Form, filler: T) -> (Vec<T>, usize) {
    let ld = cols + form.gap;
    let mut all = vec![filler; form.offset];
    for row in dense.chunks(cols) {
        all.extend_from_slice(row);
        all.extend(std::iter::repeat_n(filler, form.gap));
    }
    // Nothing lies behind the last row: an access there leaves the buffer.
    all.truncate(all.len() - if dense.is_empty() { 0 } else { form.gap });
    (all, ld)
}

/// c in f32, dense.
fn run(cuda: &Cuda, x: &Operands, form: Form) -> Result<Vec<f32>, libtest_mimic::Failed> {
    let Shape { m, n, k, k2, b_transposed } = x.shape;
    let nan = bf16::NAN;
    let (a, lda) = spread(&x.a, k, form, nan);
    let (b, ldb) = spread(&x.b, x.shape.b(k).1, form, nan);
    let (a, b) = (cuda.upload(&a)?, cuda.upload(&b)?);
    let (a2, lda2) = spread(&x.a2, k2.max(1), form, nan);
    let (b2, ldb2) = spread(&x.b2, x.shape.b(k2).1.max(1), form, nan);
    let (a2, b2) = (cuda.upload(&a2)?, cuda.upload(&b2)?);
    let bias = cuda.upload(&x.bias)?;
    let tail = |buffer_len: usize| form.offset..buffer_len;
    let pair = (k2 > 0).then(|| Pair {
        a: a2.range(tail(a2.len())),
        lda: lda2,
        b: b2.range(tail(b2.len())),
        ldb: ldb2,
        k: k2,
    });
    let filler = 0.12345f32;
    // Where c is not read it starts as NaN.
    let old: Vec<bf16> = if form.accumulate { x.c.clone() } else { vec![nan; m * n] };
    let (c, ldc) = spread(&wide(&old), n, form, bf16::from_f32(filler).to_f32());
    let op = |c| Gemm {
        c,
        ldc,
        a: a.range(tail(a.len())),
        lda,
        b: b.range(tail(b.len())),
        ldb,
        b_transposed,
        pair,
        bias: form.bias.then(|| bias.view()),
        alpha: form.alpha,
        accumulate: form.accumulate,
        m,
        n,
        k,
    };
    let found = if form.f32_out {
        let mut c = cuda.upload(&c)?;
        let range = tail(c.len());
        gemm(cuda, op(Out::F32(c.range_mut(range))))?;
        cuda.download(&c)?
    } else {
        let narrow: Vec<bf16> = c.iter().map(|&v| bf16::from_f32(v)).collect();
        let mut c = cuda.upload(&narrow)?;
        let range = tail(c.len());
        gemm(cuda, op(Out::Bf16(c.range_mut(range))))?;
        wide(&cuda.download(&c)?)
    };
    let mut dense = Vec::with_capacity(m * n);
    let mut gaps = found[..form.offset].to_vec();
    for row in found[form.offset..].chunks(ldc) {
        dense.extend_from_slice(&row[..n]);
        gaps.extend_from_slice(&row[n..]);
    }
    same("gaps of c", &gaps, &vec![bf16::from_f32(filler).to_f32(); gaps.len()])?;
    Ok(dense)
}

fn compare(what: &str, found: &[f32], exact: &[f32], form: Form) -> Outcome {
    if form.f32_out {
        let error = distance(found, exact);
        let worst = |i: &usize| (found[*i] - exact[*i]).abs();
        let at = (0..exact.len()).max_by(|i, j| worst(i).total_cmp(&worst(j))).unwrap_or(0);
        if error.is_nan() || error > 1e-5 {
            return Err(format!("{what}: error {error:.3e}; worst at {at}: {} for {}", found[at], exact[at]).into());
        }
        return Ok(());
    }
    let plain: Vec<f32> = exact.iter().map(|&v| bf16::from_f32(v).to_f32()).collect();
    within_twice(what, found, &plain, exact)
}

fn all_forms(shape: Shape) -> Outcome {
    let cuda = Cuda::open(0)?;
    let x = Operands::new(shape, (shape.m * 31 + shape.n * 7 + shape.k) as u64);
    for (bias, alpha, accumulate) in [(false, 1.0, false), (true, 1.0, false), (false, 1.0, true), (true, -0.375, true)]
    {
        for f32_out in [false, true] {
            let form = Form { bias, alpha, accumulate, f32_out, ..PLAIN };
            let exact: Vec<f32> = (0..shape.m).flat_map(|i| x.row(i, form)).collect();
            let what = format!("bias {bias}, alpha {alpha}, accumulate {accumulate}, f32 {f32_out}");
            let found = run(&cuda, &x, form)?;
            compare(&what, &found, &exact, form)?;
            // Gaps that keep rows aligned (where they were), that do not, and a start that does not: the same bits.
            for (gap, offset) in [(0, 0), (8, 8), (3, 0), (0, 1), (5, 3)] {
                let other = run(&cuda, &x, Form { gap, offset, ..form })?;
                same(&format!("{what}, gap {gap}, offset {offset}"), &other, &found)?;
            }
        }
    }
    Ok(())
}

/// Some rows against f64, all of them against the path for unaligned matrices, whose tiles are others.
fn large(shape: Shape) -> Outcome {
    let cuda = Cuda::open(0)?;
    let x = Operands::new(shape, shape.n as u64);
    let form = Form { bias: true, accumulate: true, ..PLAIN };
    let found = run(&cuda, &x, form)?;
    let rows = [0, 1, 15, 16, 63, 64, 100, 127, 128, 129, 1000, 1535, 1536, 2046, shape.m - 1];
    for i in rows.into_iter().filter(|&i| i < shape.m) {
        compare(&format!("row {i}"), &found[i * shape.n..][..shape.n], &x.row(i, form), form)?;
    }
    same("second run", &run(&cuda, &x, form)?, &found)?;
    same("unaligned", &run(&cuda, &x, Form { offset: 1, ..form })?, &found)
}

fn no_rows() -> Outcome {
    let cuda = Cuda::open(0)?;
    let x = cuda.upload(&[bf16::ONE; 64])?;
    let mut c = cuda.upload(&[bf16::ONE; 64])?;
    let op = Gemm {
        c: Out::Bf16(c.view_mut()),
        ldc: 8,
        a: x.view(),
        lda: 8,
        b: x.view(),
        ldb: 8,
        b_transposed: true,
        pair: None,
        bias: None,
        alpha: 1.0,
        accumulate: false,
        m: 0,
        n: 8,
        k: 8,
    };
    gemm(&cuda, op)?;
    same("c", &cuda.download(&c)?, &[bf16::ONE; 64])
}

fn wrong_sizes() -> Outcome {
    let cuda = Cuda::open(0)?;
    let x = cuda.zeros::<bf16>(64)?;
    let mut c = cuda.zeros::<bf16>(64)?;
    let mut refused = |argument: &str, change: for<'a> fn(&mut Gemm<'a>, View<'a, bf16>)| {
        let pair = Some(Pair { a: x.view(), lda: 8, b: x.view(), ldb: 8, k: 8 });
        let mut op = Gemm {
            c: Out::Bf16(c.view_mut()),
            ldc: 8,
            a: x.view(),
            lda: 8,
            b: x.view(),
            ldb: 8,
            b_transposed: true,
            pair,
            bias: Some(x.view()),
            alpha: 1.0,
            accumulate: false,
            m: 8,
            n: 8,
            k: 8,
        };
        change(&mut op, x.view());
        let error = gemm(&cuda, op).err();
        let named = matches!(&error, Some(Error::Shape { op: "gemm", argument: found, .. }) if *found == argument);
        assert!(named, "expected {argument}, found {error:?}");
    };
    refused("c", |g, _| g.m = 9);
    refused("ldc", |g, _| g.ldc = 7);
    refused("a", |g, x| g.a = x.range(1..64));
    refused("lda", |g, _| g.lda = 4);
    refused("b", |g, x| g.b = x.range(0..60));
    refused("ldb", |g, _| g.ldb = usize::MAX);
    refused("k", |g, _| g.k = 0);
    refused("n", |g, _| g.n = usize::MAX);
    refused("bias", |g, x| g.bias = Some(x.range(0..7)));
    refused("pair.k", |g, _| g.pair.iter_mut().for_each(|p| p.k = 0));
    refused("pair.a", |g, x| g.pair.iter_mut().for_each(|p| p.a = x.range(0..63)));
    refused("pair.b", |g, x| g.pair.iter_mut().for_each(|p| p.b = x.range(0..63)));
    Ok(())
}
