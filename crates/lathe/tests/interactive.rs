//! Conversations, Ctrl-C and readers that go away.

mod support;

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, Command, Stdio};

use serde_json::Value;
use support::{lathe, outcome};

fn spawn(home: &tempfile::TempDir, words: &[&str]) -> Child {
    let mut command = lathe(home.path());
    command.args(words).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().expect("starts")
}

fn talk(home: &tempfile::TempDir, words: &[&str], input: &str) -> (i32, String, String) {
    let mut child = spawn(home, words);
    child.stdin.take().expect("stdin").write_all(input.as_bytes()).expect("input");
    outcome(&child.wait_with_output().expect("ends"))
}

#[test]
fn history_stays_in_the_cache() {
    let home = tempfile::tempdir().expect("a folder");
    let words = ["chat", "tiny", "--json", "--max-tokens", "24", "--system", "Be brief."];
    let (code, out, err) = talk(&home, &words, "What is a cat?\nAnd a dog?\nThanks\n");
    assert_eq!(code, 0, "{err}");
    let report: Value = serde_json::from_str(&out).expect("one JSON object");
    let messages = report["messages"].as_array().expect("messages");
    let roles: Vec<_> = messages.iter().filter_map(|message| message["role"].as_str()).collect();
    assert_eq!(roles, ["system", "user", "assistant", "user", "assistant", "user", "assistant"]);
    let turns = report["turns"].as_array().expect("turns");
    let count = |turn: usize, name: &str| turns[turn][name].as_u64().expect("a count");
    for turn in 1..3 {
        let before = count(turn - 1, "prompt_tokens") + count(turn - 1, "generated_tokens");
        let reused = count(turn, "reused_tokens");
        assert!(count(turn, "prompt_tokens") > before - 2, "the prompt is the whole conversation");
        // All but what did not fill a block.
        assert!(reused + 32 >= before, "turn {turn}: {reused} of {before} tokens reused");
    }
}

#[test]
fn drafts_change_no_answer() {
    let home = tempfile::tempdir().expect("a folder");
    let words = ["chat", "tiny", "--json", "--max-tokens", "24", "--temperature", "0", "--exact"];
    let messages = |drafts: &[&str]| {
        let all: Vec<&str> = words.iter().chain(drafts).copied().collect();
        let (code, out, err) = talk(&home, &all, "What is a cat?\nAnd a dog?\n");
        assert_eq!(code, 0, "{err}");
        serde_json::from_str::<Value>(&out).expect("one JSON object")["messages"].clone()
    };
    let plain = messages(&[]);
    assert_eq!(plain, messages(&["--draft", "ngram,tiny", "--draft-budget", "6"]));
}

#[test]
fn commands_of_the_conversation() {
    let home = tempfile::tempdir().expect("a folder");
    let file = home.path().join("saved.json");
    let save = format!("/save {}", file.display());
    let input = [
        "/help",
        "/stats",
        "Hello",
        "/stats",
        &save,
        &save,
        "/clear",
        "/system You are a pirate.",
        "/nonsense",
        "Two\\",
        "lines",
        "",
        "/exit",
        "never said",
    ];
    let (code, out, err) =
        talk(&home, &["chat", "tiny", "--max-tokens", "4"], &(input.join("\n") + "\n"));
    assert_eq!(code, 0, "{err}");
    assert!(!out.is_empty());
    for part in ["/clear", "prefix reuse", "last turn:", "saved 2 messages", "no such command"] {
        assert!(err.contains(part), "{part}: {err}");
    }
    assert!(err.lines().any(|line| line.starts_with("error: ") && line.contains("saved.json")));
    let saved = std::fs::read_to_string(file).expect("the file");
    let saved: Value = serde_json::from_str(&saved).expect("JSON");
    assert_eq!(saved[0]["content"], "Hello");
}

#[test]
fn long_conversations_forget_their_beginning() {
    let home = tempfile::tempdir().expect("a folder");
    let words = ["chat", "tiny", "--max-tokens", "16", "--context", "128", "--json"];
    let input = "Tell me about the sea.\n".repeat(8);
    let (code, out, err) = talk(&home, &words, &input);
    assert_eq!(code, 0, "{err}");
    assert!(err.contains("no longer fit the context"), "{err}");
    let report: Value = serde_json::from_str(&out).expect("JSON");
    assert_eq!(report["turns"].as_array().map(Vec::len), Some(8));
    let (code, _, err) = talk(&home, &words, &("word ".repeat(500) + "\n"));
    assert_eq!(code, 0, "the conversation goes on");
    assert!(err.contains("error: this message makes a prompt of"), "{err}");
}

#[cfg(unix)]
fn interrupt(child: &Child) {
    let sent = Command::new("kill").args(["-INT", &child.id().to_string()]).status();
    assert!(sent.expect("kill runs").success());
}

#[test]
#[cfg(unix)]
fn ctrl_c_ends_a_run_with_its_summary() {
    let home = tempfile::tempdir().expect("a folder");
    let words = ["run", "tiny", "Go on forever", "--ignore-eos", "--max-tokens", "4000"];
    let mut child = spawn(&home, &words);
    let mut first = [0];
    child.stdout.as_mut().expect("stdout").read_exact(&mut first).expect("some text");
    interrupt(&child);
    let (code, _, err) = outcome(&child.wait_with_output().expect("ends"));
    assert_eq!(code, 130, "{err}");
    assert!(err.contains("cancelled]"), "{err}");
}

#[test]
#[cfg(unix)]
fn ctrl_c_stops_an_answer_and_not_the_chat() {
    let home = tempfile::tempdir().expect("a folder");
    let mut child = spawn(&home, &["chat", "tiny", "--ignore-eos", "--max-tokens", "4000"]);
    let mut stdin = child.stdin.take().expect("stdin");
    stdin.write_all(b"Go on forever\n").expect("a message");
    let mut first = [0];
    child.stdout.as_mut().expect("stdout").read_exact(&mut first).expect("some text");
    interrupt(&child);
    let mut stderr = BufReader::new(child.stderr.take().expect("stderr"));
    let mut line = String::new();
    while !line.contains("[stopped]") {
        line.clear();
        assert!(stderr.read_line(&mut line).expect("stderr") > 0, "it said that it stopped");
    }
    stdin.write_all(b"/stats\n/exit\n").expect("it still listens");
    drop(stdin);
    let output = child.wait_with_output().expect("ends");
    assert_eq!(output.status.code(), Some(0));
    let mut rest = String::new();
    stderr.read_to_string(&mut rest).expect("stderr");
    assert!(rest.contains("last turn:"), "{rest}");
}

#[test]
#[cfg(unix)]
fn a_reader_that_goes_away_is_no_failure() {
    let home = tempfile::tempdir().expect("a folder");
    let words = ["run", "tiny", "Go on forever", "--ignore-eos", "--max-tokens", "4000"];
    let mut child = spawn(&home, &words);
    let mut stdout = child.stdout.take().expect("stdout");
    let mut first = [0];
    stdout.read_exact(&mut first).expect("some text");
    drop(stdout);
    let (code, _, err) = outcome(&child.wait_with_output().expect("ends"));
    assert_eq!(code, 0, "{err}");
    assert!(!err.contains("error"), "{err}");
}
