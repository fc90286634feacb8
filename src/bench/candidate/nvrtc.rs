//! NVRTC, NVIDIA's compiler as a library: opened at run time, where the machine has it.

mod find;

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use libloading::os::unix::Library;

use super::Source;
use crate::error::{Error, Result};

/// What a candidate gets of cuda_bf16.h where the machine has no CUDA headers: NVRTC brings none.
const BF16: &str = include_str!("bf16.h");

type Program = *mut c_void;

/// nvrtcResult; 0 is success.
type Status = c_int;

/// The functions used, by the names and signatures of nvrtc.h.
struct Functions {
    version: unsafe extern "C" fn(*mut c_int, *mut c_int) -> Status,
    count_archs: unsafe extern "C" fn(*mut c_int) -> Status,
    archs: unsafe extern "C" fn(*mut c_int) -> Status,
    create: unsafe extern "C" fn(
        *mut Program,
        *const c_char,
        *const c_char,
        c_int,
        *const *const c_char,
        *const *const c_char,
    ) -> Status,
    compile: unsafe extern "C" fn(Program, c_int, *const *const c_char) -> Status,
    log_size: unsafe extern "C" fn(Program, *mut usize) -> Status,
    log: unsafe extern "C" fn(Program, *mut c_char) -> Status,
    cubin_size: unsafe extern "C" fn(Program, *mut usize) -> Status,
    cubin: unsafe extern "C" fn(Program, *mut c_char) -> Status,
    error_string: unsafe extern "C" fn(Status) -> *const c_char,
    destroy: unsafe extern "C" fn(*mut Program) -> Status,
}

impl Functions {
    /// None if one of them is missing: the library is older than CUDA 11.2.
    fn of(library: &Library) -> Option<Self> {
        macro_rules! symbol {
            ($name:literal) => {
                // SAFETY: the signature is that of nvrtc.h, the same in all versions from 11.2 on.
                *unsafe { library.get($name) }.ok()?
            };
        }
        Some(Self {
            version: symbol!(c"nvrtcVersion"),
            count_archs: symbol!(c"nvrtcGetNumSupportedArchs"),
            archs: symbol!(c"nvrtcGetSupportedArchs"),
            create: symbol!(c"nvrtcCreateProgram"),
            compile: symbol!(c"nvrtcCompileProgram"),
            log_size: symbol!(c"nvrtcGetProgramLogSize"),
            log: symbol!(c"nvrtcGetProgramLog"),
            cubin_size: symbol!(c"nvrtcGetCUBINSize"),
            cubin: symbol!(c"nvrtcGetCUBIN"),
            error_string: symbol!(c"nvrtcGetErrorString"),
            destroy: symbol!(c"nvrtcDestroyProgram"),
        })
    }
}

/// The compiler.
pub struct Nvrtc {
    functions: Functions,
    /// The library, as it was named to the loader or found.
    pub path: PathBuf,
    /// (13, 0)
    pub version: (u32, u32),
    /// Folders with the CUDA headers; none if the machine has none.
    pub includes: Vec<PathBuf>,
}

/// Compiled code.
#[derive(Clone, Debug)]
pub struct Compiled {
    pub cubin: Vec<u8>,
    /// Warnings, "" if there are none.
    pub log: String,
}

