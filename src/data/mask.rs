//! From a row to token ids and the tokens that count in the loss.
//!
//! In a conversation the target of an answer is what the chat template adds for it: the rendering of the messages up to
//! the answer, minus the rendering of the messages before it with the generation prompt. So no template needs marks of
//! its own. Character spans become token spans through the offsets of one tokenisation of the whole text. Two kinds of
//! template make renderings that do not nest: those that write an old turn in another way than the last one (Qwen3 drops
//! its reasoning), and those that move the system prompt to the last user turn (Mistral). There each answer becomes a
//! document of its own, with the context it would have been generated from.

use std::ops::Range;

use serde_json::Value;

use super::chat::RenderOptions;
use super::jsonl::{Fault, Row};
use super::tokenizer::{Message, Tokenizer};

/// Token ids, and for each whether it is predicted and counts.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Tokens {
    pub ids: Vec<i32>,
    pub is_target: Vec<bool>,
}

/// Which tokens count, by kind of row.
#[derive(Clone, Copy, Debug)]
pub(super) struct Loss {
    pub completion_only: bool,
    pub assistant_only: bool,
}

/// The documents of one row: one, or one per answer where the template's renderings do not nest.
pub(super) fn tokenize(tok: &Tokenizer, row: &Row, loss: Loss) -> Result<Vec<Tokens>, Fault> {
    match row {
        Row::Text(text) => Ok(vec![plain(tok, text, 0)?]),
        Row::Completion { prompt, completion } => {
            let start = if loss.completion_only { prompt.len() } else { 0 };
            Ok(vec![plain(tok, &format!("{prompt}{completion}"), start)?])
        }
        Row::Chat { messages, tools } => chat(tok, messages, tools, loss.assistant_only.then_some(0)),
        Row::ChatCompletion { messages, prompt, tools } => {
            chat(tok, messages, tools, loss.completion_only.then_some(*prompt))
        }
    }
}

/// A text that ends in EOS. Bytes from `start` on count.
fn plain(tok: &Tokenizer, text: &str, start: usize) -> Result<Tokens, Fault> {
    let eos = tok.eos_id().ok_or_else(|| Fault::new("a tokenizer without eos_token", "a token that ends a text"))?;
    let mut tokens = encode(tok, text, |t| overlaps(t, &(start..text.len())))?;
    // A text that is empty where it should teach something stays without targets, and is reported as such.
    let teaches = start < text.len();
    if tokens.ids.last() != Some(&(eos as i32)) {
        tokens.ids.push(eos as i32);
        tokens.is_target.push(teaches);
    }
    Ok(tokens)
}

/// A conversation. Answers from message `first` on count; None: every token counts.
fn chat(tok: &Tokenizer, messages: &[Message], tools: &Value, first: Option<usize>) -> Result<Vec<Tokens>, Fault> {
    let renderer = Renderer { tok, tools };
    let text = renderer.render(messages, false)?;
    let Some(first) = first else {
        return Ok(vec![encode(tok, &text, |_| true)?]);
    };
    let mut turns = Vec::new();
    for i in (first..messages.len()).filter(|&i| messages[i].role == "assistant") {
        turns.push(renderer.turn(messages, i)?);
    }
    match documents(tok, text.clone(), &turns) {
        Err(Unstopped::Open(_)) => {}
        Ok(documents) => return Ok(documents),
        Err(Unstopped::Fault(fault)) => return Err(fault),
    }
    // Some templates close an answer only once something follows it.
    for turn in &mut turns {
        renderer.close(messages, turn)?;
    }
    documents(tok, text, &turns).map_err(|e| match e {
        Unstopped::Fault(fault) => fault,
        Unstopped::Open(end) => Fault::new(
            format!("an answer that ends in {end:?}"),
            "a chat template that closes an answer with a special token such as eos_token, so that the model learns to stop",
        ),
    })
}

/// Why a conversation did not become tokens.
enum Unstopped {
    /// No stop token after an answer that ends so.
    Open(String),
    Fault(Fault),
}

/// One document of all turns if their renderings nest, else one a turn. `text` is the rendering of all messages.
fn documents(tok: &Tokenizer, mut text: String, turns: &[Turn]) -> Result<Vec<Tokens>, Unstopped> {
    if let Some(last) = turns.last().filter(|t| t.text.starts_with(&text)) {
        text.clone_from(&last.text);
    }
    if turns.iter().all(|t| !t.spliced && text.starts_with(&t.text)) {
        return Ok(vec![with_stops(tok, &text, turns)?]);
    }
    turns.iter().map(|t| with_stops(tok, &t.text, std::slice::from_ref(t))).collect()
}

