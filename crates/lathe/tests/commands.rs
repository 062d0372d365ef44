//! The commands as a caller sees them: exit codes, one JSON object, its fields. The model is
//! `tiny`, which needs no network.

mod support;

use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use serde_json::Value;
use support::{lathe, outcome, run, run_error, run_json};

struct Home(tempfile::TempDir);

impl Home {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("a folder"))
    }

    fn lathe(&self, words: &[&str]) -> Command {
        let mut command = lathe(self.0.path());
        command.args(words).stdin(Stdio::null());
        command
    }

    fn file(&self, name: &str, bytes: &[u8]) -> String {
        let path: PathBuf = self.0.path().join(name);
        fs::write(&path, bytes).expect("a file");
        path.to_str().expect("UTF-8").to_owned()
    }

    fn path(&self, name: &str) -> String {
        self.0.path().join(name).to_str().expect("UTF-8").to_owned()
    }
}

/// Each field is there and is of its kind: `n`umber, `i`nteger, `s`tring, `a`rray, `o`bject.
fn assert_fields(value: &Value, fields: &[(&str, char)]) {
    for (name, kind) in fields {
        let field = value.get(name).unwrap_or_else(|| panic!("no field {name} in {value}"));
        let good = match kind {
            'n' => field.is_number(),
            'i' => field.is_u64(),
            's' => field.is_string(),
            'a' => field.is_array(),
            'o' => field.is_object(),
            _ => panic!("unknown kind {kind}"),
        };
        assert!(good, "{name} is {field}, expected kind {kind}");
    }
}

#[test]
fn help_and_version() {
    let home = Home::new();
    let (code, out, err) = run(&mut home.lathe(&["--help"]));
    assert_eq!((code, err.as_str()), (0, ""));
    assert!(out.contains("lathe run smollm2-135m \"Why is the sky blue?\""), "examples: {out}");
    for command in ["run", "chat", "score", "eval", "inspect", "bench", "convert", "pull"] {
        let (code, out, _) = run(&mut home.lathe(&[command, "--help"]));
        assert_eq!(code, 0);
        assert!(out.contains("Usage:") && out.contains("--json"), "{command}: {out}");
    }
    let (code, out, _) = run(&mut home.lathe(&["--version"]));
    assert_eq!(code, 0);
    assert!(out.starts_with("lathe "));
    let built_from = env!("LATHE_COMMIT");
    assert!(out.contains(built_from), "{out} names commit {built_from:?}");
    let (code, out, _) = run(home.lathe(&["--version"]).env("LATHE_ISA", "portable"));
    assert_eq!(code, 0);
    assert!(out.ends_with("portable)\n"), "{out}");
}

#[test]
fn bad_usage_is_one_line_and_code_2() {
    let home = Home::new();
    let cases: &[&[&str]] = &[
        &[],
        &["frobnicate"],
        &["run"],
        &["run", "tiny", "hi", "--device", "tpu"],
        &["run", "tiny", "hi", "--device", "cuda"],
        &["run", "tiny", "hi", "--threads", "0"],
        &["run", "tiny", "hi", "--threads", "50000"],
        &["run", "tiny", "hi", "--temperature", "-1"],
        &["run", "tiny", "hi", "--temperature", "hot"],
        &["run", "tiny", "hi", "--top-p", "2"],
        &["run", "tiny", "hi", "--max-tokens", "0"],
        &["run", "tiny", "hi", "--logit-bias", "5"],
        &["run", "tiny", "hi", "--logit-bias", "999999=1"],
        &["run", "tiny", "hi", "--stop", ""],
        &["run", "tiny", "hi", "--draft", "ngram,none"],
        &["run", "tiny", "hi", "--draft", "no-such-model"],
        &["run", "tiny", "hi", "--draft", "ngram", "--no-kv-cache"],
        &["run", "tiny", "hi", "--draft", "ngram", "--draft-budget", "0"],
        &["run", "tiny", "hi", "--draft-budget", "8"],
        &["run", "tiny", "--prompt-ids", "1,x"],
        &["run", "tiny", "--prompt-ids", "999999"],
        &["run", "tiny", ""],
        &["run", "tiny"],
        &["run", "no-such-model", "hi"],
        &["run", "./no/such/model.gguf", "hi"],
        &["score", "tiny"],
        &["score", "tiny", "--text", "/no/such/file"],
        &["eval", "tiny", "--text", "/no/such/file"],
        &["inspect", "tiny", "--context", "0"],
        &["inspect", "tiny", "--context", "999999999"],
        &["inspect", "tiny", "--memory", "lots"],
        &["bench", "tiny", "--prompt", "0"],
        &["bench", "tiny", "--prompt", "99999999"],
        &["bench", "tiny", "--dummy-weights", "--format", "int99"],
        &["bench", "tiny", "--plot", "x.svg"],
        &["convert", "tiny", "/tmp", "--to", "gguf"],
        &["chat", "tiny", "--top-k", "-1"],
        &["pull", "no-such-model"],
    ];
    for words in cases {
        let reason = run_error(&mut home.lathe(words), 2);
        assert!(reason.len() > 20, "{words:?}: {reason}");
    }
}

