//! `halfbyte bench OP`: one op's ways against each other, and against a kernel of the user's.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{CommandFactory, FromArgMatches, Parser};
use halfbyte::bench::candidate::template::template;
use halfbyte::bench::kernels::models::Model;
use halfbyte::bench::kernels::ops::{self, Op};
use halfbyte::names::nearest;
use halfbyte::{Error, Result};

use crate::cli::args::at_least_one;
use crate::cli::output::Out;

#[derive(Parser, Debug)]
#[command(
    disable_version_flag = true,
    about = "Race the ways to run one op, and a kernel of your own beside them",
    after_help = "Examples:
  halfbyte bench rmsnorm_forward --print-template --out my.cu
  halfbyte bench rmsnorm_forward --candidate my.cu --watch
  halfbyte bench rmsnorm_forward --candidate my.cu --model 13b --tokens 512 --tokens 8192 --json

A candidate is CUDA C++ that NVRTC compiles (docs/candidates.md). It is compared with the op's oracle before it
is timed: a wrong one ends with exit code 2 and the first element that is wrong."
)]
pub struct OpArgs {
    /// CUDA C++ file with the kernel to race
    #[arg(long, value_name = "FILE", conflicts_with = "print_template")]
    candidate: Option<PathBuf>,

    /// Race again whenever the file is saved, until Ctrl-C
    #[arg(long, requires = "candidate", conflicts_with = "csv")]
    watch: bool,

    /// Write a file that compiles and is right, to begin from; needs no GPU
    #[arg(long)]
    print_template: bool,

    /// Where to write it, a new file [default: standard output]
    #[arg(long, value_name = "FILE", requires = "print_template")]
    out: Option<PathBuf>,

    /// Whose sizes: 1b, 7b, 13b, 135m or toy
    #[arg(long, value_name = "NAME", default_value = "7b")]
    model: String,

    /// Tokens; may be given more than once [default: 2048, or 1 for the ops of generation]
    #[arg(long, value_name = "T", value_parser = at_least_one)]
    tokens: Vec<usize>,

    /// Append the rows to this file
    #[arg(long, value_name = "FILE")]
    csv: Option<PathBuf>,

    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// `halfbyte bench NAME ...`, where NAME is none of the other benchmarks, `others`.
pub fn run(words: &[OsString], others: &[String]) -> Result<()> {
    let name = words.first().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let op = ops::named(&name).ok_or_else(|| unknown(&name, others))?;
    let program = format!("halfbyte bench {name}");
    let command =
        crate::cli::with_usual_flags(OpArgs::command().max_term_width(110).name(program.clone()).bin_name(program));
    // Help and usage errors end the process as they do in `main`.
    let matches = command.try_get_matches_from(words).unwrap_or_else(|e| e.exit());
    let args = OpArgs::from_arg_matches(&matches).unwrap_or_else(|e| e.exit());
    let model = Model::named(&args.model)?;
    if args.print_template {
        return print_template(&op, &args);
    }
    race(&op, &model, &args)
}

fn unknown(name: &str, others: &[String]) -> Error {
    let ops = ops::all();
    let ops = ops.iter().chain(ops::toy::OPS).map(|op| op.name);
    let near = nearest(name, ops.chain(others.iter().map(String::as_str)));
    let near = &near[..near.len().min(3)];
    let expected = match near.is_empty() {
        true => format!("{}, or an op of `halfbyte bench kernels --list`", others.join(", ")),
        false => format!("{} (`halfbyte bench --help` and `halfbyte bench kernels --list` have all)", near.join(", ")),
    };
    Error::flag("halfbyte bench", format!("{name:?}"), expected)
}

fn print_template(op: &Op, args: &OpArgs) -> Result<()> {
    let text = template(op)?;
    let Some(path) = &args.out else { return Out::new().text(&text) };
    let mut options = std::fs::OpenOptions::new();
    // What is there may be the work of days.
    match options.write(true).create_new(true).open(path) {
        Ok(mut file) => std::io::Write::write_all(&mut file, text.as_bytes()).map_err(Error::write("write", path)),
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {
            Err(Error::flag("--out", format!("{}, which exists", path.display()), "a new file"))
        }
        Err(e) => Err(Error::write("write", path)(e)),
    }
}

#[cfg(not(feature = "cuda"))]
fn race(op: &Op, _: &Model, _: &OpArgs) -> Result<()> {
    let why = "this program was built without the feature cuda".into();
    Err(Error::Unavailable { what: format!("the race of {}", op.name), why })
}

#[cfg(feature = "cuda")]
fn race(op: &Op, model: &Model, args: &OpArgs) -> Result<()> {
    gpu::race(op, model, args)
}

#[cfg(feature = "cuda")]
mod gpu {
    use std::process::{Child, Command, Stdio};

