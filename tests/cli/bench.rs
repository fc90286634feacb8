//! `halfbyte bench`.

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
