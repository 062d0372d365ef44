//! The known name that comes nearest to an unknown one, for error messages.

/// How alike two names must be, from 0 to 1 (Jaro and Winkler).
const ALIKE: f64 = 0.8;

/// The one of `known` that comes nearest to `found`, if it is near.
pub fn nearest<'a>(found: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let found = found.to_lowercase();
    known
        .into_iter()
        .map(|name| (strsim::jaro_winkler(&found, &name.to_lowercase()), name))
        .filter(|(alike, _)| *alike >= ALIKE)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, name)| name)
}

/// What an error says was expected: `one of a, b; did you mean a?`, without the question if none of
/// `known` is near to `found`.
pub fn one_of(found: &str, known: &[&str]) -> String {
    if known.is_empty() {
        return "none".to_owned();
    }
    let list = known.join(", ");
    match nearest(found, known.iter().copied()) {
        Some(name) => format!("one of {list}; did you mean {name}?"),
        None => format!("one of {list}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slip_of_the_finger_is_understood() {
        let known = ["gptq", "awq", "rtn", "low-rank"];
        for (found, expected) in
            [("gtpq", Some("gptq")), ("lowrank", Some("low-rank")), ("AWQ", Some("awq"))]
        {
            assert_eq!(nearest(found, known), expected, "{found}");
        }
        assert_eq!(nearest("magic", known), None);
        assert_eq!(nearest("", known), None);
        assert_eq!(one_of("magic", &["a", "b"]), "one of a, b");
        assert_eq!(one_of("gtpq", &["gptq", "b"]), "one of gptq, b; did you mean gptq?");
    }
}
