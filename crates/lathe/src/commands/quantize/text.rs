//! Reads the text of a calibration.

use std::path::Path;

use anyhow::Error;
use lathe_model::chat::Message;
use lathe_quant::recipe::Recipe;
use lathe_session::{Opened, encode_text, template_of, text_beginning};
use serde_json::Value;

use super::super::score::read_text;
use super::WINDOW;
use crate::arguments::{BosChoice, QuantizeArguments};
use crate::output::{InputContext, bad_input};

/// With fewer tokens a calibration tells little about the layers' inputs.
const TOKENS_WANTED: usize = 4096;

/// The text that calibration runs.
pub(super) struct Text {
    pub(super) calibration: Vec<u32>,
    /// The tokens after it, on which errors are measured.
    pub(super) explain: Vec<u32>,
}

/// The text of the calibration, if the recipe needs one.
pub(super) fn read_tokens(
    arguments: &QuantizeArguments,
    opened: &Opened,
    recipe: &Recipe,
) -> Result<Option<Text>, Error> {
    let path = match &arguments.calibration {
        Some(path) => path,
        None if recipe.needs_calibration() => {
            return Err(bad_input("this recipe needs --calibration FILE (a text or token ids)"));
        }
        None => return Ok(None),
    };
    let (mut calibration, beginning) = tokens_of(path, opened, arguments.bos)?;
    let held_out = if arguments.explain { arguments.explain_tokens } else { 0 };
    if arguments.explain && held_out < 2 {
        return Err(bad_input(format!("--explain-tokens is {held_out}, expected at least 2")));
    }
    let Some(most) = calibration.len().checked_sub(held_out).filter(|most| *most > 0) else {
        return Err(bad_input(format!(
            "{}: {} tokens, expected more than --explain-tokens {held_out}, which are not \
             calibrated with",
            path.display(),
            calibration.len()
        )));
    };
    let explain = calibration.split_off(most.min(arguments.calibration_tokens));
    if calibration.len() < TOKENS_WANTED {
        say!(
            "warning: {} tokens of calibration; fewer than {TOKENS_WANTED} say little of what \
             layers read",
            calibration.len()
        );
    }
    let mut explain = explain[..held_out].to_vec();
    if let Some(bos) = beginning {
        let window = WINDOW.min(opened.model.spec.context_max);
        calibration = begin_windows(&calibration, bos, window);
        explain = begin_windows(&explain, bos, window);
        say!("note: each window of {} begins with token {bos} (--bos)", path.display());
    }
    Ok(Some(Text { calibration, explain }))
}

/// Puts `bos` before the tokens of each window. A window has `window` tokens with it.
fn begin_windows(tokens: &[u32], bos: u32, window: usize) -> Vec<u32> {
    let mut all = Vec::with_capacity(tokens.len() + tokens.len() / window.max(2) + 1);
    let mut rest = tokens;
    while let Some(first) = rest.first() {
        let begins = *first == bos;
        let (own, after) = rest.split_at(rest.len().min((window - usize::from(!begins)).max(1)));
        all.extend((!begins).then_some(bos));
        all.extend(own);
        rest = after;
    }
    all
}

/// The tokens of a file: an array of ids, one record on each line, or plain text. Also returns the
/// token that windows of a text begin with. Given ids are not changed.
fn tokens_of(
    path: &Path,
    opened: &Opened,
    bos: BosChoice,
) -> Result<(Vec<u32>, Option<u32>), Error> {
    let text = read_text(path)?;
    let beginning = || Ok::<_, Error>(text_beginning(opened.tokenizer()?, bos.into())?);
    if path.extension().is_some_and(|kind| kind.eq_ignore_ascii_case("jsonl")) {
        let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
        let mut tokens = Vec::new();
        for (index, line) in lines {
            let record = serde_json::from_str(line);
            let record =
                record.map_err(Error::from).and_then(|it: Value| tokens_of_record(&it, opened));
            tokens.extend(record.bad_input_in(format!("{}:{}", path.display(), index + 1))?);
        }
        return Ok((tokens, beginning()?));
    }
    if text.trim_start().starts_with('[') {
        return Ok((serde_json::from_str(&text).bad_input_in(path.display())?, None));
    }
    Ok((encode_text(opened.tokenizer()?, &text)?, beginning()?))
}

/// The tokens of one record: its `text`, or its `messages` in the model's template.
fn tokens_of_record(record: &Value, opened: &Opened) -> Result<Vec<u32>, Error> {
    let tokenizer = opened.tokenizer()?;
    if let Some(text) = record.get("text").and_then(Value::as_str) {
        return Ok(encode_text(tokenizer, text)?);
    }
    if let Some(messages) = record.get("messages").filter(|it| it.is_array()) {
        let messages: Vec<Message> = serde_json::from_value(messages.clone())?;
        let template = template_of(&opened.model)?;
        return Ok(template.encode(tokenizer, &messages, false, Value::Null)?);
    }
    let found = match record.as_object() {
        Some(fields) => {
            let keys: Vec<&str> = fields.keys().map(String::as_str).collect();
            format!("the fields {}", keys.join(", "))
        }
        None => "no object".to_owned(),
    };
    Err(bad_input(format!("{found}, expected `text`, a string, or `messages`, a list")))
}

#[cfg(test)]
mod tests {
    use super::begin_windows;

    #[test]
    fn each_window_begins_with_the_token_once() {
        let all = begin_windows(&[5, 6, 7, 8, 9], 1, 3);
        assert_eq!(all, [1, 5, 6, 1, 7, 8, 1, 9]);
        // A text that already begins with the token keeps it.
        assert_eq!(begin_windows(&[1, 5, 6, 7], 1, 3), [1, 5, 6, 1, 7]);
        assert_eq!(begin_windows(&[5, 6], 1, 1), [1, 5, 1, 6]);
        assert!(begin_windows(&[], 1, 8).is_empty());
    }
}
