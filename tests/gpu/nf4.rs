//! nf4_quantize, nf4_double_quantize, nf4_dequantize: equal bits to bitsandbytes' (fixtures) and to src/nf4, which shares
//! no code with the kernels. Outputs are poisoned first, and every op runs twice.

use std::path::{Path, PathBuf};

use half::{bf16, f16};
use halfbyte::Error;
use halfbyte::backend::cuda::Cuda;
use halfbyte::backend::cuda::ops::nf4::{
    self as ops, Nf4Dequantize, Nf4DequantizeRows, Nf4DoubleQuantize, Nf4Quantize, Nf4Weight, Output, Source,
};
use halfbyte::checkpoint::safetensors_file::SafeTensors;
use halfbyte::nf4::{Absmax, BLOCK, NESTED_BLOCK, QuantType, Quantized, quantize};
use halfbyte::tensor::{Dtype, HostTensor};
use libtest_mimic::{Failed, Trial};

use crate::support::{Outcome, elements, poisoned, same};

/// Around blocks, bytes, vectors of 8, a CTA's share (2048 and 8192), a nested block (16384), and beyond.
const SIZES: [usize; 19] =
    [1, 2, 3, 7, 8, 63, 64, 65, 127, 2047, 2048, 2050, 8191, 8192, 8195, 16_384, 16_385, 70_001, 1_000_003];
/// A gate projection of Mistral-7B.
const LARGE: usize = 14_336 * 4096;

pub fn trials(folder: &Path) -> Vec<Trial> {
    let mut trials = vec![Trial::test("nf4/wrong_sizes_name_the_op_and_the_argument", wrong_sizes)];
    // Rows of whole blocks, rows that share blocks, rows of an odd number of nibbles; more than one nested block.
    for (n, k) in [(70, 320), (400, 128), (37, 96), (130, 51), (5, 1)] {
        trials.push(Trial::test(format!("nf4/rows/{n}x{k}"), move || rows_of_a_matrix(n, k)));
    }
    match fixture_files(folder) {
        Ok(files) => files.into_iter().for_each(|(name, file)| fixture_trials(&mut trials, &name, &file)),
        Err(why) => trials.push(Trial::test("nf4/fixtures", move || Err(why))),
    }
    for dtype in [Dtype::F32, Dtype::Bf16, Dtype::F16] {
        for n in SIZES {
            let name = format!("nf4/random/{n}_{}", dtype.torch_name());
            trials.push(Trial::test(name, move || agrees_with_the_host(&random(n, dtype, n as u64))));
        }
        let name = format!("nf4/large/{LARGE}_{}", dtype.torch_name());
        trials.push(Trial::test(name, move || agrees_with_the_host(&random(LARGE, dtype, 1))));
    }
    let corners = [("zeros", 0.0f32), ("subnormal", 1e-42), ("smallest_normal", 1.2e-38), ("huge", 3e38)];
    for (name, value) in corners {
        let values: Vec<f32> = (0..1000).map(|i| if i < 300 { 0.0 } else { value * (i % 7) as f32 / 6.0 }).collect();
        let x = HostTensor::from_f32(vec![1000], &values);
        trials.push(Trial::test(format!("nf4/corner/{name}"), move || agrees_with_the_host(&x)));
    }
    trials
}

fn fixture_files(folder: &Path) -> Result<Vec<(String, PathBuf)>, Failed> {
    let index = std::fs::read_to_string(folder.join("index.json"));
    let index: serde_json::Map<String, serde_json::Value> =
        serde_json::from_str(&index.map_err(|e| format!("{}: {e}", folder.display()))?)?;
    Ok(index.keys().map(|name| (name.clone(), folder.join(format!("{name}.safetensors")))).collect())
}

fn fixture_trials(trials: &mut Vec<Trial>, name: &str, file: &Path) {
    for (quant_type, kind) in [(QuantType::Nf4, "nf4"), (QuantType::Fp4, "fp4")] {
        for (double_quant, form) in [(true, "dq"), (false, "plain")] {
            let key = format!("{kind}.{form}");
            let (path, key2) = (file.to_path_buf(), key.clone());
            trials.push(Trial::test(format!("nf4/{name}/{key}/quantize"), move || {
                fixture_quantize(&SafeTensors::open(&path)?, &key2, quant_type, double_quant)
            }));
            let path = file.to_path_buf();
            trials.push(Trial::test(format!("nf4/{name}/{key}/dequantize"), move || {
                fixture_dequantize(&SafeTensors::open(&path)?, &key, quant_type, double_quant)
            }));
        }
    }
}

