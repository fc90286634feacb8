//! The loss mask, over the templates of `tests/fixtures/chat`, and the tokenizer's special tokens.

use std::fs;
use std::path::Path;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::jsonl::Row;
use super::mask::{Loss, Tokens, tokenize};
use super::tests::{edited, text_of, tiny};
use super::{Message, Tokenizer};
use crate::error::Result;

/// The tiny tokenizer with the special tokens and the template of a model; BOS is added by the tokenizer too, if any.
fn model(name: &str, bos: Option<&str>, eos: &str, more: &[&str]) -> Tokenizer {
    let path = format!("{}/tests/fixtures/chat/{name}.jinja", env!("CARGO_MANIFEST_DIR"));
    let template = fs::read_to_string(path).unwrap();
    with_template(&template, bos, eos, more).unwrap()
}

fn with_template(template: &str, bos: Option<&str>, eos: &str, more: &[&str]) -> Result<Tokenizer> {
    let edit = |tokenizer: &mut Value, config: &mut Value| {
        let list = tokenizer["added_tokens"].as_array_mut().unwrap();
        for token in bos.iter().chain(&[eos]).chain(more) {
            if list.iter().all(|t| t["content"] != *token) {
                let mut new = list[0].clone();
                (new["content"], new["id"]) = (json!(token), json!(251 + list.len()));
                list.push(new);
            }
        }
        let id = list.iter().find(|t| Some(t["content"].as_str().unwrap()) == bos).map(|t| t["id"].clone());
        tokenizer["post_processor"] = match (bos, id) {
            (Some(bos), Some(id)) => {
                json!({"type": "TemplateProcessing", "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "special_tokens": {bos: {"id": bos, "ids": [id], "tokens": [bos]}}})
            }
            _ => Value::Null,
        };
        (config["bos_token"], config["eos_token"]) = (json!(bos), json!(eos));
    };
    edited(edit, Some(template))
}

fn smollm2() -> Tokenizer {
    model("smollm2", None, "<|im_end|>", &[])
}

fn mistral(version: &str) -> Tokenizer {
    model(&format!("mistral-{version}"), Some("<s>"), "</s>", &["[INST]", "[/INST]"])
}

fn llama(version: &str) -> Tokenizer {
    let more = ["<|start_header_id|>", "<|end_header_id|>"];
    model(&format!("llama-{version}"), Some("<|begin_of_text|>"), "<|eot_id|>", &more)
}

fn qwen(version: &str) -> Tokenizer {
    model(&format!("qwen{version}"), None, "<|im_end|>", &[])
}

fn messages(turns: &[(&str, &str)]) -> Vec<Message> {
    turns.iter().map(|(role, content)| Message::new(*role, *content)).collect()
}

fn documents(tok: &Tokenizer, messages: &[Message]) -> Vec<Tokens> {
    let row = Row::Chat { messages: messages.to_vec(), tools: Value::Null };
    tokenize(tok, &row, Loss { completion_only: true, assistant_only: true }).unwrap()
}

fn targets(tok: &Tokenizer, doc: &Tokens) -> String {
    text_of(tok, doc.ids.iter().zip(&doc.is_target).filter(|t| *t.1).map(|t| *t.0))
}

fn whole(tok: &Tokenizer, doc: &Tokens) -> String {
    text_of(tok, doc.ids.iter().copied())
}

/// Texts that templates could trip over: white space at the ends, accents, emoji, characters of several tokens.
fn content() -> impl Strategy<Value = String> {
    prop_oneof![
        "[ \n]{0,2}[a-z the]{1,12}[ \n]{0,2}",
        "\\PC{0,12}",
        Just("日本語 🎉".to_string()),
        Just(String::new()),
        Just("e\u{301}\r\n\ttab".to_string())
    ]
}

/// Turns of user and assistant.
fn conversation() -> impl Strategy<Value = Vec<(String, String)>> {
    prop::collection::vec((content(), content()), 1..4)
}

fn flat(turns: &[(String, String)]) -> Vec<Message> {
    turns.iter().flat_map(|(q, a)| [Message::new("user", q.as_str()), Message::new("assistant", a.as_str())]).collect()
}

/// The targets of a conversation say each answer as the template writes it, and its stop token.
fn check(tok: &Tokenizer, messages: &[Message], stop: &str, written: fn(&str) -> String) {
    let docs = documents(tok, messages);
    let said: String = docs.iter().map(|d| targets(tok, d)).collect();
    let answers = messages.iter().filter(|m| m.role == "assistant");
    assert_eq!(said, answers.map(|m| written(&m.content) + stop).collect::<String>());
    for doc in &docs {
        assert!(!doc.is_target[0]);
        if let Some(bos) = tok.bos_id() {
            assert_eq!(doc.ids.iter().filter(|&&id| id as u32 == bos).count(), 1, "one BOS");
            assert_eq!(doc.ids[0] as u32, bos);
        }
    }
}

fn python_trim(s: &str) -> String {
    s.trim_matches(|c: char| c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)).to_string()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn targets_are_the_answers_and_stops_of_smollm2(turns in conversation()) {
        check(&smollm2(), &flat(&turns), "<|im_end|>", str::to_string);
    }

    #[test]
    fn targets_are_the_answers_and_stops_of_mistral(turns in conversation()) {
        check(&mistral("v0.2"), &flat(&turns), "</s>", str::to_string);
        check(&mistral("v0.3"), &flat(&turns), "</s>", |a| format!(" {}", python_trim(a)));
    }

    #[test]
    fn targets_are_the_answers_and_stops_of_llama_3(turns in conversation()) {
        check(&llama("3"), &flat(&turns), "<|eot_id|>", python_trim);
        check(&llama("3.1"), &flat(&turns), "<|eot_id|>", python_trim);
    }

    #[test]
    fn targets_are_the_answers_and_stops_of_qwen_25(turns in conversation()) {
        check(&qwen("2.5"), &flat(&turns), "<|im_end|>", str::to_string);
    }

    /// The last turn of the rendering up to an answer has an empty thought, earlier ones have none.
    #[test]
    fn targets_are_what_qwen_3_would_say(turns in conversation()) {
        let written = |a: &str| format!("<think>\n\n</think>\n\n{}", a.trim_start_matches('\n'));
        check(&qwen("3"), &flat(&turns), "<|im_end|>", written);
    }

    /// Mistral 0.3 writes the system prompt into the last user turn, and nowhere once that is answered.
    #[test]
    fn mistral_answers_keep_the_system_prompt_they_had(turns in conversation(), system in content()) {
        let tok = mistral("v0.3");
        let mut all = flat(&turns);
        all.insert(0, Message::new("system", system));
        check(&tok, &all, "</s>", |a| format!(" {}", python_trim(a)));
        let docs = documents(&tok, &all);
        prop_assert_eq!(docs.len(), turns.len());
        for (i, doc) in docs.iter().enumerate() {
            let prompt = tok.render_chat(&all[..2 * i + 2], true).unwrap();
            prop_assert!(whole(&tok, doc).starts_with(&prompt));
        }
    }
}

#[test]
fn system_prompts_stay_in_the_context() {
    let all = messages(&[("system", "Sys"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]);
    for (tok, stop) in [(smollm2(), "<|im_end|>"), (llama("3.1"), "<|eot_id|>"), (qwen("2.5"), "<|im_end|>")] {
        let docs = documents(&tok, &all);
        assert_eq!(docs.len(), 1);
        assert_eq!(targets(&tok, &docs[0]), format!("b{stop}d{stop}"));
        assert_eq!(whole(&tok, &docs[0]), tok.render_chat(&all, false).unwrap());
    }
}

#[test]
fn the_context_of_an_answer_is_the_prompt_it_would_be_asked_with() {
    let tok = qwen("3");
    let all =
        messages(&[("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "<think>\nhm\n</think>\n\nd")]);
    let docs = documents(&tok, &all);
    assert_eq!(docs.len(), 2, "the thought of an earlier turn is not in the later rendering");
    assert_eq!(targets(&tok, &docs[0]), "<think>\n\n</think>\n\nb<|im_end|>");
    assert_eq!(targets(&tok, &docs[1]), "<think>\nhm\n</think>\n\nd<|im_end|>");
    let prompt = tok.render_chat(&all[..3], true).unwrap();
    assert_eq!(whole(&tok, &docs[1]), format!("{prompt}<think>\nhm\n</think>\n\nd<|im_end|>\n"));
}

#[test]
fn a_cut_prompt_ends_at_the_message_that_was_asked_though_others_read_alike() {
    let tok = mistral("v0.3");
    let turns = [("system", "a"), ("user", "a\n\n"), ("assistant", "b"), ("user", ""), ("assistant", "b")];
    let docs = documents(&tok, &messages(&turns));
    assert_eq!(docs.iter().map(|d| targets(&tok, d)).collect::<Vec<_>>(), [" b</s>", " b</s>"]);
    assert_eq!(whole(&tok, &docs[1]), "<s>[INST] a\n\n[/INST] b</s>[INST] a\n\n[/INST] b</s>");
}

/// As SentencePiece models are stored: a space is "▁", one is put before each text, unknown characters become bytes.
fn sentencepiece(template: &str) -> Tokenizer {
    let edit = |tokenizer: &mut Value, config: &mut Value| {
        let mut words =
            vec!["<unk>".to_string(), "<s>".into(), "</s>".into(), "<|im_start|>".into(), "<|im_end|>".into()];
        words.extend((0..=255).map(|b| format!("<0x{b:02X}>")));
        words.extend(["▁", "t", "h", "e", "▁t", "he", "▁the"].map(String::from));
        let vocab: serde_json::Map<_, _> = words.iter().enumerate().map(|(i, w)| (w.clone(), json!(i))).collect();
        tokenizer["model"] = json!({"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false, "vocab": vocab,
            "merges": [["▁", "t"], ["h", "e"], ["▁t", "he"]]});
        tokenizer["pre_tokenizer"] = Value::Null;
        tokenizer["normalizer"] = json!({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]});
        tokenizer["decoder"] = json!({"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"}]});
        config["add_bos_token"] = json!(true);
    };
    edited(edit, Some(template)).unwrap()
}

#[test]
fn targets_are_exact_with_sentencepiece_tokens() {
    let template = |space: &str| {
        format!(
            "{{{{ bos_token }}}}{{% for m in messages %}}{{% if m.role == 'user' %}}[INST] {{{{ m.content }}}}[/INST]\
                 {{% else %}}{space}{{{{ m.content }}}}</s>{{% endif %}}{{% endfor %}}"
        )
    };
    let all = messages(&[("user", "the"), ("assistant", "the é the"), ("user", "日"), ("assistant", "日")]);
    for space in ["", " "] {
        let tok = sentencepiece(&template(space));
        let docs = documents(&tok, &all);
        assert_eq!(docs.len(), 1);
        assert_eq!(targets(&tok, &docs[0]), format!("{space}the é the</s>{space}日</s>"));
        assert_eq!(docs[0].ids.iter().filter(|&&t| t == 1).count(), 1);
    }
    // The answer after a special token: the space put before a text belongs to it.
    let tok = sentencepiece("{% for m in messages %}{{ m.content }}</s>{% endfor %}");
    let docs = documents(&tok, &messages(&[("user", "the"), ("assistant", "the")]));
    assert_eq!(targets(&tok, &docs[0]), " the</s>");
}

#[test]
fn ids_beyond_the_embedding_are_refused_wherever_they_are_written() {
    let beyond = |tokenizer: &mut Value, _: &mut Value| {
        tokenizer["post_processor"]["special_tokens"]["<s>"]["ids"] = json!([999])
    };
    let e = edited(beyond, None).unwrap_err().to_string();
    assert!(e.contains("tokenizer.json: post_processor: found id 999, expected ids below 300"), "{e}");
}

#[test]
fn a_generation_prompt_that_goes_on_differently_is_cut_where_they_part() {
    let template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}\
                    {% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}";
    let tok = with_template(template, None, "<|im_end|>", &[]).unwrap();
    for answer in ["b", "<div>", "<think>\nx"] {
        let docs = documents(&tok, &messages(&[("user", "a"), ("assistant", answer)]));
        let said = targets(&tok, &docs[0]);
        assert_eq!(said, format!("{}<|im_end|>", if answer.starts_with("<think>") { "x" } else { answer }));
    }
}

/// Targets of two answers, by template. EOS of the tokenizer is </s>.
fn two_answers(template: &str, more: &[&str]) -> Vec<String> {
    let tok = with_template(template, None, "</s>", more).unwrap();
    let all = messages(&[("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four")]);
    documents(&tok, &all).iter().map(|d| targets(&tok, d)).collect()
}

#[test]
fn an_answer_that_is_closed_once_something_follows_is_closed() {
    let last_open = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% if not loop.last or add_generation_prompt %}\
                     <|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
    assert_eq!(two_answers(last_open, &[]), ["two<|im_end|>four<|im_end|>"]);
    let by_next_role = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}";
    assert_eq!(two_answers(by_next_role, &["<|user|>", "<|assistant|>"]), ["two<|user|>four<|user|>"]);
}

