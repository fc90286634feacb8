//! What an op must move and compute at least, from its sizes alone: the floor that its time is measured against, in a step
//! as in the table of kernels. Every tensor that it reads or writes counts once: activations, norm weights and adapters with
//! 2 bytes an element, statistics, indices and gradients of adapters with 4.

use std::ops::AddAssign;
use std::time::Duration;

use super::Heads;

/// The least that an op has to do.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Work {
    /// Bytes of device memory that must be read or written once.
    pub bytes: f64,
    /// Floating-point operations of matrix products, multiply and add counted apart.
    pub flops: f64,
}

impl AddAssign for Work {
    fn add_assign(&mut self, other: Self) {
        self.bytes += other.bytes;
        self.flops += other.flops;
    }
}

/// How long an op has run, all calls together.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct OpTime {
    pub op: &'static str,
    pub calls: u64,
    pub time: Duration,
    /// Nothing where the backend does not count it.
    pub work: Work,
}

/// Adds a call to the row of its op, which is made at the first.
pub fn add_call(times: &mut Vec<OpTime>, op: &'static str, time: Duration, work: Work) {
    let at = times.iter().position(|t| t.op == op).unwrap_or_else(|| {
        times.push(OpTime { op, calls: 0, time: Duration::ZERO, work: Work::default() });
        times.len() - 1
    });
    times[at].calls += 1;
    times[at].time += time;
    times[at].work += work;
}

/// The sizes of a linear and of its adapters.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LinearSize {
    pub t: usize,
    pub n: usize,
    pub k: usize,
    /// Sum of the adapters' ranks; 0 where none runs.
    pub r: usize,
    /// Elements of their B matrices together, n * r of each.
    pub b: usize,
    /// Bytes of the frozen weights as they are stored.
    pub weights: usize,
}

/// Operations of a product with m·n·k multiplications.
fn product(m: usize, n: usize, k: usize) -> f64 {
    2.0 * m as f64 * n as f64 * k as f64
}

impl Work {
    /// An op that moves `bytes` and has no matrix product.
    pub fn moves(bytes: usize) -> Self {
        Self { bytes: bytes as f64, flops: 0.0 }
    }

    /// Matrix products of m·n·k multiplications in all, of operands and results of `bytes`.
    pub fn product(bytes: usize, (m, n, k): (usize, usize, usize)) -> Self {
        Self { bytes: bytes as f64, flops: product(m, n, k) }
    }

    pub fn nf4_dequantize(weights: usize, elements: usize) -> Self {
        Self::moves(weights + 2 * elements)
    }

    pub fn embedding(t: usize, c: usize) -> Self {
        Self::moves(4 * t * c + 4 * t)
    }

    pub fn rmsnorm_forward(t: usize, c: usize, residual: bool) -> Self {
        Self::moves(if residual { 8 } else { 4 } * t * c + 4 * t + 2 * c)
    }

    pub fn rmsnorm_backward(t: usize, c: usize) -> Self {
        Self::moves(8 * t * c + 4 * t + 2 * c)
    }

    pub fn head_norm_forward(t: usize, heads: Heads) -> Self {
        Self::moves(4 * t * heads.qkv() + 4 * t * (heads.h + heads.g) + 4 * heads.d)
    }

    /// The columns of v are left as they are.
    pub fn head_norm_backward(t: usize, heads: Heads) -> Self {
        let normed = heads.h + heads.g;
        Self::moves(6 * t * normed * heads.d + 4 * t * normed + 4 * heads.d)
    }

    /// Forward or backward, in place; the columns of v are left as they are.
    pub fn rope(t: usize, heads: Heads) -> Self {
        Self::moves(4 * t * (heads.h + heads.g) * heads.d + 4 * t + 2 * heads.d)
    }

    /// Of sequences of these lengths. Two products of the pairs that mask and window leave.
    pub fn attention_forward(lengths: &[usize], heads: Heads) -> Self {
        let (t, q) = (lengths.iter().sum::<usize>(), heads.h * heads.d);
        Self { bytes: (t * (2 * heads.qkv() + 2 * q + 4 * heads.h)) as f64, flops: 2.0 * pair_products(lengths, heads) }
    }