#[test]
fn damaged_models_are_bad_input() {
    let home = Home::new();
    let empty = home.file("empty.gguf", b"");
    let nonsense = home.file("nonsense.gguf", b"GGUF\x03\0\0\0\xff\xff\xff\xff\xff\xff\xff\x7f");
    let text = home.file("text.gguf", b"hello, this is no model at all");
    fs::create_dir(home.0.path().join("folder")).expect("a folder");
    let folder = home.path("folder");
    for model in [&empty, &nonsense, &text, &folder] {
        run_error(&mut home.lathe(&["run", model, "hi"]), 2);
        run_error(&mut home.lathe(&["inspect", model]), 2);
    }
    home.file("folder/config.json", b"{\"model_type\": \"unheard-of\"}");
    home.file("folder/model.safetensors", b"\x08\0\0\0\0\0\0\0{}      ");
    let reason = run_error(&mut home.lathe(&["run", &folder, "hi"]), 2);
    assert!(reason.contains("unheard-of"), "{reason}");
}

/// Drafts change no text, greedy or drawn.
#[test]
fn drafts_are_lossless() {
    let home = Home::new();
    let count = "One, two, three. One, two, three. One, two,";
    for random in [&["--temperature", "0"][..], &["--temperature", "0.8", "--seed", "3"]] {
        let words = ["run", "tiny", "--raw", count, "--max-tokens", "40", "--exact", "--json"];
        let run = |drafts: &[&str]| run_json(home.lathe(&words).args(random).args(drafts));
        let plain = run(&[]);
        assert_eq!(plain["drafted"], 0);
        for drafter in ["ngram", "tiny", "ngram,tiny"] {
            let drafted = run(&["--draft", drafter, "--draft-budget", "6"]);
            assert_eq!(drafted["token_ids"], plain["token_ids"], "{drafter} {random:?}");
            assert!(drafted["drafted"].as_u64() >= drafted["accepted"].as_u64(), "{drafted}");
        }
    }
}

/// An EAGLE head's folder is known as one, and changes no text either.
#[test]
fn an_eagle_head_is_lossless() {
    let home = Home::new();
    let fixtures = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures");
    let target = format!("{fixtures}/tiny/llama");
    let ids = "7,25,16,52,52,44,2,54,30,4,8,48,20,47";
    let words = ["run", &target, "--prompt-ids", ids, "--max-tokens", "40", "--exact", "--json"];
    for random in [&["--temperature", "0"][..], &["--temperature", "0.8", "--seed", "3"]] {
        let run = |drafts: &[&str]| run_json(home.lathe(&words).args(random).args(drafts));
        let plain = run(&[]);
        for name in ["sglang", "speculators", "eagle1"] {
            let head = format!("{fixtures}/eagle/{name}");
            let drafted = run(&["--draft", &head, "--draft-budget", "8"]);
            assert_eq!(drafted["token_ids"], plain["token_ids"], "{name} {random:?}");
        }
    }
    let head = format!("{fixtures}/eagle/sglang");
    let reason = run_error(&mut home.lathe(&["run", "tiny", "hi", "--draft", &head]), 2);
    assert!(reason.contains("the drafter's vocabulary is 64"), "{reason}");
    let two = format!("{head},{head}");
    let reason = run_error(home.lathe(&words).args(["--draft", &two]), 2);
    assert!(reason.contains("two EAGLE drafters"), "{reason}");
}