#[test]
fn a_header_behind_the_stop_token_is_no_target() {
    let always_asking = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}{{ '<|im_start|>assistant\n' }}";
    assert_eq!(two_answers(always_asking, &[]), ["two<|im_end|>", "four<|im_end|>"]);
}

#[test]
fn a_declared_stop_token_comes_before_other_special_tokens() {
    let wrapped = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|END|><|im_end|></s>\n{% endfor %}\
                   {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
    assert_eq!(two_answers(wrapped, &["<|END|>"]), ["two<|END|><|im_end|></s>four<|END|><|im_end|></s>"]);
}

#[test]
fn a_generation_prompt_with_other_white_space_is_no_target() {
    let spaced = "{% for m in messages %}\n\n### {{ m.role }}:\n{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}\n### assistant:\n{% endif %}";
    assert_eq!(two_answers(spaced, &[]), ["two</s>four</s>"]);
}

#[test]
fn a_call_of_a_tool_counts_to_its_stop_token() {
    let tok = model("mistral-v0.3", Some("<s>"), "</s>", &["[INST]", "[/INST]", "[TOOL_CALLS]"]);
    let mut all = messages(&[("user", "a"), ("assistant", "")]);
    all[1].extra.insert("content".into(), Value::Null);
    all[1].extra.insert("tool_calls".into(), json!([{"id": "abcdef123", "function": {"name": "f", "arguments": {}}}]));
    let said = targets(&tok, &documents(&tok, &all)[0]);
    assert_eq!(said, "[TOOL_CALLS] [{\"name\": \"f\", \"arguments\": {}, \"id\": \"abcdef123\"}]</s>");
}

#[test]
fn an_answer_that_reads_like_its_stop_token_counts_whole() {
    for answer in ["end", "im_end|>", "<|im_end|>", "a</s>b", "x y z"] {
        let docs = documents(&tiny(), &messages(&[("user", "a"), ("assistant", answer)]));
        assert_eq!(targets(&tiny(), &docs[0]), format!("{answer}<|im_end|>"));
    }
}

#[test]
fn an_answer_before_any_question_counts() {
    for tok in [smollm2(), qwen("2.5"), llama("3")] {
        let docs = documents(&tok, &messages(&[("assistant", "hello"), ("user", "a"), ("assistant", "b")]));
        let stop = tok.decode(&tok.stop_ids()[..1], false).unwrap();
        assert!(targets(&tok, &docs[0]).ends_with(&format!("hello{stop}b{stop}")), "{}", targets(&tok, &docs[0]));
    }
}

fn fault(tok: &Tokenizer, turns: &[(&str, &str)]) -> String {
    let row = Row::Chat { messages: messages(turns), tools: Value::Null };
    let fault = tokenize(tok, &row, Loss { completion_only: true, assistant_only: true }).unwrap_err();
    fault.into_error(Path::new("d.jsonl"), 3).to_string()
}

#[test]
fn a_conversation_the_template_refuses_is_named() {
    let message = fault(&mistral("v0.2"), &[("user", "a"), ("user", "b")]);
    assert!(message.starts_with("d.jsonl: line 3: found Conversation roles must alternate"), "{message}");
}

#[test]
fn a_template_that_does_not_close_its_answers_is_an_error() {
    let template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}";
    let tok = with_template(template, None, "</s>", &[]).unwrap();
    let message = fault(&tok, &[("user", "a"), ("assistant", "bye")]);
    assert!(
        message.contains("line 3: found an answer that ends in \"bye\\n\", expected a chat template that closes"),
        "{message}"
    );
}

