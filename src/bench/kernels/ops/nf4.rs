//! 4 bits and back: nf4_quantize, nf4_double_quantize, nf4_dequantize, of a whole matrix and of some rows. The arguments
//! of a double-quantised weight and its decoding, for the oracles of the products too.

use std::ops::Range;
use std::sync::Arc;

use half::bf16;

use super::Op;
use crate::backend::Work;
#[cfg(feature = "cuda")]
use crate::backend::cuda::ops::nf4::{
    Absmax, Nf4Dequantize, Nf4DequantizeRows, Nf4DoubleQuantize, Nf4Quantize, Nf4Weight, Output, Source,
    nf4_dequantize, nf4_dequantize_rows, nf4_double_quantize, nf4_quantize,
};
use crate::bench::kernels::case::Element::{Bf16, F32, F64, U8};
#[cfg(feature = "cuda")]
use crate::bench::kernels::case::Way;
use crate::bench::kernels::case::{Arg, Case, Expected, Fill, Scalar};
use crate::bench::kernels::models::Model;
#[cfg(feature = "cuda")]
use crate::bench::kernels::set::Dev;
use crate::bench::kernels::values::{Column, Inputs};
use crate::nf4::codebook::{DYNAMIC, NF4, dynamic_code};
use crate::nf4::{self, BLOCK, NESTED_BLOCK, QuantType};
use crate::tensor::HostTensor;

pub const OPS: &[Op] = &[
    Op {
        name: "nf4_quantize",
        about: "absmax = max |x| of each 64; packed = the NF4 codes of x / absmax, two a byte, the first in the high nibble",
        cases: |m, _| sizes(m).into_iter().map(|size| quantize(m, size)).collect(),
        has_tokens: false,
        starter: Some(QUANTIZE),
    },
    Op {
        name: "nf4_double_quantize",
        about: "offset = mean(absmax); nested_absmax = max |absmax - offset| of each 256; codes = their dynamic 8-bit codes",
        cases: |m, _| sizes(m).into_iter().map(|size| double_quantize(m, size)).collect(),
        has_tokens: false,
        starter: Some(DOUBLE_QUANTIZE),
    },
    Op {
        name: "nf4_dequantize",
        about: "out = NF4 value * (dynamic_code[codes] * nested_absmax + offset), each operation rounded to f32, then to bf16",
        cases: |m, _| sizes(m).into_iter().map(|(n, k)| dequantize(m, (n, k), 0..n)).collect(),
        has_tokens: false,
        starter: Some(concat!(
            "// launch: nf4_dequantize grid=ceil_div(n*k,256) block=256\n{\n",
            weight_of!(),
            "  const unsigned long long at = blockIdx.x * 256ull + threadIdx.x;\n",
            "  if (at < n * k) out[at] = weight(at);\n}\n"
        )),
    },
    Op {
        name: "nf4_dequantize_rows",
        about: "the same of rows first_row .. first_row + rows of the matrix",
        cases: |m, _| sizes(m).into_iter().map(|(n, k)| dequantize(m, (n, k), n / 4..n / 2)).collect(),
        has_tokens: false,
        starter: Some(concat!(
            "// launch: nf4_dequantize_rows grid=ceil_div(rows*k,256) block=256\n{\n",
            weight_of!(),
            "  const unsigned long long at = blockIdx.x * 256ull + threadIdx.x;\n",
            "  if (at < rows * k) out[at] = weight(first_row * k + at);\n}\n"
        )),
    },
];

/// The start of a naive kernel's body: `weight(i)`, element i of a double-quantised matrix.
macro_rules! weight_of {
    () => {
        "  const float book[16] = {-1.0f, -0.6961928f, -0.52507305f, -0.3949175f, -0.28444138f, -0.18477343f, -0.091050036f,
                          0.0f, 0.0795803f, 0.1609302f, 0.2461123f, 0.33791524f, 0.44070983f, 0.562617f, 0.72295684f, 1.0f};
  const auto weight = [&](unsigned long long i) {
    const unsigned long long block = i / 64;
    // Rounded apart: a fused multiply-add gives other bits.
    const float absmax = __fadd_rn(__fmul_rn(dynamic_code[codes[block]], nested_absmax[block / 256]), offset[0]);
    return __float2bfloat16(__fmul_rn(book[packed[i / 2] >> (i % 2 == 0 ? 4 : 0) & 15], absmax));
  };
"
    };
}
pub(super) use weight_of;

