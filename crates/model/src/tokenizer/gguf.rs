//! A tokenizer from the metadata of a GGUF file (keys `tokenizer.ggml.*`).
//!
//! Two kinds of vocabulary: `gpt2` is byte-level BPE with ranked merges and a splitting rule;
//! `llama` is SentencePiece's BPE with scores. Others are refused by name.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::Arc;

use lathe_tensor::gguf::{FromMeta, GgufFile, MetaArray, Metadata};
use tokenizers::normalizers::{Prepend, Replace, Sequence};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence as Splits;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, NormalizerWrapper, PreTokenizerWrapper, SplitDelimiterBehavior};

use super::model::SharedModel;
use super::pieces::{Alphabet, Kind, Pieces, Spelling, byte_piece};
use super::ranked::RankedMerges;
use super::scored::ScoredMerges;
use super::splitting::splitting;
use super::{FrameTokens, Pipeline, Tokenizer, TokenizerError};

/// Token types as GGUF numbers them.
pub(super) const UNKNOWN: i32 = 2;
pub(super) const CONTROL: i32 = 3;
pub(super) const USER_DEFINED: i32 = 4;
pub(super) const BYTE: i32 = 6;

/// Control tokens that end an answer under any template that uses them.
const END_NAMES: [&str; 13] = [
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|eom_id|>",
    "<EOT>",
    "[EOT]",
    "</s>",
    "<｜end▁of▁sentence｜>",
];

/// The tokenizer's part of a GGUF file's metadata, by the names of its keys without
/// `tokenizer.ggml.` (`eos_token_id` and so on are optional there; `None` is "not in the file").
#[derive(Clone, Debug, Default)]
pub struct GgufVocabulary {
    /// `model`: the kind of vocabulary, `gpt2` or `llama`.
    pub model: String,
    /// `pre`: the name of the splitting rule.
    pub pre: Option<String>,
    /// `tokens`, by id.
    pub tokens: Vec<String>,
    /// `scores`, by id; empty if absent.
    pub scores: Vec<f32>,
    /// `token_type`, by id; empty if absent.
    pub token_types: Vec<i32>,
    /// `merges`: two tokens with a space between, best first.
    pub merges: Vec<String>,
    /// `bos_token_id`
    pub bos_token_id: Option<u32>,
    /// `eos_token_id`
    pub eos_token_id: Option<u32>,
    /// `eot_token_id`
    pub eot_token_id: Option<u32>,
    /// `eom_token_id`
    pub eom_token_id: Option<u32>,
    /// `unknown_token_id`
    pub unknown_token_id: Option<u32>,
    /// `padding_token_id`
    pub padding_token_id: Option<u32>,
    /// `add_bos_token`
    pub add_bos_token: Option<bool>,
    /// `add_eos_token`
    pub add_eos_token: Option<bool>,
    /// `add_space_prefix`
    pub add_space_prefix: Option<bool>,
}

impl Tokenizer {
    /// Builds the tokenizer that is in a GGUF file.
    ///
    /// # Errors
    /// As [`Tokenizer::from_gguf_vocabulary`]; or if a key has the wrong type.
    pub fn from_gguf(file: &GgufFile) -> Result<Self, TokenizerError> {
        let metadata = &file.metadata;
        // Merges are the larger part of a vocabulary: they are read where they lie.
        let merges = strings(metadata, "merges")?.collect::<Vec<_>>();
        Self::build(GgufVocabulary::without_merges(metadata)?, &merges)
    }

    /// Builds the tokenizer that a GGUF file describes.
    ///
    /// # Errors
    /// If the kind of vocabulary or the splitting rule is unknown, if the lists do not have one
    /// entry a token, or if tokens repeat or merges name none.
    pub fn from_gguf_vocabulary(mut vocabulary: GgufVocabulary) -> Result<Self, TokenizerError> {
        let merges = std::mem::take(&mut vocabulary.merges);
        Self::build(vocabulary, &merges)
    }

