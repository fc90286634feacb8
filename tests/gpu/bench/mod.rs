//! `gpu --bench`: the time of each kernel at the shapes of Mistral-7B, beside what the card does at best, measured in the
//! same run: a plain copy of large buffers, and a bf16 product of 8192 x 4096 x 4096 as the program would run it (cuBLAS
//! where it is there).
//!
//! A line has the bytes that the op must move and its floating-point operations, and what the time makes of them.
//! HALFBYTE_BENCH_CSV names a file that gets the same as CSV; HALFBYTE_COMMIT goes into its first column.
//! Trials take turns on the GPU, and buffers are larger than its cache or alternate.

mod attention;
mod decode;
mod elementwise;
mod linear;
mod load;
mod nf4;
mod optimizer;
mod products;

use std::fs::File;
use std::io::Write as _;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;

use bytemuck::Pod;
use half::bf16;
use halfbyte::Error;
use halfbyte::backend::cuda::Cuda;
use halfbyte::backend::cuda::memory::Buffer;
use libtest_mimic::{Failed, Measurement, Trial};

/// The shapes of Mistral-7B, at 8192 tokens.
pub const T: usize = 8192;
pub const C: usize = 4096;
pub const F: usize = 14_336;
pub const V: usize = 32_000;

pub fn trials() -> Vec<Trial> {
    let mut trials = vec![bench("ceilings", |_| Ok(()))];
    trials.extend(elementwise::trials());
    trials.extend(nf4::trials());
    trials.extend(products::trials());
    trials.extend(linear::trials());
    trials.extend(attention::trials());
    trials.extend(decode::trials());
    trials.extend(load::trials());
    trials.extend(optimizer::trials());
    trials
}

/// A row of the table.
pub struct Row<'a> {
    pub op: &'a str,
    /// No commas: it is a field of a CSV.
    pub shape: &'a str,
    /// Which of several ways.
    pub implementation: &'a str,
    /// That the op must read and write at least once.
    pub bytes: usize,
    /// Floating-point operations on the tensor cores; 0 where bytes are the bound.
    pub flops: f64,
}

/// What the card does at best, per second.
#[derive(Clone, Copy)]
struct Ceilings {
    copy: f64,
    product: f64,
}

/// Median, least and most of the rounds, in seconds a launch.
#[derive(Clone, Copy)]
struct Times {
    median: f64,
    least: f64,
    most: f64,
}

impl Times {
    /// Of a figure that came as one number.
    fn once(seconds: f64) -> Self {
        Self { median: seconds, least: seconds, most: seconds }
    }
}

/// One trial's turn on the GPU.
pub struct Bench {
    pub cuda: Cuda,
    /// False: `--test`, which runs everything once and times nothing.
    timed: bool,
    ceilings: Ceilings,
    last: Option<Times>,
    _turn: MutexGuard<'static, ()>,
}

/// A trial whose `body` calls [`Bench::row`] for each way or shape.
pub fn bench(name: &str, body: impl FnOnce(&mut Bench) -> Result<(), Error> + Send + 'static) -> Trial {
    bench_with(name, |cuda| cuda, body)
}

/// The same on a device that `with` has set up.
pub fn bench_with(
    name: &str,
    with: impl FnOnce(Cuda) -> Cuda + Send + 'static,
    body: impl FnOnce(&mut Bench) -> Result<(), Error> + Send + 'static,
) -> Trial {
    Trial::bench(format!("bench/{name}"), move |test_mode| {
        static TURN: Mutex<()> = Mutex::new(());
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let mut cuda = Cuda::open(0)?;
        let ceilings = if test_mode { Ceilings { copy: f64::NAN, product: f64::NAN } } else { ceilings(&mut cuda)? };
        let cuda = with(cuda);
        let mut bench = Bench { cuda, timed: !test_mode, ceilings, last: None, _turn: turn };
        body(&mut bench)?;
        let last = bench
            .last
            .map(|t| Measurement { avg: (t.median * 1e9) as u64, variance: ((t.most - t.least) * 1e9) as u64 });
        Ok::<_, Failed>(last.or_else(|| bench.timed.then_some(Measurement { avg: 0, variance: 0 })))
    })
}