/// The conversation up to an answer.
struct Turn {
    /// Number of the message.
    index: usize,
    text: String,
    /// Where the answer starts in `text`.
    start: usize,
    /// Where its content ends and what the template puts behind it begins.
    content_end: usize,
    /// The context is not what the template writes once the answer is there, but the prompt it was generated from.
    spliced: bool,
    /// Calls stand between content and stop token, with special tokens of their own.
    calls_tools: bool,
}

struct Renderer<'a> {
    tok: &'a Tokenizer,
    tools: &'a Value,
}

impl Renderer<'_> {
    fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String, Fault> {
        let options = RenderOptions { add_generation_prompt, tools: self.tools.clone() };
        self.tok.render(messages, &options).map_err(|e| Fault::new(e, "a conversation that the chat template takes"))
    }

    /// Message `i` as the difference of two renderings.
    fn turn(&self, messages: &[Message], i: usize) -> Result<Turn, Fault> {
        let text = self.render(&messages[..=i], false)?;
        let content = self.content(&text, messages, i)?;
        let calls_tools = messages[i].extra.contains_key("tool_calls");
        let whole = |text: String, start: usize| {
            let content_end = content.end.max(start);
            Turn { index: i, text, start, content_end, spliced: false, calls_tools }
        };
        if i == 0 {
            // Before the first message there may be nothing that a template could render.
            let prompt = self.render(&[], true).ok().filter(|p| text.starts_with(p));
            return Ok(whole(text, prompt.map_or(content.start, |p| p.len())));
        }
        let prompt = self.render(&messages[..i], true)?;
        if text.starts_with(&prompt) {
            return Ok(whole(text, prompt.len()));
        }
        let before = self.render(&messages[..i], false).unwrap_or_default();
        if !before.is_empty() && text.starts_with(&before) {
            // The generation prompt is written otherwise: with other white space, or it goes on (an opened <think>).
            let header = prompt.strip_prefix(&before).unwrap_or_default().trim();
            let start = match text[before.len()..content.start.max(before.len())].rfind(header) {
                Some(at) if !header.is_empty() => {
                    let end = before.len() + at + header.len();
                    let space = &prompt[prompt.trim_end().len()..];
                    end + common_prefix(&text[end..], space)
                }
                _ => common_prefix(&text, &prompt).min(content.start),
            };
            return Ok(whole(text, start));
        }
        // The context changed once the answer came. Its end still reads the same: cut there.
        let asked = messages[i - 1].content.trim();
        if let Some(at) = cut_behind_prompt(&text[..content.start], &prompt, asked) {
            let start = prompt.len();
            let content_end = start + content.end.saturating_sub(at);
            return Ok(Turn { text: prompt + &text[at..], start, content_end, spliced: true, ..whole(text, start) });
        }
        Err(Fault::at(
            format!("messages[{i}]"),
            "an answer that the chat template does not lay behind its prompt",
            "a rendering that extends the one before it",
        ))
    }

    /// Where the content of message `i` stands in `text`, the rendering of messages ..=i: what changes with it.
    fn content(&self, text: &str, messages: &[Message], i: usize) -> Result<Range<usize>, Fault> {
        let mut other = messages[..=i].to_vec();
        // Begins and ends otherwise than the answer, and with nothing that a template could trim.
        let own = messages[i].content.trim();
        let letter = ["x", "y", "z"].into_iter().find(|l| !own.starts_with(l) && !own.ends_with(l)).unwrap_or("x");
        other[i].content = letter.into();
        other[i].extra.remove("content");
        let other = self.render(&other, false)?;
        let start = common_prefix(text, &other);
        let same: usize = (text[start..].chars().rev().zip(other[start..].chars().rev()))
            .take_while(|(x, y)| x == y)
            .map(|(x, _)| x.len_utf8())
            .sum();
        Ok(start..text.len() - same)
    }

    /// Lays behind an answer what the template puts there when a question follows, up to its first special token.
    fn close(&self, messages: &[Message], turn: &mut Turn) -> Result<(), Fault> {
        let mut longer = messages[..=turn.index].to_vec();
        longer.push(Message::new("user", "x"));
        let Ok(longer) = self.render(&longer, false) else { return Ok(()) };
        let Some(rest) = longer.strip_prefix(&turn.text) else { return Ok(()) };
        let tokens = self.tok.encode_spans(rest).map_err(|e| Fault::new(e, "text that the tokenizer can encode"))?;
        let stop = tokens.iter().find(|t| self.tok.is_special(t.0));
        if let Some((_, span)) = stop.filter(|t| rest[..t.1.start].trim().is_empty()) {
            turn.text.push_str(&rest[..span.end]);
        }
        Ok(())
    }
}

