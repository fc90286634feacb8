//! csrc/rope.cu.