#[test]
fn a_template_that_hides_the_conversation_is_an_error() {
    let template =
        "{% if add_generation_prompt %}[{{ messages|length }}]{% else %}{{ messages[-1].content }}</s>{% endif %}";
    let tok = with_template(template, None, "</s>", &[]).unwrap();
    let message = fault(&tok, &[("user", "a"), ("assistant", "b")]);
    assert!(
        message.contains("line 3, messages[1]: found an answer that the chat template does not lay behind"),
        "{message}"
    );
}

#[test]
fn messages_without_a_template_and_broken_templates_are_errors() {
    let none = edited(|_, config| config["chat_template"] = Value::Null, None).unwrap();
    assert!(!none.has_chat_template());
    assert!(fault(&none, &[("user", "a")]).contains("found no chat template in"));
    let broken = edited(|_, _| {}, Some("{% for %}")).unwrap();
    assert!(fault(&broken, &[("user", "a")]).contains("a chat template that does not compile: syntax error"));
    assert!(broken.render_chat(&[], true).unwrap_err().to_string().contains("chat_template.jinja: chat_template"));
}

#[test]
fn tools_of_a_row_reach_the_template() {
    let tok = qwen("2.5");
    let tools = json!([{"type": "function", "function": {"name": "f"}}]);
    let row = Row::Chat { messages: messages(&[("user", "a"), ("assistant", "b")]), tools };
    let docs = tokenize(&tok, &row, Loss { completion_only: true, assistant_only: true }).unwrap();
    assert!(
        whole(&tok, &docs[0]).contains("<tools>\n{\"type\": \"function\", \"function\": {\"name\": \"f\"}}\n</tools>")
    );
    assert_eq!(targets(&tok, &docs[0]), "b<|im_end|>");
}

