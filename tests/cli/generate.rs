//! `halfbyte generate`.

use std::process::Stdio;

use crate::{Place, args, command, fixtures, halfbyte, with_stdin};

#[test]
fn greedy_text_is_the_same_every_time_and_json_says_how_it_went() {
    let place = Place::with("tiny-mistral");
    let base = args!["generate", "--model", place.model(), "--max-new-tokens", "12"];
    let run = halfbyte([&base[..], &args!["--prompt", "hello"]].concat());
    let text = run.ok().to_string();
    assert!(run.stderr.contains("tok/s"), "{run:#?}");
    assert_eq!(with_stdin(base.clone(), "hello\n").ok(), text, "the prompt may come from standard input");
    let json = halfbyte([&base[..], &args!["--prompt", "hello", "--json"]].concat()).json();
    assert_eq!(json["prompt"], "hello");
    assert_eq!(json["text"].as_str().map(|t| t.trim_end_matches('\n')), Some(text.trim_end_matches('\n')));
    let made = json["tokens"].as_array().expect("tokens").len();
    assert!((1..=12).contains(&made), "{json}");
    assert!(json["prompt_tokens"].as_u64().is_some_and(|n| n > 0));
}

#[test]
fn sampling_follows_the_seed() {
    let place = Place::with("tiny-mistral");
    let text = |seed: &str| {
        let a = args!["generate", "--model", place.model(), "--prompt", "x", "--temperature", "1.5", "--top-k", "50"];
        halfbyte([&a[..], &args!["--top-p", "0.9", "--seed", seed, "--max-new-tokens", "24"]].concat()).ok().to_string()
    };
    assert_eq!(text("1"), text("1"));
    assert_ne!(text("1"), text("2"));
}

#[test]
fn an_adapter_changes_the_text() {
    let place = Place::with("tiny-mistral");
    let base = args!["generate", "--model", place.model(), "--prompt", "hello", "--max-new-tokens", "16"];
    let with = halfbyte([&base[..], &args!["--adapter", place.adapter()]].concat());
    assert_ne!(halfbyte(base.clone()).ok(), with.ok());
}

#[test]
fn a_chat_uses_the_template() {
    let place = Place::with("tiny-mistral");
    let base = args!["generate", "--model", place.model(), "--prompt", "hello", "--max-new-tokens", "4", "--json"];
    let plain = halfbyte(base.clone()).json();
    let chat = halfbyte([&base[..], &args!["--chat"]].concat()).json();
    let system = halfbyte([&base[..], &args!["--chat", "--system", "Be brief."]].concat()).json();
    let tokens = |j: &serde_json::Value| j["prompt_tokens"].as_u64().expect("a count");
    assert!(tokens(&plain) < tokens(&chat) && tokens(&chat) < tokens(&system), "{plain} {chat} {system}");
    halfbyte([&base[..], &args!["--system", "x"]].concat()).fails(2, &["--chat"]);
}

#[test]
fn bad_input_is_named() {
    let place = Place::with("tiny-mistral");
    let generate = |more: &[std::ffi::OsString]| halfbyte([&args!["generate", "--prompt", "x"][..], more].concat());
    generate(&args!["--model", place.path("none")]).fails(2, &["none", "No such file"]);
    generate(&args!["--model", fixtures().join("tiny-mistral")]).fails(2, &["tokenizer.json", "No such file"]);
    generate(&args!["--model", place.model(), "--temperature", "-1"]).fails(2, &["--temperature"]);
    generate(&args!["--model", place.model(), "--top-p", "0"]).fails(2, &["--top-p", "found 0"]);
    generate(&args!["--model", place.model(), "--max-new-tokens", "0"]).fails(2, &["--max-new-tokens", "at least 1"]);
    generate(&args!["--model", place.model(), "--adapter", place.model()]).fails(2, &["adapter_config.json"]);
    let other = place.adapter_of_another_model();
    generate(&args!["--model", place.model(), "--adapter", other]).fails(2, &["another model"]);
    generate(&args!["--model", place.model(), "--device", "cuda"]).fails(2, &["--device cuda", "not available"]);
    let mut c = command(args!["generate", "--model", place.model()]);
    c.stdin(Stdio::from(std::fs::File::open(place.write("bad", b"\xff\xfe")).expect("a file")));
    crate::finish(c).fails(2, &["standard input", "UTF-8"]);
}
