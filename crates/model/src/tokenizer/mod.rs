//! Text to token ids and back, from a `tokenizer.json` or from GGUF metadata.
//!
//! **Invariant**: text that a user supplies cannot become a control token. [`Tokenizer::encode`]
//! takes text as text: `<|im_start|>` in it is eight ordinary characters and more. Only
//! [`Tokenizer::encode_rendered`] reads the names of special tokens as tokens, whoever wrote them,
//! and [`Tokenizer::encode_prompt`], for the output of a chat template, those that the template
//! wrote.

mod convert;
mod gguf;
mod model;
mod pieces;
mod ranked;
mod scored;
mod splitting;
mod stream;

use std::collections::BTreeSet;
use std::fs;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use aho_corasick::AhoCorasick;
use serde_json::Value;
use tokenizers::normalizers::{Replace, Sequence};
use tokenizers::{
    AddedToken, DecoderWrapper, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper,
    TokenizerImpl,
};

pub use gguf::GgufVocabulary;
use model::SharedModel;
use pieces::{Kind, Pieces, Spelling};
pub use stream::DecodeStream;

/// A tokenizer of the `tokenizers` crate over a shared model.
type Pipeline = TokenizerImpl<
    SharedModel,
    NormalizerWrapper,
    PreTokenizerWrapper,
    PostProcessorWrapper,
    DecoderWrapper,
>;

/// Stands inside the name of a token where that name is only text (see
/// [`Tokenizer::encode_prompt`]). These two code points are noncharacters, which Unicode reserves
/// for the inside of a program.
const SHIELD: &str = "\u{fdd0}\u{fdd1}";

/// The largest token id that is accepted: sixteen times the largest vocabulary in use.
const VOCABULARY_MAX: u32 = 1 << 22;

/// Why a tokenizer cannot be built or used.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// The file cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// The text is not a tokenizer description.
    #[error("{}: not a tokenizer description: {reason}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// The parser's words.
        reason: String,
    },
    /// The way that ids become text is not known here.
    #[error("the tokenizer's decoder is not supported: {found}")]
    UnsupportedDecoder {
        /// The decoder, as JSON.
        found: String,
    },
    /// The library refuses the vocabulary.
    #[error("the vocabulary is not usable: {reason}")]
    Vocabulary {
        /// The library's words.
        reason: String,
    },
    /// A tokenizer does something that GGUF metadata cannot say.
    #[error("{} has no form as GGUF metadata: {reason}", path.display())]
    NoGgufForm {
        /// The file.
        path: PathBuf,
        /// What cannot be said.
        reason: String,
    },
    /// Ids are so far apart that the table of tokens would be absurdly large.
    #[error("token id {id} is beyond the largest vocabulary that is accepted, {limit}")]
    VocabularyTooLarge {
        /// The highest id.
        id: u32,
        /// The limit.
        limit: u32,
    },
    /// A GGUF file's metadata is not what it should be.
    #[error(transparent)]
    Gguf(#[from] lathe_tensor::gguf::GgufError),
    /// A GGUF file's kind of vocabulary is unknown.
    #[error("tokenizer.ggml.model is {found:?}; supported are \"gpt2\" and \"llama\"")]
    UnknownGgufModel {
        /// The name in the file.
        found: String,
    },
    /// A GGUF file's splitting rule is unknown.
    #[error("tokenizer.ggml.pre is {found:?}, a splitting rule that is not supported")]
    UnknownSplitting {
        /// The name in the file.
        found: String,
    },
    /// A GGUF file lacks a key that its kind of vocabulary needs.
    #[error("the file has no {key}")]
    MissingGgufKey {
        /// The key.
        key: &'static str,
    },
    /// A value of a GGUF file has another type than its key promises.
    #[error("{key} has type {found}; expected {expected}")]
    GgufType {
        /// The key.
        key: String,
        /// The type in the file.
        found: String,
        /// The type that belongs there.
        expected: &'static str,
    },
    /// A per-token list of a GGUF file has another length than the token list.
    #[error("tokenizer.ggml.{key} has {found} entries; expected {expected}, one a token")]
    ListLength {
        /// The key, without its prefix.
        key: &'static str,
        /// Its length.
        found: usize,
        /// The number of tokens.
        expected: usize,
    },
    /// A merge is not two tokens.
    #[error("merge {index} is {found:?}; expected two tokens with a space between")]
    BadMerge {
        /// Its place in the list.
        index: usize,
        /// Its text.
        found: String,
    },
    /// A token is in the vocabulary twice.
    #[error("token {token:?} comes twice, the second time with id {id}")]
    DuplicateToken {
        /// Its text.
        token: String,
        /// The second id.
        id: usize,
    },
    /// The library could not encode.
    #[error("cannot encode the text: {reason}")]
    Encode {
        /// The library's words.
        reason: String,
    },
    /// An id that no token has.
    #[error("token {id} is not in the vocabulary of {vocabulary} tokens")]
    UnknownToken {
        /// The id.
        id: u32,
        /// One past the highest id.
        vocabulary: usize,
    },
}

