//! The codec against a slow reading of the rules that shares no code with it, and round trips at every kind of size.

use std::path::Path;

use half::{bf16, f16};
use proptest::prelude::*;

use super::serialize::{self, Part};
use super::*;
use crate::error::{Error, Result};
use crate::tensor::HostTensor;

const BOTH: [QuantType; 2] = [QuantType::Nf4, QuantType::Fp4];

/// Sizes around a nibble, a block, a nested group and a task of the encoder.
const SIZES: [usize; 14] = [1, 2, 3, 63, 64, 65, 127, 128, 129, 1887, 16384, 16385, 65536, 65 * 1024 + 7];

fn values(n: usize, seed: u64) -> Vec<f32> {
    use crate::rng::{Stream, uniform};
    (0..n as u64)
        .map(|i| {
            let u = uniform(seed, Stream::Init, 0, i) - 0.5;
            // Magnitudes over five decades, a zero here and there.
            u * 10f32.powi((i / 64 % 5) as i32 - 3) * f32::from(i % 37 != 0)
        })
        .collect()
}

fn tensor(dtype: Dtype, x: &[f32]) -> HostTensor {
    let bytes = match dtype {
        Dtype::F32 => x.iter().flat_map(|v| v.to_le_bytes()).collect(),
        Dtype::Bf16 => x.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect(),
        Dtype::F16 => x.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect(),
    };
    HostTensor::owned(dtype, vec![x.len()], bytes)
}

fn nibble(q: &Quantized, i: usize) -> usize {
    usize::from(q.packed[i / 2] >> (4 * (1 - i % 2)) & 15)
}

/// Absmax and codes of one block, straight from the rule: count midpoints of the sorted code book.
fn oracle(x: &[f32], quant_type: QuantType) -> (f32, Vec<usize>) {
    let book = quant_type.code_book();
    let mut order: Vec<usize> = (0..16).collect();
    order.sort_by(|&a, &b| book[a].partial_cmp(&book[b]).unwrap());
    let absmax = x.iter().fold(0f32, |m, v| m.max(v.abs()));
    let code = |v: &f32| {
        let s = v * (1.0 / absmax.max(1e-38));
        order[order.windows(2).take_while(|w| s > (book[w[0]] + book[w[1]]) / 2.0).count()]
    };
    (absmax, x.iter().map(code).collect())
}

#[test]
fn codes_and_absmax_follow_the_rule_at_every_size_and_dtype() {
    for (i, n) in SIZES.into_iter().enumerate() {
        for quant_type in BOTH {
            let dtype = [Dtype::F32, Dtype::Bf16, Dtype::F16][i % 3];
            let source = tensor(dtype, &values(n, n as u64));
            let q = quantize(&source, quant_type, false);
            assert_eq!(q.packed.len(), n.div_ceil(2));
            let Absmax::Plain(absmax) = &q.absmax else { panic!("asked for plain absmax") };
            for (b, x) in source.to_f32().chunks(64).enumerate() {
                let (expected, codes) = oracle(x, quant_type);
                assert_eq!(absmax[b], expected, "absmax of block {b}");
                let found: Vec<usize> = (0..x.len()).map(|j| nibble(&q, 64 * b + j)).collect();
                assert_eq!(found, codes, "{quant_type:?}, size {n}, block {b}");
            }
            if n % 2 == 1 {
                assert_eq!(q.packed[n / 2] & 15, if quant_type == QuantType::Nf4 { 7 } else { 0 }, "pad nibble");
            }
        }
    }
}

#[test]
fn one_block_has_nested_absmax_zero_and_decodes_its_absmax_exactly() {
    for n in [1, 17, 64] {
        let q = quantize(&tensor(Dtype::F32, &values(n, 5)), QuantType::Nf4, true);
        let plain = quantize(&tensor(Dtype::F32, &values(n, 5)), QuantType::Nf4, false);
        let Absmax::Double { nested_absmax, codes, .. } = &q.absmax else { panic!("asked for double quantisation") };
        assert_eq!((nested_absmax.as_slice(), codes.as_slice()), ([0.0].as_slice(), [127].as_slice()));
        assert_eq!(q.decoded_absmax(), plain.decoded_absmax());
        assert_eq!(q.dequantize(), plain.dequantize());
    }
}