/// Packed bytes and f32 absmax are bitsandbytes' own. The offset is a mean whose order of summation is free, so what
/// hangs on it is compared with src/nf4, whose golden tests hold it to the fixture.
fn fixture_quantize(file: &SafeTensors, key: &str, quant_type: QuantType, double_quant: bool) -> Outcome {
    let input = file.dense("input")?;
    let found = gpu_quantize(&Cuda::open(0)?, &input, quant_type, double_quant)?;
    same("packed", &found.packed, file.get(&format!("{key}.packed"))?.bytes)?;
    match &found.absmax {
        Absmax::Plain(absmax) => same("absmax", absmax, &file.dense(&format!("{key}.absmax"))?.to_f32())?,
        Absmax::Double { offset, .. } => {
            let expected = file.dense(&format!("{key}.nested_offset"))?.to_f32()[0];
            assert!((offset - expected).abs() <= 1e-6 * expected.abs(), "offset {offset}, expected {expected}");
        }
    }
    same_quantized(&found, &quantize(&input, quant_type, double_quant))
}

fn fixture_dequantize(file: &SafeTensors, key: &str, quant_type: QuantType, double_quant: bool) -> Outcome {
    let dense = |name: &str| file.dense(&format!("{key}.{name}")).map(|t| t.to_f32());
    let input = file.entry("input")?;
    let absmax = if double_quant {
        let codes = file.get(&format!("{key}.absmax"))?.bytes.to_vec();
        Absmax::Double { codes, nested_absmax: dense("nested_absmax")?, offset: dense("nested_offset")?[0] }
    } else {
        Absmax::Plain(dense("absmax")?)
    };
    let expected = file.dense(&format!("{key}.dequant"))?;
    let quantized = Quantized {
        quant_type,
        shape: input.shape.clone(),
        source_dtype: expected.dtype,
        packed: file.get(&format!("{key}.packed"))?.bytes.to_vec(),
        absmax,
    };
    let cuda = Cuda::open(0)?;
    let (wide, narrow) = gpu_dequantize(&cuda, &quantized)?;
    same("bf16, against the f32 output", &narrow, &wide.iter().map(|&v| bf16::from_f32(v)).collect::<Vec<_>>())?;
    match expected.dtype {
        Dtype::F32 => same("f32", &wide, &expected.to_f32())?,
        Dtype::Bf16 => same("bf16", bytemuck::cast_slice(&narrow), expected.bytes())?,
        Dtype::F16 => {
            let rounded: Vec<f16> = wide.iter().map(|&v| f16::from_f32(v)).collect();
            same("f16", bytemuck::cast_slice(&rounded), expected.bytes())?;
        }
    }
    let in_f32 = format!("{key}.dequant_f32");
    if file.contains(&in_f32) {
        same("dequant_f32", &wide, &file.dense(&in_f32)?.to_f32())?;
    }
    Ok(())
}

/// Quantise and back, both types, both kinds of absmax, twice each: the same bits as src/nf4.
fn agrees_with_the_host(x: &HostTensor) -> Outcome {
    let cuda = Cuda::open(0)?;
    for quant_type in [QuantType::Nf4, QuantType::Fp4] {
        for double_quant in [false, true] {
            let expected = quantize(x, quant_type, double_quant);
            let found = gpu_quantize(&cuda, x, quant_type, double_quant)?;
            same_quantized(&found, &expected)?;
            same_quantized(&gpu_quantize(&cuda, x, quant_type, double_quant)?, &found)?;

            let (wide, narrow) = gpu_dequantize(&cuda, &expected)?;
            let values = expected.dequantize();
            let rounded: Vec<_> = values.iter().map(|&v| bf16::from_f32(v)).collect();
            same("f32", &one_nan(&wide, f32::NAN), &one_nan(&values, f32::NAN))?;
            same("bf16", &one_nan(&narrow, bf16::NAN), &one_nan(&rounded, bf16::NAN))?;
            let again = gpu_dequantize(&cuda, &expected)?;
            same("f32, second run", &again.0, &wide)?;
            same("bf16, second run", &again.1, &narrow)?;
        }
    }
    Ok(())
}

