//! csrc/adamw.cu behind checks.
