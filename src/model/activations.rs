//! What each layer keeps for backward, and where: in buffers of its own, in buffers that all layers share, or in host
//! memory.
//!
//! Backward brings back what a layer did not keep by running the same ops on the same inputs, so every choice gives the
//! same bits. What the highest layer that uses a shared buffer left there is still there when backward comes to it.

use serde::{Deserialize, Serialize};

use super::adapter::AdapterLayout;
use super::config::ModelConfig;
use crate::backend::{Backend, Item};
use crate::error::Result;

/// What a layer keeps beside its input; each choice keeps what the ones before it keep.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Keep {
    /// The input alone.
    Input,
    /// The attention's output and log-sum-exp: it is the one op not run again.
    Attention,
    /// All but gate and up: one norm and one linear are run again.
    NoMlp,
    /// All that backward reads.
    #[default]
    All,
}

impl Keep {
    pub const ALL: [Self; 4] = [Self::Input, Self::Attention, Self::NoMlp, Self::All];
}

/// The choice for one layer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct LayerPlan {
    pub keep: Keep,
    /// The input, and with [`Keep::Attention`] the attention's output, wait for backward in host memory.
    pub host: bool,
}

/// Where a layer's tensor lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// In a buffer of the layer's own.
    Own,
    /// In one buffer for all layers without one of their own.
    Shared,
    /// In one of the two buffers that layers with tensors in host memory take in turn.
    Ring(usize),
}

/// One kind of tensor of all layers.
pub(super) struct Slots<S> {
    slots: Vec<S>,
    /// The slot of each layer.
    of: Vec<usize>,
    /// The highest layer in the shared slot.
    top_shared: Option<usize>,
    places: Vec<Place>,
}

impl<S> Slots<S> {
    fn new<B: Backend>(backend: &mut B, places: Vec<Place>, make: impl Fn(&mut B) -> Result<S>) -> Result<Self> {
        let (mut slots, mut of, mut known) = (vec![], Vec::with_capacity(places.len()), vec![]);
        for &place in &places {
            let found = known.iter().find(|(p, _)| *p == place && place != Place::Own).map(|&(_, slot)| slot);
            of.push(match found {
                Some(slot) => slot,
                None => {
                    backend.label(if place == Place::Shared { Item::Scratch } else { Item::Activations });
                    slots.push(make(backend)?);
                    known.push((place, slots.len() - 1));
                    slots.len() - 1
                }
            });
        }
        let top_shared = places.iter().rposition(|&p| p == Place::Shared);
        Ok(Self { slots, of, top_shared, places })
    }

    pub fn get(&self, layer: usize) -> &S {
        &self.slots[self.of[layer]]
    }

    pub fn get_mut(&mut self, layer: usize) -> &mut S {
        &mut self.slots[self.of[layer]]
    }

    /// Whether another layer's tensor lies where this layer's was, when backward comes to it.
    fn stale(&self, layer: usize) -> bool {
        self.places[layer] == Place::Shared && self.top_shared != Some(layer)
    }
}

/// Small things of every layer, and what saves running down again.
pub(super) struct Small<B: Backend> {
    /// (T) statistic of norm1
    pub rstd: B::F32,
    /// (T, R) of down
    pub h_down: B::Act,
}

/// From the layer's input to its middle, without the attention.
pub(super) struct Middle<B: Backend> {
    /// Output of the qkv projection before the q and k norms: (T, (H+2G)*D), and (T, H+G); Qwen3 only.
    pub raw: Option<(B::Act, B::F32)>,
    /// (T, (H+2G)*D) normed and rotated
    pub qkv: B::Act,
    /// (T, C)
    pub x_mid: B::Act,
    /// (T)
    pub rstd2: B::F32,
    /// (T, R) of each linear
    pub h_qkv: B::Act,
    pub h_o: B::Act,
}

/// What the MLP keeps.
pub(super) struct Mlp<B: Backend> {
    /// (T, 2F); then their gradients in place; then, when those are used up, the gradient of qkv (T, (H+2G)*D)
    pub gate_up: B::Act,
    /// (T, R)
    pub h_gate_up: B::Act,
}

/// Buffers that every layer uses in turn.
pub(super) struct Scratch<B: Backend> {
    /// (T, max(C, F)) input of the linear at hand: a normed input until gate and up are made, then the SwiGLU product
    pub inner: B::Act,
    /// (T, C) what the branch adds to the residual stream: output of o, then of down.
    /// In backward (T, max(C, F, H*D)) gradient of the input of the linear at hand: each is used up by the op after.
    pub outer: B::Act,
}

/// Buffers of backward that every layer uses in turn, and the gradients.
pub(super) struct Grads<B: Backend> {
    /// (T, C) gradient of the residual stream
    pub dres: B::Act,
    /// (H, T)
    pub delta: B::F32,
    /// (T, R) of the widest group
    pub dh: B::Act,
    /// (P) gradients of the adapter, summed over the micro-batches of a step
    pub d_lora: B::F32,
}

