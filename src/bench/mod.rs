//! What `halfbyte bench` and `cargo bench` measure. The timings are printed and kept by the command line; here is the work.

pub mod decode;
pub mod random_weights;
pub mod report;
pub mod results;
pub mod step;
