//! What all commands share: help, usage errors, exit codes, closed pipes and full disks.

use std::ffi::OsString;
use std::fs::File;
use std::io::Read;
use std::os::unix::ffi::OsStringExt;
use std::process::Stdio;

use crate::{Place, args, command, finish, halfbyte};

const COMMANDS: [&str; 7] = ["train", "eval", "generate", "quantize", "merge", "inspect", "info"];

#[test]
fn help_of_every_command_has_examples() {
    let help = halfbyte(["--help"]);
    for name in COMMANDS {
        assert!(help.ok().contains(&format!("\n  {name}")), "{name}: {help:#?}");
        let run = halfbyte([name, "--help"]);
        assert!(run.ok().contains("Examples:"), "{run:#?}");
        assert!(run.ok().contains(&format!("\n  halfbyte {name}")), "{run:#?}");
    }
}

#[test]
fn the_version_is_printed() {
    assert_eq!(halfbyte(["--version"]).ok(), format!("halfbyte {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn wrong_usage_is_exit_code_2() {
    halfbyte(["generat"]).fails(2, &["unrecognized subcommand", "generate"]);
    halfbyte(["info", "--jsn"]).fails(2, &["unexpected argument", "--json"]);
    halfbyte(["quantize", "--model", "m"]).fails(2, &["--out"]);
    assert_eq!(halfbyte::<&str>([]).code, Some(2));
}

#[test]
fn paths_that_are_not_utf8_do_not_panic() {
    let bad = OsString::from_vec(b"no-such-\xff-dir".to_vec());
    let place = Place::empty();
    halfbyte(args!["inspect", bad]).fails(2, &["no-such-"]);
    halfbyte(args!["quantize", "--model", bad, "--out", place.path("o")]).fails(2, &["no-such-"]);
    halfbyte(args!["eval", "--model", bad, "--data", bad]).fails(2, &["no-such-"]);
    halfbyte(args!["generate", "--model", bad, "--prompt", "x"]).fails(2, &["no-such-"]);
    halfbyte(args!["train", "--model", bad, "--data", bad, "--out", place.path("o")]).fails(2, &["--model", "UTF-8"]);
    halfbyte(args!["train", bad]).fails(2, &["no-such-"]);
}

#[test]
fn a_closed_pipe_ends_a_command_quietly() {
    let place = Place::with("tiny-mistral");
    for a in [args!["inspect", "--tensors", place.model()].to_vec(), args!["info"].to_vec()] {
        let mut c = command(a);
        c.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = c.spawn().expect("the binary starts");
        drop(child.stdout.take());
        let mut stderr = String::new();
        child.stderr.take().expect("a pipe").read_to_string(&mut stderr).expect("text");
        assert_eq!((child.wait().expect("an end").code(), stderr.as_str()), (Some(0), ""));
    }
}

#[test]
fn a_full_disk_behind_standard_output_is_exit_code_1() {
    let mut c = command(["info"]);
    c.stdout(File::options().write(true).open("/dev/full").expect("/dev/full"));
    finish(c).fails(1, &["standard output", "cannot write", "No space left"]);
}
