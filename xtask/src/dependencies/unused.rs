//! Dependencies that no code names.
//!
//! A dependency counts as used where a path, a `use` or a macro names its crate. Code under
//! `cfg(test)` cannot use a dependency for all: what only tests name belongs to `dev-dependencies`.
//! A crate may need another only for a feature that it turns on. Its manifest then says so:
//! `[package.metadata.dependencies] for-features = ["name"]`.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;
use proc_macro2::{TokenStream, TokenTree};
use serde_json::Value;
use syn::visit::{self, Visit};

use super::text;
use crate::source;

/// All unused dependencies of the workspace's crates, and those of the workspace that none takes.
pub(super) fn check(root: &Path, metadata: &Value) -> anyhow::Result<Vec<String>> {
    let (mut problems, mut taken) = (Vec::new(), BTreeSet::new());
    let packages = metadata["packages"].as_array().into_iter().flatten();
    for package in packages.filter(|package| package["source"].is_null()) {
        let manifest = PathBuf::from(text(package, "manifest_path"));
        let folder = manifest.parent().context("a manifest lies in a folder")?;
        let names = Names::of(folder)?;
        problems.extend(unused(package, &names));
        let dependencies = package["dependencies"].as_array().into_iter().flatten();
        taken.extend(dependencies.map(|it| text(it, "name").to_owned()));
    }
    let manifest = fs::read_to_string(root.join("Cargo.toml")).context("Cargo.toml")?;
    let manifest: toml::Value = toml::from_str(&manifest).context("Cargo.toml")?;
    let offered = manifest["workspace"]["dependencies"].as_table().into_iter().flatten();
    for (name, _) in offered.filter(|(name, _)| !taken.contains(*name)) {
        problems.push(format!("Cargo.toml: no crate takes {name}"));
    }
    Ok(problems)
}

/// The crates that a package's code names.
#[derive(Default)]
struct Names {
    /// In the library and the programs, outside of tests.
    code: BTreeSet<String>,
    /// In the build script.
    build: BTreeSet<String>,
    /// Anywhere.
    all: BTreeSet<String>,
}

impl Names {
    fn of(folder: &Path) -> anyhow::Result<Self> {
        let (mut names, mut trees, mut tests) = (Self::default(), Vec::new(), BTreeSet::new());
        for path in source::rust_files(folder)? {
            let name = path.strip_prefix(folder).unwrap_or(&path).to_owned();
            let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
            let tree = syn::parse_file(&text).with_context(|| path.display().to_string())?;
            tests.extend(test_modules(&name, &tree));
            trees.push((name, tree));
        }
        for (name, tree) in &trees {
            names.all.extend(named(tree, true));
            if name == Path::new("build.rs") {
                names.build.extend(named(tree, false));
            } else if name.starts_with("src") && !tests.iter().any(|it| is_below(name, it)) {
                names.code.extend(named(tree, false));
            }
        }
        Ok(names)
    }
}

/// Whether a file is the module at `module`, a path without suffix, or lies in its folder.
fn is_below(file: &Path, module: &Path) -> bool {
    file.with_extension("") == module || file.starts_with(module)
}

/// The modules in files of their own that a file declares under `cfg(test)`.
fn test_modules(name: &Path, tree: &syn::File) -> Vec<PathBuf> {
    let stem = name.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
    let folder = match stem {
        "mod" | "lib" | "main" => name.parent().unwrap_or(name).to_owned(),
        _ => name.with_extension(""),
    };
    let modules = tree.items.iter().filter_map(|item| match item {
        syn::Item::Mod(it) if it.content.is_none() && source::is_test(&it.attrs) => Some(it),
        _ => None,
    });
    modules.map(|module| folder.join(module.ident.to_string())).collect()
}

/// The first names of all paths in a file.
fn named(tree: &syn::File, with_tests: bool) -> BTreeSet<String> {
    let mut finder = Finder { with_tests, found: BTreeSet::new() };
    finder.visit_file(tree);
    finder.found
}

struct Finder {
    with_tests: bool,
    found: BTreeSet<String>,
}

impl Finder {
    fn skips(&self, attributes: &[syn::Attribute]) -> bool {
        !self.with_tests && source::is_test(attributes)
    }

    fn tree(&mut self, tree: &syn::UseTree) {
        match tree {
            syn::UseTree::Path(path) => drop(self.found.insert(path.ident.to_string())),
            syn::UseTree::Name(name) => drop(self.found.insert(name.ident.to_string())),
            syn::UseTree::Rename(name) => drop(self.found.insert(name.ident.to_string())),
            syn::UseTree::Glob(_) => {}
            syn::UseTree::Group(group) => group.items.iter().for_each(|tree| self.tree(tree)),
        }
    }

    /// Names before `::` that do not follow one.
    fn tokens(&mut self, tokens: TokenStream) {
        let tokens: Vec<TokenTree> = tokens.into_iter().collect();
        let colon = |at: Option<usize>| {
            let token = at.and_then(|at| tokens.get(at));
            matches!(token, Some(TokenTree::Punct(it)) if it.as_char() == ':')
        };
        for (at, token) in tokens.iter().enumerate() {
            match token {
                TokenTree::Group(group) => self.tokens(group.stream()),
                TokenTree::Ident(name) if colon(Some(at + 1)) && colon(Some(at + 2)) => {
                    let follows = colon(at.checked_sub(1)) && colon(at.checked_sub(2));
                    if !follows {
                        self.found.insert(name.to_string());
                    }
                }
                TokenTree::Ident(_) | TokenTree::Punct(_) | TokenTree::Literal(_) => {}
            }
        }
    }
}

