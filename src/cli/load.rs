//! Picks the device and loads a model on it, with a bar.

use std::path::Path;

use halfbyte::backend::Backend;
use halfbyte::backend::cpu::Cpu;
use halfbyte::checkpoint::{ModelDir, QuantConfig, peft};
use halfbyte::model::{HostAdapter, Model, ModelOptions};
use halfbyte::nf4::QuantType;
use halfbyte::{Error, Result};

use super::args::{BnbArgs, Device, DeviceArgs, QuantTypeArg, QuantizeArgs};
use super::progress::{Progress, Unit};

/// Why `auto` means the CPU; the same words in `info` and in the error of `--device cuda`.
pub const CPU_ONLY: &str = "training and generation run on the CPU backend; of the CUDA backend this version has the NF4 \
                            kernels alone";

/// More threads than any machine has cores are a slip of the finger, and the system would refuse to start them.
const MAX_THREADS: usize = 4096;

/// The backend of `--device` and `--threads`. Errors: a device that cannot run the graph.
pub fn backend(device: Device, threads: Option<usize>) -> Result<Cpu> {
    if let Some(n) = threads.filter(|n| !(1..=MAX_THREADS).contains(n)) {
        return Err(Error::flag("threads", n.to_string(), format!("a whole number from 1 to {MAX_THREADS}")));
    }
    match device {
        Device::Auto | Device::Cpu => Ok(Cpu::new(threads)),
        Device::Cuda => Err(Error::Unavailable { what: "--device cuda".into(), why: CPU_ONLY.into() }),
    }
}

impl DeviceArgs {
    pub fn backend(&self) -> Result<Cpu> {
        backend(self.device, self.threads)
    }
}

impl BnbArgs {
    pub fn config(&self) -> QuantConfig {
        let quant_type = match self.quant_type {
            QuantTypeArg::Nf4 => QuantType::Nf4,
            QuantTypeArg::Fp4 => QuantType::Fp4,
        };
        QuantConfig { quant_type, double_quant: self.double_quant }
    }
}

impl QuantizeArgs {
    /// None: the model runs in the precision of its directory.
    pub fn config(&self) -> Option<QuantConfig> {
        self.load_in_4bit.then(|| self.bnb.config())
    }
}

/// The adapter of `--adapter`, if one was given. Errors: faulty, or made for another model.
pub fn adapter(dir: Option<&Path>, model: &ModelDir) -> Result<Option<HostAdapter>> {
    dir.map(|dir| peft::load(dir, model.config())).transpose()
}

/// Loads a model for forward passes of at most `max_tokens` tokens.
pub fn model<B: Backend>(
    backend: &mut B,
    dir: &ModelDir,
    quantize: Option<QuantConfig>,
    adapter: Option<&HostAdapter>,
    max_tokens: usize,
) -> Result<Model<B>> {
    let mut bar = Progress::new(format!("loading {}", dir.path().display()), Unit::Count("layers"));
    let layers = dir.config().num_hidden_layers as u64;
    let options = ModelOptions::inference(max_tokens);
    let mut source = dir.source(quantize)?;
    let mut done = 0;
    let model = Model::load(backend, dir.config(), &mut source, adapter, options, &mut |_| {
        done += 1;
        bar.set(done, layers);
    })?;
    bar.finish();
    Ok(model)
}
