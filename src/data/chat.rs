//! Chat templates, run as transformers runs them (`apply_chat_template`): Jinja2 with `trim_blocks`, `lstrip_blocks`,
//! loop controls, Python's string and dict methods, and transformers' own `raise_exception`, `strftime_now`, `tojson`.

use std::fmt::Write as _;
use std::sync::LazyLock;

use chrono::{DateTime, Local};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Rest, Serde, Value};
use minijinja::{AutoEscape, Environment, Error as JinjaError, ErrorKind, State};
use regex::Regex;
use serde_json::{Map, Value as Json};

use super::pyjson;
use super::tokenizer::Message;

const NAME: &str = "chat_template";

/// A compiled chat template.
#[derive(Debug)]
pub struct ChatTemplate {
    env: Environment<'static>,
    source: String,
    /// bos_token, eos_token and the like, as the template sees them.
    tokens: Map<String, Json>,
}

/// What a rendering may vary besides the messages.
#[derive(Clone, Debug, Default)]
pub struct RenderOptions {
    pub add_generation_prompt: bool,
    /// Tool schemas, or null.
    pub tools: Json,
}

impl ChatTemplate {
    /// Compiles `source`. `tokens` are the special tokens by name, `now` the clock of `strftime_now`.
    /// The error is the message of the template engine.
    pub fn new(source: &str, tokens: Map<String, Json>, now: fn() -> DateTime<Local>) -> Result<Self, String> {
        let mut env = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        env.set_syntax(syntax.map_err(|e| describe(&e))?);
        env.set_auto_escape_callback(|_| AutoEscape::None);
        env.set_unknown_method_callback(method);
        env.add_function("raise_exception", |message: String| -> Result<Value, JinjaError> {
            Err(JinjaError::new(ErrorKind::InvalidOperation, message))
        });
        env.add_function("strftime_now", move |format: &str| -> Result<String, JinjaError> {
            let mut out = String::new();
            write!(out, "{}", now().format(format)).map_err(|_| {
                JinjaError::new(ErrorKind::InvalidOperation, format!("strftime_now: unknown format {format:?}"))
            })?;
            Ok(out)
        });
        env.add_filter("tojson", tojson);
        env.add_filter("trim", |v: Value, chars: Option<&str>| strip(&v.to_string(), chars, true, true).to_string());
        // None is not iterable in Python; templates tell "no tools" by that.
        env.add_test("iterable", |v: &Value| v.as_str().is_some() || (!v.is_none() && v.try_iter().is_ok()));
        // Jinja2 reads every line end as "\n".
        let lines = source.replace("\r\n", "\n").replace('\r', "\n");
        let compiled = GENERATION.replace_all(&lines, |c: &regex::Captures<'_>| {
            let tag = if &c[2] == "generation" { "if true" } else { "endif" };
            format!("{{%{} {tag} {}%}}", &c[1], &c[3])
        });
        env.add_template_owned(NAME, compiled.into_owned()).map_err(|e| describe(&e))?;
        Ok(Self { env, source: source.into(), tokens })
    }

    /// The template's text.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Whether two renderings of one conversation may differ by the day.
    pub fn reads_clock(&self) -> bool {
        self.source.contains("strftime_now")
    }

    /// The text of a conversation. The error is the template's own (`raise_exception`) or the engine's message.
    pub fn render(&self, messages: &[Message], options: &RenderOptions) -> Result<String, String> {
        let messages: Vec<Json> = messages.iter().map(message_value).collect();
        let mut context = self.tokens.clone();
        context.insert("messages".into(), Json::Array(messages));
        context.insert("tools".into(), options.tools.clone());
        context.insert("documents".into(), Json::Null);
        context.insert("add_generation_prompt".into(), Json::Bool(options.add_generation_prompt));
        let template = self.env.get_template(NAME).map_err(|e| describe(&e))?;
        template.render(Value::from(Serde(&context))).map_err(|e| describe(&e))
    }
}

/// transformers' `{% generation %}` marks the assistant's text; it prints its body, as `{% if true %}` does.
static GENERATION: LazyLock<Regex> =
    LazyLock::new(|| Regex::new(r"\{%([-+]?)\s*(generation|endgeneration)\s*([-+]?)%\}").expect("a constant pattern"));

fn message_value(m: &Message) -> Json {
    let mut map = Map::new();
    map.insert("role".into(), Json::String(m.role.clone()));
    map.insert("content".into(), Json::String(m.content.clone()));
    map.extend(m.extra.iter().map(|(k, v)| (k.clone(), v.clone())));
    // transformers hands reasoning to the template under the names that templates read.
    let reasoning =
        ["reasoning_content", "thinking", "reasoning"].iter().find_map(|k| map.get(*k).filter(|v| !v.is_null()));
    if let Some(reasoning) = reasoning.cloned() {
        map.entry("thinking").or_insert_with(|| reasoning.clone());
        map.insert("reasoning_content".into(), reasoning);
    }
    Json::Object(map)
}

