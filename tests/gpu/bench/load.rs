//! A bf16 matrix on its way from a mapped file in the page cache to 4 bits on the device, and to bf16.

use std::fs::File;
use std::io::Write as _;
use std::sync::Arc;

use halfbyte::Error;
use halfbyte::nf4::{QuantConfig, QuantType};
use halfbyte::tensor::{Dtype, HostMatrix, HostTensor};
use libtest_mimic::Trial;
use memmap2::Mmap;

use super::{Bench, C, F, Row, bench, unit};

pub fn trials() -> Vec<Trial> {
    vec![bench("load", run)]
}

fn run(b: &mut Bench) -> Result<(), Error> {
    let n = F * C;
    let file = tempfile::NamedTempFile::new().map_err(Error::write("make", std::env::temp_dir()))?;
    let bytes: Vec<u8> = (0..n).flat_map(|i| half::bf16::from_f32(0.05 * unit(i)).to_le_bytes()).collect();
    file.as_file().write_all(&bytes).map_err(Error::write("write", file.path()))?;
    let open = File::open(file.path()).map_err(Error::read("open", file.path()))?;
    // SAFETY: nobody else knows the file.
    let map = unsafe { Mmap::map(&open) }.map_err(Error::read("map", file.path()))?;
    let tensor = HostTensor::mapped(Dtype::Bf16, vec![F, C], Arc::new(map), 0..2 * n);
    let config = QuantConfig { quant_type: QuantType::Nf4, double_quant: true };
    let rows = [("nf4", HostMatrix::Quantize(tensor.clone(), config)), ("bf16", HostMatrix::Dense(tensor))];
    for (implementation, w) in rows {
        let row = Row { op: "load", shape: "14336x4096 bf16", implementation, bytes: 2 * n, flops: 0.0 };
        b.row(row, |cuda, _| cuda.upload_matrix(&w).map(|_| ()))?;
    }
    Ok(())
}
