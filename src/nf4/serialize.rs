//! The bitsandbytes serialisation: a 4-bit weight NAME as several tensors of a safetensors file.
//!
//! | tensor | dtype, shape | |
//! |---|---|---|
//! | NAME | U8 (ceil(n/2), 1) | packed codes |
//! | NAME.absmax | U8 or F32 (ceil(n/64)) | U8 under double quantisation |
//! | NAME.quant_map | F32 (16) | the code book |
//! | NAME.nested_absmax | F32 (ceil(n/64/256)) | double quantisation only |
//! | NAME.nested_quant_map | F32 (256) | double quantisation only |
//! | NAME.quant_state.bitsandbytes__nf4 (or fp4) | U8 | JSON: quant_type, blocksize, dtype, shape, nested_* |
//!
//! Writing gives the bytes that bitsandbytes 0.50 gives. Reading takes packed codes of any dtype and shape with the right
//! number of bytes (`bnb_4bit_quant_storage` may be bfloat16) and code books that may be absent or off by rounding;
//! everything else must be as above.

use std::borrow::Cow;
use std::path::Path;

use safetensors::Dtype as FileDtype;
use serde_json::Value;

use super::codebook::DYNAMIC;
use super::{Absmax, BLOCK, NESTED_BLOCK, QuantType, Quantized};
use crate::error::{Error, Result};
use crate::tensor::Dtype;

/// Between a weight's name and the rest of its parts' names.
const STATE: &str = ".quant_state.bitsandbytes__";

/// How far a stored code book may be from ours: releases of bitsandbytes differ by rounding.
const CODE_BOOK_TOLERANCE: f32 = 1e-6;

/// One tensor of a safetensors file.
#[derive(Clone, Debug, PartialEq)]
pub struct Part<'a> {
    pub dtype: FileDtype,
    pub shape: Vec<usize>,
    /// Little-endian, row-major.
    pub bytes: Cow<'a, [u8]>,
}

/// The JSON tensor `quant_state`.
#[derive(Clone, Debug, PartialEq)]
pub struct QuantState {
    pub quant_type: QuantType,
    /// dtype and shape of the tensor before quantisation.
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    /// `nested_offset`, under double quantisation.
    pub nested_offset: Option<f32>,
}

/// The weight's name, if `tensor` is a part that lies beside a 4-bit weight ("w.weight.absmax" gives "w.weight").
pub fn weight_of_part(tensor: &str) -> Option<&str> {
    if let Some((name, quant_type)) = tensor.rsplit_once(STATE) {
        return QuantType::from_name(quant_type).map(|_| name);
    }
    [".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map"].iter().find_map(|s| tensor.strip_suffix(s))
}

/// The name of a weight's `quant_state` tensor. Where it exists, the weight is in 4 bits.
pub fn state_name(weight: &str, quant_type: QuantType) -> String {
    format!("{weight}{STATE}{}", quant_type.name())
}

/// The tensors that hold `q` under the name `weight`.
pub fn to_parts<'a>(weight: &str, q: &'a Quantized) -> Vec<(String, Part<'a>)> {
    let u8s = |bytes: &'a [u8], shape| Part { dtype: FileDtype::U8, shape, bytes: bytes.into() };
    let f32s = |values: &'a [f32]| Part {
        dtype: FileDtype::F32,
        shape: vec![values.len()],
        bytes: bytemuck::cast_slice(values).into(),
    };
    let mut parts = vec![
        (weight.to_owned(), u8s(&q.packed, vec![q.packed.len(), 1])),
        (format!("{weight}.quant_map"), f32s(q.quant_type.code_book())),
    ];
    let nested_offset = match &q.absmax {
        Absmax::Plain(absmax) => {
            parts.push((format!("{weight}.absmax"), f32s(absmax)));
            None
        }
        Absmax::Double { codes, nested_absmax, offset } => {
            parts.push((format!("{weight}.absmax"), u8s(codes, vec![codes.len()])));
            parts.push((format!("{weight}.nested_absmax"), f32s(nested_absmax)));
            parts.push((format!("{weight}.nested_quant_map"), f32s(&DYNAMIC)));
            Some(*offset)
        }
    };
    let state =
        QuantState { quant_type: q.quant_type, dtype: q.source_dtype, shape: q.shape.clone(), nested_offset }.to_json();
    let part = Part { dtype: FileDtype::U8, shape: vec![state.len()], bytes: state.into_bytes().into() };
    parts.push((state_name(weight, q.quant_type), part));
    parts
}

