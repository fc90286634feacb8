//! csrc/lora.cu.
