//! `halfbyte info`: version, devices, and which backend is picked and why.

use clap::Args;
use halfbyte::Result;
use serde_json::{Value, json};

use super::output::{self, Out, put};

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  halfbyte info
  halfbyte info --json")]
pub struct InfoArgs {
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub fn run(args: InfoArgs) -> Result<()> {
    let facts = facts();
    let mut out = Out::new();
    if args.json {
        out.json(&facts)?;
        return out.flush();
    }
    let text = |v: &Value| match v {
        Value::String(s) => s.clone(),
        Value::Array(items) if items.is_empty() => "none".into(),
        Value::Array(items) => items.iter().map(|i| i.as_str().unwrap_or_default()).collect::<Vec<_>>().join(" "),
        other => other.to_string(),
    };
    let memory = |key: &str| facts["memory"][key].as_u64().map_or("unknown".into(), output::bytes);
    put!(out, "halfbyte    {}", text(&facts["version"]))?;
    put!(out, "features    {}", text(&facts["features"]))?;
    put!(
        out,
        "CPU         {} ({} threads; {})",
        text(&facts["cpu"]["model"]),
        facts["cpu"]["threads"],
        text(&facts["cpu"]["simd"])
    )?;
    put!(out, "memory      {}, {} available", memory("total_bytes"), memory("available_bytes"))?;
    put!(out, "driver      {}", text(&facts["cuda"]["driver"]))?;
    match facts["cuda"]["devices"].as_array() {
        Some(list) if !list.is_empty() => {
            for d in list {
                put!(out, "GPU         {}", text(&d["summary"]))?;
            }
        }
        _ => put!(out, "GPU         none: {}", text(&facts["cuda"]["why"]))?,
    }
    put!(out, "backend     {}", text(&facts["backend"]["picked"]))?;
    put!(out, "            {}", text(&facts["backend"]["why"]))?;
    out.flush()
}

fn facts() -> Value {
    let cuda = cuda();
    let (picked, why) = super::load::auto();
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "features": if cfg!(feature = "cuda") { vec!["cuda"] } else { vec![] },
        "cpu": { "model": cpu_model(), "threads": threads(), "simd": simd() },
        "memory": { "total_bytes": meminfo("MemTotal:"), "available_bytes": meminfo("MemAvailable:") },
        "cuda": cuda,
        "backend": {
            "picked": picked,
            "why": why,
        },
    })
}

fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, |n| n.get())
}

fn cpu_model() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = text.lines().find_map(|l| l.strip_prefix("model name")).and_then(|l| l.split_once(':'));
    name.map_or(std::env::consts::ARCH.to_string(), |(_, v)| v.trim().to_string())
}

fn simd() -> Vec<&'static str> {
    #[cfg(target_arch = "x86_64")]
    let found = [
        ("AVX2", is_x86_feature_detected!("avx2")),
        ("FMA", is_x86_feature_detected!("fma")),
        ("F16C", is_x86_feature_detected!("f16c")),
        ("AVX512F", is_x86_feature_detected!("avx512f")),
        ("AVX512BF16", is_x86_feature_detected!("avx512bf16")),
    ];
    #[cfg(target_arch = "aarch64")]
    let found = [("NEON", true)];
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let found: [(&str, bool); 0] = [];
    found.into_iter().filter(|f| f.1).map(|f| f.0).collect()
}

/// Bytes of a line of /proc/meminfo; None where there is no such file.
fn meminfo(key: &str) -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let kib: u64 = text.lines().find_map(|l| l.strip_prefix(key))?.split_whitespace().next()?.parse().ok()?;
    Some(kib * 1024)
}

#[cfg(not(feature = "cuda"))]
fn cuda() -> Value {
    json!({ "driver": "not looked for", "devices": [], "why": "built without the feature cuda" })
}

#[cfg(feature = "cuda")]
fn cuda() -> Value {
    use halfbyte::backend::cuda::device::{Driver, KERNEL_ARCHS};
    let driver = match Driver::discover() {
        Ok(driver) => driver,
        Err(e) => {
            let why = match e {
                halfbyte::Error::Unavailable { why, .. } => why,
                other => other.to_string(),
            };
            return json!({ "driver": "none", "devices": [], "why": why, "kernels": KERNEL_ARCHS });
        }
    };
    let (major, minor) = driver.version;
    let mut version = format!("NVIDIA, CUDA {major}.{minor}");
    if let Some(why) = &driver.too_old {
        version += &format!(" ({why})");
    }
    let device = |d: &halfbyte::backend::cuda::device::Device| {
        let (major, minor) = d.compute_capability;
        let memory = output::bytes(d.memory as u64);
        let mut summary =
            format!("{}: {}, sm_{major}{minor}, {memory}, {} multiprocessors", d.ordinal, d.name, d.multiprocessors);
        if let Some(why) = &d.unsupported {
            summary += &format!(" (not usable: {why})");
        }
        json!({ "summary": summary, "name": d.name, "compute_capability": [major, minor], "memory_bytes": d.memory,
            "multiprocessors": d.multiprocessors, "unsupported": d.unsupported })
    };
    let devices: Vec<Value> = driver.devices.iter().map(device).collect();
    json!({ "driver": version, "devices": devices, "why": "the driver shows none", "kernels": KERNEL_ARCHS })
}