/// Ids of the tokens that frame a text, where the vocabulary has them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FrameTokens {
    /// Begins a sequence.
    pub beginning: Option<u32>,
    /// Ends a sequence.
    pub end: Option<u32>,
    /// Stands for what has no token.
    pub unknown: Option<u32>,
    /// Fills up a batch.
    pub padding: Option<u32>,
}

/// Text to token ids and back. Cheap to clone: clones share everything.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    /// Reads names of special tokens as text.
    plain: Pipeline,
    /// Reads them as tokens.
    rendered: Pipeline,
    /// Reads them as tokens and drops [`SHIELD`] from the text between; made when first needed.
    shielded: OnceLock<Pipeline>,
    /// Finds the names of `added`; made when first needed.
    names: OnceLock<AhoCorasick>,
    added: Vec<AddedToken>,
    pieces: Arc<Pieces>,
    frame: FrameTokens,
    end_tokens: Vec<u32>,
    /// Framing that this module adds itself, where no post-processor of the library does.
    before: Option<u32>,
    after: Option<u32>,
    /// Whether texts begin with [`FrameTokens::beginning`], if a configuration says so.
    adds_beginning: Option<bool>,
}

/// The outcome of `work`, or the words of a panic in it. The library panics on some damaged files.
fn caught<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(work)).map_err(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        text.unwrap_or_else(|| "the tokenizers library panicked".to_owned())
    })
}

impl Tokenizer {
    /// Reads a `tokenizer.json`, and beside it, if it is there, `tokenizer_config.json` for which
    /// tokens begin and end a sequence.
    ///
    /// # Errors
    /// If the file cannot be read, is not a tokenizer, or spells its text in an unknown way.
    pub fn from_file(path: &Path) -> Result<Self, TokenizerError> {
        let text = read(path)?;
        let malformed = |reason: String| TokenizerError::Malformed { path: path.into(), reason };
        let mut tokenizer = caught(|| {
            let library: tokenizers::Tokenizer =
                text.parse().map_err(|error: tokenizers::Error| malformed(error.to_string()))?;
            Self::from_library(library)
        })
        .map_err(malformed)??;
        let config = path.with_file_name("tokenizer_config.json");
        if config.is_file() {
            let config: Value = serde_json::from_str(&read(&config)?).map_err(|error| {
                TokenizerError::Malformed { path: config.clone(), reason: error.to_string() }
            })?;
            tokenizer.name_frame_tokens(&config);
        }
        Ok(tokenizer)
    }

