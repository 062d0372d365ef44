//! Whether a licence, an SPDX expression, is one that deny.toml allows.

/// What is wrong with a package's licence; `None` if it is allowed.
pub(super) fn problem(expression: Option<&str>, allowed: &[String]) -> Option<String> {
    let Some(expression) = expression else { return Some("names no licence".into()) };
    match accepts(expression, allowed) {
        Ok(true) => None,
        Ok(false) => Some(format!("its licence {expression} is not allowed")),
        Err(error) => Some(format!("its licence {expression}: {error}")),
    }
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
}