/// (N, K) of the widest projection of each linear of a block, each once.
pub(super) fn projections(m: &Model) -> Vec<(usize, usize)> {
    let mut all: Vec<(usize, usize)> = vec![];
    for (_, widths, k) in m.linears() {
        let widest = (widths.into_iter().max().unwrap_or(0), k);
        if !all.contains(&widest) {
            all.push(widest);
        }
    }
    all
}

/// The same for ops to which a matrix is a row of elements: one of each number of elements.
fn sizes(m: &Model) -> Vec<(usize, usize)> {
    let mut all: Vec<(usize, usize)> = vec![];
    for (n, k) in projections(m) {
        if !all.iter().any(|(n2, k2)| n2 * k2 == n * k) {
            all.push((n, k));
        }
    }
    all
}

/// Blocks of a matrix, and blocks of these.
fn blocks((n, k): (usize, usize)) -> (usize, usize) {
    let blocks = (n * k).div_ceil(BLOCK);
    (blocks, blocks.div_ceil(NESTED_BLOCK))
}

/// A double-quantised matrix: packed, codes, nested_absmax, offset, and dynamic_code for kernels that do not bring it
/// along, as ours do.
pub(super) fn weight_args(shape: (usize, usize)) -> [Arg; 5] {
    let ((n, k), (blocks, nested)) = (shape, blocks(shape));
    [
        Arg::input("packed", U8, &dims!(N = n, bytes = k / 2), Fill::Bytes),
        Arg::input("codes", U8, &dims!(blocks = blocks), Fill::Bytes),
        Arg::input("nested_absmax", F32, &dims!(nested = nested), Fill::Const(0.01)),
        Arg::input("offset", F32, &dims!(one = 1), Fill::List([0.03].into())),
        dynamic_code_arg(),
    ]
}

fn dynamic_code_arg() -> Arg {
    Arg::input("dynamic_code", F32, &dims!(codes = 256), Fill::List(DYNAMIC.into()))
}

/// Bytes of the same that must be read.
pub(super) fn weight_bytes(shape: (usize, usize)) -> usize {
    let (blocks, nested) = blocks(shape);
    shape.0 * shape.1 / 2 + blocks + 4 * nested + 4
}

/// The same on the device.
#[cfg(feature = "cuda")]
pub(super) fn weight<'a>(
    [packed, codes, nested_absmax, offset]: [&'a Dev; 4],
    (n, k): (usize, usize),
) -> Nf4Weight<'a> {
    let absmax = Absmax::Double { codes: codes.u8(), nested_absmax: nested_absmax.f32(), offset: offset.f32() };
    Nf4Weight { packed: packed.u8(), absmax, quant_type: QuantType::Nf4, n, k }
}

/// The same for an oracle.
pub(super) struct Decoder<'a> {
    packed: &'a Column,
    codes: &'a Column,
    nested_absmax: &'a Column,
    offset: f32,
}

impl<'a> Decoder<'a> {
    pub fn new(i: &'a Inputs) -> Self {
        let offset = i.of("offset").at(0) as f32;
        Self { packed: i.of("packed"), codes: i.of("codes"), nested_absmax: i.of("nested_absmax"), offset }
    }

    /// Elements `range` of the flattened matrix in f32.
    pub fn decode(&self, range: Range<usize>) -> Vec<f32> {
        let mut out = Vec::with_capacity(range.len());
        let mut at = range.start;
        while at < range.end {
            let block = at / BLOCK;
            let end = range.end.min((block + 1) * BLOCK);
            let code = DYNAMIC[self.codes.at(block) as usize];
            let absmax = code * self.nested_absmax.at(block / NESTED_BLOCK) as f32 + self.offset;
            out.extend((at..end).map(|e| {
                let code = self.packed.at(e / 2) as u8 >> (4 * (1 - e % 2)) & 15;
                NF4[usize::from(code)] * absmax
            }));
            at = end;
        }
        out
    }

    /// The same rounded to bf16.
    pub fn rounded(&self, range: Range<usize>) -> Vec<f64> {
        self.decode(range).into_iter().map(|w| f64::from(bf16::from_f32(w).to_f32())).collect()
    }
}

fn matrix_scalars((n, k): (usize, usize)) -> Vec<(&'static str, Scalar)> {
    vec![("n", Scalar::U64(n as u64)), ("k", Scalar::U64(k as u64))]
}