/// Reads the 4-bit weight `weight`, or None if it has no `quant_state`. `get` finds a tensor by name; `file` is what
/// errors name. Errors: a missing part, wrong dtype or size, a block size or code book that is not bitsandbytes' default.
pub fn from_parts<'a>(
    file: &Path,
    weight: &str,
    mut get: impl FnMut(&str) -> Result<Option<Part<'a>>>,
) -> Result<Option<Quantized>> {
    let mut found = None;
    for quant_type in [QuantType::Nf4, QuantType::Fp4] {
        let name = state_name(weight, quant_type);
        if let Some(part) = get(&name)? {
            found = Some((quant_type, name, part));
            break;
        }
    }
    let Some((quant_type, state_name, part)) = found else { return Ok(None) };
    let state = QuantState::parse(file, &state_name, &part.bytes)?;
    if state.quant_type != quant_type {
        let found = format!("quant_type \"{}\"", state.quant_type.name());
        return Err(Error::input(file, state_name, found, format!("\"{}\", as in its name", quant_type.name())));
    }
    let mut optional = |suffix: &str| -> Result<(String, Option<Part<'a>>)> {
        let name = format!("{weight}{suffix}");
        let part = get(&name)?;
        Ok((name, part))
    };

    // `parse` has checked that the product is small enough.
    let n: usize = state.shape.iter().product();
    let blocks = n.div_ceil(BLOCK);
    let (name, packed) = required(file, optional("")?)?;
    expect_len(file, &name, packed.bytes.len(), n.div_ceil(2), "bytes")?;
    let packed = packed.bytes.into_owned();
    expect_code_book(file, optional(".quant_map")?, quant_type.code_book())?;
    let (name, absmax) = required(file, optional(".absmax")?)?;
    let absmax = match state.nested_offset {
        None => Absmax::Plain(expect_f32(file, &name, &absmax, blocks)?),
        Some(offset) => {
            if absmax.dtype != FileDtype::U8 {
                return Err(Error::input(file, name, format!("dtype {:?}", absmax.dtype), "U8 (double quantisation)"));
            }
            expect_len(file, &name, absmax.bytes.len(), blocks, "bytes")?;
            let codes = absmax.bytes.into_owned();
            let (name, nested) = required(file, optional(".nested_absmax")?)?;
            let nested_absmax = expect_f32(file, &name, &nested, blocks.div_ceil(NESTED_BLOCK))?;
            expect_code_book(file, optional(".nested_quant_map")?, &DYNAMIC)?;
            Absmax::Double { codes, nested_absmax, offset }
        }
    };
    Ok(Some(Quantized { quant_type, shape: state.shape, source_dtype: state.dtype, packed, absmax }))
}

fn required<'a>(file: &Path, (name, part): (String, Option<Part<'a>>)) -> Result<(String, Part<'a>)> {
    match part {
        Some(part) => Ok((name, part)),
        None => Err(Error::input(file, name, "no such tensor", "a part of the 4-bit weight")),
    }
}

fn expect_len(file: &Path, place: &str, found: usize, expected: usize, unit: &str) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    Err(Error::input(file, place, format!("{found} {unit}"), format!("{expected} {unit}, by the shape in quant_state")))
}

fn expect_f32(file: &Path, place: &str, part: &Part, len: usize) -> Result<Vec<f32>> {
    if part.dtype != FileDtype::F32 {
        return Err(Error::input(file, place, format!("dtype {:?}", part.dtype), "F32"));
    }
    expect_len(file, place, part.bytes.len(), len * 4, "bytes")?;
    let values: Vec<f32> = part.bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    match values.iter().position(|v| !v.is_finite()) {
        Some(i) => Err(Error::input(file, place, format!("{} at index {i}", values[i]), "finite values")),
        None => Ok(values),
    }
}

fn expect_code_book(file: &Path, (name, part): (String, Option<Part>), ours: &[f32]) -> Result<()> {
    let Some(part) = part else { return Ok(()) };
    let theirs = expect_f32(file, &name, &part, ours.len())?;
    match theirs.iter().zip(ours).position(|(a, b)| (a - b).abs() > CODE_BOOK_TOLERANCE) {
        Some(i) => {
            let expected = format!("bitsandbytes' code book, {} there", ours[i]);
            Err(Error::input(file, name, format!("{} at index {i}", theirs[i]), expected))
        }
        None => Ok(()),
    }
}