    /// Five products: scores again, dp, dv, dq and dk.
    pub fn attention_backward(lengths: &[usize], heads: Heads) -> Self {
        let (t, q) = (lengths.iter().sum::<usize>(), heads.h * heads.d);
        Self { bytes: (t * (4 * heads.qkv() + 4 * q + 4 * heads.h)) as f64, flops: 5.0 * pair_products(lengths, heads) }
    }

    /// `t` new tokens behind `past` others, whose keys and values are read; those of the new ones are written.
    pub fn attention_decode(t: usize, past: usize, heads: Heads) -> Self {
        let (keys, q, kv) = (past + t, heads.h * heads.d, heads.g * heads.d);
        let bytes = (2 * (t * (heads.qkv() + q) + 2 * keys * kv)) as f64;
        Self { bytes, flops: 2.0 * product(t, keys, q) }
    }

    pub fn swiglu_forward(t: usize, f: usize) -> Self {
        Self::moves(6 * t * f)
    }

    pub fn swiglu_backward(t: usize, f: usize) -> Self {
        Self::moves(10 * t * f)
    }

    pub fn linear_forward(s: LinearSize) -> Self {
        let adapters = s.r * s.k + s.b;
        Self {
            bytes: (2 * s.t * (s.n + s.k + s.r) + s.weights + 2 * adapters) as f64,
            flops: product(s.t, s.n, s.k) + product(s.t, adapters, 1),
        }
    }

    /// `dx`: the gradient of the input is wanted too.
    pub fn linear_backward(s: LinearSize, dx: bool) -> Self {
        let adapters = s.r * s.k + s.b;
        // dy, x, h; the gradients of the adapters are added to, and B is read.
        let gradients = 2 * s.t * (s.n + s.k + s.r) + 8 * adapters + 2 * s.b;
        // dh = dy B, dB, dA.
        let flops = product(s.t, 2 * s.b + s.r * s.k, 1);
        if !dx {
            return Self { bytes: gradients as f64, flops };
        }
        Self {
            bytes: (gradients + 2 * s.t * s.k + s.weights + 2 * s.r * s.k) as f64,
            flops: flops + product(s.t, s.n, s.k) + product(s.t, s.r, s.k),
        }
    }

    /// Of `m` target tokens among `t`; the logits themselves need not lie in memory.
    pub fn head_loss(t: usize, m: usize, c: usize, v: usize, weights: usize, dx: bool) -> Self {
        let gradient = if dx { 2 * t * c } else { 0 };
        let products = if dx { 2.0 } else { 1.0 };
        Self { bytes: (2 * m * c + weights + gradient) as f64, flops: products * product(m, v, c) }
    }

    pub fn head_logits(m: usize, c: usize, v: usize, weights: usize) -> Self {
        Self { bytes: (2 * m * c + weights + 4 * m * v) as f64, flops: product(m, v, c) }
    }

    pub fn grad_norm(p: usize) -> Self {
        Self::moves(4 * p)
    }

    /// Gradients read, `state` bytes of master weights and moments read and written, the working copy written: as if all of
    /// it lay on the device.
    pub fn adamw(p: usize, state: usize) -> Self {
        Self::moves(4 * p + 2 * state + 2 * p)
    }
}