fn quantize(m: &Model, (n, k): (usize, usize)) -> Case {
    let (blocks, _) = blocks((n, k));
    let oracle = move |i: &Inputs, output: &str, span: Range<usize>| {
        let x = i.of("x");
        // Of the blocks that the span touches.
        let of = |blocks: Range<usize>| {
            let range = blocks.start * BLOCK..(blocks.end * BLOCK).min(n * k);
            let values: Vec<f32> = range.map(|i| x.at(i) as f32).collect();
            nf4::quantize(&HostTensor::from_f32(vec![values.len()], &values), QuantType::Nf4, false)
        };
        if output == "absmax" {
            let host = of(span);
            return (0..host.absmax.len()).map(|b| Expected::exact(f64::from(host.absmax.get(b)))).collect();
        }
        let first = span.start * 2 / BLOCK;
        let packed = of(first..(span.end * 2).div_ceil(BLOCK)).packed;
        let bytes = &packed[span.start - first * BLOCK / 2..][..span.len()];
        bytes.iter().map(|&byte| Expected::exact(f64::from(byte))).collect()
    };
    Case {
        op: "nf4_quantize",
        model: m.name,
        shape: format!("{n}x{k} bf16"),
        tokens: None,
        args: vec![
            Arg::output("packed", U8, &dims!(N = n, bytes = k / 2), 64),
            Arg::output("absmax", F32, &dims!(blocks = blocks), 1024),
            Arg::input("x", Bf16, &dims!(N = n, K = k), Fill::Random(0.02)),
        ],
        scalars: matrix_scalars((n, k)),
        work: Work::moves(2 * n * k + n * k / 2 + 4 * blocks),
        oracle: Arc::new(oracle),
        #[cfg(feature = "cuda")]
        ways: vec![Way::own(|cuda, set| {
            let [packed, absmax, x] = set.all();
            let (packed, absmax, x) = (packed.u8_mut(), absmax.f32_mut(), Source::Bf16(x.bf16()));
            nf4_quantize(cuda, Nf4Quantize { packed, absmax, x, quant_type: QuantType::Nf4 })
        })],
        cpu: None,
    }
}

/// Values of absmax that are repeated: a prime, so that no two nested blocks are the same.
const PERIOD: usize = 4099;

/// From 0.02 to 0.06, as of weights of which 64 have a largest one.
fn absmax_values() -> Vec<f32> {
    let fraction = |i: u32| (i.wrapping_mul(0x9e37_79b9) >> 8) as f32 / (1 << 24) as f32;
    (0..PERIOD as u32).map(|i| 0.02 + 0.04 * fraction(i)).collect()
}

/// Mean of the first `len` elements, summed in f64.
fn mean(column: &Column, len: usize) -> f32 {
    let period = column.period();
    let sum = |values: &[f32]| values.iter().map(|&v| f64::from(v)).sum::<f64>();
    let whole = (len / period.len()) as f64 * sum(period);
    ((whole + sum(&period[..len % period.len()])) / len as f64) as f32
}

fn double_quantize(m: &Model, (n, k): (usize, usize)) -> Case {
    let (blocks, nested) = blocks((n, k));
    let oracle = move |i: &Inputs, output: &str, span: Range<usize>| {
        let absmax = i.of("absmax");
        let offset = mean(absmax, blocks);
        let difference = |b: usize| absmax.at(b) as f32 - offset;
        let largest = |group: usize| {
            let group = group * NESTED_BLOCK..((group + 1) * NESTED_BLOCK).min(blocks);
            group.fold(0.0f32, |m, b| m.max(difference(b).abs()))
        };
        let exact = |value: f32| Expected::exact(f64::from(value));
        match output {
            "offset" => vec![exact(offset)],
            "nested_absmax" => span.map(|group| exact(largest(group))).collect(),
            _ => {
                let (mut group, mut inverse) = (usize::MAX, 0.0);
                let code = |b: usize| {
                    if b / NESTED_BLOCK != group {
                        group = b / NESTED_BLOCK;
                        inverse = 1.0 / largest(group).max(1e-38);
                    }
                    Expected::exact(f64::from(dynamic_code(difference(b) * inverse)))
                };
                span.map(code).collect()
            }
        }
    };
    Case {
        op: "nf4_double_quantize",
        model: m.name,
        shape: format!("{blocks} of {n}x{k}"),
        tokens: None,
        args: vec![
            Arg::output("codes", U8, &dims!(blocks = blocks), 256),
            Arg::output("nested_absmax", F32, &dims!(nested = nested), 512),
            Arg::output("offset", F32, &dims!(one = 1), PERIOD),
            Arg::input("absmax", F32, &dims!(blocks = blocks), Fill::List(absmax_values().into())),
            dynamic_code_arg(),
            Arg::scratch("scratch", F64, 256),
        ],
        scalars: vec![("blocks", Scalar::U64(blocks as u64))],
        work: Work::moves(5 * blocks + 4 * nested + 4),
        oracle: Arc::new(oracle),
        #[cfg(feature = "cuda")]
        ways: vec![Way::own(|cuda, set| {
            let [codes, nested_absmax, offset, absmax, _, scratch] = set.all();
            let (codes, nested_absmax, offset) = (codes.u8_mut(), nested_absmax.f32_mut(), offset.f32_mut());
            let (scratch, absmax) = (scratch.f64_mut(), absmax.f32());
            nf4_double_quantize(cuda, Nf4DoubleQuantize { codes, nested_absmax, offset, scratch, absmax })
        })],
        cpu: None,
    }
}

