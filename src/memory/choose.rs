//! What each layer keeps, for the fastest step that fits.
//!
//! All layers cost nearly the same, so a choice is three numbers: how many layers keep all, all but the MLP, or the
//! attention; the rest keep their input alone. Each number's price in bytes and its gain in time come from measuring one
//! such layer; every combination is then priced, with as many inputs on the host as it takes to fit. The fastest by this
//! estimate are measured exactly, and the best of those that fit is taken.
//!
//! The layers that keep least lie at the bottom: their inputs have the longest way to the host and back.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::card::Card;
use super::plan::{Plan, Request, measure};
use super::size::size;
use crate::backend::Item;
use crate::error::{Error, Result};
use crate::model::{Keep, LayerPlan};

/// What the user has said about recomputing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// The fastest that fits.
    #[default]
    Auto,
    /// `gradient_checkpointing = true`: every layer keeps its input alone, on the host where it must.
    Recompute,
    /// `gradient_checkpointing = false`: nothing is recomputed.
    KeepAll,
}

impl Mode {
    /// Of the run file's key.
    pub fn of(gradient_checkpointing: Option<bool>) -> Self {
        match gradient_checkpointing {
            None => Self::Auto,
            Some(true) => Self::Recompute,
            Some(false) => Self::KeepAll,
        }
    }
}

/// Choices that are measured at most, and how many that fit are enough.
const MEASURED: usize = 48;
const ENOUGH: usize = 10;
/// The longest row and the largest batch that are looked for.
pub const MAX_TOKENS: usize = 1 << 22;

/// How many layers keep what, from the bottom: the rest of the layers keep their input alone.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Counts {
    attention: usize,
    no_mlp: usize,
    all: usize,
    /// The lowest so many have their tensors on the host.
    host: usize,
}

impl Counts {
    /// Of `layers` layers, those under `lowest` are not reached by backward and keep nothing.
    fn layers(&self, layers: usize, lowest: usize) -> Vec<LayerPlan> {
        let keep = |layer: usize| match layers - layer {
            n if n <= self.all => Keep::All,
            n if n <= self.all + self.no_mlp => Keep::NoMlp,
            n if n <= self.all + self.no_mlp + self.attention => Keep::Attention,
            _ => Keep::Input,
        };
        let host = |layer: usize| layer >= lowest && layer < lowest + self.host;
        (0..layers).map(|layer| LayerPlan { keep: keep(layer), host: host(layer) }).collect()
    }
}

/// The choice for the fastest step that fits the budgets of `of`.
/// Errors: nothing fits ([`Error::Flag`] of the key `memory`, which names the largest items and what would fit).
pub fn plan(of: &Request) -> Result<Plan> {
    let found = match of.mode {
        Mode::Auto => choose(of)?,
        Mode::Recompute => recompute(of)?,
        Mode::KeepAll => keep_all(of)?,
    };
    match found {
        Some(plan) => Ok(plan),
        None => Err(does_not_fit(of)?),
    }
}

fn fits(of: &Request, plan: &Plan) -> bool {
    plan.total() <= of.device && plan.host_bytes <= of.host
}

fn lowest(of: &Request) -> usize {
    of.adapter.layout.sites.iter().map(|s| s.layer).min().unwrap_or(0)
}

/// Measures `counts`; None: it does not fit.
fn try_counts(of: &Request, counts: Counts, optimizer_on_device: bool) -> Result<Option<Plan>> {
    let layers = counts.layers(of.config.num_hidden_layers, lowest(of));
    Ok(Some(measure(of, &layers, optimizer_on_device)?).filter(|plan| fits(of, plan)))
}

/// The first that fits: with the optimizer on the device, or on the host.
fn either(f: impl Fn(bool) -> Result<Option<Plan>>) -> Result<Option<Plan>> {
    match f(true)? {
        Some(plan) => Ok(Some(plan)),
        None => f(false),
    }
}

const NOTHING: Counts = Counts { attention: 0, no_mlp: 0, all: 0, host: 0 };

