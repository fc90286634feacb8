//! The tokenizer of a Hugging Face directory: tokenizer.json with what tokenizer_config.json, special_tokens_map.json,
//! generation_config.json and chat_template.jinja say about special tokens and the chat template.

use std::collections::HashSet;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use chrono::{DateTime, Local};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use super::chat::{ChatTemplate, RenderOptions};
use crate::error::{Error, Result};

/// One turn of a conversation, as a `messages` row holds it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Message {
    pub role: String,
    pub content: String,
    /// Every other field of the message; the template sees them. A `content` here stands in for [`Message::content`].
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

impl Message {
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into(), extra: Map::new() }
    }
}

/// The names of special tokens that transformers keeps, in tokenizer_config.json or special_tokens_map.json.
const NAMES: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// A tokenizer, its special tokens and its chat template.
#[derive(Debug)]
pub struct Tokenizer {
    /// Without post-processor, truncation and padding: what it would add is in `prefix` and `suffix`.
    inner: tokenizers::Tokenizer,
    dir: PathBuf,
    prefix: Vec<u32>,
    suffix: Vec<u32>,
    special: HashSet<u32>,
    bos: Option<u32>,
    eos: Option<u32>,
    pad: Option<u32>,
    /// EOS and those of generation_config.json.
    declared: Vec<u32>,
    stop: Vec<u32>,
    /// Where the template was found, and the template or why it does not compile; None: there is none.
    chat: Option<(PathBuf, Result<ChatTemplate, String>)>,
    /// The template for rows with tools, where the directory has one of its own.
    tool_chat: Option<Result<ChatTemplate, String>>,
    fingerprint: [u8; 32],
}

impl Tokenizer {
    /// Opens the tokenizer of a model directory. Errors: a file that is missing or malformed, a token whose id has no
    /// row among the `vocab_size` rows of the embedding, a special token that the vocabulary lacks.
    pub fn open(model_dir: &Path, vocab_size: usize) -> Result<Self> {
        Self::open_at(model_dir, vocab_size, Local::now)
    }