    fn from_library(library: tokenizers::Tokenizer) -> Result<Self, TokenizerError> {
        let decoder = serde_json::to_value(library.get_decoder()).unwrap_or(Value::Null);
        let spelling = Spelling::from_decoder(&decoder)?;
        let mut added: Vec<(u32, AddedToken)> =
            library.get_added_tokens_decoder().into_iter().collect();
        added.sort_by_key(|entry| entry.0);

        let mut by_id: Vec<(u32, String)> =
            library.get_vocab(false).into_iter().map(|(token, id)| (id, token)).collect();
        by_id.extend(added.iter().map(|(id, token)| (*id, token.content.clone())));
        by_id.sort_by_key(|entry| entry.0);
        let pieces = pieces_by_id(&by_id, &added, &spelling)?;

        let mut pipeline =
            Pipeline::new(SharedModel::Library(Arc::new(library.get_model().clone())));
        pipeline.with_normalizer(library.get_normalizer().cloned());
        pipeline.with_pre_tokenizer(library.get_pre_tokenizer().cloned());
        pipeline.with_post_processor(library.get_post_processor().cloned());
        let added = added.into_iter().map(|entry| entry.1).collect();
        Ok(Self { inner: Arc::new(Self::assemble(pipeline, added, pieces)) })
    }

    /// Completes a pipeline that has no added tokens yet. `added` are in the order of their ids,
    /// so that tokens beyond the model's vocabulary get the ids that follow it.
    fn assemble(pipeline: Pipeline, added: Vec<AddedToken>, pieces: Pieces) -> Inner {
        let mut rendered = pipeline;
        rendered.add_tokens(&added);
        let mut plain = rendered.clone();
        plain.set_encode_special_tokens(true);
        Inner {
            plain,
            rendered,
            shielded: OnceLock::new(),
            names: OnceLock::new(),
            added,
            pieces: Arc::new(pieces),
            frame: FrameTokens::default(),
            end_tokens: Vec::new(),
            before: None,
            after: None,
            adds_beginning: None,
        }
    }

    /// Takes the frame tokens from a `tokenizer_config.json`.
    fn name_frame_tokens(&mut self, config: &Value) {
        let id = |name: &str| {
            let token = &config[name];
            token
                .as_str()
                .or_else(|| token["content"].as_str())
                .and_then(|text| self.token_id(text))
        };
        let frame = FrameTokens {
            beginning: id("bos_token"),
            end: id("eos_token"),
            unknown: id("unk_token"),
            padding: id("pad_token"),
        };
        if let Some(inner) = Arc::get_mut(&mut self.inner) {
            inner.adds_beginning = config["add_bos_token"].as_bool();
            inner.end_tokens = frame.end.into_iter().collect();
            inner.frame = frame;
        }
    }

