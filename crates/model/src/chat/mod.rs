//! Conversations to prompts, by the Jinja template that comes with a model.
//!
//! Rendering follows Hugging Face transformers (`apply_chat_template`): the same whitespace rules,
//! globals (`raise_exception`, `strftime_now`), JSON spelling and Python methods, so that the
//! prompt is byte for byte the one that the model was trained on. A template is code from a
//! checkpoint: it runs with bounded fuel and sees nothing but the conversation.

mod clock;
mod python;

use std::fs;
use std::path::{Path, PathBuf};

use minijinja::syntax::SyntaxConfig;
use minijinja::{AutoEscape, Environment, UndefinedBehavior, Value as Jinja};
use serde_json::{Map, Value, json};

use crate::tokenizer::{Tokenizer, TokenizerError};

/// Instructions that one rendering may execute: a hundred times what long conversations need.
const FUEL: u64 = 50_000_000;

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
    environment: Environment<'static>,
    names: Vec<String>,
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
        let names: Vec<String> = sources.iter().map(|source| source.0.clone()).collect();
        if names.is_empty() {
            return Err(ChatError::NoTemplate { wanted: DEFAULT.into(), found: names });
        }
        let mut environment = environment()?;
        for (name, source) in sources {
            let source = python::without_generation_tags(&source).into_owned();
            environment.add_template_owned(name.clone(), source).map_err(|error| {
                let reason = error.detail().map_or_else(|| error.to_string(), str::to_owned);
                ChatError::Syntax { name, line: error.line().unwrap_or(0), reason }
            })?;
        }
        Ok(Self { environment, names, special_tokens })
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
        let messages = serde_json::to_value(messages)
            .map_err(|error| ChatError::Render { reason: error.to_string() })?;
        self.render_values(messages, add_generation_prompt, extra)
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
        mut extra: Value,
    ) -> Result<Vec<u32>, ChatError> {
        let mut messages = serde_json::to_value(messages)
            .map_err(|error| ChatError::Render { reason: error.to_string() })?;
        protect(&mut messages, tokenizer);
        protect(&mut extra, tokenizer);
        let prompt = self.render_values(messages, add_generation_prompt, extra)?;
        Ok(tokenizer.encode_rendered(&prompt)?)
    }

    fn render_values(
        &self,
        messages: Value,
        add_generation_prompt: bool,
        extra: Value,
    ) -> Result<String, ChatError> {
        let mut context = self.special_tokens.clone();
        // Both are always defined in transformers, if only as None.
        context.insert("tools".into(), Value::Null);
        context.insert("documents".into(), Value::Null);
        context.insert("messages".into(), messages);
        context.insert("add_generation_prompt".into(), json!(add_generation_prompt));
        if let Value::Object(extra) = extra {
            context.extend(extra);
        }
        let name = self.choose(&context)?;
        let context: Jinja = python::to_jinja(&Value::Object(context));
        let template = self.environment.get_template(&name).map_err(render_error)?;
        template.render(context).map_err(render_error)
    }

    /// The template that serves this context, as transformers chooses it.
    fn choose(&self, context: &Map<String, Value>) -> Result<String, ChatError> {
        let has = |name: &str| self.names.iter().any(|known| known == name);
        let with_tools = !context["tools"].is_null() && has("tool_use");
        let fallback = if with_tools { "tool_use" } else { DEFAULT };
        let wanted = context.get("chat_template").and_then(Value::as_str).unwrap_or(fallback);
        if has(wanted) {
            Ok(wanted.to_owned())
        } else {
            Err(ChatError::NoTemplate { wanted: wanted.into(), found: self.names.clone() })
        }
    }
}

fn environment() -> Result<Environment<'static>, ChatError> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.map_err(render_error)?);
    environment.set_undefined_behavior(UndefinedBehavior::Lenient);
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_fuel(Some(FUEL));
    python::install(&mut environment);
    Ok(environment)
}

fn render_error(error: minijinja::Error) -> ChatError {
    let mut source: Option<&(dyn std::error::Error + 'static)> = Some(&error);
    while let Some(current) = source {
        if let Some(python::Refusal(message)) = current.downcast_ref() {
            return ChatError::Refused { message: message.clone() };
        }
        source = current.source();
    }
    ChatError::Render { reason: error.to_string() }
}

/// Protects every string inside `value` (see [`Tokenizer::protect`]).
fn protect(value: &mut Value, tokenizer: &Tokenizer) {
    match value {
        Value::String(text) => {
            if let Some(protected) = tokenizer.protect(text) {
                *text = protected;
            }
        }
        Value::Array(items) => items.iter_mut().for_each(|item| protect(item, tokenizer)),
        Value::Object(fields) => fields.values_mut().for_each(|item| protect(item, tokenizer)),
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
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
