//! attention_forward, attention_backward: both sets of kernels against the formulas in f64, any packing, grouping, window
//! and head size. Outputs are poisoned first, and every op runs twice.

use half::bf16;
use halfbyte::Error;
use halfbyte::backend::Heads;
use halfbyte::backend::cuda::ops::attention::{
    AttentionBackward, AttentionForward, attention_backward, attention_forward,
};
use halfbyte::backend::cuda::{Cuda, Kernels};
use libtest_mimic::Trial;

use crate::support::{Outcome, Random, distance, poisoned, same, wide, within_twice};

/// Lengths of the sequences, then H, G, D and the window (0: none).
type Shape = (&'static str, &'static [usize], usize, usize, usize, usize);

const SHAPES: &[Shape] = &[
    ("one_token", &[1], 2, 1, 128, 0),
    ("one_token_64", &[1], 4, 4, 64, 0),
    ("borders", &[63, 64, 65, 1, 127, 128, 129], 2, 1, 128, 0),
    ("borders_64", &[63, 64, 65, 1, 127, 128, 129], 2, 1, 64, 0),
    ("group_of_1", &[200], 2, 2, 128, 0),
    ("group_of_4", &[200, 30], 4, 1, 128, 0),
    ("group_of_4_64", &[257], 8, 2, 64, 0),
    ("group_of_8", &[150], 8, 1, 128, 0),
    ("group_of_8_64", &[150, 90], 8, 1, 64, 0),
    ("window_1", &[140], 2, 1, 128, 1),
    ("window_8", &[140, 65], 2, 1, 128, 8),
    ("window_64", &[300], 2, 1, 128, 64),
    ("window_100", &[333, 20], 2, 1, 128, 100),
    ("window_1_64", &[70, 66], 2, 2, 64, 1),
    ("window_8_64", &[200], 2, 1, 64, 8),
    ("window_64_64", &[129, 250], 2, 1, 64, 64),
    ("window_100_64", &[333], 4, 1, 64, 100),
    ("window_longer_than_any", &[77, 5], 2, 1, 64, 1_000_000),
    ("head_16", &[140, 3], 4, 2, 16, 0),
    ("head_32_window_20", &[150], 4, 1, 32, 20),
    ("head_96", &[130, 64, 7], 4, 1, 96, 0),
    ("head_96_window_33", &[200], 2, 1, 96, 33),
    ("head_120", &[70], 2, 1, 120, 0),
    ("head_136", &[70], 2, 1, 136, 0),
    ("head_256", &[150, 65], 2, 1, 256, 0),
    ("head_256_window_40", &[200], 2, 2, 256, 40),
    ("ten_of_9_heads", &[3, 1, 17, 40, 2, 64, 8, 5, 31, 12], 9, 3, 64, 0),
    // More sequences than a warp has lanes.
    ("many_short", &[3; 70], 2, 1, 128, 0),
    ("many_short_64", &[5; 100], 2, 1, 64, 0),
    // Enough tiles for the kernels that a full card gets.
    ("many_heads", &[260, 130, 40, 40, 41, 39], 32, 8, 128, 0),
    ("large_700", &[700], 8, 2, 128, 0),
    ("large_700_64", &[700], 8, 2, 64, 0),
    ("large_window_256", &[900], 4, 1, 128, 256),
];

pub fn trials() -> Vec<Trial> {
    let mut trials = vec![Trial::test("attention/wrong_sizes_name_the_op_and_the_argument", wrong_sizes)];
    for (set, kernels) in [("sm80", Kernels::Sm80), ("best", Kernels::Sm90)] {
        for &(name, lengths, h, g, d, window) in SHAPES {
            let heads = Heads { h, g, d, window: (window > 0).then_some(window) };
            let run = move || agrees_with_the_formulas(&open(kernels)?, lengths, heads);
            trials.push(Trial::test(format!("attention/{set}/{name}"), run));
        }
        for d in [64, 96, 128, 256] {
            let run = move || packed_equals_alone(&open(kernels)?, d);
            trials.push(Trial::test(format!("attention/{set}/packed_equals_alone_{d}"), run));
            let run = move || empty_sequences_change_nothing(&open(kernels)?, d);
            trials.push(Trial::test(format!("attention/{set}/empty_sequences_change_nothing_{d}"), run));
        }
        let run = move || steep_softmax(&open(kernels)?);
        trials.push(Trial::test(format!("attention/{set}/scores_of_hundreds_stay_finite"), run));
    }
    trials
}