/// Operations of one product between queries and keys (or values), of all heads.
fn pair_products(lengths: &[usize], heads: Heads) -> f64 {
    let pairs = |&len: &usize| {
        let seen = heads.window.map_or(len, |w| w.min(len));
        // The first rows see what is before them, the others a whole window.
        seen as f64 * (seen as f64 + 1.0) / 2.0 + (len - seen) as f64 * seen as f64
    };
    2.0 * lengths.iter().map(pairs).sum::<f64>() * (heads.h * heads.d) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADS: Heads = Heads { h: 32, g: 8, d: 128, window: None };

    #[test]
    fn elementwise_ops_move_their_tensors_once() {
        let (t, c, f) = (8192, 4096, 14_336);
        // x, y, 1/rms of a row, w.
        assert_eq!(Work::rmsnorm_forward(t, c, false), Work::moves(2 * t * c + 2 * t * c + 4 * t + 2 * c));
        assert_eq!(Work::rmsnorm_forward(t, c, true).bytes, Work::rmsnorm_backward(t, c).bytes);
        assert_eq!(Work::swiglu_forward(t, f), Work::moves(6 * t * f));
        assert_eq!(Work::rope(t, HEADS), Work::moves(4 * t * 40 * 128 + 4 * t + 4 * 64));
        assert_eq!(Work::head_norm_backward(t, HEADS), Work::moves(6 * t * 40 * 128 + 4 * t * 40 + 2 * 2 * 128));
        assert_eq!(Work::adamw(10, 120), Work::moves(40 + 240 + 20));
    }

    #[test]
    fn attention_counts_the_causal_half_of_each_sequence() {
        let square = |len: f64| 2.0 * len * (len + 1.0) * 32.0 * 128.0;
        assert_eq!(Work::attention_forward(&[2048, 0, 5], HEADS).flops, square(2048.0) + square(5.0));
        let (forward, backward) = (Work::attention_forward(&[300], HEADS), Work::attention_backward(&[300], HEADS));
        assert_eq!(backward.flops, 2.5 * forward.flops);
        assert_eq!(forward.bytes, 300.0 * (2.0 * 6144.0 + 2.0 * 4096.0 + 4.0 * 32.0));
        assert!(backward.bytes > forward.bytes);
    }

    #[test]
    fn a_window_leaves_the_pairs_inside_it() {
        let windowed = |w| Work::attention_forward(&[6], Heads { window: Some(w), ..HEADS }).flops / (4.0 * 4096.0);
        assert_eq!([windowed(1), windowed(3), windowed(6), windowed(9)], [6.0, 15.0, 21.0, 21.0]);
    }

    #[test]
    fn a_linear_is_one_product_and_its_adapters() {
        let (t, n, k, r) = (64, 300, 200, 16);
        let plain = LinearSize { t, n, k, r: 0, b: 0, weights: n * k / 2 + n * k / 64 };
        let base = Work::linear_forward(plain);
        assert_eq!(base, Work { bytes: (2 * t * (n + k) + plain.weights) as f64, flops: product(t, n, k) });
        let adapted = LinearSize { r, b: n * r, ..plain };
        let lora = product(t, r, k) + product(t, n, r);
        assert_eq!(Work::linear_forward(adapted).flops, base.flops + lora);
        assert_eq!(Work::linear_backward(adapted, true).flops, base.flops + 2.0 * lora);
        let lowest = Work::linear_backward(adapted, false);
        assert_eq!(lowest.flops, 2.0 * lora - product(t, r, k));
        assert!(lowest.bytes < Work::linear_backward(adapted, true).bytes);
        assert_eq!(Work::linear_backward(plain, false).flops, 0.0);
    }

    #[test]
    fn the_head_multiplies_twice_where_it_has_a_gradient() {
        let (t, m, c, v) = (128, 100, 64, 1000);
        let with = Work::head_loss(t, m, c, v, 2 * v * c, true);
        assert_eq!(with.flops, 4.0 * (m * v * c) as f64);
        assert_eq!(with.bytes, (2 * m * c + 2 * v * c + 2 * t * c) as f64);
        assert_eq!(Work::head_loss(t, m, c, v, 2 * v * c, false).flops, with.flops / 2.0);
    }

    #[test]
    fn calls_of_an_op_add_up() {
        let mut times = vec![];
        for (op, ms) in [("a", 1), ("b", 5), ("a", 2)] {
            add_call(&mut times, op, Duration::from_millis(ms), Work { bytes: 3.0, flops: 4.0 });
        }
        let work = Work { bytes: 6.0, flops: 8.0 };
        assert_eq!(times[0], OpTime { op: "a", calls: 2, time: Duration::from_millis(3), work });
        assert_eq!((times.len(), times[1].op, times[1].calls), (2, "b", 1));
    }
}