/// Any range of rows has the bits that the whole matrix has there, and nothing behind it is written.
fn rows_of_a_matrix(n: usize, k: usize) -> Outcome {
    let cuda = Cuda::open(0)?;
    let x = random(n * k, Dtype::F32, (n + k) as u64);
    for quant_type in [QuantType::Nf4, QuantType::Fp4] {
        for double_quant in [false, true] {
            let host = quantize(&x, quant_type, double_quant);
            let all: Vec<bf16> = host.dequantize().iter().map(|&v| bf16::from_f32(v)).collect();
            let packed = cuda.upload(&host.packed)?;
            let empty = (cuda.zeros::<u8>(0)?, cuda.zeros::<f32>(0)?, cuda.zeros::<f32>(0)?);
            let (plain, (codes, nested_absmax, offset)) = match &host.absmax {
                Absmax::Plain(absmax) => (cuda.upload(absmax)?, empty),
                Absmax::Double { codes, nested_absmax, offset } => {
                    (cuda.zeros(0)?, (cuda.upload(codes)?, cuda.upload(nested_absmax)?, cuda.upload(&[*offset])?))
                }
            };
            let absmax = if double_quant {
                let (codes, nested_absmax, offset) = (codes.view(), nested_absmax.view(), offset.view());
                ops::Absmax::Double { codes, nested_absmax, offset }
            } else {
                ops::Absmax::Plain(plain.view())
            };
            let w = Nf4Weight { packed: packed.view(), absmax, quant_type, n, k };
            for (first_row, rows) in [(0, n), (1, n - 1), (n / 2, 2), (n - 1, 1), (n, 0), (n / 3, n / 4)] {
                for start in [0, 8, 1] {
                    let mut out = poisoned::<bf16>(&cuda, start + rows * k + 5)?;
                    let poison = cuda.download(&out)?;
                    let end = out.len();
                    let part = out.range_mut(start..end);
                    ops::nf4_dequantize_rows(&cuda, Nf4DequantizeRows { out: part, w, first_row, rows })?;
                    let mut expected = poison;
                    expected[start..start + rows * k].copy_from_slice(&all[first_row * k..(first_row + rows) * k]);
                    same(&format!("rows {first_row} + {rows} at {start}"), &cuda.download(&out)?, &expected)?;
                }
            }
            let mut out = cuda.zeros::<bf16>(n * k)?;
            let op = Nf4DequantizeRows { out: out.view_mut(), w, first_row: 1, rows: n };
            let error = ops::nf4_dequantize_rows(&cuda, op).err().ok_or("a row too many was taken")?;
            let named = matches!(error, Error::Shape { argument: "first_row + rows", .. });
            assert!(named, "{error}");
        }
    }
    Ok(())
}

/// NaN has many bit patterns, and which one arithmetic gives is the processor's choice: here all become one.
#[allow(clippy::eq_op, reason = "only NaN differs from itself")]
fn one_nan<T: Copy + PartialEq>(values: &[T], nan: T) -> Vec<T> {
    values.iter().map(|&v| if v != v { nan } else { v }).collect()
}

fn same_quantized(found: &Quantized, expected: &Quantized) -> Outcome {
    same("packed", &found.packed, &expected.packed)?;
    match (&found.absmax, &expected.absmax) {
        (Absmax::Plain(a), Absmax::Plain(b)) => same("absmax", a, b),
        (
            Absmax::Double { codes, nested_absmax, offset },
            Absmax::Double { codes: codes2, nested_absmax: nested2, offset: offset2 },
        ) => {
            same("offset", &[*offset], &[*offset2])?;
            same("nested_absmax", nested_absmax, nested2)?;
            same("absmax codes", codes, codes2)
        }
        _ => Err("one is double-quantised, the other is not".into()),
    }
}

fn wrong_sizes() -> Outcome {
    let cuda = Cuda::open(0)?;
    let x = cuda.upload(&[1.0f32; 130])?;
    let (mut packed, mut absmax) = (cuda.zeros::<u8>(65)?, cuda.zeros::<f32>(2)?);
    let op = Nf4Quantize {
        packed: packed.view_mut(),
        absmax: absmax.view_mut(),
        x: Source::F32(x.view()),
        quant_type: QuantType::Nf4,
    };
    let error = ops::nf4_quantize(&cuda, op).err().ok_or("an absmax too short was taken")?;
    let named = matches!(error, Error::Shape { op: "nf4_quantize", argument: "absmax", found: 2, expected: 3 });
    assert!(named, "{error}");
    let mut out = cuda.zeros::<bf16>(131)?;
    let op = Nf4Dequantize {
        out: Output::Bf16(out.view_mut()),
        packed: packed.view(),
        absmax: ops::Absmax::Plain(absmax.view()),
        quant_type: QuantType::Nf4,
    };
    let error = ops::nf4_dequantize(&cuda, op).err().ok_or("packed too short was taken")?;
    let named = matches!(error, Error::Shape { op: "nf4_dequantize", argument: "packed", found: 65, expected: 66 });
    assert!(named, "{error}");
    Ok(())
}