impl Nvrtc {
    /// The one of this process, opened at the first call. [`Error::Unavailable`] says where it was looked for.
    pub fn get() -> Result<&'static Self> {
        static NVRTC: OnceLock<Nvrtc> = OnceLock::new();
        match NVRTC.get() {
            Some(nvrtc) => Ok(nvrtc),
            None => {
                let opened = find::open()?;
                Ok(NVRTC.get_or_init(|| opened))
            }
        }
    }

    /// Of an opened library. `Err` says what is wrong with it.
    fn of(path: PathBuf, includes: Vec<PathBuf>, libraries: Vec<Library>) -> Result<Self, String> {
        let functions = libraries.last().and_then(Functions::of).ok_or("it is no NVRTC of CUDA 11.2 or later")?;
        let (mut major, mut minor) = (0, 0);
        // SAFETY: writes two ints.
        if unsafe { (functions.version)(&raw mut major, &raw mut minor) } != 0 {
            return Err("it does not tell its version".into());
        }
        let version = (major.unsigned_abs(), minor.unsigned_abs());
        // Never closed: the functions are theirs.
        libraries.into_iter().for_each(std::mem::forget);
        Ok(Self { functions, path, version, includes })
    }

    /// The same without the machine's headers, with its own of bf16 alone.
    #[must_use]
    pub fn without_includes(mut self) -> Self {
        self.includes.clear();
        self
    }

    /// Opens another one than [`Nvrtc::get`]'s.
    pub fn open() -> Result<Self> {
        find::open()
    }

    /// What to compile for so that it runs on a card of this compute capability, with all that the card can: "sm_90a".
    pub fn arch(&self, capability: (u32, u32)) -> Result<String> {
        let wanted = capability.0 * 10 + capability.1;
        let all = self.archs();
        if all.contains(&wanted) {
            // From Hopper on, what a generation alone can do has a target of its own.
            return Ok(format!("sm_{wanted}{}", if capability.0 >= 9 { "a" } else { "" }));
        }
        let older = all.iter().filter(|arch| *arch / 10 == capability.0 && **arch < wanted).max();
        let unavailable = || Error::Unavailable {
            what: format!("compiling for compute capability {}.{}", capability.0, capability.1),
            why: format!("{} is NVRTC {}.{}, which cannot", self.path.display(), self.version.0, self.version.1),
        };
        older.map(|arch| format!("sm_{arch}")).ok_or_else(unavailable)
    }

    fn archs(&self) -> Vec<u32> {
        let mut count: c_int = 0;
        // SAFETY: writes one int.
        if unsafe { (self.functions.count_archs)(&raw mut count) } != 0 {
            return vec![];
        }
        let mut archs: Vec<c_int> = vec![0; usize::try_from(count).unwrap_or(0)];
        // SAFETY: writes `count` ints, and there is room for them.
        if unsafe { (self.functions.archs)(archs.as_mut_ptr()) } != 0 {
            return vec![];
        }
        archs.into_iter().map(i32::unsigned_abs).collect()
    }

    /// Machine code for `arch`. [`Error::Input`] with the compiler's own messages, which name file and line.
    pub fn compile(&self, source: &Source, arch: &str) -> Result<Compiled> {
        let path = &source.path;
        let nul = |_| Error::input(path, "the file", "a NUL byte", "CUDA C++");
        let text = CString::new(source.text.as_str()).map_err(nul)?;
        let name = CString::new(path.as_os_str().as_encoded_bytes()).map_err(nul)?;
        let mut options = vec![format!("--gpu-architecture={arch}"), "-std=c++17".into(), "-lineinfo".into()];
        let beside = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
        for folder in std::iter::once(beside).chain(self.includes.iter().map(PathBuf::as_path)) {
            options.push(format!("--include-path={}", folder.display()));
        }
        let options = options.into_iter().map(CString::new).collect::<Result<Vec<_>, _>>().map_err(nul)?;
        let option_pointers: Vec<*const c_char> = options.iter().map(|o| o.as_ptr()).collect();
        let own = if self.includes.is_empty() { CString::new(BF16).ok() } else { None };
        let (headers, header_names) =
            ([own.as_ref().map_or(std::ptr::null(), |h| h.as_ptr())], [c"cuda_bf16.h".as_ptr()]);

        let mut handle: Program = std::ptr::null_mut();
        // SAFETY: all are NUL-terminated strings that outlive the call; the arrays have as many elements as is said.
        let created = unsafe {
            let (count, headers, names) = (c_int::from(own.is_some()), headers.as_ptr(), header_names.as_ptr());
            (self.functions.create)(&raw mut handle, text.as_ptr(), name.as_ptr(), count, headers, names)
        };
        self.check("nvrtcCreateProgram", created)?;
        let program = Handle { handle, functions: &self.functions };
        let count = c_int::try_from(options.len()).unwrap_or(c_int::MAX);
        // SAFETY: the program is live, `count` strings outlive the call.
        let status = unsafe { (self.functions.compile)(program.handle, count, option_pointers.as_ptr()) };
        // SAFETY: both get what nvrtc.h says they do.
        let log = unsafe { program.bytes(self.functions.log_size, self.functions.log) };
        let log = String::from_utf8_lossy(&log.unwrap_or_default()).trim_matches(['\0', '\n', ' ']).to_string();
        match status {
            0 => {}
            // NVRTC_ERROR_COMPILATION
            6 => return Err(self.refused(source, &log)),
            _ => {
                let Err(error) = self.check("nvrtcCompileProgram", status) else {
                    return Err(self.refused(source, &log));
                };
                let why = format!("{error}{}{log}", if log.is_empty() { "" } else { ": " });
                return Err(Error::Unavailable { what: format!("NVRTC ({})", self.path.display()), why });
            }
        }
        // SAFETY: as above.
        let cubin = unsafe { program.bytes(self.functions.cubin_size, self.functions.cubin) };
        let cubin = cubin.map_err(|status| self.words("nvrtcGetCUBIN", status))?;
        Ok(Compiled { cubin, log })
    }

    /// The error of a source that does not compile.
    fn refused(&self, source: &Source, log: &str) -> Error {
        let (place, found) = match first_error(&source.path, log) {
            Some((line, message)) => (format!("line {line}"), message),
            None => ("the file".into(), "errors"),
        };
        let (major, minor) = self.version;
        let expected = format!("CUDA C++ that compiles. NVRTC {major}.{minor} says:\n{log}");
        Error::input(&source.path, place, found, expected)
    }

    fn check(&self, call: &str, status: Status) -> Result<()> {
        if status == 0 { Ok(()) } else { Err(self.words(call, status)) }
    }

    fn words(&self, call: &str, status: Status) -> Error {
        // SAFETY: gives a string of the library that lives as long as it, or null.
        let words = unsafe { (self.functions.error_string)(status) };
        let words = match words.is_null() {
            true => format!("error {status}"),
            // SAFETY: not null, NUL-terminated, see above.
            false => unsafe { CStr::from_ptr(words) }.to_string_lossy().into_owned(),
        };
        Error::Cuda { op: call.into(), detail: words }
    }
}