fn keep_all(of: &Request) -> Result<Option<Plan>> {
    either(|on_device| try_counts(of, Counts { all: of.config.num_hidden_layers, ..NOTHING }, on_device))
}

/// Every layer keeps its input alone; as few of them as possible on the host, but rather all of them than the optimizer:
/// copies of inputs run beside the work, those of its state stand in the way of the next step.
fn recompute(of: &Request) -> Result<Option<Plan>> {
    either(|on_device| recompute_with(of, on_device))
}

fn recompute_with(of: &Request, on_device: bool) -> Result<Option<Plan>> {
    let kept = of.config.num_hidden_layers - lowest(of);
    // More on the host is less on the device.
    let (mut low, mut high) = (0, kept);
    let Some(mut best) = try_counts(of, Counts { host: kept, ..NOTHING }, on_device)? else {
        return try_counts(of, NOTHING, on_device);
    };
    while low < high {
        let host = (low + high) / 2;
        match try_counts(of, Counts { host, ..NOTHING }, on_device)? {
            Some(plan) => (best, high) = (plan, host),
            None => low = host + 1,
        }
    }
    Ok(Some(best))
}

/// Price and gain of one layer's choices, from exact measurements.
struct Prices {
    base: Plan,
    /// Of [`Keep::Attention`], [`Keep::NoMlp`], [`Keep::All`]: bytes more and seconds less than [`Keep::Input`].
    bytes: [f64; 3],
    gain: [f64; 3],
    /// What is left of the estimate of bytes where every layer keeps so much, for shared buffers go.
    uniform: [f64; 3],
    /// Bytes of an input and of an attention's output.
    x: f64,
    o: f64,
    /// Seconds to copy an input and an output.
    copy: [f64; 2],
    kept: usize,
}

impl Prices {
    fn new(of: &Request) -> Result<Self> {
        let (layers, lowest) = (of.config.num_hidden_layers, lowest(of));
        let kept = layers - lowest;
        let base = measure(of, &NOTHING.layers(layers, lowest), true)?;
        let (mut bytes, mut gain, mut uniform) = ([0.0; 3], [0.0; 3], [0.0; 3]);
        for (i, keep) in [Keep::Attention, Keep::NoMlp, Keep::All].into_iter().enumerate() {
            let mut one = base.layers.clone();
            one[lowest].keep = keep;
            let one = measure(of, &one, true)?;
            bytes[i] = one.device_bytes as f64 - base.device_bytes as f64;
            gain[i] = base.step.seconds - one.step.seconds;
            let all = measure(of, &vec![LayerPlan { keep, host: false }; layers], true)?;
            uniform[i] = all.device_bytes as f64 - base.device_bytes as f64 - kept as f64 * bytes[i];
        }
        let c = &of.config;
        let x = (2 * of.tokens * c.hidden_size) as f64;
        let o = (2 * of.tokens * c.num_attention_heads * c.head_dim) as f64;
        let pcie = of.card.pcie * 1e9;
        Ok(Self { base, bytes, gain, uniform, x, o, copy: [x / pcie, o / pcie], kept })
    }

    /// Estimated device bytes of a choice without the optimizer.
    fn bytes(&self, n: Counts) -> f64 {
        let counts = [n.attention, n.no_mlp, n.all];
        let mut bytes = self.base.device_bytes as f64;
        bytes += counts.iter().zip(&self.bytes).map(|(&n, b)| n as f64 * b).sum::<f64>();
        bytes += match self.kept {
            k if n.all == k => self.uniform[2],
            k if n.all + n.no_mlp == k => self.uniform[1],
            k if n.all + n.no_mlp + n.attention == k => self.uniform[0],
            _ => 0.0,
        };
        if n.host > 0 {
            // Two places for x, one of which serves the residual stream behind the last layer; two for o.
            bytes -= (n.host as f64 - 1.0) * self.x + (self.hosted_attention(n) as f64 - 2.0).max(0.0) * self.o;
        }
        bytes
    }

