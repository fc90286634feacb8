//! The command line: parses, then calls `cli/`.

mod cli;

fn main() -> std::process::ExitCode {
    cli::main()
}
