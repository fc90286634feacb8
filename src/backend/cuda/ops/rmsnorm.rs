//! csrc/rmsnorm.cu behind checks.
