//! csrc/adamw.cu.
