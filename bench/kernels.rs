//! `cargo bench --bench kernels`: the table of kernels by `halfbyte bench kernels`, on the GPU if there is one, else on the
//! CPU. Arguments behind `--` go to it: `cargo bench --bench kernels -- --op rmsnorm_forward --model 7b`.

mod program;

fn main() {
    program::run("kernels", &[]);
}