/// A program until it is no longer needed.
struct Handle<'a> {
    handle: Program,
    functions: &'a Functions,
}

impl Drop for Handle<'_> {
    fn drop(&mut self) {
        // SAFETY: it was created, and is used nowhere else. What this answers is of no use.
        let _ = unsafe { (self.functions.destroy)(&raw mut self.handle) };
    }
}

impl Handle<'_> {
    /// What `get` writes, of the length that `size` tells.
    ///
    /// # Safety
    /// They are a pair of nvrtc.h.
    unsafe fn bytes(
        &self,
        size: unsafe extern "C" fn(Program, *mut usize) -> Status,
        get: unsafe extern "C" fn(Program, *mut c_char) -> Status,
    ) -> Result<Vec<u8>, Status> {
        let mut length = 0usize;
        // SAFETY: the program is live; writes one size.
        let status = unsafe { size(self.handle, &raw mut length) };
        if status != 0 {
            return Err(status);
        }
        let mut bytes = vec![0u8; length];
        // SAFETY: the program is live; writes `length` bytes, and there is room for them.
        let status = unsafe { get(self.handle, bytes.as_mut_ptr().cast::<c_char>()) };
        if status == 0 { Ok(bytes) } else { Err(status) }
    }
}

/// Line and words of the first error of a log: `my.cu(12): error: ...`.
fn first_error<'a>(path: &Path, log: &'a str) -> Option<(u32, &'a str)> {
    let start = format!("{}(", path.display());
    log.lines().find_map(|line| {
        let (number, rest) = line.strip_prefix(&start)?.split_once("): ")?;
        let (_, message) = rest.split_once("error: ").or_else(|| rest.split_once("error "))?;
        Some((number.parse().ok()?, message))
    })
}

/// The kernels in a cubin, by the names of their sections of code.
pub fn kernels(cubin: &[u8]) -> Vec<String> {
    let mark = b".text.";
    let mut names = vec![];
    let mut rest = cubin;
    while let Some(at) = rest.windows(mark.len()).position(|w| w == mark) {
        rest = &rest[at + mark.len()..];
        let end = rest.iter().position(|&b| b == 0).unwrap_or(rest.len());
        let name = String::from_utf8_lossy(&rest[..end]).into_owned();
        if !name.is_empty() && !names.contains(&name) {
            names.push(name);
        }
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_error_of_a_log_has_line_and_words() {
        let path = Path::new("dir/my.cu");
        let log = "dir/my.cu(2): warning #177-D: unused\n  x\ndir/my.cu(12): error: identifier \"foo\" is undefined\n";
        assert_eq!(first_error(path, log), Some((12, "identifier \"foo\" is undefined")));
        let log = "dir/my.cu(1): catastrophic error: could not open source file \"x.h\"\n";
        assert_eq!(first_error(path, log), Some((1, "could not open source file \"x.h\"")));
        let log = "dir/my.cu(7): error #20: y\n";
        assert_eq!(first_error(path, log), Some((7, "#20: y")));
        assert_eq!(first_error(path, "ptxas application ptx input, line 51; error   : x"), None);
    }

    #[test]
    fn kernels_are_named_by_their_sections() {
        assert_eq!(kernels(b"\0.text.one\0.nv.info.one\0.text._Z3twoPf\0.text.one\0"), ["one", "_Z3twoPf"]);
        assert!(kernels(b"").is_empty() && kernels(b".text.").is_empty());
    }
}
