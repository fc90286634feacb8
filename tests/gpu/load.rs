//! Matrices on their way to the device: put in 4 bits there they have the bits of src/nf4; dense ones are bf16; what is not
//! finite is named; the unused end of an arena serves as staging.

use half::{bf16, f16};
use halfbyte::Error;
use halfbyte::backend::cuda::Cuda;
use halfbyte::backend::cuda::matrix::{Absmax, Data, Matrix};
use halfbyte::nf4::{self, QuantConfig, QuantType, quantize};
use halfbyte::tensor::{Dtype, HostMatrix, HostTensor};
use libtest_mimic::Trial;

use crate::support::{Outcome, Random, same};

/// Around a block, a nested block, a vector, a piece of 8 MiB (2 Mi f32, 4 Mi of the others), and several of them.
const SHAPES: [(usize, usize); 8] =
    [(1, 1), (1, 63), (13, 5), (128, 128), (1, 4_194_304), (3, 1_398_101), (1025, 4096), (5, 1_700_003)];

const DTYPES: [Dtype; 3] = [Dtype::F32, Dtype::Bf16, Dtype::F16];

pub fn trials() -> Vec<Trial> {
    let mut trials = vec![
        Trial::test("load/a_weight_that_is_not_finite_is_named", not_finite),
        Trial::test("load/the_unused_end_of_the_arena_is_the_staging", arena),
        Trial::test("load/what_is_no_matrix_is_refused", no_matrix),
    ];
    for dtype in DTYPES {
        for (n, k) in SHAPES {
            let large = if n * k > 1_000_000 { "large_" } else { "" };
            let name = format!("load/{large}{n}x{k}_{}", dtype.torch_name());
            trials.push(Trial::test(name, move || agrees_with_the_host(&Cuda::open(0)?, &random(n, k, dtype, 7))));
        }
    }
    trials
}

fn random(n: usize, k: usize, dtype: Dtype, seed: u64) -> HostTensor {
    let mut random = Random::new(seed + (n * k) as u64);
    let mut bytes = Vec::with_capacity(n * k * dtype.size());
    for _ in 0..n * k {
        let x = (random.uniform() - 0.5) * 0.1;
        match dtype {
            Dtype::F32 => bytes.extend(x.to_le_bytes()),
            Dtype::Bf16 => bytes.extend(bf16::from_f32(x).to_le_bytes()),
            Dtype::F16 => bytes.extend(f16::from_f32(x).to_le_bytes()),
        }
    }
    HostTensor::owned(dtype, vec![n, k], bytes)
}

fn agrees_with_the_host(cuda: &Cuda, t: &HostTensor) -> Outcome {
    let (n, k) = (t.shape[0], t.shape[1]);
    for quant_type in [QuantType::Nf4, QuantType::Fp4] {
        for double_quant in [true, false] {
            let expected = quantize(t, quant_type, double_quant);
            let config = QuantConfig { quant_type, double_quant };
            let on_device = cuda.upload_matrix(&HostMatrix::Quantize(t.clone(), config))?;
            assert_eq!((on_device.n, on_device.k), (n, k));
            same_quantized(cuda, &on_device, &expected)?;
            let moved = cuda.upload_matrix(&HostMatrix::Quantized(expected.clone()))?;
            same_quantized(cuda, &moved, &expected)?;
        }
    }
    let dense = cuda.upload_matrix(&HostMatrix::Dense(t.clone()))?;
    let Data::Bf16(found) = &dense.data else { return Err("in 4 bits".into()) };
    let expected: Vec<bf16> = t.to_f32().into_iter().map(bf16::from_f32).collect();
    same("dense", &cuda.download(found)?, &expected)
}

