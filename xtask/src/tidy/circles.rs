//! Import circles: between the files of a crate, and between its folders.
//!
//! Two files may import each other. A circle of more files is a problem, and so is any circle
//! between folders that lie in one folder. What a module imports from the one that it is declared
//! in does not count, since the language puts it inside that one. Code under `cfg(test)` does not
//! count. An item that a module re-exports counts as an import of the file that has it.

use std::collections::{BTreeMap, BTreeSet};

use syn::visit::{self, Visit};

use crate::source::is_test;

/// The files of one crate by the path of their module (`["linear", "amx"]`; the root is empty).
#[derive(Default)]
pub(super) struct Crate {
    files: BTreeMap<Vec<String>, Module>,
}

struct Module {
    /// Path of the file in the workspace.
    file: String,
    /// The modules that it declares.
    children: BTreeSet<String>,
    /// What `use` makes known here, by name. `None` stands for everything (`*`).
    names: Vec<(Option<String>, Vec<String>)>,
    /// Paths that the code names, each with its line.
    uses: Vec<(Vec<String>, usize)>,
}

/// One import: the file that is imported, and the line that does it.
type Edges = BTreeMap<String, BTreeMap<String, usize>>;

/// A circle of `size` files or folders, and the imports that close it.
pub(super) struct Circle {
    pub(super) size: usize,
    pub(super) chain: String,
}

impl Crate {
    /// Adds the file of the module at `path`.
    pub(super) fn add(&mut self, path: Vec<String>, file: &str, syntax: &syn::File) {
        let mut found = Paths { module: Module::new(file), depth: 0 };
        found.visit_file(syntax);
        self.files.insert(path, found.module);
    }

    /// Circles of more than two files.
    pub(super) fn file_circles(&self) -> Vec<Circle> {
        circles(&self.edges(), 3)
    }

    /// Circles between folders that lie in one folder.
    pub(super) fn folder_circles(&self) -> Vec<Circle> {
        let files = self.edges();
        let mut by_parent: BTreeMap<String, Edges> = BTreeMap::new();
        for (from, imports) in &files {
            for (to, line) in imports {
                let Some((parent, from_folder, to_folder)) = siblings(from, to) else { continue };
                let edges = by_parent.entry(parent).or_default();
                edges.entry(to_folder.clone()).or_default();
                edges.entry(from_folder).or_default().entry(to_folder).or_insert(*line);
            }
        }
        by_parent.values().flat_map(|edges| circles(edges, 2)).collect()
    }

    /// Which file imports which.
    fn edges(&self) -> Edges {
        let mut edges = Edges::new();
        for (path, module) in &self.files {
            let imports = edges.entry(module.file.clone()).or_default();
            let around = path.split_last().and_then(|(_, parent)| self.files.get(parent));
            let counts = |file: &&str| {
                *file != module.file && around.is_none_or(|around| *file != around.file)
            };
            for (used, line) in &module.uses {
                if let Some(target) = self.resolve(path, used, 0).filter(counts) {
                    imports.entry(target.to_owned()).or_insert(*line);
                }
            }
        }
        edges
    }

    /// The file that has what `used` names in the module at `from`; `None` outside of this crate.
    fn resolve(&self, from: &[String], used: &[String], depth: usize) -> Option<&str> {
        // A circle of re-exports has no end.
        if depth > 16 {
            return None;
        }
        let (mut at, mut rest) = match used.first()?.as_str() {
            "crate" => (Vec::new(), &used[1..]),
            "self" => (from.to_vec(), &used[1..]),
            "super" => (from.split_last()?.1.to_vec(), &used[1..]),
            first if self.files[from].children.contains(first) => (from.to_vec(), used),
            _ => return None,
        };
        while rest.first().is_some_and(|first| first == "super") {
            at.pop()?;
            rest = &rest[1..];
        }
        while let Some(next) = rest.first() {
            at.push(next.clone());
            if !self.files.contains_key(&at) {
                at.pop();
                break;
            }
            rest = &rest[1..];
        }
        let module = self.files.get(&at)?;
        if let Some(name) = rest.first() {
            let same = |known: &&(Option<String>, Vec<String>)| known.0.as_ref() == Some(name);
            if let Some((_, path)) = module.names.iter().find(same) {
                let path: Vec<String> = path.iter().chain(&rest[1..]).cloned().collect();
                return self.resolve(&at, &path, depth + 1);
            }
        }
        Some(&module.file)
    }
}

impl Module {
    fn new(file: &str) -> Self {
        let (children, names, uses) = Default::default();
        Self { file: file.to_owned(), children, names, uses }
    }
}

