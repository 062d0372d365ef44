//! Vocabularies between the two files that hold them: `tokenizer.json` and GGUF metadata.
//!
//! Both directions go through [`GgufVocabulary`], the smaller of the two languages; what it cannot
//! say is refused.

use std::collections::HashMap;
use std::path::Path;

use lathe_tensor::gguf::{MetaArray, MetaType, MetaValue, Metadata};
use serde_json::{Map, Value, json};

use super::gguf::{BYTE, CONTROL, UNKNOWN, USER_DEFINED};
use super::pieces::byte_piece;
use super::splitting::{GPT2, name_of, splitting};
use super::{GgufVocabulary, TokenizerError, VOCABULARY_MAX, read};

const NORMAL: i32 = 1;
const UNUSED: i32 = 5;

impl GgufVocabulary {
    /// Reads `tokenizer.json` and `tokenizer_config.json` of a Hugging Face directory.
    ///
    /// # Errors
    /// If a file cannot be read, or if GGUF has no name for what the tokenizer does.
    pub fn from_hugging_face(directory: &Path) -> Result<Self, TokenizerError> {
        let path = directory.join("tokenizer.json");
        let json = parse(&path)?;
        let config = directory.join("tokenizer_config.json");
        let config = if config.is_file() { parse(&config)? } else { Value::Null };
        Self::from_json(&json, &config)
            .map_err(|reason| TokenizerError::NoGgufForm { path, reason })
    }

    fn from_json(json: &Value, config: &Value) -> Result<Self, String> {
        let model = &json["model"];
        if model["type"].as_str().is_some_and(|kind| kind != "BPE") || !model["merges"].is_array() {
            return Err(format!("its model is {}, not BPE", model["type"]));
        }
        let byte_fallback = model["byte_fallback"] == true;
        let mut vocabulary = Self { merges: merges(model)?, ..Self::default() };
        vocabulary.read_tokens(json, byte_fallback)?;
        if byte_fallback {
            vocabulary.model = "llama".into();
            vocabulary.add_space_prefix = Some(adds_space(json));
            vocabulary.score_by_merges();
        } else {
            vocabulary.model = "gpt2".into();
            vocabulary.pre = Some(splitting_name(json)?.into());
        }
        vocabulary.read_roles(json, config);
        Ok(vocabulary)
    }

    fn read_tokens(&mut self, json: &Value, byte_fallback: bool) -> Result<(), String> {
        let vocab = json["model"]["vocab"].as_object().ok_or("its model has no vocabulary")?;
        let added: Vec<&Value> = json["added_tokens"].as_array().into_iter().flatten().collect();
        let listed = vocab.iter().map(|(token, id)| (token.as_str(), id));
        let named = added.iter().map(|it| (it["content"].as_str().unwrap_or_default(), &it["id"]));
        let mut entries: Vec<(&str, usize)> = Vec::with_capacity(vocab.len() + added.len());
        for (token, id) in listed.chain(named) {
            let id = id.as_u64().filter(|id| *id <= u64::from(VOCABULARY_MAX));
            entries.push((token, id.ok_or(format!("token {token:?} has no proper id"))? as usize));
        }
        let count = entries.iter().map(|entry| entry.1 + 1).max().unwrap_or(0);
        self.tokens = (0..count).map(|id| format!("[PAD{id}]")).collect();
        self.token_types = vec![UNUSED; count];
        for (token, id) in entries {
            token.clone_into(&mut self.tokens[id]);
            let byte = byte_fallback && byte_piece(token).is_some();
            self.token_types[id] = if byte { BYTE } else { NORMAL };
        }
        let unknown = json["model"]["unk_token"].as_str();
        for token in added {
            let id = token["id"].as_u64().unwrap_or_default() as usize;
            let special = token["special"] == true;
            self.token_types[id] = match special {
                true if unknown == token["content"].as_str() => UNKNOWN,
                true => CONTROL,
                false => USER_DEFINED,
            };
        }
        Ok(())
    }

    /// Scores that put merges in their order: minus the rank of the first merge that makes the
    /// token. Merges made from scores are sorted by them, so nothing is lost.
    fn score_by_merges(&mut self) {
        let mut ranks = HashMap::with_capacity(self.merges.len());
        for (rank, merge) in self.merges.iter().enumerate() {
            ranks.entry(merge.replacen(' ', "", 1)).or_insert(rank);
        }
        let last = ranks.len();
        let score = |token: &String| -(*ranks.get(token).unwrap_or(&last) as f32);
        self.scores = self.tokens.iter().map(score).collect();
        self.merges.clear();
    }

