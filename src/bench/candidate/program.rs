//! A compiled candidate on the device: checked as far as the driver can tell, then one more way to run the op.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use super::Source;
use super::launch::{self, Directive, Launch};
use super::nvrtc::{Compiled, Nvrtc, kernels};
use crate::backend::cuda::Cuda;
use crate::backend::cuda::module::{Function, Module, Param};
use crate::bench::kernels::case::{Arg, Case, Scalar, Way};
use crate::bench::kernels::set::{Dev, Set};
use crate::error::{Error, Result};

/// Shared memory of a block, static and dynamic, that needs no leave of the driver.
const SHARED: u32 = 48 << 10;

/// A source that was compiled and loaded.
pub struct Program {
    path: PathBuf,
    directives: Vec<Directive>,
    /// Names of the kernels in the code.
    kernels: Vec<String>,
    module: Arc<Module>,
    /// Warnings of the compiler, "" if there are none.
    pub log: String,
}

/// One launch, ready.
struct Step {
    function: Function,
    launch: Launch,
}

impl Program {
    /// Compiles a source for the card and loads it. Errors: [`Error::Input`] with file and line where the source is at
    /// fault, [`Error::Unavailable`] where there is no NVRTC.
    pub fn build(cuda: &Cuda, source: &Source) -> Result<Self> {
        // What is wrong with the launch lines needs no compiler to be found.
        let directives = launch::parse(&source.path, &source.text)?;
        let nvrtc = Nvrtc::get()?;
        let arch = nvrtc.arch(cuda.device().compute_capability)?;
        let Compiled { cubin, log } = nvrtc.compile(source, &arch)?;
        let module = cuda.load_module(&cubin)?;
        Ok(Self { path: source.path.clone(), directives, kernels: kernels(&cubin), module, log })
    }

    /// The launches for a case of these arguments.
    fn steps(&self, cuda: &Cuda, args: &[Arg], scalars: &[(&str, Scalar)]) -> Result<Vec<Step>> {
        let launches = self.directives.iter().map(|d| d.at(&self.path, scalars)).collect::<Result<Vec<_>>>()?;
        let steps = launches.into_iter().map(|launch| {
            let line = format!("line {}", launch.line);
            let wrong = |found: String, expected: String| Error::input(&self.path, &line, found, expected);
            let none = || {
                let found = format!("a launch of {}; compiled were: {}", launch.kernel, self.kernels.join(", "));
                wrong(found, format!("a kernel extern \"C\" __global__ void {}", launch.kernel))
            };
            let function = cuda.function(&self.module, &launch.kernel)?.ok_or_else(none)?;
            self.check_parameters(&function, &launch, args, scalars)?;
            let attributes = function.attributes()?;
            if launch.threads() > attributes.most_threads {
                let found = format!("blocks of {} threads", launch.threads());
                let expected =
                    format!("at most {} with {} registers a thread", attributes.most_threads, attributes.registers);
                return Err(wrong(found, expected));
            }
            let room = cuda.room()?.shared_bytes;
            let bytes = launch.shared.saturating_add(attributes.static_shared_bytes);
            if bytes > room {
                let found = format!("{} + {} bytes of shared memory", attributes.static_shared_bytes, launch.shared);
                return Err(wrong(found, format!("at most {room}, which the card has for a block")));
            }
            if bytes > SHARED {
                function.allow_shared(launch.shared)?;
            }
            Ok(Step { function, launch })
        });
        steps.collect()
    }

    /// Number and sizes of a kernel's parameters, where the driver tells them.
    fn check_parameters(
        &self,
        function: &Function,
        launch: &Launch,
        args: &[Arg],
        scalars: &[(&str, Scalar)],
    ) -> Result<()> {
        let Some(found) = function.parameters()? else { return Ok(()) };
        let names: Vec<&str> = args.iter().map(|a| a.name).chain(scalars.iter().map(|(name, _)| *name)).collect();
        let sizes: Vec<usize> = args.iter().map(|_| 8).chain(scalars.iter().map(|(_, s)| number(*s).size())).collect();
        if found == sizes {
            return Ok(());
        }
        let differs = (0..found.len().max(sizes.len())).find(|&i| found.get(i) != sizes.get(i)).unwrap_or(0);
        let text = match (found.get(differs), sizes.get(differs)) {
            (Some(found), Some(_)) => format!("{}, parameter {}, has {found} bytes", names[differs], differs + 1),
            _ => format!("{} parameters", found.len()),
        };
        let expected = match sizes.get(differs).filter(|_| differs < found.len()) {
            Some(size) => format!("{size} bytes: the signature of --print-template"),
            None => format!("{}: {}", sizes.len(), names.join(", ")),
        };
        let place = format!("line {}, kernel {}", launch.line, launch.kernel);
        Err(Error::input(&self.path, place, text, expected))
    }

    /// The way to run a case by this program's kernels.
    pub fn way(&self, cuda: &Cuda, case: &Case, name: &'static str) -> Result<Way> {
        let steps = self.steps(cuda, &case.args, &case.scalars)?;
        let numbers = numbers(&case.scalars);
        Ok(Way::new(name, move |cuda, set| run(cuda, set, &steps, &numbers)))
    }
}

/// A way that is compiled when it is first set up: for an op whose own implementation is its starter.
pub fn lazy_way(name: &'static str, source: Source, args: &[Arg], scalars: &[(&'static str, Scalar)]) -> Way {
    let (args, scalars) = (args.to_vec(), scalars.to_vec());
    let numbers = numbers(&scalars);
    let built: Mutex<Option<Arc<Vec<Step>>>> = Mutex::new(None);
    let build = Arc::new(move |cuda: &Cuda| {
        let mut built = built.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(steps) = &*built {
            return Ok(steps.clone());
        }
        let steps = Arc::new(Program::build(cuda, &source)?.steps(cuda, &args, &scalars)?);
        *built = Some(steps.clone());
        Ok::<_, Error>(steps)
    });
    let set_up = build.clone();
    Way {
        // Not while launches are timed or recorded.
        set_up: Some(Arc::new(move |cuda: &mut Cuda, _: &mut Set| set_up(cuda).map(|_| ()))),
        ..Way::new(name, move |cuda, set| {
            let steps = build(cuda)?;
            run(cuda, set, &steps, &numbers)
        })
    }
}

fn number(scalar: Scalar) -> Param {
    match scalar {
        Scalar::U64(value) => value.into(),
        Scalar::F32(value) => value.into(),
    }
}

fn numbers(scalars: &[(&'static str, Scalar)]) -> Vec<Param> {
    scalars.iter().map(|(_, scalar)| number(*scalar)).collect()
}

fn run(cuda: &mut Cuda, set: &mut Set, steps: &[Step], numbers: &[Param]) -> Result<()> {
    let buffers = set.args.iter_mut().map(|dev| match dev {
        Dev::Bf16(buffer) => cuda.param(buffer),
        Dev::F32(buffer) => cuda.param(buffer),
        Dev::F64(buffer) => cuda.param(buffer),
        Dev::I32(buffer) => cuda.param(buffer),
        Dev::U8(buffer) => cuda.param(buffer),
    });
    let mut params = buffers.collect::<Result<Vec<_>>>()?;
    params.extend_from_slice(numbers);
    for Step { function, launch } in steps {
        // SAFETY: number and sizes of the parameters were compared where the driver tells them. What the kernel touches is
        // its author's word: it runs in the author's own process, on a device whose memory holds nothing but this race.
        unsafe { cuda.launch(function, launch.grid, launch.block, launch.shared, &params) }?;
    }
    Ok(())
}