#[test]
fn run_as_json() {
    let home = Home::new();
    let words = ["run", "tiny", "Why is the sky blue?", "--max-tokens", "12", "--json"];
    let report = run_json(&mut home.lathe(&words));
    let fields = [
        ("text", 's'),
        ("token_ids", 'a'),
        ("prompt_tokens", 'i'),
        ("generated_tokens", 'i'),
        ("finish_reason", 's'),
        ("ttft_ms", 'n'),
        ("decode_tokens_per_s", 'n'),
        ("load_ms", 'n'),
        ("drafted", 'i'),
        ("accepted", 'i'),
        ("kv_bytes", 'i'),
    ];
    assert_fields(&report, &fields);
    let startup = ["open_ms", "tokenizer_ms", "pack_ms", "first_token_ms", "total_ms"];
    assert_fields(&report["startup"], &startup.map(|name| (name, 'n')));
    let times = startup.map(|name| report["startup"][name].as_f64().expect("a time"));
    assert!(times.iter().all(|time| *time > 0.0), "{times:?}");
    // The steps follow one another within the whole.
    assert!(times[..4].iter().sum::<f64>() <= times[4], "{times:?}");
    let generated = report["generated_tokens"].as_u64().expect("a count") as usize;
    assert_eq!(report["token_ids"].as_array().expect("ids").len(), generated);
    assert!(generated <= 12);
    // Greedy is the default, so it is the same again, and with any number of threads.
    for threads in ["1", "3"] {
        let again = run_json(home.lathe(&words).args(["--threads", threads]));
        assert_eq!(again["token_ids"], report["token_ids"]);
    }
    let (code, out, err) = run(&mut home.lathe(&words[..5]));
    assert_eq!(code, 0);
    assert_eq!(
        out.trim_end_matches('\n'),
        report["text"].as_str().expect("text").trim_end_matches('\n')
    );
    let summary = err.lines().last().expect("a summary");
    for part in ["prompt tokens", "first token after", "tokens/s", "memory"] {
        assert!(summary.contains(part), "{summary}");
    }
    assert!(err.contains("its text is poor"), "{err}");
}

#[test]
fn prompts_come_from_anywhere() {
    let home = Home::new();
    let words = ["run", "tiny", "--max-tokens", "6", "--json"];
    let mut child = home
        .lathe(&words)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("starts");
    child.stdin.take().expect("stdin").write_all(b"Hello there\n").expect("a prompt");
    let (code, out, err) = outcome(&child.wait_with_output().expect("ends"));
    assert_eq!(code, 0, "{err}");
    let piped: Value = serde_json::from_str(&out).expect("JSON");
    let given = run_json(home.lathe(&words).arg("Hello there"));
    assert_eq!(piped["token_ids"], given["token_ids"]);
    let ids = run_json(home.lathe(&words).args(["--prompt-ids", "504, 6330,282"]));
    assert_eq!(ids["prompt_tokens"], 3);
    let raw = run_json(home.lathe(&words).args(["--raw", "Hello there"]));
    assert!(raw["prompt_tokens"].as_u64() < given["prompt_tokens"].as_u64());
}

