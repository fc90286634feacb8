//! csrc/cross_entropy.cu behind checks.
