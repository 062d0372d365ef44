//! `lathe chat`: a conversation with its history in the KV cache.

use std::fs::File;
use std::io::{self, BufRead, IsTerminal, Write};

use anyhow::{Context, Error};
use lathe_engine::{Engine, FinishReason, Request, Sampling};
use lathe_model::Model;
use lathe_model::chat::Message;
use lathe_session::{
    Conversation, Generation, Need, SamplingChoice, context_that_fits, decoder, generate,
    human_bytes, memory, template_of,
};
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;
use serde::Serialize;

use crate::arguments::{ChatArguments, Global};
use crate::find::{draft_choice, open, open_drafter};
use crate::interrupt::{Insist, Interrupts};
use crate::output::{bad_input, is_broken_pipe, one_line, print, print_json};

/// The most tokens of an answer if the caller gives no number.
const MAX_TOKENS: usize = 1024;
const HELP: &str = "\
/help            this list
/clear           forget the conversation
/system [TEXT]   set the system message and begin anew; without TEXT, none
/stats           tokens, speed, cache and memory
/save FILE       write the conversation as JSON; FILE must not exist
/exit            leave (also /quit, or Ctrl-D)
A line that ends with \\ goes on in the next. Ctrl-C stops an answer.";

/// The times and counts of a turn.
#[derive(Debug, Clone, Copy, Serialize)]
struct Turn {
    prompt_tokens: usize,
    /// Prompt tokens that the cache already held.
    reused_tokens: usize,
    generated_tokens: usize,
    finish_reason: &'static str,
    ttft_ms: f64,
    decode_tokens_per_s: Option<f64>,
}

#[derive(Serialize)]
struct ChatReport {
    messages: Vec<Message>,
    turns: Vec<Turn>,
    load_ms: f64,
    context: usize,
    kv_bytes: usize,
}

struct Chat {
    engine: Engine,
    model: Model,
    conversation: Conversation,
    choice: SamplingChoice,
    sampling: Sampling,
    interrupts: Interrupts,
    context: usize,
    turns: Vec<Turn>,
    json: bool,
}

/// Answers messages until the input ends.
pub(super) fn run(global: &Global, arguments: &ChatArguments) -> Result<(), Error> {
    let drafts = draft_choice(&arguments.drafts)?;
    let interrupts = Interrupts::install(Insist::Ignored)?;
    let opened = open(&arguments.model, &global.open_options_for(arguments.context))?;
    template_of(&opened.model)?;
    let choice = arguments.sampling.choice()?;
    let (own, vocabulary) = (&opened.model.generation, opened.model.spec.vocabulary);
    choice.validate(own, vocabulary).map_err(bad_input)?;
    // The whole conversation has one seed.
    let sampling = choice.sampling(own);
    let (options, ranks) = (global.options(), arguments.parallel.ranks());
    let context = match arguments.context {
        Some(context) => context,
        None => context_that_fits(&opened.model, &options, ranks)?,
    };
    let need = Need { context, sequences: 1, rows_max: None };
    let drafter = open_drafter(&drafts, &opened.model, &options, need)?;
    let opened = opened.tapped(drafter.as_ref().and_then(|drafter| drafter.taps()));
    let session = opened.over(ranks).prepare(&options, need)?;
    let load_ms = session.load_ms;
    let (mut engine, model) = session.into_engine(true, 1)?;
    if let Some(drafter) = drafter {
        engine = drafter.attach(engine);
    }
    let kv_bytes = engine.executor().kv_bytes();
    say!(
        "{}: {context} tokens of context, KV cache up to {}; /help for help",
        model.name,
        human_bytes(kv_bytes as u64)
    );
    let conversation = Conversation::new(arguments.system.clone());
    let turns = Vec::new();
    let json = global.json;
    let mut chat =
        Chat { engine, model, conversation, choice, sampling, interrupts, context, turns, json };
    chat.talk()?;
    if !json {
        return Ok(());
    }
    let messages = chat.conversation.messages();
    print_json(&ChatReport { messages, turns: chat.turns, load_ms, context, kv_bytes })
}

/// The source of lines: an editor on a terminal, plain lines otherwise.
enum Input {
    Editor(Box<DefaultEditor>),
    Lines(io::Lines<io::StdinLock<'static>>),
}

impl Input {
    fn open() -> Result<Self, Error> {
        if io::stdin().is_terminal() {
            Ok(Self::Editor(Box::new(DefaultEditor::new().context("the terminal")?)))
        } else {
            Ok(Self::Lines(io::stdin().lock().lines()))
        }
    }

    /// The next message. Lines that end with a backslash continue on the next line. `None` at the
    /// end.
    fn next(&mut self) -> Result<Option<String>, Error> {
        let mut message = String::new();
        loop {
            let prompt = if message.is_empty() { "> " } else { ". " };
            let Some(line) = self.line(prompt)? else {
                return Ok(Some(message).filter(|message| !message.is_empty()));
            };
            match line.strip_suffix('\\') {
                Some(head) => message.push_str(&format!("{head}\n")),
                None => return Ok(Some(message + &line)),
            }
        }
    }

