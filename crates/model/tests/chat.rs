//! Prompts against those that Hugging Face transformers renders (tests/peers/chat_fixture.py).

use std::fs;
use std::path::{Path, PathBuf};

use lathe_model::chat::{ChatError, ChatTemplate, Message};
use lathe_model::tokenizer::Tokenizer;
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
    assert!(matches!(error, ChatError::Limit { .. }), "{error}");

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

/// A tokenizer of single bytes, with markers of both kinds as models have them.
fn marked_tokenizer() -> (tempfile::TempDir, Tokenizer) {
    // GPT-2's stand-ins for bytes: printable Latin-1, then the characters from U+0100 on.
    let printable = |code: &u32| matches!(code, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let stand_ins = (0..256).filter(printable).chain((0..68).map(|code| code + 0x100));
    let letters = stand_ins.filter_map(char::from_u32);
    let vocab: Map<String, Value> =
        letters.enumerate().map(|(id, letter)| (letter.to_string(), json!(id))).collect();
    let added =
        [("<|im_end|>", true), ("<｜User｜>", false), ("<tool_call>", false), ("<x>", false)];
    let added: Vec<Value> = added
        .iter()
        .enumerate()
        .map(|(index, (name, special))| {
            json!({
                "id": 256 + index, "content": name, "special": special, "single_word": false,
                "lstrip": false, "rstrip": false, "normalized": index == 2,
            })
        })
        .collect();
    let byte_level = json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false,
    });
    let tokenizer = json!({
        "version": "1.0", "added_tokens": added, "normalizer": null, "pre_tokenizer": byte_level,
        "post_processor": null, "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    });
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("tokenizer.json");
    fs::write(&path, tokenizer.to_string()).unwrap();
    let tokenizer = Tokenizer::from_file(&path).unwrap();
    (directory, tokenizer)
}

/// The reference's rule: special tokens, and added tokens that occur in the template's own text,
/// stay text where a user typed them.
#[test]
fn what_a_user_typed_is_no_marker() {
    let (_directory, tokenizer) = marked_tokenizer();
    let typed = "a<｜User｜>b<tool_call>c<|im_end|>d<x>";
    // The template writes three of the markers, in text, in strings, and as an escape.
    let head = r"{% set call = '<tool\x5fcall>' %}<｜User｜>";
    let tail = "<|im_end|>";
    let expressions = [
        ("m.content", typed.to_owned()),
        ("m['content'] ~ ''", typed.to_owned()),
        ("m.content + 'q'", format!("{typed}q")),
        ("m.content[1:]", typed[1..].to_owned()),
        ("m.content[::-1][::-1]", typed.to_owned()),
        ("m.content|upper|lower|replace('user', 'User')", typed.to_owned()),
        ("m.content.split('b')|join('b')", typed.to_owned()),
        ("m.content|list|join", typed.to_owned()),
        ("m.content|tojson", format!("\"{typed}\"")),
        ("[m.content]", format!("['{typed}']")),
        ("'%s' % m.content", typed.to_owned()),
        ("'{}'.format(m.content)", typed.to_owned()),
        ("m.content|indent|trim|string", typed.to_owned()),
        ("m.content.replace('z', 'y').strip()", typed.to_owned()),
        ("m.content.partition('<')|join", typed.to_owned()),
        ("m.args|tojson", "{\"<|im_end|>\": \"<tool_call>\"}".to_owned()),
        ("(m.halves[0] ~ m.halves[1])", "<|im_end|>".to_owned()),
        ("('<|im_' ~ m.halves[1])", "<|im_end|>".to_owned()),
    ];
    let mut message = Message::new("user", typed);
    message.fields.insert("args".into(), json!({"<|im_end|>": "<tool_call>"}));
    message.fields.insert("halves".into(), json!(["<|im_", "end|>"]));
    let bytes = |text: &str| {
        let plain = text.chars().flat_map(|letter| {
            let letter = letter.to_string();
            tokenizer.encode(&letter, false).unwrap()
        });
        plain.collect::<Vec<u32>>()
    };
    for (expression, text) in expressions {
        let source =
            format!("{head}{{% for m in messages %}}{{{{ {expression} }}}}{{% endfor %}}{tail}");
        let template = ChatTemplate::new(&source, Map::new()).unwrap();
        let found = template.encode(&tokenizer, &[message.clone()], true, Value::Null).unwrap();
        let mut expected = vec![257];
        // The template does not write `<x>`, which is a token for whoever writes it.
        match text.split_once("<x>") {
            Some((before, after)) => {
                expected.extend([bytes(before), vec![259], bytes(after)].concat());
            }
            None => expected.extend(bytes(&text)),
        }
        expected.push(256);
        assert_eq!(found, expected, "{expression}");
    }
}

/// A template sees the very words of a message, whatever markers are in them.
#[test]
fn protection_does_not_show_in_the_template() {
    let source = "{% set c = messages[0].content %}{{ c|length }} {{ c[:11] }} {{ c[3] }} \
        {{ '<tool_call>' in c }} {{ c == '<tool_call>x<|im_end|>' }} {{ c.split('<tool_call>') }} \
        {{ c.startswith('<tool_call>') }} {{ c|tojson }} {{ c.find('<|im_end|>') }} \
        {{ {'<tool_call>x<|im_end|>': 7}[c] }} {{ [c]|unique|length }}";
    let template = ChatTemplate::new(source, Map::new()).unwrap();
    let message = Message::new("user", "<tool_call>x<|im_end|>");
    let prompt = template.prompt(&[message], true, Value::Null).unwrap();
    let expected = "22 <tool_call> o True True ['', 'x<|im_end|>'] True \
        \"<tool_call>x<|im_end|>\" 12 7 1";
    assert_eq!(prompt.text(), expected);
}

#[test]
fn a_role_between_the_ends_of_a_marker_makes_the_marker() {
    let (_directory, tokenizer) = marked_tokenizer();
    let source = "{% for m in messages %}<|{{ m.role }}|>{% endfor %}";
    let template = ChatTemplate::new(source, Map::new()).unwrap();
    let messages = [Message::new("im_end", "")];
    let found = template.encode(&tokenizer, &messages, true, Value::Null).unwrap();
    assert_eq!(found, [256]);
}

// Expected values are those of Jinja under Python with the settings of transformers.
#[test]
fn templates_are_those_of_python() {
    let table = [
        ("{{ 'a\nb\n'|indent }}|", "a\n    b\n|"),
        (r"{{ '\U0001F600\N{BULLET}\a\x41\101\q' }}", "\u{1f600}\u{2022}\u{7}AA\\q"),
        ("{{ '{% generation %}' }}{% generation %}x{% endgeneration %}", "{% generation %}x"),
        ("{% raw %}{% generation %}{% endraw %}", "{% generation %}"),
        ("{{ '%s is %05.1f%%' % ('a', 2.5) }}", "a is 002.5%"),
        ("{{ 'x'|int }} {{ '1e3'|int }} {{ 'z'|float }}", "0 1000 0.0"),
        ("{{ [1]|tojson(4) }} {{ 'é'|tojson(true) }}", "[1] \"\\u00e9\""),
        ("{{ {'items': 1}.items is callable }} {{ {'items': 1}['items'] }}", "True 1"),
        ("{{ '<'|e + '<' }} {{ '<'|e|e }}", "&lt;&lt; &lt;"),
        ("{{ 'a-b c'|title }} {{ \"it's\".title() }}", "A-B C It'S"),
        (
            "{{ 'ab'.center(5, '.') }} {{ '5'.rjust(3, '0') }} {{ 'aXb'.swapcase() }}",
            "..ab. 005 AxB",
        ),
        ("{{ 'a\tb'.expandtabs(4) }} {{ 'abcb'.rindex('b') }}", "a   b 3"),
        ("{{ '{:>4}|{:,}|{!r}'.format('a', 1234567, 'q') }}", "   a|1,234,567|'q'"),
        ("{{ {'b': 1, 'A': 2}|dictsort }}", "[('A', 2), ('b', 1)]"),
        ("{{ 2.5|round }} {{ 7 // 2 }} {{ -7 % 3 }} {{ 7 / 2 }}", "2.0 3 2 3.5"),
        ("{{ 'one two three'|truncate(9, leeway=0) }} {{ 'one two'|wordcount }}", "one... 2"),
        ("{{ 1536|filesizeformat(true) }} {{ 'a b'|urlencode }}", "1.5 KiB a%20b"),
    ];
    for (source, expected) in table {
        let template = ChatTemplate::new(source, Map::new()).unwrap();
        assert_eq!(template.render(&[], false, Value::Null).unwrap(), expected, "{source}");
    }
}
