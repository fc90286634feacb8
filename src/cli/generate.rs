//! `halfbyte generate`: text from a model, with or without an adapter.

use std::io::{IsTerminal, Read};
use std::path::PathBuf;

use clap::Args;
use halfbyte::checkpoint::ModelDir;
use halfbyte::data::{Message, Tokenizer};
use halfbyte::generate::{self, Sampling};
use halfbyte::{Error, Result};
use serde_json::json;

use super::args::{DeviceArgs, QuantizeArgs};
use super::load::{self, Room, with_backend};
use super::output::{Out, note};

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  halfbyte generate --model SmolLM2-135M-Instruct --chat --prompt 'What is the capital of France?'
  halfbyte generate --model SmolLM2-135M-Instruct --adapter run1 --load-in-4bit --chat --prompt 'Who are you?'
  echo 'Once upon a time' | halfbyte generate --model m --temperature 0.8 --top-p 0.95 --seed 1

Text goes to standard output as it is made, tokens/s to standard error. An adapter that was trained over 4-bit weights
sees what it saw in training with --load-in-4bit.")]
pub struct GenerateArgs {
    /// Model directory, 16-bit or 4-bit, with its tokenizer
    #[arg(long, value_name = "DIR")]
    model: PathBuf,

    /// PEFT adapter or checkpoint directory
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,

    /// Text to continue, or with --chat the user's message [default: standard input]
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    prompt: Option<String>,

    /// Lay the prompt out with the model's chat template
    #[arg(long)]
    chat: bool,

    /// System message of the chat
    #[arg(long, value_name = "TEXT", requires = "chat", allow_hyphen_values = true)]
    system: Option<String>,

    /// Most tokens to generate
    #[arg(long, value_name = "N", default_value_t = 256)]
    max_new_tokens: usize,

    /// 0 is greedy; higher flattens the distribution
    #[arg(long, value_name = "T", default_value_t = 0.0, allow_negative_numbers = true)]
    temperature: f64,

    /// Sample among the K likeliest tokens; 0 is all
    #[arg(long, value_name = "K", default_value_t = 0)]
    top_k: usize,

    /// Sample among the likeliest tokens that together reach this probability
    #[arg(long, value_name = "P", default_value_t = 1.0, allow_negative_numbers = true)]
    top_p: f64,

    /// The same seed gives the same text
    #[arg(long, value_name = "N", default_value_t = 42)]
    seed: u64,

    /// Print one JSON object at the end instead of the text as it comes
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    quantize: QuantizeArgs,

    #[command(flatten)]
    device: DeviceArgs,
}

/// Tokens of the prompt that run at a time.
const PREFILL: usize = 512;

pub fn run(args: GenerateArgs) -> Result<()> {
    let sampling = Sampling {
        temperature: args.temperature,
        top_k: args.top_k,
        top_p: args.top_p,
        seed: args.seed,
        max_new_tokens: args.max_new_tokens,
    };
    sampling.validate()?;
    let mut backend = args.device.backend()?;
    let dir = ModelDir::open(&args.model)?;
    let tokenizer = Tokenizer::open(&args.model, dir.config().vocab_size)?;
    let adapter = load::adapter(args.adapter.as_deref(), &dir)?;
    let prompt = match args.prompt {
        Some(text) => text,
        None => read_stdin()?,
    };
    let ids = if args.chat {
        let system = args.system.iter().map(|s| Message::new("system", s));
        let messages: Vec<Message> = system.chain([Message::new("user", &prompt)]).collect();
        tokenizer.encode_chat(&messages)?
    } else {
        tokenizer.encode(&prompt, true)?
    };
    if ids.is_empty() {
        return Err(Error::flag("--prompt", "no tokens", "a text of at least one token"));
    }
    let sampling = Sampling { max_new_tokens: room(&ids, args.max_new_tokens, &dir)?, ..sampling };
    let mut out = Out::new();
    let mut failed = None;
    let mut on_text = |text: &str| {
        if !args.json && failed.is_none() {
            failed = out.text(text).err();
        }
    };
    let (quantize, chunk) = (args.quantize.config(), ids.len().min(PREFILL));
    let cache = ids.len() + sampling.max_new_tokens;
    let made = with_backend!(&mut backend, |b| {
        let mut model = load::model(b, &dir, quantize, adapter.as_ref(), chunk, Some(Room::Cache(cache)))?;
        generate::generate(b, &mut model, &tokenizer, &ids, &sampling, &mut on_text)
    })?;
    if let Some(e) = failed {
        return Err(e);
    }
    if args.json {
        out.json(&json!({
            "prompt": prompt, "text": made.text, "prompt_tokens": ids.len(), "tokens": made.tokens,
            "stop": made.stop, "prompt_tokens_per_second": made.prompt_tokens_per_second,
            "tokens_per_second": made.tokens_per_second,
        }))?;
    } else if !made.text.ends_with('\n') {
        out.text("\n")?;
    }
    out.flush()?;
    note(format_args!(
        "{} tokens in at {:.1} tok/s, {} out at {:.1} tok/s",
        ids.len(),
        made.prompt_tokens_per_second,
        made.tokens.len(),
        made.tokens_per_second
    ));
    Ok(())
}

/// How many tokens may follow the prompt: no more than the model has positions for.
fn room(prompt: &[u32], wanted: usize, dir: &ModelDir) -> Result<usize> {
    let positions = dir.config().max_position_embeddings;
    if prompt.len() >= positions {
        let found = format!("{} tokens", prompt.len());
        return Err(Error::flag("--prompt", found, format!("fewer than the model's {positions} positions")));
    }
    let room = positions - prompt.len();
    if wanted > room {
        note(format_args!("note: at most {room} new tokens: the model has {positions} positions"));
    }
    Ok(wanted.min(room))
}

/// All of standard input, without the line end that `echo` adds.
fn read_stdin() -> Result<String> {
    let mut stdin = std::io::stdin();
    if stdin.is_terminal() {
        note(format_args!("reading the prompt from standard input; Ctrl-D ends it"));
    }
    let mut text = String::new();
    stdin.read_to_string(&mut text).map_err(Error::read("read UTF-8 text", "standard input"))?;
    if text.ends_with('\n') {
        text.pop();
    }
    Ok(text)
}
