//! `// launch: NAME grid=X[,Y[,Z]] block=X[,Y[,Z]] [shared=BYTES]`: how a candidate's kernels are launched, in order.

use std::path::Path;

use super::expression::{Expression, Parser};
use crate::bench::kernels::case::Scalar;
use crate::error::{Error, Result};

/// Largest grid and block of every card that this program runs on.
const GRID: [u64; 3] = [(1 << 31) - 1, 65_535, 65_535];
const BLOCK: [u64; 3] = [1024, 1024, 64];
const THREADS: u64 = 1024;
/// No card has more shared memory for a block. What this one has is asked when the kernel is there.
const SHARED: u64 = 1 << 20;
/// Launches of one run of an op; more than any op here needs.
const LAUNCHES: usize = 32;

const FORM: &str = "// launch: NAME grid=X[,Y[,Z]] block=X[,Y[,Z]] [shared=BYTES]";

/// One `// launch:` line.
#[derive(Clone, Debug, PartialEq)]
pub struct Directive {
    /// Counted from 1.
    pub line: usize,
    /// The kernel.
    pub kernel: String,
    pub grid: Vec<Expression>,
    pub block: Vec<Expression>,
    pub shared: Option<Expression>,
}

/// The same for one case.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launch {
    pub line: usize,
    pub kernel: String,
    pub grid: [u32; 3],
    pub block: [u32; 3],
    /// Dynamic shared memory in bytes.
    pub shared: u32,
}

impl Launch {
    /// Threads of a block.
    pub fn threads(&self) -> u32 {
        self.block.iter().product()
    }
}

/// What stands behind `// launch:` in this line.
fn directive_of(line: &str) -> Option<&str> {
    line.trim_start().strip_prefix("//")?.trim_start().strip_prefix("launch:")
}

/// The kernel that this line, if it is a launch line, names.
pub(super) fn kernel_of(line: &str) -> Option<&str> {
    Some(Parser::new(directive_of(line)?).name()).filter(|name| !name.is_empty())
}

/// The launch lines of a source. [`Error::Input`] names `file` and line; having none is one too.
pub fn parse(file: &Path, source: &str) -> Result<Vec<Directive>> {
    let mut all = vec![];
    for (i, line) in source.lines().enumerate() {
        let Some(text) = directive_of(line) else { continue };
        let line = i + 1;
        let directive = directive(text, line).map_err(|found| Error::input(file, format!("line {line}"), found, FORM));
        all.push(directive?);
        if all.len() > LAUNCHES {
            let found = format!("launch number {}", all.len());
            return Err(Error::input(file, format!("line {line}"), found, format!("at most {LAUNCHES}")));
        }
    }
    match all.is_empty() {
        true => Err(Error::input(file, "the file", "no line that says how the kernel is launched", FORM)),
        false => Ok(all),
    }
}

fn directive(text: &str, line: usize) -> Result<Directive, String> {
    let mut parser = Parser::new(text);
    let kernel = parser.name().to_string();
    if kernel.is_empty() {
        return Err("no name of a kernel".into());
    }
    let (mut grid, mut block, mut shared) = (None, None, None);
    while !parser.rest().is_empty() {
        let key = parser.name();
        let (slot, most) = match key {
            "grid" => (&mut grid, 3),
            "block" => (&mut block, 3),
            "shared" => (&mut shared, 1),
            "" => return Err(format!("{:?}", parser.rest())),
            _ => return Err(format!("{key:?}, which is none of grid, block, shared")),
        };
        if !parser.eat('=') {
            return Err(format!("{key} without \"=\""));
        }
        let mut values = vec![parser.expression().map_err(|e| format!("in {key}: {e}"))?];
        while parser.eat(',') {
            values.push(parser.expression().map_err(|e| format!("in {key}: {e}"))?);
        }
        if values.len() > most {
            return Err(format!("{key} of {} numbers", values.len()));
        }
        if slot.replace(values).is_some() {
            return Err(format!("{key} twice"));
        }
    }
    let shared = shared.and_then(|values| values.into_iter().next());
    match (grid, block) {
        (Some(grid), Some(block)) => Ok(Directive { line, kernel, grid, block, shared }),
        (None, _) => Err("no grid".into()),
        (_, None) => Err("no block".into()),
    }
}

