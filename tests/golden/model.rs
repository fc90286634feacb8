//! The whole engine against transformers + PEFT in float32: `NAME-lora/` with expected.json beside the model directory
//! `NAME`, and `NAME-nf4-*/`, the same model as transformers and bitsandbytes save it in 4 bits. Written once over the
//! backend: the GPU tests run the same cases with the tolerances of bf16.

use std::marker::PhantomData;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use halfbyte::backend::{Backend, Batch, HostBatch, IGNORE, NewOptimizer, OptimKind, ParamGroup};
use halfbyte::checkpoint::dir::ModelDir;
use halfbyte::checkpoint::{QuantConfig, peft};
use halfbyte::model::{AdamwSettings, AdapterLayout, HostAdapter, Model, ModelOptions, WeightSource};
use halfbyte::nf4::{Absmax, QuantType};
use halfbyte::tensor::{Dtype, HostMatrix};
use libtest_mimic::Failed;
use serde_json::Value;

use crate::files::{Fixture, near, near_l2, same_bits, same_bytes};

/// A backend under test, and how near it must come. Relative to the expected value; tensors by their L2 norm.
pub trait Device: 'static {
    type Backend: Backend;
    const TOLERANCE: Tolerance;
    fn open() -> Result<Self::Backend, Failed>;
}

pub struct Tolerance {
    pub loss: f64,
    pub logits: f64,
    pub gradient: f64,
    /// Norm of all gradients.
    pub norm: f64,
    /// Losses and gradient norms over 20 steps of AdamW.
    pub training: f64,
    /// The adapter after them, and what they changed.
    pub adapter: f64,
    pub update: f64,
    /// Two sequences in one row against the same run alone.
    pub packed: f64,
}

/// transformers in bf16 against us in f32.
const LOSS_IN_BF16: f64 = 5e-3;
/// Weights quantised anew: a different offset of the last place, nothing else.
const REQUANTISED: f64 = 1e-6;
/// Offset of double quantisation: the order of its sum is free.
const NESTED_OFFSET: f64 = 1e-6;

const NF4: QuantConfig = QuantConfig { quant_type: QuantType::Nf4, double_quant: true };

/// Name and body of a test.
pub type Cases = Vec<(String, Run)>;
pub type Run = Box<dyn FnOnce() -> Result<(), Failed> + Send>;

type Check<D> = fn(&Case<D>) -> Result<(), Failed>;

/// A `NAME-lora` folder, or a `NAME-nf4-TAG` folder with the `NAME-lora` folder that tells what it must give.
struct Case<D> {
    device: PhantomData<fn() -> D>,
    /// Directory of the model to load.
    model: PathBuf,
    lora: PathBuf,
    expected: Value,
    /// TAG of a 4-bit directory.
    tag: Option<String>,
}

/// The tests of `root/NAME-lora`.
pub fn lora_cases<D: Device>(root: &Path, folder: &str) -> Result<Cases, Failed> {
    let lora = root.join(folder);
    let name = folder.strip_suffix("-lora").ok_or("a folder NAME-lora")?;
    let case =
        Arc::new(Case { device: PhantomData, model: root.join(name), expected: expected(&lora)?, lora, tag: None });
    let mut checks: Vec<(&str, Check<D>)> = vec![("base", Case::base), ("fixed", Case::fixed)];
    if case.lora.join("packed.safetensors").exists() {
        checks.push(("packed", Case::packed));
    }
    if case.lora.join("train_batches.safetensors").exists() {
        checks.push(("train", Case::train));
    }
    Ok(trials(folder, case, checks))
}