    pub(super) fn open_at(dir: &Path, vocab_size: usize, now: fn() -> DateTime<Local>) -> Result<Self> {
        let file = dir.join("tokenizer.json");
        let bytes = fs::read(&file).map_err(Error::read("open", &file))?;
        let mut inner = tokenizers::Tokenizer::from_bytes(&bytes)
            .map_err(|e| Error::input(&file, "whole file", e.to_string(), "a tokenizer of the tokenizers library"))?;
        let highest = inner.get_vocab(true).into_iter().max_by_key(|(_, id)| *id);
        match highest {
            None => return Err(Error::input(&file, "model.vocab", "no tokens", "a vocabulary")),
            Some((token, id)) if id as usize >= vocab_size => {
                return Err(Error::input(
                    &file,
                    format!("token {token:?}"),
                    format!("id {id}"),
                    format!("ids below {vocab_size}, the rows of the model's embedding"),
                ));
            }
            Some(_) => {}
        }
        let broken = |e: tokenizers::Error| Error::input(&file, "a probe text", e.to_string(), "tokens");
        let (mut prefix, mut suffix) = surroundings(&inner).map_err(broken)?;
        if let Some(id) = prefix.iter().chain(&suffix).find(|&&id| id as usize >= vocab_size) {
            let expected = format!("ids below {vocab_size}, the rows of the model's embedding");
            return Err(Error::input(&file, "post_processor", format!("id {id}"), expected));
        }
        inner.with_truncation(None).map_err(broken)?;
        inner.with_padding(None);
        inner.with_post_processor(None::<tokenizers::PostProcessorWrapper>);

        let mut config = Config::read(dir)?;
        config.generation_eos.retain(|&id| (id as usize) < vocab_size);
        let id = |name: &str| -> Result<Option<u32>> {
            let Some(Value::String(token)) = config.tokens.get(name) else { return Ok(None) };
            let found = || Error::input(&config.file, name, format!("{token:?}"), "a token of tokenizer.json");
            inner.token_to_id(token).map(Some).ok_or_else(found)
        };
        let (bos, eos, pad) = (id("bos_token")?, id("eos_token")?, id("pad_token")?);
        let eos = eos.or(config.generation_eos.first().copied());
        match (config.add_bos, bos) {
            (Some(true), Some(bos)) if !prefix.contains(&bos) => prefix.insert(0, bos),
            (Some(false), Some(bos)) => prefix.retain(|&t| t != bos),
            _ => {}
        }
        match (config.add_eos, eos) {
            (Some(true), Some(eos)) if !suffix.contains(&eos) => suffix.push(eos),
            (Some(false), Some(eos)) => suffix.retain(|&t| t != eos),
            _ => {}
        }
        let mut special: HashSet<u32> =
            inner.get_added_tokens_decoder().into_iter().filter(|(_, t)| t.special).map(|(id, _)| id).collect();
        special.extend(bos.into_iter().chain(eos).chain(config.generation_eos.iter().copied()));

        let mut hash = Sha256::new();
        hash.update(&bytes);
        hash.update(format!("{prefix:?}{suffix:?}{bos:?}{eos:?}{:?}{:?}", config.tokens, config.generation_eos));
        for source in config.template.iter().map(|t| &t.1).chain(&config.tool_template) {
            hash.update(source);
        }
        let compile = |source: &String| ChatTemplate::new(source, config.tokens.clone(), now);
        let chat = config.template.as_ref().map(|(path, source)| (path.clone(), compile(source)));
        let tool_chat = config.tool_template.as_ref().map(compile);
        let fingerprint = hash.finalize().into();
        let declared: Vec<u32> = eos.into_iter().chain(config.generation_eos.iter().copied()).collect();
        let stop = declared.clone();
        let dir = dir.to_path_buf();
        let mut tok =
            Self { inner, dir, prefix, suffix, special, bos, eos, pad, declared, stop, chat, tool_chat, fingerprint };
        let closing = tok.closing_token();
        tok.stop.extend(closing);
        let mut seen = HashSet::new();
        tok.stop.retain(|&t| seen.insert(t));
        Ok(tok)
    }

