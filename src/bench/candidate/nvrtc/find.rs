//! Where NVRTC and the CUDA headers are: the loader's folders, a CUDA toolkit, the wheels that come with PyTorch.

use std::env;
use std::path::{Path, PathBuf};

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};

use super::Nvrtc;
use crate::error::{Error, Result};

/// Newest first: what a newer driver runs, an older compiler may not know.
const NAMES: [&str; 3] = ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"];

/// Names the library.
const VARIABLE: &str = "HALFBYTE_NVRTC";

pub fn open() -> Result<Nvrtc> {
    if let Some(path) = env::var_os(VARIABLE).filter(|path| !path.is_empty()) {
        let path = PathBuf::from(path);
        return load(&path).map_err(|why| {
            Error::flag(VARIABLE, format!("{}: {why}", path.display()), "the path of NVRTC, libnvrtc.so.13")
        });
    }
    let mut wrong = String::new();
    let places = NAMES.iter().map(PathBuf::from).chain(files());
    for path in places {
        match load(&path) {
            Ok(nvrtc) => return Ok(nvrtc),
            // One that the loader does not know is not there.
            Err(why) if path.is_absolute() => wrong = format!("; {}: {why}", path.display()),
            Err(_) => {}
        }
    }
    let why = format!(
        "{} is neither among the loader's libraries nor under CUDA_HOME, /usr/local/cuda* or the site-packages of a \
         Python (`pip install nvidia-cuda-nvrtc` brings it); {VARIABLE} names another place{wrong}",
        NAMES[0]
    );
    Err(Error::Unavailable { what: "NVRTC, which compiles candidates,".into(), why })
}

/// Opens the library at this path, or of this name as the loader finds it.
fn load(path: &Path) -> Result<Nvrtc, String> {
    let mut libraries = vec![];
    if path.components().count() > 1 {
        if !path.is_file() {
            return Err("no such file".into());
        }
        // It opens its second half by name when it compiles, and outside of the loader's folders only what is already
        // loaded is found so.
        let builtins = entries(path.parent().unwrap_or(Path::new("."))).into_iter().filter(|file| {
            let name = file.file_name().unwrap_or_default().to_string_lossy();
            name.starts_with("libnvrtc-builtins.so") && !name.contains(".alt.")
        });
        for file in builtins {
            libraries.extend(library(&file));
        }
    }
    libraries.push(library(path)?);
    let folder = loaded_from(path);
    Nvrtc::of(path.into(), includes(folder.as_deref()), libraries)
}

fn library(path: &Path) -> Result<Library, String> {
    // SAFETY: NVIDIA's library does nothing on loading that we rely on; whoever may choose the path may run any code.
    unsafe { Library::open(Some(path.as_os_str()), RTLD_NOW | RTLD_LOCAL) }.map_err(|e| {
        let mut text = e.to_string();
        if let Some(source) = std::error::Error::source(&e) {
            text += &format!(" ({source})");
        }
        text
    })
}

/// The folder of a library that was just loaded.
fn loaded_from(path: &Path) -> Option<PathBuf> {
    if path.components().count() > 1 {
        return Some(path.canonicalize().ok()?.parent()?.into());
    }
    let name = format!("/{}", path.display());
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    let found = maps
        .lines()
        .filter_map(|line| line.find('/').map(|at| &line[at..]))
        .find(|file| file.contains(&name) || file.contains("/libnvrtc.so"))?;
    Some(Path::new(found).parent()?.into())
}

/// The first folder with the headers, and what they include in turn.
fn includes(library: Option<&Path>) -> Vec<PathBuf> {
    let mut places = vec![];
    if let Some(folder) = library {
        // A toolkit and the wheels of CUDA 13; the wheels of CUDA 12.
        places.extend([folder.join("../include"), folder.join("../../cuda_runtime/include")]);
    }
    places.extend(toolkits().into_iter().map(|home| home.join("include")));
    for site in site_packages() {
        places.extend([site.join("nvidia/cu13/include"), site.join("nvidia/cuda_runtime/include")]);
    }
    let Some(found) = places.into_iter().find(|dir| dir.join("cuda_bf16.h").is_file()) else { return vec![] };
    let found = found.canonicalize().unwrap_or(found);
    let more = ["cccl"].map(|name| found.join(name)).into_iter().filter(|dir| dir.is_dir());
    std::iter::once(found.clone()).chain(more).collect()
}

