//! `halfbyte inspect`: what a directory or a safetensors file holds.

use std::path::{Path, PathBuf};

use clap::Args;
use halfbyte::checkpoint::{ModelDir, SafeTensors, TensorInfo, peft};
use halfbyte::model::{ModelConfig, RopeScaling};
use halfbyte::{Error, Result};
use serde_json::{Map, Value, json};

use super::output::{self, Out, put};

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  halfbyte inspect SmolLM2-135M-Instruct
  halfbyte inspect --tensors SmolLM2-135M-Instruct-4bit
  halfbyte inspect --json run1/checkpoint-100

Weights in 4 bits count with all their parts: codes, absmax, nested absmax, code books, quant_state.")]
pub struct InspectArgs {
    /// Model directory (16-bit or 4-bit), adapter, checkpoint or run directory, or one .safetensors file
    #[arg(value_name = "PATH", required_unless_present_any = ["model", "adapter"])]
    path: Option<PathBuf>,

    /// The same, but it must be a model directory
    #[arg(long, value_name = "DIR", conflicts_with_all = ["path", "adapter"])]
    model: Option<PathBuf>,

    /// The same, but it must be an adapter
    #[arg(long, value_name = "DIR", conflicts_with = "path")]
    adapter: Option<PathBuf>,

    /// List every tensor, not one line for all layers
    #[arg(long)]
    tensors: bool,

    /// Print one JSON object, with every tensor
    #[arg(long)]
    json: bool,
}

