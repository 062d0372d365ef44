//! Which crate may depend on which (DESIGN: no sideways and no upward edge).

/// The allowed edges. A new edge needs a line here and one in ARCHITECTURE.md.
const ALLOWED: &[(&str, &[&str])] = &[
    ("lathe-tensor", &[]),
    ("lathe-program", &["lathe-tensor"]),
    ("lathe-cpu", &["lathe-program", "lathe-tensor"]),
    ("lathe-cuda", &["lathe-program", "lathe-tensor"]),
    ("lathe-model", &["lathe-program", "lathe-tensor"]),
    ("lathe-engine", &["lathe-model", "lathe-program", "lathe-tensor"]),
    ("lathe-linalg", &["lathe-tensor"]),
    ("lathe-quant", &["lathe-linalg", "lathe-model", "lathe-program", "lathe-tensor"]),
    (
        "lathe-session",
        &[
            "lathe-engine",
            "lathe-model",
            "lathe-cpu",
            "lathe-cuda",
            "lathe-program",
            "lathe-tensor",
        ],
    ),
    (
        "lathe",
        &[
            "lathe-session",
            "lathe-engine",
            "lathe-quant",
            "lathe-model",
            "lathe-program",
            "lathe-tensor",
        ],
    ),
    (
        "lathe-tests",
        &["lathe", "lathe-engine", "lathe-model", "lathe-cpu", "lathe-program", "lathe-tensor"],
    ),
    ("lathe-test-support", &[]),
    ("xtask", &[]),
];

/// Edges that only tests may have, beyond the allowed ones.
const ALLOWED_IN_TESTS: &[(&str, &str)] = &[
    ("lathe-model", "lathe-test-support"),
    ("lathe", "lathe-test-support"),
    ("lathe", "lathe-cpu"),
];

pub(super) fn check(metadata: &serde_json::Value) -> Vec<String> {
    let packages: Vec<&serde_json::Value> =
        metadata["packages"].as_array().into_iter().flatten().collect();
    let members: Vec<&str> = packages.iter().filter_map(|it| it["name"].as_str()).collect();
    let mut problems = Vec::new();
    for package in &packages {
        let name = package["name"].as_str().unwrap_or_default();
        let Some((_, allowed)) = ALLOWED.iter().find(|(crate_name, _)| *crate_name == name) else {
            problems.push(format!("{name}: a crate that xtask's table of edges does not know"));
            continue;
        };
        for dependency in package["dependencies"].as_array().into_iter().flatten() {
            let target = dependency["name"].as_str().unwrap_or_default();
            let in_tests = dependency["kind"] == "dev"
                && (target == name || ALLOWED_IN_TESTS.contains(&(name, target)));
            if members.contains(&target) && !allowed.contains(&target) && !in_tests {
                problems.push(format!("{name}: depends on {target}, an edge that is not allowed"));
            }
        }
    }
    problems
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    #[test]
    fn upward_and_unknown_edges_are_found() {
        let metadata = json!({"packages": [
            {"name": "lathe-tensor", "dependencies": [{"name": "lathe-model", "kind": null}]},
            {"name": "lathe-model", "dependencies": [{"name": "lathe-tensor", "kind": null}, {"name": "serde"}]},
            {"name": "lathe-new", "dependencies": []},
        ]});
        let problems = super::check(&metadata);
        assert_eq!(problems.len(), 2, "{problems:?}");
        assert!(problems[0].contains("lathe-tensor: depends on lathe-model"));
        assert!(problems[1].contains("lathe-new"));
    }
}
