#!/usr/bin/env python3
"""Chat templates against Jinja under Python, set up as transformers does it.

    python templates.py RENDER [--cases FILE.cpp ...] [--templates DIR ...]

RENDER is the example `render_template` of lathe-model. FILE.cpp are test files of other engines
from their source distributions: `tests/test-jinja.cpp` of llama.cpp, `tests/test-syntax.cpp` of
minja. DIR holds published templates (`models/templates` of llama.cpp). Without any, the cases of
this file alone are compared. Needs jinja2 and transformers. Differences that EXPLAINED does not
name make the script fail.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

from transformers.utils import chat_template_utils

# Patterns of a source, and why the two differ there. Also, a generator has no JSON; Lathe has lists.
EXPLAINED = [
    (r"\|\s*(random|urlize|pprint)|lipsum\(", "not supported: no published template uses it"),
    (r"\{%-?\s*(include|import|from|extends|block|autoescape)\b", "one file of text"),
    (r"\|\s*(map|select|reject|selectattr|rejectattr|unique|batch|slice|reverse)[^|}]*\}\}",
     "Jinja prints the address of a generator, Lathe a list"),
    (r"range\([^)]*\)\s*\}\}", "Python prints `range(0, 3)`, Lathe a list"),
    (r"\{%-?\s*do\b", "an extension of Jinja that transformers does not load; Lathe has it"),
    (r"\.(keys|values|items)\(\)\s*\}\}", "Python prints a view, Lathe a list"),
    (r"\.(append|update|pop|insert|extend|sort)\(", "refused by the sandbox of transformers"),
]

OWN = [
    ("{{ 'a\\nb\\n' | indent }}|", {}),
    ("{{ 'a\\n\\nb' | indent(2, true) }}|{{ 'a\\n\\nb' | indent(2, blank=true) }}|{{ ''|indent }}", {}),
    (r"{{ '\U0001F600 \N{BULLET} \a \x41 \101 \q \u00e9' }}", {}),
    ("{{ '%s is %d, %05.2f, %-4s|%4s|%x %r %%' % ('a', 3, 2.5, 'b', 'c', 255, 'q') }}", {}),
    ("{{ '%(a)s' % {'a': 1} }} {{ '%s' % x }}", {"x": [1, 2]}),
    ("{{ 'x'|int }} {{ '12'|int }} {{ ' 7_0 '|int }} {{ '1e3'|int }} {{ none|int }} {{ 'ff'|int(0, 16) }}", {}),
    ("{{ d|tojson(4) }} {{ d|tojson(true) }} {{ d|tojson(indent=2) }}", {"d": {"k": ["é", 1.0, None]}}),
    ("{{ d.items is defined }} {{ d['items'] }} {{ d.keys is callable }}", {"d": {"items": 3}}),
    ("{{ '{% generation %}' }}{% raw %}{% generation %}{% endraw %}{% generation %}x{% endgeneration %}", {}),
    ("{{ '<a>'|e }} {{ '<a>'|e + '<b>' }} {{ ('<' ~ ('>'|safe)) }} {{ '<a>'|e|e }} {{ '<'|safe|escape }}", {}),
    ("{{ 'a-b_c D'|title }} {{ 'hELLO wOrld'|capitalize }} {{ \"it's\".title() }}", {}),
    ("{{ 7 // 2 }} {{ -7 // 2 }} {{ -7 % 3 }} {{ 7 / 2 }} {{ 2 ** 3 ** 2 }} {{ 2 ** -1 }} {{ 7.5 // 2 }}", {}),
    ("{{ 'abc'[::-1] }} {{ 'abc'[-2:] }} {{ [1,2,3,4][1::2] }} {{ (1,2,3)[:2] }} {{ 'héllo'[1:3] }}", {}),
    ("{{ '{:>8}|{:<5}|{:^7}|{:05d}|{:,}|{:.2f}|{!r}|{0}'.format('a','b','c',42,1234567,3.14159,'q') if false else '' }}", {}),
    ("{{ '{:>8}|{:<5}|{:^7}|{:05d}|{:,}|{:.2f}|{!r}'.format('a','b','c',42,1234567,3.14159,'q') }}", {}),
    ("{{ '{0} {1} {0}'.format('a', 'b') }} {{ '{x[0]} {y.z}'.format(x=[5], y={'z': 1}) if false }}", {}),
    ("{{ 'a b  c'.split() }} {{ 'a,b,,c'.split(',') }} {{ 'abcabc'.rsplit('b', 1) }} {{ ''.split(',') }}", {}),
    ("{{ 'abc'.center(8, '*') }} {{ 'x'.ljust(3) }}| {{ '5'.rjust(3, '0') }} {{ '-5'.zfill(4) }} {{ 'ab'.center(5,'.') }}", {}),
    ("{{ 'Hello'.swapcase() }} {{ 'a\\tb'.expandtabs(4) }} {{ 'hello'.index('l') }} {{ 'hello'.rfind('l') }} {{ 'hello'.find('z') }}", {}),
    ("{{ 'abc'.isalpha() }} {{ 'ab1'.isalnum() }} {{ '12'.isdigit() }} {{ '½'.isnumeric() }} {{ 'a b'.isidentifier() }} {{ 'Ab Cd'.istitle() }}", {}),
    ("{{ 'a\\r\\nb\\nc'.splitlines() }} {{ 'a\\nb\\n'.splitlines(true) }}", {}),
    ("{{ x is sequence }} {{ x is iterable }} {{ x is callable }} {{ x is string }} {{ x is mapping }}", {}),
    ("{{ [3,1,2]|sort }} {{ ['b','A','c']|sort }} {{ ['b','A']|sort(case_sensitive=true) }} {{ [3,1]|sort(reverse=true) }}", {}),
    ("{% for g, xs in l|groupby('a') %}{{ g }}:{{ xs|length }};{% endfor %}", {"l": [{"a": 2}, {"a": 1}, {"a": 2}]}),
    ("{{ d|dictsort }} {{ d|dictsort(by='value', reverse=true) }}", {"d": {"b": 1, "A": 2, "c": 0}}),
    ("{{ [1,2,3,4,5]|batch(2, 'x')|list }} {{ [1,2,3,4,5]|slice(3)|list }} {{ [1,2,3,4]|slice(3,'-')|list }}", {}),
    ("{{ 2.5|round }} {{ 3.5|round }} {{ 2.675|round(2) }} {{ 7|round }} {{ 2.1|round(0,'ceil') }} {{ 1234|round(-2) }}", {}),
    ("{{ 'foo bar baz'|truncate(9) }} {{ 'foo bar baz'|truncate(5, true, '~', 0) }} {{ 'one two'|wordcount }}", {}),
    ("{{ 1000|filesizeformat }} {{ 1536|filesizeformat(true) }} {{ 1|filesizeformat }} {{ 1e9|filesizeformat }}", {}),
    ("{{ 'a b&c/d'|urlencode }} {{ {'a': 'x y', 'b': 1}|urlencode }} {{ '<b>x</b>  y'|striptags }}", {}),
    ("{{ {'class': 'a', 'id': none}|xmlattr }}|{{ [1,2]|sum }} {{ l|sum(attribute='a', start=10) }}", {"l": [{"a": 1}, {"a": 2}]}),
    ("{{ [1,'1',1.0,true]|unique|list }} {{ ['a','A']|unique|list }} {{ l|map(attribute='a', default=0)|list }}", {"l": [{"a": 1}, {}]}),
    ("{{ l|selectattr('a', 'equalto', 1)|list }} {{ l|rejectattr('a')|list }} {{ [1,2,3]|select('odd')|list }}", {"l": [{"a": 1}, {"a": 0}]}),
    ("{{ 1 == 1.0 }} {{ true == 1 }} {{ '1' == 1 }} {{ [1] == [1.0] }} {{ none == false }} {{ 1 < 2 < 3 }} {{ 'a' < 'b' }}", {}),
    ("{{ 1 in [1.0] }} {{ 'k' in {'k': 1} }} {{ 'b' in 'abc' }} {{ 'z' not in 'abc' }} {{ x in [x] }}", {"x": 3}),
    ("{% set ns = namespace(a=1) %}{% for i in [1,2] %}{% set ns.a = ns.a + i %}{% endfor %}{{ ns.a }}", {}),
    ("{% macro m(a, b=2) %}{{ a }}{{ b }}{{ varargs }}{{ kwargs }}{% endmacro %}{{ m(1) }} {{ m(1, 3, 4, c=5) }}", {}),
    ("{% macro m() %}[{{ caller('x') }}]{% endmacro %}{% call(y) m() %}{{ y }}!{% endcall %}", {}),
    ("{% for i in t recursive %}{{ i.n }}{{ loop.depth }}{% if i.c %}({{ loop(i.c) }}){% endif %}{% endfor %}", {"t": [{"n": "a", "c": [{"n": "b"}]}]}),
    ("{% for x in [1,2,3] if x > 1 %}{{ loop.index }}/{{ loop.length }}:{{ x }} {{ loop.previtem is defined }} {{ loop.nextitem|default('-') }};{% else %}no{% endfor %}", {}),
    ("{% for x in [] %}{% else %}none{% endfor %}{% for x in [1,1,2] %}{{ loop.changed(x) }}{{ loop.cycle('a','b') }}{% endfor %}", {}),
    ("{% set x = 1 %}{% if true %}{% set x = 2 %}{% endif %}{{ x }}{% for i in [1] %}{% set x = 3 %}{% endfor %}{{ x }}", {}),
    ("{% set a, b = 1, 2 %}{{ a }}{{ b }}{% set c %}z{{ a }}{% endset %}{{ c|upper }}{% with q=5 %}{{ q }}{% endwith %}{{ q is defined }}", {}),
    ("{% filter upper %}abc{% endfilter %}{{ 'a' if false }}|{{ x.y is defined }}", {"x": {}}),
    ("a  {#- c -#}  b {# d #}\n  {# e #}\n  {%- if true +%}\n  x\n  {%+ endif %}\n  y {{- 1 -}} z", {}),
    ("{{ x }}|{{ x.y }}|{{ x['z'] }}|{{ x.y.z }}", {"x": {}}),
    ("{{ x.y }}", {}), ("{{ 1 + 'a' }}", {}), ("{{ x < 1 }}", {}), ("{{ f() }}", {}), ("{{ 'a' in 3 }}", {}),
    ("{{ {'a': 1, 'b': [true, none, 1.5, 'q\\'s']} }} {{ (1,) }} {{ () }} {{ 1e20 }} {{ 1e-7 }} {{ 100000000000000000000 }}", {}),
    ("{{ 'ab'|list }} {{ {'a': 1}|list }} {{ 'abc'|first }}{{ 'abc'|last }} {{ 'abc'|reverse }} {{ [1,2]|reverse|list }}", {}),
    ("{{ ['a','b']|join(', ') }} {{ [1,none]|join }} {{ l|join('-', attribute='a') }}", {"l": [{"a": 1}, {"a": 2}]}),
    ("{{ ''|default('d') }}|{{ ''|default('d', true) }}|{{ x|d('e') }}|{{ none|default('n') }}", {}),
    ("{{ 'a.b'|replace('.', '\\\\.') }} {{ 'aaa'|replace('a','b',2) }} {{ 'aaa'.replace('a','b',1) }} {{ 123|replace(2, 'x') if false else '' }}", {}),
    ("{{ 'abc'|attr('upper') is callable }} {{ {'a': 1}|attr('a') }}| {{ {'a': 1}|items|list }}", {}),
    ("{{ 'foo'|center(9) }}| {{ ' x '|trim }}|{{ 'xxaxx'|trim('x') }}| {{ 'a'|string + 'b' }} {{ 3|string + 'b' }}", {}),
    ("{{ 'The quick brown fox'|wordwrap(10) }}", {}),
    ("{% for k, v in {'a': 1, 'b': 2}.items() %}{{ k }}={{ v }}{{ ',' if not loop.last }}{% endfor %}", {}),
    ("{{ cycler('a','b').next() }}{% set c = cycler('a','b') %}{{ c.next() }}{{ c.next() }}{{ c.current }}{% set j = joiner('+') %}{{ j() }}{{ j() }}", {}),
    ("{{ 5 is odd }} {{ 4 is divisibleby 2 }} {{ 'a' is in ['a'] }} {{ 5 is gt 3 }} {{ 'abc' is lower }} {{ 1 is sameas 1 }} {{ true is boolean }} {{ 1.0 is float }} {{ x is not defined }}", {}),
    ("{% for i in range(3) %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}{% endfor %}{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", {}),
    ("{{ [1,2,3]|max }} {{ ['b','A']|min }} {{ []|first is defined }} {{ [1,2]|length }} {{ 'é€'|length }}", {}),
]


ESCAPE = re.compile(r"\\(x[0-9a-fA-F]+|u[0-9a-fA-F]{4}|.)", re.S)


def unescape(found):
    escape = found[1]
    if escape[0] in "xu" and len(escape) > 1:
        return chr(int(escape[1:], 16))
    return {"n": "\n", "t": "\t", "r": "\r", "0": "\0"}.get(escape, escape)


class Reader:
    """Reads the arguments of a C++ call: strings, numbers and nlohmann's brace lists."""

    def __init__(self, text, at):
        self.text, self.at = text, at

    def skip(self):
        while True:
            found = re.compile(r"\s+|//[^\n]*\n|/\*.*?\*/", re.S).match(self.text, self.at)
            if not found:
                return
            self.at = found.end()

    def take(self, pattern):
        self.skip()
        found = re.compile(pattern, re.S).match(self.text, self.at)
        if found:
            self.at = found.end()
        return found

    def string(self):
        whole = None
        while True:
            if found := self.take(r'R"([^(]*)\('):
                end = self.text.index(f'){found[1]}"', self.at)
                part = self.text[self.at:end]
                self.at = end + len(found[1]) + 2
            elif found := self.take(r'(?:u8)?"((?:[^"\\]|\\.)*)"'):
                part = ESCAPE.sub(unescape, found[1])
            else:
                return whole
            whole = (whole or "") + part

    def value(self):
        if (text := self.string()) is not None:
            return text
        if self.take(r"json::object\(\)"):
            return {}
        if self.take(r"json::array\(\s*\)"):
            return []
        if self.take(r"json::array\(\s*\{"):
            items = self.items()
            self.take(r"\)")
            return items
        if self.take(r"json::(object|parse)?\s*\(?\s*\{"):
            items = self.items()
            self.take(r"\)")
            return as_json(items)
        if self.take(r"(json|std::string)\("):
            value = self.value()
            self.take(r"\)")
            return value
        if self.take(r"json\s*\{"):
            return as_json(self.items())
        if self.take(r"\{"):
            return as_json(self.items())
        if found := self.take(r"(true|false|nullptr|-?\d+\.?\d*(?:[eE][+-]?\d+)?)"):
            return {"true": True, "false": False, "nullptr": None}.get(found[1], None) if found[1][
                0
            ] in "tfn" else json.loads(found[1])
        raise ValueError(self.text[self.at:self.at + 40])

    def items(self):
        items = []
        while not self.take(r"\}"):
            items.append(self.value())
            self.take(",")
        return items


