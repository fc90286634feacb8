//! Who won a race: the ways by median, and whether the spread leaves a winner at all.

use crate::bench::kernels::check::Difference;
use crate::bench::kernels::outcome::Outcome;

/// How a way came out.
#[derive(Clone, Debug)]
pub struct Finish {
    pub way: String,
    /// Microseconds of one launch: median, least, most. None if it was not timed.
    pub times: Option<[f64; 3]>,
    /// What was wrong with its output.
    pub refused: Option<Difference>,
}

impl From<&Outcome> for Finish {
    fn from(Outcome { row, refused, .. }: &Outcome) -> Self {
        let times = refused.is_none().then_some([row.median_us, row.least_us, row.most_us]);
        Self { way: row.implementation.clone(), times, refused: refused.clone() }
    }
}

/// Those that are right and were timed, the fastest median first.
pub fn ranking(all: &[Finish]) -> Vec<(&Finish, [f64; 3])> {
    let right = all.iter().filter(|f| f.refused.is_none());
    let mut ranked: Vec<_> = right.filter_map(|f| Some((f, f.times?))).collect();
    ranked.sort_by(|a, b| a.1[0].total_cmp(&b.1[0]));
    ranked
}

/// One line. A winner is named only where its samples and those of the next do not overlap; ways about the candidate
/// come first in mind: where it is neither first nor second, its place is told as well.
pub fn verdict(all: &[Finish], candidate: &str) -> String {
    let ranked = ranking(all);
    let mut line = match ranked.as_slice() {
        [] => return "no winner: none was timed".into(),
        [(only, _)] => return format!("no race: {} ran alone", only.way),
        [(first, a), (second, b), ..] if a[2] < b[1] => {
            format!("winner: {}, {:.2} x as fast as {}", first.way, b[0] / a[0], second.way)
        }
        [(first, a), (second, b), ..] => format!(
            "no difference beyond the spread: {} took {:.2} us ({:.2} to {:.2}), {} {:.2} us ({:.2} to {:.2})",
            first.way, a[0], a[1], a[2], second.way, b[0], b[1], b[2]
        ),
    };
    if let Some(place) = ranked.iter().position(|(f, _)| f.way == candidate).filter(|&place| place > 0) {
        let (best, own) = (ranked[0].1[0], ranked[place].1[0]);
        line += &format!("; {candidate} is {} of {}, {:.2} x the time", ordinal(place + 1), ranked.len(), own / best);
    }
    line
}

fn ordinal(n: usize) -> String {
    match n {
        1 => "1st".into(),
        2 => "2nd".into(),
        3 => "3rd".into(),
        _ => format!("{n}th"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::kernels::case::Expected;

    fn finish(way: &str, times: Option<[f64; 3]>) -> Finish {
        Finish { way: way.into(), times, refused: None }
    }

    #[test]
    fn a_winner_is_named_only_beyond_the_spread() {
        let own = finish("own", Some([10.0, 9.0, 11.0]));
        let fast = finish("candidate", Some([8.0, 7.9, 8.5]));
        let near = finish("candidate", Some([9.5, 8.8, 10.5]));
        let slow = finish("candidate", Some([25.0, 24.0, 26.0]));
        assert_eq!(verdict(&[own.clone(), fast], "candidate"), "winner: candidate, 1.25 x as fast as own");
        let text = verdict(&[own.clone(), near], "candidate");
        assert!(
            text.starts_with("no difference beyond the spread: candidate took 9.50 us (8.80 to 10.50), own"),
            "{text}"
        );
        let text = verdict(&[slow, own], "candidate");
        assert_eq!(text, "winner: own, 2.50 x as fast as candidate; candidate is 2nd of 2, 2.50 x the time");
    }

    #[test]
    fn what_is_wrong_or_was_not_timed_has_no_place() {
        let expected = Expected::exact(1.0);
        let difference = Difference { place: "y[0]".into(), found: 0.0, expected, wrong: 1, compared: 2 };
        let wrong = Finish { refused: Some(difference), ..finish("candidate", Some([1.0, 1.0, 1.0])) };
        let own = finish("own", Some([10.0, 9.0, 11.0]));
        assert_eq!(ranking(&[wrong.clone(), own.clone()]).len(), 1);
        assert_eq!(verdict(&[wrong.clone(), own], "candidate"), "no race: own ran alone");
        assert_eq!(verdict(&[wrong, finish("own", None)], "candidate"), "no winner: none was timed");
    }
}
