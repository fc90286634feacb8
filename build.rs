//! With the feature `cuda`: compiles csrc/*.cu with nvcc and links them in statically. Without it: nothing.
//!
//! nvcc is the one that HALFBYTE_NVCC names, or that of CUDA_HOME, of PATH, or of .cuda/ (HALFBYTE_CUDA_DIR); where none
//! is new enough, scripts/get-nvcc installs one there. HALFBYTE_CUDA_ARCHS ("sm_86,sm_90a,compute_90") narrows the
//! architectures.
//!
//! Objects are cached in `halfbyte-kernels/` of the target folder under a hash of everything that makes them: the
//! source and the .cuh it includes, flags, architectures, compiler. They survive a change of profile or features, and a
//! build that finds them all runs no nvcc.

use std::collections::{BTreeSet, VecDeque};
use std::fmt::Write as _;
use std::hash::{DefaultHasher, Hasher};
use std::path::{Path, PathBuf};
use std::process::{Command, exit};
use std::sync::Mutex;
use std::{env, fs, thread};

/// What a release carries. The PTX is of plain compute_90: sm_90a code does not carry forward to newer cards.
const ARCHS: [&str; 6] = ["sm_80", "sm_86", "sm_89", "sm_90a", "sm_120", "compute_90"];

/// sm_120 needs it.
const MIN_NVCC: (u32, u32) = (12, 8);

const FLAGS: [&str; 13] = [
    "-O3",
    "-std=c++17",
    "-lineinfo",
    "-Werror",
    "all-warnings",
    "-Xptxas",
    "-warn-spills",
    "-Xptxas",
    "-warn-lmem-usage",
    "-Xcompiler",
    "-Wall,-Wextra,-Werror",
    "-Xcompiler",
    "-fPIC,-fvisibility=hidden",
];

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    println!("cargo:rerun-if-changed=csrc");
    println!("cargo:rerun-if-changed=scripts/get-nvcc");
    for name in ["HALFBYTE_NVCC", "HALFBYTE_CUDA_ARCHS", "HALFBYTE_CUDA_DIR", "CUDA_HOME", "NVCC_CCBIN"] {
        println!("cargo:rerun-if-env-changed={name}");
    }
    if let Err(why) = build() {
        eprintln!("error: {why}");
        exit(1);
    }
}

fn build() -> Result<(), String> {
    let archs = archs(&env::var("HALFBYTE_CUDA_ARCHS").unwrap_or_default())?;
    println!("cargo:rustc-env=HALFBYTE_KERNEL_ARCHS={}", archs.join(","));
    let gencode: Vec<String> = archs.iter().map(|arch| gencode(arch)).collect();
    let nvcc = Nvcc::find()?;
    let out_dir = PathBuf::from(env::var_os("OUT_DIR").ok_or("cargo did not set OUT_DIR")?);
    let cache = target_dir(&out_dir).join("halfbyte-kernels");
    fs::create_dir_all(&cache).map_err(|e| format!("{}: {e}", cache.display()))?;

    let mut objects = Vec::new();
    let mut missing = VecDeque::new();
    for source in sources(Path::new("csrc"))? {
        let object = cache.join(object_name(&source, &gencode, &nvcc)?);
        if !object.exists() {
            missing.push_back((source, object.clone()));
        }
        objects.push(object);
    }
    compile(&nvcc, &gencode, missing)?;
    link(&nvcc, &objects, &out_dir)
}

/// The folder that all profiles share: the one that cargo tags as a cache, or three levels up (profile/build/NAME/out).
fn target_dir(out_dir: &Path) -> PathBuf {
    let tagged = out_dir.ancestors().find(|dir| dir.join("CACHEDIR.TAG").exists());
    tagged.or_else(|| out_dir.ancestors().nth(3)).unwrap_or(out_dir).to_path_buf()
}

/// The architectures of a list, "" meaning [`ARCHS`].
fn archs(list: &str) -> Result<Vec<String>, String> {
    let mut named: Vec<&str> = list.split([',', ' ']).filter(|arch| !arch.is_empty()).collect();
    if named.is_empty() {
        named = ARCHS.to_vec();
    }
    for arch in &named {
        let digits = arch.strip_prefix("sm_").or_else(|| arch.strip_prefix("compute_")).unwrap_or_default();
        let number = digits.strip_suffix(['a', 'f']).unwrap_or(digits);
        if !number.parse::<u32>().is_ok_and(|n| (80..1000).contains(&n)) {
            return Err(format!(
                "HALFBYTE_CUDA_ARCHS: found \"{arch}\", expected names such as sm_80, sm_90a or compute_90 (PTX), \
                 separated by commas; without it: {}",
                ARCHS.join(",")
            ));
        }
    }
    named.sort_unstable();
    named.dedup();
    Ok(named.into_iter().map(String::from).collect())
}