#[test]
fn a_block_of_zeros_decodes_to_zeros_even_under_double_quantisation() {
    let mut x = values(640, 9);
    x[128..256].fill(0.0);
    for quant_type in BOTH {
        for double_quant in [false, true] {
            let q = quantize(&tensor(Dtype::F32, &x), quant_type, double_quant);
            assert!(q.dequantize()[128..256].iter().all(|&v| v == 0.0));
            if quant_type == QuantType::Nf4 {
                assert!(q.packed[64..128].iter().all(|&b| b == 0x77));
            }
        }
    }
}

#[test]
fn double_quantised_absmax_is_near_the_plain_one() {
    let x: Vec<f32> = values(65 * 1024, 3).iter().enumerate().map(|(i, v)| v + 0.01 * (i % 3) as f32).collect();
    let source = tensor(Dtype::F32, &x);
    let plain = quantize(&source, QuantType::Nf4, false).decoded_absmax();
    let q = quantize(&source, QuantType::Nf4, true);
    let Absmax::Double { nested_absmax, .. } = &q.absmax else { panic!("asked for double quantisation") };
    for (i, (a, b)) in plain.iter().zip(q.decoded_absmax()).enumerate() {
        // Neighbours of the dynamic code are nowhere further apart than 1.6 % of the range.
        assert!((a - b).abs() <= 0.008 * nested_absmax[i / 256], "block {i}: {a} against {b}");
    }
}

#[test]
fn the_result_does_not_depend_on_the_number_of_threads() {
    let source = tensor(Dtype::Bf16, &values(200_001, 11));
    let with = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let q = quantize(&source, QuantType::Nf4, true);
            let values = q.dequantize();
            (q, values)
        })
    };
    let one = with(1);
    assert!([2, 3, 7].into_iter().all(|threads| with(threads) == one));
}

#[test]
fn values_that_are_not_finite_do_not_panic() {
    let mut x = values(200, 1);
    (x[3], x[70], x[130]) = (f32::NAN, f32::INFINITY, f32::NEG_INFINITY);
    for quant_type in BOTH {
        for double_quant in [false, true] {
            quantize(&tensor(Dtype::F32, &x), quant_type, double_quant).dequantize();
        }
    }
}

#[test]
fn an_empty_tensor_stays_empty() {
    let q = quantize(&HostTensor::from_f32(vec![0, 64], &[]), QuantType::Nf4, true);
    assert!(q.is_empty() && q.absmax.is_empty() && q.dequantize().is_empty());
}

#[test]
fn rows_of_a_matrix_are_the_same_as_in_the_whole() {
    for k in [1, 50, 64, 96, 202] {
        let source = HostTensor::from_f32(vec![13, k], &values(13 * k, 2));
        let q = quantize(&source, QuantType::Fp4, true);
        let whole = q.dequantize();
        let mut rows = vec![0.0; 4 * k];
        q.dequantize_rows(7, 4, &mut rows);
        assert_eq!(rows, whole[7 * k..11 * k], "K = {k}");
    }
}

/// The parts of `q` after a change, read back.
fn reread(q: &Quantized, change: impl FnOnce(&mut Vec<(String, Part)>)) -> Result<Option<Quantized>> {
    let mut parts = serialize::to_parts("w.weight", q);
    change(&mut parts);
    serialize::from_parts(Path::new("m.safetensors"), "w.weight", |name| {
        Ok(parts.iter().find(|(n, _)| n == name).map(|(_, p)| p.clone()))
    })
}

fn remove(suffix: &'static str) -> impl FnOnce(&mut Vec<(String, Part)>) {
    move |parts| parts.retain(|(n, _)| *n != format!("w.weight{suffix}"))
}

fn part<'a, 'b>(parts: &'a mut [(String, Part<'b>)], suffix: &str) -> &'a mut Part<'b> {
    let name = format!("w.weight{suffix}");
    &mut parts.iter_mut().find(|(n, _)| *n == name).expect("a part of that name").1
}