    fn build<S: AsRef<str> + Sync>(
        mut vocabulary: GgufVocabulary,
        merges: &[S],
    ) -> Result<Self, TokenizerError> {
        vocabulary.check()?;
        let frame = vocabulary.frame();
        let end_tokens = vocabulary.end_tokens();
        let (add_beginning_default, added, pieces, pipeline) = match vocabulary.model.as_str() {
            "gpt2" => {
                let spelling = Spelling { alphabet: Alphabet::ByteLevel, leading_spaces: 0 };
                let added = vocabulary.added();
                let tokens = Arc::new(std::mem::take(&mut vocabulary.tokens));
                let (pieces, built) = rayon::join(
                    || vocabulary.pieces(&tokens, &spelling),
                    || vocabulary.byte_level_pipeline(Arc::clone(&tokens), merges),
                );
                let (pipeline, add_beginning) = built?;
                (add_beginning, added, pieces, pipeline)
            }
            "llama" => {
                let prefix = vocabulary.add_space_prefix.unwrap_or(true);
                let spelling = Spelling::sentence_piece(usize::from(prefix));
                let added = vocabulary.added();
                let pieces = vocabulary.pieces(&vocabulary.tokens, &spelling);
                (true, added, pieces, vocabulary.scored_pipeline(prefix)?)
            }
            other => return Err(TokenizerError::UnknownGgufModel { found: other.into() }),
        };
        let mut inner = Self::assemble(pipeline, added, pieces);
        if vocabulary.add_bos_token.unwrap_or(add_beginning_default) {
            inner.before = frame.beginning;
        }
        if vocabulary.add_eos_token.unwrap_or(false) {
            inner.after = frame.end;
        }
        inner.frame = frame;
        inner.end_tokens = end_tokens;
        Ok(Self { inner: Arc::new(inner) })
    }
}

impl GgufVocabulary {
    /// Reads the keys `tokenizer.ggml.*`.
    ///
    /// # Errors
    /// If a key has the wrong type, or the kind of vocabulary or the tokens are missing.
    pub fn from_metadata(metadata: &Metadata) -> Result<Self, TokenizerError> {
        let merges = strings(metadata, "merges")?.map(Cow::into_owned).collect();
        Ok(Self { merges, ..Self::without_merges(metadata)? })
    }

    /// As [`Self::from_metadata`], but for the merges.
    fn without_merges(metadata: &Metadata) -> Result<Self, TokenizerError> {
        fn read<'a, T: FromMeta<'a>>(
            metadata: &'a Metadata,
            key: &str,
        ) -> Result<Option<T>, TokenizerError> {
            Ok(metadata.optional(&format!("tokenizer.ggml.{key}"))?)
        }
        let id = |key: &str| -> Result<Option<u32>, TokenizerError> {
            // Some writers store -1 for "none".
            let id: Option<i64> = read(metadata, key)?;
            Ok(id.and_then(|id| u32::try_from(id).ok()))
        };
        let types: Option<Vec<i64>> = read(metadata, "token_type")?;
        let model: Option<String> = read(metadata, "model")?;
        Ok(Self {
            model: model.ok_or(TokenizerError::MissingGgufKey { key: "tokenizer.ggml.model" })?,
            pre: read(metadata, "pre")?,
            tokens: strings(metadata, "tokens")?.map(Cow::into_owned).collect(),
            scores: scores(metadata)?,
            token_types: types.unwrap_or_default().iter().map(|kind| *kind as i32).collect(),
            merges: Vec::new(),
            bos_token_id: id("bos_token_id")?,
            eos_token_id: id("eos_token_id")?,
            eot_token_id: id("eot_token_id")?,
            eom_token_id: id("eom_token_id")?,
            unknown_token_id: id("unknown_token_id")?,
            padding_token_id: id("padding_token_id")?,
            add_bos_token: read(metadata, "add_bos_token")?,
            add_eos_token: read(metadata, "add_eos_token")?,
            add_space_prefix: read(metadata, "add_space_prefix")?,
        })
    }

