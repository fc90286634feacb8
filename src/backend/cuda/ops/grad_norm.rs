//! csrc/grad_norm.cu behind checks.
