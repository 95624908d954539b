//! Sizes as people write them: `20GiB`, `512M`, `4096`.

/// Reads a size in bytes. `K`, `M`, `G`, `T` (with or without `iB`) are powers of 1024, `KB`, `MB`,
/// `GB`, `TB` powers of 1000, a bare number is bytes.
///
/// # Errors
/// A sentence that says what was wrong and what is accepted.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let digits = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let explain = || format!("`{text}` is not a size; write for example 512MiB, 20GiB or 1TiB");
    let number: u64 = number.parse().map_err(|_| explain())?;
    let factor: u64 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kib" => 1 << 10,
        "m" | "mib" => 1 << 20,
        "g" | "gib" => 1 << 30,
        "t" | "tib" => 1 << 40,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "tb" => 1_000_000_000_000,
        _ => return Err(explain()),
    };
    number
        .checked_mul(factor)
        .ok_or_else(|| format!("`{text}` is larger than 16 EiB"))
}

/// Writes a size with the largest binary unit that keeps it exact to one decimal.
#[must_use]
pub fn format_size(bytes: u64) -> String {
    const UNITS: [(&str, u32); 4] = [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];
    for (unit, shift) in UNITS {
        if bytes >= 1 << shift {
            let whole = bytes >> shift;
            let tenth = ((bytes - (whole << shift)) * 10) >> shift;
            return if tenth == 0 {
                format!("{whole} {unit}")
            } else {
                format!("{whole}.{tenth} {unit}")
            };
        }
    }
    format!("{bytes} B")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_in_and_out() {
        assert_eq!(parse_size("20GiB"), Ok(20 << 30));
        assert_eq!(parse_size(" 512 m "), Ok(512 << 20));
        assert_eq!(parse_size("1kb"), Ok(1000));
        assert_eq!(parse_size("0"), Ok(0));
        assert!(parse_size("GiB").unwrap_err().contains("20GiB"));
        assert!(parse_size("-4K").is_err());
        assert!(parse_size("99999999T").unwrap_err().contains("EiB"));
        assert_eq!(format_size(1536), "1.5 KiB");
        assert_eq!(format_size(20 << 30), "20 GiB");
        assert_eq!(format_size(12), "12 B");
    }
}
