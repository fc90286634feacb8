//! The 4-bit codec against bitsandbytes: `nf4/index.json` lists the cases, each in a file of its own.

use std::path::{Path, PathBuf};

use half::{bf16, f16};
use halfbyte::nf4::codebook::DYNAMIC;
use halfbyte::nf4::serialize::{self, Part};
use halfbyte::nf4::{Absmax, QuantType, Quantized, quantize};
use halfbyte::tensor::{Dtype, HostTensor};
use libtest_mimic::{Failed, Trial};

use crate::files::{Fixture, near, same_bits, same_bytes};

/// Offset of double quantisation: the order of its sum is free.
const NESTED_OFFSET: f64 = 1e-6;
const NESTED_ABSMAX: f64 = 1e-5;
/// A double-quantised absmax may be one code off only this near a midpoint, in units of nested_absmax.
const NESTED_TIE: f32 = 1e-5;

pub fn cases(folder: &Path) -> Result<Vec<Trial>, Failed> {
    let index = std::fs::read(folder.join("index.json"))?;
    let index: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(&index)?;
    let mut trials = Vec::new();
    for name in index.keys() {
        for quant_type in [QuantType::Nf4, QuantType::Fp4] {
            for double_quant in [true, false] {
                let key = format!("{}.{}", quant_type.name(), if double_quant { "dq" } else { "plain" });
                let path = folder.join(format!("{name}.safetensors"));
                let case = Case { path, key: key.clone(), quant_type, double_quant };
                trials.push(Trial::test(format!("nf4/{name}/{key}"), move || case.run()));
            }
        }
    }
    Ok(trials)
}

struct Case {
    path: PathBuf,
    /// "nf4.dq" and so on: the prefix of the case's tensors.
    key: String,
    quant_type: QuantType,
    double_quant: bool,
}

const WEIGHT: &str = "some.weight";

impl Case {
    fn run(&self) -> Result<(), Failed> {
        let fixture = Fixture::open(&self.path)?;
        let stored = serialize::from_parts(&self.path, WEIGHT, |name| Ok(self.part(&fixture, name)))?;
        let stored = stored.ok_or("the case has no quant_state")?;
        self.decoding_is_exact(&fixture, &stored)?;
        self.writing_gives_the_same_parts(&fixture, &stored)?;
        self.encoding_gives_the_same_bytes(&fixture, &stored)
    }

