//! csrc/rmsnorm.cu.