impl QuantState {
    /// Reads the JSON. `file` and `place` (the tensor's name) are what errors name.
    pub fn parse(file: &Path, place: &str, json: &[u8]) -> Result<Self> {
        let fail = |found: String, expected: &str| Error::input(file, place, found, expected);
        let value: Value = serde_json::from_slice(json).map_err(|e| fail(e.to_string(), "a JSON object"))?;
        let Value::Object(object) = &value else { return Err(fail(short(&value), "a JSON object")) };
        let key = |key: &str| object.get(key).unwrap_or(&Value::Null);
        let wrong = |name: &str, expected: &str| fail(format!("{name}: {}", short(key(name))), expected);

        let quant_type = key("quant_type").as_str().and_then(QuantType::from_name);
        let quant_type = quant_type.ok_or_else(|| wrong("quant_type", "\"nf4\" or \"fp4\""))?;
        let dtype = key("dtype").as_str().and_then(|d| Dtype::from_torch_name(d.trim_start_matches("torch.")));
        let dtype = dtype.ok_or_else(|| wrong("dtype", "\"float32\", \"bfloat16\" or \"float16\""))?;
        if key("blocksize").as_u64() != Some(BLOCK as u64) {
            return Err(wrong("blocksize", "64, the only block size that halfbyte runs"));
        }
        let dims = key("shape").as_array().and_then(|dims| dims.iter().map(to_usize).collect::<Option<Vec<_>>>());
        let shape = dims.filter(|dims| !dims.is_empty()).ok_or_else(|| wrong("shape", "a list of sizes"))?;
        let n = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d)).filter(|&n| n > 0 && n < 1 << 48);
        n.ok_or_else(|| wrong("shape", "a tensor of at least one element that fits in memory"))?;

        let nested_offset = if object.contains_key("nested_offset") || object.contains_key("nested_blocksize") {
            if key("nested_blocksize").as_u64() != Some(NESTED_BLOCK as u64) {
                return Err(wrong("nested_blocksize", "256, the only nested block size that halfbyte runs"));
            }
            if object.get("nested_dtype").is_some_and(|d| d != "float32" && d != "torch.float32") {
                return Err(wrong("nested_dtype", "\"float32\""));
            }
            let offset = key("nested_offset").as_f64().map(|o| o as f32).filter(|o| o.is_finite());
            Some(offset.ok_or_else(|| wrong("nested_offset", "a finite number"))?)
        } else {
            None
        };
        Ok(Self { quant_type, dtype, shape, nested_offset })
    }

    /// The JSON as Python's `json.dumps` writes it for bitsandbytes, byte for byte.
    pub fn to_json(&self) -> String {
        let dims: Vec<String> = self.shape.iter().map(usize::to_string).collect();
        let mut json = format!(
            r#"{{"quant_type": "{}", "blocksize": {BLOCK}, "dtype": "{}", "shape": [{}]"#,
            self.quant_type.name(),
            self.dtype.torch_name(),
            dims.join(", ")
        );
        if let Some(offset) = self.nested_offset {
            let offset = python_float(f64::from(offset));
            json += &format!(
                r#", "nested_blocksize": {NESTED_BLOCK}, "nested_dtype": "float32", "nested_offset": {offset}"#
            );
        }
        json + "}"
    }
}

fn to_usize(value: &Value) -> Option<usize> {
    value.as_u64().and_then(|v| usize::try_from(v).ok())
}

/// A JSON value for an error message: not longer than a line.
fn short(value: &Value) -> String {
    let text = if value.is_null() { "nothing".to_owned() } else { value.to_string() };
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

/// A float as Python's `repr` gives it: the shortest digits that read back, an exponent below 1e-4 and from 1e16 on.
fn python_float(x: f64) -> String {
    let scientific = format!("{x:e}");
    let Some((digits, exponent)) = scientific.split_once('e') else { return scientific };
    let exponent: i32 = exponent.parse().expect("Rust writes an integer exponent");
    if (-4..16).contains(&exponent) {
        return format!("{x:?}");
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{digits}e{sign}{:02}", exponent.abs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_print_as_python_prints_them() {
        for (x, text) in [
            (0.0, "0.0"),
            (1.0, "1.0"),
            (0.149964839220047, "0.149964839220047"),
            (0.0001, "0.0001"),
            (0.00002, "2e-05"),
            (1.5e-7, "1.5e-07"),
            (-2.5e-10, "-2.5e-10"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
        ] {
            assert_eq!(python_float(x), text);
        }
    }

    #[test]
    fn a_bad_quant_state_is_an_error_that_names_file_tensor_and_key() {
        let good = r#"{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [4, 8], "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.5}"#;
        let parse = |json: &str| QuantState::parse(Path::new("m.safetensors"), "w.quant_state", json.as_bytes());
        assert_eq!(parse(good).unwrap().to_json(), good);
        for (from, to, key) in [
            ("\"nf4\"", "\"int4\"", "quant_type"),
            ("64", "128", "blocksize"),
            ("\"bfloat16\"", "\"int8\"", "dtype"),
            ("[4, 8]", "[]", "shape"),
            ("[4, 8]", "[4, -8]", "shape"),
            ("[4, 8]", "[4, 0]", "shape"),
            ("[4, 8]", "[4294967296, 4294967296]", "shape"),
            ("256", "128", "nested_blocksize"),
            ("\"float32\"", "\"float64\"", "nested_dtype"),
            ("0.5", "null", "nested_offset"),
            ("0.5", "1e300", "nested_offset"),
            ("{", "[", "JSON"),
        ] {
            let error = parse(&good.replacen(from, to, 1)).unwrap_err();
            let text = error.to_string();
            assert!(text.starts_with("m.safetensors: w.quant_state: ") && text.contains(key), "{text}");
            assert_eq!(error.exit_code(), 2);
        }
    }
}
