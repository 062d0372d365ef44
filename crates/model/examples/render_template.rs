//! Renders chat templates: one JSON object a line on standard input, with `source` and `context`,
//! gives one a line on standard output, with `text` or `error`. `tests/peers/templates.py` compares
//! what comes out with Jinja under Python.

use std::io::{self, BufRead as _, Write as _};

use lathe_model::chat::{ChatTemplate, Message};
use serde_json::{Map, Value, json};

fn render(case: &Value) -> Result<String, String> {
    let source = case["source"].as_str().unwrap_or_default();
    let mut context = case["context"].as_object().cloned().unwrap_or_default();
    let mut special = Map::new();
    for name in ["bos_token", "eos_token"] {
        special.extend(context.remove(name).map(|token| (name.to_owned(), token)));
    }
    let template = ChatTemplate::new(source, special).map_err(|error| error.to_string())?;
    let messages = context.remove("messages").unwrap_or(json!([]));
    let messages: Vec<Message> =
        serde_json::from_value(messages).map_err(|error| error.to_string())?;
    let generate = context.get("add_generation_prompt").is_some_and(|it| it == true);
    let rendered = template.render(&messages, generate, Value::Object(context));
    rendered.map_err(|error| error.to_string())
}

fn main() -> io::Result<()> {
    let mut out = io::stdout().lock();
    for line in io::stdin().lock().lines() {
        let case: Value = serde_json::from_str(&line?)?;
        let answer = match render(&case) {
            Ok(text) => json!({ "text": text }),
            Err(error) => json!({ "error": error }),
        };
        writeln!(out, "{answer}")?;
    }
    Ok(())
}
