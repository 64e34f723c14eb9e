//! Amounts of memory as people write them: `512M`, `1.5G`, `max`.

use anyhow::{Result, bail};

/// Bytes of `text`: a number with an optional K, M, G, T, P or E (powers of 1024, `i`/`B` allowed after it).
///
/// # Errors
/// When it is no such number, or does not fit 63 bits (the kernel's counters are signed).
pub fn parse_bytes(text: &str) -> Result<u64> {
    let text = text.trim();
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = text[digits.len()..].to_ascii_uppercase();
    let shift = match unit.trim_end_matches('B').trim_end_matches('I') {
        "" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        "P" => 50,
        "E" => 60,
        _ => bail!("'{text}' is no size: unknown unit '{unit}' (use K, M, G or T)"),
    };
    let scale = (1u64 << shift) as f64;
    let Ok(number) = digits.parse::<f64>() else { bail!("'{text}' is no size (an example: 512M)") };
    if !number.is_finite() || number < 0.0 {
        bail!("'{text}' is no size: it must not be negative");
    }
    if number * scale >= i64::MAX as f64 {
        bail!("'{text}' is too large");
    }
    // Whole numbers do not go through a float: 2^53 and more would lose bytes.
    Ok(digits.parse::<u64>().map_or_else(|_| (number * scale) as u64, |whole| whole << shift))
}

/// `bytes` for people, three significant digits: `512M`, `1.50G`.
pub fn show_bytes(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "K", "M", "G", "T", "P", "E"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1000.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    match value {
        _ if unit == 0 || value >= 100.0 || value.fract() == 0.0 => format!("{value:.0}{}", UNITS[unit]),
        _ if value >= 10.0 => format!("{value:.1}{}", UNITS[unit]),
        _ => format!("{value:.2}{}", UNITS[unit]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_people_write_them() {
        for (text, bytes) in [
            ("0", 0),
            ("512M", 512 << 20),
            ("512MiB", 512 << 20),
            ("1.5g", 3 << 29),
            ("4096", 4096),
            ("7E", 7 << 60),
            ("9007199254740993", 9_007_199_254_740_993),
        ] {
            assert_eq!(parse_bytes(text).unwrap(), bytes, "{text}");
        }
    }

    #[test]
    fn nonsense_is_refused() {
        for text in ["", "-1", "M", "1X", "99E", "8E", "nan", "inf", "1 M M", "0x10"] {
            assert!(parse_bytes(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_are_shown_short() {
        for (bytes, text) in
            [(0, "0B"), (999, "999B"), (1 << 20, "1M"), (3 << 29, "1.50G"), (512 << 20, "512M"), (1_300_000, "1.24M")]
        {
            assert_eq!(show_bytes(bytes), text);
        }
    }
}