    fn read_roles(&mut self, json: &Value, config: &Value) {
        let id = |name: &str| {
            let token = &config[name];
            let text = token.as_str().or_else(|| token["content"].as_str())?;
            self.tokens.iter().position(|known| known == text).map(|id| id as u32)
        };
        let (beginning, end) = (id("bos_token"), id("eos_token"));
        (self.unknown_token_id, self.padding_token_id) = (id("unk_token"), id("pad_token"));
        (self.bos_token_id, self.eos_token_id) = (beginning, end);
        let frame = single_template(&json["post_processor"]);
        let frames = |step: Option<&Value>, token: Option<u32>| {
            let name = step.and_then(|step| step["SpecialToken"]["id"].as_str());
            name.is_some() && name == token.map(|id| self.tokens[id as usize].as_str())
        };
        let (before, after) = (frames(frame.first(), beginning), frames(frame.last(), end));
        (self.add_bos_token, self.add_eos_token) = (Some(before), Some(after && frame.len() > 1));
    }

    /// Sets the keys `tokenizer.ggml.*`.
    pub fn write(&self, metadata: &mut Metadata) {
        let mut set = |key: &str, value: Option<MetaValue>| {
            if let Some(value) = value {
                metadata.insert(format!("tokenizer.ggml.{key}"), value);
            }
        };
        let strings = |list: &[String]| {
            (!list.is_empty()).then(|| MetaValue::Array(MetaArray::from_strings(list)))
        };
        let scores = self.scores.iter().map(|score| MetaValue::F32(*score));
        let types = self.token_types.iter().map(|kind| MetaValue::I32(*kind));
        set("model", Some(MetaValue::String(self.model.clone())));
        set("pre", self.pre.clone().map(MetaValue::String));
        set("tokens", strings(&self.tokens));
        if !self.scores.is_empty() {
            set("scores", Some(MetaValue::Array(MetaArray::from_values(MetaType::F32, scores))));
        }
        set("token_type", Some(MetaValue::Array(MetaArray::from_values(MetaType::I32, types))));
        set("merges", strings(&self.merges));
        set("bos_token_id", self.bos_token_id.map(MetaValue::U32));
        set("eos_token_id", self.eos_token_id.map(MetaValue::U32));
        set("eot_token_id", self.eot_token_id.map(MetaValue::U32));
        set("eom_token_id", self.eom_token_id.map(MetaValue::U32));
        set("unknown_token_id", self.unknown_token_id.map(MetaValue::U32));
        set("padding_token_id", self.padding_token_id.map(MetaValue::U32));
        set("add_bos_token", self.add_bos_token.map(MetaValue::Bool));
        set("add_eos_token", self.add_eos_token.map(MetaValue::Bool));
        set("add_space_prefix", self.add_space_prefix.map(MetaValue::Bool));
    }

