//! Lengths, with a list of exceptions that can only shrink.
//!
//! A line of `xtask/exceptions.txt` is a length and a name (`path` or `path::function`), or a
//! number of files or folders and `path::files in circles` or `path::folders in circles`. What is
//! longer than its entry, or long without one, is a problem; an entry that allows more than is
//! needed is one too, until `cargo xtask tidy --update` lowers or removes it.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::Context;

const FILE_LINES_MAX: usize = 800;
const FUNCTION_LINES_MAX: usize = 70;
/// Ends the names of what is counted in files or folders.
const CIRCLES: &str = " in circles";

const HEADER: &str = "\
# Files over 800 lines, functions over 70, and import circles, each with its present size. This list
# only shrinks:
# `cargo xtask tidy --update` lowers and removes entries, and nothing adds any.
";

pub(super) fn check(
    root: &Path,
    lengths: &BTreeMap<String, usize>,
    update: bool,
) -> anyhow::Result<Vec<String>> {
    let path = root.join("xtask/exceptions.txt");
    let text = fs::read_to_string(&path).unwrap_or_default();
    let mut exceptions = parse(&text).with_context(|| path.display().to_string())?;
    if update {
        exceptions = shrunk(&exceptions, lengths);
        let mut text = HEADER.to_owned();
        for (name, lines) in &exceptions {
            writeln!(text, "{lines} {name}")?;
        }
        fs::write(&path, text)?;
    }
    Ok(problems(&exceptions, lengths))
}

fn parse(text: &str) -> anyhow::Result<BTreeMap<String, usize>> {
    let entries = text.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    entries
        .map(|line| {
            let (lines, name) = line.split_once(' ').context("a line is `LINES NAME`")?;
            Ok((name.to_owned(), lines.parse().with_context(|| line.to_owned())?))
        })
        .collect()
}

fn limit(name: &str) -> usize {
    match name {
        _ if name.ends_with(CIRCLES) => 0,
        _ if name.contains("::") => FUNCTION_LINES_MAX,
        _ => FILE_LINES_MAX,
    }
}

/// The exceptions that are still needed, none larger than before.
fn shrunk(
    exceptions: &BTreeMap<String, usize>,
    lengths: &BTreeMap<String, usize>,
) -> BTreeMap<String, usize> {
    let needed = exceptions.iter().filter_map(|(name, allowed)| {
        let lines = lengths.get(name).copied().unwrap_or(0);
        (lines > limit(name)).then(|| (name.clone(), lines.min(*allowed)))
    });
    needed.collect()
}

fn problems(
    exceptions: &BTreeMap<String, usize>,
    lengths: &BTreeMap<String, usize>,
) -> Vec<String> {
    let mut problems = Vec::new();
    for (name, lines) in lengths {
        let allowed = exceptions.get(name).copied().unwrap_or_else(|| limit(name));
        if *lines > allowed {
            let unit = if name.ends_with(CIRCLES) { "" } else { " lines" };
            problems.push(format!("{name}: {lines}{unit}, at most {allowed}"));
        }
    }
    for (name, lines) in exceptions {
        if shrunk(exceptions, lengths).get(name) != Some(lines) {
            let advice = "run `cargo xtask tidy --update`";
            problems.push(format!("{name}: its exception allows more than it needs; {advice}"));
        }
    }
    problems
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_only_shrinks() {
        let lengths = |entries: &[(&str, usize)]| -> BTreeMap<String, usize> {
            entries.iter().map(|(name, lines)| ((*name).to_owned(), *lines)).collect()
        };
        let exceptions = parse("# note\n900 a.rs\n100 a.rs::f\n").unwrap();
        let exact = lengths(&[("a.rs", 900), ("a.rs::f", 100), ("a.rs::g", 70)]);
        assert!(problems(&exceptions, &exact).is_empty());
        let grown = lengths(&[("a.rs", 901), ("a.rs::f", 100), ("a.rs::g", 71)]);
        assert_eq!(problems(&exceptions, &grown).len(), 2);
        assert_eq!(shrunk(&exceptions, &grown), exceptions);
        let smaller = lengths(&[("a.rs", 850), ("a.rs::f", 60)]);
        assert_eq!(problems(&exceptions, &smaller).len(), 2);
        assert_eq!(shrunk(&exceptions, &smaller), lengths(&[("a.rs", 850)]));
        assert!(parse("a.rs 900").is_err());
    }
}