    fn line(&mut self, prompt: &str) -> Result<Option<String>, Error> {
        match self {
            Self::Lines(lines) => lines.next().transpose().context("stdin"),
            Self::Editor(editor) => loop {
                match editor.readline(prompt) {
                    Ok(line) => {
                        let _ = editor.add_history_entry(&line);
                        return Ok(Some(line));
                    }
                    Err(ReadlineError::Interrupted) => say!("(/exit or Ctrl-D leaves)"),
                    Err(ReadlineError::Eof) => return Ok(None),
                    Err(error) => return Err(error).context("the terminal"),
                }
            },
        }
    }
}

impl Chat {
    fn talk(&mut self) -> Result<(), Error> {
        let mut input = Input::open()?;
        while let Some(line) = input.next()? {
            let line = line.trim();
            let outcome = match line.strip_prefix('/') {
                Some("exit" | "quit") => return Ok(()),
                Some(command) => self.obey(command),
                None if line.is_empty() => Ok(()),
                None => self.turn(line),
            };
            // If a message cannot be answered, the turn ends and the conversation continues. If the
            // device fails or stdout has no reader, both end.
            match outcome {
                Err(error) if is_broken_pipe(&error) || crate::output::exit_code(&error) != 2 => {
                    return Err(error);
                }
                Err(error) => say!("error: {}", one_line(&error)),
                Ok(()) => {}
            }
        }
        Ok(())
    }

    fn obey(&mut self, command: &str) -> Result<(), Error> {
        let (name, rest) = command.split_once(char::is_whitespace).unwrap_or((command, ""));
        let rest = rest.trim();
        match (name, rest) {
            ("help", "") => say!("{HELP}"),
            ("clear", "") => self.conversation.clear(),
            ("system", "") => self.conversation.set_system(None),
            ("system", text) => self.conversation.set_system(Some(text.to_owned())),
            ("stats", "") => say!("{}", self.stats()),
            ("save", "") => return Err(bad_input("/save needs a file name")),
            ("save", file) => self.save(file)?,
            _ => return Err(bad_input(format!("/{command}: no such command; /help lists them"))),
        }
        Ok(())
    }

    fn save(&self, file: &str) -> Result<(), Error> {
        let mut out = File::create_new(file).map_err(|e| bad_input(format!("{file}: {e}")))?;
        let text = serde_json::to_string_pretty(&self.conversation.messages())?;
        out.write_all(text.as_bytes()).with_context(|| file.to_owned())?;
        say!("saved {} messages to {file}", self.conversation.messages().len());
        Ok(())
    }

    fn turn(&mut self, text: &str) -> Result<(), Error> {
        let own = self.model.generation.max_new_tokens;
        let answer_tokens = self.choice.max_tokens.or(own).unwrap_or(MAX_TOKENS);
        let prompt = self.conversation.ask(&self.model, text, self.context, answer_tokens)?;
        if prompt.dropped > 0 {
            say!("note: the oldest {} messages no longer fit the context", prompt.dropped);
        }
        let room = self.context - prompt.ids.len();
        let request = self.request(prompt.ids.clone(), answer_tokens.min(room));
        let decoder = self.model.tokenizer.as_ref().map(decoder);
        let working = self.interrupts.begin();
        let json = self.json;
        let show = |text: &str| if json { Ok(()) } else { print(text) };
        let generated = generate(&mut self.engine, request, decoder, || working.stopped(), show);
        drop(working);
        let generation = match generated {
            Ok(generation) => generation,
            Err(error) => {
                self.conversation.answer(prompt, "", &[]);
                return Err(error);
            }
        };
        if !json {
            print("\n")?;
        }
        self.note_end(&generation);
        let stop = |token: &&u32| self.model.generation.stop_tokens.contains(token);
        let ended = generation.reason == FinishReason::Stop
            && generation.tokens.last().filter(stop).is_some();
        let kept = generation.tokens.len() - usize::from(ended);
        self.conversation.answer(prompt, &generation.text, &generation.tokens[..kept]);
        self.turns.push(Turn {
            prompt_tokens: generation.prompt_tokens,
            reused_tokens: generation.cached_tokens,
            generated_tokens: generation.tokens.len(),
            finish_reason: generation.reason_name(),
            ttft_ms: generation.ttft_ms,
            decode_tokens_per_s: generation.decode_tokens_per_s(),
        });
        Ok(())
    }

    fn request(&self, prompt: Vec<u32>, max_tokens: usize) -> Request {
        Request {
            sampling: self.sampling,
            max_tokens: Some(max_tokens),
            ..self.choice.request(prompt, &self.model.generation)
        }
    }

    fn note_end(&self, generation: &Generation) {
        match generation.reason {
            FinishReason::Stop => {}
            FinishReason::Length => say!("[stopped at {} tokens]", generation.tokens.len()),
            FinishReason::Cancelled => say!("[stopped]"),
            FinishReason::InvalidLogits => say!("[the model gave no number for any token]"),
        }
    }

    fn stats(&self) -> String {
        let stats = self.engine.stats();
        let mut text = format!(
            "{} messages, {} turns; cache: {} of {} blocks hold text; prefix reuse {:.1} % of prompt tokens",
            self.conversation.turns(),
            self.turns.len(),
            stats.blocks_used + stats.blocks_idle,
            stats.blocks_total,
            stats.prefix_hit_rate() * 100.0,
        );
        if let Some(turn) = self.turns.last() {
            let speed = turn.decode_tokens_per_s.unwrap_or(0.0);
            text.push_str(&format!(
                "\nlast turn: {} prompt tokens, {} of them reused, first token after {:.0} ms, {} \
                 tokens, {speed:.1} tokens/s",
                turn.prompt_tokens, turn.reused_tokens, turn.ttft_ms, turn.generated_tokens
            ));
        }
        if let Some(system) = self.conversation.system() {
            text.push_str(&format!("\nsystem message: {system}"));
        }
        let memory = memory::peak_bytes().map(human_bytes).unwrap_or_else(|| "unknown".into());
        text.push_str(&format!("\nmemory: {memory} at most"));
        text
    }
}