/// The tests of `root/NAME-nf4-TAG`.
pub fn four_bit_cases<D: Device>(root: &Path, folder: &str) -> Result<Cases, Failed> {
    let (name, tag) = folder.split_once("-nf4-").ok_or("a folder NAME-nf4-TAG")?;
    let lora = root.join(format!("{name}-lora"));
    let tag = Some(tag.to_owned());
    let case = Case { device: PhantomData, model: root.join(folder), expected: expected(&lora)?, lora, tag };
    let mut checks: Vec<(&str, Check<D>)> =
        vec![("base", Case::base), ("loss", Case::four_bit_loss), ("fixed", Case::fixed)];
    if root.join(name).is_dir() {
        checks.push(("quantising_gives_the_same", Case::quantising_gives_the_same));
    }
    Ok(trials(folder, Arc::new(case), checks))
}

fn trials<D: Device>(folder: &str, case: Arc<Case<D>>, checks: Vec<(&str, Check<D>)>) -> Cases {
    let trial = |(name, check): (&str, Check<D>)| {
        let case = case.clone();
        let run: Run = Box::new(move || check(&case));
        (format!("{folder}/{name}"), run)
    };
    checks.into_iter().map(trial).collect()
}

fn expected(lora: &Path) -> Result<Value, Failed> {
    let path = lora.join("expected.json");
    let text = std::fs::read(&path).map_err(|e| format!("{}: {e}", path.display()))?;
    Ok(serde_json::from_slice(&text)?)
}

/// A number of expected.json by its JSON pointer.
fn number(value: &Value, pointer: &str) -> Result<f64, Failed> {
    let number = value.pointer(pointer).and_then(Value::as_f64);
    number.ok_or_else(|| format!("expected.json: no number at {pointer}").into())
}

/// Token ids and labels as transformers takes them, row by row, without right padding.
struct Rows {
    rows: Vec<(Vec<i32>, Vec<i32>)>,
}

impl Rows {
    /// `suffix` is "" or ".2" and so on.
    fn read(fixture: &Fixture, suffix: &str) -> Result<Self, Failed> {
        let (shape, ids) = fixture.i64s(&format!("input_ids{suffix}"))?;
        let (_, labels) = fixture.i64s(&format!("labels{suffix}"))?;
        let mask = match fixture.get(&format!("attention_mask{suffix}")) {
            Some(_) => fixture.i64s(&format!("attention_mask{suffix}"))?.1,
            None => vec![1; ids.len()],
        };
        let t = *shape.last().ok_or("input_ids of two dimensions")?;
        let rows = ids.chunks(t).zip(labels.chunks(t)).zip(mask.chunks(t)).map(|((ids, labels), mask)| {
            let n = mask.iter().take_while(|&&m| m == 1).count();
            (ids[..n].to_vec(), labels[..n].to_vec())
        });
        Ok(Self { rows: rows.collect() })
    }

    /// A packed row taken apart where its position ids restart.
    fn split(self, positions: &[i32]) -> Result<Self, Failed> {
        let [(ids, labels)] = &self.rows[..] else { return Err("a packed case has one row".into()) };
        if positions.len() != ids.len() || positions.first() != Some(&0) {
            return Err("a position id for each token, from 0 on".into());
        }
        let mut starts: Vec<usize> = (0..ids.len()).filter(|&t| positions[t] == 0).collect();
        starts.push(ids.len());
        let rows = starts.windows(2).map(|w| (ids[w[0]..w[1]].to_vec(), labels[w[0]..w[1]].to_vec()));
        Ok(Self { rows: rows.collect() })
    }

    /// All sequences end to end; the label of the next token is this one's target.
    fn batch(&self) -> HostBatch {
        let mut all = HostBatch::default();
        for (ids, labels) in &self.rows {
            let mut targets = labels[1..].to_vec();
            targets.push(IGNORE);
            all.append(&HostBatch { tokens: ids.clone(), targets, cu_seqlens: vec![0, ids.len() as i32] });
        }
        all
    }
}

/// A model on a device.
struct Engine<D: Device> {
    backend: D::Backend,
    model: Model<D::Backend>,
}

