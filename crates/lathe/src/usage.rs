//! Parses the words of the command line to [`Arguments`]. A mistake is reported in one line.

use std::io::IsTerminal;

use clap::Parser;
use clap::error::{ContextKind, ContextValue, ErrorKind};

use crate::arguments::Arguments;

/// The result of parsing the command line.
pub(crate) enum Parsed {
    /// A command.
    Command(Box<Arguments>),
    /// A text to print: help or version.
    Text(String),
    /// The words are wrong, for this reason.
    Wrong(String),
}

/// Parses the words.
pub(crate) fn parse(words: impl IntoIterator<Item = std::ffi::OsString>) -> Parsed {
    let error = match Arguments::try_parse_from(words) {
        Ok(arguments) => return Parsed::Command(Box::new(arguments)),
        Err(error) => error,
    };
    match error.kind() {
        ErrorKind::DisplayVersion => Parsed::Text(version()),
        ErrorKind::DisplayHelp => {
            let text = error.render();
            let colours = std::io::stdout().is_terminal();
            Parsed::Text(if colours { text.ansi().to_string() } else { text.to_string() })
        }
        _ => Parsed::Wrong(one_line(&error)),
    }
}

/// The program's version, the commit that it was built from, and the instruction set of its kernels
/// on this machine.
fn version() -> String {
    let commit = match env!("LATHE_COMMIT") {
        "" => String::new(),
        commit => format!("commit {commit}, "),
    };
    let instructions = lathe_session::instruction_set().unwrap_or_else(|error| error.to_string());
    format!("lathe {} ({commit}{instructions})\n", env!("CARGO_PKG_VERSION"))
}

/// clap's message in one line, with its suggestion if there is one, without usage and help.
fn one_line(error: &clap::Error) -> String {
    let text = error.render().to_string();
    let text = text.strip_prefix("error: ").unwrap_or(&text);
    let head: Vec<&str> = text
        .lines()
        .take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more"))
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with("tip:"))
        .collect();
    let mut out = head.join(" ");
    for kind in
        [ContextKind::SuggestedArg, ContextKind::SuggestedSubcommand, ContextKind::SuggestedValue]
    {
        let suggestion = match error.get(kind) {
            Some(ContextValue::String(text)) => text.clone(),
            Some(ContextValue::Strings(texts)) if !texts.is_empty() => texts.join(", "),
            _ => continue,
        };
        out.push_str(&format!(" (did you mean {suggestion}?)"));
    }
    out + "; see lathe --help"
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wrong(words: &[&str]) -> String {
        match parse(words.iter().map(Into::into)) {
            Parsed::Wrong(line) => line,
            Parsed::Command(arguments) => panic!("{words:?}: {arguments:?}"),
            Parsed::Text(text) => panic!("{words:?}: {text}"),
        }
    }

    #[test]
    fn arguments_are_consistent() {
        use clap::CommandFactory;
        Arguments::command().debug_assert();
    }

    #[test]
    fn mistakes_take_one_line() {
        for words in [
            &["lathe"][..],
            &["lathe", "runn", "x"],
            &["lathe", "run"],
            &["lathe", "run", "tiny", "--temprature", "1"],
            &["lathe", "run", "tiny", "--device", "gpu"],
            &["lathe", "run", "tiny", "--threads", "0"],
            &["lathe", "score", "tiny"],
            &["lathe", "score", "tiny", "--text", "a", "--tokens", "b"],
            &["lathe", "bench", "tiny", "--plot", "x.svg"],
            &["lathe", "run", "tiny", "hello", "--prompt-ids", "1"],
        ] {
            let line = wrong(words);
            assert!(!line.contains('\n') && line.len() > 20, "{words:?}: {line:?}");
        }
        assert!(wrong(&["lathe", "runn", "x"]).contains("run"));
        assert!(wrong(&["lathe", "run", "t", "--temprature", "1"]).contains("--temperature"));
    }

    #[test]
    fn global_flags_go_anywhere() {
        let words = ["lathe", "--json", "run", "tiny", "hi", "--threads", "2", "--exact"];
        let Parsed::Command(arguments) = parse(words.iter().map(Into::into)) else {
            panic!("valid words");
        };
        let global = arguments.global;
        assert!(global.json && global.exact && global.threads.is_some_and(|n| n.get() == 2));
    }
}
