//! Whole loads over the tiny tokenizer of `tests/fixtures`. The loss mask has tests of its own in `tests_mask.rs`.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::sync::Mutex;

use serde_json::{Value, json};

use super::*;

const FIXTURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures");

pub(super) fn tiny() -> Tokenizer {
    Tokenizer::open(&Path::new(FIXTURES).join("tiny-tokenizer"), 256).unwrap()
}

/// The tiny tokenizer after `edit` changed tokenizer.json and tokenizer_config.json, with a template if given.
pub(super) fn edited(edit: impl Fn(&mut Value, &mut Value), template: Option<&str>) -> Result<Tokenizer> {
    let dir = tempfile::tempdir().unwrap();
    let read = |name: &str| fs::read(format!("{FIXTURES}/tiny-tokenizer/{name}")).unwrap();
    let mut tokenizer: Value = serde_json::from_slice(&read("tokenizer.json")).unwrap();
    let mut config: Value = serde_json::from_slice(&read("tokenizer_config.json")).unwrap();
    edit(&mut tokenizer, &mut config);
    fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    if let Some(template) = template {
        fs::write(dir.path().join("chat_template.jinja"), template).unwrap();
    }
    Tokenizer::open(dir.path(), 300)
}

/// A folder with data files.
struct Files {
    dir: tempfile::TempDir,
    opts: DataOptions,
}

fn files(contents: &[&str]) -> Files {
    let dir = tempfile::tempdir().unwrap();
    let mut opts = DataOptions { max_length: 512, ..DataOptions::default() };
    for (i, text) in contents.iter().enumerate() {
        let path = dir.path().join(format!("{i}.jsonl"));
        fs::write(&path, text).unwrap();
        opts.files.push(path);
    }
    Files { dir, opts }
}

fn load_tiny(f: &Files) -> Result<Dataset> {
    load(&tiny(), &f.opts, &|_, _| {})
}

fn error_of(contents: &[&str]) -> String {
    let e = load_tiny(&files(contents)).unwrap_err();
    assert_eq!(e.exit_code(), 2, "{e}");
    e.to_string()
}

pub(super) fn text_of(tok: &Tokenizer, ids: impl Iterator<Item = i32>) -> String {
    tok.decode(&ids.map(|id| id as u32).collect::<Vec<_>>(), false).unwrap()
}

fn whole(doc: &Document) -> String {
    text_of(&tiny(), doc.tokens.iter().copied())
}

fn targets(doc: &Document) -> String {
    text_of(&tiny(), doc.tokens.iter().zip(&doc.is_target).filter(|t| *t.1).map(|t| *t.0))
}

const CHAT: &str = r#"{"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi é"}, {"role": "assistant", "content": "the 日本 an"}, {"role": "user", "content": "more"}, {"role": "assistant", "content": "no"}]}"#;
const CHAT_TEXT: &str = "<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi é<|im_end|>\n<|im_start|>assistant\n\
                         the 日本 an<|im_end|>\n<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\nno<|im_end|>\n";

#[test]
fn answers_and_their_stop_tokens_are_the_targets() {
    let data = load_tiny(&files(&[CHAT])).unwrap();
    assert_eq!(whole(&data.documents[0]), CHAT_TEXT);
    assert_eq!(targets(&data.documents[0]), "the 日本 an<|im_end|>no<|im_end|>");
    assert_eq!(data.documents[0].tokens.iter().filter(|&&t| t == 1).count(), 1, "one BOS, though both add it");
}

#[test]
fn without_assistant_only_loss_everything_behind_the_first_token_counts() {
    let mut f = files(&[CHAT]);
    f.opts.assistant_only_loss = false;
    assert_eq!(targets(&load_tiny(&f).unwrap().documents[0]), CHAT_TEXT.strip_prefix("<s>").unwrap());
}

#[test]
fn a_text_has_one_bos_one_eos_and_counts_whole() {
    let data = load_tiny(&files(&["{\"text\": \"the end\"}\n{\"text\": \"<s>marked</s>\"}\n"])).unwrap();
    assert_eq!(whole(&data.documents[0]), "<s>the end</s>");
    assert_eq!(targets(&data.documents[0]), "the end</s>");
    assert_eq!(whole(&data.documents[1]), "<s>marked</s>");
    assert_eq!((data.documents[1].file, data.documents[1].line), (0, 2));
}