    fn check(&mut self) -> Result<(), TokenizerError> {
        let count = self.tokens.len();
        if count == 0 {
            return Err(TokenizerError::MissingGgufKey { key: "tokenizer.ggml.tokens" });
        }
        let lists = [("scores", self.scores.len()), ("token_type", self.token_types.len())];
        for (key, found) in lists {
            if found != 0 && found != count {
                return Err(TokenizerError::ListLength { key, found, expected: count });
            }
        }
        for (id, token) in self.tokens.iter_mut().enumerate() {
            if token.is_empty() {
                *token = format!("[EMPTY_{id}]");
            }
        }
        Ok(())
    }

    fn token_type(&self, id: usize) -> i32 {
        self.token_types.get(id).copied().unwrap_or(1)
    }

    fn frame(&self) -> FrameTokens {
        // Files exist whose ids of unused roles are 0xffffffff or beyond the vocabulary.
        let known = |id: Option<u32>| id.filter(|id| (*id as usize) < self.tokens.len());
        FrameTokens {
            beginning: known(self.bos_token_id),
            end: known(self.eos_token_id),
            unknown: known(self.unknown_token_id),
            padding: known(self.padding_token_id),
        }
    }

    /// Every token that ends an answer: those that the file names, and control tokens that are
    /// known to. In OpenAI's harmony format `<|end|>` ends a message, after which the answer goes
    /// on.
    fn end_tokens(&self) -> Vec<u32> {
        let mut ends: Vec<u32> = [self.eos_token_id, self.eot_token_id, self.eom_token_id]
            .into_iter()
            .flatten()
            .filter(|id| (*id as usize) < self.tokens.len())
            .collect();
        let control = |id: &usize| self.token_type(*id) == CONTROL;
        let controls: Vec<usize> = (0..self.tokens.len()).filter(control).collect();
        let named = |name: &str| controls.iter().copied().find(|id| self.tokens[*id] == name);
        let harmony = named("<|return|>").is_some() && named("<|call|>").is_some();
        for name in END_NAMES.iter().filter(|name| !harmony || **name != "<|end|>") {
            ends.extend(named(name).map(|id| id as u32));
        }
        ends.sort_unstable();
        ends.dedup();
        ends
    }

    /// The tokens that are matched in text as a whole, before any splitting.
    fn added(&self) -> Vec<AddedToken> {
        let special = |kind: i32| match kind {
            UNKNOWN | CONTROL => Some(true),
            USER_DEFINED => Some(false),
            _ => None,
        };
        let tokens = self.tokens.iter().enumerate();
        tokens
            .filter_map(|(id, token)| {
                let special = special(self.token_type(id))?;
                Some(AddedToken::from(token.clone(), special).normalized(false))
            })
            .collect()
    }

    fn pieces(&self, tokens: &[String], spelling: &Spelling) -> Pieces {
        let mut pieces = Pieces::new(tokens.len(), spelling.leading_spaces);
        for (id, token) in tokens.iter().enumerate() {
            match self.token_type(id) {
                UNKNOWN | CONTROL => {
                    pieces.push(Kind::Special, |bytes| bytes.extend_from_slice(token.as_bytes()));
                }
                USER_DEFINED => {
                    pieces.push(Kind::Text, |bytes| bytes.extend_from_slice(token.as_bytes()));
                }
                _ => pieces.push(Kind::Text, |bytes| spelling.append(token, bytes)),
            }
        }
        pieces
    }