/// Files that may be the library, best place first, newest first in each.
fn files() -> Vec<PathBuf> {
    let mut folders = vec![];
    for home in toolkits() {
        let arch = format!("targets/{}-linux/lib", env::consts::ARCH);
        folders.extend([home.join("lib64"), home.join("lib"), home.join(arch)]);
    }
    for site in site_packages() {
        folders.extend([site.join("nvidia/cu13/lib"), site.join("nvidia/cuda_nvrtc/lib")]);
    }
    let all = folders.iter().flat_map(|folder| NAMES.iter().map(|name| folder.join(name)));
    all.filter(|file| file.is_file()).collect()
}

fn toolkits() -> Vec<PathBuf> {
    let mut homes: Vec<PathBuf> =
        ["CUDA_HOME", "CUDA_PATH"].iter().filter_map(env::var_os).map(PathBuf::from).collect();
    homes.push("/usr/local/cuda".into());
    // cuda-13.0 before cuda-12.8, which before cuda-9.
    let mut versions: Vec<PathBuf> = entries(Path::new("/usr/local"));
    versions.retain(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("cuda-")));
    versions.sort_by_key(|path| std::cmp::Reverse(numbers(path)));
    homes.extend(versions);
    homes
}

/// Folders that Pythons of this machine import from.
fn site_packages() -> Vec<PathBuf> {
    let mut roots: Vec<PathBuf> =
        ["VIRTUAL_ENV", "CONDA_PREFIX"].iter().filter_map(env::var_os).map(PathBuf::from).collect();
    // The Python that PATH finds, and where a link to it leads.
    let path = env::var_os("PATH").unwrap_or_default();
    for python in env::split_paths(&path).map(|dir| dir.join("python3")).filter(|file| file.is_file()) {
        let real = python.canonicalize().ok();
        let homes = [Some(python), real];
        roots.extend(homes.into_iter().flatten().filter_map(|file| Some(file.parent()?.parent()?.to_path_buf())));
    }
    roots.extend(env::var_os("HOME").map(|home| PathBuf::from(home).join(".local")));
    roots.extend(["/usr/local".into(), "/usr".into()]);
    roots.extend(entries(Path::new("/opt")));
    let mut sites: Vec<PathBuf> = env::var_os("PYTHONPATH").iter().flat_map(env::split_paths).collect();
    for root in roots {
        let mut pythons = entries(&root.join("lib"));
        pythons.retain(|dir| dir.file_name().is_some_and(|name| name.to_string_lossy().starts_with("python3")));
        pythons.sort_by_key(|path| std::cmp::Reverse(numbers(path)));
        sites.extend(pythons.iter().flat_map(|dir| [dir.join("site-packages"), dir.join("dist-packages")]));
    }
    let mut seen = std::collections::BTreeSet::new();
    sites.retain(|site| site.is_dir() && seen.insert(site.clone()));
    sites
}

/// The numbers in a name, to sort versions by.
fn numbers(path: &Path) -> Vec<u64> {
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    name.split(|c: char| !c.is_ascii_digit()).filter_map(|part| part.parse().ok()).collect()
}

/// What a folder holds; nothing if it cannot be read.
fn entries(dir: &Path) -> Vec<PathBuf> {
    let list = std::fs::read_dir(dir).map(|list| list.flatten().map(|e| e.path()).collect::<Vec<_>>());
    let mut all = list.unwrap_or_default();
    all.sort();
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn newer_versions_come_first() {
        let mut all = ["cuda-9.2", "cuda-13.0", "cuda-12.8", "cuda-12.10"].map(PathBuf::from);
        all.sort_by_key(|path| std::cmp::Reverse(numbers(path)));
        assert_eq!(all, ["cuda-13.0", "cuda-12.10", "cuda-12.8", "cuda-9.2"].map(PathBuf::from));
    }

    #[test]
    fn what_is_no_library_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("libnvrtc.so.13");
        assert_eq!(load(&path).err().unwrap(), "no such file");
        std::fs::write(&path, "text").unwrap();
        assert!(!load(&path).err().unwrap().is_empty());
    }

    #[test]
    fn headers_beside_the_library_are_found() {
        let dir = tempfile::tempdir().unwrap();
        let (lib, include) = (dir.path().join("lib"), dir.path().join("include"));
        std::fs::create_dir_all(&lib).unwrap();
        std::fs::create_dir_all(include.join("cccl")).unwrap();
        std::fs::write(include.join("cuda_bf16.h"), "").unwrap();
        let include = include.canonicalize().unwrap();
        assert_eq!(includes(Some(&lib)), [include.clone(), include.join("cccl")]);
    }
}
