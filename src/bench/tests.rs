//! Files of results, and two of them against each other.

use std::fs;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use tempfile::TempDir;

use super::compare::{Comparison, Move, compare};
use super::results::{
    DecodeRow, KernelRow, LoadRow, Row, StepOpRow, StepRow, Table, append, can_append, figure, read, read_rows,
};
use crate::error::Error;

fn place() -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rows.csv");
    (dir, path)
}

#[track_caller]
fn refused(error: &Error, path: &Path, parts: &[&str]) {
    let text = error.to_string();
    assert_eq!(error.exit_code(), 2, "{text}");
    assert!(text.contains(path.to_str().unwrap()), "{text}");
    for part in parts {
        assert!(text.contains(part), "{part:?} is not in {text}");
    }
}

/// Whatever a cell can hold: separators, quotes, line ends, signs of a spreadsheet, nothing.
fn odd_text() -> impl Strategy<Value = String> {
    prop_oneof![
        ".{0,12}",
        "[ ,;\"'\r\n\t=#\\\\]{0,6}",
        Just(String::new()),
        Just("NaN".to_string()),
        Just("5".to_string()),
        Just(" padded ".to_string()),
        Just("µ, \"quoted\"\nand broken".to_string()),
    ]
}

prop_compose! {
    fn kernel_row()(
        texts in prop::collection::vec(odd_text(), 9),
        mhz in prop::option::of(any::<u32>()),
        tokens in prop::option::of(any::<usize>()),
        samples in any::<usize>(),
        values in prop::array::uniform12(prop::num::f64::NORMAL | prop::num::f64::ZERO),
    ) -> KernelRow {
        let [date, tool, commit, card, driver, model, op, shape, implementation] = texts.try_into().unwrap();
        let [median_us, least_us, most_us, bytes, flops, gb_per_s, tflop_per_s, copy_gb_per_s, product_tflop_per_s,
            floor_us, percent_of_floor, _] = values;
        KernelRow {
            date, tool, commit, card, driver, sm_mhz: mhz, memory_mhz: mhz.map(|m| m / 2), model, op, shape, tokens,
            implementation, samples, median_us, least_us, most_us, bytes, flops, gb_per_s, tflop_per_s, copy_gb_per_s,
            product_tflop_per_s, floor_us, percent_of_floor, checked: samples / 3,
            launches: tokens, registers: mhz, local_bytes: mhz, shared_bytes: mhz, occupancy: mhz.map(|_| least_us),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn rows_with_odd_cells_come_back_as_they_were(rows in prop::collection::vec(kernel_row(), 1..4)) {
        let (_dir, path) = place();
        for row in &rows {
            can_append::<KernelRow>(&path).unwrap();
            append(&path, std::slice::from_ref(row)).unwrap();
        }
        prop_assert_eq!(read_rows::<KernelRow>(&path).unwrap(), rows.clone());
        prop_assert_eq!(read(&path).unwrap(), Table::Kernels(rows));
    }

    #[test]
    fn a_file_cut_off_anywhere_is_appended_to_only_where_a_row_ends(row in kernel_row(), cut in 0.0..1.0) {
        let (_dir, path) = place();
        append(&path, &[row.clone(), row.clone()]).unwrap();
        let whole = fs::read(&path).unwrap();
        let kept = &whole[..(whole.len() as f64 * cut) as usize];
        fs::write(&path, kept).unwrap();
        match append(&path, std::slice::from_ref(&row)) {
            Ok(()) => prop_assert_eq!(read_rows::<KernelRow>(&path).unwrap().pop(), Some(row)),
            Err(_) => prop_assert_eq!(fs::read(&path).unwrap(), kept),
        }
    }

    #[test]
    fn figures_keep_six_digits(value in prop::num::f64::NORMAL) {
        let kept = figure(value);
        prop_assert!(((kept - value) / value).abs() <= 5.1e-6 || !kept.is_finite(), "{} {}", value, kept);
        prop_assert_eq!(figure(kept), kept);
    }
}

/// A row of each kind survives, and tells its kind.
#[test]
fn every_kind_of_table_is_told_from_the_others() {
    fn round<R: Row + PartialEq + std::fmt::Debug + Clone>(wrap: fn(Vec<R>) -> Table) -> (TempDir, PathBuf) {
        let (dir, path) = place();
        append(&path, &[R::default()]).unwrap();
        assert_eq!(read(&path).unwrap(), wrap(vec![R::default()]), "{}", R::TABLE);
        (dir, path)
    }
    let (_k, kernels) = round(Table::Kernels);
    round(Table::Steps);
    round(Table::StepOps);
    round(Table::Decode);
    round(Table::Load);
    let before = fs::read(&kernels).unwrap();
    for error in [
        append(&kernels, &[StepRow::default()]).unwrap_err(),
        can_append::<StepOpRow>(&kernels).unwrap_err(),
        can_append::<DecodeRow>(&kernels).unwrap_err(),
        read_rows::<LoadRow>(&kernels).unwrap_err(),
    ] {
        refused(&error, &kernels, &["line 1", "implementation"]);
    }
    assert_eq!(fs::read(&kernels).unwrap(), before);
}

#[test]
fn files_of_earlier_versions_read_and_are_not_appended_to() {
    let (_dir, path) = place();
    let text = "commit,card,op,shape,implementation,median_us,least_us,most_us,percent_of_copy\n\
                be25cad,H100,copy,8x8,driver,3.5,3,4,100.0\n";
    fs::write(&path, text).unwrap();
    let expected = KernelRow {
        commit: "be25cad".into(),
        card: "H100".into(),
        op: "copy".into(),
        shape: "8x8".into(),
        implementation: "driver".into(),
        median_us: 3.5,
        least_us: 3.0,
        most_us: 4.0,
        ..KernelRow::default()
    };
    assert_eq!(read(&path).unwrap(), Table::Kernels(vec![expected]));
    refused(&can_append::<KernelRow>(&path).unwrap_err(), &path, &["line 1", "percent_of_copy", "columns date,tool"]);
    assert_eq!(fs::read_to_string(&path).unwrap(), text);
}

#[test]
fn a_file_that_ends_in_mid_line_is_refused_and_left_alone() {
    let (_dir, path) = place();
    append(&path, &[DecodeRow::default()]).unwrap();
    let whole = fs::read_to_string(&path).unwrap();
    let cut = &whole[..whole.len() - 4];
    fs::write(&path, cut).unwrap();
    refused(&can_append::<DecodeRow>(&path).unwrap_err(), &path, &["last line", "cut off"]);
    refused(&append(&path, &[DecodeRow::default()]).unwrap_err(), &path, &["last line", "cut off"]);
    assert_eq!(fs::read_to_string(&path).unwrap(), cut);
    let broken = DecodeRow { shape: "two\nlines".into(), ..DecodeRow::default() };
    append(&path, std::slice::from_ref(&broken)).unwrap_err();
    fs::remove_file(&path).unwrap();
    append(&path, &[broken]).unwrap();
    let whole = fs::read_to_string(&path).unwrap();
    fs::write(&path, &whole[..whole.find("two\n").unwrap() + 4]).unwrap();
    refused(&append(&path, &[DecodeRow::default()]).unwrap_err(), &path, &["line 2", "cells under"]);
}

#[test]
fn what_is_no_table_is_refused() {
    let (dir, path) = place();
    refused(&read(dir.path()).unwrap_err(), dir.path(), &["a directory"]);
    refused(&can_append::<StepRow>(dir.path()).unwrap_err(), dir.path(), &["a directory"]);
    refused(&append(dir.path(), &[StepRow::default()]).unwrap_err(), dir.path(), &["a directory"]);
    let null = Path::new("/dev/null");
    refused(&can_append::<StepRow>(null).unwrap_err(), null, &["no regular file"]);
    refused(&read(&path).unwrap_err(), &path, &["cannot read"]);
    for (text, parts) in [
        ("", &["line 1"][..]),
        ("a,b\n1,2\n", &["line 1", "a,b"]),
        ("op,implementation,median_us\ncopy,driver\n", &["line 2", "2 cells", "3 columns"]),
        ("op,implementation,median_us\ncopy,driver,fast\n", &["line 2", "\"median_us\"", "\"fast\""]),
    ] {
        fs::write(&path, text).unwrap();
        refused(&read(&path).unwrap_err(), &path, parts);
    }
    fs::write(&path, b"op,implementation,median_us\n\xff,a,1\n").unwrap();
    refused(&read(&path).unwrap_err(), &path, &["UTF-8"]);
}

#[test]
fn asking_leaves_no_file_behind() {
    let (dir, path) = place();
    can_append::<StepRow>(&path).unwrap();
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    fs::write(&path, "").unwrap();
    can_append::<StepRow>(&path).unwrap();
    append(&path, &[StepRow::default()]).unwrap();
    assert_eq!(read_rows::<StepRow>(&path).unwrap().len(), 1, "an empty file gets its line of names");
}

#[test]
fn all_results_that_are_kept_can_be_read() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("bench/results");
    let mut read_ones = 0;
    for entry in fs::read_dir(&dir).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if ["steps", "step-ops", "decode", "load", "kernels"].iter().any(|kind| name.contains(kind)) {
            let rows = match read(&path).unwrap_or_else(|e| panic!("{e}")) {
                Table::Kernels(rows) => rows.len(),
                Table::Steps(rows) => rows.len(),
                Table::StepOps(rows) => rows.len(),
                Table::Decode(rows) => rows.len(),
                Table::Load(rows) => rows.len(),
            };
            assert!(rows > 0, "{name}");
            read_ones += 1;
        }
    }
    assert!(read_ones >= 4, "{read_ones}");
}