    /// The directory it was opened from.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Token ids of `text`. With `add_special`, what the tokenizer lays around a text (BOS, rarely EOS) is added, but
    /// no second BOS before a text that begins with one.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        let ids = self.encode_plain(text).map_err(|e| self.fault("text", e, "text the tokenizer can encode"))?;
        if !add_special {
            return Ok(ids);
        }
        let prefix = self.prefix_before(ids.first().copied());
        Ok(prefix.iter().chain(&ids).chain(&self.suffix).copied().collect())
    }

    /// The text of token ids; `skip_special` leaves special tokens out.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        self.inner
            .decode(ids, skip_special)
            .map_err(|e| self.fault("decoder", e.to_string(), "token ids of this tokenizer"))
    }

    /// The conversation as the chat template writes it.
    pub fn render_chat(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let options = RenderOptions { add_generation_prompt, tools: Value::Null };
        self.render(messages, &options).map_err(|e| {
            let file = self.chat.as_ref().map_or_else(|| self.dir.join("tokenizer_config.json"), |c| c.0.clone());
            Error::input(file, "chat_template", e, "a chat template that takes this conversation")
        })
    }

    /// Token ids of a conversation ready to be answered: rendered with the generation prompt, one BOS.
    pub fn encode_chat(&self, messages: &[Message]) -> Result<Vec<u32>> {
        let text = self.render_chat(messages, true)?;
        let ids = self.encode(&text, false)?;
        Ok(self.prefix_before(ids.first().copied()).iter().copied().chain(ids).collect())
    }

    /// Tokens that end a turn: EOS, those of generation_config.json, and what the template puts after an answer.
    pub fn stop_ids(&self) -> Vec<u32> {
        self.stop.clone()
    }

    /// The stop tokens that the files name, without what the template was found to use.
    pub(super) fn declared_stops(&self) -> &[u32] {
        &self.declared
    }

    pub fn bos_id(&self) -> Option<u32> {
        self.bos
    }

    pub fn eos_id(&self) -> Option<u32> {
        self.eos
    }

    pub fn pad_id(&self) -> Option<u32> {
        self.pad
    }

    /// Whether the directory holds a chat template.
    pub fn has_chat_template(&self) -> bool {
        self.chat.is_some()
    }

    /// Whether `id` is a special token: no part of anyone's text.
    pub fn is_special(&self, id: u32) -> bool {
        self.special.contains(&id)
    }

    /// Hash of everything that decides how rows become tokens.
    pub(super) fn fingerprint(&self) -> &[u8; 32] {
        &self.fingerprint
    }

    /// Whether renderings depend on the day.
    pub(super) fn reads_clock(&self) -> bool {
        self.chat.as_ref().is_some_and(|c| c.1.as_ref().is_ok_and(ChatTemplate::reads_clock))
    }

    /// Renders; the error is one line without a place.
    pub(super) fn render(&self, messages: &[Message], options: &RenderOptions) -> Result<String, String> {
        let with_tools = self.tool_chat.as_ref().filter(|_| !options.tools.is_null());
        let template = with_tools.or(self.chat.as_ref().map(|c| &c.1));
        match template {
            None => Err(format!("no chat template in {}", self.dir.display())),
            Some(Err(e)) => Err(format!("a chat template that does not compile: {e}")),
            Some(Ok(template)) => template.render(messages, options),
        }
    }

    /// What to lay before a text whose first token is `first`: one BOS, whoever adds it.
    pub(super) fn prefix_before(&self, first: Option<u32>) -> &[u32] {
        match (self.prefix.last(), first) {
            (Some(last), Some(first)) if *last == first => &self.prefix[..self.prefix.len() - 1],
            _ => &self.prefix,
        }
    }

    /// Tokens of `text` without any addition, each with the bytes of `text` it stands for.
    pub(super) fn encode_spans(&self, text: &str) -> Result<Vec<(u32, Range<usize>)>, String> {
        let encoding = self.inner.encode(text, false).map_err(|e| e.to_string())?;
        let spans = encoding.get_offsets().iter().map(|&(a, b)| a..b);
        Ok(encoding.get_ids().iter().copied().zip(spans).collect())
    }

    fn encode_plain(&self, text: &str) -> Result<Vec<u32>, String> {
        self.inner.encode_fast(text, false).map(|e| e.get_ids().to_vec()).map_err(|e| e.to_string())
    }

    /// The first special token after an answer, as the template writes it.
    fn closing_token(&self) -> Option<u32> {
        let messages = [Message::new("user", "a"), Message::new("assistant", "b")];
        let prompt = self.render(&messages[..1], &RenderOptions { add_generation_prompt: true, ..Default::default() });
        let whole = self.render(&messages, &RenderOptions::default()).ok()?;
        let answer = whole.strip_prefix(prompt.ok()?.as_str())?;
        self.encode_plain(answer).ok()?.into_iter().find(|id| self.special.contains(id))
    }

    fn fault(&self, place: &str, found: impl Into<String>, expected: &str) -> Error {
        Error::input(self.dir.join("tokenizer.json"), place, found, expected)
    }
}

/// What the post-processor lays before and after a text.
fn surroundings(inner: &tokenizers::Tokenizer) -> Result<(Vec<u32>, Vec<u32>), tokenizers::Error> {
    let bare = inner.encode_fast("a", false)?.get_ids().to_vec();
    let full = inner.encode_fast("a", true)?.get_ids().to_vec();
    let at = full.windows(bare.len().max(1)).position(|w| w == bare).unwrap_or(full.len());
    let end = (at + bare.len()).min(full.len());
    Ok((full[..at].to_vec(), full[end..].to_vec()))
}

/// What the JSON files beside tokenizer.json say.
struct Config {
    /// The file that errors about special tokens name.
    file: PathBuf,
    tokens: Map<String, Value>,
    add_bos: Option<bool>,
    add_eos: Option<bool>,
    template: Option<(PathBuf, String)>,
    tool_template: Option<String>,
    generation_eos: Vec<u32>,
}