#[test]
fn sampling_is_repeatable() {
    let home = Home::new();
    let words = |seed: &'static str| {
        [
            "run",
            "tiny",
            "Tell a story",
            "--temperature",
            "1",
            "--max-tokens",
            "16",
            "--json",
            "--seed",
            seed,
        ]
    };
    let first = run_json(&mut home.lathe(&words("7")));
    assert_eq!(first["token_ids"], run_json(&mut home.lathe(&words("7")))["token_ids"]);
    assert_ne!(first["token_ids"], run_json(&mut home.lathe(&words("8")))["token_ids"]);
    assert_eq!(first["seed"], 7);
    let mut forbidden = home.lathe(&words("7"));
    let token = first["token_ids"][0].as_u64().expect("an id");
    let other = run_json(forbidden.args(["--logit-bias", &format!("{token}=-inf")]));
    assert!(!other["token_ids"].as_array().expect("ids").contains(&first["token_ids"][0]));
}

#[test]
fn the_cache_changes_time_and_not_text() {
    let home = Home::new();
    let words = ["run", "tiny", "Count to ten", "--max-tokens", "10", "--json"];
    let cached = run_json(&mut home.lathe(&words));
    let uncached = run_json(home.lathe(&words).arg("--no-kv-cache"));
    assert_eq!(cached["token_ids"], uncached["token_ids"]);
}

#[test]
fn stop_strings_end_the_text() {
    let home = Home::new();
    let words = ["run", "tiny", "Why is the sky blue?", "--max-tokens", "24", "--json"];
    let whole = run_json(&mut home.lathe(&words));
    let text = whole["text"].as_str().expect("text");
    let stop: String = text.chars().skip(8).take(4).collect();
    let report = run_json(home.lathe(&words).args(["--stop", &stop]));
    let stopped = report["text"].as_str().expect("text");
    assert_eq!(stopped, &text[..text.find(&stop).expect("part of the text")]);
    assert_eq!(report["finish_reason"], "stop");
}

#[test]
fn score_of_ids_and_of_text() {
    let home = Home::new();
    let text = home.file("text.txt", "The sky is blue because of Rayleigh scattering.".as_bytes());
    let report = run_json(&mut home.lathe(&["score", "tiny", "--text", &text, "--json"]));
    assert_fields(&report, &[("tokens", 'a'), ("logprobs", 'a'), ("mean_nll", 'n'), ("top", 'o')]);
    let tokens = report["tokens"].as_array().expect("tokens");
    let logprobs = report["logprobs"].as_array().expect("log-probabilities");
    assert_eq!(tokens.len(), logprobs.len() + 1);
    assert!(logprobs.iter().all(|value| value.as_f64().is_some_and(|value| value <= 0.0)));
    assert_eq!(report["top"]["ids"].as_array().map(Vec::len), Some(10));
    assert_eq!(report["top"]["logits"].as_array().map(Vec::len), Some(10));
    let ids = home.file("ids.json", report["tokens"].to_string().as_bytes());
    let again =
        run_json(&mut home.lathe(&["score", "tiny", "--tokens", &ids, "--top-k", "3", "--json"]));
    assert_eq!(again["logprobs"], report["logprobs"]);
    assert_eq!(again["top"]["ids"].as_array().map(Vec::len), Some(3));
    for bad in ["[1]", "[]", "{}", "[1, -1]", "[1, 2.5]", "[1, 4000000000]", "not json"] {
        let file = home.file("bad.json", bad.as_bytes());
        run_error(&mut home.lathe(&["score", "tiny", "--tokens", &file]), 2);
    }
    let file = home.file("bad.txt", b"\xff\xfe");
    run_error(&mut home.lathe(&["score", "tiny", "--text", &file]), 2);
}

