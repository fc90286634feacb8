//! Where a setting of a run came from, so that an error can name the line of the run file or the flag.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::{Arg, ArgAction, ArgMatches, Args, FromArgMatches};
use halfbyte::train::config::{self, KEYS, Key, Kind, TrainConfig};
use halfbyte::{Error, Result};
use toml::{Table, Value};

/// A flag for every key of the run file, made from [`KEYS`]: neither can have what the other lacks.
#[derive(Debug)]
pub struct KeyFlags(Vec<(&'static Key, Vec<OsString>)>);

/// The first key of each group of the help text.
const HEADINGS: [(&str, &str); 8] = [
    ("model", "Files"),
    ("r", "LoRA"),
    ("load_in_4bit", "Quantisation"),
    ("max_length", "Rows"),
    ("learning_rate", "Optimizer"),
    ("num_train_epochs", "Length and batches"),
    ("logging_steps", "Logging, evaluation, checkpoints"),
    ("seed", "Machine and seed"),
];

/// "--learning-rate".
pub fn flag_name(key: &str) -> String {
    format!("--{}", key.replace('_', "-"))
}

fn arg(key: &'static Key, default: Option<&Value>) -> Arg {
    let kebab = |s: &str| s.replace('_', "-");
    let mut help = key.help.iter().map(|h| h.trim()).collect::<Vec<_>>().join(" ");
    match default {
        None => {}
        Some(Value::String(s)) if s.is_empty() => {}
        Some(Value::Array(a)) if a.is_empty() => {}
        Some(Value::Table(t)) if t.is_empty() => {}
        // Some are f32: as f64 they would show digits that nobody wrote.
        Some(Value::Float(f)) => help.push_str(&format!(" [default: {}]", *f as f32)),
        Some(v) => help.push_str(&format!(" [default: {}]", v.to_string().trim_matches('"'))),
    }
    let arg = Arg::new(key.name)
        .long(kebab(key.name))
        .visible_aliases(key.aliases.iter().map(|a| kebab(a)))
        .aliases(key.aliases.iter().filter(|a| a.contains('_')).copied())
        .help(help)
        .value_parser(clap::value_parser!(OsString));
    let arg = match key.kind {
        Kind::Paths => arg.action(ArgAction::Append),
        Kind::Bool | Kind::BoolOrPath => arg.num_args(0..=1).default_missing_value("true"),
        Kind::Int | Kind::Float => arg.allow_negative_numbers(true),
        _ => arg,
    };
    arg.value_name(match key.kind {
        Kind::Bool => "BOOL",
        Kind::Int | Kind::Float => "N",
        Kind::Text => "NAME",
        Kind::Path if matches!(key.name, "model" | "adapter" | "out") => "DIR",
        Kind::Path => "PATH",
        Kind::Paths => "FILE",
        Kind::List => "A,B",
        Kind::Map => "NAME=N,..",
        Kind::BoolOrPath => "CHECKPOINT",
    })
}

impl Args for KeyFlags {
    fn augment_args(cmd: clap::Command) -> clap::Command {
        // A config of plain values always makes a table; without it only the defaults are missing from the help.
        let defaults = Table::try_from(TrainConfig::default()).unwrap_or_default();
        let mut heading = "";
        KEYS.iter().fold(cmd, |cmd, key| {
            heading = HEADINGS.iter().find(|h| h.0 == key.name).map_or(heading, |h| h.1);
            cmd.arg(arg(key, defaults.get(key.name)).help_heading(heading))
        })
    }

    fn augment_args_for_update(cmd: clap::Command) -> clap::Command {
        Self::augment_args(cmd)
    }
}

impl FromArgMatches for KeyFlags {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let given = |key: &&Key| matches.value_source(key.name) == Some(clap::parser::ValueSource::CommandLine);
        let values = |key: &Key| matches.get_many::<OsString>(key.name).into_iter().flatten().cloned().collect();
        Ok(Self(KEYS.iter().filter(given).map(|key| (key, values(key))).collect()))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

/// Settings of a run, and where each came from.
#[derive(Debug)]
pub struct Settings {
    pub config: TrainConfig,
    origin: Origin,
}

#[derive(Debug, Default)]
struct Origin {
    file: PathBuf,
    /// Line of each key that the file, and no flag, set.
    lines: BTreeMap<&'static str, usize>,
}

impl Settings {
    /// Reads a run file, if any, and lays the flags over it.
    pub fn new(file: Option<&Path>, flags: &KeyFlags) -> Result<Self> {
        let mut origin = Origin::default();
        let mut table = Table::new();
        if let Some(file) = file {
            origin.file = file.into();
            let text = std::fs::read_to_string(file).map_err(Error::read("read the run file", file))?;
            origin.lines = key_lines(file, &text)?;
            table = TrainConfig::read_table(file)?;
        }
        for (key, values) in &flags.0 {
            set(&mut table, key, values)?;
            origin.lines.remove(key.name);
        }
        let config = TrainConfig::from_table(&table).map_err(|e| origin.locate(e))?;
        Ok(Self { config, origin })
    }

    /// An error about a key that the run file set, with its line.
    pub fn locate(&self, e: Error) -> Error {
        self.origin.locate(e)
    }
}

impl Origin {
    fn locate(&self, e: Error) -> Error {
        let Error::Flag { flag, found, expected } = e else { return e };
        let line = config::find_key(&flag).and_then(|key| Some((key.name, self.lines.get(key.name)?)));
        match line {
            Some((name, line)) => Error::input(&self.file, format!("line {line}: {name}"), found, expected),
            None => Error::Flag { flag, found, expected },
        }
    }
}

/// One flag over the table: the last value counts, except that every `--data` adds a file.
fn set(table: &mut Table, key: &'static Key, values: &[OsString]) -> Result<()> {
    let flag = flag_name(key.name);
    let mut texts = Vec::new();
    for v in values {
        // The run's settings go into JSON files beside the adapter, which hold nothing but UTF-8.
        texts.push(v.to_str().ok_or_else(|| Error::flag(&flag, v.to_string_lossy(), "text in UTF-8"))?);
    }
    let Some(last) = texts.last() else { return Ok(()) };
    config::set(table, key.name, last).map_err(|e| match e {
        Error::Flag { found, expected, .. } => Error::Flag { flag, found, expected },
        other => other,
    })?;
    if key.kind == Kind::Paths {
        table.insert(key.name.into(), texts.into_iter().map(Value::from).collect::<Vec<_>>().into());
    }
    Ok(())
}

/// The line of every key of a run file. Errors: not TOML, an unknown key.
fn key_lines(file: &Path, text: &str) -> Result<BTreeMap<&'static str, usize>> {
    let line = |at: usize| text.as_bytes()[..at.min(text.len())].iter().filter(|&&b| b == b'\n').count() + 1;
    let table = toml::de::DeTable::parse(text).map_err(|e| {
        let place = format!("line {}", line(e.span().map_or(0, |s| s.start)));
        Error::input(file, place, e.message().trim().replace('\n', ", "), "TOML (key = value)")
    })?;
    let mut lines = BTreeMap::new();
    for name in table.get_ref().keys() {
        let at = line(name.span().start);
        let key = config::find_key(name.get_ref()).ok_or_else(|| {
            let expected = match config::nearest_key(name.get_ref()) {
                Some(near) => format!("a known key; the nearest is {near:?}"),
                None => "a known key (halfbyte train --help lists them)".into(),
            };
            Error::input(file, format!("line {at}"), format!("the unknown key {:?}", name.get_ref()), expected)
        })?;
        if let Some(first) = lines.insert(key.name, at) {
            let (found, second) =
                (format!("{:?}, the same setting as in line {}", name.get_ref(), first.min(at)), first.max(at));
            return Err(Error::input(file, format!("line {second}"), found, "each setting once"));
        }
    }
    Ok(lines)
}