    use halfbyte::backend::cuda::Cuda;
    use halfbyte::backend::cuda::device::Driver;
    use halfbyte::backend::cuda::launched::Launched;
    use halfbyte::bench::candidate::Source;
    use halfbyte::bench::candidate::program::Program;
    use halfbyte::bench::candidate::verdict::{Finish, ranking, verdict};
    use halfbyte::bench::kernels::case::{Case, Way};
    use halfbyte::bench::kernels::gpu::Gpu;
    use halfbyte::bench::kernels::models::{Model, TOKENS};
    use halfbyte::bench::kernels::ops::Op;
    use halfbyte::bench::kernels::outcome::Outcome;
    use halfbyte::bench::results::{self, KernelRow};
    use halfbyte::train::interrupt;
    use halfbyte::{Error, Result};
    use serde_json::{Value, json};

    use super::OpArgs;
    use crate::cli::args::micro_batch;
    use crate::cli::bench::watch::watch;
    use crate::cli::output::{Out, note, put, table};

    const CANDIDATE: &str = "candidate";

    /// Checks and times the ways of a case that this machine has.
    fn outcomes(gpu: &mut Gpu, case: &Case, ways: Vec<Way>) -> Result<Vec<Outcome>> {
        let case = Case { ways, ..case.clone() };
        if !gpu.fits(&case) {
            let why = format!("{} of {} does not fit in its free memory", case.shape, case.model);
            return Err(Error::Unavailable { what: "the race".into(), why });
        }
        gpu.race(&[case], &|_| true, &mut || {})
    }

    pub fn race(op: &Op, model: &Model, args: &OpArgs) -> Result<()> {
        let cases = cases(op, model, args)?;
        if let Some(path) = &args.csv {
            results::can_append::<KernelRow>(path)?;
        }
        let source = args.candidate.as_deref().map(Source::read).transpose()?;
        if args.candidate.is_some() && op.starter.is_none() {
            // Its reason is the template's.
            super::template(op)?;
        }
        if args.watch {
            return again_and_again(op, args);
        }
        let mut cuda = Cuda::open(0)?;
        let program = source.map(|source| Program::build(&cuda, &source)).transpose()?;
        if let Some(program) = program.as_ref().filter(|p| !p.log.is_empty()) {
            note(format_args!("{}", program.log));
        }
        let mut report = Report { args, out: Out::new(), rows: vec![], json: vec![], wrong: None };
        let card = cuda.device().name.clone();
        let mut gpu = Gpu::new(&mut cuda, cases.iter())?;
        for case in &cases {
            let mut ways = case.ways.clone();
            if let Some(program) = &program {
                ways.push(program.way(gpu.cuda, case, CANDIDATE)?);
            }
            let all = outcomes(&mut gpu, case, ways)?;
            report.case(&card, case, &all)?;
        }
        report.end(op)
    }

