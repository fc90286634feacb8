//! `halfbyte bench kernels` on the CPU.

use halfbyte::bench::results::{KernelRow, append, read_rows};

use crate::halfbyte;

const TOY: [&str; 6] = ["bench", "kernels", "--device", "cpu", "--model", "toy"];

fn args<'a>(more: &[&'a str]) -> Vec<&'a str> {
    TOY.iter().chain(more).copied().collect()
}

#[test]
fn rows_are_printed_kept_and_compared_with_those_before() {
    let dir = tempfile::tempdir().unwrap();
    let csv = dir.path().join("kernels.csv");
    let path = csv.to_str().unwrap();
    let ops = ["--op", "rmsnorm_forward", "--op", "linear_forward", "--tokens", "16"];
    let rows = halfbyte(args(&[&ops[..], &["--json", "--csv", path]].concat())).json();
    let rows = rows.as_array().unwrap();
    assert!(rows.len() >= 5, "{rows:?}");
    for row in rows {
        for key in ["median_us", "floor_us", "percent_of_floor", "gb_per_s", "copy_gb_per_s", "checked", "samples"] {
            assert!(row[key].as_f64().is_some_and(|v| v > 0.0), "{key}: {row}");
        }
        assert!(row["least_us"].as_f64() <= row["median_us"].as_f64(), "{row}");
    }
    let kept = read_rows::<KernelRow>(&csv).unwrap();
    assert_eq!(kept.len(), rows.len());
    let run = halfbyte(args(&[&ops[..], &["--compare", path]].concat()));
    let text = run.ok();
    assert!(text.contains("% floor") && text.contains("compared"), "{text}");
}

/// The rows of before are those of the file as it was, also where it takes the new ones.
#[test]
fn a_file_that_is_appended_to_is_compared_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let csv = dir.path().join("kernels.csv");
    let path = csv.to_str().unwrap();
    let run = args(&["--op", "rope_forward", "--tokens", "16", "--json", "--csv", path]);
    halfbyte(&run).ok();
    let mut rows: Vec<KernelRow> = read_rows(&csv).unwrap();
    for row in &mut rows {
        [row.median_us, row.least_us, row.most_us] = [row.median_us, row.least_us, row.most_us].map(|us| 1e6 * us);
    }
    std::fs::remove_file(&csv).unwrap();
    append(&csv, &rows).unwrap();
    let value = halfbyte([&run[..], &["--compare", path]].concat()).json();
    let pairs = value["comparison"]["pairs"].as_array().unwrap();
    assert!(pairs.len() == rows.len() && pairs.iter().all(|pair| pair["moved"] == "faster"), "{value}");
    assert_eq!(read_rows::<KernelRow>(&csv).unwrap().len(), 2 * rows.len());
}

#[test]
fn rows_that_cannot_be_compared_are_not_lost() {
    let dir = tempfile::tempdir().unwrap();
    let csv = dir.path().join("other.csv");
    append(&csv, &[KernelRow { card: "another card".into(), op: "rope_forward".into(), ..KernelRow::default() }])
        .unwrap();
    let run = args(&["--op", "rope_forward", "--tokens", "16", "--compare", csv.to_str().unwrap()]);
    let told = halfbyte([&run[..], &["--json"]].concat());
    told.fails(2, &["other.csv", "another card"]);
    let value: serde_json::Value = serde_json::from_str(&told.stdout).unwrap();
    assert!(value["rows"].as_array().is_some_and(|rows| !rows.is_empty()) && value["comparison"].is_null(), "{value}");
    let told = halfbyte(&run);
    told.fails(2, &["other.csv", "another card"]);
    assert!(told.stdout.contains("every one checked"), "{told:?}");
}

#[test]
fn without_a_gpu_it_says_so() {
    let run = halfbyte(args(&["--op", "rope_forward", "--tokens", "16"]));
    assert!(run.stderr.contains("no GPU is used"), "{}", run.stderr);
}

#[test]
fn every_op_is_listed() {
    let run = halfbyte(["bench", "kernels", "--list"]);
    let list = run.ok();
    for op in halfbyte::bench::kernels::ops::all() {
        assert!(list.contains(op.name), "{}", op.name);
    }
}

#[test]
fn what_names_no_row_is_refused() {
    halfbyte(args(&["--op", "rmsnorm"])).fails(2, &["--op", "\"rmsnorm\"", "perhaps \"rmsnorm_"]);
    halfbyte(["bench", "kernels", "--model", "70b"]).fails(2, &["--model", "70b", "7b"]);
    halfbyte(args(&["--tokens", "0"])).fails(2, &["--tokens"]);
    halfbyte(args(&["--shape", "nonsense"])).fails(2, &["--shape", "no case"]);
    halfbyte(args(&["--implementation", "magic"])).fails(2, &["--implementation", "magic", "thread"]);
    halfbyte(args(&["--op", "adamw_8bit", "--op", "bias_rows"]))
        .fails(2, &["bias_rows, adamw_8bit", "CPU backend has no"]);
    halfbyte(args(&["--compare", "/nonexistent.csv"])).fails(2, &["/nonexistent.csv"]);
    halfbyte(args(&["--csv", "/nonexistent/a.csv"])).fails(1, &["/nonexistent/a.csv", "cannot open"]);
}

/// scripts/peers appends to the tables that the program reads.
#[test]
fn the_peers_scripts_write_the_same_columns() {
    use halfbyte::bench::results::{KernelRow, StepRow, append};
    let dir = tempfile::tempdir().unwrap();
    let (kernels, steps) = (dir.path().join("kernels.csv"), dir.path().join("steps.csv"));
    append(&kernels, &[KernelRow::default()]).unwrap();
    append(&steps, &[StepRow::default()]).unwrap();
    let first = |path| std::fs::read_to_string(path).unwrap().lines().next().unwrap().to_string();
    let script = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/peers/gpu_common.py");
    let out = std::process::Command::new("python3").arg(script).arg("--columns").output().expect("python3");
    let text = String::from_utf8_lossy(&out.stdout);
    for columns in [first(kernels), first(steps)] {
        assert!(text.lines().any(|line| line.ends_with(&columns)), "{columns}\nis not in\n{text}");
    }
}
