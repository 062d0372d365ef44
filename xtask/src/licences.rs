//! `cargo xtask licences`: every dependency's licence is one that deny.toml allows.
//!
//! `cargo deny` checks the same and more; this needs no installed tool, so that it can run everywhere.

use std::fs;
use std::path::Path;

use anyhow::Context;

pub(crate) fn run(root: &Path) -> anyhow::Result<Vec<String>> {
    let deny = fs::read_to_string(root.join("deny.toml")).context("deny.toml")?;
    let allowed = allowed_licences(&deny)?;
    // All platforms' dependencies, if they are here or can be fetched; else those of this machine.
    let metadata = match crate::metadata(root, &["--locked"]) {
        Ok(metadata) => metadata,
        Err(_) => crate::metadata(root, &["--offline", "--filter-platform", &host()?])?,
    };
    let mut problems = Vec::new();
    for package in metadata["packages"].as_array().into_iter().flatten() {
        let (name, version) = (text(package, "name"), text(package, "version"));
        match package["license"].as_str() {
            Some(expression) => match accepts(expression, &allowed) {
                Ok(true) => {}
                Ok(false) => problems.push(format!("{name} {version}: {expression}")),
                Err(error) => problems.push(format!("{name} {version}: {error}")),
            },
            None => problems.push(format!("{name} {version}: names no licence")),
        }
    }
    Ok(problems)
}

/// The triple of this machine.
fn host() -> anyhow::Result<String> {
    let output = std::process::Command::new("rustc").arg("-vV").output()?;
    let text = String::from_utf8(output.stdout)?;
    let line = text.lines().find_map(|line| line.strip_prefix("host: "));
    Ok(line.context("rustc -vV names no host")?.to_owned())
}

fn text<'a>(value: &'a serde_json::Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_default()
}

/// The list `allow` of the table `[licenses]`.
fn allowed_licences(deny: &str) -> anyhow::Result<Vec<String>> {
    let table = deny.split("\n[licenses]").nth(1).context("deny.toml has no [licenses]")?;
    let list = table.split_once("allow = [").context("[licenses] has no `allow`")?.1;
    let list = list.split(']').next().unwrap_or_default();
    Ok(list.split('"').skip(1).step_by(2).map(str::to_owned).collect())
}

/// Whether an SPDX expression can be satisfied with allowed licences alone. Old manifests write
/// `/` for `OR`.
fn accepts(expression: &str, allowed: &[String]) -> Result<bool, String> {
    let spaced = expression.replace('(', " ( ").replace(')', " ) ").replace('/', " OR ");
    let words: Vec<&str> = spaced.split_whitespace().collect();
    let mut parser = Parser { words: &words, at: 0, allowed };
    let accepted = parser.any()?;
    if parser.at == words.len() { Ok(accepted) } else { Err(format!("not SPDX: {expression}")) }
}

struct Parser<'a> {
    words: &'a [&'a str],
    at: usize,
    allowed: &'a [String],
}

impl Parser<'_> {
    fn take(&mut self, word: &str) -> bool {
        let found = self.words.get(self.at) == Some(&word);
        self.at += usize::from(found);
        found
    }

    fn any(&mut self) -> Result<bool, String> {
        let mut accepted = self.all()?;
        while self.take("OR") {
            accepted |= self.all()?;
        }
        Ok(accepted)
    }

    fn all(&mut self) -> Result<bool, String> {
        let mut accepted = self.one()?;
        while self.take("AND") {
            accepted &= self.one()?;
        }
        Ok(accepted)
    }

    fn one(&mut self) -> Result<bool, String> {
        if self.take("(") {
            let accepted = self.any()?;
            return if self.take(")") { Ok(accepted) } else { Err("a parenthesis is open".into()) };
        }
        let licence = self.words.get(self.at).ok_or("the expression ends too early")?;
        self.at += 1;
        let mut name = (*licence).to_owned();
        if self.take("WITH") {
            let exception = self.words.get(self.at).ok_or("the expression ends too early")?;
            self.at += 1;
            name = format!("{name} WITH {exception}");
        }
        Ok(self.allowed.contains(&name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expressions() {
        let allowed = ["MIT", "Apache-2.0", "Apache-2.0 WITH LLVM-exception"].map(str::to_owned);
        let yes = ["MIT", "MIT/GPL-3.0", "GPL-3.0 OR (MIT AND Apache-2.0)"];
        for expression in yes.into_iter().chain(["Apache-2.0 WITH LLVM-exception"]) {
            assert_eq!(accepts(expression, &allowed), Ok(true), "{expression}");
        }
        for expression in ["GPL-3.0", "MIT AND GPL-3.0", "MIT WITH GPL-exception"] {
            assert_eq!(accepts(expression, &allowed), Ok(false), "{expression}");
        }
        assert!(accepts("(MIT", &allowed).is_err() && accepts("MIT MIT", &allowed).is_err());
    }

    #[test]
    fn list_is_read() {
        let deny =
            "[a]\nallow = [\"x\"]\n\n[licenses]\nallow = [\n  \"MIT\", # note\n  \"ISC\",\n]\n";
        assert_eq!(allowed_licences(deny).unwrap(), ["MIT", "ISC"]);
    }
}