#[test]
fn stops_are_eos_and_what_closes_an_answer() {
    assert_eq!(tiny().stop_ids(), [2, 4]);
    assert_eq!(smollm2().stop_ids(), [4]);
    assert_eq!((tiny().bos_id(), tiny().eos_id(), tiny().pad_id()), (Some(1), Some(2), None));
}

#[test]
fn encoding_adds_one_bos_and_decoding_gives_the_text_back() {
    let tok = tiny();
    assert_eq!(tok.encode("the", true).unwrap()[0], 1);
    assert_eq!(tok.encode("<s>the", true).unwrap(), tok.encode("the", true).unwrap());
    assert_eq!(tok.encode("the", false).unwrap(), tok.encode("the", true).unwrap()[1..]);
    let text = "Hé 日本 🎉 \n\ttab";
    assert_eq!(tok.decode(&tok.encode(text, true).unwrap(), true).unwrap(), text);
    let chat = [Message::new("user", "hi")];
    let ids = tok.encode_chat(&chat).unwrap();
    assert_eq!(tok.decode(&ids, false).unwrap(), tok.render_chat(&chat, true).unwrap());
    let off = edited(|_, config| config["add_bos_token"] = json!(false), None).unwrap();
    assert_eq!(off.encode("the", true).unwrap(), off.encode("the", false).unwrap());
    let on = edited(
        |tokenizer, config| {
            tokenizer["post_processor"] = Value::Null;
            config["add_bos_token"] = json!(true);
        },
        None,
    );
    assert_eq!(on.unwrap().encode("the", true).unwrap(), tok.encode("the", true).unwrap());
}

