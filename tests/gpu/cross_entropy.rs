//! The ops of csrc/cross_entropy.cu against the CPU backend.

use libtest_mimic::Trial;

pub fn trials() -> Vec<Trial> {
    vec![]
}