fn gencode(arch: &str) -> String {
    let number = arch.split_once('_').map_or(arch, |(_, number)| number);
    format!("-gencode=arch=compute_{number},code={arch}")
}

struct Nvcc {
    path: PathBuf,
    /// The output of `nvcc --version`.
    version: String,
    /// Folder of libcudart_static.a.
    lib: PathBuf,
}

impl Nvcc {
    fn find() -> Result<Self, String> {
        if let Some(path) = env::var_os("HALFBYTE_NVCC") {
            return Self::open(Path::new(&path)).map_err(|why| format!("HALFBYTE_NVCC: {why}"));
        }
        let mut places = Vec::new();
        if let Some(home) = env::var_os("CUDA_HOME") {
            places.push(PathBuf::from(home).join("bin/nvcc"));
        }
        let path = env::var_os("PATH").unwrap_or_default();
        places.extend(env::split_paths(&path).map(|dir| dir.join("nvcc")).find(|nvcc| nvcc.is_file()));
        let repo = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").unwrap_or_default());
        let own = env::var_os("HALFBYTE_CUDA_DIR").map_or_else(|| repo.join(".cuda"), PathBuf::from);
        places.push(own.join("bin/nvcc"));
        for place in places.iter().filter(|place| place.is_file()) {
            match Self::open(place) {
                Ok(nvcc) => return Ok(nvcc),
                Err(why) => println!("cargo:warning=passing over an nvcc: {why}"),
            }
        }
        let script = repo.join("scripts/get-nvcc");
        let run = Command::new(&script).output().map_err(|e| format!("{}: {e}", script.display()))?;
        if !run.status.success() {
            return Err(format!(
                "the feature `cuda` needs nvcc {}.{} or later: none in HALFBYTE_NVCC, CUDA_HOME, PATH or {}, and \
                 scripts/get-nvcc failed:\n{}build with --no-default-features to do without CUDA",
                MIN_NVCC.0,
                MIN_NVCC.1,
                own.display(),
                String::from_utf8_lossy(&run.stderr)
            ));
        }
        Self::open(&own.join("bin/nvcc"))
    }

    /// Checks that it runs, is new enough, and has its static runtime library beside it.
    fn open(path: &Path) -> Result<Self, String> {
        let shown = path.display();
        let run = Command::new(path).arg("--version").output().map_err(|e| format!("{shown}: {e}"))?;
        let version = String::from_utf8_lossy(&run.stdout).into_owned();
        let release = version.split("release ").nth(1).and_then(|rest| {
            let (major, minor) = rest.split([',', ' ', '\n']).next()?.split_once('.')?;
            Some((major.parse::<u32>().ok()?, minor.parse::<u32>().ok()?))
        });
        let (major, minor) = release.ok_or_else(|| format!("{shown}: its --version names no release"))?;
        if (major, minor) < MIN_NVCC {
            return Err(format!("{shown} is {major}.{minor}, expected {}.{} or later", MIN_NVCC.0, MIN_NVCC.1));
        }
        let real = path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
        let root = real.ancestors().nth(2).unwrap_or(&real).to_path_buf();
        let arch = env::var("CARGO_CFG_TARGET_ARCH").unwrap_or_default();
        let places =
            ["lib64".into(), "lib".into(), format!("targets/{arch}-linux/lib"), format!("lib/{arch}-linux-gnu")];
        let lib = places.iter().map(|place| root.join(place)).find(|dir| dir.join("libcudart_static.a").exists());
        let lib = lib.ok_or_else(|| format!("{shown}: no libcudart_static.a under {}", root.display()))?;
        println!("cargo:rerun-if-changed={shown}");
        Ok(Self { path: path.into(), version, lib })
    }
}

/// csrc/*.cu, sorted.
fn sources(dir: &Path) -> Result<BTreeSet<PathBuf>, String> {
    let entries = fs::read_dir(dir).map_err(|e| format!("{}: {e}", dir.display()))?;
    let paths = entries.map(|entry| entry.map(|e| e.path()).map_err(|e| format!("{}: {e}", dir.display())));
    let all = paths.collect::<Result<Vec<_>, _>>()?;
    Ok(all.into_iter().filter(|path| path.extension().is_some_and(|ext| ext == "cu")).collect())
}

