//! Whole numbers from the scalars of a case: `ceil_div(t * c, 256)`. Unsigned and checked: a mistake is told, never wrapped.

use crate::bench::kernels::case::Scalar;

/// Parentheses and functions inside each other; more is no launch line that anyone writes.
const DEPTH: usize = 64;
/// Numbers and names of one line, likewise: an expression is computed by recursion.
const OPERANDS: usize = 500;

/// An expression as it was written, ready to be computed.
#[derive(Clone, Debug, PartialEq)]
pub enum Expression {
    Number(u64),
    Name(String),
    Binary(char, Box<[Expression; 2]>),
    Call(Function, Vec<Expression>),
}

/// What can be called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Function {
    CeilDiv,
    Min,
    Max,
}

impl Function {
    fn named(name: &str) -> Option<Self> {
        Some(match name {
            "ceil_div" => Self::CeilDiv,
            "min" => Self::Min,
            "max" => Self::Max,
            _ => return None,
        })
    }
}

impl Expression {
    /// Its value. Errors say what is wrong, without place.
    pub fn value(&self, scalars: &[(&str, Scalar)]) -> Result<u64, String> {
        match self {
            Self::Number(n) => Ok(*n),
            Self::Name(name) => match scalars.iter().find(|(n, _)| n == name) {
                Some((_, Scalar::U64(n))) => Ok(*n),
                Some((_, Scalar::F32(_))) => Err(format!("{name} is a float; only whole numbers can be used")),
                None => {
                    let whole = scalars.iter().filter(|(_, s)| matches!(s, Scalar::U64(_)));
                    let names: Vec<&str> = whole.map(|(n, _)| *n).collect();
                    Err(format!("{name} is none of the op's numbers: {}", names.join(", ")))
                }
            },
            Self::Binary(operator, operands) => {
                let (a, b) = (operands[0].value(scalars)?, operands[1].value(scalars)?);
                let result = match operator {
                    '+' => a.checked_add(b),
                    '-' => a.checked_sub(b),
                    '*' => a.checked_mul(b),
                    _ if b == 0 => return Err(format!("{a} / 0")),
                    _ => Some(a / b),
                };
                result.ok_or_else(|| format!("{a} {operator} {b} is outside of 0 to 2^64"))
            }
            Self::Call(function, arguments) => {
                let values = arguments.iter().map(|a| a.value(scalars)).collect::<Result<Vec<_>, _>>()?;
                match (function, values.as_slice()) {
                    (Function::CeilDiv, [a, 0]) => Err(format!("ceil_div({a}, 0)")),
                    (Function::CeilDiv, [a, b]) => Ok(a.div_ceil(*b)),
                    (Function::Min, all) => Ok(all.iter().copied().min().unwrap_or(0)),
                    (Function::Max, all) => Ok(all.iter().copied().max().unwrap_or(0)),
                    // The parser has counted them.
                    (Function::CeilDiv, _) => Err("ceil_div takes two numbers".into()),
                }
            }
        }
    }
}

impl std::fmt::Display for Expression {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Number(n) => write!(f, "{n}"),
            Self::Name(name) => f.write_str(name),
            Self::Binary(operator, operands) => write!(f, "({} {operator} {})", operands[0], operands[1]),
            Self::Call(function, arguments) => {
                let name = match function {
                    Function::CeilDiv => "ceil_div",
                    Function::Min => "min",
                    Function::Max => "max",
                };
                let all: Vec<String> = arguments.iter().map(ToString::to_string).collect();
                write!(f, "{name}({})", all.join(", "))
            }
        }
    }
}

/// Reads expressions out of one line, from left to right.
pub struct Parser<'a> {
    rest: &'a str,
    depth: usize,
    operands: usize,
}

impl<'a> Parser<'a> {
    pub fn new(text: &'a str) -> Self {
        Self { rest: text, depth: 0, operands: 0 }
    }

