//! Runs the program that cargo has built beside the benchmark.

use std::process::{Command, exit};

/// `halfbyte bench WHAT` with the arguments given to cargo behind `--`, or these if there are none; ends the process.
pub fn run(what: &str, default: &[&str]) {
    // cargo adds --bench.
    let given: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let mut command = Command::new(env!("CARGO_BIN_EXE_halfbyte"));
    command.args(["bench", what]);
    if given.is_empty() {
        command.args(default)
    } else {
        command.args(given)
    };
    match command.status() {
        Ok(status) => exit(status.code().unwrap_or(1)),
        Err(error) => {
            eprintln!("{}: {error}", env!("CARGO_BIN_EXE_halfbyte"));
            exit(1);
        }
    }
}
