//! `halfbyte bench`.

use halfbyte::bench::results::{StepOpRow, read_rows};

use crate::halfbyte;

#[test]
fn a_step_gives_one_row_with_its_figures() {
    let dir = tempfile::tempdir().unwrap();
    let csv = dir.path().join("steps.csv");
    let path = csv.to_str().unwrap();
    let step =
        ["bench", "step", "--shape", "tiny", "--length", "64", "--steps", "2", "--warm-up", "1", "--device", "cpu"];
    let row = halfbyte(step.iter().chain(&["--json", "--csv", path])).json();
    assert!(row["tokens_per_second"].as_f64().unwrap() > 0.0, "{row}");
    assert!(row["loss"].as_f64().unwrap() > 1.0, "{row}");
    halfbyte(step.iter().chain(&["--csv", path])).ok();
    let text = std::fs::read_to_string(csv).unwrap();
    let columns: Vec<usize> = text.lines().map(|l| l.split(',').count()).collect();
    assert!(columns.len() == 3 && columns.iter().all(|c| *c == columns[0]), "a line of names and two rows: {text}");
}

#[test]
fn the_ops_of_a_step_are_rows_of_their_own() {
    let dir = tempfile::tempdir().unwrap();
    let csv = dir.path().join("ops.csv");
    let path = csv.to_str().unwrap();
    let step = ["bench", "step", "--shape", "tiny", "--length", "32", "--steps", "2", "--device", "cpu", "--ops"];
    let json = halfbyte(step.iter().chain(&["--ops-csv", path, "--json"])).json();
    let rows: Vec<StepOpRow> = read_rows(&csv).unwrap();
    assert_eq!(json["ops"].as_array().unwrap().len(), rows.len());
    // Four layers that keep everything.
    for (op, calls) in [("embedding", 1), ("rmsnorm_forward", 17), ("linear_forward", 16), ("linear_backward", 16)] {
        let row = rows.iter().find(|r| r.op == op).unwrap();
        assert_eq!(row.calls, calls, "{row:?}");
        assert!(row.op_ms > 0.0, "{row:?}");
        assert_eq!((row.bytes, row.flops, row.floor_ms), (0.0, 0.0, 0.0), "the CPU has no floors: {row:?}");
    }
    assert!(rows.is_sorted_by(|a, b| a.op_ms >= b.op_ms), "{rows:?}");
    let (sum, step_ms) = (rows.iter().map(|r| r.op_ms).sum::<f64>(), rows[0].timed_step_ms);
    assert!(sum <= 1.05 * step_ms, "{sum} ms of ops in a step of {step_ms} ms");
    assert_eq!(json["ms"].as_f64(), Some(rows[0].step_ms));

    let table = halfbyte(step.iter().chain(&["--ops-csv", path]));
    for part in ["linear_backward", "between ops", "whose ops are timed"] {
        assert!(table.ok().contains(part), "{part}: {table:#?}");
    }
    assert_eq!(read_rows::<StepOpRow>(&csv).unwrap().len(), 2 * rows.len());
    let without = halfbyte(step[..step.len() - 1].iter().chain(&["--json"])).json();
    assert!(without.get("ops").is_none(), "{without}");
}

#[test]
fn times_of_ops_that_cannot_be_kept_are_refused() {
    let step = ["bench", "step", "--shape", "tiny", "--length", "32", "--device", "cpu"];
    let with = |more: &[&str]| halfbyte(step.iter().chain(more));
    with(&["--profile-range"]).fails(2, &["--profile-range", "a GPU"]);
    with(&["--ops-csv", "ops.csv"]).fails(2, &["--ops"]);
    with(&["--ops", "--ops-csv", "/nonexistent/a.csv"]).fails(1, &["/nonexistent/a.csv", "cannot open"]);
    let dir = tempfile::tempdir().unwrap();
    let other = dir.path().join("steps.csv");
    let path = other.to_str().unwrap();
    with(&["--steps", "1", "--warm-up", "0", "--csv", path]).ok();
    with(&["--ops", "--ops-csv", path]).fails(2, &[path, "step ops"]);
}

#[test]
fn decoding_gives_tokens_a_second() {
    let row =
        halfbyte(["bench", "decode", "--shape", "tiny", "--past", "20", "--tokens", "3", "--device", "cpu", "--json"])
            .json();
    assert!(row["tokens_per_second"].as_f64().unwrap() > 0.0, "{row}");
}