    /// The ids of `text`, in which the names of special tokens are text like any other.
    /// With `add_special`, the tokens that frame a sequence of this model are added.
    ///
    /// # Errors
    /// If the library cannot encode.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, TokenizerError> {
        let mut tokens = encode(&self.inner.plain, text, add_special)?;
        if let Some(before) = self.inner.before.filter(|_| add_special) {
            tokens.insert(0, before);
        }
        tokens.extend(self.inner.after.filter(|_| add_special));
        Ok(tokens)
    }

    /// The ids of a text in which names of special tokens *are* the tokens, whoever wrote them.
    /// Nothing is added.
    ///
    /// # Errors
    /// If the library cannot encode.
    pub fn encode_rendered(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        encode(&self.inner.rendered, text, false)
    }

    /// The ids of the output of a chat template, in which the bytes in `typed` (ranges in order)
    /// came with the conversation. A name whose first or last character was typed stays text if it
    /// is that of a special token, or of an added token that the template writes itself, as
    /// `written` says. Nothing is added.
    ///
    /// # Errors
    /// If the library cannot encode.
    pub fn encode_prompt(
        &self,
        text: &str,
        typed: &[Range<usize>],
        written: impl Fn(&str) -> bool,
    ) -> Result<Vec<u32>, TokenizerError> {
        let places = self.shield_places(text, typed, written)?;
        if places.is_empty() {
            return self.encode_rendered(text);
        }
        let mut shielded = String::with_capacity(text.len() + places.len() * SHIELD.len());
        let mut end = 0;
        for place in places {
            shielded.push_str(&text[end..place]);
            shielded.push_str(SHIELD);
            end = place;
        }
        shielded.push_str(&text[end..]);
        let pipeline = self.inner.shielded.get_or_init(|| self.shielded_pipeline());
        encode(pipeline, &shielded, false)
    }

    /// Where names have to be broken so that they stay text, in order.
    fn shield_places(
        &self,
        text: &str,
        typed: &[Range<usize>],
        written: impl Fn(&str) -> bool,
    ) -> Result<BTreeSet<usize>, TokenizerError> {
        // The first range that ends behind `at`, if it begins before `end`.
        let first_typed = |at: usize, end: usize| {
            let range = typed.get(typed.partition_point(|range| range.end <= at))?;
            (range.start < end).then(|| range.start.max(at))
        };
        let mut places = BTreeSet::new();
        for found in self.names()?.find_overlapping_iter(text) {
            let (start, end) = (found.start(), found.end());
            let token = &self.inner.added[found.pattern()];
            let marks = |name: &str| name.chars().any(|it| !it.is_whitespace()) && written(name);
            let is_typed = |at: usize| first_typed(at, at + 1).is_some();
            if !(is_typed(start) || is_typed(end - 1)) || !(token.special || marks(&token.content))
            {
                continue;
            }
            // Never at the start: what the template wrote before may end there. A name of one
            // character stays a token, but such tokens mark nothing in any known vocabulary.
            let second = start + text[start..].chars().next().map_or(0, char::len_utf8);
            places.insert(first_typed(second, end).unwrap_or(second));
        }
        Ok(places)
    }

    /// Finds the names of all added tokens.
    fn names(&self) -> Result<&AhoCorasick, TokenizerError> {
        if let Some(names) = self.inner.names.get() {
            return Ok(names);
        }
        let names = AhoCorasick::new(self.inner.added.iter().map(|token| &token.content))
            .map_err(|error| TokenizerError::Vocabulary { reason: error.to_string() })?;
        Ok(self.inner.names.get_or_init(|| names))
    }

    fn shielded_pipeline(&self) -> Pipeline {
        let rendered = &self.inner.rendered;
        let mut pipeline = Pipeline::new(rendered.get_model().clone());
        let mut normalizers: Vec<NormalizerWrapper> = Vec::new();
        normalizers.extend(Replace::new(SHIELD, "").ok().map(NormalizerWrapper::from));
        normalizers.extend(rendered.get_normalizer().cloned());
        pipeline.with_normalizer(Some(Sequence::new(normalizers)));
        pipeline.with_pre_tokenizer(rendered.get_pre_tokenizer().cloned());
        // Names must match before the shield is dropped, hence not after normalization.
        let mut added = self.inner.added.clone();
        let marks = |token: &&mut AddedToken| token.content.chars().any(|it| !it.is_whitespace());
        added.iter_mut().filter(marks).for_each(|token| token.normalized = false);
        pipeline.add_tokens(&added);
        pipeline
    }

    /// The text of `tokens`. With `skip_special`, control tokens are left out. Bytes that are not
    /// UTF-8 become U+FFFD.
    ///
    /// # Errors
    /// If an id is in no vocabulary.
    pub fn decode(&self, tokens: &[u32], skip_special: bool) -> Result<String, TokenizerError> {
        let pieces = &self.inner.pieces;
        let mut bytes = Vec::new();
        for &id in tokens {
            match pieces.kind(id) {
                Kind::Missing => {
                    return Err(TokenizerError::UnknownToken { id, vocabulary: pieces.len() });
                }
                Kind::Special if skip_special => {}
                Kind::Special | Kind::Text => bytes.extend_from_slice(pieces.bytes(id)),
            }
        }
        let spaces = bytes.iter().take(pieces.leading_spaces).take_while(|byte| **byte == b' ');
        let start = spaces.count();
        Ok(String::from_utf8_lossy(&bytes[start..]).into_owned())
    }

    /// A stream that gives out the text of tokens as they arrive.
    pub fn decode_stream(&self, skip_special: bool) -> DecodeStream {
        DecodeStream::new(Arc::clone(&self.inner.pieces), skip_special)
    }

    /// The bytes that `token` stands for; `None` if no token has this id. They need not be UTF-8.
    pub fn token_bytes(&self, token: u32) -> Option<Vec<u8>> {
        let pieces = &self.inner.pieces;
        (pieces.kind(token) != Kind::Missing).then(|| pieces.bytes(token).to_vec())
    }

    /// One past the highest token id. A model may have more rows than this, for padding.
    pub fn vocabulary(&self) -> usize {
        self.inner.pieces.len()
    }

    /// Whether `token` is a control token, which is not part of the text.
    pub fn is_special(&self, token: u32) -> bool {
        self.inner.pieces.kind(token) == Kind::Special
    }

    /// The id of the token with exactly this name, as the vocabulary spells it.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.rendered.token_to_id(token)
    }

    /// Which tokens begin and end a sequence.
    pub fn frame(&self) -> &FrameTokens {
        &self.inner.frame
    }

    /// The token that a text of this model begins with, if the tokenizer adds one: as the
    /// `add_bos_token` of its configuration says, else as its own file does.
    ///
    /// # Errors
    /// If the library cannot encode.
    pub fn added_beginning(&self) -> Result<Option<u32>, TokenizerError> {
        let beginning = self.inner.frame.beginning;
        let adds = match self.inner.adds_beginning {
            Some(adds) => adds,
            None => beginning.is_some() && self.encode("", true)?.first().copied() == beginning,
        };
        Ok(beginning.filter(|_| adds))
    }

    /// The names of the frame tokens as chat templates know them: `bos_token` and so on.
    pub fn named_tokens(&self) -> serde_json::Map<String, Value> {
        let frame = &self.inner.frame;
        let roles = [
            ("bos_token", frame.beginning),
            ("eos_token", frame.end),
            ("unk_token", frame.unknown),
            ("pad_token", frame.padding),
        ];
        let named = roles.into_iter().filter_map(|(role, id)| {
            Some((role.to_owned(), Value::String(self.inner.rendered.id_to_token(id?)?)))
        });
        named.collect()
    }

    /// The tokens that end a generated text, as far as the tokenizer's own file says; a model's
    /// generation settings may know more.
    pub fn end_tokens(&self) -> &[u32] {
        &self.inner.end_tokens
    }
}

