//! csrc/attention.cu.