    fn byte_level_pipeline<S: AsRef<str> + Sync>(
        &self,
        tokens: Arc<Vec<String>>,
        merges: &[S],
    ) -> Result<(Pipeline, bool), TokenizerError> {
        let name = self.pre.as_deref().unwrap_or("default");
        let rule = splitting(name)
            .ok_or_else(|| TokenizerError::UnknownSplitting { found: name.into() })?;
        let model = RankedMerges::new(tokens, merges, rule.ignore_merges)?;
        let model = SharedModel::Ranked(Arc::new(model));
        let mut pipeline = Pipeline::new(model);
        let mut steps: Vec<PreTokenizerWrapper> = Vec::new();
        for pattern in rule.patterns {
            let pattern = SplitPattern::Regex((*pattern).to_owned());
            let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false);
            steps.push(
                split
                    .map_err(|error| TokenizerError::Vocabulary { reason: error.to_string() })?
                    .into(),
            );
        }
        steps.push(ByteLevel::new(false, false, false).into());
        pipeline.with_pre_tokenizer(Some(Splits::new(steps)));
        Ok((pipeline, rule.add_beginning))
    }

    /// Takes tokens and scores out of `self`.
    fn scored_pipeline(&mut self, prefix: bool) -> Result<Pipeline, TokenizerError> {
        if self.scores.is_empty() {
            return Err(TokenizerError::MissingGgufKey { key: "tokenizer.ggml.scores" });
        }
        let mut bytes = Box::new([None; 256]);
        let mut seen = HashMap::with_capacity(self.tokens.len());
        let mut pieces = Vec::with_capacity(self.tokens.len());
        for (id, token) in std::mem::take(&mut self.tokens).into_iter().enumerate() {
            if seen.insert(token.clone(), id).is_some() {
                return Err(TokenizerError::DuplicateToken { token, id });
            }
            let kind = self.token_type(id);
            if let Some(byte) = byte_piece(&token).filter(|_| kind == BYTE) {
                bytes[usize::from(byte)] = Some(id as u32);
            }
            // As in SentencePiece, text never merges into reserved pieces.
            let mergeable = !matches!(kind, UNKNOWN | CONTROL | BYTE);
            pieces.push((token, self.scores[id], mergeable));
        }
        let unknown = self.unknown_token_id.filter(|id| (*id as usize) < pieces.len());
        let model = ScoredMerges::new(pieces, bytes, unknown);
        let mut pipeline = Pipeline::new(SharedModel::Scored(Arc::new(model)));
        let spaces = Replace::new(" ", "▁")
            .map_err(|error| TokenizerError::Vocabulary { reason: error.to_string() })?;
        let mut steps: Vec<NormalizerWrapper> = Vec::new();
        if prefix {
            steps.push(Prepend::new("▁".into()).into());
        }
        steps.push(spaces.into());
        pipeline.with_normalizer(Some(Sequence::new(steps)));
        Ok(pipeline)
    }
}

/// The strings of a key, none if it is absent. Bytes that are not UTF-8 become U+FFFD.
fn strings<'a>(
    metadata: &'a Metadata,
    key: &str,
) -> Result<impl Iterator<Item = Cow<'a, str>> + use<'a>, TokenizerError> {
    let key = format!("tokenizer.ggml.{key}");
    let array = metadata.optional::<&MetaArray>(&key)?;
    let strings = array.map(|array| {
        array.byte_strings().ok_or_else(|| TokenizerError::GgufType {
            key,
            found: format!("array of {}", array.kind()),
            expected: "an array of strings",
        })
    });
    // Valid UTF-8 is much faster to tell than to copy lossily.
    let lossy = |bytes| match std::str::from_utf8(bytes) {
        Ok(text) => Cow::Borrowed(text),
        Err(_) => String::from_utf8_lossy(bytes),
    };
    Ok(strings.transpose()?.into_iter().flatten().map(lossy))
}

/// The scores, which are floats, or integers in files of some converters.
fn scores(metadata: &Metadata) -> Result<Vec<f32>, TokenizerError> {
    let key = "tokenizer.ggml.scores";
    let Some(array) = metadata.optional::<&MetaArray>(key)? else { return Ok(Vec::new()) };
    let integers = || array.integers().map(|all| all.iter().map(|one| *one as f32).collect());
    array.floats().or_else(integers).ok_or_else(|| TokenizerError::GgufType {
        key: key.to_owned(),
        found: format!("array of {}", array.kind()),
        expected: "an array of floats or integers",
    })
}