/// The folders of two files below the deepest folder that holds both, if both lie in a folder
/// there and not beside it.
fn siblings(from: &str, to: &str) -> Option<(String, String, String)> {
    let (a, b): (Vec<&str>, Vec<&str>) = (from.split('/').collect(), to.split('/').collect());
    let shared = a.iter().zip(&b).take_while(|(a, b)| a == b).count();
    if a.len() < shared + 2 || b.len() < shared + 2 {
        return None;
    }
    let folder = |parts: &[&str]| parts[..=shared].join("/");
    Some((a[..shared].join("/"), folder(&a), folder(&b)))
}

/// The strongly connected parts with at least `least` nodes.
fn circles(edges: &Edges, least: usize) -> Vec<Circle> {
    let reach: BTreeMap<&str, BTreeSet<&str>> =
        edges.keys().map(|from| (from.as_str(), reachable(edges, from))).collect();
    let mut seen: BTreeSet<&str> = BTreeSet::new();
    let mut found = Vec::new();
    for (&node, reached) in &reach {
        if !reached.contains(node) || seen.contains(node) {
            continue;
        }
        let together = |other: &&str| reach.get(*other).is_some_and(|back| back.contains(node));
        let part: BTreeSet<&str> = reached.iter().copied().filter(together).collect();
        seen.extend(part.iter().copied());
        if part.len() >= least {
            found.push(Circle { size: part.len(), chain: chain(edges, node, &part) });
        }
    }
    found
}

fn reachable<'a>(edges: &'a Edges, from: &str) -> BTreeSet<&'a str> {
    let mut reached = BTreeSet::new();
    let mut open: Vec<&str> = vec![from];
    while let Some(node) = open.pop() {
        for next in edges.get(node).into_iter().flatten().map(|(next, _)| next.as_str()) {
            if reached.insert(next) {
                open.push(next);
            }
        }
    }
    reached
}

/// The imports between the nodes of `part`, from `start` on.
fn chain(edges: &Edges, start: &str, part: &BTreeSet<&str>) -> String {
    let mut nodes: Vec<&str> = part.iter().copied().collect();
    nodes.sort_by_key(|node| (*node != start, *node));
    let line = |from: &str| {
        let imports = edges[from].iter().filter(|(to, _)| part.contains(to.as_str()));
        let imports: Vec<String> =
            imports.map(|(to, line)| format!("{to} (line {line})")).collect();
        format!("  {from} imports {}", imports.join(", "))
    };
    nodes.into_iter().map(line).collect::<Vec<_>>().join("\n")
}

/// Collects the paths of one file.
struct Paths {
    module: Module,
    /// Modules inside the file around the present place.
    depth: usize,
}

impl Paths {
    fn tree(&mut self, tree: &syn::UseTree, prefix: &[String], line: usize, exports: bool) {
        let with = |name: &syn::Ident| [prefix, &[name.to_string()]].concat();
        match tree {
            syn::UseTree::Path(path) => {
                self.tree(&path.tree, &with(&path.ident), line, exports);
            }
            syn::UseTree::Name(name) if name.ident == "self" => {
                let known = prefix.last().cloned();
                self.import(known, prefix.to_vec(), line, exports);
            }
            syn::UseTree::Name(name) => {
                self.import(Some(name.ident.to_string()), with(&name.ident), line, exports);
            }
            syn::UseTree::Rename(name) => {
                self.import(Some(name.rename.to_string()), with(&name.ident), line, exports);
            }
            syn::UseTree::Glob(_) => self.import(None, prefix.to_vec(), line, exports),
            syn::UseTree::Group(group) => {
                group.items.iter().for_each(|tree| self.tree(tree, prefix, line, exports));
            }
        }
    }

    fn import(&mut self, name: Option<String>, path: Vec<String>, line: usize, exports: bool) {
        if !exports {
            self.module.uses.push((path.clone(), line));
        }
        if self.depth == 0 {
            self.module.names.push((name, path));
        }
    }
}

impl<'a> Visit<'a> for Paths {
    fn visit_item_use(&mut self, item: &'a syn::ItemUse) {
        if is_test(&item.attrs) {
            return;
        }
        let line = syn::spanned::Spanned::span(item).start().line;
        let exports = !matches!(item.vis, syn::Visibility::Inherited);
        self.tree(&item.tree, &[], line, exports);
    }

    fn visit_item_mod(&mut self, item: &'a syn::ItemMod) {
        if is_test(&item.attrs) {
            return;
        }
        if item.content.is_none() {
            self.module.children.insert(item.ident.to_string());
        }
        self.depth += 1;
        visit::visit_item_mod(self, item);
        self.depth -= 1;
    }

