//! Where in a step the program is: ranges on a profiler's timeline, and the place in an error.

use crate::backend::Scope;
use crate::error::Error;

/// The scopes that are open, outermost first.
#[derive(Default)]
pub(super) struct Scopes(Vec<Scope>);

impl Scopes {
    pub(super) fn enter(&mut self, scope: Scope) {
        self.0.push(scope);
    }

    pub(super) fn leave(&mut self) {
        self.0.pop();
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

    /// Puts the open scopes into an error of the GPU.
    pub(super) fn place(&self, error: Error) -> Error {
        match error {
            Error::Cuda { op, detail } if !self.0.is_empty() => {
                let place = self.0.iter().map(name).collect::<Vec<_>>().join(", ");
                Error::Cuda { op: format!("{op} ({place})"), detail }
            }
            other => other,
        }
    }
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
