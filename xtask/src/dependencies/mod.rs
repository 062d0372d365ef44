//! `cargo xtask dependencies`: bans, sources and licences as deny.toml states them, and
//! dependencies that no code uses.
//!
//! `cargo deny` checks bans, sources and licences too. This needs no installed tool, so that it
//! runs everywhere. It does not know advisories.

mod licences;
mod unused;

use std::fs;
use std::path::Path;

use anyhow::Context;
use serde::Deserialize;
use serde_json::Value;

/// The part of deny.toml that is read here. Other keys are for `cargo deny` alone.
#[derive(Deserialize)]
struct Rules {
    licenses: Licences,
    bans: Bans,
    sources: Sources,
}

#[derive(Deserialize)]
struct Licences {
    allow: Vec<String>,
}

#[derive(Deserialize)]
struct Bans {
    deny: Vec<Banned>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Banned {
    #[serde(rename = "crate")]
    name: String,
    reason: String,
}

#[derive(Deserialize)]
struct Sources {
    #[serde(rename = "allow-registry")]
    registries: Vec<String>,
}

/// All problems, as lines to print.
pub(crate) fn run(root: &Path) -> anyhow::Result<Vec<String>> {
    let text = fs::read_to_string(root.join("deny.toml")).context("deny.toml")?;
    let rules: Rules = toml::from_str(&text).context("deny.toml")?;
    // All platforms' dependencies, if they are here or can be fetched; else those of this machine.
    let metadata = match crate::metadata(root, &["--locked"]) {
        Ok(metadata) => metadata,
        Err(_) => crate::metadata(root, &["--offline", "--filter-platform", &host()?])?,
    };
    let mut problems = check(&metadata, &rules);
    problems.extend(unused::check(root, &metadata)?);
    Ok(problems)
}

/// Licences, bans and sources of every package.
fn check(metadata: &Value, rules: &Rules) -> Vec<String> {
    let mut problems = Vec::new();
    for package in metadata["packages"].as_array().into_iter().flatten() {
        let (name, version) = (text(package, "name"), text(package, "version"));
        let found = [
            licences::problem(package["license"].as_str(), &rules.licenses.allow),
            ban(name, rules),
            source(package["source"].as_str(), rules),
        ];
        let found = found.into_iter().flatten().chain(wildcards(package));
        problems.extend(found.map(|problem| format!("{name} {version}: {problem}")));
    }
    problems
}

fn ban(name: &str, rules: &Rules) -> Option<String> {
    let banned = rules.bans.deny.iter().find(|banned| banned.name == name)?;
    Some(format!("is banned: {}", banned.reason))
}

/// `source` is absent for the workspace's own crates.
fn source(source: Option<&str>, rules: &Rules) -> Option<String> {
    let source = source?;
    let registry = source.strip_prefix("registry+");
    let allowed = registry.is_some_and(|it| rules.sources.registries.iter().any(|ok| ok == it));
    (!allowed).then(|| format!("comes from {source}, which deny.toml does not allow"))
}

/// Dependencies of the workspace's own packages that accept any version and have no path.
fn wildcards(package: &Value) -> impl Iterator<Item = String> {
    let own = package["source"].is_null();
    let dependencies = package["dependencies"].as_array().into_iter().flatten();
    dependencies
        .filter(move |it| own && it["req"] == "*" && it["path"].is_null())
        .map(|it| format!("accepts any version of {}", text(it, "name")))
}

/// The triple of this machine.
fn host() -> anyhow::Result<String> {
    let output = std::process::Command::new("rustc").arg("-vV").output()?;
    let text = String::from_utf8(output.stdout)?;
    let line = text.lines().find_map(|line| line.strip_prefix("host: "));
    Ok(line.context("rustc -vV names no host")?.to_owned())
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const RULES: &str = r#"
        [licenses]
        allow = ["MIT"] # note
        confidence-threshold = 0.9
        [bans]
        wildcards = "deny"
        deny = [{ crate = "onig", reason = "it is C" }]
        [sources]
        allow-registry = ["https://good"]
    "#;

    fn problems(package: Value) -> Vec<String> {
        let rules: Rules = toml::from_str(RULES).unwrap();
        check(&json!({"packages": [package]}), &rules)
    }

    #[test]
    fn a_package_that_follows_the_rules_has_no_problem() {
        let good = json!({"name": "a", "version": "1.0.0", "license": "MIT",
            "source": "registry+https://good", "dependencies": [{"name": "b", "req": "*"}]});
        assert_eq!(problems(good), [""; 0]);
    }

    #[test]
    fn each_rule_is_checked() {
        let bad = json!({"name": "onig", "version": "1.0.0", "license": "GPL-3.0",
            "source": "git+https://good"});
        let found = problems(bad);
        assert_eq!(found.len(), 3, "{found:?}");
        assert!(found[0].contains("GPL-3.0") && found[1].contains("it is C"));
        assert!(found[2].contains("git+https://good"));
        let own = json!({"name": "a", "version": "1.0.0", "license": "MIT", "dependencies": [
            {"name": "b", "req": "*"}, {"name": "c", "req": "*", "path": "/c"}]});
        assert_eq!(problems(own), ["a 1.0.0: accepts any version of b"]);
        assert_eq!(
            problems(json!({"name": "a", "version": "1.0.0"})),
            ["a 1.0.0: names no licence"]
        );
    }
}