impl Bench {
    /// Times `op`, whose argument counts launches, and adds a row.
    pub fn row(&mut self, row: Row, op: impl FnMut(&mut Cuda, usize) -> Result<(), Error>) -> Result<(), Error> {
        if !self.timed {
            return launches(&mut self.cuda, op)(1).map(|_| ());
        }
        let times = time(&mut self.cuda, op)?;
        self.last = Some(times);
        report(&self.cuda, self.ceilings, &row, times);
        Ok(())
    }

    /// Adds a row whose time, in seconds, `measure` finds out.
    pub fn row_of(&mut self, row: Row, measure: impl FnOnce(&Cuda) -> Result<f64, Error>) -> Result<(), Error> {
        if self.timed {
            let times = Times::once(measure(&self.cuda)?);
            self.last = Some(times);
            report(&self.cuda, self.ceilings, &row, times);
        }
        Ok(())
    }

    /// `len` plausible activations of deviation about `scale`: a block of random ones, over and over.
    pub fn activations(&self, len: usize, scale: f32) -> Result<Buffer<bf16>, Error> {
        let values: Vec<bf16> = (0..len.min(BLOCK)).map(|i| bf16::from_f32(scale * 3.5 * unit(i))).collect();
        self.repeated(len, &values)
    }

    /// The same in f32.
    pub fn floats(&self, len: usize, scale: f32) -> Result<Buffer<f32>, Error> {
        self.repeated(len, &(0..len.min(BLOCK)).map(|i| scale * 3.5 * unit(i)).collect::<Vec<_>>())
    }

    /// `len` random bytes.
    pub fn bytes(&self, len: usize) -> Result<Buffer<u8>, Error> {
        self.repeated(len, &(0..len.min(BLOCK)).map(|i| (unit(i) * 1e6) as i32 as u8).collect::<Vec<_>>())
    }

    fn repeated<T: Pod>(&self, len: usize, values: &[T]) -> Result<Buffer<T>, Error> {
        let (mut to, from) = (self.cuda.zeros::<T>(len)?, self.cuda.upload(values)?);
        for start in (0..len).step_by(values.len().max(1)) {
            let count = values.len().min(len - start);
            self.cuda.copy(to.range_mut(start..start + count), from.range(0..count))?;
        }
        self.cuda.synchronize()?;
        Ok(to)
    }
}

/// Elements of the random block: 1031 * 1021, which no row length divides.
const BLOCK: usize = 1_052_651;

/// In [-0.5, 0.5), by a multiplicative hash.
fn unit(i: usize) -> f32 {
    let mut x = (i as u32).wrapping_add(0x9e37_79b9).wrapping_mul(0x85eb_ca6b);
    x = (x ^ x >> 13).wrapping_mul(0xc2b2_ae35);
    ((x ^ x >> 16) >> 8) as f32 / (1 << 24) as f32 - 0.5
}

/// Seconds a launch, over `count` launches in a row.
fn launches(
    cuda: &mut Cuda,
    mut op: impl FnMut(&mut Cuda, usize) -> Result<(), Error>,
) -> impl FnMut(usize) -> Result<f64, Error> {
    let mut number = 0;
    move |count| {
        cuda.synchronize()?;
        let start = Instant::now();
        for _ in 0..count {
            op(cuda, number)?;
            number += 1;
        }
        cuda.synchronize()?;
        Ok(start.elapsed().as_secs_f64() / count as f64)
    }
}

