//! Prompts against those that Hugging Face transformers renders (tests/peers/chat_fixture.py).

use std::fs;
use std::path::{Path, PathBuf};

use lathe_model::chat::{ChatError, ChatTemplate, Message};
use serde_json::{Map, Value, json};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/chat")
}

fn read_json(name: &str) -> Value {
    serde_json::from_str(&fs::read_to_string(fixtures().join(name)).unwrap()).unwrap()
}

fn special_tokens() -> Map<String, Value> {
    let Value::Object(tokens) = json!({"bos_token": "<s>", "eos_token": "</s>"}) else {
        unreachable!()
    };
    tokens
}

/// What the fixture says of this outcome: the prompt, or what the template refused with.
fn outcome(result: Result<String, ChatError>) -> Value {
    match result {
        Ok(prompt) => Value::String(prompt),
        Err(ChatError::Refused { message }) => json!({ "refused": message }),
        Err(error) => json!({ "failed": error.to_string() }),
    }
}

#[test]
fn prompts_equal_transformers() {
    let conversations = read_json("conversations.json");
    let expected = read_json("expected.json");
    let mut compared = 0;
    for (name, outputs) in expected.as_object().unwrap() {
        let source = fs::read_to_string(fixtures().join(format!("{name}.jinja"))).unwrap();
        let template = ChatTemplate::new(&source, special_tokens()).unwrap();
        for conversation in conversations.as_array().unwrap() {
            let messages: Vec<Message> =
                serde_json::from_value(conversation["messages"].clone()).unwrap();
            let mut extra = json!({"date_string": "26 Jul 2024"});
            if let Some(options) = conversation["extra"].as_object() {
                extra.as_object_mut().unwrap().extend(options.clone());
            }
            let generate = conversation["add_generation_prompt"].as_bool().unwrap();
            let found = outcome(template.render(&messages, generate, extra));
            let title = conversation["name"].as_str().unwrap();
            assert_eq!(found, outputs[title], "template {name}, conversation {title:?}");
            compared += 1;
        }
    }
    assert_eq!(compared, 49);
}

#[test]
fn errors_say_what_is_wrong() {
    let error = ChatTemplate::new("a\n{% if %}", Map::new()).unwrap_err();
    assert!(matches!(error, ChatError::Syntax { line: 2, .. }), "{error}");

    let endless = "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}";
    let template = ChatTemplate::new(endless, Map::new()).unwrap();
    let error = template.render(&[], true, Value::Null).unwrap_err();
    assert!(matches!(error, ChatError::Render { .. }), "{error}");

    let template = ChatTemplate::new("{{ messages[0].content + 1 }}", Map::new()).unwrap();
    let error = template.render(&[Message::new("user", "x")], true, Value::Null).unwrap_err();
    assert!(matches!(error, ChatError::Render { .. }), "{error}");
}

#[test]
fn templates_are_chosen_by_use_and_by_name() {
    let directory = tempfile::tempdir().unwrap();
    let config = json!({
        "bos_token": {"content": "<s>"},
        "chat_template": [
            {"name": "default", "template": "d {{ bos_token }}"},
            {"name": "tool_use", "template": "t"},
        ],
    });
    let path = directory.path().join("tokenizer_config.json");
    fs::write(&path, config.to_string()).unwrap();
    let template = ChatTemplate::from_directory(directory.path()).unwrap().unwrap();
    assert_eq!(template.render(&[], true, Value::Null).unwrap(), "d <s>");
    assert_eq!(template.render(&[], true, json!({"tools": [{}]})).unwrap(), "t");
    let named = json!({"chat_template": "default", "tools": [{}]});
    assert_eq!(template.render(&[], true, named).unwrap(), "d <s>");
    let error = template.render(&[], true, json!({"chat_template": "rag"})).unwrap_err();
    assert!(matches!(error, ChatError::NoTemplate { .. }), "{error}");

    fs::write(directory.path().join("chat_template.jinja"), "own file\n").unwrap();
    let template = ChatTemplate::from_directory(directory.path()).unwrap().unwrap();
    assert_eq!(template.render(&[], true, Value::Null).unwrap(), "own file");

    fs::write(&path, "{").unwrap();
    assert!(matches!(ChatTemplate::from_directory(directory.path()), Err(ChatError::Read { .. })));
    let empty = tempfile::tempdir().unwrap();
    assert!(ChatTemplate::from_directory(empty.path()).unwrap().is_none());
}