impl<D: Device> Engine<D> {
    fn new(dir: &ModelDir, adapter: Option<&HostAdapter>, max_tokens: usize) -> Result<Self, Failed> {
        let mut backend = D::open()?;
        let mut source = dir.source(Some(NF4))?;
        let options = ModelOptions { max_tokens, train: adapter.is_some(), layers: vec![] };
        let model = Model::load(&mut backend, dir.config(), &mut source, adapter, options, &mut |_| ())?;
        Ok(Self { backend, model })
    }

    fn fill(&mut self, host: &HostBatch, targets: usize) -> Result<Batch<D::Backend>, Failed> {
        let mut batch = Batch::new(&mut self.backend, host.tokens.len())?;
        batch.fill(&mut self.backend, host, 1.0 / targets as f32)?;
        Ok(batch)
    }

    /// Mean loss, gradient norm and gradients of one step over these micro-batches.
    fn step(&mut self, micro_batches: &[HostBatch]) -> Result<(f64, f64, Vec<f32>), Failed> {
        let targets = micro_batches.iter().map(HostBatch::target_count).sum();
        self.model.zero_grad(&mut self.backend)?;
        for host in micro_batches {
            let batch = self.fill(host, targets)?;
            self.model.loss_and_grad(&mut self.backend, &batch, None)?;
        }
        let (loss, norm) = self.model.read_loss_and_norm(&mut self.backend)?;
        Ok((loss.into(), norm.into(), self.model.read_grads(&mut self.backend)?))
    }

    fn loss(&mut self, host: &HostBatch) -> Result<f64, Failed> {
        self.model.zero_grad(&mut self.backend)?;
        let batch = self.fill(host, host.target_count())?;
        self.model.loss(&mut self.backend, &batch)?;
        Ok(self.model.read_loss(&mut self.backend)?.into())
    }

    fn logits(&mut self, host: &HostBatch) -> Result<Vec<f32>, Failed> {
        let rows: Vec<usize> = (0..host.tokens.len()).collect();
        let batch = self.fill(host, 1)?;
        Ok(self.model.logits(&mut self.backend, &batch, &rows)?)
    }
}

/// Each tensor of the adapter by its PEFT name.
fn by_name<'a>(layout: &AdapterLayout, flat: &'a [f32]) -> Vec<(String, &'a [f32])> {
    let both =
        |s: &halfbyte::model::Site| [(s.peft_name('A'), &flat[s.a_range()]), (s.peft_name('B'), &flat[s.b_range()])];
    layout.sites.iter().flat_map(both).collect()
}

fn gradients_near<D: Device>(layout: &AdapterLayout, flat: &[f32], fixture: &Fixture) -> Result<(), Failed> {
    let expected = fixture.names().filter(|n| n.starts_with("grad.")).count();
    let found = by_name(layout, flat);
    if found.len() != expected {
        return Err(format!("{} gradient tensors, expected {expected}", found.len()).into());
    }
    for (name, grad) in found {
        near_l2(&format!("grad {name}"), grad, &fixture.f32s(&format!("grad.{name}"))?, D::TOLERANCE.gradient)?;
    }
    Ok(())
}

impl<D: Device> Case<D> {
    fn open(&self) -> Result<(ModelDir, HostAdapter), Failed> {
        let dir = ModelDir::open(&self.model)?;
        let adapter = peft::load(&self.lora.join("adapter_init"), dir.config())?;
        Ok((dir, adapter))
    }

