//! csrc/embedding.cu behind checks.
