//! Jinja, as chat templates use it.
//!
//! Why it is here and not a library's: a prompt must say of every byte whether the template or a
//! user wrote it (see `text`), and a template of a stranger must end within bounds of memory, depth
//! and time, also while it is parsed (see `limits`). Semantics are those of Jinja under Python with
//! the settings of transformers; `tests/peers/templates.py` compares both.

mod access;
mod arguments;
mod ast;
mod error;
mod filters;
mod format;
mod html;
mod lexer;
mod limits;
mod methods;
mod names;
mod operators;
mod parser;
mod predicates;
mod run;
mod text;
mod value;
mod write;

use std::collections::HashMap;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;
use std::thread;

use serde_json::{Map, Value as Json};

use error::Outcome;
pub(super) use error::{Failure, Kind};
use limits::Meter;
use run::Run;
use text::Builder;

/// The stack on which templates are parsed and run. Pages that are not touched cost nothing.
const STACK_BYTES: usize = 64 << 20;

/// A parsed template.
#[derive(Debug)]
pub(super) struct Template {
    body: Vec<ast::Stmt>,
    literals: Arc<str>,
}

/// What a template wrote.
#[derive(Debug)]
pub(super) struct Rendered {
    pub(super) text: String,
    /// The bytes of `text` that came with the conversation.
    pub(super) typed: Vec<Range<usize>>,
}

/// Runs `work` on a stack that is large enough for all depths that the limits allow.
fn on_own_stack<T: Send>(work: impl FnOnce() -> Outcome<T> + Send) -> Outcome<T> {
    thread::scope(|scope| {
        let builder = thread::Builder::new().name("template".into()).stack_size(STACK_BYTES);
        let worker = builder.spawn_scoped(scope, work);
        let worker = worker.map_err(|error| Failure::failed(format!("no thread: {error}")))?;
        worker.join().unwrap_or_else(|_| Err(Failure::failed("the template engine panicked")))
    })
}

impl Template {
    pub(super) fn parse(source: &str) -> Outcome<Self> {
        let (body, literals) = on_own_stack(|| parser::parse(source))?;
        Ok(Self { body, literals: literals.into() })
    }

    /// All text that the template may write by itself.
    pub(super) fn literals(&self) -> &Arc<str> {
        &self.literals
    }

    /// Runs the template. Strings in `typed` came with the conversation, those in `names` did not.
    pub(super) fn render(
        &self,
        names: &Map<String, Json>,
        typed: &Map<String, Json>,
        now: &(dyn Fn(&str) -> String + Sync),
    ) -> Outcome<Rendered> {
        on_own_stack(|| {
            let meter = Rc::new(Meter::new());
            let mut context = HashMap::new();
            for (fields, is_typed) in [(names, false), (typed, true)] {
                for (name, field) in fields {
                    context.insert(name.clone(), value::from_json(&meter, field, is_typed)?);
                }
            }
            let mut out = Builder::new(&meter);
            Run::new(&meter, context, &|format| now(format)).template(&self.body, &mut out)?;
            let (text, typed) = out.into_parts();
            Ok(Rendered { text, typed })
        })
    }
}
