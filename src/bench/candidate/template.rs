//! `halfbyte bench OP --print-template`: a file that compiles and passes, to begin from. The signature of an op's kernel
//! is defined here: pointers in the order of the case's arguments, then its numbers.

use std::fmt::Write as _;

use crate::bench::kernels::case::{Arg, Role, Scalar};
use crate::bench::kernels::models::Model;
use crate::bench::kernels::ops::Op;
use crate::error::{Error, Result};

/// Whose sizes the comments of a template show, at a usual number of tokens.
const MODEL: &str = "7b";

/// What a template is made of, apart from the starter.
#[derive(Default)]
pub struct Contract<'a> {
    pub op: &'a str,
    pub about: &'a str,
    pub args: &'a [Arg],
    pub scalars: &'a [(&'static str, Scalar)],
    /// With how many the sizes are shown; None where the op has none.
    pub tokens: Option<usize>,
}

/// The starter file of an op. [`Error::Unavailable`] where it has none: no candidate can be raced there.
pub fn template(op: &Op) -> Result<String> {
    let none = || Error::Unavailable {
        what: format!("a candidate of {}", op.name),
        why: "the op is no kernel of its own: it has no starter".into(),
    };
    let starter = op.starter.ok_or_else(none)?;
    let model = Model::named(MODEL)?;
    let usual = op.usual_tokens(&model);
    let case = (op.cases)(&model, usual).into_iter().next().ok_or_else(none)?;
    let tokens = op.has_tokens.then_some(usual);
    let contract = Contract { op: op.name, about: op.about, args: &case.args, scalars: &case.scalars, tokens };
    Ok(contract.file(starter))
}

