//! `halfbyte bench compare` and scripts/bench-gate.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use halfbyte::bench::results::{KernelRow, append};

use crate::{Place, Run, args, finish, halfbyte};

fn row(op: &str, us: f64) -> KernelRow {
    KernelRow {
        tool: "halfbyte".into(),
        card: "H100".into(),
        op: op.into(),
        implementation: "own".into(),
        median_us: us,
        least_us: us * 0.99,
        most_us: us * 1.01,
        ..KernelRow::default()
    }
}

/// A file with a row for each op; `copy` is always the same.
fn file(place: &Place, name: &str, ops: &[(&str, f64)]) -> PathBuf {
    let path = place.path(name);
    fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
    let rows: Vec<KernelRow> = [("copy", 5.0)].iter().chain(ops).map(|(op, us)| row(op, *us)).collect();
    append(&path, &rows).expect("rows");
    path
}

#[test]
fn moved_rows_are_shown_and_all_on_request() {
    let place = Place::empty();
    let old = file(&place, "old.csv", &[("gemm", 10.0), ("rope", 4.0), ("gone", 1.0)]);
    let new = file(&place, "new.csv", &[("gemm", 12.0), ("rope", 3.0), ("born", 1.0)]);
    let compare = args!["bench", "compare", old, new];
    let run = halfbyte(&compare);
    for part in [
        "kernels: halfbyte, own, H100",
        "gemm    10.00    12.00    1.200  slower",
        "0.750  faster",
        "3 rows compared, 1 slower, 1 faster",
        "1 row only in",
        "gone",
        "born",
    ] {
        assert!(run.ok().contains(part), "{part}: {run:#?}");
    }
    assert!(!run.stdout.contains("copy"), "{run:#?}");
    assert!(halfbyte([&compare[..], &args!["--all"]].concat()).ok().contains("copy"));
    let value = halfbyte([&compare[..], &args!["--json"]].concat()).json();
    assert_eq!((&value["slower"], &value["faster"]), (&1.into(), &1.into()), "{value}");
    let pair = &value["comparison"]["pairs"][1];
    assert_eq!((&pair["key"]["op"], &pair["moved"]), (&"gemm".into(), &"slower".into()), "{value}");
    // A file with itself.
    assert!(halfbyte(args!["bench", "compare", old, old]).ok().contains("4 rows compared, 0 slower, 0 faster"));
}

#[test]
fn the_gate_ends_with_3_unless_the_op_is_allowed() {
    let place = Place::empty();
    let old = file(&place, "old.csv", &[("gemm", 10.0), ("rope", 4.0)]);
    let new = file(&place, "new.csv", &[("gemm", 12.0), ("rope", 5.0)]);
    let gate = |more: &[&str]| {
        halfbyte([&args!["bench", "compare", old, new][..], &more.iter().map(Into::into).collect::<Vec<_>>()].concat())
    };
    gate(&["--gate", "5"]).fails(3, &["new.csv", "5 %: 2", "gemm"]);
    gate(&["--gate", "5", "--json"]).fails(3, &["5 %: 2"]);
    gate(&["--gate", "21"]).fails(3, &["%: 1", "rope"]);
    gate(&["--gate", "30"]).ok();
    gate(&["--gate", "5", "--allow", "rope"]).fails(3, &["%: 1", "gemm"]);
    gate(&["--gate", "5", "--allow", "rope", "--allow", "gemm"]).ok();
    gate(&["--gate", "5", "--allow", "rop"]).fails(2, &["--allow", "\"rop\"", "copy, gemm, rope"]);
    gate(&["--allow", "rope"]).fails(2, &["--gate"]);
    for wrong in ["-1", "NaN", "five"] {
        gate(&[&format!("--gate={wrong}")]).fails(2, &["--gate", "at least 0"]);
    }
}

#[test]
fn what_cannot_be_compared_is_refused() {
    let place = Place::empty();
    let old = file(&place, "old.csv", &[]);
    let other = place.path("other.csv");
    append(&other, &[KernelRow { card: "A100".into(), ..row("copy", 5.0) }]).expect("a row");
    halfbyte(args!["bench", "compare", old, other]).fails(2, &["other.csv", "A100", "H100", "old.csv"]);
    let decode = place.write("decode.csv", "shape,past,tokens_per_second\nmistral-7b,512,200\n");
    halfbyte(args!["bench", "compare", old, decode]).fails(2, &["decode.csv", "decode", "kernels"]);
    halfbyte(args!["bench", "compare", old, place.path("none.csv")]).fails(2, &["none.csv", "cannot read"]);
    let cut = place.write("cut.csv", "op,implementation,median_us\ncopy,dri");
    halfbyte(args!["bench", "compare", old, cut]).fails(2, &["cut.csv", "line 2", "2 cells"]);
    // A row is not measured in vain.
    let step = args!["bench", "step", "--shape", "tiny", "--length", "64", "--device", "cpu", "--csv", old];
    halfbyte(step).fails(2, &["old.csv", "line 1", "steps"]);
    halfbyte(args!["bench", "decode", "--shape", "tiny", "--csv", place.path(".")]).fails(2, &["a directory"]);
}

/// scripts/bench-gate of a folder of its own, with this build's program.
fn gate(place: &Place, new: &Path, more: &[&str]) -> Run {
    let scripts = place.path("scripts");
    fs::create_dir_all(&scripts).expect("a folder");
    let script = scripts.join("bench-gate");
    fs::copy(Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/bench-gate"), &script).expect("a copy");
    let mut c = Command::new("bash");
    c.arg(script).arg(new).arg(env!("CARGO_BIN_EXE_halfbyte")).args(more).stdin(Stdio::null());
    finish(c)
}

#[test]
fn the_script_takes_the_last_kept_results_of_the_same_kind() {
    let place = Place::empty();
    let new = file(&place, "new.csv", &[("gemm", 12.0)]);
    let none = gate(&place, &new, &[]);
    assert_eq!(none.code, Some(2), "{none:#?}");
    assert!(none.stderr.contains("no earlier results"), "{none:#?}");

    file(&place, "bench/results/2026-01-01-h100-kernels.csv", &[("gemm", 5.0)]);
    file(&place, "bench/results/2026-02-01-h100-kernels.csv", &[("gemm", 10.0)]);
    place.write("bench/results/2026-03-01-decode.csv", "shape,past,tokens_per_second\nmistral-7b,512,200\n");
    place.write("bench/results/2026-04-01-other.csv", "a,b\n1,2\n");
    let run = gate(&place, &new, &[]);
    assert_eq!(run.code, Some(3), "{run:#?}");
    assert!(run.stdout.contains("baseline: ") && run.stdout.contains("2026-02-01-h100-kernels.csv"), "{run:#?}");
    gate(&place, &new, &["--percent", "25"]).ok();
    gate(&place, &new, &["--allow", "gemm"]).ok();
    // Kept itself, a file is held against the one before it.
    let kept = file(&place, "bench/results/2026-05-01-kernels.csv", &[("gemm", 10.0)]);
    let run = gate(&place, &kept, &[]);
    assert!(run.ok().contains("2026-02-01-h100-kernels.csv"), "{run:#?}");

    for (new, more, part) in [
        (place.path("none.csv"), &[][..], "none.csv"),
        (new.clone(), &["--percent"], "--percent"),
        (new.clone(), &["--fast"], "--fast"),
        (new, &["a", "b"], "4 arguments"),
    ] {
        let run = gate(&place, &new, more);
        assert!(run.code == Some(2) && run.stderr.contains(part), "{part}: {run:#?}");
    }
}