    /// The dequantised projections: as stored for a 4-bit directory, as quantised by us for a 16-bit one.
    fn base(&self) -> Result<(), Failed> {
        let dir = ModelDir::open(&self.model)?;
        if dir.is_quantized() != self.tag.is_some() {
            return Err(format!("{}: is_quantized() is {}", self.model.display(), dir.is_quantized()).into());
        }
        let fixture = Fixture::open(&self.lora.join("base_dequantized_f32.safetensors"))?;
        let mut source = dir.source(Some(NF4))?;
        let mut in_four_bits = 0;
        for name in fixture.names() {
            let found = source.matrix(name)?.quantized()?;
            in_four_bits += usize::from(matches!(found, HostMatrix::Quantized(_)));
            let (found, expected) = (found.to_f32(), fixture.f32s(name)?);
            match self.tag {
                Some(_) => same_bits(name, &found, &expected)?,
                None => near_l2(name, &found, &expected, REQUANTISED)?,
            }
        }
        // A 4-bit directory may have modules left in 16 bits.
        if in_four_bits == 0 || (self.tag.is_none() && in_four_bits != fixture.names().count()) {
            return Err(format!("{in_four_bits} of {} projections in 4 bits", fixture.names().count()).into());
        }
        Ok(())
    }

    /// The base alone gives the loss that transformers gives with the same 4-bit weights.
    fn four_bit_loss(&self) -> Result<(), Failed> {
        let dir = ModelDir::open(&self.model)?;
        let host = Rows::read(&Fixture::open(&self.lora.join("fixed.safetensors"))?, "")?.batch();
        let loss = Engine::<D>::new(&dir, None, host.tokens.len())?.loss(&host)?;
        near("loss", loss, number(&self.expected, "/loss_without_adapter")?, D::TOLERANCE.loss)?;
        let tag = self.tag.as_deref().unwrap_or_default();
        let reloaded = format!("/hf_{tag}_4bit_dir_reloaded_loss_without_adapter");
        if self.expected.pointer(&reloaded).is_none() {
            return Ok(());
        }
        // transformers computes in the directory's dtype, we in f32.
        let tolerance = match dir.dense_dtype() {
            Dtype::F32 => D::TOLERANCE.loss,
            Dtype::Bf16 | Dtype::F16 => LOSS_IN_BF16,
        };
        near("loss of transformers", loss, number(&self.expected, &reloaded)?, tolerance)
    }

    /// Quantising the 16-bit model gives the bytes of this 4-bit directory.
    fn quantising_gives_the_same(&self) -> Result<(), Failed> {
        let dir = ModelDir::open(&self.model)?;
        let sixteen_bit = self.lora.to_string_lossy().strip_suffix("-lora").map(PathBuf::from);
        let sixteen_bit = ModelDir::open(&sixteen_bit.ok_or("a folder NAME-lora")?)?;
        for name in Fixture::open(&self.lora.join("base_dequantized_f32.safetensors"))?.names() {
            let HostMatrix::Quantized(stored) = dir.source(None)?.matrix(name)? else { continue };
            let double_quant = matches!(stored.absmax, Absmax::Double { .. });
            let config = QuantConfig { quant_type: stored.quant_type, double_quant };
            let HostMatrix::Quantized(ours) = sixteen_bit.source(Some(config))?.matrix(name)?.quantized()? else {
                return Err(format!("{name} was not put into 4 bits").into());
            };
            same_bytes(name, &ours.packed, &stored.packed)?;
            match (&ours.absmax, &stored.absmax) {
                (Absmax::Double { codes: a, offset: x, .. }, Absmax::Double { codes: b, offset: y, .. }) => {
                    same_bytes(name, a, b)?;
                    near(name, (*x).into(), (*y).into(), NESTED_OFFSET)?;
                }
                (Absmax::Plain(a), Absmax::Plain(b)) => same_bits(name, a, b)?,
                _ => return Err(format!("{name}: double quantisation on one side alone").into()),
            }
        }
        Ok(())
    }