/// What is shown: facts in order, then tensors.
struct Report {
    kind: &'static str,
    path: PathBuf,
    facts: Vec<(&'static str, String)>,
    /// The same for machines.
    json: Map<String, Value>,
    tensors: Vec<TensorInfo>,
}

pub fn run(args: InspectArgs) -> Result<()> {
    let report = match (&args.path, &args.model, &args.adapter) {
        (Some(path), ..) => any(path)?,
        (_, Some(dir), _) => model(dir)?,
        (_, _, Some(dir)) => adapter(dir)?,
        (None, None, None) => return Err(Error::flag("PATH", "nothing", "a directory or a safetensors file")),
    };
    let mut out = Out::new();
    if args.json {
        out.json(&report.to_json())?;
    } else {
        report.print(&mut out, args.tensors)?;
    }
    out.flush()
}

/// Finds out what `path` is by the files in it.
fn any(path: &Path) -> Result<Report> {
    let meta = std::fs::metadata(path).map_err(Error::read("open", path))?;
    if !meta.is_dir() {
        return one_file(path);
    }
    if path.join("config.json").exists() {
        return model(path);
    }
    if path.join(peft::CONFIG).exists() {
        return adapter(path);
    }
    let checkpoints = checkpoints(path)?;
    if checkpoints.is_empty() {
        let expected = "config.json (a model), adapter_config.json (an adapter) or checkpoint-N (a run)";
        return Err(Error::input(path, "folder", "none of the files that halfbyte reads", expected));
    }
    let names: Vec<Value> = checkpoints.iter().map(|c| Value::from(c.as_str())).collect();
    Ok(Report {
        kind: "run without a finished adapter",
        path: path.into(),
        facts: vec![("checkpoints", checkpoints.join(", "))],
        json: Map::from_iter([("checkpoints".to_string(), Value::from(names))]),
        tensors: vec![],
    })
}

fn model(path: &Path) -> Result<Report> {
    let dir = ModelDir::open(path)?;
    let c = dir.config();
    let mut facts = vec![
        ("family", family(c)),
        (
            "size",
            format!(
                "{} layers, hidden {}, MLP {}, {} heads of {} ({} for keys and values), vocabulary {}",
                c.num_hidden_layers,
                c.hidden_size,
                c.intermediate_size,
                c.num_attention_heads,
                c.head_dim,
                c.num_key_value_heads,
                c.vocab_size
            ),
        ),
        ("context", context(c)),
        ("head", if c.tie_word_embeddings { "the embedding (tied)" } else { "lm_head" }.to_string()),
    ];
    if let Some(q) = dir.quantization() {
        let double = if q.double_quant { "with" } else { "without" };
        facts.push(("4 bits", format!("{}, {double} double quantisation", q.quant_type.name())));
        let skipped: Vec<String> = q.skip_modules.clone();
        if !skipped.is_empty() {
            facts.push(("in 16 bits", skipped.join(", ")));
        }
    }
    let tokenizer = if path.join("tokenizer.json").exists() {
        "tokenizer.json"
    } else {
        "none: train, eval and generate need tokenizer.json"
    };
    facts.push(("tokenizer", tokenizer.to_string()));
    let tensors: Vec<TensorInfo> = dir.tensors().collect();
    let mut json = Map::new();
    json.insert("config".into(), serde_json::to_value(c).unwrap_or_default());
    if let Some(q) = dir.quantization() {
        let q = json!({ "bnb_4bit_quant_type": q.quant_type.name(), "bnb_4bit_use_double_quant": q.double_quant,
            "llm_int8_skip_modules": q.skip_modules });
        json.insert("quantization".into(), q);
    }
    let kind = if dir.is_quantized() { "model directory in 4 bits (bitsandbytes)" } else { "model directory" };
    Ok(Report { kind, path: path.into(), facts, json, tensors })
}

fn family(c: &ModelConfig) -> String {
    let mut text = format!("{:?}", c.family).to_lowercase();
    for (has, what) in [(c.qkv_bias, "biases on q, k, v"), (c.qk_norm, "q/k norms")] {
        if has {
            text += &format!(", {what}");
        }
    }
    text
}

fn context(c: &ModelConfig) -> String {
    let mut text = format!("{} positions, RoPE theta {}", c.max_position_embeddings, c.rope_theta);
    match c.rope_scaling {
        RopeScaling::Default => {}
        RopeScaling::Linear { factor } => text += &format!(", linear scaling by {factor}"),
        RopeScaling::Llama3 { factor, .. } => text += &format!(", Llama 3 scaling by {factor}"),
    }
    let layers = c.windows.iter().flatten().count();
    match c.windows.iter().flatten().min() {
        Some(w) if layers == c.windows.len() => text += &format!(", sliding window {w}"),
        Some(w) => text += &format!(", sliding window {w} in {layers} layers"),
        None => {}
    }
    text
}

fn adapter(path: &Path) -> Result<Report> {
    let file = path.join(peft::CONFIG);
    let text = std::fs::read_to_string(&file).map_err(Error::read("read", &file))?;
    let c = peft::parse_config(&file, &text)?;
    let raw: Value = serde_json::from_str(&text).unwrap_or_default();
    let mut facts = vec![];
    if let Some(base) = raw["base_model_name_or_path"].as_str() {
        facts.push(("base model", base.to_string()));
    }
    let rslora = if c.use_rslora { ", rsLoRA" } else { "" };
    facts.push(("LoRA", format!("r {}, lora_alpha {}, dropout {}{rslora}", c.r, c.lora_alpha, c.lora_dropout)));
    facts.push(("targets", c.target_modules.to_string()));
    for (what, patterns) in [
        ("rank_pattern", c.rank_pattern.iter().map(|(k, v)| format!("{k} = {v}")).collect::<Vec<_>>()),
        ("alpha_pattern", c.alpha_pattern.iter().map(|(k, v)| format!("{k} = {v}")).collect()),
    ] {
        if !patterns.is_empty() {
            facts.push((what, patterns.join(", ")));
        }
    }
    let mut json = Map::from_iter([("config".to_string(), raw)]);
    let mut tensors = list(&SafeTensors::open(&path.join(peft::WEIGHTS))?)?;
    let mut kind = "PEFT adapter";
    let state = path.join("trainer_state.json");
    if state.exists() {
        kind = "training checkpoint (PEFT adapter and optimizer state)";
        let text = std::fs::read_to_string(&state).map_err(Error::read("read", &state))?;
        let value: Value = serde_json::from_str(&text)
            .map_err(|e| Error::input(&state, format!("line {}", e.line()), e.to_string(), "JSON"))?;
        if let Some(step) = value["step"].as_u64().or(value["global_step"].as_u64()) {
            facts.push(("step", step.to_string()));
            json.insert("step".into(), step.into());
        }
        let optimizer = path.join("optimizer.safetensors");
        if optimizer.exists() {
            tensors.extend(list(&SafeTensors::open(&optimizer)?)?);
        }
    }
    let checkpoints = checkpoints(path)?;
    if !checkpoints.is_empty() {
        facts.push(("checkpoints", checkpoints.join(", ")));
        json.insert("checkpoints".into(), checkpoints.into());
    }
    Ok(Report { kind, path: path.into(), facts, json, tensors })
}

fn one_file(path: &Path) -> Result<Report> {
    let tensors = list(&SafeTensors::open(path)?)?;
    Ok(Report { kind: "safetensors file", path: path.into(), facts: vec![], json: Map::new(), tensors })
}

fn list(file: &SafeTensors) -> Result<Vec<TensorInfo>> {
    let info = |name: &str| {
        let e = file.entry(name)?;
        Ok(TensorInfo {
            name: name.into(),
            dtype: e.dtype.to_string(),
            shape: e.shape.clone(),
            bytes: e.range.len() as u64,
            file: file.path().into(),
        })
    };
    file.names().map(info).collect()
}

/// "checkpoint-N" folders, by N.
fn checkpoints(dir: &Path) -> Result<Vec<String>> {
    let mut found = vec![];
    for entry in std::fs::read_dir(dir).map_err(Error::read("list", dir))? {
        let name = entry.map_err(Error::read("list", dir))?.file_name().to_string_lossy().into_owned();
        if let Some(n) = name.strip_prefix("checkpoint-").and_then(|n| n.parse::<u64>().ok()) {
            found.push((n, name));
        }
    }
    found.sort();
    Ok(found.into_iter().map(|f| f.1).collect())
}

/// One line of the table: tensors that differ in the layer alone.
struct Group {
    name: String,
    dtype: String,
    shape: Vec<usize>,
    count: u64,
    bytes: u64,
}

impl Group {
    fn elements(&self) -> u64 {
        self.count * elements(&self.shape)
    }
}

fn elements(shape: &[usize]) -> u64 {
    shape.iter().map(|&d| d as u64).product()
}

fn bits(bytes: u64, elements: u64) -> f64 {
    if elements == 0 { 0.0 } else { bytes as f64 * 8.0 / elements as f64 }
}

fn shape_text(shape: &[usize]) -> String {
    if shape.is_empty() {
        return "scalar".into();
    }
    shape.iter().map(usize::to_string).collect::<Vec<_>>().join(" x ")
}

/// The name with the number of the layer replaced by `*`.
fn pattern(name: &str) -> String {
    let digits = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
    name.split('.').map(|part| if digits(part) { "*" } else { part }).collect::<Vec<_>>().join(".")
}

fn group(tensors: &[TensorInfo], every: bool) -> Vec<Group> {
    let mut groups: Vec<Group> = vec![];
    let mut at = std::collections::HashMap::new();
    for t in tensors {
        let name = if every { t.name.clone() } else { pattern(&t.name) };
        let i = *at
            .entry((name.clone(), t.dtype.clone(), t.shape.clone(), every.then(|| t.file.clone())))
            .or_insert_with(|| {
                groups.push(Group { name, dtype: t.dtype.clone(), shape: t.shape.clone(), count: 0, bytes: 0 });
                groups.len() - 1
            });
        groups[i].count += 1;
        groups[i].bytes += t.bytes;
    }
    groups
}

fn is_4bit(dtype: &str) -> bool {
    matches!(dtype, "NF4" | "FP4")
}

impl Report {
    fn totals(&self, filter: impl Fn(&TensorInfo) -> bool) -> (u64, u64) {
        let picked = self.tensors.iter().filter(|t| filter(t));
        picked.fold((0, 0), |(n, b), t| (n + elements(&t.shape), b + t.bytes))
    }

