//! csrc/lora.cu behind checks.
