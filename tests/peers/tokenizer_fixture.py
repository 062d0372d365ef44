"""Expected token ids of SmolLM2's tokenizer, from Hugging Face tokenizers, and a small SentencePiece
vocabulary with what SentencePiece itself makes of texts.
usage: python tokenizer_fixture.py SHARED_FOLDER (needs tokenizers, sentencepiece; writes
crates/model/tests/fixtures/tokenizer/)

Long id sequences are kept as SHA-256 of their little-endian u32 bytes."""
import hashlib, io, json, pathlib, random, struct, sys
import sentencepiece
from tokenizers import Tokenizer

shared = pathlib.Path(sys.argv[1])
folder = pathlib.Path(__file__).parents[2] / "crates/model/tests/fixtures/tokenizer"
folder.mkdir(parents=True, exist_ok=True)


def digest(ids):
    return hashlib.sha256(struct.pack(f"<{len(ids)}I", *ids)).hexdigest()


def fuzzed(random, count):
    """Strings from assigned characters of many scripts (Unicode 9 and older, so that every library's
    tables know them), marks, emoji, digits, spaces of all kinds, contractions and markup."""
    ranges = [(0x20, 0x7e), (0xa0, 0xff), (0x100, 0x24f), (0x300, 0x36f), (0x391, 0x3c9), (0x410, 0x44f), (0x5d0, 0x5ea),
              (0x621, 0x64a), (0x660, 0x669), (0x905, 0x939), (0x93e, 0x94d), (0xe01, 0xe3a), (0x1100, 0x1112), (0x2000, 0x200f),
              (0x2028, 0x2029), (0x2010, 0x2027), (0x20a0, 0x20b5), (0x2150, 0x218b), (0x2460, 0x24ff), (0x3000, 0x3029), (0x3041, 0x3096), (0x30a1, 0x30fa), (0x4e00, 0x9fa5),
              (0xac00, 0xd7a3), (0xff01, 0xff5e), (0x10400, 0x1044f), (0x1d400, 0x1d454), (0x1f300, 0x1f320), (0x1f600, 0x1f64f), (0x20000, 0x200ff)]
    words = ["'s", "'LL", "don't", "I'm", "  ", "\n", "\r\n", "\t", "\n\n\n", "123", "4567890", "hello", "World", "the", "=>", "...", "<|im_start", "<|x|>",
             "\u200d", "\ufe0f", "👩\u200d👩\u200d👧", "e\u0301", "\x00", "\x1f", "\x7f", "\x85", "\ufeff", "\ufffd", "\u180e", "٣", "½", "①", "ﬁ", "İ", "ß", "ſ", "K"]
    for _ in range(count):
        parts = []
        for _ in range(random.randrange(1, 24)):
            if random.random() < 0.5:
                parts.append(random.choice(words))
            else:
                low, high = random.choice(ranges)
                parts.append("".join(chr(random.randint(low, high)) for _ in range(random.randrange(1, 5))))
            if random.random() < 0.3:
                parts.append(" ")
        yield "".join(parts)


def smollm2():
    tokenizer = Tokenizer.from_file(str(shared / "models/tokenizer.json"))
    texts = list(fuzzed(random.Random(7), 2000))
    (folder / "fuzzed.json").write_text(json.dumps(texts[:400], ensure_ascii=True) + "\n")
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids
    wiki = (shared / "data/wikitext2-test.txt").read_text()
    problems = [json.loads(line) for line in (shared / "data/humaneval.jsonl").read_text().splitlines()]
    code = "\n".join(p["prompt"] + p["canonical_solution"] + p["test"] for p in problems)
    ids = {name: encode(text) for name, text in (("wikitext2-test", wiki), ("humaneval", code))}
    assert all(tokenizer.decode(found, skip_special_tokens=False) == text for found, text in zip(ids.values(), (wiki, code)))
    with_special = "<|im_start|>user\nHi<|im_end|> <|im_end|>x<repo_name>"
    out = {
        "corpora": {name: {"tokens": len(found), "sha256": digest(found), "first": found[:16]} for name, found in ids.items()},
        "fuzzed": [encode(text) for text in texts[:400]],
        "rendered": {"text": with_special, "ids": encode(with_special)},
    }
    (folder / "smollm2.json").write_text(json.dumps(out, separators=(",", ":")) + "\n")
    print({name: len(found) for name, found in ids.items()})


def sentence_piece():
    """A byte-fallback BPE vocabulary of 600 pieces with Llama's settings."""
    wiki = (shared / "data/wikitext2-test.txt").read_text()
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(wiki.split("\n")[:600]), model_writer=model, vocab_size=800, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True, allow_whitespace_only_pieces=True,
        add_dummy_prefix=True, user_defined_symbols=["<sep>"], character_coverage=0.995, minloglevel=2)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    count = processor.get_piece_size()
    kind = lambda i: 2 if processor.is_unknown(i) else 3 if processor.is_control(i) else 6 if processor.is_byte(i) else 4 if processor.id_to_piece(i) == "<sep>" else 1
    texts = [line for line in wiki.split("\n")[600:1200] if len(line) > 40][:60]
    texts += ["", " ", "  two  spaces ", "\n\ttabs\n", "naïve 😀 東京", "aaaaaaaaaaaaaaaaa", "<0x41>", "</s>", "<s> <unk>", "x▁y", "banana bandana", "12345"]
    texts += [text for text in json.loads((folder / "fuzzed.json").read_text())[:100] if "\x00" not in text]
    out = {
        "tokens": [processor.id_to_piece(i) for i in range(count)],
        "scores": [processor.get_score(i) for i in range(count)],
        "token_type": [kind(i) for i in range(count)],
        "texts": texts, "ids": [processor.encode(text) for text in texts],
        "decoded": [processor.decode(processor.encode(text)) for text in texts],
    }
    (folder / "sentencepiece.json").write_text(json.dumps(out, separators=(",", ":")) + "\n")
    print(count, "pieces,", len(texts), "texts")


smollm2()
sentence_piece()