#[test]
fn a_completion_counts_with_its_eos() {
    let mut f = files(&[r#"{"prompt": "Q: a\nA: ", "completion": "yes é"}"#]);
    let doc = &load_tiny(&f).unwrap().documents[0];
    assert_eq!((whole(doc).as_str(), targets(doc).as_str()), ("<s>Q: a\nA: yes é</s>", "yes é</s>"));
    f.opts.completion_only_loss = false;
    assert_eq!(targets(&load_tiny(&f).unwrap().documents[0]), "Q: a\nA: yes é</s>");
}

#[test]
fn a_token_across_prompt_and_completion_counts() {
    let doc = &load_tiny(&files(&[r#"{"prompt": "h", "completion": "e!"}"#])).unwrap().documents[0];
    assert_eq!(doc.tokens.len(), 4, "<s> he ! </s>");
    assert_eq!(targets(doc), "he!</s>");
}

#[test]
fn a_completion_of_messages_counts_its_answers() {
    let row = r#"{"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}],
        "completion": [{"role": "assistant", "content": "d"}]}"#
        .replace('\n', "");
    let mut f = files(&[&row]);
    assert_eq!(targets(&load_tiny(&f).unwrap().documents[0]), "d<|im_end|>");
    f.opts.completion_only_loss = false;
    assert!(targets(&load_tiny(&f).unwrap().documents[0]).starts_with("<|im_start|>user\na"));
}

#[test]
fn rows_without_targets_are_named_and_left_out() {
    let no_answer = r#"{"messages": [{"role": "user", "content": "a"}]}"#;
    let data = load_tiny(&files(&[&format!("{CHAT}\n\n{no_answer}\n")])).unwrap();
    assert_eq!((data.stats.rows, data.stats.documents), (2, 1));
    assert_eq!(data.stats.without_targets, [RowName { file: 0, line: 3 }]);
    let summary = data.summary().join("\n");
    assert!(summary.contains("1 rows without targets left out: ") && summary.contains("0.jsonl:3"), "{summary}");
}

#[test]
fn data_without_any_target_is_an_error_that_names_rows() {
    let message = error_of(&["{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}]}\n"]);
    assert!(message.contains("0.jsonl: all 1 rows") && message.contains("0.jsonl:1"), "{message}");
    error_of(&["{\"text\": \"\"}"]);
    error_of(&[r#"{"prompt": "a", "completion": ""}"#]);
}

#[test]
fn files_without_rows_missing_files_and_folders_are_errors() {
    assert!(error_of(&[""]).contains("0.jsonl: whole file: found no rows"));
    assert!(error_of(&["{\"text\": \"a\"}", "\n \n\r\n"]).contains("1.jsonl: whole file: found no rows"));
    let mut f = files(&[]);
    assert!(load_tiny(&f).unwrap_err().to_string().contains("data: found no file"));
    f.opts.files = vec![f.dir.path().join("absent.jsonl")];
    assert!(load_tiny(&f).unwrap_err().to_string().contains("absent.jsonl: cannot open"));
    f.opts.files = vec![f.dir.path().into()];
    assert_eq!(load_tiny(&f).unwrap_err().exit_code(), 2);
}

#[test]
fn bad_rows_are_named_by_file_and_line() {
    let good = "{\"text\": \"a\"}\n";
    let message = error_of(&[good, &format!("{good}\n{{\"text\": \"b\n")]);
    assert!(message.contains("1.jsonl: line 3, column 11: found malformed JSON"), "{message}");
    let message = error_of(&[&format!("{good}{CHAT}\n")]);
    assert!(
        message.contains("0.jsonl: line 2: found a row with `messages`, expected `text` as in line 1"),
        "{message}"
    );
    // The first bad row is the one told, however many threads read.
    let many = format!("{}{{}}\n{}[]\n", good.repeat(1500), good.repeat(1500));
    assert!(error_of(&[&many]).contains("line 1501: "));
    let f = files(&[]);
    let path = f.dir.path().join("latin1.jsonl");
    fs::write(&path, b"{\"text\": \"caf\xe9\"}\n").unwrap();
    let opts = DataOptions { files: vec![path], ..f.opts };
    let message = load(&tiny(), &opts, &|_, _| {}).unwrap_err().to_string();
    assert!(message.contains("latin1.jsonl: line 1, byte 14: found byte 0xe9"), "{message}");
}

#[test]
fn kinds_may_differ_between_files() {
    let data = load_tiny(&files(&["{\"text\": \"a\"}", CHAT])).unwrap();
    assert_eq!(data.documents.iter().map(|d| d.file).collect::<Vec<_>>(), [0, 1]);
}

#[test]
fn a_long_row_follows_overlong() {
    let row = r#"{"prompt": "0123456789", "completion": "abcdefghij"}"#;
    let mut f = files(&[&format!("{row}\n{{\"prompt\": \"a\", \"completion\": \"b\"}}\n")]);
    f.opts.max_length = 8;
    let message = load_tiny(&f).unwrap_err().to_string();
    assert!(message.contains("0.jsonl: line 1: found 22 tokens, expected at most 8 (max_length)"), "{message}");

    f.opts.overlong = Overlong::Drop;
    let data = load_tiny(&f).unwrap();
    assert_eq!((data.documents.len(), data.stats.dropped, data.stats.lengths.max), (1, 1, 22));

    f.opts.overlong = Overlong::Truncate;
    let data = load_tiny(&f).unwrap();
    assert_eq!((data.documents.len(), data.stats.truncated, data.stats.cut_without_targets), (1, 1, 1));

    f.opts.overlong = Overlong::Split;
    let data = load_tiny(&f).unwrap();
    assert_eq!((data.stats.split, data.stats.cut_without_targets), (1, 1));
    let pieces: Vec<&Document> = data.documents.iter().filter(|d| d.line == 1).collect();
    assert!(pieces.iter().all(|d| d.tokens.len() <= 8 && !d.is_target[0]));
    assert_eq!(pieces.iter().map(|d| targets(d)).collect::<String>(), "abcdefghij</s>", "no target is lost");
    assert_eq!(data.stats.targets, 11 + 2);
}

#[test]
fn max_length_must_hold_a_token_and_its_target() {
    let mut f = files(&[CHAT]);
    f.opts.max_length = 1;
    assert!(load_tiny(&f).unwrap_err().to_string().contains("max_length: found 1"));
}

#[test]
fn progress_rises_to_the_size_of_the_files() {
    let f = files(&[CHAT, &"{\"text\": \"a\"}\n".repeat(3000)]);
    let seen = Mutex::new(Vec::new());
    load(&tiny(), &f.opts, &|done, total| seen.lock().unwrap().push((done, total))).unwrap();
    let seen = seen.into_inner().unwrap();
    let total: u64 = f.opts.files.iter().map(|p| fs::metadata(p).unwrap().len()).sum();
    assert!(seen.len() > 4 && seen.is_sorted() && seen.iter().all(|s| s.1 == total), "{seen:?}");
    assert_eq!(seen.last(), Some(&(total, total)));
}

#[test]
fn the_cache_gives_the_same_documents() {
    let mut f = files(&[&format!("{CHAT}\n{}", r#"{"messages": [{"role": "user", "content": "a"}]}"#)]);
    let plain = load_tiny(&f).unwrap();
    f.opts.cache_dir = Some(f.dir.path().join("cache"));
    let first = load_tiny(&f).unwrap();
    assert_eq!((plain.stats.cache.clone(), first.stats.cache.clone()), (Cache::Off, Cache::Written));
    let second = load_tiny(&f).unwrap();
    assert_eq!(second.stats, Stats { cache: Cache::Hit, ..plain.stats });
    assert_eq!((&first.documents, &second.documents), (&plain.documents, &plain.documents));
}

#[test]
fn the_cache_is_named_by_all_that_decides_its_contents() {
    let f = files(&[CHAT, CHAT]);
    let dir = Path::new("c");
    let base = DataOptions { files: vec![f.opts.files[0].clone()], ..f.opts.clone() };
    let edit = |change: fn(&mut DataOptions)| {
        let mut opts = base.clone();
        change(&mut opts);
        cache::path(dir, &tiny(), &opts).unwrap()
    };
    let other_template = edited(|_, _| {}, Some("{{ messages[0].content }}")).unwrap();
    let other_eos = edited(|_, config| config["eos_token"] = json!("<|im_end|>"), None).unwrap();
    let names: BTreeSet<_> = [
        edit(|_| {}),
        edit(|o| o.max_length += 1),
        edit(|o| o.overlong = Overlong::Split),
        edit(|o| o.completion_only_loss = false),
        edit(|o| o.assistant_only_loss = false),
        cache::path(dir, &tiny(), &f.opts).unwrap(),
        cache::path(dir, &other_template, &base).unwrap(),
        cache::path(dir, &other_eos, &base).unwrap(),
    ]
    .into();
    assert_eq!(names.len(), 8);
    let before = edit(|_| {});
    fs::write(&base.files[0], format!("{CHAT} ")).unwrap();
    assert_ne!(edit(|_| {}), before, "one byte of data more");
}

#[test]
fn a_damaged_cache_is_ignored_and_written_anew() {
    let mut f = files(&[CHAT]);
    f.opts.cache_dir = Some(f.dir.path().join("cache"));
    let first = load_tiny(&f).unwrap();
    let path = cache::path(f.opts.cache_dir.as_deref().unwrap(), &tiny(), &f.opts).unwrap();
    let good = fs::read(&path).unwrap();
    for damage in 0..good.len() {
        let mut bad = good.clone();
        bad[damage] ^= 1;
        fs::write(&path, &bad).unwrap();
        assert!(cache::read(&path).is_none(), "byte {damage}");
    }
    fs::write(&path, &good[..good.len() - 1]).unwrap();
    let again = load_tiny(&f).unwrap();
    assert_eq!((&again.documents, again.stats.cache), (&first.documents, Cache::Written));
    assert_eq!(fs::read(&path).unwrap(), good);
}

#[test]
fn a_cache_that_cannot_be_written_does_not_stop_the_run() {
    let mut f = files(&[CHAT]);
    f.opts.cache_dir = Some(f.opts.files[0].join("below a file"));
    let data = load_tiny(&f).unwrap();
    assert!(matches!(&data.stats.cache, Cache::Failed(why) if why.contains("below a file")), "{:?}", data.stats.cache);
    assert!(data.summary().join("\n").contains("token cache not written"));
}

/// Rows of which every second one is cut into pieces.
fn many() -> Dataset {
    let rows: String = (0..40).map(|i| format!("{{\"text\": \"{}\"}}\n", "x".repeat(1 + i % 2 * 20))).collect();
    let mut f = files(&[&rows]);
    f.opts.max_length = 8;
    f.opts.overlong = Overlong::Split;
    load_tiny(&f).unwrap()
}

#[test]
fn a_split_parts_rows_not_pieces() {
    let data = many();
    let lines = |d: &Dataset| d.documents.iter().map(|d| d.line).collect::<BTreeSet<_>>();
    let (train, eval) = split(data.clone(), EvalSize::Fraction(0.2), 7).unwrap();
    assert_eq!((lines(&train).len(), lines(&eval).len()), (32, 8));
    assert!(lines(&train).is_disjoint(&lines(&eval)));
    assert_eq!(train.documents.len() + eval.documents.len(), data.documents.len());
    assert_eq!(train.stats.tokens + eval.stats.tokens, data.stats.tokens);
    assert_eq!((train.stats.rows, eval.stats.rows), (32, 8));
    let again = split(data.clone(), EvalSize::Rows(8), 7).unwrap();
    assert_eq!(again.1.documents, eval.documents, "the seed decides");
    assert_ne!(split(data, EvalSize::Rows(8), 8).unwrap().1.documents, eval.documents);
}

#[test]
fn a_split_that_leaves_a_part_empty_is_an_error() {
    for size in [EvalSize::Rows(0), EvalSize::Rows(40), EvalSize::Fraction(0.0), EvalSize::Fraction(1.0)] {
        assert_eq!(split(many(), size, 0).unwrap_err().exit_code(), 2, "{size:?}");
    }
    assert_eq!(split(many(), EvalSize::Fraction(1e-6), 0).unwrap().1.stats.rows, 1, "at least one row");
    assert!(split(many(), EvalSize::Fraction(f64::NAN), 0).is_err());
}

#[test]
fn a_preview_marks_the_targets() {
    let data = load_tiny(&files(&[CHAT])).unwrap();
    let shown = preview(&tiny(), &data.documents[0], false).unwrap();
    let marked =
        CHAT_TEXT.replace("the 日本 an<|im_end|>", "⟦the 日本 an<|im_end|>⟧").replace("no<|im_end|>", "⟦no<|im_end|>⟧");
    assert_eq!(shown, marked);
    let coloured = preview(&tiny(), &data.documents[0], true).unwrap();
    assert!(coloured.contains("\x1b[32mno<|im_end|>\x1b[0m") && !coloured.contains('⟦'));
    let long = load_tiny(&files(&[&format!("{{\"text\": \"{}\"}}", "xyz".repeat(120))])).unwrap();
    let shown = preview(&tiny(), &long.documents[0], false).unwrap();
    assert!(shown.contains("…(201 more tokens)…") && shown.ends_with("</s>⟧"), "{shown}");
}

#[test]
fn a_device_or_a_folder_as_data_is_refused_before_it_is_read() {
    for path in ["/dev/zero", "/"] {
        let opts = DataOptions { files: vec![path.into()], max_length: 512, ..DataOptions::default() };
        let e = load(&tiny(), &opts, &|_, _| {}).map(|_| ()).unwrap_err();
        assert!(e.exit_code() == 2 && e.to_string().contains("no regular file"), "{e}");
    }
}