fn kernel(op: &str, median_us: f64, least_us: f64, most_us: f64) -> KernelRow {
    KernelRow {
        tool: "halfbyte".into(),
        card: "H100".into(),
        op: op.into(),
        shape: "8192x4096".into(),
        implementation: "own".into(),
        median_us,
        least_us,
        most_us,
        ..KernelRow::default()
    }
}

fn compared<R: Row>(old: &[R], new: &[R]) -> Result<Comparison, Error> {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (dir.path().join("old.csv"), dir.path().join("new.csv"));
    append(&a, old).unwrap();
    append(&b, new).unwrap();
    compare(&a, &b)
}

#[test]
fn a_row_has_moved_when_its_samples_lie_apart() {
    let old = [
        kernel("slower", 10.0, 9.0, 11.0),
        kernel("touches", 10.0, 9.0, 11.0),
        kernel("faster", 10.0, 9.0, 11.0),
        kernel("gone", 10.0, 9.0, 11.0),
        kernel("no spread", 10.0, 0.0, 0.0),
    ];
    let new = [
        kernel("new", 1.0, 1.0, 1.0),
        kernel("faster", 8.0, 7.0, 8.9),
        kernel("touches", 12.0, 11.0, 13.0),
        kernel("slower", 12.0, 11.1, 13.0),
        kernel("no spread", 10.4, 0.0, 0.0),
    ];
    let found = compared(&old, &new).unwrap();
    let moves: Vec<_> = found.pairs.iter().map(|p| (p.key.op(), p.moved)).collect();
    let expected =
        [("faster", Some(Move::Faster)), ("touches", None), ("slower", Some(Move::Slower)), ("no spread", None)];
    assert_eq!(moves, expected);
    assert!((found.pairs[2].ratio - 1.2).abs() < 1e-12);
    assert_eq!((found.count(Move::Slower), found.count(Move::Faster)), (1, 1));
    assert_eq!((found.only_old.len(), found.only_old[0].op()), (1, "gone"));
    assert_eq!((found.only_new.len(), found.only_new[0].op()), (1, "new"));
    assert_eq!(found.pairs[0].key.name(|c| found.is_constant(c)), "faster");
}