/// `NAME-HASH.o`: the hash covers all that decides what is in the object.
fn object_name(source: &Path, gencode: &[String], nvcc: &Nvcc) -> Result<String, String> {
    let mut hash = DefaultHasher::new();
    let mut seen = BTreeSet::new();
    let mut queue = vec![source.to_path_buf()];
    while let Some(path) = queue.pop() {
        if !seen.insert(path.clone()) {
            continue;
        }
        let text = fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        hash.write(text.as_bytes());
        for include in text.lines().filter_map(|line| line.trim_start().strip_prefix("#include \"")) {
            queue.push(path.with_file_name(include.split('"').next().unwrap_or_default()));
        }
    }
    let host = env::var("NVCC_CCBIN").unwrap_or_default();
    let rest = [&FLAGS.join(" "), &gencode.join(" "), &nvcc.version, &host];
    rest.iter().for_each(|part| hash.write(part.as_bytes()));
    let stem = source.file_stem().unwrap_or_default().to_string_lossy();
    Ok(format!("{stem}-{:016x}.o", hash.finish()))
}

/// Compiles what is missing, several files at a time, within the number of jobs that cargo was given.
fn compile(nvcc: &Nvcc, gencode: &[String], missing: VecDeque<(PathBuf, PathBuf)>) -> Result<(), String> {
    let jobs = env::var("NUM_JOBS").ok().and_then(|n| n.parse::<usize>().ok()).unwrap_or(1).max(1);
    let workers = jobs.min(missing.len());
    let threads = if workers == 0 { 1 } else { jobs.div_ceil(workers) };
    let queue = Mutex::new(missing);
    let errors = Mutex::new(String::new());
    thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                while let Some((source, object)) = queue.lock().ok().and_then(|mut q| q.pop_front()) {
                    if let Err(why) = compile_one(nvcc, gencode, threads, &source, &object)
                        && let Ok(mut all) = errors.lock()
                    {
                        let _ = writeln!(all, "{why}");
                    }
                }
            });
        }
    });
    let errors = errors.into_inner().map_err(|e| e.to_string())?;
    if errors.is_empty() { Ok(()) } else { Err(errors) }
}

fn compile_one(nvcc: &Nvcc, gencode: &[String], threads: usize, source: &Path, object: &Path) -> Result<(), String> {
    // Renamed into place when whole: an interrupted build leaves no broken object behind.
    let temp = object.with_extension(format!("{}.tmp.o", std::process::id()));
    let mut command = Command::new(&nvcc.path);
    command.args(FLAGS).args(gencode).arg(format!("--threads={threads}"));
    command.arg("-c").arg(source).arg("-o").arg(&temp);
    let run = command.output().map_err(|e| format!("{}: {e}", nvcc.path.display()))?;
    let output = format!("{}{}", String::from_utf8_lossy(&run.stdout), String::from_utf8_lossy(&run.stderr));
    // ptxas does not count its remarks on spills, local memory and serialised wgmma among the warnings that -Werror stops.
    let remarks = ["warning", "spill", "Performance Loss"];
    let spills = remarks.iter().any(|remark| output.contains(remark));
    if !run.status.success() || spills {
        let _ = fs::remove_file(&temp);
        let hint = if output.contains("host compiler") { "\n(it needs g++; NVCC_CCBIN names another)" } else { "" };
        return Err(format!("nvcc failed on {}:\n{}{hint}", source.display(), output.trim_end()));
    }
    fs::rename(&temp, object).map_err(|e| format!("{}: {e}", object.display()))
}

fn link(nvcc: &Nvcc, objects: &[PathBuf], out_dir: &Path) -> Result<(), String> {
    let archive = out_dir.join("libhalfbyte_kernels.a");
    let _ = fs::remove_file(&archive);
    let ar = env::var("AR").unwrap_or_else(|_| "ar".into());
    let run = Command::new(&ar).arg("crs").arg(&archive).args(objects).output();
    let run = run.map_err(|e| format!("{ar}: {e} (it comes with binutils)"))?;
    if !run.status.success() {
        return Err(format!("{ar} failed:\n{}", String::from_utf8_lossy(&run.stderr)));
    }
    println!("cargo:rustc-link-search=native={}", out_dir.display());
    println!("cargo:rustc-link-lib=static=halfbyte_kernels");
    println!("cargo:rustc-link-search=native={}", nvcc.lib.display());
    println!("cargo:rustc-link-lib=static=cudart_static");
    let cxx = env::var("NVCC_CCBIN").unwrap_or_else(|_| "g++".into());
    let run = Command::new(&cxx).arg("-print-file-name=libstdc++.a").output().map_err(|e| format!("{cxx}: {e}"))?;
    let stdcxx = PathBuf::from(String::from_utf8_lossy(&run.stdout).trim());
    let dir = stdcxx.parent().filter(|dir| dir.is_absolute());
    let dir = dir.ok_or_else(|| format!("{cxx} has no static libstdc++ (libstdc++.a)"))?;
    println!("cargo:rustc-link-search=native={}", dir.display());
    println!("cargo:rustc-link-lib=static=stdc++");
    for system in ["dl", "rt", "pthread"] {
        println!("cargo:rustc-link-lib=dylib={system}");
    }
    Ok(())
}
