//! Properties that must hold for any model and any batch, and for any bytes given to a reader.

mod mutations;
mod steps;
mod tiny;

mod gradients;