#[test]
fn eval_agrees_with_score_and_with_itself() {
    let home = Home::new();
    let text = "It was the best of times, it was the worst of times, it was the age of wisdom.";
    let text = home.file("text.txt", text.as_bytes());
    let score = run_json(&mut home.lathe(&["score", "tiny", "--text", &text, "--json"]));
    let words = ["eval", "tiny", "--text", &text, "--json"];
    let report = run_json(&mut home.lathe(&words));
    assert_fields(&report, &[("perplexity", 'n'), ("bits_per_byte", 'n'), ("tokens", 'i')]);
    let expected = score["mean_nll"].as_f64().expect("a number").exp();
    let found = report["perplexity"].as_f64().expect("a number");
    assert!((found / expected - 1.0).abs() < 1e-9, "{found} {expected}");
    let compared =
        run_json(home.lathe(&words).args(["--base", "tiny", "--context", "8", "--stride", "4"]));
    assert_fields(&compared, &[("kl_mean", 'n'), ("kl_p99", 'n'), ("top1_agreement", 'n')]);
    assert_eq!(compared["kl_mean"], 0.0);
    assert_eq!(compared["top1_agreement"], 1.0);
    assert_eq!(compared["tokens"], report["tokens"], "with overlap every token but the first");
    for bad in [["--context", "1"], ["--stride", "0"], ["--context", "99999999"]] {
        run_error(home.lathe(&words[..4]).args(bad), 2);
    }
}

#[test]
fn inspect_counts() {
    let home = Home::new();
    let words = ["inspect", "tiny", "--json", "--context", "512", "--batch", "2"];
    let report = run_json(&mut home.lathe(&words));
    let fields = [
        ("spec", 'o'),
        ("parameters", 'i'),
        ("active_parameters", 'i'),
        ("weight_bytes", 'i'),
        ("kv_bytes_per_token", 'i'),
        ("prefill", 'o'),
        ("decode", 'o'),
        ("machine", 'o'),
    ];
    assert_fields(&report, &fields);
    for step in ["prefill", "decode"] {
        let fields =
            [("flops", 'i'), ("bytes", 'i'), ("intensity", 'n'), ("bound", 's'), ("floor_ms", 'n')];
        assert_fields(&report[step], &fields);
    }
    assert_eq!(report["parameters"], 15_730_944);
    // Two of keys and values, 4 layers, 2 heads of 64 codes of 2 bytes and a scale.
    assert_eq!(report["kv_bytes_per_token"], 2 * 4 * 2 * (64 * 2 + 4));
    let flops = report["decode"]["flops"].as_u64().expect("a count");
    assert!(flops > 2 * 2 * 15_000_000 && flops < 4 * 2 * 15_000_000, "{flops}");
    let tight = run_json(home.lathe(&words).args(["--no-measure", "--memory", "12MB"]));
    assert!(tight["machine"].is_null() && tight["decode"]["floor_ms"].is_null());
    assert!(tight["memory"]["longest_context"].as_u64() < Some(4096));
    let (code, out, _) = run(&mut home.lathe(&["inspect", "tiny"]));
    assert_eq!(code, 0);
    assert!(out.contains("decode") && out.contains("FLOP/byte"), "{out}");
}

const BENCH_FIELDS: &[(&str, char)] = &[
    ("prefill_ms", 'n'),
    ("prefill_tokens_per_s", 'n'),
    ("step_ms", 'n'),
    ("decode_tokens_per_s", 'n'),
    ("bytes_per_step", 'i'),
    ("achieved_gb_s", 'n'),
    ("measured_read_gb_s", 'n'),
    ("fraction_of_bandwidth", 'n'),
    ("load_ms", 'n'),
];

#[test]
fn bench_reports_all_fields() {
    let home = Home::new();
    let words = ["bench", "tiny", "--json", "--prompt", "16", "--generate", "4", "--repeat", "1"];
    let report = run_json(home.lathe(&words).args(["--batch", "2"]));
    assert_fields(&report, BENCH_FIELDS);
    #[cfg(target_os = "linux")]
    assert_fields(&report, &[("peak_memory_bytes", 'i')]);
    let svg = home.path("growth.svg");
    let report = run_json(home.lathe(&words).args(["--no-kv-cache", "--plot", &svg]));
    assert_fields(&report, BENCH_FIELDS);
    assert_eq!(report["growth"]["uncached_total_ms"].as_array().map(Vec::len), Some(4));
    assert!(fs::read_to_string(svg).expect("a plot").contains("</svg>"));
}

