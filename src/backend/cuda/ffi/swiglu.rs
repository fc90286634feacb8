//! csrc/swiglu.cu.
