//! Conversations to prompts, by the Jinja template that comes with a model.
//!
//! Rendering follows Hugging Face transformers (`apply_chat_template`): the same whitespace rules,
//! globals (`raise_exception`, `strftime_now`), JSON spelling and Python methods, so that the
//! prompt is byte for byte the one that the model was trained on. A template is code from a
//! checkpoint: it runs within limits and sees nothing but the conversation.
//!
//! **Invariant**: only the template writes control tokens. A [`Prompt`] knows which of its bytes
//! came with the conversation, and what a user typed stays text.

mod clock;
mod jinja;

use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Map, Value, json};

use crate::tokenizer::{Tokenizer, TokenizerError};
use jinja::{Failure, Kind, Template};

/// The name under which a checkpoint's only template goes.
const DEFAULT: &str = "default";

/// Why a conversation has no prompt.
#[derive(Debug, thiserror::Error)]
pub enum ChatError {
    /// A file beside the checkpoint cannot be read.
    #[error("cannot read {}: {reason}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system or the JSON parser says.
        reason: String,
    },
    /// The template is not Jinja.
    #[error("chat template {name:?}, line {line}: {reason}")]
    Syntax {
        /// The template's name.
        name: String,
        /// Where, counted from 1 (0 if unknown).
        line: usize,
        /// The parser's words.
        reason: String,
    },
    /// The checkpoint has templates, but none for this use.
    #[error("no chat template is named {wanted:?}; the checkpoint has {found:?}")]
    NoTemplate {
        /// The name that was asked for.
        wanted: String,
        /// The names that there are.
        found: Vec<String>,
    },
    /// The template refuses the conversation (its own `raise_exception`).
    #[error("the chat template refuses this conversation: {message}")]
    Refused {
        /// The template's words.
        message: String,
    },
    /// The template fails on this conversation.
    #[error("the chat template failed: {reason}")]
    Render {
        /// The interpreter's words.
        reason: String,
    },
    /// The template needs more than a template may.
    #[error("the chat template {name:?} needs more than {most} {what}, which is the limit")]
    Limit {
        /// The template's name.
        name: String,
        /// What it needs.
        what: &'static str,
        /// How much of it there is.
        most: u64,
    },
    /// The prompt cannot become tokens.
    #[error(transparent)]
    Tokenize(#[from] TokenizerError),
}

/// One message of a conversation.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Message {
    /// Who speaks: `system`, `user`, `assistant`, `tool`.
    pub role: String,
    /// The text, or parts (`[{"type": "text", "text": ".."}]`), or null beside tool calls.
    #[serde(default)]
    pub content: Value,
    /// Everything else: `tool_calls`, `name`, `reasoning_content`.
    #[serde(flatten)]
    pub fields: Map<String, Value>,
}

impl Message {
    /// A message of text.
    pub fn new(role: impl Into<String>, text: impl Into<String>) -> Self {
        Self { role: role.into(), content: Value::String(text.into()), fields: Map::new() }
    }
}

/// The compiled templates of one checkpoint.
#[derive(Debug)]
pub struct ChatTemplate {
    templates: Vec<(String, Template)>,
    /// `bos_token` and so on, as text.
    special_tokens: Map<String, Value>,
}

impl ChatTemplate {
    /// Compiles one template. `special_tokens` holds what the template knows as `bos_token`,
    /// `eos_token` and so on (see [`Tokenizer::named_tokens`]).
    ///
    /// # Errors
    /// If it is not Jinja.
    pub fn new(source: &str, special_tokens: Map<String, Value>) -> Result<Self, ChatError> {
        Self::with_names(vec![(DEFAULT.into(), source.into())], special_tokens)
    }