#[test]
fn a_template_without_bos_gets_the_one_of_the_tokenizer() {
    let tok = edited(|_, _| {}, Some("{% for m in messages %}{{ m.role }} {{ m.content }}</s>{% endfor %}")).unwrap();
    let docs = documents(&tok, &messages(&[("user", "a"), ("assistant", "b")]));
    assert_eq!(whole(&tok, &docs[0]), "<s>user a</s>assistant b</s>");
}

#[test]
fn templates_are_found_where_transformers_finds_them() {
    let chat = [Message::new("user", "hi")];
    let list = json!([{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "from the list"}]);
    let tok = edited(|_, config| config["chat_template"] = list.clone(), None).unwrap();
    assert_eq!(tok.render_chat(&chat, false).unwrap(), "from the list");
    let tok = edited(|_, config| config["chat_template"] = list.clone(), Some("from the file")).unwrap();
    assert_eq!(tok.render_chat(&chat, false).unwrap(), "from the file");
    for bad in [json!([{"name": "rag", "template": "x"}]), json!([1]), json!(5)] {
        let e = edited(|_, config| config["chat_template"] = bad.clone(), None).unwrap_err();
        assert!(e.to_string().contains("tokenizer_config.json: chat_template: found"), "{e}");
    }
}

#[test]
fn special_tokens_may_be_objects_and_must_be_in_the_vocabulary() {
    let tok =
        edited(|_, config| config["eos_token"] = json!({"content": "<|im_end|>", "lstrip": false}), None).unwrap();
    assert_eq!(tok.eos_id(), Some(4));
    let e = edited(|_, config| config["eos_token"] = json!("<absent>"), None).unwrap_err();
    assert!(e.to_string().contains("tokenizer_config.json: eos_token: found \"<absent>\""), "{e}");
    assert!(edited(|_, config| config["eos_token"] = json!(5), None).is_err());
}

