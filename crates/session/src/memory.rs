//! The memory that this process has used and that the machine has left, from the operating system.

use std::fs;

use lathe_program::Backend;

/// The peak resident memory of this process, in bytes. `None` on systems other than Linux.
pub fn peak_bytes() -> Option<u64> {
    field(&fs::read_to_string("/proc/self/status").ok()?, "VmHWM:")
}

/// Bytes that weights and cache of `backend` may still take: [`Backend::memory`]. `None` if the
/// system does not say.
pub fn available_bytes(backend: &dyn Backend) -> Option<u64> {
    backend.memory().ok().map(|memory| memory.free_bytes)
}

/// The value of `name` in a file of `Name:   123 kB` lines, in bytes.
fn field(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kilobytes.checked_mul(1024)
}

/// `1500`, `64k`, `8M`, `24G` (powers of 1000) or `8Mi`, `24Gi` (powers of 1024), in bytes.
pub fn parse_bytes(text: &str) -> Option<u64> {
    let text = text.trim().trim_end_matches(['B', 'b']);
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let scale = match text[digits.len()..].to_ascii_lowercase().as_str() {
        "" => 1.0,
        "k" => 1e3,
        "m" => 1e6,
        "g" => 1e9,
        "t" => 1e12,
        "ki" => 1024.0,
        "mi" => 1024.0_f64.powi(2),
        "gi" => 1024.0_f64.powi(3),
        "ti" => 1024.0_f64.powi(4),
        _ => return None,
    };
    let bytes = digits.parse::<f64>().ok()? * scale;
    (bytes >= 1.0 && bytes < u64::MAX as f64).then_some(bytes as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(parse_bytes("1500"), Some(1500));
        assert_eq!(parse_bytes("64k"), Some(64_000));
        assert_eq!(parse_bytes("1.5GB"), Some(1_500_000_000));
        assert_eq!(parse_bytes("2GiB"), Some(2 << 30));
        for bad in ["", "-1", "x", "5q", "nan", "inf", "0"] {
            assert_eq!(parse_bytes(bad), None, "{bad}");
        }
    }

    #[test]
    fn fields() {
        assert_eq!(field("A:  1 kB\nVmHWM:\t 2 kB\n", "VmHWM:"), Some(2048));
        assert_eq!(field("VmHWM: x kB", "VmHWM:"), None);
    }
}