    /// Layers whose attention's output lies on the host.
    fn hosted_attention(&self, n: Counts) -> usize {
        let inputs = self.kept - n.attention - n.no_mlp - n.all;
        n.host.saturating_sub(inputs).min(n.attention)
    }

    /// Bytes in host memory, and the seconds that the copies could cost at worst beyond the work beside them.
    fn host(&self, n: Counts) -> (f64, f64) {
        let o = self.hosted_attention(n) as f64;
        let host = n.host.saturating_sub(1) as f64;
        let beside = self.base.step.seconds / (4 * self.kept.max(1)) as f64;
        let copies = host * self.copy[0] + o * self.copy[1];
        (host * self.x + o * self.o, 2.0 * (copies - host * beside).max(0.0))
    }

    fn seconds(&self, n: Counts) -> f64 {
        let counts = [n.attention, n.no_mlp, n.all];
        let gain: f64 = counts.iter().zip(&self.gain).map(|(&n, g)| n as f64 * g).sum();
        self.base.step.seconds - gain + self.host(n).1
    }
}

fn choose(of: &Request) -> Result<Option<Plan>> {
    let prices = Prices::new(of)?;
    let kept = prices.kept;
    let mut candidates: Vec<(f64, Counts, bool)> = vec![];
    for on_device in [true, false] {
        let state = prices.base.optimizer_bytes as f64;
        let (room, extra) = match on_device {
            true => (of.device as f64 - state, 0.0),
            false => (of.device as f64, 2.0 * state / (of.card.pcie * 1e9)),
        };
        for all in 0..=kept {
            for no_mlp in 0..=kept - all {
                for attention in 0..=kept - all - no_mlp {
                    let with = |host| Counts { attention, no_mlp, all, host };
                    let fitting =
                        |&host: &usize| prices.bytes(with(host)) <= room && prices.host(with(host)).0 <= of.host as f64;
                    if let Some(host) = (0..=kept).find(fitting) {
                        candidates.push((prices.seconds(with(host)) + extra, with(host), on_device));
                    }
                }
            }
        }
    }
    candidates.sort_by(|a, b| a.0.total_cmp(&b.0));
    let (mut best, mut fitting): (Option<Plan>, usize) = (None, 0);
    for &(_, counts, on_device) in candidates.iter().take(MEASURED) {
        let Some(plan) = try_counts(of, counts, on_device)? else { continue };
        fitting += 1;
        if best.as_ref().is_none_or(|b| plan.step.seconds < b.step.seconds) {
            best = Some(plan);
        }
        if fitting == ENOUGH {
            break;
        }
    }
    // An estimate that is off by a buffer must not turn away what fits.
    if best.is_none() { recompute(of) } else { Ok(best) }
}

/// The choice that takes the least device memory.
fn frugal(of: &Request) -> Result<Plan> {
    let (layers, lowest) = (of.config.num_hidden_layers, lowest(of));
    match of.mode {
        Mode::KeepAll => measure(of, &Counts { all: layers, ..NOTHING }.layers(layers, lowest), false),
        _ => measure(of, &Counts { host: layers - lowest, ..NOTHING }.layers(layers, lowest), false),
    }
}

/// Whether anything fits: the most frugal choice, or the one that needs no host memory.
fn anything_fits(of: &Request) -> Result<bool> {
    if fits(of, &frugal(of)?) {
        return Ok(true);
    }
    let (layers, lowest) = (of.config.num_hidden_layers, lowest(of));
    Ok(of.mode != Mode::KeepAll && fits(of, &measure(of, &NOTHING.layers(layers, lowest), false)?))
}

/// The largest n of which `fits` is true, if it is of 1. It must be true below any n of which it is true.
fn largest(step: usize, fits: impl Fn(usize) -> Result<bool>) -> Result<Option<usize>> {
    if !fits(step)? {
        return Ok(None);
    }
    let (mut good, mut bad) = (1, 2);
    while bad * step <= MAX_TOKENS && fits(bad * step)? {
        (good, bad) = (bad, 2 * bad);
    }
    while bad - good > 1 {
        let n = good + (bad - good) / 2;
        if fits(n * step)? { good = n } else { bad = n }
    }
    Ok(Some(good * step))
}