def as_json(items):
    pairs = items and all(isinstance(i, list) and len(i) == 2 and isinstance(i[0], str) for i in items)
    return dict(map(tuple, items)) if pairs else items or {}


def cases_of(path):
    """The templates and contexts of `test_template(t, name, template, context, ..)` in llama.cpp's
    file, and of `render(template, context, ..)` in minja's."""
    text = Path(path).read_text()
    for call in re.finditer(r"\b(test_template|render)\(", text):
        reader = Reader(text, call.end())
        try:
            if call[1] == "test_template":
                if not reader.take(r"t\s*,"):
                    continue
                reader.string()
                reader.take(",")
            source = reader.string()
            reader.take(",")
            context = reader.value()
            if source is not None:
                yield source, context if isinstance(context, dict) else {}
        except (ValueError, IndexError) as problem:
            print(f"not read: {problem}", file=sys.stderr)


CONVERSATIONS = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": " Be brief.\n"}, {"role": "user", "content": "Hi "},
     {"role": "assistant", "content": "<think>\nwell\n</think>\n\nHello"}, {"role": "user", "content": "2+2?"}],
    [{"role": "user", "content": "weather?"},
     {"role": "assistant", "content": None, "tool_calls": [
         {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich", "days": [1, 2]}}}]},
     {"role": "tool", "tool_call_id": "call00001", "name": "weather", "content": "{\"t\": 20}"}],
    [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
    [{"role": "user", "content": "</think>a<think>"}, {"role": "assistant", "content": "b", "reasoning_content": "r"},
     {"role": "user", "content": "c"}],
]
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "The \"weather\" <now>", "parameters": {
    "type": "object", "required": ["city"], "properties": {"city": {"type": "string", "description": "a\nb"},
    "days": {"type": "array", "items": {"type": "integer"}}, "unit": {"type": "string", "enum": ["C", "F"], "default": "C"}}}}}]