    /// What is not read yet, without leading blanks.
    pub fn rest(&mut self) -> &'a str {
        self.rest = self.rest.trim_start();
        self.rest
    }

    /// Whether the next character is this one; it is read then.
    pub fn eat(&mut self, c: char) -> bool {
        match self.rest().strip_prefix(c) {
            Some(rest) => {
                self.rest = rest;
                true
            }
            None => false,
        }
    }

    /// The next name, "" if there is none.
    pub fn name(&mut self) -> &'a str {
        let text = self.rest();
        let inside = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let starts = text.starts_with(|c: char| inside(c) && !c.is_ascii_digit());
        let end = if starts { text.find(|c| !inside(c)).unwrap_or(text.len()) } else { 0 };
        let (name, rest) = text.split_at(end);
        self.rest = rest;
        name
    }

    /// Sums and differences.
    pub fn expression(&mut self) -> Result<Expression, String> {
        self.depth += 1;
        if self.depth > DEPTH {
            return Err(format!("more than {DEPTH} parentheses inside each other"));
        }
        let mut left = self.product()?;
        while let Some(operator) = self.operator(&['+', '-']) {
            left = Expression::Binary(operator, Box::new([left, self.product()?]));
        }
        self.depth -= 1;
        Ok(left)
    }

    fn product(&mut self) -> Result<Expression, String> {
        let mut left = self.operand()?;
        while let Some(operator) = self.operator(&['*', '/']) {
            left = Expression::Binary(operator, Box::new([left, self.operand()?]));
        }
        Ok(left)
    }

    fn operator(&mut self, all: &[char]) -> Option<char> {
        all.iter().copied().find(|&c| self.eat(c))
    }

    fn operand(&mut self) -> Result<Expression, String> {
        self.operands += 1;
        if self.operands > OPERANDS {
            return Err(format!("more than {OPERANDS} numbers and names"));
        }
        if self.eat('(') {
            let inner = self.expression()?;
            return if self.eat(')') { Ok(inner) } else { Err(self.wanted("\")\"")) };
        }
        let text = self.rest();
        let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        if digits > 0 {
            let (number, rest) = text.split_at(digits);
            self.rest = rest;
            let value = number.parse().map_err(|_| format!("{number}, which is above 2^64"))?;
            return Ok(Expression::Number(value));
        }
        let name = self.name();
        if name.is_empty() {
            return Err(self.wanted("a number or a name"));
        }
        if !self.eat('(') {
            return Ok(Expression::Name(name.into()));
        }
        let function = Function::named(name).ok_or_else(|| format!("{name}(), which is none of ceil_div, min, max"))?;
        let mut arguments = vec![self.expression()?];
        while self.eat(',') {
            arguments.push(self.expression()?);
        }
        if !self.eat(')') {
            return Err(self.wanted("\")\""));
        }
        let fits = if function == Function::CeilDiv { arguments.len() == 2 } else { arguments.len() >= 2 };
        match fits {
            true => Ok(Expression::Call(function, arguments)),
            false => Err(format!("{name} of {} numbers, which takes two", arguments.len())),
        }
    }

    fn wanted(&mut self, what: &str) -> String {
        match self.rest() {
            "" => format!("the end of the line in place of {what}"),
            rest => format!("{:?} in place of {what}", rest.chars().take(20).collect::<String>()),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SCALARS: [(&str, Scalar); 3] = [("t", Scalar::U64(5)), ("c", Scalar::U64(4096)), ("eps", Scalar::F32(1e-5))];

    fn value(text: &str) -> Result<u64, String> {
        let mut parser = Parser::new(text);
        let parsed = parser.expression()?;
        match parser.rest() {
            "" => parsed.value(&SCALARS),
            rest => Err(format!("left: {rest}")),
        }
    }

    #[test]
    fn expressions_are_computed_as_in_c() {
        for (text, expected) in [
            ("7", 7),
            ("t", 5),
            ("t*c", 20_480),
            ("2 + 3 * t - 1", 16),
            ("(2 + 3) * t", 25),
            ("7 / 2", 3),
            ("20 / 2 / 5", 2),
            ("10 - 3 - 2", 5),
            ("ceil_div(t * c + 1, 256)", 81),
            ("min(t, c, 3)", 3),
            ("max(t, ceil_div(c, 2))", 2048),
            ("18446744073709551615", u64::MAX),
        ] {
            assert_eq!(value(text), Ok(expected), "{text}");
        }
    }

    #[test]
    fn what_has_no_value_says_why() {
        for (text, part) in [
            ("", "the end of the line in place of a number"),
            ("t +", "the end of the line"),
            ("(t", "in place of \")\""),
            ("t - 6", "5 - 6 is outside"),
            ("c * 18446744073709551615", "outside"),
            ("18446744073709551615 + 1", "outside"),
            ("18446744073709551616", "above 2^64"),
            ("c / (t - 5)", "4096 / 0"),
            ("ceil_div(c, 0)", "ceil_div(4096, 0)"),
            ("ceil_div(c)", "takes two"),
            ("min(c)", "takes two"),
            ("sqrt(c)", "none of ceil_div, min, max"),
            ("n", "none of the op's numbers: t, c"),
            ("eps", "a float"),
            ("$", "in place of a number"),
        ] {
            let error = value(text).unwrap_err();
            assert!(error.contains(part), "{text:?}: {error}");
        }
        assert!(value(&"(".repeat(100_000)).unwrap_err().contains("parentheses"));
        assert!(value(&"1+".repeat(1_000_000)).unwrap_err().contains("more than 500"));
        assert!(value(&"min(1,".repeat(100_000)).unwrap_err().contains("parentheses"));
    }

    fn expression() -> impl Strategy<Value = Expression> {
        let name = prop_oneof!["t", "c"].prop_map(Expression::Name);
        let leaf = prop_oneof![(0u64..10_000).prop_map(Expression::Number), name];
        leaf.prop_recursive(5, 40, 3, |inner| {
            let operator = prop_oneof![Just('+'), Just('-'), Just('*'), Just('/')];
            let pair = (inner.clone(), inner.clone());
            prop_oneof![
                (operator, pair.clone()).prop_map(|(o, (a, b))| Expression::Binary(o, Box::new([a, b]))),
                pair.prop_map(|(a, b)| Expression::Call(Function::CeilDiv, vec![a, b])),
                prop::collection::vec(inner.clone(), 2..4).prop_map(|v| Expression::Call(Function::Min, v)),
                prop::collection::vec(inner, 2..4).prop_map(|v| Expression::Call(Function::Max, v)),
            ]
        })
    }

    /// The same in 128 bits with a sign; None where 64 bits without one do not hold it.
    fn wide(e: &Expression) -> Option<i128> {
        let inside = |v: i128| (0..1 << 64).contains(&v).then_some(v);
        match e {
            Expression::Number(n) => Some(i128::from(*n)),
            Expression::Name(n) => Some(if n == "t" { 5 } else { 4096 }),
            Expression::Binary(o, operands) => {
                let (a, b) = (wide(&operands[0])?, wide(&operands[1])?);
                match o {
                    '+' => inside(a + b),
                    '-' => inside(a - b),
                    '*' => a.checked_mul(b).and_then(inside),
                    _ => a.checked_div(b),
                }
            }
            Expression::Call(f, arguments) => {
                let all = arguments.iter().map(wide).collect::<Option<Vec<_>>>()?;
                match f {
                    Function::CeilDiv if all[1] == 0 => None,
                    Function::CeilDiv => Some((all[0] + all[1] - 1) / all[1]),
                    Function::Min => all.into_iter().min(),
                    Function::Max => all.into_iter().max(),
                }
            }
        }
    }

    proptest! {
        #[test]
        fn what_is_written_reads_back_and_has_the_value_of_wide_arithmetic(e in expression()) {
            let text = e.to_string();
            let mut parser = Parser::new(&text);
            prop_assert_eq!(parser.expression().unwrap(), e.clone());
            prop_assert_eq!(parser.rest(), "");
            prop_assert_eq!(e.value(&SCALARS).ok().map(i128::from), wide(&e));
        }

        #[test]
        fn any_text_is_read_or_refused(text in "[ tcepsmin0-9_+*/(),-]{0,60}|\\PC{0,40}") {
            let _ = value(&text);
        }
    }
}
