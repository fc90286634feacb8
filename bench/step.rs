//! `cargo bench --bench step`: whole training steps by `halfbyte bench step`, on the GPU if there is one, else a small
//! shape on the CPU. Arguments behind `--` go to it: `cargo bench --bench step -- --shape mistral-7b --length 512`.

use std::process::{Command, exit};

fn main() {
    // cargo adds --bench.
    let given: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let mut command = Command::new(env!("CARGO_BIN_EXE_halfbyte"));
    command.args(["bench", "step"]);
    if given.is_empty() {
        command.args(["--shape", "smollm2-135m", "--length", "512", "--steps", "3", "--warm-up", "1"]);
    }
    match command.args(given).status() {
        Ok(status) => exit(status.code().unwrap_or(1)),
        Err(error) => {
            eprintln!("{}: {error}", env!("CARGO_BIN_EXE_halfbyte"));
            exit(1);
        }
    }
}