impl Contract<'_> {
    /// The whole file.
    pub fn file(&self, starter: &str) -> String {
        self.header() + "#include <cuda_bf16.h>\n\n" + &self.kernels(starter)
    }

    /// `extern "C" __global__ void NAME(...)`, a parameter a line.
    pub fn signature(&self, kernel: &str) -> String {
        let pointer = |arg: &Arg| {
            let constant = if arg.role == Role::Input { "const " } else { "" };
            format!("{constant}{}* __restrict__ {}", arg.element.c_name(), arg.name)
        };
        let number = |(name, scalar): &(&str, Scalar)| format!("{} {name}", scalar.c_name());
        let all: Vec<String> = self.args.iter().map(pointer).chain(self.scalars.iter().map(number)).collect();
        format!("extern \"C\" __global__ void {kernel}(\n    {})", all.join(",\n    "))
    }

    fn header(&self) -> String {
        let Self { op, about, args, scalars, tokens } = self;
        let mut text = format!("// {op}: {about}\n//\n");
        let mut rows: Vec<[String; 3]> = vec![];
        for arg in *args {
            let letters: Vec<&str> = arg.dims.iter().map(|d| d.0).collect();
            let sizes: Vec<String> = arg.dims.iter().map(|d| d.1.to_string()).collect();
            let role = match arg.role {
                Role::Input => "read only",
                Role::Output => "to be written whole; holds garbage before",
                Role::InOut => "read and written",
                Role::Scratch => "scratch, holds garbage before",
            };
            let kind = format!("{} ({})", arg.element.c_name(), letters.join(", "));
            rows.push([arg.name.into(), kind, format!("{role}; here ({})", sizes.join(", "))]);
        }
        for (name, scalar) in *scalars {
            let value = match scalar {
                Scalar::U64(n) => n.to_string(),
                Scalar::F32(x) => format!("{x:?}"),
            };
            rows.push([(*name).into(), scalar.c_name().into(), format!("here {value}")]);
        }
        let width = |i: usize| rows.iter().map(|r| r[i].len()).max().unwrap_or(0);
        let (first, second) = (width(0), width(1));
        for [name, kind, what] in &rows {
            // A closed pipe is the only way that writing to a string could fail: there is none.
            let _ = writeln!(text, "//   {name:first$}  {kind:second$}  {what}");
        }
        let here = format!("--model {MODEL}{}", tokens.map(|t| format!(" --tokens {t}")).unwrap_or_default());
        let _ = writeln!(text, "//\n// Arrays are row-major and start at multiples of 256 bytes; \"here\" is {here}.");
        text += "// Every kernel takes exactly these parameters. Those of the `// launch:` lines run in that order, with sizes\n";
        text += "// computed from the whole numbers above by + - * / ceil_div min max and parentheses.\n//\n";
        let _ = writeln!(text, "//   halfbyte bench {op} --candidate THIS.cu --watch\n");
        text
    }

    /// The starter with a signature before each body, a line "{" of its own.
    fn kernels(&self, starter: &str) -> String {
        let mut names: Vec<&str> = vec![];
        for line in starter.lines() {
            let name = super::launch::kernel_of(line);
            names.extend(name.filter(|name| !names.contains(name)));
        }
        let mut names = names.into_iter();
        let mut text = String::new();
        for line in starter.lines() {
            match (line == "{").then(|| names.next()).flatten() {
                Some(name) => text += &(self.signature(name) + " {\n"),
                None => text += &format!("{line}\n"),
            }
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::bench::candidate::launch;
    use crate::bench::kernels::models::{MODELS, TOKENS, TOY};
    use crate::bench::kernels::ops::{all, toy};

    fn with_toy() -> impl Iterator<Item = Op> {
        all().into_iter().chain(toy::OPS.iter().copied())
    }

    #[test]
    fn a_signature_has_pointers_and_then_numbers() {
        let op = all().into_iter().find(|op| op.name == "rmsnorm_forward").unwrap();
        let text = template(&op).unwrap();
        let signature = "// launch: rmsnorm_forward grid=t block=256
extern \"C\" __global__ void rmsnorm_forward(
    __nv_bfloat16* __restrict__ y,
    float* __restrict__ rstd,
    const __nv_bfloat16* __restrict__ x,
    const __nv_bfloat16* __restrict__ w,
    unsigned long long t,
    unsigned long long c,
    float eps) {
  // One block a row.
";
        assert!(text.contains(signature), "{text}");
        assert!(text.contains("//   y     __nv_bfloat16 (T, C)  to be written whole"), "{text}");
        assert!(text.contains("//   eps   float                 here 1e-5\n"), "{text}");
        assert!(text.contains("halfbyte bench rmsnorm_forward --candidate"), "{text}");
    }

    #[test]
    fn several_kernels_get_their_names_in_order_and_helpers_stay() {
        let contract = Contract { op: "x", about: "y", scalars: &[("t", Scalar::U64(1))], ..Contract::default() };
        let starter = "// launch: a grid=1 block=1\n// launch: b grid=1 block=1\n// launch: a grid=1 block=1\n\
                       __device__ int f() {\n  return 1;\n}\n{\n  f();\n}\n{\n}\n";
        let text = contract.kernels(starter);
        assert!(text.contains("return 1;\n}\nextern \"C\" __global__ void a(\n    unsigned long long t) {\n  f();\n}\nextern \"C\" __global__ void b("), "{text}");
        assert_eq!(text.matches("__global__").count(), 2);
    }

    #[test]
    fn every_starter_launches_at_every_shape() {
        for op in with_toy().filter(|op| op.starter.is_some()) {
            let text = template(&op).unwrap();
            assert_eq!(text, template(&op).unwrap(), "the same each time");
            let file = Path::new(op.name);
            let directives = launch::parse(file, &text).unwrap();
            for directive in &directives {
                assert!(text.contains(&format!("__global__ void {}(", directive.kernel)), "{}: no body", op.name);
            }
            for model in MODELS.into_iter().chain([TOY]) {
                for &t in if op.has_tokens { &TOKENS[..] } else { &TOKENS[..1] } {
                    for case in (op.cases)(&model, t) {
                        for directive in &directives {
                            directive.at(file, &case.scalars).unwrap_or_else(|e| panic!("{}: {e}", case.shape));
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn all_cases_of_an_op_share_one_signature() {
        for op in with_toy().filter(|op| op.starter.is_some()) {
            let mut seen = std::collections::BTreeSet::new();
            for model in MODELS.into_iter().chain([TOY]) {
                for case in (op.cases)(&model, op.usual_tokens(&model)) {
                    let contract = Contract { args: &case.args, scalars: &case.scalars, ..Contract::default() };
                    seen.insert(contract.signature("k"));
                }
            }
            assert_eq!(seen.len(), 1, "{}: {seen:?}", op.name);
        }
    }

    /// What is shown as "here" are the sizes that the flags named beside it give.
    #[test]
    fn the_sizes_of_a_template_are_those_of_its_flags() {
        for (name, flags) in [
            ("rmsnorm_forward", "--model 7b --tokens 2048."),
            ("matvec", "--model 7b --tokens 1."),
            ("nf4_quantize", "--model 7b."),
        ] {
            let op = with_toy().find(|op| op.name == name).unwrap();
            let text = template(&op).unwrap();
            assert!(text.contains(&format!("\"here\" is {flags}\n")), "{text}");
        }
    }

    #[test]
    fn an_op_without_a_starter_says_so() {
        let op = Op { starter: None, ..all()[0] };
        assert!(template(&op).unwrap_err().to_string().contains("no starter"));
    }
}