    /// One batch: loss, logits, gradients with the adapter; loss and logits without.
    fn fixed(&self) -> Result<(), Failed> {
        let (dir, adapter) = self.open()?;
        let fixture = Fixture::open(&self.lora.join("fixed.safetensors"))?;
        let host = Rows::read(&fixture, "")?.batch();
        let targets = number(&self.expected, "/fixed/label_tokens")?;
        near("label tokens", host.target_count() as f64, targets, 0.0)?;

        let mut base = Engine::<D>::new(&dir, None, host.tokens.len())?;
        near("loss alone", base.loss(&host)?, number(&self.expected, "/loss_without_adapter")?, D::TOLERANCE.loss)?;
        let alone = fixture.f32s("logits_without_adapter")?;
        near_l2("logits_without_adapter", &base.logits(&host)?, &alone, D::TOLERANCE.logits)?;

        let mut engine = Engine::<D>::new(&dir, Some(&adapter), host.tokens.len())?;
        near_l2("logits", &engine.logits(&host)?, &fixture.f32s("logits")?, D::TOLERANCE.logits)?;
        let (loss, norm, grads) = engine.step(std::slice::from_ref(&host))?;
        near("loss", loss, number(&self.expected, "/fixed/loss")?, D::TOLERANCE.loss)?;
        near("loss of evaluation", engine.loss(&host)?, loss, D::TOLERANCE.loss)?;
        near("grad_norm", norm, number(&self.expected, "/fixed/grad_norm")?, D::TOLERANCE.norm)?;
        gradients_near::<D>(&adapter.layout, &grads, &fixture)
    }

    /// Two sequences in one row: as expected, and the same as run alone.
    fn packed(&self) -> Result<(), Failed> {
        let (dir, adapter) = self.open()?;
        let fixture = Fixture::open(&self.lora.join("packed.safetensors"))?;
        let rows = Rows::read(&fixture, "")?.split(&fixture.i64s("position_ids")?.1)?;
        let host = rows.batch();

        let mut engine = Engine::<D>::new(&dir, Some(&adapter), host.tokens.len())?;
        near_l2("logits", &engine.logits(&host)?, &fixture.f32s("logits")?, D::TOLERANCE.logits)?;
        let (loss, norm, grads) = engine.step(std::slice::from_ref(&host))?;
        near("loss", loss, number(&self.expected, "/packed/loss")?, D::TOLERANCE.loss)?;
        near("grad_norm", norm, number(&self.expected, "/packed/grad_norm")?, D::TOLERANCE.norm)?;
        gradients_near::<D>(&adapter.layout, &grads, &fixture)?;

        let alone: Vec<HostBatch> = rows.rows.into_iter().map(|row| Rows { rows: vec![row] }.batch()).collect();
        let (loss_alone, norm_alone, grads_alone) = engine.step(&alone)?;
        near("loss, packed against alone", loss, loss_alone, D::TOLERANCE.packed)?;
        near("grad_norm, packed against alone", norm, norm_alone, D::TOLERANCE.packed)?;
        near_l2("gradients, packed against alone", &grads, &grads_alone, D::TOLERANCE.packed)?;
        let logits: Result<Vec<_>, _> = alone.iter().map(|host| engine.logits(host)).collect();
        near_l2("logits, alone", &logits?.concat(), &fixture.f32s("logits")?, D::TOLERANCE.logits)
    }

