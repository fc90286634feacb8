//! Every op of the table, by family. A file declares the arguments, what they must be moved and computed, the oracle, the
//! ways to run it on a GPU and on the CPU, and a starter: the body of a naive kernel that a candidate can begin from.

/// `dims!(T = t, C = c)`: the letter and size of each dimension.
macro_rules! dims {
    ($($letter:ident = $size:expr),+) => { [$((stringify!($letter), $size)),+] };
}

mod adamw;
mod attention;
mod attention_decode;
mod bias;
mod cross_entropy;
mod embedding;
mod gemm;
mod grad_norm;
mod head_norm;
mod linear;
#[cfg(feature = "cuda")]
mod linear_cuda;
mod load;
mod lora;
mod matvec;
mod nf4;
mod nf4_gemm;
mod rmsnorm;
mod rope;
mod rows;
mod sums;
mod swiglu;
pub mod toy;

use super::case::Case;
use super::models::Model;

/// An op of the table.
#[derive(Clone, Copy)]
pub struct Op {
    /// As the trait `Backend` or `backend::cuda::ops` calls it.
    pub name: &'static str,
    /// One line: what it computes.
    pub about: &'static str,
    /// Its cases at `t` tokens; of an op without tokens, those at the first of the table's counts alone.
    pub cases: fn(&Model, usize) -> Vec<Case>,
    /// Whether `t` matters.
    pub has_tokens: bool,
    /// A kernel that works, without its signature, which follows from the arguments: `// launch:` lines, helpers, and the
    /// body in braces, see docs/candidates.md. None: no candidate can be raced.
    pub starter: Option<&'static str>,
}

impl Op {
    /// A usual number of tokens at which the op has a case: that of generation has some only at few.
    pub fn usual_tokens(&self, model: &Model) -> usize {
        let has = |t: &usize| !(self.cases)(model, *t).is_empty();
        [2048, 512, 128, 16].into_iter().find(has).unwrap_or(1)
    }
}

/// All ops, in the order of the table.
pub fn all() -> Vec<Op> {
    [
        embedding::OPS,
        rmsnorm::OPS,
        head_norm::OPS,
        rope::OPS,
        attention::OPS,
        attention_decode::OPS,
        swiglu::OPS,
        linear::OPS,
        gemm::OPS,
        nf4_gemm::OPS,
        lora::OPS,
        matvec::OPS,
        nf4::OPS,
        bias::OPS,
        rows::OPS,
        cross_entropy::OPS,
        grad_norm::OPS,
        adamw::OPS,
        load::OPS,
    ]
    .into_iter()
    .flatten()
    .copied()
    .collect()
}

/// One by its name; the toy, which [`all`] leaves out, as well.
pub fn named(name: &str) -> Option<Op> {
    all().into_iter().chain(toy::OPS.iter().copied()).find(|op| op.name == name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::Cpu;
    use crate::bench::kernels::case::Case;
    use crate::bench::kernels::cpu::check;
    use crate::bench::kernels::models::{MODELS, TOKENS, TOY};
    use crate::bench::kernels::values::Inputs;

    fn toys() -> impl Iterator<Item = Case> {
        all().into_iter().flat_map(|op| [1, 5, 64].into_iter().flat_map(move |t| (op.cases)(&TOY, t)))
    }

    #[test]
    fn the_cpu_backend_agrees_with_every_oracle() {
        let mut cpu = Cpu::new(Some(1));
        for case in toys() {
            let difference = check(&mut cpu, &case, usize::MAX).unwrap();
            assert!(difference.is_none(), "{} {}: {}", case.op, case.shape, difference.unwrap());
        }
    }

    #[test]
    fn every_oracle_answers_every_element_of_every_output() {
        for case in toys() {
            let inputs = Inputs::new(&case.args, &case.scalars);
            for arg in case.args.iter().filter(|a| a.is_checked()) {
                for start in (0..arg.len()).step_by(arg.width()) {
                    let expected = (case.oracle)(&inputs, arg.name, start..start + arg.width());
                    assert_eq!(expected.len(), arg.width(), "{} {} {}", case.op, case.shape, arg.name);
                    let finite = expected.iter().all(|e| e.value.is_finite() && e.tolerance.is_finite());
                    assert!(finite, "{} {} {}", case.op, case.shape, arg.name);
                }
            }
        }
    }

    #[test]
    fn rows_of_the_table_differ_in_name_and_need_no_quotes() {
        let mut seen = std::collections::BTreeSet::new();
        for op in all() {
            for model in MODELS {
                for t in if op.has_tokens { &TOKENS[..] } else { &TOKENS[..1] } {
                    for case in (op.cases)(&model, *t) {
                        assert!(!case.shape.contains([',', '"']), "{}", case.shape);
                        assert_eq!(case.op, op.name);
                        assert!(seen.insert((case.op, case.model, case.shape.clone())), "{} {}", case.op, case.shape);
                        assert!(case.work.bytes > 0.0 && case.args.iter().any(|a| a.is_checked()));
                    }
                }
            }
        }
    }
}