fn describe(e: &JinjaError) -> String {
    let line = e.line().map(|l| format!(" (line {l} of the template)")).unwrap_or_default();
    match (e.kind(), e.detail()) {
        (ErrorKind::InvalidOperation, Some(detail)) => format!("{detail}{line}"),
        (kind, Some(detail)) => format!("{kind}: {detail}{line}"),
        (kind, None) => format!("{kind}{line}"),
    }
}

/// `x|tojson(ensure_ascii=false, indent=none, separators=none, sort_keys=false)`: json.dumps, without HTML escapes.
fn tojson(value: Value, positional: Rest<Value>, kwargs: Kwargs) -> Result<Value, JinjaError> {
    let bad = |what: String| JinjaError::new(ErrorKind::InvalidOperation, format!("tojson: {what}"));
    if value.is_undefined() {
        return Err(bad("an undefined value is not JSON".into()));
    }
    let argument = |i: usize, name: &str| -> Result<Value, JinjaError> {
        let keyword: Option<Value> = kwargs.get(name)?;
        Ok(keyword.or_else(|| positional.get(i).cloned()).unwrap_or(Value::from(())))
    };
    let [ascii, indent, separators, sort] =
        [argument(0, "ensure_ascii")?, argument(1, "indent")?, argument(2, "separators")?, argument(3, "sort_keys")?];
    kwargs.assert_all_used()?;
    let indent = if indent.is_none() {
        None
    } else if let Some(s) = indent.as_str() {
        Some(s.to_string())
    } else {
        let n = indent.as_i64().ok_or_else(|| bad(format!("indent {indent}")))?;
        Some(" ".repeat(n.clamp(0, 64) as usize))
    };
    let separators = if separators.is_none() {
        None
    } else {
        let parts: Vec<Value> = separators.try_iter()?.collect();
        match parts.as_slice() {
            [item, key] => Some((item.to_string(), key.to_string())),
            _ => return Err(bad("separators must be a pair".into())),
        }
    };
    let json = serde_json::to_value(&value).map_err(|e| bad(e.to_string()))?;
    let style = pyjson::Style { ensure_ascii: ascii.is_true(), indent, separators, sort_keys: sort.is_true() };
    Ok(Value::from(pyjson::dumps(&json, &style)))
}

/// What str.strip() takes away: Unicode white space and the four separators that Rust does not count.
fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}

fn strip<'a>(mut s: &'a str, chars: Option<&str>, left: bool, right: bool) -> &'a str {
    let gone = |c: char| chars.map_or_else(|| is_space(c), |set| set.contains(c));
    if left {
        s = s.trim_start_matches(gone);
    }
    if right {
        s = s.trim_end_matches(gone);
    }
    s
}

/// Python's methods: those of minijinja-contrib, and the few it lacks or does otherwise.
fn method(state: &mut State<'_, '_>, value: &Value, name: &str, args: &[Value]) -> Result<Value, JinjaError> {
    use minijinja::value::from_args;
    if let Some(s) = value.as_str() {
        match name {
            "strip" | "lstrip" | "rstrip" => {
                let (chars,): (Option<&str>,) = from_args(args)?;
                return Ok(Value::from(strip(s, chars, name != "rstrip", name != "lstrip")));
            }
            "removeprefix" => {
                let (p,): (&str,) = from_args(args)?;
                return Ok(Value::from(s.strip_prefix(p).unwrap_or(s)));
            }
            "removesuffix" => {
                let (p,): (&str,) = from_args(args)?;
                return Ok(Value::from(s.strip_suffix(p).unwrap_or(s)));
            }
            "partition" | "rpartition" => {
                let (sep,): (&str,) = from_args(args)?;
                let (cut, missing) =
                    if name == "partition" { (s.split_once(sep), (s, "")) } else { (s.rsplit_once(sep), ("", s)) };
                let (a, b) = cut.unwrap_or(missing);
                let middle = if cut.is_some() { sep } else { "" };
                return Ok(Value::from((a, middle, b)));
            }
            "rsplit" => {
                let (sep, max): (Option<&str>, Option<i64>) = from_args(args)?;
                let pieces = max.and_then(|m| usize::try_from(m).ok()).map_or(usize::MAX, |m| m.saturating_add(1));
                let mut parts: Vec<&str> = match sep {
                    Some(sep) => s.rsplitn(pieces, sep).collect(),
                    None => rsplit_spaces(s, pieces),
                };
                parts.reverse();
                return Ok(parts.into_iter().map(Value::from).collect());
            }
            _ => {}
        }
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args)
}