fn open(kernels: Kernels) -> Result<Cuda, Error> {
    Ok(Cuda::open(0)?.with_kernels(kernels))
}

/// Inputs of both ops.
struct Case {
    heads: Heads,
    t: usize,
    cu_seqlens: Vec<i32>,
    qkv: Vec<bf16>,
    d_o: Vec<bf16>,
}

impl Case {
    fn new(lengths: &[usize], heads: Heads, scale: f32) -> Self {
        let t = lengths.iter().sum();
        let mut random = Random::new((t * 1000 + heads.d) as u64);
        let ends = lengths.iter().scan(0, |end, len| {
            *end += *len as i32;
            Some(*end)
        });
        let cu_seqlens = std::iter::once(0).chain(ends).collect();
        let qkv = random.bf16s(t * heads.qkv(), scale);
        Self { heads, t, cu_seqlens, qkv, d_o: random.bf16s(t * heads.h * heads.d, 1.0) }
    }

    /// The tokens `from..to` of a tensor with `width` elements a token.
    fn rows(x: &[bf16], width: usize, from: usize, to: usize) -> Vec<bf16> {
        x[from * width..to * width].to_vec()
    }

    /// Its sequence number `n`, alone.
    fn sequence(&self, n: usize) -> Self {
        let (from, to) = (self.cu_seqlens[n] as usize, self.cu_seqlens[n + 1] as usize);
        let t = to - from;
        let (qkv, d_o) = (self.heads.qkv(), self.heads.h * self.heads.d);
        let (qkv, d_o) = (Self::rows(&self.qkv, qkv, from, to), Self::rows(&self.d_o, d_o, from, to));
        Self { heads: self.heads, t, cu_seqlens: vec![0, t as i32], qkv, d_o }
    }
}

/// o (T, H*D), lse (H, T), dqkv (T, (H+2G)*D)
struct Results<T> {
    o: Vec<T>,
    lse: Vec<f32>,
    dqkv: Vec<T>,
}

fn gpu(cuda: &Cuda, case: &Case) -> Result<Results<bf16>, Error> {
    let (t, b, heads) = (case.t, case.cu_seqlens.len() - 1, case.heads);
    let (qkv, d_o) = (cuda.upload(&case.qkv)?, cuda.upload(&case.d_o)?);
    let cu_seqlens = cuda.upload(&case.cu_seqlens)?;
    let mut o = poisoned::<bf16>(cuda, t * heads.h * heads.d)?;
    let mut lse = poisoned::<f32>(cuda, heads.h * t)?;
    let mut dqkv = poisoned::<bf16>(cuda, t * heads.qkv())?;
    let mut delta = poisoned::<f32>(cuda, heads.h * t)?;
    let op = AttentionForward {
        o: o.view_mut(),
        lse: lse.view_mut(),
        qkv: qkv.view(),
        cu_seqlens: cu_seqlens.view(),
        t,
        b,
        heads,
    };
    attention_forward(cuda, op)?;
    let op = AttentionBackward {
        dqkv: dqkv.view_mut(),
        delta: delta.view_mut(),
        d_o: d_o.view(),
        o: o.view(),
        lse: lse.view(),
        qkv: qkv.view(),
        cu_seqlens: cu_seqlens.view(),
        t,
        b,
        heads,
    };
    attention_backward(cuda, op)?;
    Ok(Results { o: cuda.download(&o)?, lse: cuda.download(&lse)?, dqkv: cuda.download(&dqkv)? })
}

