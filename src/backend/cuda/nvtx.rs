//! Where in a step the program is: ranges on a profiler's timeline, and the place in an error.

use super::ffi::nvtx::{pop, push};
use crate::backend::Scope;
use crate::error::Error;

/// The scopes that are open, outermost first.
#[derive(Default)]
pub(super) struct Scopes(Vec<Scope>);

impl Scopes {
    pub(super) fn enter(&mut self, scope: Scope) {
        push(|| name(&scope));
        self.0.push(scope);
    }

    pub(super) fn leave(&mut self) {
        if self.0.pop().is_some() {
            pop();
        }
    }

    pub(super) fn depth(&self) -> usize {
        self.0.len()
    }

    /// Leaves all scopes that were entered after there were `depth`: an error has passed them by.
    pub(super) fn unwind(&mut self, depth: usize) {
        while self.0.len() > depth {
            self.leave();
        }
    }

    /// Puts the open scopes into an error of the GPU, unless it has them already.
    pub(super) fn place(&self, error: Error) -> Error {
        let place = self.0.iter().map(name).collect::<Vec<_>>().join(", ");
        match error {
            Error::Cuda { op, detail } if !op.contains(&place) => Error::Cuda { op: format!("{op} ({place})"), detail },
            other => other,
        }
    }
}

/// Runs `f` as a range of its own on the timeline.
pub(super) fn range<R>(name: &str, f: impl FnOnce() -> R) -> R {
    push(|| name.into());
    let result = f();
    pop();
    result
}

/// What a timeline and an error call a scope.
fn name(scope: &Scope) -> String {
    match scope {
        Scope::Step(n) => format!("step {n}"),
        Scope::Forward => "forward".into(),
        Scope::Backward => "backward".into(),
        Scope::Layer(n) => format!("layer {n}"),
        Scope::Recompute(n) => format!("layer {n} again"),
        Scope::Head => "head".into(),
        Scope::Optimizer => "optimizer".into(),
        Scope::Decode => "decode".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_of_the_gpu_names_the_open_scopes_once() {
        let mut scopes = Scopes::default();
        let error = || Error::Cuda { op: "rope_forward".into(), detail: "gone".into() };
        assert_eq!(scopes.place(error()).to_string(), "CUDA: rope_forward: gone");
        [Scope::Step(3), Scope::Backward, Scope::Layer(12)].into_iter().for_each(|s| scopes.enter(s));
        let placed = scopes.place(error());
        assert_eq!(placed.to_string(), "CUDA: rope_forward (step 3, backward, layer 12): gone");
        scopes.unwind(1);
        assert_eq!(scopes.place(placed).to_string(), "CUDA: rope_forward (step 3, backward, layer 12): gone");
        let other = Error::Shape { op: "a", argument: "b", found: 1, expected: 2 };
        assert!(matches!(scopes.place(other), Error::Shape { .. }));
    }
}
