//! Checks of one Rust file: `unsafe`, leftovers, the attributes of a crate's root, and lengths.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Context;
use proc_macro2::{Delimiter, TokenStream, TokenTree};
use syn::spanned::Spanned;
use syn::visit::{self, Visit};

/// Where `unsafe` may be: the kernels, the calls of the CUDA driver, and the one memory map.
const UNSAFE_ALLOWED: &[&str] = &[
    "crates/cpu/",
    "crates/cuda/src/device.rs",
    "crates/cuda/src/parameters.rs",
    "crates/tensor/src/mapping.rs",
];

/// Characters of a line.
pub(super) const COLUMNS: usize = 100;

/// Macros that a finished program does not contain.
const FORBIDDEN_MACROS: &[&str] = &["todo", "unimplemented", "dbg"];

/// What has been found in all files so far.
#[derive(Default)]
pub(super) struct Findings {
    /// Lines to print.
    pub(super) problems: Vec<String>,
    /// Lines of each file (`path`) and each function (`path::function`).
    pub(super) lengths: BTreeMap<String, usize>,
}

/// Checks one file and returns its syntax tree; `name` is its path in the workspace.
pub(super) fn check(name: &str, text: &str, found: &mut Findings) -> anyhow::Result<syn::File> {
    let tokens: TokenStream =
        text.parse().map_err(|error| anyhow::anyhow!("{name}: not Rust: {error}"))?;
    let allowed = UNSAFE_ALLOWED.iter().any(|path| name.starts_with(path));
    check_tokens(name, tokens.clone(), allowed, &mut found.problems);
    check_columns(name, text, tokens, &mut found.problems);
    if is_root(name) {
        check_root(name, text, &mut found.problems);
    }
    found.lengths.insert(name.to_owned(), text.lines().count());
    let file = syn::parse_file(text).with_context(|| name.to_owned())?;
    let mut functions = Functions { prefix: name.to_owned(), lengths: &mut found.lengths };
    functions.visit_file(&file);
    Ok(file)
}

/// Refuses lines of more than [`COLUMNS`] characters. A literal may cross the border: text and
/// regular expressions are not cut.
fn check_columns(name: &str, text: &str, tokens: TokenStream, problems: &mut Vec<String>) {
    let long: Vec<(usize, bool)> = (1..)
        .zip(text.lines())
        .filter(|(_, line)| line.chars().count() > COLUMNS)
        .map(|(number, line)| (number, line.trim_start().starts_with("//")))
        .collect();
    if long.is_empty() {
        return;
    }
    let mut crossing = BTreeSet::new();
    mark_crossing(tokens, &mut crossing);
    // A doc comment is a literal to the parser.
    let refused = |(number, comment): &(usize, bool)| *comment || !crossing.contains(number);
    for (number, _) in long.into_iter().filter(refused) {
        problems.push(format!("{name}:{number}: more than {COLUMNS} characters"));
    }
}

/// Adds the lines that a literal crosses: it begins before the last column and ends behind it.
fn mark_crossing(tokens: TokenStream, lines: &mut BTreeSet<usize>) {
    for token in tokens {
        match token {
            TokenTree::Group(group) => mark_crossing(group.stream(), lines),
            TokenTree::Literal(literal) => {
                let (start, end) = (literal.span().start(), literal.span().end());
                let first = if start.column < COLUMNS { start.line } else { start.line + 1 };
                let last = if end.column >= COLUMNS { end.line + 1 } else { end.line };
                lines.extend(first..last);
            }
            TokenTree::Ident(_) | TokenTree::Punct(_) => {}
        }
    }
}

/// Whether the file is the root of a library or of a program.
fn is_root(name: &str) -> bool {
    let mut parts = name.rsplit('/');
    matches!(parts.next(), Some("lib.rs" | "main.rs")) && parts.next() == Some("src")
}