impl Directive {
    /// With the numbers of a case. [`Error::Input`] if they leave what any card can launch.
    pub fn at(&self, file: &Path, scalars: &[(&str, Scalar)]) -> Result<Launch> {
        let wrong = |found: String, expected: &str| Error::input(file, format!("line {}", self.line), found, expected);
        let sizes = |key: &str, values: &[Expression], limits: [u64; 3]| -> Result<[u32; 3]> {
            let mut sizes = [1u32; 3];
            for (i, value) in values.iter().enumerate().take(3) {
                let n = value.value(scalars);
                let n = n.map_err(|e| wrong(format!("in {key}={value}: {e}"), "a whole number"))?;
                let inside = u32::try_from(n).ok().filter(|_| (1..=limits[i]).contains(&n));
                sizes[i] = inside.ok_or_else(|| {
                    let expected = format!("1 to {} in dimension {}", limits[i], ["x", "y", "z"][i]);
                    wrong(format!("{key}={value}, which is {n}"), &expected)
                })?;
            }
            Ok(sizes)
        };
        let (grid, block) = (sizes("grid", &self.grid, GRID)?, sizes("block", &self.block, BLOCK)?);
        let threads: u64 = block.iter().map(|&n| u64::from(n)).product();
        if threads > THREADS {
            return Err(wrong(format!("blocks of {threads} threads"), "at most 1024 threads a block"));
        }
        let shared = match &self.shared {
            None => 0,
            Some(value) => {
                let n = value.value(scalars).map_err(|e| wrong(format!("in shared={value}: {e}"), "a whole number"))?;
                let inside = u32::try_from(n).ok().filter(|_| n <= SHARED);
                inside.ok_or_else(|| {
                    wrong(format!("shared={value}, which is {n} bytes"), "what a card has for a block")
                })?
            }
        };
        Ok(Launch { line: self.line, kernel: self.kernel.clone(), grid, block, shared })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SCALARS: [(&str, Scalar); 2] = [("t", Scalar::U64(100)), ("c", Scalar::U64(4096))];

    fn launches(source: &str) -> Result<Vec<Launch>> {
        let file = Path::new("my.cu");
        parse(file, source)?.iter().map(|d| d.at(file, &SCALARS)).collect()
    }

    #[test]
    fn launch_lines_are_read_in_order() {
        let source = "// a comment\n// launch: first grid=t block=256\n\n  //launch: second \
                      block = 32, 4 shared=4*c grid=ceil_div(t * c, 256), 2, min(t, 7) // not read\n";
        let source = source.replace(" // not read", "");
        let first = Launch { line: 2, kernel: "first".into(), grid: [100, 1, 1], block: [256, 1, 1], shared: 0 };
        let second = Launch { line: 4, kernel: "second".into(), grid: [1600, 2, 7], block: [32, 4, 1], shared: 16_384 };
        assert_eq!(second.threads(), 128);
        assert_eq!(launches(&source).unwrap(), [first, second]);
    }

    #[test]
    fn a_wrong_launch_line_is_told_with_file_and_line() {
        for (line, part) in [
            ("// launch: grid=1", "\"=1\""),
            ("// launch:", "no name"),
            ("// launch: k block=1", "no grid"),
            ("// launch: k grid=1", "no block"),
            ("// launch: k grid=1 block=1 grid=2", "grid twice"),
            ("// launch: k grid=1,2,3,4 block=1", "grid of 4"),
            ("// launch: k grid=1 block=1 shared=1,2", "shared of 2"),
            ("// launch: k grid=1 block=1 stream=2", "\"stream\", which is none of"),
            ("// launch: k grid 1 block=1", "grid without \"=\""),
            ("// launch: k grid=1 block=1;", "\";\""),
            ("// launch: k grid=x block=1", "x is none of the op's numbers: t, c"),
            ("// launch: k grid=t/(c-4096) block=1", "100 / 0"),
            ("// launch: k grid=t-101 block=1", "100 - 101"),
            ("// launch: k grid=0 block=1", "which is 0, expected 1 to 2147483647"),
            ("// launch: k grid=1,65536 block=1", "1 to 65535 in dimension y"),
            ("// launch: k grid=2147483648 block=1", "which is 2147483648"),
            ("// launch: k grid=1 block=1025", "1 to 1024 in dimension x"),
            ("// launch: k grid=1 block=1,1,65", "1 to 64 in dimension z"),
            ("// launch: k grid=1 block=32,33", "1056 threads"),
            ("// launch: k grid=1 block=1 shared=t*c*c", "bytes"),
        ] {
            let error = launches(&format!("\n\n{line}\n{{\n}}\n")).unwrap_err();
            let text = error.to_string();
            assert!(text.starts_with("my.cu: line 3: ") && text.contains(part), "{line}: {text}");
            assert_eq!(error.exit_code(), 2);
        }
        assert!(launches("int x;\n").unwrap_err().to_string().contains("no line that says how"));
        let many = "// launch: k grid=1 block=1\n".repeat(33);
        assert!(launches(&many).unwrap_err().to_string().contains("line 33: found launch number 33"));
    }

    proptest! {
        #[test]
        fn any_line_is_read_or_refused(text in "( (grid|block|shared)=[tc0-9+*/(),-]{0,12}){0,4}|\\PC{0,60}") {
            if let Ok(all) = launches(&format!("// launch: k{text}")) {
                for launch in all {
                    prop_assert!((1..=1024).contains(&launch.threads()) && launch.grid.iter().all(|&n| n > 0));
                }
            }
        }

        #[test]
        fn a_grid_covers_what_it_must(t in 1u64..1 << 40, width in 1u64..1024) {
            let scalars = [("t", Scalar::U64(t)), ("w", Scalar::U64(width))];
            let directive = &parse(Path::new("f"), "// launch: k grid=ceil_div(t,w) block=w").unwrap()[0];
            match directive.at(Path::new("f"), &scalars) {
                Ok(launch) => {
                    let covered = u64::from(launch.grid[0]) * width;
                    prop_assert!(covered >= t && covered - t < width);
                }
                Err(_) => prop_assert!(t.div_ceil(width) > GRID[0]),
            }
        }
    }
}