/// The longest rows, in steps of 64 tokens, that fit in batches of `batch`; None: not even 64 tokens.
pub fn largest_length(of: &Request, batch: usize) -> Result<Option<usize>> {
    largest(64, |length| anything_fits(&Request { tokens: batch * length, sequences: batch, ..*of }))
}

/// The most rows of `length` tokens that fit; None: not even one.
pub fn largest_batch(of: &Request, length: usize) -> Result<Option<usize>> {
    largest(1, |batch| {
        Ok(batch * length <= MAX_TOKENS && anything_fits(&Request { tokens: batch * length, sequences: batch, ..*of })?)
    })
}

/// Names of the rows of a plan's table.
pub fn item_name(item: Item) -> &'static str {
    match item {
        Item::Embedding => "embedding and head",
        Item::Weights => "weights of the layers",
        Item::Adapter => "adapter",
        Item::Gradients => "gradients",
        Item::Activations => "kept activations",
        Item::Scratch => "scratch",
        Item::Workspace => "workspace of the ops",
        Item::Batch => "batch",
        Item::KvCache => "key-value cache",
        Item::Optimizer => "optimizer's tables",
    }
}

/// The three largest items, in words.
fn largest_items(items: &BTreeMap<Item, usize>) -> String {
    let mut items: Vec<(Item, usize)> = items.iter().map(|(&i, &b)| (i, b)).collect();
    items.sort_by_key(|&(_, bytes)| std::cmp::Reverse(bytes));
    items.iter().take(3).map(|&(i, b)| format!("{} {}", item_name(i), size(b))).collect::<Vec<_>>().join(", ")
}

/// The error of a model that is not to be trained and does not fit into `free` bytes.
pub fn too_large(free: usize, items: &BTreeMap<Item, usize>) -> Error {
    let needed = size(items.values().sum());
    let expected =
        format!("at least {needed} (largest: {}); shorter rows or --load-in-4bit take less", largest_items(items));
    Error::flag("memory", format!("{} free on the GPU", size(free)), expected)
}

/// One error: what is needed, the largest items, and what would fit.
fn does_not_fit(of: &Request) -> Result<Error> {
    let least = frugal(of)?;
    let (length, batch) = (of.tokens / of.sequences.max(1), of.sequences.max(1));
    let mut ways = vec![];
    if of.mode == Mode::KeepAll && anything_fits(&Request { mode: Mode::Auto, ..*of })? {
        ways.push("gradient_checkpointing left out or true".to_string());
    }
    if batch > 1
        && let Some(n) = largest_batch(of, length)?
    {
        ways.push(format!("{n} row{} of {length} tokens", if n == 1 { "" } else { "s" }));
    }
    if let Some(n) = largest_length(of, batch)? {
        ways.push(format!("{batch} × {n} tokens"));
    }
    if batch > 1
        && ways.is_empty()
        && let Some(n) = largest_length(of, 1)?
    {
        ways.push(format!("1 × {n} tokens"));
    }
    let ways = match ways.is_empty() {
        true => "no length fits beside the weights".to_string(),
        false => format!("what fits: {}", ways.join(", ")),
    };
    let mut found = size(of.device);
    if least.total() <= of.device {
        found = format!("{found} and {} of host memory", size(of.host));
    }
    let needed = match least.host_bytes {
        0 => size(least.total()),
        host => format!("{} and {} of host memory", size(least.total()), size(host)),
    };
    let expected =
        format!("at least {needed} for {batch} × {length} tokens (largest: {}); {ways}", largest_items(&least.items));
    Ok(Error::flag("memory", found, expected))
}

/// The budget where none is named: what is free less a margin; of a card that is not here, less a process's own share.
pub fn default_budget(free: Option<usize>, card: &Card) -> usize {
    free.unwrap_or(card.memory.saturating_sub(super::CONTEXT)).saturating_sub(super::MARGIN)
}
