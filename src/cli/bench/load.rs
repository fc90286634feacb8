//! `halfbyte bench load`: how fast a model directory gets onto the device and into 4 bits.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Args;
use halfbyte::backend::Backend;
use halfbyte::bench::environment::environment;
use halfbyte::bench::results::{LoadRow, figure};
use halfbyte::checkpoint::{ModelDir, random};
use halfbyte::{Error, Result, memory};
use rustix::fs::{Advice, fadvise};

use super::RowArgs;
use crate::cli::args::{BnbArgs, DeviceArgs, named_shape};
use crate::cli::load::{self, Picked, Room, with_backend};
use crate::cli::output::put;
use crate::cli::progress::{Progress, Unit};

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  halfbyte bench load --model Mistral-7B-v0.3
  halfbyte bench load --make mistral-7b --model /tmp/m7b --csv load.csv

A 16-bit directory is loaded three times: read as plain files with the page cache empty (what the disk gives), put into
4 bits on the device with the page cache empty, and once more from the page cache.")]
pub struct LoadArgs {
    /// Model directory
    #[arg(long, value_name = "DIR")]
    model: PathBuf,

    /// First write --model with random bf16 weights of this well-known shape
    #[arg(long, value_name = "NAME")]
    make: Option<String>,

    #[command(flatten)]
    bnb: BnbArgs,

    #[command(flatten)]
    row: RowArgs,

    #[command(flatten)]
    device: DeviceArgs,
}

pub fn run(args: &LoadArgs) -> Result<()> {
    args.row.check::<LoadRow>()?;
    let mut picked = args.device.backend()?;
    if let Some(name) = &args.make {
        if args.model.exists() {
            let found = format!("{}, which exists", args.model.display());
            return Err(Error::flag("--model", found, "a directory that is not there yet, with --make"));
        }
        let mut bar = Progress::new(format!("writing {}", args.model.display()), Unit::Bytes);
        random::write(&args.model, &named_shape(name)?, &mut |done, all| bar.set(done, all))?;
        bar.finish();
    }
    let files = weight_files(&args.model)?;
    let bytes: u64 = ModelDir::open(&args.model)?.tensors().map(|t| t.bytes).sum();
    let rate = |seconds: f64| figure(bytes as f64 / seconds / 1e9);

    forget(&files)?;
    let disk_seconds = read_all(&files)?;
    forget(&files)?;
    let cold_seconds = timed(&mut picked, args)?;
    let warm_seconds = timed(&mut picked, args)?;
    let (card, link) = match &picked {
        Picked::Cpu(cpu) => (cpu.describe(), None),
        #[cfg(feature = "cuda")]
        Picked::Cuda(cuda) => (cuda.device().name.clone(), Some(figure(cuda.upload_rate()? / 1e9))),
    };
    let here = environment(picked.gpu());
    let row = LoadRow {
        date: here.date,
        card,
        commit: here.commit,
        model: args.make.clone().unwrap_or_else(|| args.model.display().to_string()),
        bytes,
        disk_gb_per_s: rate(disk_seconds),
        pcie_gb_per_s: link,
        cold_gb_per_s: rate(cold_seconds),
        cold_seconds: figure(cold_seconds),
        warm_gb_per_s: rate(warm_seconds),
        warm_seconds: figure(warm_seconds),
    };
    args.row.put(&row, |out| {
        put!(out, "{}: {} of {}", row.card, memory::size(bytes as usize), args.model.display())?;
        put!(out, "  the disk alone          {:6.2} GB/s  {disk_seconds:6.2} s", row.disk_gb_per_s)?;
        if let Some(link) = link {
            put!(out, "  pinned memory to device {link:6.2} GB/s  {:6.2} s", bytes as f64 / link / 1e9)?;
        }
        put!(out, "  loaded from the disk    {:6.2} GB/s  {cold_seconds:6.2} s", row.cold_gb_per_s)?;
        put!(out, "  loaded from page cache  {:6.2} GB/s  {warm_seconds:6.2} s", row.warm_gb_per_s)
    })
}

/// Seconds from opening the directory to the last weight on the device.
fn timed(picked: &mut Picked, args: &LoadArgs) -> Result<f64> {
    let start = Instant::now();
    let dir = ModelDir::open(&args.model)?;
    let quantize = (!dir.is_quantized()).then(|| args.bnb.config());
    with_backend!(picked, |b| load::model(b, &dir, quantize, None, 64, Some(Room::Cache(64))).map(|_| ()))?;
    Ok(start.elapsed().as_secs_f64())
}

fn weight_files(dir: &Path) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(dir).map_err(Error::read("list", dir))?;
    let paths = entries.map(|e| e.map(|e| e.path())).collect::<std::io::Result<Vec<_>>>();
    let mut files = paths.map_err(Error::read("list", dir))?;
    files.retain(|p| p.extension().is_some_and(|e| e == "safetensors"));
    Ok(files)
}

/// Takes the files out of the page cache. What is not yet on the disk stays, so it is brought there first.
fn forget(files: &[PathBuf]) -> Result<()> {
    for path in files {
        let file = File::open(path).map_err(Error::read("open", path))?;
        file.sync_all().map_err(Error::read("sync", path))?;
        fadvise(&file, 0, None, Advice::DontNeed).map_err(|e| Error::read("advise on", path)(e.into()))?;
    }
    Ok(())
}

/// Seconds to read every byte of the files, four at a time, each in order.
fn read_all(files: &[PathBuf]) -> Result<f64> {
    let start = Instant::now();
    let read = |path: &PathBuf| -> Result<()> {
        let mut file = File::open(path).map_err(Error::read("open", path))?;
        let mut buffer = vec![0u8; 8 << 20];
        while file.read(&mut buffer).map_err(Error::read("read", path))? > 0 {}
        Ok(())
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = files.iter().map(|path| scope.spawn(move || read(path))).collect();
        threads.into_iter().try_for_each(|t| t.join().unwrap_or(Ok(())))
    })?;
    Ok(start.elapsed().as_secs_f64())
}
