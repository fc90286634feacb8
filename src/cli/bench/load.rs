//! `halfbyte bench load`: how fast a model directory gets onto the device and into 4 bits.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Args;
use halfbyte::backend::Backend;
use halfbyte::checkpoint::{ModelDir, random};
use halfbyte::{Error, Result, memory};
use rustix::fs::{Advice, fadvise};
use serde_json::json;

use super::{append, can_append};
use crate::cli::args::{BnbArgs, DeviceArgs, named_shape};
use crate::cli::load::{self, Picked, Room, with_backend};
use crate::cli::output::{Out, put};
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

    /// Append a row to this file
    #[arg(long, value_name = "FILE")]
    csv: Option<PathBuf>,

    /// Print one JSON object
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    device: DeviceArgs,
}

pub fn run(args: &LoadArgs) -> Result<()> {
    can_append(args.csv.as_deref())?;
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
    let rate = |seconds: f64| bytes as f64 / seconds / 1e9;

    forget(&files)?;
    let disk = rate(read_all(&files)?);
    forget(&files)?;
    let cold = rate(timed(&mut picked, args)?);
    let warm = rate(timed(&mut picked, args)?);
    let (name, link) = match &picked {
        Picked::Cpu(cpu) => (cpu.describe(), None),
        #[cfg(feature = "cuda")]
        Picked::Cuda(cuda) => (cuda.device().name.clone(), Some(cuda.upload_rate()? / 1e9)),
    };
    let row = json!({
        "date": chrono::Local::now().format("%Y-%m-%d").to_string(),
        "card": name,
        "commit": std::env::var("HALFBYTE_COMMIT").unwrap_or_default(),
        "model": args.make.clone().unwrap_or_else(|| args.model.display().to_string()),
        "bytes": bytes,
        "disk_gb_per_s": disk,
        "pcie_gb_per_s": link,
        "cold_gb_per_s": cold,
        "cold_seconds": bytes as f64 / cold / 1e9,
        "warm_gb_per_s": warm,
        "warm_seconds": bytes as f64 / warm / 1e9,
    });
    if let Some(path) = &args.csv {
        append(path, &row)?;
    }
    let mut out = Out::new();
    if args.json {
        out.json(&row)?;
        return out.flush();
    }
    let seconds = |rate: f64| bytes as f64 / rate / 1e9;
    put!(out, "{name}: {} of {}", memory::size(bytes as usize), args.model.display())?;
    put!(out, "  the disk alone          {disk:6.2} GB/s  {:6.2} s", seconds(disk))?;
    if let Some(link) = link {
        put!(out, "  pinned memory to device {link:6.2} GB/s  {:6.2} s", seconds(link))?;
    }
    put!(out, "  loaded from the disk    {cold:6.2} GB/s  {:6.2} s", seconds(cold))?;
    put!(out, "  loaded from page cache  {warm:6.2} GB/s  {:6.2} s", seconds(warm))?;
    out.flush()
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
