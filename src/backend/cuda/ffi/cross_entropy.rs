//! csrc/cross_entropy.cu.