fn read(path: &Path) -> Result<String, TokenizerError> {
    fs::read_to_string(path).map_err(|source| TokenizerError::Read { path: path.into(), source })
}

fn encode(pipeline: &Pipeline, text: &str, add: bool) -> Result<Vec<u32>, TokenizerError> {
    let encoding = pipeline
        .encode_fast(text, add)
        .map_err(|error| TokenizerError::Encode { reason: error.to_string() })?;
    Ok(encoding.get_ids().to_vec())
}

/// The table of token bytes from entries sorted by id (an id may come twice: once from the model
/// and once as an added token, which then decides).
fn pieces_by_id(
    by_id: &[(u32, String)],
    added: &[(u32, AddedToken)],
    spelling: &Spelling,
) -> Result<Pieces, TokenizerError> {
    let highest = by_id.last().map_or(0, |entry| entry.0);
    if highest > VOCABULARY_MAX {
        return Err(TokenizerError::VocabularyTooLarge { id: highest, limit: VOCABULARY_MAX });
    }
    let vocabulary = by_id.last().map_or(0, |entry| entry.0 as usize + 1);
    let mut pieces = Pieces::new(vocabulary, spelling.leading_spaces);
    for (id, token) in by_id {
        while pieces.len() < *id as usize {
            pieces.push(Kind::Missing, |_| {});
        }
        if pieces.len() > *id as usize {
            continue;
        }
        match added.binary_search_by_key(id, |entry| entry.0) {
            Ok(index) => {
                let token = &added[index].1;
                let kind = if token.special { Kind::Special } else { Kind::Text };
                pieces.push(kind, |bytes| bytes.extend_from_slice(token.content.as_bytes()));
            }
            Err(_) => pieces.push(Kind::Text, |bytes| spelling.append(token, bytes)),
        }
    }
    Ok(pieces)
}
