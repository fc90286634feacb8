//! csrc/grad_norm.cu.