    /// The `tokenizer.json` that does the same.
    ///
    /// # Errors
    /// If the kind of vocabulary or its splitting rule is unknown.
    pub fn to_tokenizer_json(&self) -> Result<Value, TokenizerError> {
        let added = self.tokens.iter().enumerate().filter_map(|(id, token)| {
            let kind = self.token_types.get(id).copied().unwrap_or(NORMAL);
            matches!(kind, UNKNOWN | CONTROL | USER_DEFINED).then(|| {
                json!({
                    "id": id, "content": token, "special": kind != USER_DEFINED,
                    "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
                })
            })
        });
        let added: Vec<Value> = added.collect();
        let vocab: Map<String, Value> = self
            .tokens
            .iter()
            .enumerate()
            .map(|(id, token)| (token.clone(), Value::from(id)))
            .collect();
        let parts = match self.model.as_str() {
            "gpt2" => self.byte_level_parts()?,
            "llama" => self.sentence_piece_parts(),
            other => return Err(TokenizerError::UnknownGgufModel { found: other.into() }),
        };
        let mut model = json!({
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": parts.byte_fallback,
            "byte_fallback": parts.byte_fallback, "ignore_merges": parts.ignore_merges,
            "vocab": vocab, "merges": parts.merges,
        });
        if let Some(unknown) = self.unknown_token_id.filter(|_| parts.byte_fallback) {
            model["unk_token"] = json!(self.tokens.get(unknown as usize));
        }
        Ok(json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
            "normalizer": parts.normalizer, "pre_tokenizer": parts.pre_tokenizer,
            "post_processor": self.post_processor(parts.adds_beginning),
            "decoder": parts.decoder, "model": model,
        }))
    }

    fn byte_level_parts(&self) -> Result<Parts, TokenizerError> {
        let name = self.pre.as_deref().unwrap_or("default");
        let rule = splitting(name)
            .ok_or_else(|| TokenizerError::UnknownSplitting { found: name.into() })?;
        let byte_level = json!({
            "type": "ByteLevel",
            "add_prefix_space": false, "trim_offsets": true, "use_regex": false,
        });
        let splits = rule.patterns.iter().map(|pattern| {
            let pattern = json!({ "Regex": pattern });
            json!({"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": false})
        });
        let steps: Vec<Value> = splits.chain([byte_level.clone()]).collect();
        let merge = |merge: &String| match merge.split_once(' ') {
            Some((left, right)) => json!([left, right]),
            None => json!([merge]),
        };
        Ok(Parts {
            merges: self.merges.iter().map(merge).collect(),
            normalizer: Value::Null,
            pre_tokenizer: json!({"type": "Sequence", "pretokenizers": steps}),
            decoder: byte_level,
            byte_fallback: false,
            ignore_merges: rule.ignore_merges,
            adds_beginning: rule.add_beginning,
        })
    }

    fn sentence_piece_parts(&self) -> Parts {
        let prefix = self.add_space_prefix.unwrap_or(true);
        let mut normalizers = Vec::new();
        let mut decoders = vec![
            json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
            json!({"type": "ByteFallback"}),
            json!({"type": "Fuse"}),
        ];
        if prefix {
            normalizers.push(json!({"type": "Prepend", "prepend": "▁"}));
            decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
        }
        normalizers.push(json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"}));
        Parts {
            merges: self.merges_by_score(),
            normalizer: json!({"type": "Sequence", "normalizers": normalizers}),
            pre_tokenizer: Value::Null,
            decoder: json!({"type": "Sequence", "decoders": decoders}),
            byte_fallback: true,
            ignore_merges: false,
            adds_beginning: true,
        }
    }

    /// Every way to make a token out of two, best scores first, as transformers derives them.
    fn merges_by_score(&self) -> Vec<Value> {
        let kind = |id: usize| self.token_types.get(id).copied().unwrap_or(NORMAL);
        let mergeable = |id: usize| !matches!(kind(id), UNKNOWN | CONTROL | BYTE);
        let texts = self.tokens.iter().enumerate().filter(|(id, _)| mergeable(*id));
        let ids: HashMap<&str, usize> = texts.map(|(id, token)| (token.as_str(), id)).collect();
        let mut ways: Vec<(f32, usize, usize, usize)> = Vec::new();
        for (token, id) in &ids {
            for (at, _) in token.char_indices().skip(1) {
                let (left, right) = token.split_at(at);
                if let (Some(left), Some(right)) = (ids.get(left), ids.get(right)) {
                    let score = self.scores.get(*id).copied().unwrap_or(0.0);
                    ways.push((score, *id, *left, *right));
                }
            }
        }
        ways.sort_by(|a, b| {
            b.0.total_cmp(&a.0).then_with(|| (a.1, a.2, a.3).cmp(&(b.1, b.2, b.3)))
        });
        let pair = |(_, _, left, right): (f32, usize, usize, usize)| {
            json!([self.tokens[left], self.tokens[right]])
        };
        ways.into_iter().map(pair).collect()
    }

    fn post_processor(&self, adds_beginning: bool) -> Value {
        let token = |wanted: bool, id: Option<u32>| {
            id.filter(|_| wanted).and_then(|id| Some((id, self.tokens.get(id as usize)?)))
        };
        let before = token(self.add_bos_token.unwrap_or(adds_beginning), self.bos_token_id);
        let after = token(self.add_eos_token.unwrap_or(false), self.eos_token_id);
        if before.is_none() && after.is_none() {
            return Value::Null;
        }
        let mut special = Map::new();
        for (id, name) in before.iter().chain(&after) {
            special.insert((*name).clone(), json!({"id": name, "ids": [id], "tokens": [name]}));
        }
        let steps = |sequences: &[&str]| -> Vec<Value> {
            let step = |name: &String| json!({"SpecialToken": {"id": name, "type_id": 0}});
            let text = |it: &&str| json!({"Sequence": {"id": it, "type_id": 0}});
            let before = before.iter().map(|token| step(token.1));
            let after = after.iter().map(|token| step(token.1));
            before.chain(sequences.iter().map(text)).chain(after).collect()
        };
        json!({
            "type": "TemplateProcessing", "single": steps(&["A"]), "pair": steps(&["A", "B"]),
            "special_tokens": special,
        })
    }

    /// The `tokenizer_config.json` beside [`GgufVocabulary::to_tokenizer_json`].
    pub fn to_tokenizer_config(&self, chat_template: Option<&str>) -> Value {
        let mut config = json!({
            "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": false,
        });
        let roles = [
            ("bos_token", self.bos_token_id),
            ("eos_token", self.eos_token_id),
            ("unk_token", self.unknown_token_id),
            ("pad_token", self.padding_token_id),
        ];
        for (role, id) in roles {
            if let Some(token) = id.and_then(|id| self.tokens.get(id as usize)) {
                config[role] = json!(token);
            }
        }
        if let Some(template) = chat_template {
            config["chat_template"] = json!(template);
        }
        config
    }
}

