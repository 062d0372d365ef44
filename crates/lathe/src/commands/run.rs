//! `lathe run`: answers one prompt, streams the answer, and prints one line of statistics.

use std::io::{IsTerminal, Read};
use std::time::Instant;

use anyhow::{Context, Error};
use lathe_engine::{FinishReason, Request, Stats};
use lathe_model::Model;
use lathe_session::{
    Generation, Need, Startup, decoder, encode_chat, encode_raw, generate, human_bytes, memory,
    milliseconds, question,
};
use serde::Serialize;

use crate::arguments::{Global, RunArguments, parse_ids};
use crate::find::{draft_choice, open, open_drafter};
use crate::interrupt::{Insist, Interrupts};
use crate::output::{InputContext, Interrupted, bad_input, print, print_json};

#[derive(Serialize)]
struct RunReport<'a> {
    text: &'a str,
    token_ids: &'a [u32],
    prompt_tokens: usize,
    generated_tokens: usize,
    finish_reason: &'a str,
    ttft_ms: f64,
    decode_tokens_per_s: Option<f64>,
    load_ms: f64,
    drafted: u64,
    accepted: u64,
    seed: u64,
    kv_bytes: usize,
    peak_memory_bytes: Option<u64>,
    startup: Startup,
}

/// Answers the prompt. The process began at `started`.
pub(super) fn run(
    global: &Global,
    arguments: &RunArguments,
    started: Instant,
) -> Result<(), Error> {
    let drafts = draft_choice(&arguments.drafts)?;
    if !drafts.sources.is_empty() && arguments.no_kv_cache {
        return Err(bad_input("--draft needs the KV cache, and --no-kv-cache leaves it out"));
    }
    let typed = read_prompt(arguments)?;
    let interrupts = Interrupts::install(Insist::Ends)?;
    let opened = open(&arguments.model, &global.open_options_for(arguments.context))?;
    let prompt = encode(arguments, &opened.model, &typed)?;
    let choice = arguments.sampling.choice()?;
    let own = &opened.model.generation;
    choice.validate(own, opened.model.spec.vocabulary).map_err(bad_input)?;
    let request = choice.request(prompt, own);
    let seed = request.sampling.seed;
    let need = need(&opened.model, &request)?;
    let drafter = open_drafter(&drafts, &opened.model, &global.options(), need)?;
    let opened = opened.tapped(drafter.as_ref().and_then(|drafter| drafter.taps()));
    let session = opened.over(arguments.parallel.ranks()).prepare(&global.options(), need)?;
    let (load_ms, mut startup) = (session.load_ms, session.startup);
    let (mut engine, model) = session.into_engine(!arguments.no_kv_cache, 1)?;
    if let Some(drafter) = drafter {
        engine = drafter.attach(engine);
    }

    let working = interrupts.begin();
    let decoder = model.tokenizer.as_ref().map(decoder);
    let before_ms = milliseconds(started);
    let show = |text: &str| if global.json { Ok(()) } else { print(text) };
    let generation = generate(&mut engine, request, decoder, || working.stopped(), show)?;
    startup.first_token(before_ms, generation.ttft_ms);
    let kv_bytes = engine.executor().kv_bytes();
    let stats = engine.stats();
    if global.json {
        print_json(&RunReport {
            text: &generation.text,
            token_ids: &generation.tokens,
            prompt_tokens: generation.prompt_tokens,
            generated_tokens: generation.tokens.len(),
            finish_reason: generation.reason_name(),
            ttft_ms: generation.ttft_ms,
            decode_tokens_per_s: generation.decode_tokens_per_s(),
            load_ms,
            drafted: stats.drafted_tokens,
            accepted: stats.accepted_tokens,
            seed,
            kv_bytes,
            peak_memory_bytes: memory::peak_bytes(),
            startup,
        })?;
    } else {
        print_ids_without_text(&model, &generation)?;
        say!("{}", summary(&generation, &stats, load_ms, kv_bytes));
    }
    match generation.reason {
        FinishReason::Cancelled => Err(Interrupted.into()),
        FinishReason::InvalidLogits => {
            anyhow::bail!("the model gave no number for any token: its weights are damaged")
        }
        FinishReason::Stop | FinishReason::Length => Ok(()),
    }
}