#[test]
fn the_gate_wants_both_the_spread_and_the_per_cent() {
    let old = [kernel("a", 10.0, 9.9, 10.1), kernel("b", 10.0, 5.0, 15.0), kernel("c", 10.0, 9.9, 10.1)];
    let new = [kernel("a", 11.0, 10.9, 11.1), kernel("b", 14.0, 13.0, 20.0), kernel("c", 10.3, 10.2, 10.4)];
    let found = compared(&old, &new).unwrap();
    let ops = |percent: f64, allow: &[&str]| -> Vec<String> {
        let allow: Vec<String> = allow.iter().map(ToString::to_string).collect();
        found.regressions(percent, &allow).iter().map(|p| p.key.op().to_string()).collect()
    };
    assert_eq!(ops(0.0, &[]), ["a", "c"], "b's samples overlap");
    assert_eq!(ops(5.0, &[]), ["a"]);
    assert_eq!(ops(11.0, &[]), [""; 0]);
    assert_eq!(ops(0.0, &["a"]), ["c"]);
    assert_eq!(ops(0.0, &["a", "c"]), [""; 0]);
}

#[test]
fn versions_commits_and_earlier_rows_of_a_key_do_not_count() {
    let with = |tool: &str, commit: &str, us: f64| KernelRow {
        tool: tool.into(),
        commit: commit.into(),
        ..kernel("a", us, us, us)
    };
    let old = [with("bitsandbytes 0.50.2", "1", 10.0), with("", "1", 3.0)];
    let new = [with("bitsandbytes 0.51", "2", 99.0), with("halfbyte", "2", 3.0), with("bitsandbytes 0.51", "3", 20.0)];
    let found = compared(&old, &new).unwrap();
    assert_eq!(found.pairs.iter().map(|p| p.ratio).collect::<Vec<_>>(), [2.0, 1.0]);
    assert!(found.only_old.is_empty() && found.only_new.is_empty());
}

