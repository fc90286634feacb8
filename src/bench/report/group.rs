//! Shapes that differ in nothing but the number of tokens lie on one curve.

/// The shape with its tokens told as "T": "512x4096" of 512 tokens is "Tx4096", "4x2048 heads 32" of 8,192 is
/// "4xT/4 heads 32". A shape that does not show its tokens stays as it is.
pub fn group(shape: &str, tokens: Option<usize>) -> String {
    let Some(tokens) = tokens else { return shape.into() };
    let numbers = numbers(shape);
    if let Some((at, _)) = numbers.iter().find(|(_, n)| *n == Some(tokens)) {
        return format!("{}T{}", &shape[..at.start], &shape[at.end..]);
    }
    // Sequences x length: the number of sequences belongs to the group.
    for pair in numbers.windows(2) {
        let [(first, Some(sequences)), (second, Some(length))] = pair else { continue };
        if &shape[first.end..second.start] == "x" && sequences.checked_mul(*length) == Some(tokens) {
            return format!("{}T/{sequences}{}", &shape[..second.start], &shape[second.end..]);
        }
    }
    shape.into()
}

/// Where whole numbers stand, and what they are if that fits; "r=16" is one, "nf4" is not.
fn numbers(shape: &str) -> Vec<(std::ops::Range<usize>, Option<usize>)> {
    let bytes = shape.as_bytes();
    let mut found = vec![];
    let mut start = 0;
    while start < bytes.len() {
        if !bytes[start].is_ascii_digit() {
            start += 1;
            continue;
        }
        let end = start + bytes[start..].iter().take_while(|b| b.is_ascii_digit()).count();
        // The x between two numbers is no word.
        let word = |b: u8| b.is_ascii_alphabetic() && b != b'x' || b == b'.';
        if start == 0 || !word(bytes[start - 1]) {
            found.push((start..end, shape[start..end].parse().ok()));
        }
        start = end;
    }
    found
}

#[cfg(test)]
mod tests {
    use super::group;

    #[test]
    fn the_tokens_of_a_shape_become_t() {
        let cases = [
            ("512x4096", Some(512), "Tx4096"),
            ("4096x4096x4096 r=16", Some(4096), "Tx4096x4096 r=16"),
            ("8192 heads 32:8:128", Some(8192), "T heads 32:8:128"),
            ("q|k|v 16x4096 to 6144 r=16", Some(16), "q|k|v Tx4096 to 6144 r=16"),
            ("1x2048 heads 32:8:128 causal", Some(2048), "1xT heads 32:8:128 causal"),
            ("4x2048 heads 32:8:128 causal", Some(8192), "4xT/4 heads 32:8:128 causal"),
            // No number of its own, the rank is not asked before the tokens.
            ("nf4 4x16", Some(4), "nf4 Tx16"),
            ("14336x4096 double bf16", None, "14336x4096 double bf16"),
            ("14336x4096", Some(7), "14336x4096"),
            ("99999999999999999999999x4 é", Some(4), "99999999999999999999999xT é"),
            ("", Some(1), ""),
        ];
        for (shape, tokens, expected) in cases {
            assert_eq!(group(shape, tokens), expected, "{shape} of {tokens:?}");
        }
    }
}
