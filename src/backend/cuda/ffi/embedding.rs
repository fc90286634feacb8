//! csrc/embedding.cu.
