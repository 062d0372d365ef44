//! `lathe eval`: the perplexity of a text, and the divergence from another model.

use std::io::IsTerminal;

use anyhow::Error;
use lathe_engine::eval::{self, Perplexity, Windows};
use lathe_model::OpenOptions;
use lathe_session::{Need, Opened, Options, Session, SessionError, encode_text, text_beginning};
use serde::Serialize;

use super::score::read_text;
use crate::arguments::{EvalArguments, Global};
use crate::find::open;
use crate::output::{bad_input, print, print_json};

/// Tokens of a window if the caller gives no number and the model allows as many.
const CONTEXT: usize = 2048;

#[derive(Serialize)]
struct EvalReport {
    perplexity: f64,
    bits_per_byte: f64,
    /// Tokens that were scored.
    tokens: usize,
    text_tokens: usize,
    text_bytes: usize,
    mean_nll: f64,
    context: usize,
    stride: usize,
    /// The token that each window begins with (`--bos`).
    #[serde(skip_serializing_if = "Option::is_none")]
    bos: Option<u32>,
    kv_format: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    base_kv_format: Option<&'static str>,
    #[serde(flatten)]
    comparison: Option<Comparison>,
}

/// The divergence of the model's distributions from the base's, in nats per token.
#[derive(Serialize)]
struct Comparison {
    kl_mean: f64,
    kl_p99: f64,
    top1_agreement: f64,
    base_perplexity: f64,
}

pub(super) fn run(global: &Global, arguments: &EvalArguments) -> Result<(), Error> {
    let text = read_text(&arguments.text)?;
    let opened = open(&arguments.model, &global.open_options())?;
    let tokens = encode_text(opened.tokenizer()?, &text)?;
    let base_adapter = arguments.base_adapter.clone().unwrap_or_default();
    let base_open = OpenOptions { adapter: base_adapter, ..global.open_options() };
    let open_base = |base| open(base, &base_open);
    let base = arguments.base.as_deref().map(open_base).transpose()?;
    if let Some(base) = &base {
        check_base(base, &tokens, &text)?;
    }
    let models = [Some(&opened), base.as_ref()].into_iter().flatten();
    let limit = models.map(|opened| opened.model.spec.context_max).min().expect("a model");
    let context = arguments.context.unwrap_or(CONTEXT.min(limit));
    if context > limit {
        let message = format!("--context is {context}, the model's own is {limit}");
        return Err(bad_input(message));
    }
    let beginning = text_beginning(opened.tokenizer()?, arguments.bos.into())?;
    let added = usize::from(beginning.is_some());
    let stride = arguments.stride.unwrap_or(context.saturating_sub(added));
    let windows = Windows { context, stride, beginning };
    let longest = context.clamp(1, (tokens.len() + added).max(1));
    let need = Need { context: longest, sequences: 1, rows_max: None };
    let options = global.options();
    let mut session = opened.over(arguments.parallel.ranks()).prepare(&options, need)?;
    let base_format = arguments.base_kv_format.or(global.kv_format);
    let base_options = Options { kv_format: base_format, ..options };
    let mut base = base.map(|base| base.prepare(&base_options, need)).transpose()?;

    let mut progress = progress();
    let (perplexity, comparison) = match &mut base {
        None => {
            let executor = &mut *session.executor;
            let found = eval::perplexity(executor, &tokens, windows, &mut progress);
            (found.map_err(|error| session.blame(error))?, None)
        }
        Some(base) => {
            let executors = (&mut *session.executor, &mut *base.executor);
            let found = eval::compare(executors.0, executors.1, &tokens, windows, &mut progress);
            let found = found.map_err(|error| match session.blame(error) {
                // The base may be the one.
                SessionError::Score(error) => base.blame(error),
                found => found,
            })?;
            let comparison = Comparison {
                kl_mean: found.kl_mean,
                kl_p99: found.kl_p99,
                top1_agreement: found.top1_agreement,
                base_perplexity: found.base.perplexity(),
            };
            (found.model, Some(comparison))
        }
    };
    let name = |session: &Session| session.executor.kv_format().name();
    let formats = (name(&session), base.as_ref().map(name));
    let report = report(perplexity, &tokens, &text, windows, comparison, formats);
    if global.json { print_json(&report) } else { print(&describe(&report)) }
}

/// Checks that the base has the same tokens for the text. A divergence needs distributions over the
/// same tokens.
fn check_base(base: &Opened, tokens: &[u32], text: &str) -> Result<(), Error> {
    let found = encode_text(base.tokenizer()?, text)?;
    if found != tokens {
        return Err(bad_input(format!(
            "--base makes {} other tokens of the text than the model, which makes {}",
            found.len(),
            tokens.len()
        )));
    }
    Ok(())
}

/// Reports progress on stderr: all the time on a terminal, elsewhere once for each tenth.
fn progress() -> impl FnMut(usize, usize) {
    let terminal = std::io::stderr().is_terminal();
    let mut tenths = 0;
    move |scored, tokens| {
        let now = scored * 10 / tokens.max(1);
        if terminal {
            let end = if scored + 1 >= tokens { "\n" } else { "" };
            crate::say::part(format_args!("\r{scored} of {tokens} tokens{end}"));
        } else if now > tenths {
            say!("{scored} of {tokens} tokens");
        }
        tenths = now;
    }
}

fn report(
    perplexity: Perplexity,
    tokens: &[u32],
    text: &str,
    windows: Windows,
    comparison: Option<Comparison>,
    (kv_format, base_kv_format): (&'static str, Option<&'static str>),
) -> EvalReport {
    EvalReport {
        perplexity: perplexity.perplexity(),
        bits_per_byte: perplexity.bits_per_byte(tokens.len(), text.len()),
        tokens: perplexity.tokens,
        text_tokens: tokens.len(),
        text_bytes: text.len(),
        mean_nll: perplexity.nll / perplexity.tokens as f64,
        context: windows.context,
        stride: windows.stride,
        bos: windows.beginning,
        kv_format,
        base_kv_format,
        comparison,
    }
}

fn describe(report: &EvalReport) -> String {
    let mut text = format!(
        "perplexity {:.4}, {:.4} bits a byte, {} of {} tokens scored in windows of {}",
        report.perplexity, report.bits_per_byte, report.tokens, report.text_tokens, report.context
    );
    if let Some(bos) = report.bos {
        text.push_str(&format!(" that begin with token {bos} (--bos)"));
    }
    text.push('\n');
    if let Some(comparison) = &report.comparison {
        text.push_str(&format!(
            "against the base (perplexity {:.4}): KL {:.5} nats a token, {:.5} at the 99th \
             percentile, same first choice {:.2} %\n",
            comparison.base_perplexity,
            comparison.kl_mean,
            comparison.kl_p99,
            comparison.top1_agreement * 100.0
        ));
    }
    text
}