    /// The cases that are asked for.
    fn cases(op: &Op, model: &Model, args: &OpArgs) -> Result<Vec<Case>> {
        let tokens = match (op.has_tokens, args.tokens.as_slice()) {
            (true, []) => vec![op.usual_tokens(model)],
            (true, some) => some.to_vec(),
            (false, []) => vec![TOKENS[0]],
            (false, [first, ..]) => {
                return Err(Error::flag("--tokens", first.to_string(), format!("none: {} has no tokens", op.name)));
            }
        };
        for &t in &tokens {
            micro_batch("--tokens", 1, t)?;
        }
        let cases: Vec<Case> = tokens.iter().flat_map(|&t| (op.cases)(model, t)).collect();
        if cases.is_empty() {
            let expected = format!("a number such as {}: {} has no shape at these", op.usual_tokens(model), op.name);
            return Err(Error::flag("--tokens", format!("{tokens:?}"), expected));
        }
        Ok(cases)
    }

    /// `--watch`: a process of its own for each race.
    fn again_and_again(op: &Op, args: &OpArgs) -> Result<()> {
        // A GPU that is not there would not come.
        let driver = Driver::discover()?;
        let why = driver.too_old.or_else(|| driver.devices.into_iter().next().and_then(|device| device.unsupported));
        if let Some(why) = why {
            return Err(Error::Unavailable { what: "GPU 0".into(), why });
        }
        let Some(file) = &args.candidate else { return Ok(()) };
        let program = std::env::current_exe().map_err(Error::read("find", "this program"))?;
        let mut start = || -> Result<Child> {
            let mut command = Command::new(&program);
            command.args(["bench", op.name, "--model", &args.model, "--candidate"]).arg(file);
            for t in &args.tokens {
                command.args(["--tokens", &t.to_string()]);
            }
            if args.json {
                command.arg("--json");
            }
            command.stdin(Stdio::null()).spawn().map_err(Error::read("start", &program))
        };
        watch(file, &*interrupt::install()?, &mut start)
    }

    /// Lines of a table: what each way launches, a kernel that comes several times in a row once.
    fn kernels(all: &[Outcome]) -> Vec<Vec<String>> {
        let head = ["runs", "", "grid", "block", "registers", "local bytes", "shared bytes", "occupancy"];
        let mut lines = vec![head.map(String::from).to_vec()];
        for outcome in all {
            for same in outcome.launched.chunk_by(|a, b| a == b) {
                let Launched { kernel, grid, block, dynamic_shared_bytes, attributes, occupancy, .. } = &same[0];
                let times = if same.len() > 1 { format!("{} x ", same.len()) } else { String::new() };
                let size = |s: &[u32; 3]| format!("{}x{}x{}", s[0], s[1], s[2]);
                lines.push(vec![
                    outcome.row.implementation.clone(),
                    format!("{times}{}", if kernel.is_empty() { "a kernel" } else { kernel }),
                    size(grid),
                    size(block),
                    attributes.registers.to_string(),
                    attributes.local_bytes.to_string(),
                    format!("{} + {dynamic_shared_bytes}", attributes.static_shared_bytes),
                    format!("{:.0} %", 100.0 * occupancy),
                ]);
            }
        }
        lines
    }

    /// What is shown and kept of a race.
    struct Report<'a> {
        args: &'a OpArgs,
        out: Out,
        rows: Vec<KernelRow>,
        json: Vec<Value>,
        /// The first wrong way, told when all is shown.
        wrong: Option<Error>,
    }