    fn print(&self, out: &mut Out, every: bool) -> Result<()> {
        put!(out, "{}: {}", self.path.display(), self.kind)?;
        for (name, value) in &self.facts {
            put!(out, "  {name:<13} {value}")?;
        }
        for file in self.files() {
            let size = std::fs::metadata(&file).map(|m| m.len()).unwrap_or(0);
            put!(
                out,
                "  {:<13} {} ({})",
                "file",
                file.strip_prefix(&self.path).unwrap_or(&file).display(),
                output::bytes(size)
            )?;
        }
        if self.tensors.is_empty() {
            return Ok(());
        }
        let mut rows = vec![["tensor", "shape", "dtype", "count", "bits/weight", "bytes"].map(String::from).to_vec()];
        for g in group(&self.tensors, every) {
            let bits = format!("{:.3}", bits(g.bytes, g.elements()));
            let count = g.count.to_string();
            rows.push(vec![
                g.name.clone(),
                shape_text(&g.shape),
                g.dtype.clone(),
                count,
                bits,
                output::grouped(g.bytes),
            ]);
        }
        put!(out)?;
        for row in output::table(&rows, &[3, 4, 5]) {
            put!(out, "{row}")?;
        }
        put!(out)?;
        let (n, b) = self.totals(|_| true);
        put!(
            out,
            "total: {} values in {} tensors, {}, {:.3} bits each",
            output::grouped(n),
            self.tensors.len(),
            output::bytes(b),
            bits(b, n)
        )?;
        let (n, b) = self.totals(|t| is_4bit(&t.dtype));
        if n > 0 {
            put!(out, "in 4 bits: {} weights, {}, {:.3} bits each", output::grouped(n), output::bytes(b), bits(b, n))?;
        }
        Ok(())
    }

