//! csrc/rope.cu behind checks.
