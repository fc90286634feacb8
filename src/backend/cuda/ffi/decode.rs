//! csrc/decode.cu.
