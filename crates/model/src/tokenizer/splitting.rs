//! How byte-level vocabularies split text into words before merging, by the name that GGUF files
//! give the rule (`tokenizer.ggml.pre`).
//!
//! The patterns are the ones of each model's own `tokenizer.json`; where llama.cpp, which coined
//! the names, spells one differently for its regex engine, the two mean the same. Each pattern cuts
//! the pieces that the one before left: its matches and the text between them become pieces.

/// One splitting rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Splitting {
    /// Applied in order.
    pub(super) patterns: &'static [&'static str],
    /// Whether a word that is a token is that token, even if no merges lead there.
    pub(super) ignore_merges: bool,
    /// Whether sequences begin with the beginning token unless the file says otherwise.
    pub(super) add_beginning: bool,
}

/// The pattern of GPT-2, which is also the library's default for byte-level vocabularies.
pub(super) const GPT2: &str =
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN35: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const KIMI_K2: &str = r"[\p{Han}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const BAILING: &str = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+";
const SEED_CODER: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+";
const EXAONE_MOE: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+";
/// The CJK ranges that DeepSeek's second and third generations cut apart.
const DEEPSEEK_CJK: &str = "[\u{4e00}-\u{9fa5}\u{3040}-\u{309f}\u{30a0}-\u{30ff}]+";
const DEEPSEEK_V3: &str = r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##;
/// The CJK ranges of DeepSeek's first generation (its `一-龥ࠀ-一가-퟿`).
const DEEPSEEK_LLM_CJK: &str = "[\u{4e00}-\u{9fa5}\u{800}-\u{4e00}\u{ac00}-\u{d7ff}]+";
/// DeepSeek LLM's own list of cased letters.
const DEEPSEEK_LLM_LETTERS: &str = concat!(
    r"\s?[",
    r"A-Za-z\x{b5}\x{c0}-\x{d6}\x{d8}-\x{f6}\x{f8}-\x{1ba}\x{1bc}-\x{1bf}\x{1c4}-\x{293}",
    r"\x{295}-\x{2af}\x{370}-\x{373}\x{376}\x{377}\x{37b}-\x{37d}\x{37f}\x{386}",
    r"\x{388}-\x{38a}\x{38c}\x{38e}-\x{3a1}\x{3a3}-\x{3f5}\x{3f7}-\x{481}\x{48a}-\x{52f}",
    r"\x{531}-\x{556}\x{10a0}-\x{10c5}\x{13a0}-\x{13f5}\x{13f8}-\x{13fd}\x{1c90}-\x{1cba}",
    r"\x{1cbd}-\x{1cbf}\x{1d00}-\x{1d2b}\x{1d6b}-\x{1d77}\x{1d79}-\x{1d9a}\x{1e00}-\x{1f15}",
    r"\x{1f18}-\x{1f1d}\x{1f20}-\x{1f45}\x{1f48}-\x{1f4d}\x{1f50}-\x{1f57}\x{1f59}\x{1f5b}",
    r"\x{1f5d}\x{1f5f}-\x{1f7d}\x{1f80}-\x{1fb4}\x{1fb6}-\x{1fbc}\x{1fbe}\x{1fc2}-\x{1fc4}",
    r"\x{1fc6}-\x{1fcc}\x{1fd0}-\x{1fd3}\x{1fd6}-\x{1fdb}\x{1fe0}-\x{1fec}\x{1ff2}-\x{1ff4}",
    r"\x{1ff6}-\x{1ffc}\x{2102}\x{2107}\x{210a}-\x{2113}\x{2115}\x{2119}-\x{211d}\x{2124}",
    r"\x{2126}\x{2128}\x{212a}-\x{212d}\x{212f}-\x{2134}\x{2139}\x{213c}-\x{213f}",
    r"\x{2145}-\x{2149}\x{214e}\x{2183}\x{2184}\x{2c00}-\x{2c7b}\x{2c7e}-\x{2ce4}",
    r"\x{2ceb}-\x{2cee}\x{2cf2}\x{2cf3}\x{a640}-\x{a66d}\x{a680}-\x{a69b}\x{a722}-\x{a76f}",
    r"\x{a771}-\x{a787}\x{a78b}-\x{a78e}\x{ab70}-\x{abbf}\x{fb00}-\x{fb06}\x{fb13}-\x{fb17}",
    r"\x{ff21}-\x{ff3a}\x{ff41}-\x{ff5a}\x{10400}-\x{1044f}\x{104b0}-\x{104d3}",
    r"\x{104d8}-\x{104fb}\x{10c80}-\x{10cb2}\x{10cc0}-\x{10cf2}\x{118a0}-\x{118df}",
    r"\x{1e900}-\x{1e943}",
    r"]+",
);
const DEEPSEEK_LLM_PUNCTUATION: &str =
    "\\s?[!-/:-~\u{ff01}-\u{ff0f}\u{ff1a}-\u{ff5e}\u{2018}-\u{201f}\u{3000}-\u{3002}]+";