fn check_root(name: &str, text: &str, problems: &mut Vec<String>) {
    if !text.trim_start().starts_with("//!") {
        problems.push(format!("{name}: a crate begins with what it is for (`//!`)"));
    }
    // The memory map is one module of its crate, so there the root denies and the module allows.
    let may_allow = UNSAFE_ALLOWED.iter().any(|path| path.starts_with(&name[..name.len() - 6]));
    let kernels = name.starts_with("crates/cpu/");
    let forbids = text.contains("#![forbid(unsafe_code)]");
    let denies = may_allow && text.contains("#![deny(unsafe_code)]");
    if !kernels && !forbids && !denies {
        let level = if may_allow { "deny" } else { "forbid" };
        problems.push(format!("{name}: lacks `#![{level}(unsafe_code)]`"));
    }
}

/// Walks all tokens, also those inside macros, where a syntax tree does not reach.
fn check_tokens(name: &str, tokens: TokenStream, allowed: bool, problems: &mut Vec<String>) {
    let tokens: Vec<TokenTree> = tokens.into_iter().collect();
    for (index, token) in tokens.iter().enumerate() {
        let line = token.span().start().line;
        match token {
            TokenTree::Group(group) => {
                let ignored = group.delimiter() == Delimiter::Bracket
                    && is_punctuation(index.checked_sub(1).and_then(|at| tokens.get(at)), '#')
                    && first_ident(group.stream()).is_some_and(|word| word == "ignore");
                if ignored {
                    problems.push(format!("{name}:{line}: a test is ignored"));
                }
                check_tokens(name, group.stream(), allowed, problems);
            }
            TokenTree::Ident(word) if *word == "unsafe" && !allowed => {
                problems.push(format!("{name}:{line}: `unsafe` outside the places for it"));
            }
            TokenTree::Ident(word) if is_punctuation(tokens.get(index + 1), '!') => {
                let word = word.to_string();
                if FORBIDDEN_MACROS.contains(&word.as_str()) {
                    problems.push(format!("{name}:{line}: `{word}!` is left over"));
                }
            }
            TokenTree::Ident(_) | TokenTree::Punct(_) | TokenTree::Literal(_) => {}
        }
    }
}

fn is_punctuation(token: Option<&TokenTree>, character: char) -> bool {
    matches!(token, Some(TokenTree::Punct(found)) if found.as_char() == character)
}

fn first_ident(tokens: TokenStream) -> Option<String> {
    match tokens.into_iter().next() {
        Some(TokenTree::Ident(word)) => Some(word.to_string()),
        _ => None,
    }
}

/// Collects the lengths of functions, signature to closing brace.
struct Functions<'a> {
    /// Path of the file, then the names around the present place.
    prefix: String,
    lengths: &'a mut BTreeMap<String, usize>,
}

impl Functions<'_> {
    fn record(&mut self, signature: &syn::Signature, block: &syn::Block) {
        let first = signature.span().start().line;
        let lines = block.span().end().line - first + 1;
        let name = format!("{}::{}", self.prefix, signature.ident);
        let longest = self.lengths.entry(name).or_default();
        *longest = lines.max(*longest);
    }

    fn within(&mut self, name: &str, visit: impl FnOnce(&mut Self)) {
        let length = self.prefix.len();
        self.prefix.push_str("::");
        self.prefix.push_str(name);
        visit(self);
        self.prefix.truncate(length);
    }
}