/// Bytes that both begin with, to a whole character.
fn common_prefix(a: &str, b: &str) -> usize {
    a.chars().zip(b.chars()).take_while(|(x, y)| x == y).map(|(x, _)| x.len_utf8()).sum()
}

/// Where `prompt` ends inside `head`, which begins otherwise: the last place before which both read the same, back to
/// the message that was asked and some of the template's own text. None: nowhere.
fn cut_behind_prompt(head: &str, prompt: &str, asked: &str) -> Option<usize> {
    let shared = |at: usize| -> usize {
        let pairs = head[..at].chars().rev().zip(prompt.chars().rev());
        pairs.take_while(|(x, y)| x == y).map(|(x, _)| x.len_utf8()).sum()
    };
    // What stands between prompt and content is a header or a space; no need to look far.
    let cuts = (head.len().saturating_sub(256)..=head.len()).rev().filter(|&at| head.is_char_boundary(at));
    cuts.into_iter().find(|&at| {
        let tail = &prompt[prompt.len() - shared(at)..];
        tail.len() > asked.len() && tail.contains(asked)
    })
}

/// Whether a token's bytes meet a span. A token across the start of a span counts: the model must predict it.
fn overlaps(token: &Range<usize>, span: &Range<usize>) -> bool {
    token.start < span.end && (token.end > span.start || token.start >= span.start)
}

/// Encodes `text` once, with one BOS in front if the tokenizer adds one. The first token is never a target.
fn encode(tok: &Tokenizer, text: &str, counts: impl Fn(&Range<usize>) -> bool) -> Result<Tokens, Fault> {
    let (tokens, added) = encode_spans(tok, text)?;
    let mut ids = added.clone();
    let mut is_target = vec![false; added.len()];
    for (id, span) in &tokens {
        is_target.push(!ids.is_empty() && counts(span));
        ids.push(*id);
    }
    Ok(Tokens { ids, is_target })
}

type Spans = Vec<(i32, Range<usize>)>;

fn encode_spans(tok: &Tokenizer, text: &str) -> Result<(Spans, Vec<i32>), Fault> {
    let tokens = tok.encode_spans(text).map_err(|e| Fault::new(e, "text that the tokenizer can encode"))?;
    let added = tok.prefix_before(tokens.first().map(|t| t.0)).iter().map(|&t| t as i32).collect();
    Ok((tokens.into_iter().map(|(id, span)| (id as i32, span)).collect(), added))
}

/// Encodes a conversation. The targets of a turn run from its start to the stop token that closes it.
fn with_stops(tok: &Tokenizer, text: &str, turns: &[Turn]) -> Result<Tokens, Unstopped> {
    let (tokens, added) = encode_spans(tok, text).map_err(Unstopped::Fault)?;
    let mut is_target = vec![false; added.len() + tokens.len()];
    for turn in turns {
        let span = turn.start..turn.text.len();
        let inside = |t: &(i32, Range<usize>)| overlaps(&t.1, &span);
        let behind = |t: &(i32, Range<usize>)| inside(t) && t.1.start >= turn.content_end;
        let special = |t: &(i32, Range<usize>)| tok.is_special(t.0 as u32);
        // What the model declares to end its answers; else the first special token, as no answer holds one, or the
        // last where calls do. What the template puts behind it (a line end, the next header) nothing reads.
        let stop =
            tokens.iter().position(|t| behind(t) && tok.declared_stops().contains(&(t.0 as u32))).or_else(|| {
                if turn.calls_tools {
                    tokens.iter().rposition(|t| inside(t) && special(t))
                } else {
                    tokens.iter().position(|t| behind(t) && special(t))
                }
            });
        let Some(stop) = stop else {
            let tail = text[span].char_indices().rev().take(24).last().map_or(0, |(at, _)| at);
            return Err(Unstopped::Open(text[turn.start + tail..turn.text.len()].to_string()));
        };
        for (at, token) in tokens.iter().enumerate().take(stop + 1) {
            let place = added.len() + at;
            is_target[place] |= place > 0 && inside(token);
        }
    }
    let ids = added.into_iter().chain(tokens.into_iter().map(|t| t.0)).collect();
    Ok(Tokens { ids, is_target })
}
