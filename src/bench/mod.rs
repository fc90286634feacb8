//! What `halfbyte bench` and `cargo bench` measure. The timings are printed and kept by the command line; here is the work.

pub mod candidate;
pub mod compare;
pub mod decode;
pub mod environment;
pub mod kernels;
pub mod random_weights;
pub mod report;
pub mod results;
pub mod step;