/// The formulas in f64, one pair of tokens at a time. `round` is applied where a plain bf16 computation stores: p, o, ds,
/// and the results.
fn formulas(case: &Case, round: impl Fn(f64) -> f64) -> Results<f32> {
    let Case { heads, t, .. } = *case;
    let (h, g, d, width) = (heads.h, heads.g, heads.d, heads.qkv());
    let (qkv, d_o) = (wide(&case.qkv), wide(&case.d_o));
    let row = |token: usize, part: usize| &qkv[token * width + part * d..][..d];
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum::<f64>();
    let add = |sum: &mut [f64], factor: f64, x: &[f32]| {
        sum.iter_mut().zip(x).for_each(|(sum, &x)| *sum += factor * f64::from(x));
    };
    let scale = 1.0 / (d as f64).sqrt();
    let (mut o_all, mut lse, mut dqkv) = (vec![0.0; t * h * d], vec![0.0; h * t], vec![0.0; t * width]);
    for ends in case.cu_seqlens.windows(2) {
        let (start, len) = (ends[0] as usize, (ends[1] - ends[0]) as usize);
        for head in 0..h {
            let kv = head / (h / g);
            for i in 0..len {
                let keys = start + heads.window.map_or(0, |w| (i + 1).saturating_sub(w))..start + i + 1;
                let (q_row, at) = (row(start + i, head), (start + i) * h * d + head * d);
                let scores: Vec<f64> = keys.clone().map(|j| scale * dot(q_row, row(j, h + kv))).collect();
                let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let sum: f64 = scores.iter().map(|s| (s - top).exp()).sum();
                lse[head * t + start + i] = (top + sum.ln()) as f32;
                let p: Vec<f64> = scores.iter().map(|s| (s - top).exp() / sum).collect();
                let o = &mut o_all[at..][..d];
                for (j, &p) in keys.clone().zip(&p) {
                    add(o, round(p), row(j, h + g + kv));
                }
                o.iter_mut().for_each(|x| *x = round(*x));
                let d_o = &d_o[at..][..d];
                let delta: f64 = o.iter().zip(d_o).map(|(x, &y)| x * f64::from(y)).sum();
                for (j, &p) in keys.zip(&p) {
                    let ds = round(p * (dot(d_o, row(j, h + g + kv)) - delta));
                    add(&mut dqkv[(start + i) * width + head * d..][..d], scale * ds, row(j, h + kv));
                    add(&mut dqkv[j * width + (h + kv) * d..][..d], scale * ds, q_row);
                    add(&mut dqkv[j * width + (h + g + kv) * d..][..d], round(p), d_o);
                }
            }
        }
    }
    let o = o_all.iter().map(|&x| x as f32).collect();
    Results { o, lse, dqkv: dqkv.iter().map(|&x| round(x) as f32).collect() }
}

