//! `lathe score`: the log-probability of each token of a text, given those before it.

use std::fs;
use std::path::Path;

use anyhow::Error;
use lathe_engine::score::score;
use lathe_session::{Need, Opened, encode_text, text_beginning};
use serde::Serialize;

use crate::arguments::{Global, ScoreArguments};
use crate::find::open;
use crate::output::{InputContext, bad_input, print, print_json};

#[derive(Serialize)]
struct ScoreReport<'a> {
    tokens: &'a [u32],
    /// The token that was put before the text (`--bos`).
    #[serde(skip_serializing_if = "Option::is_none")]
    bos: Option<u32>,
    /// The natural logarithm for each token but the first.
    logprobs: &'a [f64],
    mean_nll: f64,
    top: Top,
}

#[derive(Serialize)]
struct Top {
    ids: Vec<u32>,
    logits: Vec<f32>,
}

pub(super) fn run(global: &Global, arguments: &ScoreArguments) -> Result<(), Error> {
    let opened = open(&arguments.model, &global.open_options_for(arguments.context))?;
    let (tokens, bos) = read_tokens(arguments, &opened)?;
    if tokens.len() < 2 {
        let message = format!("{} tokens to score, expected at least 2", tokens.len());
        return Err(bad_input(message));
    }
    let need = Need { context: tokens.len(), sequences: 1, rows_max: None };
    let mut session = opened.over(arguments.parallel.ranks()).prepare(&global.options(), need)?;
    let scored = score(&mut *session.executor, &tokens, arguments.top_k);
    let scored = scored.map_err(|error| session.blame(error))?;
    let (ids, logits) = scored.top.iter().copied().unzip();
    if global.json {
        return print_json(&ScoreReport {
            tokens: &tokens,
            bos,
            logprobs: &scored.logprobs,
            mean_nll: scored.mean_nll(),
            top: Top { ids, logits },
        });
    }
    let mut text = bos.map_or(String::new(), |bos| format!("begins with token {bos} (--bos)\n"));
    for (position, (token, logprob)) in tokens[1..].iter().zip(&scored.logprobs).enumerate() {
        let piece = session.model.tokenizer.as_ref().and_then(|t| t.token_bytes(*token));
        let piece = piece.unwrap_or_default();
        let piece = String::from_utf8_lossy(&piece);
        text.push_str(&format!("{:>6} {token:>7} {logprob:>9.4} {piece:?}\n", position + 1));
    }
    text.push_str(&format!(
        "mean negative log-probability {:.6} nats a token, perplexity {:.4}\n",
        scored.mean_nll(),
        scored.mean_nll().exp()
    ));
    print(&text)
}

/// The tokens to score, and the token before the text. Given token ids are not changed.
fn read_tokens(
    arguments: &ScoreArguments,
    opened: &Opened,
) -> Result<(Vec<u32>, Option<u32>), Error> {
    if let Some(path) = &arguments.tokens {
        let text = read_text(path)?;
        let tokens = serde_json::from_str(&text)
            .bad_input_in(format!("{}: expected a JSON array of token ids", path.display()))?;
        return Ok((tokens, None));
    }
    let path = arguments.text.as_deref().expect("one of the two is required");
    let tokenizer = opened.tokenizer()?;
    let mut tokens = encode_text(tokenizer, &read_text(path)?)?;
    let bos = text_beginning(tokenizer, arguments.bos.into())?;
    let bos = bos.filter(|bos| tokens.first() != Some(bos));
    tokens.splice(0..0, bos);
    Ok((tokens, bos))
}

/// The text of a file that the caller named.
pub(super) fn read_text(path: &Path) -> Result<String, Error> {
    let bytes = fs::read(path).bad_input_in(path.display())?;
    String::from_utf8(bytes).bad_input_in(path.display())
}