const JAIS2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s{512}(?!\S)|\s{256}(?!\S)|\s{128}(?!\S)|\s{64}(?!\S)|\s{32}(?!\S)|\s{16}(?!\S)|\s{8}(?!\S)|\s{4}(?!\S)|\s{1,2}(?!\S)|\s{1}";
const SPARK: &str = r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+|[\r\n]|\s+(?!\S)|\s+"##;
/// The scripts and the punctuation that Youtu cuts apart.
const YOUTU_SCRIPTS: &str = "[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|[一-龥぀-ゟ゠-ヿ]+";
const YOUTU: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// BLOOM's words: what is between spaces and the punctuation of several scripts.
const BLOOM: &str = r" ?[^(\s|.,!?…。，、।۔،)]+";
/// Qwen2's without the English contractions.
const UFAKZEKA: &str =
    r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Digits in threes, counted from the right.
const DIGITS_FROM_RIGHT: &str = r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))";
/// The scripts that AFMoE cuts apart.
const AFMOE_SCRIPTS: &str = "[一-鿿㐀-䶿豈-﫿぀-ゟ゠-ヿ･-ﾟ⼀-⿟เ-๿຀-໿ក-៿က-႟ꩠ-ꩿꧠ-꧿가-힯ᄀ-ᇿ]+";

/// A rule and the names that it goes by.
struct Row {
    names: &'static [&'static str],
    rule: Splitting,
}

const fn row(names: &'static [&'static str], patterns: &'static [&'static str]) -> Row {
    Row { names, rule: Splitting { patterns, ignore_merges: false, add_beginning: false } }
}

impl Row {
    const fn whole_words(mut self) -> Self {
        self.rule.ignore_merges = true;
        self
    }

    const fn beginning(mut self) -> Self {
        self.rule.add_beginning = true;
        self
    }
}

