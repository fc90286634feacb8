//! csrc/attention.cu behind checks.
