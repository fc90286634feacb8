//! csrc/decode.cu behind checks.