/// The buffers that one layer works in.
pub(super) struct Layer<'a, B: Backend> {
    /// (T, C)
    pub x: &'a mut B::Act,
    pub small: &'a mut Small<B>,
    pub middle: &'a mut Middle<B>,
    /// (T, H*D)
    pub o: &'a mut B::Act,
    /// (H, T)
    pub lse: &'a mut B::F32,
    pub mlp: &'a mut Mlp<B>,
    pub scratch: &'a mut Scratch<B>,
}

/// Which parts of a layer's forward backward must run again. Each implies the ones after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stale {
    pub attention: bool,
    pub middle: bool,
    pub mlp: bool,
}

/// Copies in host memory of one layer's tensors.
struct Offloaded<B: Backend> {
    x: B::Host,
    o: Option<B::Host>,
}

/// All activations of a model.
pub(super) struct Activations<B: Backend> {
    /// (T, C) input of each layer, and as number L the residual stream after the last
    pub x: Slots<B::Act>,
    /// As `x`; that of number L has the statistic of the final norm alone.
    pub small: Slots<Small<B>>,
    pub middle: Slots<Middle<B>>,
    o: Slots<B::Act>,
    lse: Slots<B::F32>,
    mlp: Slots<Mlp<B>>,
    pub scratch: Scratch<B>,
    /// The layers with tensors in host memory, from bottom to top. The k-th of them has place k % 2 in the ring; the
    /// residual stream after the last layer takes the place behind theirs.
    hosted: Vec<usize>,
    /// Of all `hosted` but the top one, which never leaves the ring.
    offloaded: Vec<Offloaded<B>>,
    /// Copies under way from or to each place of the ring.
    under_way: [Vec<B::Ticket>; 2],
    /// Elements of a row of `x` and of `o`.
    c: usize,
    hd: usize,
}

impl<B: Backend> Activations<B> {
    /// Buffers for `t` tokens. `lowest`: the first layer that backward reaches; None without backward.
    /// `ranks`: the widest R of each of the four linears from bottom to top, so that any slot serves any layer.
    pub fn new(
        backend: &mut B,
        t: usize,
        config: &ModelConfig,
        plans: &[LayerPlan],
        lowest: Option<usize>,
        ranks: [usize; 4],
    ) -> Result<Self> {
        let (layers, c, f, d) =
            (config.num_hidden_layers, config.hidden_size, config.intermediate_size, config.head_dim);
        let (h, g) = (config.num_attention_heads, config.num_key_value_heads);
        let (hd, qkv) = (h * d, (h + 2 * g) * d);
        let plan = |layer: usize| plans.get(layer).copied().unwrap_or_default();
        let kept = |layer: usize| lowest.is_some_and(|lowest| layer >= lowest);
        let hosted: Vec<usize> = (0..layers).filter(|&l| kept(l) && plan(l).host).collect();

        let own = |own: bool| if own { Place::Own } else { Place::Shared };
        let ring = |layer: usize| hosted.iter().position(|&l| l == layer).map(|k| Place::Ring(k % 2));
        let of_input = |layer| match ring(layer) {
            Some(ring) => ring,
            None if layer == layers && !hosted.is_empty() => Place::Ring(hosted.len() % 2),
            None => own(kept(layer)),
        };
        let keeps = |layer: usize, keep: Keep| kept(layer) && plan(layer).keep >= keep;
        let of_o = |layer| match ring(layer) {
            Some(ring) if plan(layer).keep == Keep::Attention => ring,
            _ => own(keeps(layer, Keep::Attention)),
        };
        let x = Slots::new(backend, (0..=layers).map(of_input).collect(), |b| b.alloc_act(t * c))?;
        let small = Slots::new(backend, (0..=layers).map(|l| own(kept(l))).collect(), |b| {
            Ok(Small { rstd: b.alloc_f32(t)?, h_down: b.alloc_act(t * ranks[3])? })
        })?;
        let o = Slots::new(backend, (0..layers).map(of_o).collect(), |b| b.alloc_act(t * hd))?;
        let places = (0..layers).map(|l| own(keeps(l, Keep::Attention))).collect();
        let lse = Slots::new(backend, places, |b| b.alloc_f32(t * h))?;
        let places = (0..layers).map(|l| own(keeps(l, Keep::NoMlp))).collect();
        let middle = Slots::new(backend, places, |b| {
            let raw = match config.qk_norm {
                true => Some((b.alloc_act(t * qkv)?, b.alloc_f32(t * (h + g))?)),
                false => None,
            };
            Ok(Middle {
                raw,
                qkv: b.alloc_act(t * qkv)?,
                x_mid: b.alloc_act(t * c)?,
                rstd2: b.alloc_f32(t)?,
                h_qkv: b.alloc_act(t * ranks[0])?,
                h_o: b.alloc_act(t * ranks[1])?,
            })
        })?;
        let places = (0..layers).map(|l| own(keeps(l, Keep::All))).collect();
        let gate_up = if lowest.is_some() { (2 * f).max(qkv) } else { 2 * f };
        let mlp = Slots::new(backend, places, |b| {
            Ok(Mlp { gate_up: b.alloc_act(t * gate_up)?, h_gate_up: b.alloc_act(t * ranks[2])? })
        })?;
        backend.label(Item::Scratch);
        let outer = if lowest.is_some() { c.max(f).max(hd) } else { c };
        let scratch = Scratch { inner: backend.alloc_act(t * c.max(f))?, outer: backend.alloc_act(t * outer)? };
        backend.label(Item::Activations);
        let mut offloaded = vec![];
        for &layer in hosted.iter().take(hosted.len().saturating_sub(1)) {
            let o = match plan(layer).keep {
                Keep::Attention => Some(backend.alloc_host(t * hd)?),
                _ => None,
            };
            offloaded.push(Offloaded { x: backend.alloc_host(t * c)?, o });
        }
        let under_way = Default::default();
        Ok(Self { x, small, middle, o, lse, mlp, scratch, hosted, offloaded, under_way, c, hd })
    }