/// What differs between the kinds of vocabulary in a `tokenizer.json`.
struct Parts {
    merges: Vec<Value>,
    normalizer: Value,
    pre_tokenizer: Value,
    decoder: Value,
    byte_fallback: bool,
    ignore_merges: bool,
    adds_beginning: bool,
}

fn parse(path: &Path) -> Result<Value, TokenizerError> {
    serde_json::from_str(&read(path)?)
        .map_err(|error| TokenizerError::Malformed { path: path.into(), reason: error.to_string() })
}

/// Merges are pairs, or in older files one string with a space.
fn merges(model: &Value) -> Result<Vec<String>, String> {
    let merge = |merge: &Value| match merge {
        Value::String(merge) => Some(merge.clone()),
        pair => Some(format!("{} {}", pair[0].as_str()?, pair[1].as_str()?)),
    };
    let list = model["merges"].as_array().into_iter().flatten().map(merge);
    list.collect::<Option<_>>().ok_or_else(|| "a merge is not a pair of tokens".into())
}

/// Whether a space is put before a text: by a normalizer, or by the Metaspace pre-tokenizer.
fn adds_space(json: &Value) -> bool {
    let steps = |value: &Value, list: &str| -> Vec<Value> {
        let inner = value[list].as_array().cloned();
        inner.unwrap_or_else(|| vec![value.clone()])
    };
    let prepends = |step: &Value| step["type"] == "Prepend";
    let metaspace = |step: &Value| step["type"] == "Metaspace" && step["prepend_scheme"] != "never";
    steps(&json["normalizer"], "normalizers").iter().any(prepends)
        || steps(&json["pre_tokenizer"], "pretokenizers").iter().any(metaspace)
}

/// The steps for one text of a template post-processor, wherever it is.
fn single_template(processor: &Value) -> Vec<Value> {
    let nested = processor["processors"].as_array().into_iter().flatten();
    let mut all = std::iter::once(processor).chain(nested);
    let template = all.find(|step| step["type"] == "TemplateProcessing");
    template.and_then(|step| step["single"].as_array().cloned()).unwrap_or_default()
}

/// GGUF's name of the way that a byte-level tokenizer splits text.
fn splitting_name(json: &Value) -> Result<&'static str, String> {
    let normalizer = &json["normalizer"];
    if !normalizer.is_null() && normalizer["type"] != "NFC" {
        return Err(format!("its normalizer is {}", normalizer["type"]));
    }
    let mut patterns = Vec::new();
    collect_patterns(&json["pre_tokenizer"], &mut patterns)?;
    let ignore_merges = json["model"]["ignore_merges"] == true;
    name_of(&patterns, ignore_merges)
        .ok_or_else(|| format!("it splits by rules that GGUF has no name for: {patterns:?}"))
}

fn collect_patterns(step: &Value, patterns: &mut Vec<String>) -> Result<(), String> {
    match step["type"].as_str() {
        Some("Sequence") => {
            let mut steps = step["pretokenizers"].as_array().into_iter().flatten();
            steps.try_for_each(|inner| collect_patterns(inner, patterns))?;
        }
        Some("ByteLevel") if step["add_prefix_space"] == true => {
            return Err("it puts a space before the text".into());
        }
        // The library's own pattern is used unless the file says no.
        Some("ByteLevel") if step["use_regex"] != false => patterns.push(GPT2.into()),
        Some("ByteLevel") => {}
        Some("Digits") if step["individual_digits"] == true => patterns.push(r"\p{N}".into()),
        Some("Digits") => patterns.push(r"\p{N}+".into()),
        Some("Split") if step["invert"] != true && step["pattern"]["Regex"].is_string() => {
            patterns.push(step["pattern"]["Regex"].as_str().unwrap_or_default().into());
        }
        _ => return Err(format!("its pre-tokenizer has a step {step}")),
    }
    Ok(())
}