/// Every rule, as in llama.cpp's loader (`llama_vocab::impl::load`). Of rules with equal patterns
/// the first gives a file its name: other programs know it longest.
const RULES: &[Row] = &[
    row(
        &[
            "gpt-2",
            "phi-2",
            "jina-es",
            "jina-de",
            "jina-v2-es",
            "jina-v2-de",
            "jina-v1-en",
            "jina-v2-code",
            "roberta-bpe",
            "gigachat",
            "a.x-4.0",
            "mellum",
            "modern-bert",
            "mpt",
            "olmo",
            "jais",
            "trillion",
            "granite-docling",
            "exaone4",
        ],
        &[GPT2],
    ),
    row(
        &[
            "smollm",
            "starcoder",
            "refact",
            "command-r",
            "codeshell",
            "exaone",
            "minerva-7b",
            "mellum2",
        ],
        &[r"\p{N}", GPT2],
    ),
    row(
        &[
            "llama-bpe",
            "llama3",
            "llama-v3",
            "falcon3",
            "falcon-h1",
            "pixtral",
            "midm-2.0",
            "lfm2",
            "jina-v5-nano",
        ],
        &[LLAMA3],
    )
    .whole_words()
    .beginning(),
    row(&["dbrx", "smaug-bpe", "chatglm-bpe"], &[LLAMA3]),
    row(&["glm4", "glm5"], &[LLAMA3]).whole_words(),
    row(
        &[
            "qwen2",
            "deepseek-r1-qwen",
            "kormo",
            "f2llmv2",
            "stablelm2",
            "hunyuan",
            "megrez",
            "grok-2",
            "solar-open",
        ],
        &[QWEN2],
    ),
    row(&["qwen35"], &[QWEN35]),
    row(&["tekken"], &[TEKKEN]).whole_words().beginning(),
    row(&["gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"], &[GPT4O]),
    row(&["granite-embed-multi-97m"], &[GPT4O]).whole_words(),
    row(&["kimi-k2"], &[KIMI_K2]),
    row(
        &["deepseek-llm"],
        &[
            r"[\r\n]",
            DEEPSEEK_LLM_LETTERS,
            DEEPSEEK_LLM_PUNCTUATION,
            r"\s+$",
            DEEPSEEK_LLM_CJK,
            r"\p{N}+",
        ],
    ),
    row(&["deepseek-coder"], &[r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", DEEPSEEK_LLM_CJK, r"\p{N}"]),
    row(
        &["deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"],
        &[r"\p{N}{1,3}", DEEPSEEK_CJK, DEEPSEEK_V3],
    ),
    row(&["spark2_5"], &[r"\p{N}{1,3}", DEEPSEEK_CJK, SPARK, r"\p{N}"]),
    row(&["falcon"], &[r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]"]),
    row(&["bailingmoe", "bailingmoe2", "llada-moe"], &[BAILING]),
    row(&["seed-coder"], &[SEED_CODER]),
    row(&["exaone-moe"], &[EXAONE_MOE]),
    row(&["minicpm5"], &[r"\p{N}{1,3}", LLAMA3]).whole_words(),
    row(&["jais-2"], &[JAIS2]),
    row(&["youtu"], &[YOUTU_SCRIPTS, YOUTU]).whole_words(),
    row(&["bloom", "poro-chat", "gpt3-finnish"], &[BLOOM]),
    row(&["viking"], &[BLOOM, r"\p{N}"]),
    row(
        &["chameleon"],
        &[
            "<sentinel:[0-9]+>",
            "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
            r"([\t\n]|    |  )",
            r"\p{N}",
            r"[\p{P}!-/:-@\[-`{-~]",
            GPT2,
        ],
    )
    .beginning(),
    row(&["tiny_aya", "cohere2moe"], &[r"\d{1,3}(?=(?:\d{3})*\b)", GPT4O]),
    row(&["superbpe"], &[r"\p{N}+", r"(?=(\d{3})+(?!\d))"]),
    row(&["ufakzeka"], &[UFAKZEKA]),
    row(&["laguna"], &[r"[^\n]+|[\n]+", QWEN2]),
    row(&["afmoe"], &[DIGITS_FROM_RIGHT, AFMOE_SCRIPTS, DEEPSEEK_V3]),
    row(&["default"], &[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"]),
];

/// The rule of that name; `None` if there is none.
pub(super) fn splitting(name: &str) -> Option<Splitting> {
    RULES.iter().find(|row| row.names.contains(&name)).map(|row| row.rule)
}

/// The name of the rule with these patterns, if there is one.
pub(super) fn name_of(patterns: &[String], ignore_merges: bool) -> Option<&'static str> {
    let is_it =
        |row: &&Row| row.rule.patterns == patterns && row.rule.ignore_merges == ignore_merges;
    RULES.iter().find(is_it).map(|row| row.names[0])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces(name: &str, text: &str) -> Vec<String> {
        let mut pieces = vec![text.to_owned()];
        for pattern in splitting(name).unwrap().patterns {
            let regex = fancy_regex::Regex::new(pattern).unwrap();
            pieces = pieces.iter().flat_map(|piece| isolate(&regex, piece)).collect();
        }
        pieces
    }

    fn isolate(regex: &fancy_regex::Regex, text: &str) -> Vec<String> {
        let (mut pieces, mut end) = (Vec::new(), 0);
        for found in regex.find_iter(text) {
            let found = found.unwrap();
            pieces.push(text[end..found.start()].to_owned());
            pieces.push(found.as_str().to_owned());
            end = found.end();
        }
        pieces.push(text[end..].to_owned());
        pieces.retain(|piece| !piece.is_empty());
        pieces
    }

    #[test]
    fn every_rule_compiles_and_loses_nothing() {
        let text = "I'M 12345 years—old…\n\n  naïve Straße 东京は 日本 한국어 \u{1f600}\tx  ";
        for row in RULES {
            let name = row.names[0];
            assert_eq!(pieces(name, text).concat(), text, "{name}");
        }
        assert_eq!(splitting("no-such-rule"), None);
    }

    #[test]
    fn rules_differ_where_their_models_do() {
        assert_eq!(pieces("smollm", "a 123"), ["a", " ", "1", "2", "3"]);
        assert_eq!(pieces("gpt-2", "a 123"), ["a", " 123"]);
        assert_eq!(pieces("llama-bpe", "a 12345"), ["a", " ", "123", "45"]);
        assert_eq!(pieces("qwen2", "I'LL"), ["I", "'LL"]);
        assert_eq!(pieces("gpt-2", "I'LL"), ["I", "'", "LL"]);
        assert_eq!(pieces("gpt-4o", "HelloWorld's"), ["Hello", "World's"]);
        assert_eq!(pieces("deepseek-v3", "東京tower"), ["東京", "tower"]);
        assert_eq!(pieces("kimi-k2", "東京tower"), ["東京", "tower"]);
        assert_eq!(pieces("llama-bpe", "東京tower"), ["東京tower"]);
    }

    // From llama.cpp's own loader: tests/peers/splittings.py.
    #[test]
    fn every_name_splits_as_in_llama_cpp() {
        let fixture = include_str!("../../tests/fixtures/tokenizer/splittings.json");
        let fixture: serde_json::Value = serde_json::from_str(fixture).unwrap();
        let text = fixture["text"].as_str().unwrap();
        for (name, expected) in fixture["rules"].as_object().unwrap() {
            let rule = splitting(name).unwrap_or_else(|| panic!("no rule {name}"));
            assert_eq!(rule.ignore_merges, expected["ignore_merges"], "{name}");
            assert_eq!(rule.add_beginning, expected["add_bos"], "{name}");
            let way = expected["pieces"].as_u64().unwrap() as usize;
            let way: Vec<String> = serde_json::from_value(fixture["ways"][way].clone()).unwrap();
            assert_eq!(pieces(name, text), way, "{name}");
        }
        assert_eq!(pieces("afmoe", "a1234567 12"), ["a", "1", "234", "567", " ", "12"]);
    }
}
