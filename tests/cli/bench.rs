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

const KERNELS: &str = "op,shape,tokens,implementation,median_us,card,commit\n\
    rope,16x4096,16,own,12.5,Card A,be25cad\n\
    rope,16x4096,16,own,11.5,Card A,be25cad\n";
const STEPS: &str = "card,shape,batch,length,tokens_per_second,gradient_checkpointing\n\
    Card A,mistral-7b,1,512,8228.573,true\n";

#[test]
fn a_report_is_one_page_of_any_results() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    let (kernels, steps, page) = (at("kernels.csv"), at("steps.csv"), at("report.html"));
    std::fs::write(&kernels, KERNELS).unwrap();
    std::fs::write(&steps, STEPS).unwrap();
    let report = ["bench", "report", &kernels, &steps, "--out", &page];
    let said = halfbyte(report).ok().to_string();
    let html = std::fs::read_to_string(&page).unwrap();
    for part in [page.as_str(), "kernels  1 rows", "steps    1 rows", "bytes"] {
        assert!(said.contains(part), "{part:?} is not in {said}");
    }
    assert!(html.contains("8,229 tokens/s"));
    let local = html.replace("http://www.w3.org/2000/svg", "");
    assert!(!local.contains("http://") && !local.contains("https://"));
    // An older page is replaced.
    halfbyte(report).ok();
    assert_eq!(std::fs::read_to_string(&page).unwrap(), html);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 3, "nothing lies beside the page");
}

#[test]
fn a_report_that_would_destroy_or_mean_nothing_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    let (steps, other, page) = (at("steps.csv"), at("other.csv"), at("report.html"));
    std::fs::write(&steps, STEPS).unwrap();
    std::fs::write(&other, "a,b\n1,2\n").unwrap();
    let report = |input: &str, out: &str| halfbyte(["bench", "report", input, "--out", out]);
    report(&other, &page).fails(2, &["other.csv", "line 1", "columns a,b", "expected"]);
    report(&at("none.csv"), &page).fails(2, &["none.csv", "cannot read"]);
    report(&steps, &steps).fails(2, &["--out", "one of the inputs"]);
    report(&steps, &at("./steps.csv")).fails(2, &["--out", "one of the inputs"]);
    report(&steps, dir.path().to_str().unwrap()).fails(2, &["--out", "a directory"]);
    report(&steps, "/dev/null").fails(2, &["--out", "no regular file"]);
    report(&steps, &at("none/report.html")).fails(1, &["none/report.html", "cannot write"]);
    std::fs::write(&other, STEPS.lines().next().unwrap()).unwrap();
    report(&other, &page).fails(2, &["other.csv", "no rows"]);
    std::fs::write(&other, STEPS.replace("8228.573", "fast")).unwrap();
    report(&other, &page).fails(2, &["other.csv", "line 2"]);
    halfbyte(["bench", "report", "--out", &page]).fails(2, &["RESULTS.csv"]);
    halfbyte(["bench", "report", &steps]).fails(2, &["--out"]);
    assert!(!std::path::Path::new(&page).exists());
    assert_eq!(std::fs::read_to_string(&steps).unwrap(), STEPS);
}