/// The words of `s` from the right, at most `pieces`; the last one keeps its inner spaces.
fn rsplit_spaces(s: &str, pieces: usize) -> Vec<&str> {
    let (mut rest, mut out) = (strip(s, None, true, true), Vec::new());
    while !rest.is_empty() {
        match rest.rfind(is_space).filter(|_| out.len() + 1 < pieces) {
            Some(at) => {
                let width = rest[at..].chars().next().map_or(1, char::len_utf8);
                out.push(&rest[at + width..]);
                rest = strip(&rest[..at], None, false, true);
            }
            None => {
                out.push(rest);
                break;
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use chrono::TimeZone as _;
    use serde::Deserialize;

    use super::*;

    /// What scripts/make-chat-fixtures wrote.
    #[derive(Deserialize)]
    struct Fixture {
        tokens: Map<String, Json>,
        cases: Vec<Case>,
    }

    #[derive(Deserialize)]
    struct Case {
        name: String,
        messages: Vec<Map<String, Json>>,
        tools: Json,
        add_generation_prompt: bool,
        expected: Option<String>,
        error: Option<String>,
    }

    /// `NOW` of the script.
    fn clock() -> DateTime<Local> {
        Local.with_ymd_and_hms(2026, 3, 9, 7, 5, 0).unwrap()
    }

    fn template(source: &str) -> ChatTemplate {
        ChatTemplate::new(source, Map::new(), clock).unwrap()
    }

    fn message(mut m: Map<String, Json>) -> Message {
        let role = m.remove("role").unwrap().as_str().unwrap().into();
        let content = m.get("content").and_then(Json::as_str).unwrap_or_default().to_string();
        Message { role, content, extra: m }
    }

    fn check(name: &str) {
        let folder = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/chat"));
        let source = std::fs::read_to_string(folder.join(format!("{name}.jinja"))).unwrap();
        let fixture = std::fs::read(folder.join(format!("{name}.json"))).unwrap();
        let Fixture { tokens, cases } = serde_json::from_slice(&fixture).unwrap();
        let template = ChatTemplate::new(&source, tokens, clock).unwrap();
        assert!(cases.len() > 40);
        for case in cases {
            let messages: Vec<Message> = case.messages.into_iter().map(message).collect();
            let options = RenderOptions { add_generation_prompt: case.add_generation_prompt, tools: case.tools };
            let found = template.render(&messages, &options);
            match (case.expected, found) {
                (Some(expected), found) => assert_eq!(found.as_ref(), Ok(&expected), "{name}: {}", case.name),
                (None, Ok(text)) => panic!("{name}: {}: {text:?}, where transformers gives an error", case.name),
                (None, Err(e)) => {
                    let words = case.error.unwrap_or_default();
                    assert!(e.contains(&words), "{name}: {}: {e:?} instead of {words:?}", case.name);
                }
            }
        }
    }

    macro_rules! fixtures {
        ($($test:ident: $name:literal)*) => {
            $(#[test]
            fn $test() {
                check($name);
            })*
        };
    }

    fixtures! {
        smollm2_renders_as_in_transformers: "smollm2"
        mistral_v02_renders_as_in_transformers: "mistral-v0.2"
        mistral_v03_renders_as_in_transformers: "mistral-v0.3"
        llama_3_renders_as_in_transformers: "llama-3"
        llama_31_renders_as_in_transformers: "llama-3.1"
        llama_32_renders_as_in_transformers: "llama-3.2"
        qwen_25_renders_as_in_transformers: "qwen2.5"
        qwen_3_renders_as_in_transformers: "qwen3"
        every_feature_renders_as_in_transformers: "features"
    }

    #[test]
    fn errors_carry_the_words_of_the_template_and_its_line() {
        let t = template("a\n{{ raise_exception('no narrators') }}");
        assert_eq!(t.render(&[], &RenderOptions::default()), Err("no narrators (line 2 of the template)".into()));
        let broken = ChatTemplate::new("{% if %}", Map::new(), clock).unwrap_err();
        assert!(broken.contains("syntax error"), "{broken}");
    }

    #[test]
    fn line_ends_of_the_template_are_read_as_jinja2_reads_them() {
        let crlf = template("a\r\n{% if true %}\r\n{{ 'b\r\nc' }}\r\n{% endif %}\r\nd\re\r\n");
        assert_eq!(crlf.render(&[], &RenderOptions::default()).unwrap(), "a\nb\nc\nd\ne");
    }

    #[test]
    fn a_bad_format_of_the_clock_is_an_error() {
        let e = template("{{ strftime_now('%Q') }}").render(&[], &RenderOptions::default()).unwrap_err();
        assert!(e.contains("unknown format"), "{e}");
    }

    #[test]
    fn only_templates_that_read_the_clock_change_by_the_day() {
        assert!(template("{{ strftime_now('%d') }}").reads_clock());
        assert!(!template("{{ date_string }}").reads_clock());
    }
}
