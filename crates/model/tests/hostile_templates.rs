//! Templates that mean harm. Each ends in a typed error, and none takes much memory.

use std::fs;

use lathe_model::chat::{ChatError, ChatTemplate, Message};
use serde_json::{Map, Value, json};

/// Bytes by which all templates together may raise the memory of this process.
const MEMORY_BYTES: u64 = 100 << 20;

/// How a template ends.
#[derive(Debug, PartialEq, Eq)]
enum End {
    Written,
    Syntax,
    Failed,
    Limit(&'static str),
}

fn end(source: &str, content: &str) -> End {
    let messages = [Message::new("user", content)];
    let rendered = ChatTemplate::new(source, Map::new())
        .and_then(|template| template.render(&messages, true, json!({"deep": deep(64)})));
    match rendered {
        Ok(_) => End::Written,
        Err(ChatError::Syntax { .. }) => End::Syntax,
        Err(ChatError::Limit { what, .. }) => End::Limit(what),
        Err(ChatError::Render { .. }) => End::Failed,
        Err(other) => panic!("{other}"),
    }
}

fn deep(levels: usize) -> Value {
    (0..levels).fold(Value::Null, |inner, _| json!([inner]))
}

fn chain(head: &str, part: &str, tail: &str) -> String {
    format!("{{{{ {head}{}{tail} }}}}", part.repeat(20_000))
}

/// A loop of `count` passes around `body`, nested twice where more than one range holds.
fn repeated(body: &str) -> String {
    format!(
        "{{% for i in range(100000) %}}{{% for j in range(100000) %}}{body}{{% endfor %}}{{% endfor %}}"
    )
}

/// A namespace `ns` whose `x` begins as `first` and becomes `next` 100,000 times.
fn grown(first: &str, next: &str, after: &str) -> String {
    format!(
        "{{% set ns = namespace(x={first}) %}}\
         {{% for i in range(100000) %}}{{% set ns.x = {next} %}}{{% endfor %}}{after}"
    )
}

type Row = (&'static str, String, End);

fn text(text: &str) -> String {
    text.to_owned()
}

fn nesting() -> End {
    End::Limit("levels of nesting")
}

fn values() -> End {
    End::Limit("levels of nested values")
}

fn bytes() -> End {
    End::Limit("bytes")
}

fn steps() -> End {
    End::Limit("steps")
}

fn chains() -> Vec<Row> {
    use End::{Failed, Written};
    vec![
        // Chains are lists: long ones run, or end as their operation says.
        ("a chain of -", chain("1", "-1", ""), Written),
        ("a chain of +", chain("1", "+1", ""), Written),
        ("a chain of ~", chain("1", "~1", ""), Written),
        ("a chain of attributes", chain("messages", ".b", ""), Failed),
        ("a chain of subscripts", chain("messages", "[0]", ""), Failed),
        ("a chain of filters", chain("1", "|string", ""), Written),
        ("a chain of calls", chain("messages", "()", ""), Failed),
        ("a chain of tests", chain("1", " is defined", ""), Written),
        ("a chain of comparisons", chain("1", "<=1", ""), Written),
        ("a chain of and", chain("1", " and 1", ""), Written),
        ("a chain of or", chain("0", " or 0", ""), Written),
        ("a chain of not", format!("{{{{ {}1 }}}}", "not ".repeat(20_000)), Written),
        ("a chain of powers", chain("1", "**1", ""), Written),
        ("a chain of choices", chain("", "1 if 0 else ", "1"), Written),
        ("a chain of signs", format!("{{{{ {}1 }}}}", "- ".repeat(20_000)), nesting()),
        ("a chain of strings", chain("", "'a' ", ""), Written),
        (
            "a chain of elif",
            format!("{{% if 0 %}}{}{{% endif %}}", "{% elif 0 %}".repeat(10_000)),
            Written,
        ),
    ]
}

fn sources() -> Vec<Row> {
    use End::{Limit, Syntax};
    vec![
        ("brackets", format!("{{{{ {}{} }}}}", "(".repeat(9_000), ")".repeat(9_000)), nesting()),
        ("lists", format!("{{{{ {}{} }}}}", "[".repeat(9_000), "]".repeat(9_000)), nesting()),
        (
            "dictionaries",
            format!("{{{{ {}1{} }}}}", "{1:".repeat(9_000), "}".repeat(9_000)),
            nesting(),
        ),
        ("calls", format!("{{{{ {}1{} }}}}", "a(".repeat(9_000), ")".repeat(9_000)), nesting()),
        ("slices", format!("{{{{ {}1{} }}}}", "a[1:".repeat(9_000), "]".repeat(9_000)), nesting()),
        ("blocks", "{% if 1 %}".repeat(9_000), nesting()),
        ("loops in loops", "{% for a in b %}".repeat(9_000), nesting()),
        ("macros in macros", "{% macro a() %}".repeat(9_000), nesting()),
        (
            "targets",
            format!("{{% set {}a{} = 1 %}}", "(".repeat(9_000), ")".repeat(9_000)),
            nesting(),
        ),
        ("brackets that stay open", "{{ ".to_owned() + &"(".repeat(100_000), Syntax),
        ("a long source", "a".repeat(1 << 20), Limit("bytes of source")),
        ("a large number", format!("{{{{ {} }}}}", "9".repeat(100_000)), Syntax),
        ("a long escape", r"{{ '\N{".to_owned() + &"A".repeat(100_000) + "}' }}", Syntax),
        ("an open comment", text("{# "), Syntax),
        ("an open raw block", text("{% raw %}"), Syntax),
    ]
}

fn growing_values() -> Vec<Row> {
    use End::{Failed, Limit, Written};
    vec![
        (
            "a namespace in itself",
            text("{% set ns=namespace() %}{% set ns.x=ns %}{{ ns }}"),
            Failed,
        ),
        (
            "a namespace in itself by a list",
            text("{% set ns=namespace() %}{% set ns.x=[{'a':ns}] %}{{ ns }}"),
            Failed,
        ),
        (
            "a loop in a namespace",
            text(
                "{% set ns=namespace() %}{% for i in [1] %}{% set ns.x=loop %}{% endfor %}{{ ns }}",
            ),
            Failed,
        ),
        ("a deep list", grown("[]", "[ns.x]", "{{ ns.x|tojson }}"), values()),
        ("a deep tuple", grown("()", "(ns.x,)", "{{ ns.x }}"), values()),
        ("a deep dictionary", grown("{}", "{'a': ns.x}", "{{ ns.x == ns.x }}"), values()),
        ("a deep batch", grown("[1]", "ns.x|batch(1)", ""), values()),
        ("a deep method", grown("[]", "[ns.x.copy]", ""), values()),
        ("slices of slices", grown("[1]", "ns.x[:]", "{{ ns.x|length }}"), Written),
        ("maps of maps", grown("[1]", "ns.x|map('string')|list", "{{ ns.x|length }}"), Written),
        ("a list that grows", grown("[1]", "ns.x + ns.x", ""), bytes()),
        ("a string that doubles", grown("'a'", "ns.x ~ ns.x", ""), bytes()),
        ("a string that is added", grown("'a'", "ns.x + ns.x", ""), bytes()),
        ("a number that squares", grown("9", "ns.x * ns.x", ""), Limit("bits of an integer")),
        ("a power", text("{{ 9 ** 99999999 }}"), Limit("bits of an integer")),
    ]
}

fn large_results() -> Vec<Row> {
    use End::{Failed, Limit};
    vec![
        ("repetition", text("{{ 'a' * 99999999999 }}"), bytes()),
        ("repetition of a list", text("{{ [1] * 99999999999 }}"), bytes()),
        ("a wide range", text("{{ range(99999999999) }}"), Limit("items in a range")),
        ("format", text("{{ '{:>10000000000}'.format(1) }}"), Limit("characters of a field")),
        (
            "format by a field",
            text("{{ '{:>{}}'.format(1, 9999999999) }}"),
            Limit("characters of a field"),
        ),
        ("nested fields", format!("{{{{ '{}'.format(1) }}}}", "{:".repeat(9_000)), Failed),
        ("percent", text("{{ '%9999999999d' % 1 }}"), Limit("characters of a field")),
        (
            "percent by an argument",
            text("{{ '%*d' % (9999999999, 1) }}"),
            Limit("characters of a field"),
        ),
        ("a precision", text("{{ '%.9999999999f' % 1.5 }}"), Limit("characters of a field")),
        ("join", text("{{ (['a'*100000]*100000)|join|length }}"), bytes()),
        ("join by a method", text("{{ ('a'*100000).join(['b']*100000) }}"), bytes()),
        ("tojson(indent=)", text("{{ [1]|tojson(indent=9999999999) }}"), bytes()),
        ("tojson with deep indent", text("{{ deep|tojson(indent=1000000) }}"), bytes()),
        ("separators", text("{{ ([1]*100000)|tojson(separators=('a'*100000, ':')) }}"), bytes()),
        ("indent", text("{{ ('a\n'*100000)|indent('b'*100000) }}"), bytes()),
        ("indent by a number", text("{{ 'a\nb'|indent(99999999999) }}"), bytes()),
        ("center", text("{{ 'a'.center(99999999999) }}"), bytes()),
        ("center as a filter", text("{{ 'a'|center(99999999999) }}"), bytes()),
        ("zfill", text("{{ 'a'.zfill(99999999999) }}"), bytes()),
        ("expandtabs", text("{{ ('\t'*1000000).expandtabs(65536) }}"), bytes()),
        ("replace", text("{{ ('a'*100000).replace('a', 'b'*100000) }}"), bytes()),
        ("replace by a filter", text("{{ ('a'*100000)|replace('', 'b'*100000) }}"), bytes()),
        ("batch", text("{{ [1]|batch(99999999999, 1) }}"), bytes()),
        ("slice", text("{{ [1]|slice(99999999999) }}"), bytes()),
        ("wordwrap", text("{{ ('a '*1000000)|wordwrap(1, wrapstring='b'*1000) }}"), bytes()),
        ("urlencode", text("{{ ('%'*30000000)|urlencode }}"), bytes()),
        ("escape", text("{{ ('&'*30000000)|e }}"), bytes()),
        ("a list of characters", text("{{ ('a'*30000000)|list }}"), bytes()),
        ("split", text("{{ ('a '*2000000).split() }}"), bytes()),
        ("splitlines", text("{{ ('a\n'*2000000).splitlines() }}"), bytes()),
        ("strftime", text("{{ strftime_now('%c'*1000000) }}"), bytes()),
        ("a dictionary", repeated("{% set _ = dict(a='b'*1000000) %}"), steps()),
    ]
}

fn long_runs() -> Vec<Row> {
    use End::{Failed, Syntax};
    vec![
        ("output", repeated("0123456789abcdef"), steps()),
        (
            "a large output",
            text(
                "{% set ns=namespace(x='0123456789abcdef') %}\
                 {% for i in range(16) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}\
                 {% for i in range(100000) %}{{ ns.x }}{% endfor %}",
            ),
            bytes(),
        ),
        ("an empty loop", repeated(""), steps()),
        ("a loop of lookups", repeated("{% set x = messages[0].content|length %}"), steps()),
        ("a loop of searches", repeated("{% set x = 'zz' in messages[0].content %}"), steps()),
        ("a loop of methods", repeated("{% set x = messages[0].content.count('zz') %}"), steps()),
        ("a loop of comparisons", repeated("{% set x = deep == deep %}"), steps()),
        ("a loop of sorts", repeated("{% set x = range(1000)|sort %}"), steps()),
        ("a loop of macros", repeated("{% macro m() %}{% endmacro %}"), bytes()),
        ("recursion", text("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"), nesting()),
        (
            "recursion by a caller",
            text("{% macro m() %}{% call m() %}{{ caller() }}{% endcall %}{% endmacro %}{{ m() }}"),
            nesting(),
        ),
        (
            "recursion by a loop",
            text("{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}"),
            nesting(),
        ),
        (
            "a tree of macros",
            text(
                "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}{{ m(60) }}",
            ),
            steps(),
        ),
        ("another file", text("{% include '/etc/passwd' %}"), Syntax),
        ("another template", text("{% extends 'a' %}"), Syntax),
        ("a class", text("{{ ''.__class__.__mro__ }}"), Failed),
        ("a class by a filter", text("{{ (''|attr('__class__')).x }}"), Failed),
        ("a class by a format", text("{{ '{0.__class__}'.format(1) }}"), Failed),
    ]
}

/// The highest memory that this process had.
fn peak_bytes() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib * 1024)
}

#[test]
fn hostile_templates_end_in_typed_errors() {
    let content = "a".repeat(1 << 20);
    let before = peak_bytes();
    let mut wrong = Vec::new();
    let tables = [chains(), sources(), growing_values(), large_results(), long_runs()];
    for (name, source, expected) in tables.into_iter().flatten() {
        let started = std::time::Instant::now();
        let found = end(&source, &content);
        eprintln!("{name}: {found:?} after {} ms", started.elapsed().as_millis());
        // On a slow machine the time may end before the steps do.
        let late = expected == End::Limit("steps") && found == End::Limit("milliseconds");
        if found != expected && !late {
            wrong.push(format!("{name}: {found:?}, expected {expected:?}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    if let (Some(before), Some(after)) = (before, peak_bytes()) {
        assert!(after - before < MEMORY_BYTES, "{} MB more", (after - before) >> 20);
    }
}