/// Nine rounds of about 20 ms each, after a warm-up of as long.
fn time(cuda: &mut Cuda, op: impl FnMut(&mut Cuda, usize) -> Result<(), Error>) -> Result<Times, Error> {
    let mut round = launches(cuda, op);
    round(2)?;
    let once = round(5)?;
    let count = ((0.02 / once) as usize).clamp(2, 2000);
    round(count)?;
    let mut times = (0..9).map(|_| round(count)).collect::<Result<Vec<_>, _>>()?;
    times.sort_by(f64::total_cmp);
    Ok(Times { median: times[4], least: times[0], most: times[8] })
}

/// Measured by the first trial, for all.
fn ceilings(cuda: &mut Cuda) -> Result<Ceilings, Error> {
    static MEASURED: OnceLock<Ceilings> = OnceLock::new();
    if let Some(&measured) = MEASURED.get() {
        return Ok(measured);
    }
    let n = F * C;
    let from = [cuda.zeros::<bf16>(n)?, cuda.zeros::<bf16>(n)?];
    let mut to = [cuda.zeros::<bf16>(n)?, cuda.zeros::<bf16>(n)?];
    let copy = time(cuda, |cuda, i| cuda.copy(to[i % 2].view_mut(), from[i % 2].view()))?;
    let bytes = 4 * n;
    let found = Ceilings { copy: bytes as f64 / copy.median, product: cuda.gemm_rate(T, C, C)? };
    let row = Row { op: "copy", shape: "14336x4096 bf16", implementation: "driver", bytes, flops: 0.0 };
    report(cuda, found, &row, copy);
    let flops = 2.0 * (T * C * C) as f64;
    let implementation = if cuda.has_cublas() { "cublas" } else { "gemm" };
    let row =
        Row { op: "best product", shape: "8192x4096x4096", implementation, bytes: 2 * (2 * T * C + C * C), flops };
    report(cuda, found, &row, Times::once(flops / found.product));
    Ok(*MEASURED.get_or_init(|| found))
}

fn report(cuda: &Cuda, ceilings: Ceilings, row: &Row, times: Times) {
    let &Row { op, shape, implementation, bytes, flops } = row;
    let (by_bytes, by_flops) = (bytes as f64 / times.median, flops / times.median);
    let (of_copy, of_product) = (100.0 * by_bytes / ceilings.copy, 100.0 * by_flops / ceilings.product);
    let us = times.median * 1e6;
    let mut line = format!("{op:<26} {shape:<34} {implementation:<12} {us:>9.1} us {:>6.0} GB/s", by_bytes / 1e9);
    line += &format!(" {of_copy:>5.1}% of copy");
    if flops > 0.0 {
        line += &format!(" {:>6.1} TFLOP/s {of_product:>5.1}% of the best product", by_flops / 1e12);
    }
    println!("{line}");
    let Ok(path) = std::env::var("HALFBYTE_BENCH_CSV") else { return };
    static FILE: Mutex<Option<File>> = Mutex::new(None);
    let mut file = FILE.lock().unwrap_or_else(PoisonError::into_inner);
    if file.is_none() {
        *file = File::create(&path).map_err(|e| println!("{path}: {e}")).ok();
        let header = "commit,card,op,shape,implementation,median_us,least_us,most_us,bytes,flops,gb_per_s,tflop_per_s,\
                      percent_of_copy,percent_of_product";
        file.as_mut().map(|f| writeln!(f, "{header}"));
    }
    let commit = std::env::var("HALFBYTE_COMMIT").unwrap_or_default();
    let (card, least, most) = (&cuda.device().name, times.least * 1e6, times.most * 1e6);
    let (gb, tflop) = (by_bytes / 1e9, by_flops / 1e12);
    if let Some(file) = file.as_mut() {
        let written = writeln!(
            file,
            "{commit},{card},{op},{shape},{implementation},{us:.2},{least:.2},{most:.2},{bytes},{flops:.0},{gb:.0},\
             {tflop:.1},{of_copy:.1},{of_product:.1}"
        );
        written.unwrap_or_else(|e| println!("{path}: {e}"));
    }
}