/// dq (T, H*D), dk and dv (T, G*D) of dqkv.
fn parts(dqkv: &[f32], heads: Heads) -> [(&'static str, Vec<f32>); 3] {
    let (q, k) = (heads.h * heads.d, (heads.h + heads.g) * heads.d);
    let columns = |range: std::ops::Range<usize>| {
        dqkv.chunks_exact(heads.qkv()).flat_map(|row| row[range.clone()].iter().copied()).collect()
    };
    [("dq", columns(0..q)), ("dk", columns(q..k)), ("dv", columns(k..heads.qkv()))]
}

fn judge(found: &Results<bf16>, case: &Case) -> Outcome {
    let exact = formulas(case, |x| x);
    let plain = formulas(case, |x| f64::from(bf16::from_f64(x).to_f32()));
    // o first: a wrong one spoils delta.
    within_twice("o", &wide(&found.o), &plain.o, &exact.o)?;
    for (i, (a, b)) in found.lse.iter().zip(&exact.lse).enumerate() {
        let error = (a - b).abs();
        if error.is_nan() || error > 1e-5 * (1.0 + b.abs()) {
            return Err(format!("lse of head {}, token {}: {a} for {b}", i / case.t, i % case.t).into());
        }
    }
    let [exact, plain] = [exact, plain].map(|r| parts(&r.dqkv, case.heads));
    let norm = |x: &[f32]| x.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt();
    let unit = norm(&exact[2].1);
    for (((what, found), (_, plain)), (_, exact)) in
        parts(&wide(&found.dqkv), case.heads).iter().zip(&plain).zip(&exact)
    {
        // Where every query sees one key alone, scores have no gradient: only f32 noise is left of dq and dk.
        if norm(exact) < 1e-6 * unit {
            let noise = norm(found);
            if noise.is_nan() || noise > 1e-5 * unit {
                return Err(format!("{what}: norm {noise:.3e} for 0").into());
            }
            continue;
        }
        within_twice(what, found, plain, exact)?;
    }
    Ok(())
}

fn agrees_with_the_formulas(cuda: &Cuda, lengths: &[usize], heads: Heads) -> Outcome {
    let case = Case::new(lengths, heads, 1.0);
    let found = gpu(cuda, &case)?;
    judge(&found, &case)?;
    same_results("second run", &gpu(cuda, &case)?, &found)
}

fn same_results(what: &str, found: &Results<bf16>, expected: &Results<bf16>) -> Outcome {
    same(&format!("{what}, o"), &found.o, &expected.o)?;
    same(&format!("{what}, lse"), &found.lse, &expected.lse)?;
    same(&format!("{what}, dqkv"), &found.dqkv, &expected.dqkv)
}

/// Tiles start with the sequence, so not a bit depends on what lies before it or behind.
fn packed_equals_alone(cuda: &Cuda, d: usize) -> Outcome {
    let case = Case::new(&[70, 1, 130, 64, 65], Heads { h: 4, g: 2, d, window: Some(90) }, 1.0);
    let packed = gpu(cuda, &case)?;
    for n in 0..5 {
        let (from, to) = (case.cu_seqlens[n] as usize, case.cu_seqlens[n + 1] as usize);
        let (h, t) = (case.heads.h, case.t);
        let rows = Results {
            o: Case::rows(&packed.o, h * d, from, to),
            lse: (0..h).flat_map(|head| packed.lse[head * t + from..head * t + to].to_vec()).collect(),
            dqkv: Case::rows(&packed.dqkv, case.heads.qkv(), from, to),
        };
        same_results(&format!("sequence {n}"), &rows, &gpu(cuda, &case.sequence(n))?)?;
    }
    Ok(())
}

/// Batches are padded with empty sequences at the end; they may lie in between as well.
fn empty_sequences_change_nothing(cuda: &Cuda, d: usize) -> Outcome {
    let mut case = Case::new(&[66, 131], Heads { h: 2, g: 1, d, window: None }, 1.0);
    let expected = gpu(cuda, &case)?;
    case.cu_seqlens = [vec![0, 0, 66, 66], vec![197; 61]].concat();
    same_results("padded", &gpu(cuda, &case)?, &expected)
}

/// Scores in the hundreds overflow an exponential that is not shifted.
fn steep_softmax(cuda: &Cuda) -> Outcome {
    for d in [64, 96, 128] {
        let case = Case::new(&[150], Heads { h: 2, g: 1, d, window: None }, 12.0);
        let found = gpu(cuda, &case)?;
        let exact = formulas(&case, |x| x);
        let error = distance(&wide(&found.o), &exact.o);
        assert!(error < 0.01, "head size {d}: o is off by {error}");
        assert!(found.dqkv.iter().all(|x| x.is_finite()), "head size {d}: dqkv is not finite");
    }
    Ok(())
}

fn wrong_sizes() -> Outcome {
    let cuda = Cuda::open(0)?;
    let heads = Heads { h: 2, g: 1, d: 64, window: None };
    let (t, qkv, cu_seqlens) = (10, cuda.zeros::<bf16>(10 * 256)?, cuda.upload(&[0, 10])?);
    let (mut o, mut lse) = (cuda.zeros::<bf16>(10 * 128)?, cuda.zeros::<f32>(20)?);
    let mut forward = |t, b, heads| {
        let (o, lse, qkv, cu_seqlens) = (o.view_mut(), lse.view_mut(), qkv.view(), cu_seqlens.view());
        attention_forward(&cuda, AttentionForward { o, lse, qkv, cu_seqlens, t, b, heads })
    };
    forward(t, 1, heads)?;
    forward(0, 1, heads)?;
    let mut refused = |argument: &str, t, b, heads| match forward(t, b, heads) {
        Err(Error::Shape { op: "attention_forward", argument: found, .. }) if found == argument => Ok(()),
        Err(other) => Err(format!("{argument}: {other}")),
        Ok(()) => Err(format!("{argument}: taken")),
    };
    refused("o", 11, 1, heads)?;
    refused("cu_seqlens", t, 2, heads)?;
    refused("b", t, 0, heads)?;
    refused("heads", t, 1, Heads { g: 0, ..heads })?;
    refused("heads", t, 1, Heads { h: 3, g: 2, ..heads })?;
    refused("window", t, 1, Heads { window: Some(0), ..heads })?;
    for d in [8, 20, 264] {
        refused("heads.d (16 to 256, in steps of 8)", t, 1, Heads { d, ..heads })?;
    }
    refused("t + 64 * b (at most)", usize::MAX / 2, 1, heads)?;
    let (mut dqkv, mut delta) = (cuda.zeros::<bf16>(10 * 256)?, cuda.zeros::<f32>(19)?);
    let op = AttentionBackward {
        dqkv: dqkv.view_mut(),
        delta: delta.view_mut(),
        d_o: o.view(),
        o: o.view(),
        lse: lse.view(),
        qkv: qkv.view(),
        cu_seqlens: cu_seqlens.view(),
        t,
        b: 1,
        heads,
    };
    let error = attention_backward(&cuda, op).err().ok_or("a delta too short was taken")?;
    assert!(
        matches!(error, Error::Shape { op: "attention_backward", argument: "delta", found: 19, expected: 20 }),
        "{error}"
    );
    Ok(())
}
