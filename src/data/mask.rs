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
        turns.push((i, renderer.turn(messages, i)?));
    }
    let nested = turns.iter().all(|(_, t)| !t.spliced && text.starts_with(&t.text));
    if nested {
        let spans: Vec<Range<usize>> = turns.iter().map(|(_, t)| t.start..t.text.len()).collect();
        return Ok(vec![with_stops(tok, &text, &spans)?]);
    }
    turns.iter().map(|(_, t)| with_stops(tok, &t.text, std::slice::from_ref(&(t.start..t.text.len())))).collect()
}

/// The conversation up to an answer.
struct Turn {
    text: String,
    /// Where the answer starts in `text`.
    start: usize,
    /// The context is not what the template writes once the answer is there, but the prompt it was generated from.
    spliced: bool,
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
        if i == 0 {
            // Before the first message there may be nothing that a template could render.
            let prompt = self.render(&[], true).ok().filter(|p| text.starts_with(p));
            let start = prompt.map_or_else(|| self.content_start(&text, messages, i), |p| Ok(p.len()))?;
            return Ok(Turn { text, start, spliced: false });
        }
        let prompt = self.render(&messages[..i], true)?;
        if text.starts_with(&prompt) {
            return Ok(Turn { text, start: prompt.len(), spliced: false });
        }
        let content = self.content_start(&text, messages, i)?;
        let before = self.render(&messages[..i], false).unwrap_or_default();
        if !before.is_empty() && text.starts_with(&before) {
            // The generation prompt itself goes on differently (an opened <think>): the answer starts where they part.
            let start = common_prefix(&text, &prompt).min(content);
            return Ok(Turn { text, start, spliced: false });
        }
        // The context changed once the answer came. Its end still reads the same: cut there.
        let asked = messages[i - 1].content.trim();
        if let Some(at) = cut_behind_prompt(&text[..content], &prompt, asked) {
            let start = prompt.len();
            return Ok(Turn { text: prompt + &text[at..], start, spliced: true });
        }
        Err(Fault::at(
            format!("messages[{i}]"),
            "an answer that the chat template does not lay behind its prompt",
            "a rendering that extends the one before it",
        ))
    }

    /// Where the content of message `i` starts in `text`, the rendering of messages ..=i: the first byte that changes
    /// with it.
    fn content_start(&self, text: &str, messages: &[Message], i: usize) -> Result<usize, Fault> {
        let mut other = messages[..=i].to_vec();
        // A first letter that the answer does not have, and no white space that a template could trim.
        let letter = if messages[i].content.trim_start().starts_with('x') { "y" } else { "x" };
        other[i].content = letter.into();
        other[i].extra.remove("content");
        Ok(common_prefix(text, &self.render(&other, false)?))
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

/// Encodes a conversation. The targets of a turn run from its span's start to the stop token that closes it.
fn with_stops(tok: &Tokenizer, text: &str, spans: &[Range<usize>]) -> Result<Tokens, Fault> {
    let (tokens, added) = encode_spans(tok, text)?;
    let mut is_target = vec![false; added.len() + tokens.len()];
    for span in spans {
        let inside = |t: &(i32, Range<usize>)| overlaps(&t.1, span);
        let stop = tokens.iter().rposition(|t| inside(t) && tok.is_special(t.0 as u32));
        // Behind the stop token only a line end may follow; it is no target, as nothing reads it.
        let blank = |text: &str| text.trim().is_empty();
        let stop = stop.filter(|&s| text.get(tokens[s].1.end..span.end).is_some_and(blank));
        let Some(stop) = stop else {
            let turn: String =
                text[span.clone()].chars().rev().take(24).collect::<Vec<_>>().into_iter().rev().collect();
            return Err(Fault::new(
                format!("an answer that ends in {turn:?}"),
                "a chat template that closes an answer with a special token such as eos_token, so that the model learns to stop",
            ));
        };
        for (at, token) in tokens.iter().enumerate().take(stop + 1) {
            let place = added.len() + at;
            is_target[place] |= place > 0 && inside(token);
        }
    }
    let ids = added.into_iter().chain(tokens.into_iter().map(|t| t.0)).collect();
    Ok(Tokens { ids, is_target })
}