fn same_quantized(cuda: &Cuda, found: &Matrix, expected: &nf4::Quantized) -> Outcome {
    let Data::Nf4 { packed, absmax, quant_type } = &found.data else { return Err("dense".into()) };
    assert_eq!(*quant_type, expected.quant_type);
    same("packed", &cuda.download(packed)?, &expected.packed)?;
    match (absmax, &expected.absmax) {
        (Absmax::Plain(found), nf4::Absmax::Plain(expected)) => same("absmax", &cuda.download(found)?, expected),
        (
            Absmax::Double { codes: a, nested_absmax: b, offset: c },
            nf4::Absmax::Double { codes, nested_absmax, offset },
        ) => {
            same("offset", &cuda.download(c)?, &[*offset])?;
            same("nested_absmax", &cuda.download(b)?, nested_absmax)?;
            same("codes", &cuda.download(a)?, codes)
        }
        _ => Err("double quantisation on one side alone".into()),
    }
}

/// One bad weight at either end, in the middle, in the last piece, in each type; and the largest numbers are fine.
fn not_finite() -> Outcome {
    let cuda = Cuda::open(0)?;
    let config = QuantConfig { quant_type: QuantType::Nf4, double_quant: true };
    let shape = vec![3, 1_000_001];
    for dtype in DTYPES {
        for (at, value) in [(0, f32::NAN), (3_000_002, f32::INFINITY), (1_234_567, f32::NEG_INFINITY), (777, 65504.0)] {
            let mut bytes = vec![0u8; 3_000_003 * dtype.size()];
            let bits = match dtype {
                Dtype::F32 => value.to_le_bytes().to_vec(),
                Dtype::Bf16 => bf16::from_f32(value).to_le_bytes().to_vec(),
                Dtype::F16 => f16::from_f32(value).to_le_bytes().to_vec(),
            };
            bytes[at * dtype.size()..(at + 1) * dtype.size()].copy_from_slice(&bits);
            let t = HostTensor::owned(dtype, shape.clone(), bytes).named("some.file".as_ref(), "some.weight");
            for w in [HostMatrix::Dense(t.clone()), HostMatrix::Quantize(t, config)] {
                let result = cuda.upload_matrix(&w);
                if value.is_finite() {
                    result?;
                    continue;
                }
                let error = result.err().ok_or("taken")?;
                let text = error.to_string();
                assert!(matches!(error, Error::Input { .. }), "{text}");
                let expected = ["some.file", "some.weight", &format!("{value} at index {at}")];
                assert!(expected.iter().all(|part| text.contains(part)), "{text}");
            }
        }
    }
    Ok(())
}

fn arena() -> Outcome {
    let t = random(300, 4096, Dtype::Bf16, 3);
    let config = QuantConfig { quant_type: QuantType::Nf4, double_quant: true };
    let expected = quantize(&t, QuantType::Nf4, true);
    // Room for the staging, or for the matrices alone.
    for (bytes, in_the_arena) in [(64 << 20, true), (4 << 20, false)] {
        let mut cuda = Cuda::open(0)?;
        cuda.reserve(bytes)?;
        let mut matrices = Vec::new();
        let mut taken = 0;
        cuda.upload_matrix(&HostMatrix::Quantized(expected.clone()))?; // the pinned buffers are there
        taken += cuda.arena_use().ok_or("no arena")?.0;
        let before = cuda.calls().allocations;
        for _ in 0..3 {
            let w = cuda.upload_matrix(&HostMatrix::Quantize(t.clone(), config))?;
            taken += w.bytes();
            assert_eq!(cuda.arena_use(), Some((taken, bytes)), "the matrix alone stays");
            matrices.push(w);
        }
        assert_eq!(cuda.calls().allocations == before, in_the_arena);
        for w in &matrices {
            same_quantized(&cuda, w, &expected)?;
        }
    }
    Ok(())
}

fn no_matrix() -> Outcome {
    let cuda = Cuda::open(0)?;
    let error =
        cuda.upload_matrix(&HostMatrix::Dense(HostTensor::from_f32(vec![3], &[1.0; 3]))).err().ok_or("taken")?;
    assert!(matches!(error, Error::Shape { op: "upload", .. }), "{error}");
    Ok(())
}