#[test]
fn a_vocabulary_larger_than_the_embedding_is_an_error() {
    let dir = format!("{}/tests/fixtures/tiny-tokenizer", env!("CARGO_MANIFEST_DIR"));
    let e = Tokenizer::open(Path::new(&dir), 255).unwrap_err();
    assert_eq!(e.exit_code(), 2);
    assert!(e.to_string().contains("tokenizer.json: token \"Ġa\": found id 255, expected ids below 255"), "{e}");
}

#[test]
fn missing_and_malformed_tokenizers_are_errors() {
    let dir = tempfile::tempdir().unwrap();
    let e = Tokenizer::open(dir.path(), 256).unwrap_err().to_string();
    assert!(e.contains("tokenizer.json: cannot open"), "{e}");
    fs::write(dir.path().join("tokenizer.json"), "{\"model\": 5}").unwrap();
    let e = Tokenizer::open(dir.path(), 256).unwrap_err().to_string();
    assert!(e.contains("tokenizer.json: whole file: found"), "{e}");
    let tiny = format!("{}/tests/fixtures/tiny-tokenizer/tokenizer.json", env!("CARGO_MANIFEST_DIR"));
    fs::copy(tiny, dir.path().join("tokenizer.json")).unwrap();
    assert_eq!(Tokenizer::open(dir.path(), 256).unwrap().eos_id(), None, "the other files may be missing");
    fs::write(dir.path().join("tokenizer_config.json"), "{\"eos_token\"").unwrap();
    let e = Tokenizer::open(dir.path(), 256).unwrap_err().to_string();
    assert!(e.contains("tokenizer_config.json: line 1: found"), "{e}");
}

#[test]
fn eos_may_come_from_generation_config() {
    let dir = tempfile::tempdir().unwrap();
    let tiny = format!("{}/tests/fixtures/tiny-tokenizer/tokenizer.json", env!("CARGO_MANIFEST_DIR"));
    fs::copy(tiny, dir.path().join("tokenizer.json")).unwrap();
    fs::write(dir.path().join("generation_config.json"), "{\"eos_token_id\": [2, 4]}").unwrap();
    let tok = Tokenizer::open(dir.path(), 256).unwrap();
    assert_eq!((tok.eos_id(), tok.stop_ids()), (Some(2), vec![2, 4]));
}
