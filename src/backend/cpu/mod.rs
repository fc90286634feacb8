//! The f32 backend: oracle and no-GPU default.