/// Of some rows; all of them: nf4_dequantize.
fn dequantize(m: &Model, (n, k): (usize, usize), rows: Range<usize>) -> Case {
    let (first_row, rows) = (rows.start, rows.len());
    let whole = rows == n;
    let oracle = move |i: &Inputs, _: &str, span: Range<usize>| {
        let range = first_row * k + span.start..first_row * k + span.end;
        Decoder::new(i).rounded(range).into_iter().map(Expected::exact).collect()
    };
    let mut scalars = matrix_scalars((n, k));
    if !whole {
        scalars.extend([("first_row", Scalar::U64(first_row as u64)), ("rows", Scalar::U64(rows as u64))]);
    }
    let out = Arg::output("out", Bf16, &dims!(rows = rows, K = k), 2);
    Case {
        op: if whole { "nf4_dequantize" } else { "nf4_dequantize_rows" },
        model: m.name,
        shape: if whole { format!("{n}x{k} double bf16") } else { format!("{rows} of {n}x{k} double bf16") },
        tokens: None,
        args: [out].into_iter().chain(weight_args((n, k))).collect(),
        scalars,
        work: Work::nf4_dequantize(weight_bytes((rows, k)), rows * k),
        oracle: Arc::new(oracle),
        #[cfg(feature = "cuda")]
        ways: vec![Way::own(move |cuda, set| {
            let [out, packed, codes, nested_absmax, offset, _] = set.all();
            let (out, w) = (out.bf16_mut(), weight([packed, codes, nested_absmax, offset], (n, k)));
            if !whole {
                return nf4_dequantize_rows(cuda, Nf4DequantizeRows { out, w, first_row, rows });
            }
            let Nf4Weight { packed, absmax, quant_type, .. } = w;
            nf4_dequantize(cuda, Nf4Dequantize { out: Output::Bf16(out), packed, absmax, quant_type })
        })],
        // In f32 there.
        cpu: None,
    }
}

const QUANTIZE: &str = r"// launch: nf4_quantize grid=ceil_div(n*k,16384) block=256
{
  // A block of 64 a thread; n * k is a multiple of 64.
  const float book[16] = {-1.0f, -0.6961928f, -0.52507305f, -0.3949175f, -0.28444138f, -0.18477343f, -0.091050036f, 0.0f,
                          0.0795803f, 0.1609302f, 0.2461123f, 0.33791524f, 0.44070983f, 0.562617f, 0.72295684f, 1.0f};
  const unsigned long long block = blockIdx.x * 256ull + threadIdx.x, first = block * 64;
  if (first >= n * k) return;
  float largest = 0.0f;
  for (int i = 0; i < 64; ++i) largest = fmaxf(largest, fabsf(__bfloat162float(x[first + i])));
  absmax[block] = largest;
  const float inverse = __frcp_rn(fmaxf(largest, 1e-38f));
  for (int i = 0; i < 64; i += 2) {
    unsigned code[2] = {0, 0};
    for (int j = 0; j < 2; ++j) {
      const float s = __fmul_rn(__bfloat162float(x[first + i + j]), inverse);
      for (int c = 0; c < 15; ++c) code[j] += s > (book[c] + book[c + 1]) * 0.5f;
    }
    packed[(first + i) / 2] = (unsigned char)(code[0] << 4 | code[1]);
  }
}
";