    /// Steps of AdamW: every loss and gradient norm, then the adapter.
    fn train(&self) -> Result<(), Failed> {
        let (dir, adapter) = self.open()?;
        let fixture = Fixture::open(&self.lora.join("train_batches.safetensors"))?;
        let told = self.expected.pointer("/train/optimizer").and_then(Value::as_str);
        let optimizer = Optimizer::read(told.ok_or("expected.json: no train/optimizer")?)?;
        let steps = self.expected.pointer("/train/steps").and_then(Value::as_array).ok_or("no train/steps")?;

        let mut engine = Engine::<D>::new(&dir, Some(&adapter), Self::longest(&fixture, steps)?)?;
        let tensors = adapter.layout.tensor_lens();
        let of = NewOptimizer { kind: OptimKind::PagedAdamw32bit, init: &adapter.weights, tensors: &tensors };
        let mut state = engine.backend.new_optimizer(of)?;
        for (i, step) in steps.iter().enumerate() {
            let batch = number(step, "/batch")?;
            let host = Rows::read(&fixture, &format!(".{batch}"))?.batch();
            let (loss, norm, _) = engine.step(&[host])?;
            near(&format!("loss of step {}", i + 1), loss, number(step, "/loss")?, D::TOLERANCE.training)?;
            let expected = number(step, "/grad_norm_before_clip")?;
            near(&format!("grad_norm of step {}", i + 1), norm, expected, D::TOLERANCE.training)?;
            let settings = optimizer.settings(adapter.layout.len, i as u64 + 1);
            engine.model.optimizer_step(&mut engine.backend, &mut state, &settings)?;
        }

        let trained = engine.backend.read_optimizer(&state)?.master;
        let last = peft::load(&self.lora.join("adapter_final"), dir.config())?;
        let update = |to: &[f32]| -> Vec<f32> { to.iter().zip(&adapter.weights).map(|(a, b)| a - b).collect() };
        let tensors = |flat: &[f32]| -> Vec<(String, Vec<f32>)> {
            by_name(&adapter.layout, flat).into_iter().map(|(name, t)| (name, t.to_vec())).collect()
        };
        for ((name, found), (_, expected)) in tensors(&trained).iter().zip(tensors(&last.weights)) {
            near_l2(&format!("adapter_final {name}"), found, &expected, D::TOLERANCE.adapter)?;
        }
        for ((name, found), (_, expected)) in tensors(&update(&trained)).iter().zip(tensors(&update(&last.weights))) {
            near_l2(&format!("update of {name}"), found, &expected, D::TOLERANCE.update)?;
        }
        Ok(())
    }

    /// Tokens of the largest training batch.
    fn longest(fixture: &Fixture, steps: &[Value]) -> Result<usize, Failed> {
        let mut longest = 0;
        for step in steps {
            let rows = Rows::read(fixture, &format!(".{}", number(step, "/batch")?))?;
            longest = longest.max(rows.batch().tokens.len());
        }
        Ok(longest)
    }
}

/// The settings that expected.json tells in words: "lr=1e-3 ... betas=(0.9,0.999) eps=1e-8 weight_decay=0.01 ... clip_grad_norm_(1.0)".
struct Optimizer {
    lr: f32,
    betas: (f32, f32),
    eps: f32,
    weight_decay: f32,
    max_grad_norm: f32,
}

impl Optimizer {
    fn read(told: &str) -> Result<Self, Failed> {
        let after = |key: &str| -> Result<f32, Failed> {
            let rest = told.split_once(key).ok_or_else(|| format!("train/optimizer: no {key:?} in {told:?}"))?.1;
            let end = rest.find(|c: char| !matches!(c, '0'..='9' | '.' | 'e' | '-' | '+')).unwrap_or(rest.len());
            Ok(rest[..end].parse().map_err(|e| format!("train/optimizer: {key}{rest}: {e}"))?)
        };
        let beta1 = after("betas=(")?;
        let second = told.split_once("betas=(").and_then(|(_, rest)| rest.split_once(',')).map(|(_, rest)| rest);
        let beta2 = second.and_then(|rest| rest.split_once(')')).and_then(|(b, _)| b.trim().parse().ok());
        Ok(Self {
            lr: after("lr=")?,
            betas: (beta1, beta2.ok_or("train/optimizer: no second beta")?),
            eps: after("eps=")?,
            weight_decay: after("weight_decay=")?,
            max_grad_norm: after("clip_grad_norm_(")?,
        })
    }

    fn settings(&self, len: usize, step: u64) -> AdamwSettings {
        AdamwSettings {
            groups: vec![ParamGroup { range: 0..len, lr: self.lr, weight_decay: self.weight_decay }],
            beta1: self.betas.0,
            beta2: self.betas.1,
            eps: self.eps,
            max_grad_norm: self.max_grad_norm,
            step,
        }
    }
}