#[test]
fn bench_with_dummy_weights() {
    let home = Home::new();
    fs::create_dir(home.0.path().join("shape")).expect("a folder");
    let config = r#"{"model_type":"llama","architectures":["LlamaForCausalLM"],"hidden_size":64,
        "intermediate_size":128,"num_attention_heads":2,"num_hidden_layers":2,"num_key_value_heads":1,
        "head_dim":32,"vocab_size":256,"max_position_embeddings":128,"rms_norm_eps":1e-5,
        "rope_theta":10000.0,"hidden_act":"silu","tie_word_embeddings":false}"#;
    home.file("shape/config.json", config.as_bytes());
    let shape = home.path("shape");
    for format in ["f32", "bf16", "q8_0", "q4_0", "q4_k"] {
        let words = ["bench", &shape, "--dummy-weights", "--format", format, "--json"];
        let mut command = home.lathe(&words);
        command.args(["--prompt", "4", "--generate", "3", "--repeat", "1"]);
        let report = run_json(&mut command);
        assert_fields(&report, BENCH_FIELDS);
        // Rows of 64 are no whole block of a K-quant.
        assert_eq!(report["format"], if format == "q4_k" { "bf16" } else { format });
    }
    let report = run_json(&mut home.lathe(&[
        "inspect",
        &shape,
        "--json",
        "--no-measure",
        "--context",
        "64",
    ]));
    assert_eq!(
        report["parameters"],
        2 * 256 * 64 + 2 * (64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128 + 2 * 64) + 64
    );
    run_error(&mut home.lathe(&["run", &shape, "hi"]), 2);
}

#[test]
fn json_is_one_object_when_it_fails() {
    let home = Home::new();
    let (code, out, err) = run(&mut home.lathe(&["run", "nothing-like-it", "hi", "--json"]));
    assert_eq!((code, out.lines().count(), err.lines().count()), (2, 1, 1), "{out}{err}");
    let found: serde_json::Value = serde_json::from_str(&out).expect("JSON");
    assert_eq!(err.trim_end(), format!("error: {}", found["error"].as_str().expect("a reason")));
}

#[test]
fn converted_models_score_alike() {
    let home = Home::new();
    let text = home.file("text.txt", b"The quick brown fox jumps over the lazy dog.");
    let score = |model: &str| {
        let words = ["score", model, "--text", &text, "--json", "--device", "reference"];
        let report = run_json(&mut home.lathe(&words));
        report["mean_nll"].as_f64().expect("a number")
    };
    let folder = home.path("folder");
    let report = run_json(&mut home.lathe(&[
        "convert",
        "tiny",
        &folder,
        "--to",
        "safetensors",
        "--format",
        "f32",
        "--json",
    ]));
    assert_fields(&report, &[("path", 's'), ("bytes", 'i')]);
    let original = score("tiny");
    assert!((score(&folder) - original).abs() < 1e-5);
    run_error(&mut home.lathe(&["convert", "tiny", &folder, "--to", "safetensors"]), 2);
    let back = home.path("back.gguf");
    run_json(
        &mut home.lathe(&["convert", &folder, &back, "--to", "gguf", "--format", "q4_0", "--json"]),
    );
    assert!((score(&back) - original).abs() < 0.05);
    let answer = |model: &str| {
        run_json(&mut home.lathe(&[
            "run",
            model,
            "Why is the sky blue?",
            "--max-tokens",
            "8",
            "--json",
        ]))
    };
    assert_eq!(
        answer("tiny")["prompt_tokens"],
        answer(&back)["prompt_tokens"],
        "the chat template travels"
    );
}

/// A tiny model with experts, and a file of token ids for it.
fn mixture(home: &Home) -> (String, String) {
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/tiny/mixtral");
    (model.to_owned(), home.file("ids.json", b"[5, 9, 33, 61, 7, 7, 12, 40]"))
}

