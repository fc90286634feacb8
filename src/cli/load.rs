//! Picks the device, and loads a model on it with a bar.

use std::path::Path;

use halfbyte::backend::Backend;
use halfbyte::backend::cpu::Cpu;
#[cfg(feature = "cuda")]
use halfbyte::backend::cuda::Cuda;
use halfbyte::checkpoint::{ModelDir, QuantConfig, peft};
use halfbyte::memory;
use halfbyte::model::shapes::Format;
use halfbyte::model::{HostAdapter, Model, ModelConfig, ModelOptions};
use halfbyte::nf4::QuantType;
use halfbyte::{Error, Result};

use super::args::{BnbArgs, Device, DeviceArgs, QuantTypeArg, QuantizeArgs};
use super::progress::{Progress, Unit};

/// More threads than any machine has cores are a slip of the finger, and the system would refuse to start them.
const MAX_THREADS: usize = 4096;

/// The device that a command computes on. [`with_backend!`] runs code that is generic over it.
pub enum Picked {
    Cpu(Box<Cpu>),
    #[cfg(feature = "cuda")]
    Cuda(Box<Cuda>),
}

impl Picked {
    /// The GPU's number, None for the CPU.
    pub fn gpu(&self) -> Option<usize> {
        match self {
            Self::Cpu(_) => None,
            #[cfg(feature = "cuda")]
            Self::Cuda(cuda) => Some(cuda.device().ordinal),
        }
    }
}

/// `with_backend!(picked, |backend| expression)`: the expression once for each kind of device, `backend` borrowed mutably.
macro_rules! with_backend {
    ($picked:expr, |$backend:ident| $body:expr) => {
        match $picked {
            $crate::cli::load::Picked::Cpu(picked) => {
                let $backend = &mut **picked;
                $body
            }
            #[cfg(feature = "cuda")]
            $crate::cli::load::Picked::Cuda(picked) => {
                let $backend = &mut **picked;
                $body
            }
        }
    };
}
pub(super) use with_backend;

/// The device of `--device` and `--threads`: `auto` is the first GPU where this build can use it, else the CPU.
/// Errors: [`Error::Unavailable`] with the reason where `cuda` was asked for by name.
pub fn backend(device: Device, threads: Option<usize>) -> Result<Picked> {
    if let Some(n) = threads.filter(|n| !(1..=MAX_THREADS).contains(n)) {
        return Err(Error::flag("threads", n.to_string(), format!("a whole number from 1 to {MAX_THREADS}")));
    }
    let cpu = || Picked::Cpu(Box::new(Cpu::new(threads)));
    match (device, cuda()) {
        (Device::Cpu, _) | (Device::Auto, Err(Error::Unavailable { .. })) => Ok(cpu()),
        (_, Ok(picked)) => Ok(picked),
        (Device::Cuda, Err(Error::Unavailable { why, .. })) => {
            Err(Error::Unavailable { what: "--device cuda".into(), why })
        }
        (_, Err(error)) => Err(error),
    }
}

/// What `--device auto` means on this machine, and why: (name, reason).
pub fn auto() -> (&'static str, String) {
    match cuda() {
        Ok(_) => ("cuda", "GPU 0 is usable; --device cpu takes the CPU".into()),
        Err(Error::Unavailable { why, .. }) => ("cpu", why),
        Err(error) => ("cpu", error.to_string()),
    }
}

#[cfg(feature = "cuda")]
fn cuda() -> Result<Picked> {
    Ok(Picked::Cuda(Box::new(Cuda::open(0)?)))
}

#[cfg(not(feature = "cuda"))]
fn cuda() -> Result<Picked> {
    Err(Error::Unavailable { what: "CUDA".into(), why: "this program was built without the feature cuda".into() })
}

impl DeviceArgs {
    pub fn backend(&self) -> Result<Picked> {
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

/// What a command needs on the device beside the model.
pub enum Room {
    /// A batch of as many tokens as the model takes at a time.
    Batch,
    /// A cache of so many tokens.
    Cache(usize),
}

/// Sets aside what the model and `room` will take, if the device has memory of its own. `format`: of each matrix, by name.
/// Errors: it has less free than that ([`Error::Flag`], what is needed and the largest items).
pub fn reserve<B: Backend>(
    backend: &mut B,
    config: &ModelConfig,
    format: &dyn Fn(&str) -> Format,
    adapter: Option<&HostAdapter>,
    max_tokens: usize,
    room: &Room,
) -> Result<()> {
    backend.release()?;
    let Some(free) = backend.free_memory()? else { return Ok(()) };
    let (batch, cache) = match room {
        Room::Batch => (true, 0),
        Room::Cache(tokens) => (false, *tokens),
    };
    let items = memory::forward_bytes(config, format, adapter, max_tokens, batch, cache)?;
    let bytes = items.values().sum();
    if bytes > free {
        return Err(memory::too_large(free, &items));
    }
    backend.reserve(bytes)
}

/// Loads a model for forward passes of at most `max_tokens` tokens. With `room`, its memory and that of what comes after are
/// taken as one.
pub fn model<B: Backend>(
    backend: &mut B,
    dir: &ModelDir,
    quantize: Option<QuantConfig>,
    adapter: Option<&HostAdapter>,
    max_tokens: usize,
    room: Option<Room>,
) -> Result<Model<B>> {
    if let Some(room) = room {
        reserve(backend, dir.config(), &|name| dir.format(name, quantize), adapter, max_tokens, &room)?;
    }
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