    /// The fixture's tensor that a checkpoint would hold under `name`.
    fn part<'a>(&self, fixture: &'a Fixture, name: &str) -> Option<Part<'a>> {
        let suffix = match name.strip_prefix(WEIGHT)?.trim_start_matches('.') {
            "" => "packed",
            "quant_map" => "code",
            "nested_quant_map" => "nested_code",
            other => other,
        };
        let stored = fixture.get(&format!("{}.{suffix}", self.key))?;
        Some(Part { dtype: stored.dtype, shape: stored.shape, bytes: stored.bytes.into() })
    }

    fn decoding_is_exact(&self, fixture: &Fixture, stored: &Quantized) -> Result<(), Failed> {
        let key = &self.key;
        if let Absmax::Double { offset, .. } = &stored.absmax {
            same_bits("nested_offset", &[*offset], &fixture.f32s(&format!("{key}.nested_offset"))?)?;
            same_bits("absmax_decoded", &stored.decoded_absmax(), &fixture.f32s(&format!("{key}.absmax_decoded"))?)?;
        }
        let values = stored.dequantize();
        let expected = fixture.require(&format!("{key}.dequant"))?;
        let rounded: Vec<u8> = match stored.source_dtype {
            Dtype::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            Dtype::Bf16 => values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect(),
            Dtype::F16 => values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect(),
        };
        same_bytes("dequant", &rounded, expected.bytes)?;
        if fixture.get(&format!("{key}.dequant_f32")).is_some() {
            same_bits("dequant_f32", &values, &fixture.f32s(&format!("{key}.dequant_f32"))?)?;
        }
        Ok(())
    }

    fn writing_gives_the_same_parts(&self, fixture: &Fixture, stored: &Quantized) -> Result<(), Failed> {
        let parts = serialize::to_parts(WEIGHT, stored);
        let expected_count = if self.double_quant { 6 } else { 4 };
        if parts.len() != expected_count {
            return Err(format!("{} parts written, expected {expected_count}", parts.len()).into());
        }
        for (name, part) in parts {
            let expected = self.part(fixture, &name).ok_or_else(|| format!("wrote {name}, which the case lacks"))?;
            same_bytes(&name, &part.bytes, &expected.bytes)?;
            let shape = if name == WEIGHT { vec![stored.len().div_ceil(2), 1] } else { expected.shape };
            if (part.dtype, &part.shape) != (expected.dtype, &shape) {
                return Err(format!("{name}: wrote {:?} {:?}", part.dtype, part.shape).into());
            }
        }
        Ok(())
    }

    fn encoding_gives_the_same_bytes(&self, fixture: &Fixture, stored: &Quantized) -> Result<(), Failed> {
        let input = fixture.require("input")?;
        let source = HostTensor::owned(stored.source_dtype, input.shape, input.bytes.to_vec());
        let ours = quantize(&source, self.quant_type, self.double_quant);
        if (&ours.shape, ours.source_dtype) != (&stored.shape, stored.source_dtype) {
            return Err(format!("quantised to {:?} {:?}", ours.source_dtype, ours.shape).into());
        }
        same_bytes("packed", &zeros_alike(&ours), &zeros_alike(stored))?;
        match (&ours.absmax, &stored.absmax) {
            (Absmax::Plain(ours), Absmax::Plain(stored)) => same_bits("absmax", ours, stored),
            (
                Absmax::Double { codes, nested_absmax, offset },
                Absmax::Double { codes: codes_stored, nested_absmax: nested_stored, offset: offset_stored },
            ) => {
                near("nested_offset", (*offset).into(), (*offset_stored).into(), NESTED_OFFSET)?;
                for (i, (a, b)) in nested_absmax.iter().zip(nested_stored).enumerate() {
                    near(&format!("nested_absmax {i}"), (*a).into(), (*b).into(), NESTED_ABSMAX)?;
                }
                let plain = quantize(&source, self.quant_type, false).decoded_absmax();
                let scaled = |i: usize| (plain[i] - offset_stored) / nested_stored[i / 256];
                same_nested_codes(codes, codes_stored, scaled)
            }
            _ => Err("one absmax is double-quantised, the other is not".into()),
        }
    }
}

/// Packed codes, with FP4's code 8 written as 0: both are zero, and which one a kernel picks is free.
fn zeros_alike(q: &Quantized) -> Vec<u8> {
    let nibble = |code: u8| if q.quant_type == QuantType::Fp4 && code == 8 { 0 } else { code };
    q.packed.iter().map(|b| nibble(b >> 4) << 4 | nibble(b & 15)).collect()
}

/// 8-bit codes may differ by one where the value lies on a midpoint, but for the rounding of the offset.
fn same_nested_codes(ours: &[u8], stored: &[u8], scaled: impl Fn(usize) -> f32) -> Result<(), Failed> {
    if ours.len() != stored.len() {
        return Err(format!("{} absmax codes, expected {}", ours.len(), stored.len()).into());
    }
    for (i, (&a, &b)) in ours.iter().zip(stored).enumerate() {
        let midpoint = (DYNAMIC[usize::from(a.min(b))] + DYNAMIC[usize::from(a.max(b))]) / 2.0;
        if a.abs_diff(b) > 1 || (a != b && (scaled(i) - midpoint).abs() > NESTED_TIE) {
            return Err(format!("absmax code {i}: found {a}, expected {b}").into());
        }
    }
    Ok(())
}
