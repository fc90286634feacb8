//! `cargo bench --bench step`: whole training steps by `halfbyte bench step`, on the GPU if there is one, else a small
//! shape on the CPU. Arguments behind `--` go to it: `cargo bench --bench step -- --shape mistral-7b --length 512`.

mod program;

fn main() {
    program::run("step", &["--shape", "smollm2-135m", "--length", "512", "--steps", "3", "--warm-up", "1"]);
}