#[test]
fn steps_of_other_settings_and_loads_by_phase_are_rows_of_their_own() {
    let step = |length: usize, ms: f64| StepRow { length, ms, ms_min: ms, ms_max: ms, ..StepRow::default() };
    let found = compared(&[step(512, 1.0), step(2048, 2.0)], &[step(2048, 3.0)]).unwrap();
    assert_eq!((found.pairs.len(), found.only_old.len(), found.pairs[0].moved), (1, 1, Some(Move::Slower)));
    let op = |op: &str, op_ms: f64| StepOpRow { op: op.into(), op_ms, ..StepOpRow::default() };
    let found = compared(&[op("a", 1.0), op("b", 2.0)], &[op("a", 1.2), op("b", 2.1)]).unwrap();
    assert_eq!(found.pairs.iter().map(|p| p.moved).collect::<Vec<_>>(), [Some(Move::Slower), None]);
    let load = |cold_seconds, warm_seconds| LoadRow { cold_seconds, warm_seconds, ..LoadRow::default() };
    let found = compared(&[load(10.0, 2.0)], &[load(10.0, 1.0)]).unwrap();
    assert_eq!(found.pairs.iter().map(|p| p.moved).collect::<Vec<_>>(), [None, Some(Move::Faster)]);
    let decode = |past, ms| DecodeRow { past, ms, ms_min: ms, ms_max: ms, ..DecodeRow::default() };
    assert_eq!(compared(&[decode(1, 1.0)], &[decode(1, 1.0), decode(2, 1.0)]).unwrap().only_new.len(), 1);
}

#[test]
fn files_without_a_row_in_common_say_what_differs() {
    let other = KernelRow { card: "A100".into(), ..kernel("a", 1.0, 1.0, 1.0) };
    let error = compared(&[kernel("a", 1.0, 1.0, 1.0)], &[other]).unwrap_err();
    assert_eq!(error.exit_code(), 2);
    let text = error.to_string();
    assert!(text.contains("card \"A100\"") && text.contains("card \"H100\"") && text.contains("new.csv"), "{text}");
    let text = compared(&[kernel("a", 1.0, 1.0, 1.0)], &[kernel("b", 1.0, 1.0, 1.0)]).unwrap_err().to_string();
    assert!(text.contains("op \"b\"") && text.contains("op \"a\""), "{text}");
    let (dir, path) = place();
    let names = dir.path().join("names.csv");
    fs::write(&names, "op,implementation,median_us\n").unwrap();
    refused(&compare(&names, &names).unwrap_err(), &names, &["0 rows of kernels"]);
    append(&path, &[DecodeRow::default()]).unwrap();
    let kernels = Path::new(env!("CARGO_MANIFEST_DIR")).join("bench/results/2026-11-24-h100-kernels.csv");
    refused(&compare(&kernels, &path).unwrap_err(), &path, &["a table of decode", "a table of kernels"]);
}