    fn files(&self) -> Vec<PathBuf> {
        let mut files: Vec<PathBuf> = self.tensors.iter().map(|t| t.file.clone()).collect();
        files.sort();
        files.dedup();
        files
    }

    fn to_json(&self) -> Value {
        let totals = |(n, b): (u64, u64)| json!({ "values": n, "bytes": b, "bits_per_weight": bits(b, n) });
        let tensor = |t: &TensorInfo| {
            json!({ "name": t.name, "dtype": t.dtype, "shape": t.shape, "bytes": t.bytes,
                "bits_per_weight": bits(t.bytes, elements(&t.shape)),
                "file": t.file.file_name().map(|n| n.to_string_lossy()) })
        };
        let mut all = Map::new();
        all.insert("kind".into(), self.kind.into());
        all.insert("path".into(), self.path.to_string_lossy().into());
        all.extend(self.json.clone());
        all.insert("total".into(), totals(self.totals(|_| true)));
        all.insert("total_4bit".into(), totals(self.totals(|t| is_4bit(&t.dtype))));
        all.insert("tensors".into(), self.tensors.iter().map(tensor).collect());
        Value::Object(all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_share_a_line() {
        assert_eq!(pattern("model.layers.12.mlp.up_proj.weight"), "model.layers.*.mlp.up_proj.weight");
        assert_eq!(pattern("lm_head.weight"), "lm_head.weight");
        let t = |name: &str, dtype: &str| TensorInfo {
            name: name.into(),
            dtype: dtype.into(),
            shape: vec![2, 4],
            bytes: 16,
            file: "f".into(),
        };
        let list = [t("l.0.w", "BF16"), t("l.1.w", "BF16"), t("l.2.w", "F32")];
        let groups = group(&list, false);
        assert_eq!(groups.iter().map(|g| (g.count, g.bytes)).collect::<Vec<_>>(), [(2, 32), (1, 16)]);
        assert_eq!(group(&list, true).len(), 3);
        assert_eq!(bits(groups[0].bytes, groups[0].elements()), 16.0);
    }
}