#[test]
fn what_cannot_be_timed_is_refused() {
    halfbyte(["bench", "step", "--shape", "gpt-9"]).fails(2, &["--shape", "gpt-9", "mistral-7b"]);
    halfbyte(["bench", "step", "--length", "0"]).fails(2, &["--length"]);
    halfbyte(["bench", "step", "--batch", "100000000", "--length", "100000000"]).fails(2, &["--length", "at most"]);
    halfbyte(["bench", "decode", "--past", "9999999999999"]).fails(2, &["--past", "at most"]);
    halfbyte(["bench", "step", "--csv", "/nonexistent/a.csv"]).fails(1, &["/nonexistent/a.csv", "cannot open"]);
    halfbyte(["bench", "step", "--shape", "tiny", "--lora-dropout", "1.5"]).fails(2, &["--lora-dropout", "below 1"]);
    halfbyte(["bench", "step", "--shape", "tiny", "--optim", "sgd"]).fails(2, &["optim", "sgd"]);
}

#[test]
fn a_directory_is_made_and_loaded() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("m");
    let load = ["bench", "load", "--make", "tiny", "--model", model.to_str().unwrap(), "--device", "cpu"];
    let row = halfbyte(load.iter().chain(&["--json"])).json();
    for key in ["bytes", "disk_gb_per_s", "cold_gb_per_s", "warm_gb_per_s"] {
        assert!(row[key].as_f64().is_some_and(|v| v > 0.0), "{key}: {row}");
    }
    halfbyte(load).fails(2, &["--model", "which exists"]);
}

#[test]
fn the_template_of_an_op_is_a_file_to_begin_from() {
    let text = halfbyte(["bench", "rmsnorm_forward", "--print-template"]);
    assert!(
        text.ok().contains("extern \"C\" __global__ void rmsnorm_forward(\n    __nv_bfloat16* __restrict__ y,"),
        "{text:?}"
    );
    assert!(text.ok().contains("// launch: rmsnorm_forward grid=t block=256\n"), "{text:?}");
    let place = crate::Place::empty();
    let file = place.path("my.cu");
    let write = crate::args!["bench", "rmsnorm_forward", "--print_template", "--out", file];
    assert_eq!(halfbyte(&write).ok(), "");
    assert_eq!(std::fs::read_to_string(&file).unwrap(), text.stdout);
    halfbyte(&write).fails(2, &["--out", "which exists", "a new file"]);
    assert!(halfbyte(["bench", "toy", "--print-template"]).ok().contains("y = 2 * x + 1"));
}

#[test]
fn an_op_that_is_none_gets_the_names_near_it() {
    halfbyte(["bench", "rmsnorm_foward"]).fails(2, &["\"rmsnorm_foward\"", "rmsnorm_forward"]);
    halfbyte(["bench", "stepp", "--shape", "tiny"]).fails(2, &["\"stepp\"", "step"]);
    halfbyte(["bench", "zzz"]).fails(2, &["\"zzz\"", "step", "bench kernels --list"]);
    assert!(halfbyte(["bench", "rmsnorm_forward", "--help"]).ok().contains("--candidate"));
    assert!(halfbyte(["bench", "--help"]).ok().contains("halfbyte bench OP"));
}

#[test]
fn a_race_that_cannot_be_is_refused_before_it_begins() {
    let rmsnorm = |rest: &[&str]| halfbyte(["bench", "rmsnorm_forward"].iter().chain(rest));
    let usage = |run: crate::Run, part: &str| assert!(run.code == Some(2) && run.stderr.contains(part), "{run:#?}");
    usage(rmsnorm(&["--candidate", "a.cu", "--print-template"]), "cannot be used with");
    usage(rmsnorm(&["--watch"]), "--candidate");
    usage(rmsnorm(&["--out", "x"]), "--print-template");
    usage(rmsnorm(&["--model", "8b"]), "13b");
    usage(rmsnorm(&["--tokens", "0"]), "at least 1");
    // Without a GPU, or without the feature, it says so; with one, the file is what is missing.
    let run = rmsnorm(&["--candidate", "no-such.cu", "--model", "toy"]);
    assert!(run.code == Some(2) && !run.stderr.contains("panicked"), "{run:#?}");
    assert!(["no-such.cu", "not available"].iter().any(|part| run.stderr.contains(part)), "{run:#?}");
}