impl Config {
    fn read(dir: &Path) -> Result<Self> {
        let file = dir.join("tokenizer_config.json");
        let config = read_object(&file)?;
        let map = read_object(&dir.join("special_tokens_map.json"))?;
        let generation = read_object(&dir.join("generation_config.json"))?;
        let mut tokens = Map::new();
        for name in NAMES {
            let value = [&config, &map].into_iter().find_map(|m| m.get(name).filter(|v| !v.is_null()));
            if let Some(value) = value {
                let token = token_text(value).ok_or_else(|| {
                    Error::input(&file, name, value.to_string(), "a token as a string or an object with `content`")
                })?;
                tokens.insert(name.into(), Value::String(token));
            }
        }
        let extra = config.get("additional_special_tokens").or(map.get("additional_special_tokens"));
        if let Some(Value::Array(list)) = extra {
            let list = list.iter().filter_map(token_text).map(Value::String).collect();
            tokens.insert("additional_special_tokens".into(), Value::Array(list));
        }
        let (mut template, tool_template) = templates(&file, config.get("chat_template"))?;
        let jinja = dir.join("chat_template.jinja");
        match fs::read_to_string(&jinja) {
            Ok(source) => template = Some((jinja, source)),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(Error::read("read", &jinja)(e)),
        }
        let eos = generation.get("eos_token_id");
        let ids = match eos {
            Some(Value::Array(list)) => list.as_slice(),
            Some(one) => std::slice::from_ref(one),
            None => &[],
        };
        let generation_eos = ids.iter().filter_map(Value::as_u64).filter_map(|i| u32::try_from(i).ok()).collect();
        let flag = |name: &str| config.get(name).and_then(Value::as_bool);
        let (add_bos, add_eos) = (flag("add_bos_token"), flag("add_eos_token"));
        Ok(Self { file, tokens, add_bos, add_eos, template, tool_template, generation_eos })
    }
}

type Templates = (Option<(PathBuf, String)>, Option<String>);

/// `chat_template`: a string, or a list of {name, template} of which "default" is used, and "tool_use" with tools.
fn templates(file: &Path, value: Option<&Value>) -> Result<Templates> {
    let expected = "a string or a list of {name, template}";
    match value {
        None | Some(Value::Null) => Ok((None, None)),
        Some(Value::String(source)) => Ok((Some((file.into(), source.clone())), None)),
        Some(Value::Array(list)) => {
            let mut out: Templates = (None, None);
            for item in list {
                match (item.get("name").and_then(Value::as_str), item.get("template").and_then(Value::as_str)) {
                    (Some("default"), Some(source)) => out.0 = Some((file.into(), source.into())),
                    (Some("tool_use"), Some(source)) => out.1 = Some(source.into()),
                    (Some(_), Some(_)) => {}
                    _ => return Err(Error::input(file, "chat_template", item.to_string(), expected)),
                }
            }
            if out.0.is_none() {
                return Err(Error::input(file, "chat_template", "a list without `default`", "a template of that name"));
            }
            Ok(out)
        }
        Some(other) => Err(Error::input(file, "chat_template", other.to_string(), expected)),
    }
}

/// "</s>" or {"content": "</s>", ..}.
fn token_text(value: &Value) -> Option<String> {
    value.as_str().or_else(|| value.get("content")?.as_str()).map(String::from)
}

/// The object in a JSON file; empty where there is no file.
fn read_object(file: &Path) -> Result<Map<String, Value>> {
    let text = match fs::read_to_string(file) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Map::new()),
        Err(e) => return Err(Error::read("read", file)(e)),
    };
    match serde_json::from_str(&text) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(_) => Err(Error::input(file, "whole file", "something else", "a JSON object")),
        Err(e) => Err(Error::input(file, format!("line {}", e.line()), e.to_string(), "a JSON object")),
    }
}
