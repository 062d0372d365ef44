//! Why a template does not run.

/// What went wrong, and in which line of the source (counted from 1).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) kind: Kind,
    pub(crate) line: Option<usize>,
}

/// The kinds of failure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The source is not Jinja.
    Syntax(String),
    /// The template's own `raise_exception`.
    Refused(String),
    /// More than a template may use: of what, and how much there is.
    Limit(&'static str, u64),
    /// An operation that does not work on its operands.
    Failed(String),
}

pub(super) type Outcome<T> = Result<T, Failure>;

impl Failure {
    pub(super) fn failed(reason: impl Into<String>) -> Self {
        Self { kind: Kind::Failed(reason.into()), line: None }
    }

    pub(super) fn limit(what: &'static str, most: u64) -> Self {
        Self { kind: Kind::Limit(what, most), line: None }
    }

    pub(super) fn syntax(reason: impl Into<String>, line: usize) -> Self {
        Self { kind: Kind::Syntax(reason.into()), line: Some(line) }
    }

    /// The same failure with its line, unless a narrower place is known.
    pub(super) fn at(mut self, line: usize) -> Self {
        self.line.get_or_insert(line);
        self
    }
}
