//! Sizes of memory as people write them.

use crate::error::{Error, Result};

/// Bytes of a text such as "24GiB", "80GB", "512MiB" or "1.5 GiB"; binary units count by 1024, decimal ones by 1000, a
/// number alone is bytes. Errors name `flag`.
pub fn parse_size(flag: &str, text: &str) -> Result<usize> {
    const UNITS: [(&str, f64); 9] = [
        ("TiB", (1u64 << 40) as f64),
        ("GiB", (1u64 << 30) as f64),
        ("MiB", (1u64 << 20) as f64),
        ("KiB", 1024.0),
        ("TB", 1e12),
        ("GB", 1e9),
        ("MB", 1e6),
        ("kB", 1e3),
        ("B", 1.0),
    ];
    let wrong = || Error::flag(flag, format!("{text:?}"), "a size such as 24GiB, 80GB or 512MiB");
    let trimmed = text.trim();
    let ends = |unit: &str| {
        let at = trimmed.len().checked_sub(unit.len())?;
        let tail = trimmed.get(at..)?;
        tail.eq_ignore_ascii_case(unit).then(|| &trimmed[..at])
    };
    let (number, unit) = UNITS.iter().find_map(|&(name, unit)| Some((ends(name)?, unit))).unwrap_or((trimmed, 1.0));
    let number: f64 = number.trim().parse().map_err(|_| wrong())?;
    let bytes = number * unit;
    if number.is_sign_positive() && bytes >= 1.0 && bytes < (1u64 << 50) as f64 {
        Ok(bytes as usize)
    } else {
        Err(wrong())
    }
}

/// "24.00 GiB", "12 B".
pub fn size(bytes: usize) -> String {
    let units = ["KiB", "MiB", "GiB", "TiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let (mut value, mut unit) = (bytes as f64 / 1024.0, 0);
    while value >= 1023.995 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.2} {}", units[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_in_binary_and_decimal_units() {
        for (text, bytes) in [
            ("24GiB", 24 << 30),
            ("24 gib", 24 << 30),
            ("80GB", 80_000_000_000),
            ("1.5MiB", 3 << 19),
            ("512kb", 512_000),
            ("1000", 1000),
            ("7B", 7),
        ] {
            assert_eq!(parse_size("memory", text).unwrap(), bytes, "{text}");
        }
        for text in ["", "GiB", "24GX", "-1GiB", "0", "nan", "inf", "1e40GiB", "24Gi B", "ü", "é"] {
            let e = parse_size("memory", text).unwrap_err();
            assert_eq!(e.exit_code(), 2, "{text:?}");
            assert!(e.to_string().starts_with("memory: "), "{e}");
        }
    }
}
