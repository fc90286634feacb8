//! Every op of the table, by family. A file declares the arguments, what they must be moved and computed, the oracle, the
//! ways to run it on a GPU and on the CPU, and a starter: the body of a naive kernel that a candidate can begin from.

/// `dims!(T = t, C = c)`: the letter and size of each dimension.
macro_rules! dims {
    ($($letter:ident = $size:expr),+) => { [$((stringify!($letter), $size)),+] };
}

mod rmsnorm;
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

/// All ops, in the order of the table.
pub fn all() -> Vec<Op> {
    [rmsnorm::OPS].into_iter().flatten().copied().collect()
}

/// One by its name; the toy, which [`all`] leaves out, as well.
pub fn named(name: &str) -> Option<Op> {
    all().into_iter().chain(toy::OPS.iter().copied()).find(|op| op.name == name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::Cpu;
    use crate::bench::kernels::case::{Arg, Case, Element, HostBuffer, Role};
    use crate::bench::kernels::check::Answers;
    use crate::bench::kernels::models::{MODELS, TOKENS, TOY};
    use crate::bench::kernels::values::{Column, Inputs};

    fn toys() -> impl Iterator<Item = Case> {
        all().into_iter().flat_map(|op| [1, 5, 64].into_iter().flat_map(move |t| (op.cases)(&TOY, t)))
    }

    fn host(arg: &Arg, column: &Column) -> HostBuffer {
        let value = |i: usize| if arg.role == Role::Output { -3e-16 } else { column.at(i) };
        match arg.element {
            Element::U8 => HostBuffer::U8((0..arg.len()).map(|i| value(i) as u8).collect()),
            Element::I32 => HostBuffer::I32((0..arg.len()).map(|i| value(i) as i32).collect()),
            _ => HostBuffer::F32((0..arg.len()).map(|i| value(i) as f32).collect()),
        }
    }

    #[test]
    fn the_cpu_backend_agrees_with_every_oracle() {
        let mut cpu = Cpu::new(Some(1));
        for case in toys() {
            let Some(run) = case.cpu.clone() else { continue };
            let inputs = Inputs::new(&case.args, &case.scalars);
            let mut buffers: Vec<_> = case.args.iter().zip(inputs.columns()).map(|(a, c)| host(a, c)).collect();
            run(&mut cpu, &mut buffers).unwrap();
            for answers in Answers::within(&case, &inputs, usize::MAX) {
                let difference = answers.difference(&case, |span| {
                    Ok::<_, ()>(match &buffers[answers.arg] {
                        HostBuffer::F32(v) => v[span].iter().map(|&v| f64::from(v)).collect(),
                        HostBuffer::I32(v) => v[span].iter().map(|&v| f64::from(v)).collect(),
                        HostBuffer::U8(v) => v[span].iter().map(|&v| f64::from(v)).collect(),
                    })
                });
                let difference = difference.unwrap();
                assert!(difference.is_none(), "{} {}: {}", case.op, case.shape, difference.unwrap());
            }
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
                        assert!(case.bytes > 0.0 && case.args.iter().any(|a| a.is_checked()));
                    }
                }
            }
        }
    }
}
