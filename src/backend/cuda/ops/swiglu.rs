//! csrc/swiglu.cu behind checks.