    /// Compiles several templates, as (name, source). The one named `tool_use`, if any, serves
    /// conversations with tools, the one named `default` all others.
    ///
    /// # Errors
    /// If one is not Jinja, or there is none.
    pub fn with_names(
        sources: Vec<(String, String)>,
        special_tokens: Map<String, Value>,
    ) -> Result<Self, ChatError> {
        if sources.is_empty() {
            return Err(ChatError::NoTemplate { wanted: DEFAULT.into(), found: Vec::new() });
        }
        let compile = |(name, source): (String, String)| match Template::parse(&source) {
            Ok(template) => Ok((name, template)),
            Err(failure) => Err(error_of(&name, failure)),
        };
        let templates = sources.into_iter().map(compile).collect::<Result<_, _>>()?;
        Ok(Self { templates, special_tokens })
    }

    /// Reads the templates of a Hugging Face directory: `chat_template.jinja` (and
    /// `additional_chat_templates/*.jinja`), else `chat_template.json`, else the entry
    /// `chat_template` of `tokenizer_config.json`. `None` if there are none.
    ///
    /// # Errors
    /// If a file cannot be read, or a template is not Jinja.
    pub fn from_directory(directory: &Path) -> Result<Option<Self>, ChatError> {
        let config = read_json(&directory.join("tokenizer_config.json"))?.unwrap_or(Value::Null);
        let mut sources = template_files(directory)?;
        if sources.is_empty() {
            let own = read_json(&directory.join("chat_template.json"))?.unwrap_or(Value::Null);
            sources = named_sources(&own["chat_template"]);
        }
        if sources.is_empty() {
            sources = named_sources(&config["chat_template"]);
        }
        if sources.is_empty() {
            return Ok(None);
        }
        Self::with_names(sources, special_tokens(&config)).map(Some)
    }

    /// The prompt for `messages`. With `add_generation_prompt` it ends where the assistant's answer
    /// begins. `extra` is an object with whatever else the template takes: `tools`, `documents`,
    /// `enable_thinking`, and `chat_template` to choose a template by name.
    ///
    /// # Errors
    /// If the template refuses the conversation or fails on it.
    pub fn render(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
        extra: Value,
    ) -> Result<String, ChatError> {
        self.prompt(messages, add_generation_prompt, extra).map(|prompt| prompt.text)
    }

    /// The prompt's tokens. Names of control tokens inside the messages (and inside `extra`) stay
    /// text: only the template itself places control tokens.
    ///
    /// # Errors
    /// As [`ChatTemplate::render`]; or if the prompt cannot be encoded.
    pub fn encode(
        &self,
        tokenizer: &Tokenizer,
        messages: &[Message],
        add_generation_prompt: bool,
        extra: Value,
    ) -> Result<Vec<u32>, ChatError> {
        Ok(self.prompt(messages, add_generation_prompt, extra)?.encode(tokenizer)?)
    }

    /// The prompt as [`ChatTemplate::render`] makes it, with what it needs to become tokens.
    ///
    /// # Errors
    /// As [`ChatTemplate::render`].
    pub fn prompt(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
        extra: Value,
    ) -> Result<Prompt, ChatError> {
        let messages = serde_json::to_value(messages)
            .map_err(|error| ChatError::Render { reason: error.to_string() })?;
        let mut names = self.special_tokens.clone();
        // Both are always defined in transformers, if only as None.
        names.insert("tools".into(), Value::Null);
        names.insert("documents".into(), Value::Null);
        names.insert("add_generation_prompt".into(), json!(add_generation_prompt));
        let mut typed = Map::new();
        typed.insert("messages".into(), messages);
        if let Value::Object(extra) = extra {
            typed.extend(extra);
        }
        let (name, template) = self.choose(&typed)?;
        let rendered = template
            .render(&names, &typed, &clock::strftime_now)
            .map_err(|failure| error_of(name, failure))?;
        let literals = Arc::clone(template.literals());
        Ok(Prompt { text: rendered.text, typed: rendered.typed, literals })
    }

    /// The template that serves this context, as transformers chooses it.
    fn choose(&self, context: &Map<String, Value>) -> Result<&(String, Template), ChatError> {
        let find = |name: &str| self.templates.iter().find(|template| template.0 == name);
        let with_tools = context.get("tools").is_some_and(|tools| !tools.is_null());
        let fallback = match with_tools && find("tool_use").is_some() {
            true => "tool_use",
            false => DEFAULT,
        };
        let wanted = context.get("chat_template").and_then(Value::as_str).unwrap_or(fallback);
        find(wanted).ok_or_else(|| ChatError::NoTemplate {
            wanted: wanted.into(),
            found: self.templates.iter().map(|template| template.0.clone()).collect(),
        })
    }
}