    /// The buffers of one layer.
    pub fn layer(&mut self, layer: usize) -> Layer<'_, B> {
        Layer {
            x: self.x.get_mut(layer),
            small: self.small.get_mut(layer),
            middle: self.middle.get_mut(layer),
            o: self.o.get_mut(layer),
            lse: self.lse.get_mut(layer),
            mlp: self.mlp.get_mut(layer),
            scratch: &mut self.scratch,
        }
    }

    pub fn stale(&self, layer: usize) -> Stale {
        Stale { attention: self.o.stale(layer), middle: self.middle.stale(layer), mlp: self.mlp.stale(layer) }
    }

    /// Which of the layers with tensors in host memory this is; number L counts as one more.
    fn number(&self, layer: usize) -> Option<usize> {
        match layer + 1 == self.x.of.len() {
            true if self.hosted.is_empty() => None,
            true => Some(self.hosted.len()),
            false => self.hosted.iter().position(|&l| l == layer),
        }
    }

    /// Before a layer's input is written in forward: what its place in the ring held has reached the host.
    pub fn make_room(&mut self, backend: &mut B, layer: usize) -> Result<()> {
        match self.number(layer) {
            Some(k) => self.settle(backend, k % 2),
            None => Ok(()),
        }
    }

    /// Behind a layer's forward: begins to send what backward will want of it to the host.
    pub fn send(&mut self, backend: &mut B, layer: usize, t: usize) -> Result<()> {
        let Some((k, to)) = self.number(layer).and_then(|k| Some((k, self.offloaded.get_mut(k)?))) else {
            return Ok(());
        };
        let under_way = &mut self.under_way[k % 2];
        under_way.push(backend.send(&mut to.x, self.x.get(layer), t * self.c)?);
        if let Some(to) = &mut to.o {
            under_way.push(backend.send(to, self.o.get(layer), t * self.hd)?);
        }
        Ok(())
    }

    /// Before a layer's backward: its tensors are here; those of the layer that will want theirs next begin to come, into
    /// the place of the layer whose backward is done.
    pub fn fetch(&mut self, backend: &mut B, layer: usize, t: usize) -> Result<()> {
        let Some(k) = self.number(layer) else { return Ok(()) };
        self.settle(backend, k % 2)?;
        let Some(next) = k.checked_sub(1) else { return Ok(()) };
        let (below, from, under_way) = (self.hosted[next], &self.offloaded[next], &mut self.under_way[next % 2]);
        under_way.push(backend.fetch(self.x.get_mut(below), &from.x, t * self.c)?);
        if let Some(from) = &from.o {
            under_way.push(backend.fetch(self.o.get_mut(below), from, t * self.hd)?);
        }
        Ok(())
    }

    /// Waits for the copies from and to a place of the ring.
    fn settle(&mut self, backend: &mut B, place: usize) -> Result<()> {
        for copy in std::mem::take(&mut self.under_way[place]) {
            backend.wait(copy)?;
        }
        Ok(())
    }
}

impl<B: Backend> Grads<B> {
    /// `max_rank`: of the widest group.
    pub fn new(
        backend: &mut B,
        t: usize,
        config: &ModelConfig,
        max_rank: usize,
        layout: &AdapterLayout,
    ) -> Result<Self> {
        backend.label(Item::Scratch);
        let dres = backend.alloc_act(t * config.hidden_size)?;
        let delta = backend.alloc_f32(t * config.num_attention_heads)?;
        let dh = backend.alloc_act(t * max_rank)?;
        backend.label(Item::Gradients);
        Ok(Self { dres, delta, dh, d_lora: backend.alloc_f32(layout.len)? })
    }
}