const DOUBLE_QUANTIZE: &str = r"// launch: nf4_double_quantize grid=ceil_div(blocks,256) block=256
{
  // Every block adds up all absmax for itself.
  __shared__ double sums[256];
  __shared__ float largest[256];
  const unsigned tid = threadIdx.x;
  double sum = 0.0;
  for (unsigned long long i = tid; i < blocks; i += 256) sum += absmax[i];
  sums[tid] = sum;
  __syncthreads();
  for (unsigned w = 128; w > 0; w /= 2) {
    if (tid < w) sums[tid] += sums[tid + w];
    __syncthreads();
  }
  const float mean = float(sums[0] / double(blocks));
  const unsigned long long i = blockIdx.x * 256ull + tid;
  const float d = i < blocks ? __fsub_rn(absmax[i], mean) : 0.0f;
  largest[tid] = fabsf(d);
  __syncthreads();
  for (unsigned w = 128; w > 0; w /= 2) {
    if (tid < w) largest[tid] = fmaxf(largest[tid], largest[tid + w]);
    __syncthreads();
  }
  const float s = __fmul_rn(d, __frcp_rn(fmaxf(largest[0], 1e-38f)));
  unsigned code = 0;
  for (int c = 0; c < 255; ++c) code += s > (dynamic_code[c] + dynamic_code[c + 1]) * 0.5f;
  if (i < blocks) codes[i] = (unsigned char)code;
  if (tid == 0) nested_absmax[blockIdx.x] = largest[0];
  if (i == 0) offset[0] = mean;
}
";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::kernels::models::TOY;
    use crate::nf4::{Absmax, Quantized};
    use crate::tensor::Dtype;

    /// What an oracle says of all of an output.
    fn all(case: &Case, inputs: &Inputs, output: &str) -> Vec<f64> {
        let arg = case.args.iter().find(|a| a.name == output).unwrap();
        let rows = (0..arg.len()).step_by(arg.width());
        rows.flat_map(|start| (case.oracle)(inputs, output, start..start + arg.width())).map(|e| e.value).collect()
    }

    fn bytes(i: &Inputs, name: &str, len: usize) -> Vec<u8> {
        (0..len).map(|at| i.of(name).at(at) as u8).collect()
    }

    #[test]
    fn decoding_is_the_hosts() {
        let shape = (96, 320);
        let (blocks, nested) = blocks(shape);
        let (whole, rows) = (dequantize(&TOY, shape, 0..96), dequantize(&TOY, shape, 24..48));
        let i = Inputs::new(&whole.args, &whole.scalars);
        let codes = bytes(&i, "codes", blocks);
        let host = Quantized {
            quant_type: QuantType::Nf4,
            shape: vec![96, 320],
            source_dtype: Dtype::Bf16,
            packed: bytes(&i, "packed", 96 * 160),
            absmax: Absmax::Double { codes, nested_absmax: vec![0.01; nested], offset: 0.03 },
        };
        let expected: Vec<_> = host.dequantize().into_iter().map(|w| bf16::from_f32(w).to_f64()).collect();
        assert_eq!(all(&whole, &i, "out"), expected);
        assert_eq!(all(&rows, &i, "out"), expected[24 * 320..48 * 320]);
    }

    #[test]
    fn double_quantisation_is_the_hosts() {
        // More blocks than the period, and a nested block that is not full.
        let shape = (90, 3200);
        let case = double_quantize(&TOY, shape);
        let i = Inputs::new(&case.args, &case.scalars);
        let largest = |at: usize| if at % BLOCK == 5 { i.of("absmax").at(at / BLOCK) as f32 } else { 0.0 };
        let source = HostTensor::from_f32(vec![90, 3200], &(0..90 * 3200).map(largest).collect::<Vec<_>>());
        let Absmax::Double { codes, nested_absmax, offset } = nf4::quantize(&source, QuantType::Nf4, true).absmax
        else {
            panic!("double quantisation was asked for")
        };
        assert_eq!(all(&case, &i, "offset"), [f64::from(offset)]);
        assert_eq!(all(&case, &i, "nested_absmax"), nested_absmax.into_iter().map(f64::from).collect::<Vec<_>>());
        assert_eq!(all(&case, &i, "codes"), codes.into_iter().map(f64::from).collect::<Vec<_>>());
    }

    #[test]
    fn parts_of_a_row_have_the_codes_of_the_row() {
        let case = quantize(&TOY, (8, 320));
        let i = Inputs::new(&case.args, &case.scalars);
        let row = (case.oracle)(&i, "packed", 160..320);
        assert_eq!((case.oracle)(&i, "packed", 167..199), row[7..39]);
    }
}