#[test]
fn a_damaged_part_is_an_error_that_names_file_and_tensor() {
    let q = quantize(&tensor(Dtype::Bf16, &values(40_000, 4)), QuantType::Nf4, true);
    let check = |result: Result<Option<Quantized>>, suffix: &str| {
        let error = result.expect_err(suffix);
        assert!(matches!(&error, Error::Input { place, .. } if place == &format!("w.weight{suffix}")), "{error}");
    };
    for suffix in ["", ".absmax", ".nested_absmax"] {
        check(reread(&q, remove(suffix)), suffix);
        check(reread(&q, |p| part(p, suffix).bytes.to_mut().truncate(8)), suffix);
    }
    for suffix in [".quant_map", ".nested_quant_map"] {
        check(reread(&q, |p| part(p, suffix).bytes.to_mut()[2] ^= 0x40), suffix);
    }
    check(reread(&q, |p| part(p, ".absmax").dtype = safetensors::Dtype::F32), ".absmax");
    check(reread(&q, |p| part(p, ".nested_absmax").dtype = safetensors::Dtype::BF16), ".nested_absmax");
    let nan = |p: &mut Vec<(String, Part)>| part(p, ".nested_absmax").bytes.to_mut()[..4].fill(0xff);
    check(reread(&q, nan), ".nested_absmax");
    assert_eq!(reread(&q, remove(".quant_state.bitsandbytes__nf4")).unwrap(), None, "not in 4 bits without its state");
}

#[test]
fn code_books_may_be_absent_and_packed_codes_may_be_stored_as_bf16() {
    let q = quantize(&tensor(Dtype::F16, &values(4096, 4)), QuantType::Fp4, true);
    let same = reread(&q, |p| {
        p.retain(|(n, _)| !n.ends_with("quant_map"));
        let packed = part(p, "");
        (packed.dtype, packed.shape) = (safetensors::Dtype::BF16, vec![1024, 1]);
    });
    assert_eq!(same.unwrap(), Some(q));
}

#[test]
fn parts_are_told_from_weights_by_name() {
    let w = "model.layers.0.mlp.up_proj.weight";
    let q = quantize(&tensor(Dtype::F32, &values(64, 4)), QuantType::Fp4, true);
    for (name, _) in serialize::to_parts(w, &q) {
        assert_eq!(serialize::weight_of_part(&name), (name != w).then_some(w), "{name}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn packing_keeps_every_code(codes in prop::collection::vec(0usize..16, 1..300), fp4: bool) {
        // A tensor whose values are code book values times 1: each block has absmax 1, so codes come back as they went in.
        let quant_type = BOTH[usize::from(fp4)];
        let book = quant_type.code_book();
        let mut x: Vec<f32> = codes.iter().map(|&c| book[c]).collect();
        for block in x.chunks_mut(64) {
            block[0] = 1.0;
        }
        let q = quantize(&tensor(Dtype::F32, &x), quant_type, false);
        prop_assert_eq!(q.dequantize(), x);
    }

    #[test]
    fn any_range_equals_that_part_of_the_whole(n in 1usize..2000, a in 0usize..2000, len in 0usize..2000, dq: bool) {
        let q = quantize(&tensor(Dtype::F32, &values(n, 8)), QuantType::Nf4, dq);
        let whole = q.dequantize();
        let oracle: Vec<f32> = (0..n).map(|i| codebook::NF4[nibble(&q, i)] * q.absmax.get(i / 64)).collect();
        prop_assert_eq!(&whole, &oracle);
        let start = a.min(n);
        let end = (start + len).min(n);
        let (mut out, mut with) = (vec![f32::NAN; end - start], vec![f32::NAN; end - start]);
        q.dequantize_range(start, &mut out);
        q.dequantize_range_with(&q.decoded_absmax(), start, &mut with);
        prop_assert_eq!(&out, &whole[start..end]);
        prop_assert_eq!(&with, &out);
    }

    #[test]
    fn what_is_serialised_parses_to_the_same(n in 1usize..40_000, kind in 0usize..3, fp4: bool, dq: bool) {
        let dtype = [Dtype::F32, Dtype::Bf16, Dtype::F16][kind];
        let q = quantize(&tensor(dtype, &values(n, 8)), BOTH[usize::from(fp4)], dq);
        prop_assert_eq!(reread(&q, |_| ()).unwrap(), Some(q));
    }

    #[test]
    fn no_quant_state_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = serialize::QuantState::parse(Path::new("f"), "t", &bytes);
    }
}