impl<'a> Visit<'a> for Finder {
    fn visit_item_use(&mut self, item: &'a syn::ItemUse) {
        if !self.skips(&item.attrs) {
            self.tree(&item.tree);
        }
    }

    fn visit_item_mod(&mut self, item: &'a syn::ItemMod) {
        if !self.skips(&item.attrs) {
            visit::visit_item_mod(self, item);
        }
    }

    fn visit_item_fn(&mut self, item: &'a syn::ItemFn) {
        if !self.skips(&item.attrs) {
            visit::visit_item_fn(self, item);
        }
    }

    fn visit_item_impl(&mut self, item: &'a syn::ItemImpl) {
        if !self.skips(&item.attrs) {
            visit::visit_item_impl(self, item);
        }
    }

    fn visit_path(&mut self, path: &'a syn::Path) {
        if path.segments.len() > 1 {
            self.found.insert(path.segments[0].ident.to_string());
        }
        visit::visit_path(self, path);
    }

    fn visit_macro(&mut self, call: &'a syn::Macro) {
        self.tokens(call.tokens.clone());
        visit::visit_macro(self, call);
    }

    fn visit_meta_list(&mut self, list: &'a syn::MetaList) {
        self.tokens(list.tokens.clone());
        visit::visit_meta_list(self, list);
    }
}

fn unused(package: &Value, names: &Names) -> Vec<String> {
    let features = &package["metadata"]["dependencies"]["for-features"];
    let for_feature =
        |name: &str| features.as_array().into_iter().flatten().any(|feature| feature == name);
    let dependencies: Vec<&Value> =
        package["dependencies"].as_array().into_iter().flatten().collect();
    let mut problems = Vec::new();
    for dependency in &dependencies {
        let name = text(dependency, "name");
        let known_as = dependency["rename"].as_str().unwrap_or(name).replace('-', "_");
        let problem = match dependency["kind"].as_str() {
            Some("dev") if !names.all.contains(&known_as) => "no test or example uses",
            Some("dev") if also_for_all(dependency, &dependencies) => "tests have anyway",
            Some("build") if !names.build.contains(&known_as) => "the build script does not use",
            None if !names.all.contains(&known_as) => "no code uses",
            None if !names.code.contains(&known_as) => "only tests use",
            _ => continue,
        };
        if !for_feature(name) {
            problems.push(format!("{}: {problem} its dependency {name}", text(package, "name")));
        }
    }
    problems
}

/// Whether a dependency of tests stands among the other dependencies too, with the same features.
fn also_for_all(dependency: &Value, dependencies: &[&Value]) -> bool {
    dependencies.iter().any(|other| {
        other["kind"].is_null()
            && !other["optional"].as_bool().unwrap_or_default()
            && ["name", "rename", "target", "features"]
                .iter()
                .all(|key| other[*key] == dependency[*key])
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn names(code: &str) -> Names {
        let tree = syn::parse_file(code).unwrap();
        let (code, all) = (named(&tree, false), named(&tree, true));
        Names { code, all, build: BTreeSet::new() }
    }

    #[test]
    fn crates_are_found_in_paths_uses_macros_and_attributes() {
        let code = "use a::b; use c as d; #[derive(e::E)] struct S(f::T); \
            fn g() { m!(h::x(i::y()), j::k); let l = 1; l.n(); }";
        let found = names(code).code;
        let found: Vec<&str> = found.iter().map(String::as_str).collect();
        assert_eq!(found, ["a", "c", "e", "f", "h", "i", "j"]);
    }

    #[test]
    fn what_tests_name_counts_for_tests_alone() {
        let found = names("#[cfg(test)] mod tests { use a::b; } #[test] fn f() { c::d() }");
        assert!(found.code.is_empty());
        assert_eq!(found.all.into_iter().collect::<Vec<_>>(), ["a", "c"]);
    }

    #[test]
    fn each_kind_of_dependency_is_judged() {
        let dependency = |name: &str, kind: Value| json!({"name": name, "kind": kind});
        let package = json!({"name": "p", "dependencies": [
            dependency("used-one", Value::Null), dependency("tested", Value::Null),
            dependency("unused", Value::Null), dependency("feature", Value::Null),
            dependency("tested", json!("dev")), dependency("absent", json!("dev")),
            dependency("script", json!("build")),
        ], "metadata": {"dependencies": {"for-features": ["feature"]}}});
        let found = unused(&package, &names("use used_one::x; #[test] fn f() { tested::y() }"));
        let expected = [
            "p: only tests use its dependency tested",
            "p: no code uses its dependency unused",
            "p: tests have anyway its dependency tested",
            "p: no test or example uses its dependency absent",
            "p: the build script does not use its dependency script",
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn test_modules_in_files_are_found() {
        let tree = syn::parse_file("#[cfg(test)] mod tests; mod a;").unwrap();
        assert_eq!(test_modules(Path::new("src/x.rs"), &tree), [Path::new("src/x/tests")]);
        assert_eq!(test_modules(Path::new("src/x/mod.rs"), &tree), [Path::new("src/x/tests")]);
        assert!(is_below(Path::new("src/x/tests.rs"), Path::new("src/x/tests")));
        assert!(is_below(Path::new("src/x/tests/a.rs"), Path::new("src/x/tests")));
        assert!(!is_below(Path::new("src/x/tests_b.rs"), Path::new("src/x/tests")));
    }
}
