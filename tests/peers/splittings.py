#!/usr/bin/env python3
"""How llama.cpp splits text before merging, by the name in `tokenizer.ggml.pre`.

    python splittings.py llama.cpp/src/llama-vocab.cpp > crates/model/tests/fixtures/tokenizer/splittings.json

Reads each name's patterns and flags from llama.cpp's loader and applies them with the package
`regex`. Where the loader quotes the original pattern of a model's tokenizer.json, that one is used:
the other is spelled for llama.cpp's own engine. Names whose splitting is code there, or whose
vocabulary does not spell bytes, are left out.
"""

import json
import re
import sys
from pathlib import Path

import regex

TEXT = (
    "I'M we'Ll 1234567 x12 années—old…\n\n  naïve Straße 东京は tower 한국어 हिन्दी \U0001f600\tx  (a|b) "
    "HelloWorld's fooBAR /usr/bin\r\n \n\n\nend, wait!? <sentinel:12> don't 3.14   \n    "
)
LEFT_OUT = {"kimi-k2", "afmoe", "gemma4", "sarvam-moe", "granite-embed-multi-311m", "whitespace"}
STRING = r'"((?:[^"\\]|\\.)*)"'
ESCAPE = re.compile(r"\\(.)", re.S)


def unescape(text):
    return ESCAPE.sub(lambda m: {"n": "\n", "r": "\r", "t": "\t"}.get(m[1], m[1]), text)


def patterns_of(block):
    patterns, original = [], None
    for line in block.split("\n"):
        line = line.strip()
        if found := re.fullmatch(rf"//.*?original regex from tokenizer.json: {STRING}", line):
            original = unescape(found[1])
        elif found := re.fullmatch(rf"//\s*{STRING},?", line):
            original = unescape(found[1])
        elif found := re.match(rf"{STRING},", line):
            patterns.append(original or unescape(found[1]))
            original = None
    return patterns


def isolate(pattern, piece):
    end = 0
    for found in regex.finditer(pattern, piece):
        yield piece[end:found.start()]
        yield found[0]
        end = found.end()
    yield piece[end:]


def main():
    source = Path(sys.argv[1]).read_text()
    start = source.index("struct llm_tokenizer_bpe : llm_tokenizer")
    cases = {}
    kinds = []
    for line_block in re.split(r"(?=\n\s+case LLAMA_VOCAB_PRE_TYPE_)", source[start:source.index("std::vector<std::string> regex_exprs;")]):
        for kind in re.findall(r"case LLAMA_VOCAB_PRE_TYPE_(\w+):", line_block):
            kinds.append(kind)
        if "regex_exprs = {" in line_block:
            found = patterns_of(line_block.split("default:")[0])
            cases |= dict.fromkeys(kinds, found)
            kinds = []
    default = source[start:].split("default regex for BPE")[1].split("};")[0]
    cases["DEFAULT"] = patterns_of(default)
    loader = source[source.index("if (tokenizer_pre.empty())"):source.index('"unknown pre-tokenizer type')]
    rows = {}
    for block in loader.split("} else if (")[1:]:
        names = re.findall(r'tokenizer_pre == "([^"]+)"', block)
        kind = re.search(r"pre_type = LLAMA_VOCAB_PRE_TYPE_(\w+)", block)[1]
        for name in names:
            if name in LEFT_OUT:
                continue
            pieces = [TEXT]
            for pattern in cases[kind]:
                pieces = [part for piece in pieces for part in isolate(pattern, piece) if part]
            rows[name] = {
                "ignore_merges": "ignore_merges = true" in block,
                "add_bos": "add_bos = true" in block,
                "pieces": pieces,
            }
    ways = []
    for row in rows.values():
        if row["pieces"] not in ways:
            ways.append(row["pieces"])
        row["pieces"] = ways.index(row["pieces"])
    print(json.dumps({"text": TEXT, "ways": ways, "rules": rows}, ensure_ascii=False))


if __name__ == "__main__":
    main()