/// What a template made of a conversation.
#[derive(Clone, Debug)]
pub struct Prompt {
    text: String,
    /// The bytes that came with the conversation, in order.
    typed: Vec<Range<usize>>,
    /// All text that the template may write by itself.
    literals: Arc<str>,
}

impl Prompt {
    /// The prompt's text.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// What follows `beginning`; `None` if the prompt begins otherwise.
    #[must_use]
    pub fn after(&self, beginning: &str) -> Option<Self> {
        let text = self.text.strip_prefix(beginning)?.to_owned();
        let start = beginning.len();
        let ranges = self.typed.iter().filter(|range| range.end > start);
        let typed = ranges.map(|range| range.start.max(start) - start..range.end - start).collect();
        Some(Self { text, typed, literals: Arc::clone(&self.literals) })
    }

    /// The prompt's tokens.
    ///
    /// # Errors
    /// If the library cannot encode.
    pub fn encode(&self, tokenizer: &Tokenizer) -> Result<Vec<u32>, TokenizerError> {
        tokenizer.encode_prompt(&self.text, &self.typed, |name| self.literals.contains(name))
    }
}

/// The error that a failure of the template `name` is.
fn error_of(name: &str, failure: Failure) -> ChatError {
    match failure.kind {
        Kind::Syntax(reason) => {
            ChatError::Syntax { name: name.into(), line: failure.line.unwrap_or(0), reason }
        }
        Kind::Refused(message) => ChatError::Refused { message },
        Kind::Limit(what, most) => ChatError::Limit { name: name.into(), what, most },
        Kind::Failed(reason) => {
            let place = failure.line.map_or(String::new(), |line| format!("line {line}: "));
            ChatError::Render { reason: place + &reason }
        }
    }
}

/// The special tokens that a `tokenizer_config.json` names, as text.
fn special_tokens(config: &Value) -> Map<String, Value> {
    let entries = config.as_object().into_iter().flatten();
    entries
        .filter(|(name, _)| name.ends_with("_token"))
        .filter_map(|(name, token)| {
            let text = token.as_str().or_else(|| token["content"].as_str())?;
            Some((name.clone(), Value::String(text.into())))
        })
        .collect()
}

/// The entry `chat_template`: one template, or a list of `{name, template}`.
fn named_sources(entry: &Value) -> Vec<(String, String)> {
    if let Some(source) = entry.as_str() {
        return vec![(DEFAULT.into(), source.into())];
    }
    let list = entry.as_array().into_iter().flatten();
    list.filter_map(|item| {
        Some((item["name"].as_str()?.to_owned(), item["template"].as_str()?.to_owned()))
    })
    .collect()
}

fn template_files(directory: &Path) -> Result<Vec<(String, String)>, ChatError> {
    let mut sources = Vec::new();
    let own = directory.join("chat_template.jinja");
    if own.is_file() {
        sources.push((DEFAULT.to_owned(), read(&own)?));
    }
    let Ok(entries) = fs::read_dir(directory.join("additional_chat_templates")) else {
        return Ok(sources);
    };
    let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    paths.sort();
    for path in paths.iter().filter(|path| path.extension().is_some_and(|end| end == "jinja")) {
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        sources.push((name, read(path)?));
    }
    Ok(sources)
}

fn read(path: &Path) -> Result<String, ChatError> {
    fs::read_to_string(path)
        .map_err(|error| ChatError::Read { path: path.into(), reason: error.to_string() })
}

fn read_json(path: &Path) -> Result<Option<Value>, ChatError> {
    if !path.is_file() {
        return Ok(None);
    }
    serde_json::from_str(&read(path)?)
        .map(Some)
        .map_err(|error| ChatError::Read { path: path.into(), reason: error.to_string() })
}