#[test]
fn inspect_tells_where_tokens_go() {
    let home = Home::new();
    let (model, ids) = mixture(&home);
    let words = ["inspect", &model, "--context", "32", "--no-measure", "--experts", &ids];
    let report = run_json(&mut home.lathe(&[&words[..], &["--json"]].concat()));
    let layers = report["experts"].as_array().expect("layers");
    assert_eq!(layers.len(), 4);
    for (index, layer) in layers.iter().enumerate() {
        assert_eq!(layer["layer"], index);
        let counts: Vec<u64> = serde_json::from_value(layer["counts"].clone()).expect("counts");
        // Eight tokens visit two of eight experts each.
        assert_eq!((counts.len(), counts.iter().sum::<u64>()), (8, 16));
        let most = *counts.iter().max().expect("counts") as f64;
        assert_eq!(layer["imbalance"], most / 2.0);
        let distinct = counts.iter().filter(|&&count| count > 0).count() as f64;
        assert_eq!(layer["distinct_per_step"], distinct);
    }
    let (code, out, _) = run(&mut home.lathe(&words));
    assert!(code == 0 && out.contains("distinct a step") && out.contains("%)"), "{out}");
    // The reference chooses the same.
    let reference = [&words[..], &["--json", "--device", "reference"]].concat();
    assert_eq!(run_json(&mut home.lathe(&reference))["experts"], report["experts"]);
    // A text needs a tokenizer, and a dense model has no experts.
    let text = ["inspect", &model, "--context", "32", "--no-measure", "--experts", "hello"];
    assert!(run_error(&mut home.lathe(&text), 2).contains("tokenizer"));
    let dense = ["inspect", "tiny", "--no-measure", "--experts", "hello"];
    assert!(run_error(&mut home.lathe(&dense), 2).contains("no experts"));
}

#[test]
fn bench_of_several_batches_and_steps() {
    let home = Home::new();
    let (model, _) = mixture(&home);
    let words = ["bench", &model, "--prompt", "8", "--generate", "6", "--repeat", "2", "--json"];
    let more = ["--batch", "1,4", "--step-tokens", "2,8"];
    let report = run_json(&mut home.lathe(&[&words[..], &more].concat()));
    let batches = report["batches"].as_array().expect("batches");
    assert_eq!((batches[0]["batch"].as_u64(), batches[1]["batch"].as_u64()), (Some(1), Some(4)));
    assert_eq!(report["step_ms"], batches[0]["step_ms"]);
    // One token visits two experts whatever they are: what is expected is what happens.
    assert_eq!(report["bytes_per_step"], report["bytes_per_step_expected"]);
    for (batch, rows) in [(&batches[0], 1), (&batches[1], 4)] {
        let layers = batch["experts"].as_array().expect("layers");
        for layer in layers {
            let counts: Vec<u64> = serde_json::from_value(layer["counts"].clone()).expect("counts");
            // Two runs of five timed steps, two experts a row.
            assert_eq!(counts.iter().sum::<u64>(), 2 * 5 * 2 * rows);
            let distinct = layer["distinct_per_step"].as_f64().expect("a number");
            assert!(distinct >= 2.0 && distinct <= (2 * rows) as f64, "{distinct}");
        }
    }
    let steps = report["steps"].as_array().expect("steps");
    assert_eq!((steps[0]["tokens"].as_u64(), steps[1]["tokens"].as_u64()), (Some(2), Some(8)));
    assert!(steps.iter().all(|step| step["step_ms"].as_f64() > Some(0.0)));
    assert!(steps.iter().all(|step| step["relative_to_one"].as_f64() > Some(0.0)));
    let alone = run_json(&mut home.lathe(&words));
    assert!(alone.get("batches").is_none() && alone.get("steps").is_none(), "{alone}");
    for wrong in [["--batch", "1,0"], ["--step-tokens", "0"], ["--step-tokens", "9999"]] {
        run_error(&mut home.lathe(&[&words[..], &wrong].concat()), 2);
    }
}
