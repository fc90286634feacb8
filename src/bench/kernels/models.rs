//! The shapes that the table goes through.

use crate::backend::Heads;
use crate::error::{Error, Result};

/// The sizes of a model that its kernels see.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Model {
    pub name: &'static str,
    pub c: usize,
    pub f: usize,
    pub v: usize,
    pub heads: Heads,
    pub layers: usize,
}

const fn heads(h: usize, g: usize, d: usize) -> Heads {
    Heads { h, g, d, window: None }
}

/// Llama-3.2-1B, Mistral-7B, Llama-2-13B.
pub const MODELS: [Model; 3] = [
    Model { name: "1b", c: 2048, f: 8192, v: 128_256, heads: heads(32, 8, 64), layers: 16 },
    Model { name: "7b", c: 4096, f: 14_336, v: 32_000, heads: heads(32, 8, 128), layers: 32 },
    Model { name: "13b", c: 5120, f: 13_824, v: 32_000, heads: heads(40, 40, 128), layers: 40 },
];

/// SmolLM2-135M: what the CPU is timed with.
pub const SMALL: Model = Model { name: "135m", c: 576, f: 1536, v: 49_152, heads: heads(9, 3, 64), layers: 30 };

/// What tests check every op on, a second's work for the CPU.
pub const TOY: Model = Model { name: "toy", c: 256, f: 512, v: 1024, heads: heads(4, 2, 64), layers: 2 };

/// Token counts of the table.
pub const TOKENS: [usize; 7] = [1, 16, 128, 512, 2048, 8192, 16_384];

/// Name, widths N of the projections side by side, and K.
pub type Group = (&'static str, Vec<usize>, usize);

/// Rank of LoRA.
pub const R: usize = 16;

impl Model {
    /// By its name, as `--model` has it. [`Error::Flag`] for a name that none has.
    pub fn named(name: &str) -> Result<Self> {
        let all = || MODELS.into_iter().chain([SMALL, TOY]);
        let names = || all().map(|m| m.name).collect::<Vec<_>>().join(", ");
        all().find(|m| m.name == name).ok_or_else(|| Error::flag("--model", format!("{name:?}"), names()))
    }

    /// Name, widths of the projections side by side, and K, of each linear of a block.
    pub fn linears(&self) -> [Group; 4] {
        let (q, kv) = (self.heads.h * self.heads.d, self.heads.g * self.heads.d);
        [
            ("q|k|v", vec![q, kv, kv], self.c),
            ("o", vec![self.c], q),
            ("gate|up", vec![self.f, self.f], self.c),
            ("down", vec![self.c], self.f),
        ]
    }

    /// Trainable weights of rank R on all seven projections.
    pub fn trainable(&self) -> usize {
        let layer: usize =
            self.linears().iter().flat_map(|(_, widths, k)| widths.iter().map(move |n| R * (n + k))).sum();
        self.layers * layer
    }
}

impl Model {
    /// What the linears of these models need of a GPU's scratch, at up to `t` tokens.
    pub fn needs(models: &[Self], t: usize) -> crate::backend::Needs {
        let groups: Vec<_> = models.iter().flat_map(Self::linears).collect();
        let most = |of: &dyn Fn(&Group) -> usize| groups.iter().map(of).max().unwrap_or(0);
        crate::backend::Needs {
            t,
            c: models.iter().map(|m| m.c).max().unwrap_or(0),
            // The head is timed by its kernels.
            v: 8,
            part: most(&|(_, widths, k)| k * widths.iter().max().unwrap_or(&0)),
            group: most(&|(_, widths, k)| k * widths.iter().sum::<usize>()),
            n: most(&|(_, widths, _)| widths.iter().sum()),
            k: most(&|(_, _, k)| *k),
            r: most(&|(_, widths, _)| R * widths.len()),
            trainable: most(&|(_, widths, k)| widths.iter().map(|n| R * (n + k)).sum()),
            heads: None,
            train: true,
            dropout: false,
        }
    }
}