fn gpu_quantize(cuda: &Cuda, x: &HostTensor, quant_type: QuantType, double_quant: bool) -> Result<Quantized, Error> {
    let blocks = x.len().div_ceil(BLOCK);
    let mut packed = poisoned::<u8>(cuda, x.len().div_ceil(2))?;
    let mut absmax = poisoned::<f32>(cuda, blocks)?;
    let mut run = |x| {
        let (packed, absmax) = (packed.view_mut(), absmax.view_mut());
        ops::nf4_quantize(cuda, Nf4Quantize { packed, absmax, x, quant_type })
    };
    match x.dtype {
        Dtype::F32 => run(Source::F32(cuda.upload(&elements(x.bytes()))?.view())),
        Dtype::Bf16 => run(Source::Bf16(cuda.upload(&elements(x.bytes()))?.view())),
        Dtype::F16 => run(Source::F16(cuda.upload(&elements(x.bytes()))?.view())),
    }?;
    let absmax = if double_quant {
        let mut codes = poisoned::<u8>(cuda, blocks)?;
        let mut nested_absmax = poisoned::<f32>(cuda, blocks.div_ceil(NESTED_BLOCK))?;
        let mut offset = poisoned::<f32>(cuda, 1)?;
        let mut scratch = poisoned::<f64>(cuda, ops::DOUBLE_QUANTIZE_SCRATCH)?;
        let op = Nf4DoubleQuantize {
            codes: codes.view_mut(),
            nested_absmax: nested_absmax.view_mut(),
            offset: offset.view_mut(),
            scratch: scratch.view_mut(),
            absmax: absmax.view(),
        };
        ops::nf4_double_quantize(cuda, op)?;
        let (codes, nested_absmax) = (cuda.download(&codes)?, cuda.download(&nested_absmax)?);
        Absmax::Double { codes, nested_absmax, offset: cuda.download(&offset)?[0] }
    } else {
        Absmax::Plain(cuda.download(&absmax)?)
    };
    let packed = cuda.download(&packed)?;
    Ok(Quantized { quant_type, shape: x.shape.clone(), source_dtype: x.dtype, packed, absmax })
}

/// In f32 and in bf16.
fn gpu_dequantize(cuda: &Cuda, q: &Quantized) -> Result<(Vec<f32>, Vec<bf16>), Error> {
    let packed = cuda.upload(&q.packed)?;
    let mut wide = poisoned::<f32>(cuda, q.len())?;
    let mut narrow = poisoned::<bf16>(cuda, q.len())?;
    for out in [Output::F32(wide.view_mut()), Output::Bf16(narrow.view_mut())] {
        match &q.absmax {
            Absmax::Plain(absmax) => {
                let absmax = cuda.upload(absmax)?;
                let (packed, absmax) = (packed.view(), ops::Absmax::Plain(absmax.view()));
                ops::nf4_dequantize(cuda, Nf4Dequantize { out, packed, absmax, quant_type: q.quant_type })?;
            }
            Absmax::Double { codes, nested_absmax, offset } => {
                let (codes, nested_absmax) = (cuda.upload(codes)?, cuda.upload(nested_absmax)?);
                let offset = cuda.upload(&[*offset])?;
                let (packed, codes, nested_absmax) = (packed.view(), codes.view(), nested_absmax.view());
                let absmax = ops::Absmax::Double { codes, nested_absmax, offset: offset.view() };
                ops::nf4_dequantize(cuda, Nf4Dequantize { out, packed, absmax, quant_type: q.quant_type })?;
            }
        }
    }
    Ok((cuda.download(&wide)?, cuda.download(&narrow)?))
}

/// `n` values, the magnitude differing from block to block by up to a factor of 100, some exactly zero.
fn random(n: usize, dtype: Dtype, seed: u64) -> HostTensor {
    let mut state = seed;
    let mut next = move || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = (state ^ state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ z >> 31) >> 40) as f32 / (1 << 24) as f32
    };
    let mut bytes = Vec::with_capacity(n * dtype.size());
    let mut scale = 0.0;
    for i in 0..n {
        if i % BLOCK == 0 {
            scale = 0.02 * 10f32.powf(2.0 * next() - 1.0);
        }
        let u = next();
        let value = if u < 0.01 { 0.0 } else { scale * (u + next() + next() - 1.5) };
        match dtype {
            Dtype::F32 => bytes.extend_from_slice(&value.to_le_bytes()),
            Dtype::Bf16 => bytes.extend_from_slice(&bf16::from_f32(value).to_le_bytes()),
            Dtype::F16 => bytes.extend_from_slice(&f16::from_f32(value).to_le_bytes()),
        }
    }
    HostTensor::owned(dtype, vec![n], bytes)
}