/// The prompt: ids, or a text from the command line or stdin.
enum Typed {
    Ids(Vec<u32>),
    Text(String),
}

fn read_prompt(arguments: &RunArguments) -> Result<Typed, Error> {
    if let Some(ids) = &arguments.prompt_ids {
        return Ok(Typed::Ids(parse_ids(ids)?));
    }
    if let Some(text) = &arguments.prompt {
        return not_empty(text.clone());
    }
    let mut stdin = std::io::stdin();
    if stdin.is_terminal() {
        say!("type the prompt, then Ctrl-D");
    }
    let mut bytes = Vec::new();
    stdin.read_to_end(&mut bytes).context("stdin")?;
    let text = String::from_utf8(bytes).bad_input_in("the prompt on stdin is not UTF-8")?;
    // The newline that `echo` adds is not part of the prompt.
    not_empty(text.strip_suffix('\n').unwrap_or(&text).to_owned())
}

fn not_empty(text: String) -> Result<Typed, Error> {
    if text.trim().is_empty() {
        return Err(bad_input(
            "no prompt: give one as an argument, with --prompt-ids, or on stdin",
        ));
    }
    Ok(Typed::Text(text))
}

fn encode(arguments: &RunArguments, model: &Model, typed: &Typed) -> Result<Vec<u32>, Error> {
    match typed {
        Typed::Ids(ids) => Ok(ids.clone()),
        Typed::Text(text) if arguments.raw => Ok(encode_raw(model, text)?),
        Typed::Text(text) if has_no_template(model) && arguments.system.is_none() => {
            say!("note: {} has no chat template, so it continues the text itself", model.name);
            Ok(encode_raw(model, text)?)
        }
        Typed::Text(text) => Ok(encode_chat(model, &question(arguments.system.as_deref(), text))?),
    }
}

/// Whether the model has no chat template, like base models. A broken template does not count.
fn has_no_template(model: &Model) -> bool {
    model.chat_template.is_none() && model.text_problem.is_none()
}

/// A cache that just holds prompt and answer.
fn need(model: &Model, request: &Request) -> Result<Need, Error> {
    let (tokens, limit) = (request.prompt.len(), model.spec.context_max);
    if tokens == 0 {
        return Err(bad_input("the prompt is empty"));
    }
    if tokens >= limit {
        return Err(bad_input(format!(
            "the prompt has {tokens} tokens, the model's context holds {limit} with the answer"
        )));
    }
    let context = tokens.saturating_add(request.max_tokens.unwrap_or(0)).min(limit);
    Ok(Need { context, sequences: 1, rows_max: None })
}

/// Without a tokenizer there is no text to stream, so the ids are printed.
fn print_ids_without_text(model: &Model, generation: &Generation) -> Result<(), Error> {
    if model.tokenizer.is_some() {
        return if generation.text.ends_with('\n') { Ok(()) } else { print("\n") };
    }
    let ids: Vec<String> = generation.tokens.iter().map(u32::to_string).collect();
    print(&format!("{}\n", ids.join(",")))
}

fn summary(generation: &Generation, stats: &Stats, load_ms: f64, kv_bytes: usize) -> String {
    let speed = generation
        .decode_tokens_per_s()
        .map_or(String::new(), |speed| format!(", {speed:.1} tokens/s"));
    let memory = memory::peak_bytes()
        .map_or(String::new(), |bytes| format!(", {} memory", human_bytes(bytes)));
    let drafts = match stats.drafted_tokens {
        0 => String::new(),
        drafted => format!(
            ", {} of {drafted} drafted tokens accepted, {:.2} tokens a step",
            stats.accepted_tokens,
            generation.tokens.len() as f64
                / (generation.tokens.len() as u64 - stats.accepted_tokens).max(1) as f64
        ),
    };
    format!(
        "[{} prompt tokens, first token after {:.0} ms, {} tokens{speed}{drafts}{memory} (KV cache {}), \
         loaded in {load_ms:.0} ms, {}]",
        generation.prompt_tokens,
        generation.ttft_ms,
        generation.tokens.len(),
        human_bytes(kv_bytes as u64),
        generation.reason_name(),
    )
}