def published(directory):
    for path in sorted(Path(directory).glob("*.jinja")):
        source = path.read_text()
        for messages in CONVERSATIONS:
            for tools in (None, TOOLS):
                for generate in (True, False):
                    context = {"messages": messages, "add_generation_prompt": generate,
                               "bos_token": "<s>", "eos_token": "</s>", "tools": tools}
                    yield source, context


def reference(source, context):
    context = {"messages": [], "tools": None, "documents": None, "add_generation_prompt": False} | context
    try:
        return {"text": chat_template_utils._compile_jinja_template(source).render(**context)}
    except Exception as problem:
        return {"error": f"{type(problem).__name__}: {problem}"}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("render")
    parser.add_argument("--cases", nargs="*", default=[])
    parser.add_argument("--templates", nargs="*", default=[])
    options = parser.parse_args()
    cases = list(OWN)
    for path in options.cases:
        cases += cases_of(path)
    for directory in options.templates:
        cases += published(directory)
    lines = "".join(json.dumps({"source": s, "context": c}) + "\n" for s, c in cases)
    done = subprocess.run([options.render], input=lines, capture_output=True, text=True, check=True)
    ours = [json.loads(line) for line in done.stdout.split("\n") if line]
    explained = bad = 0
    for (source, context), found in zip(cases, ours, strict=True):
        expected = reference(source, context)
        same = found.get("text") == expected.get("text")
        if same:
            continue
        known = any(re.search(pattern, source) for pattern, _ in EXPLAINED)
        if known or "generator is not JSON" in expected.get("error", ""):
            explained += 1
            continue
        bad += 1
        shown = source if len(source) < 400 else source[:80] + "..."
        print(f"--- {shown!r}\n    jinja {str(expected)[:600]}\n    lathe {str(found)[:600]}")
    print(f"{len(cases)} cases: {len(cases) - explained - bad} equal, {explained} explained, {bad} not")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