    impl Report<'_> {
        fn case(&mut self, card: &str, case: &Case, all: &[Outcome]) -> Result<()> {
            let finishes: Vec<Finish> = all.iter().map(Finish::from).collect();
            let verdict = verdict(&finishes, CANDIDATE);
            for outcome in all {
                let way = &outcome.row.implementation;
                if let Some(difference) = &outcome.refused {
                    let place = format!("{} {}", case.op, case.shape);
                    let file = self.args.candidate.as_ref().filter(|_| way == CANDIDATE);
                    let error = match file {
                        Some(file) => {
                            let found = format!("{} = {:?}", difference.place, difference.found);
                            Error::input(file, place, found, difference.expectation())
                        }
                        None => Error::Cuda { op: format!("{place} by {way}"), detail: difference.to_string() },
                    };
                    self.wrong.get_or_insert(error);
                } else {
                    self.rows.push(outcome.row.clone());
                }
            }
            if self.args.json {
                let ways: Vec<Value> = all
                    .iter()
                    .map(|o| {
                        let (way, refused) = (&o.row.implementation, o.refused.as_ref().map(ToString::to_string));
                        let row = refused.is_none().then_some(&o.row);
                        json!({ "way": way, "refused": refused, "row": row, "kernels": o.launched })
                    })
                    .collect();
                self.json.push(json!({
                    "shape": case.shape,
                    "tokens": case.tokens,
                    "ways": ways,
                    "verdict": verdict,
                }));
                return Ok(());
            }
            let out = &mut self.out;
            put!(out, "{} {} of {} on {card}", case.op, case.shape, case.model)?;
            let head = ["", "median us", "least", "most", "GB/s", "TFLOP/s", "% of floor"];
            let mut lines = vec![head.map(String::from).to_vec()];
            for (finish, [median, least, most]) in ranking(&finishes) {
                let row = all.iter().find(|o| o.row.implementation == finish.way).map(|o| &o.row);
                let cell = |value: Option<f64>| match value.filter(|v| *v > 0.0) {
                    Some(value) => format!("{value:.1}"),
                    None => String::new(),
                };
                lines.push(vec![
                    finish.way.clone(),
                    format!("{median:.2}"),
                    format!("{least:.2}"),
                    format!("{most:.2}"),
                    cell(row.map(|r| r.gb_per_s)),
                    cell(row.map(|r| r.tflop_per_s)),
                    cell(row.map(|r| r.percent_of_floor)),
                ]);
            }
            for line in table(&lines, &[1, 2, 3, 4, 5, 6]) {
                put!(out, "  {line}")?;
            }
            for finish in &finishes {
                if let Some(difference) = &finish.refused {
                    put!(out, "  {} is refused: {difference}", finish.way)?;
                }
            }
            for line in table(&kernels(all), &[2, 3, 4, 5, 6, 7]) {
                put!(out, "  {line}")?;
            }
            put!(out, "  {verdict}")?;
            out.flush()
        }

        fn end(mut self, op: &Op) -> Result<()> {
            if let Some(path) = &self.args.csv {
                results::append(path, &self.rows)?;
            }
            if self.args.json {
                let cases = std::mem::take(&mut self.json);
                self.out.json(&json!({ "op": op.name, "model": self.args.model, "cases": cases }))?;
            }
            self.out.flush()?;
            self.wrong.map_or(Ok(()), Err)
        }
    }

    #[cfg(test)]
    mod tests {
        use halfbyte::backend::cuda::module::Attributes;

        use super::*;

        #[test]
        fn a_kernel_that_runs_three_times_is_one_line() {
            let attributes =
                Attributes { registers: 40, local_bytes: 16, static_shared_bytes: 1024, most_threads: 1024 };
            let one = Launched {
                kernel: "k".into(),
                grid: [7, 1, 1],
                block: [64, 1, 1],
                dynamic_shared_bytes: 512,
                attributes,
                blocks_per_multiprocessor: 8,
                occupancy: 0.25,
            };
            let other = Launched { kernel: String::new(), ..one.clone() };
            let row = KernelRow { implementation: "own".into(), ..KernelRow::default() };
            let lines =
                kernels(&[Outcome { row, refused: None, launched: vec![one.clone(), one.clone(), one, other] }]);
            assert_eq!(lines[1].join(" | "), "own | 3 x k | 7x1x1 | 64x1x1 | 40 | 16 | 1024 + 512 | 25 %");
            assert_eq!((lines.len(), lines[2][1].as_str()), (3, "a kernel"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parser_is_consistent() {
        OpArgs::command().debug_assert();
    }

    #[test]
    fn an_unknown_name_gets_those_near_it() {
        let others = ["step".to_string(), "decode".into()];
        let text = unknown("rmsnorm_foward", &others).to_string();
        assert!(text.starts_with("halfbyte bench: found \"rmsnorm_foward\", expected rmsnorm_forward"), "{text}");
        assert!(unknown("stpe", &others).to_string().contains("expected step"));
        assert!(unknown("zzz", &others).to_string().contains("step, decode, or an op of"));
    }
}