impl<'a> Visit<'a> for Functions<'_> {
    fn visit_item_mod(&mut self, item: &'a syn::ItemMod) {
        self.within(&item.ident.to_string(), |this| visit::visit_item_mod(this, item));
    }

    fn visit_item_impl(&mut self, item: &'a syn::ItemImpl) {
        let name = match &*item.self_ty {
            syn::Type::Path(path) => path.path.segments.last().map(|it| it.ident.to_string()),
            _ => None,
        };
        let name = name.unwrap_or_else(|| "impl".into());
        self.within(&name, |this| visit::visit_item_impl(this, item));
    }

    fn visit_item_fn(&mut self, function: &'a syn::ItemFn) {
        self.record(&function.sig, &function.block);
        visit::visit_item_fn(self, function);
    }

    fn visit_impl_item_fn(&mut self, function: &'a syn::ImplItemFn) {
        self.record(&function.sig, &function.block);
        visit::visit_impl_item_fn(self, function);
    }

    fn visit_trait_item_fn(&mut self, function: &'a syn::TraitItemFn) {
        if let Some(block) = &function.default {
            self.record(&function.sig, block);
        }
        visit::visit_trait_item_fn(self, function);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problems(name: &str, text: &str) -> Vec<String> {
        let mut found = Findings::default();
        check(name, text, &mut found).unwrap();
        found.problems
    }

    #[test]
    fn unsafe_is_found_where_it_may_not_be() {
        let text = "// unsafe\nfn f() { let s = \"unsafe\"; m!(unsafe { x }); }\n";
        assert_eq!(problems("crates/model/src/a.rs", text).len(), 1);
        assert_eq!(problems("crates/cpu/src/a.rs", text).len(), 0);
        assert_eq!(problems("crates/tensor/src/mapping.rs", text).len(), 0);
        assert_eq!(problems("crates/tensor/src/gguf/mod.rs", text).len(), 1);
    }

    #[test]
    fn long_lines_are_found_but_for_literals() {
        let name = "crates/model/src/a.rs";
        let long = "x".repeat(120);
        for text in [
            format!("/// {long}\nfn f() {{}}"),
            format!("fn f() {{ // {long}\n}}"),
            format!("fn {long}() {{}}"),
            format!("const A: (&str, u8) = (\"x\", {}1);", " ".repeat(100)),
        ] {
            assert_eq!(problems(name, &text), [format!("{name}:1: more than 100 characters")]);
        }
        for text in
            [format!("const A: &str = \"{long}\";"), format!("const A: &str = r\"a\n{long}\nb\";")]
        {
            assert_eq!(problems(name, &text), [""; 0]);
        }
    }

    #[test]
    fn leftovers_are_found() {
        // Spelled apart, so that this file has none of its own.
        for word in ["todo", "unimplemented", "dbg"] {
            let text = format!("fn f() {{ g({word}!(x)) }}");
            assert_eq!(problems("crates/model/src/a.rs", &text).len(), 1, "{word}");
        }
        let text = format!("#[{}]\n#[test]\nfn f() {{}}", "ignore");
        assert_eq!(problems("crates/model/src/a.rs", &text).len(), 1);
        assert_eq!(problems("crates/model/src/a.rs", "fn todo() { if !todo { } }").len(), 0);
    }

    #[test]
    fn roots_say_what_they_are_and_forbid_unsafe() {
        let good = "//! A crate.\n#![forbid(unsafe_code)]\n";
        assert_eq!(problems("crates/model/src/lib.rs", good).len(), 0);
        assert_eq!(problems("crates/model/src/lib.rs", "mod a;\n").len(), 2);
        assert_eq!(problems("crates/cpu/src/lib.rs", "//! Kernels.\n").len(), 0);
        let denies = "//! Tensors.\n#![deny(unsafe_code)]\n";
        assert_eq!(problems("crates/tensor/src/lib.rs", denies).len(), 0);
        assert_eq!(problems("crates/model/src/lib.rs", denies).len(), 1);
    }

    #[test]
    fn lengths_are_counted() {
        let text =
            "impl A {\n    fn f(\n        a: u8,\n    ) {\n    }\n}\nmod m {\n    fn g() {}\n}\n";
        let mut found = Findings::default();
        check("a.rs", text, &mut found).unwrap();
        let lengths: Vec<_> = found.lengths.iter().map(|(n, l)| (n.as_str(), *l)).collect();
        assert_eq!(lengths, [("a.rs", 9), ("a.rs::A::f", 4), ("a.rs::m::g", 1)]);
    }
}