    fn visit_item_fn(&mut self, item: &'a syn::ItemFn) {
        if !is_test(&item.attrs) {
            visit::visit_item_fn(self, item);
        }
    }

    fn visit_item_impl(&mut self, item: &'a syn::ItemImpl) {
        if !is_test(&item.attrs) {
            visit::visit_item_impl(self, item);
        }
    }

    fn visit_path(&mut self, path: &'a syn::Path) {
        if path.segments.len() > 1 {
            let line = syn::spanned::Spanned::span(path).start().line;
            let segments = path.segments.iter().map(|segment| segment.ident.to_string());
            self.module.uses.push((segments.collect(), line));
        }
        visit::visit_path(self, path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A crate of files with their texts.
    fn made(files: &[(&str, &str)]) -> Crate {
        let mut made = Crate::default();
        for (file, text) in files {
            let syntax = syn::parse_file(text).unwrap();
            made.add(module_path(file), &format!("src/{file}"), &syntax);
        }
        made
    }

    fn module_path(file: &str) -> Vec<String> {
        super::super::module_path(file)
    }

    fn sizes(circles: &[Circle]) -> Vec<usize> {
        circles.iter().map(|circle| circle.size).collect()
    }

    #[test]
    fn a_circle_of_three_files_is_found_with_its_lines() {
        let circles = made(&[
            ("lib.rs", "mod a; mod b; mod c;"),
            ("a.rs", "use crate::b::B;"),
            ("b.rs", "\nuse super::c::{self, C as D};"),
            ("c.rs", "fn f() { crate::a::g() }"),
        ])
        .file_circles();
        assert_eq!(sizes(&circles), [3]);
        assert!(circles[0].chain.contains("src/b.rs imports src/c.rs (line 2)"));
    }

    #[test]
    fn two_files_and_a_parent_that_exports_are_no_circle() {
        let tree = made(&[
            ("lib.rs", "mod a; mod b; pub use a::A; pub use b::B;"),
            ("a.rs", "use crate::B;"),
            ("b.rs", "use std::fmt; use other::crate_a;"),
        ]);
        assert!(tree.file_circles().is_empty());
        let pair = made(&[
            ("lib.rs", "mod a; mod b;"),
            ("a.rs", "use crate::b::B;"),
            ("b.rs", "use crate::a::A;"),
        ]);
        assert!(pair.file_circles().is_empty());
    }

    #[test]
    fn a_module_may_use_the_one_around_it() {
        let files = [
            ("lib.rs", "mod x; mod y;"),
            ("x/mod.rs", "mod a; mod b; fn f() { a::f(); b::f() }"),
            ("x/a.rs", "use super::X;"),
            ("x/b.rs", "use crate::x::X; use crate::y::Y;"),
        ];
        let quiet = made(&[&files[..], &[("y.rs", "")]].concat());
        assert!(quiet.file_circles().is_empty());
        let closed = made(&[&files[..], &[("y.rs", "use crate::x::X;")]].concat());
        assert_eq!(sizes(&closed.file_circles()), [3]);
    }

    #[test]
    fn what_is_exported_counts_where_it_is() {
        let circles = made(&[
            ("lib.rs", "mod a; mod b; mod c; pub use a::A; pub use b::B; pub use c::C;"),
            ("a.rs", "use crate::B;"),
            ("b.rs", "use crate::C;"),
            ("c.rs", "use crate::A;"),
        ])
        .file_circles();
        assert_eq!(sizes(&circles), [3]);
    }

    #[test]
    fn tests_may_import_what_they_like() {
        let tree = made(&[
            ("lib.rs", "mod a; mod b; mod c;"),
            ("a.rs", "use crate::b::B;"),
            ("b.rs", "use crate::c::C;"),
            ("c.rs", "#[cfg(test)] mod tests { use crate::a::A; }"),
        ]);
        assert!(tree.file_circles().is_empty());
    }

    #[test]
    fn folders_in_a_circle_are_found() {
        let tree = made(&[
            ("lib.rs", "mod x; mod y;"),
            ("x/mod.rs", "mod a;"),
            ("x/a.rs", "use crate::y::b::B;"),
            ("y/mod.rs", "pub mod b; mod c;"),
            ("y/b.rs", ""),
            ("y/c.rs", "use crate::x::X;"),
        ]);
        assert!(tree.file_circles().is_empty());
        assert_eq!(sizes(&tree.folder_circles()), [2]);
        let tree = made(&[
            ("lib.rs", "mod x; mod plain;"),
            ("x/mod.rs", "use crate::plain::P;"),
            ("plain.rs", "use crate::x::X;"),
        ]);
        assert!(tree.folder_circles().is_empty(), "a file beside a folder is no folder");
    }
}
