//! Every tiny model divided over ranks on the CPU says what one rank says, with weights in bf16 and
//! in int8; and the commands that divide models.

mod support;

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;

use lathe_cpu::CpuBackend;
use lathe_model::Model;
use lathe_model::lower::{LowerOptions, lower};
use lathe_program::shard::{ExpertSplit, ShardOptions, ShardedBackend};
use lathe_program::{
    Backend, BackendError, BlockTable, Choice, Executor, ExecutorOptions, HostCollective, Op,
    Program, SequenceId, Step, StepSequence, TokenSource, Weight, WeightRole, WeightSource,
    replace_tables,
};
use lathe_tensor::codec::scaled::{E8m0Rounding, quantize};
use lathe_tensor::{Bytes, Format, Tensor, codec};
use serde_json::Value;
use support::{lathe, run_error, run_json};

/// Prompt of the fixtures, and tokens after it, within their context.
const PROMPT: usize = 40;
const GENERATED: usize = 20;

fn fixtures() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/tiny"))
}

fn names() -> Vec<String> {
    let entries = std::fs::read_dir(fixtures()).expect("fixtures");
    let name = |entry: std::io::Result<std::fs::DirEntry>| entry.expect("an entry").file_name();
    let mut names: Vec<String> =
        entries.map(|entry| name(entry).to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// A model's weights with its matrices in another format; routers and vectors as they are.
struct Converted<'a> {
    weights: &'a dyn WeightSource,
    program: &'a Program,
    format: Format,
}

impl WeightSource for Converted<'_> {
    fn tensor(&self, weight: Weight) -> Result<Tensor, BackendError> {
        let tensor = self.weights.tensor(weight)?;
        if matches!(self.program.weight(weight).role, WeightRole::Vector | WeightRole::Router) {
            return Ok(tensor);
        }
        let (values, shape) = (tensor.to_f32(), tensor.shape);
        Ok(match self.format {
            Format::Scaled(scaled) => {
                quantize(&shape, &scaled, &values, E8m0Rounding::default()).expect("fits")
            }
            format => {
                let codes = Bytes::new(codec::quantize(format, &values));
                Tensor::new(shape, format, codes).expect("fits")
            }
        })
    }
}

/// A tiny model, its prompt, and a number format for its matrices.
struct Tiny {
    model: Model,
    program: Arc<Program>,
    prompt: Vec<u32>,
}

impl Tiny {
    fn open(name: &str) -> Self {
        let path = fixtures().join(name);
        let model = Model::open(&path).unwrap_or_else(|error| panic!("{name}: {error}"));
        let options = LowerOptions::new(PROMPT + GENERATED);
        let program = Arc::new(lower(&model.spec, &options).expect("a program"));
        let golden = std::fs::read_to_string(path.join("golden.json")).expect("golden values");
        let golden: Value = serde_json::from_str(&golden).expect("JSON");
        let prompt = serde_json::from_value(golden["tokens"].clone()).expect("ids");
        Self { model, program, prompt }
    }

    fn has_experts(&self) -> bool {
        self.program.ops.iter().any(|op| matches!(op, Op::Experts { .. }))
    }

    fn blocks(&self) -> u32 {
        (PROMPT + GENERATED).div_ceil(self.program.kv.block_tokens) as u32
    }

    fn prepare(
        &self,
        backend: &dyn Backend,
        format: Format,
        exact: bool,
    ) -> Result<Box<dyn Executor>, BackendError> {
        let options = ExecutorOptions {
            kv_blocks: self.blocks() as usize * self.program.kv.groups.len(),
            kv_format: None,
            rows_max: PROMPT,
            threads: Some(2),
            exact,
        };
        let weights = self.model.weights(&self.program).expect("weights");
        let weights = Converted { weights: &weights, program: &self.program, format };
        backend.prepare(Arc::clone(&self.program), &weights, &options)
    }

    /// Logits of every row of `tokens`, which follow `cached` others.
    fn logits(&self, executor: &mut dyn Executor, cached: usize, tokens: &[u32]) -> Vec<f32> {
        let count = self.blocks();
        let tables: Vec<BlockTable> = (0..self.program.kv.groups.len() as u32)
            .map(|g| BlockTable { first: 0, blocks: (g * count..(g + 1) * count).collect() })
            .collect();
        let rows = tokens.len() as u32;
        let step = Step {
            tokens: tokens.iter().map(|token| TokenSource::Given(*token)).collect(),
            positions: (cached as u32..cached as u32 + rows).collect(),
            sequences: vec![StepSequence {
                id: SequenceId(0),
                first_row: 0,
                rows,
                cached: cached as u32,
                expanded: 0,
                long_rope: self.program.long_rope(self.program.context_max),
                ancestors: None,
            }],
            tables: replace_tables(SequenceId(0), &tables),
            choices: (0..rows).map(Choice::logits_of).collect(),
            inputs: Vec::new(),
        };
        executor.run(&step).expect("it runs").logits.to_vec()
    }
}

fn rank(end: Arc<HostCollective>) -> Box<dyn Backend> {
    Box::new(CpuBackend::new(Default::default()).collective(end))
}

/// The best token and by how much it is.
fn best(logits: &[f32]) -> (u32, f32) {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]));
    (order[0] as u32, logits[order[0]] - logits[order[1]])
}

/// Greedy text of one rank, fed to `ranks` as well: logits agree within `tolerance` (relative to
/// the largest of the row), and so do tokens wherever one rank's margin is more than twice that.
/// Returns how many tokens were compared.
fn compare(tiny: &Tiny, what: &str, executors: [&mut dyn Executor; 2], tolerance: f32) -> usize {
    let [one, ranks] = executors;
    let vocabulary = tiny.program.vocabulary;
    let (mut cached, mut tokens, mut compared) = (0, tiny.prompt.clone(), 0);
    while cached + tokens.len() <= PROMPT + GENERATED {
        let expected = tiny.logits(one, cached, &tokens);
        let found = tiny.logits(ranks, cached, &tokens);
        let rows = expected.chunks_exact(vocabulary).zip(found.chunks_exact(vocabulary));
        for (row, (expected, found)) in rows.enumerate() {
            let largest = expected.iter().fold(1.0_f32, |m, x| m.max(x.abs()));
            let off = expected.iter().zip(found).fold(0.0_f32, |m, (e, f)| m.max((e - f).abs()));
            let bound = tolerance * largest;
            assert!(off <= bound, "{what}: row {}: off by {off} of {largest}", cached + row);
            let (token, margin) = best(expected);
            if margin > 2.0 * bound {
                assert_eq!(best(found).0, token, "{what}: row {}", cached + row);
                compared += 1;
            }
        }
        cached += tokens.len();
        tokens = vec![best(&expected[expected.len() - vocabulary..]).0];
    }
    compared
}

fn formats() -> [Format; 2] {
    ["bf16", "int8-channel-f32"].map(|name| Format::parse(name).expect("a format"))
}

fn check(name: &str, ranks: usize) {
    let tiny = Tiny::open(name);
    let mut splits = vec![ExpertSplit::ByColumn];
    if tiny.has_experts() {
        splits.push(ExpertSplit::ByExpert);
    }
    for format in formats() {
        // What is rounded on the way (activations, the cache) may go the other way once sums are
        // added in another order.
        for (exact, tolerance) in [(true, 1e-4), (false, 2e-3)] {
            for experts in &splits {
                let options = ShardOptions { experts: *experts, ..ShardOptions::new(ranks) };
                let what = format!("{name} over {ranks}, {experts:?}, {format}, exact {exact}");
                let one = tiny.prepare(&CpuBackend::new(Default::default()), format, exact);
                let divided = tiny.prepare(&ShardedBackend::new(options, rank), format, exact);
                let mut one = one.unwrap_or_else(|error| panic!("{what}: {error}"));
                let mut divided = divided.unwrap_or_else(|error| panic!("{what}: {error}"));
                let compared = compare(&tiny, &what, [&mut *one, &mut *divided], tolerance);
                println!("{what}: {compared} tokens");
                assert!(compared >= (PROMPT + GENERATED) / 2, "{what}: {compared} tokens compared");
            }
        }
    }
}

#[test]
fn two_ranks_say_what_one_says() {
    let names = names();
    assert!(names.len() > 20, "{names:?}");
    names.iter().for_each(|name| check(name, 2));
}

/// Heads and experts that do not divide evenly, KV heads that ranks share, 64 tokens on 3 ranks.
#[test]
fn three_and_four_ranks_say_what_one_says() {
    for name in ["deepseek-v3", "kimi-k2", "minicpm3", "phi3"] {
        check(name, 3);
    }
    for name in ["llama", "gemma3", "gpt-oss", "qwen2-moe", "deepseek-v2-lite", "olmo2"] {
        check(name, 4);
    }
}

fn command(home: &tempfile::TempDir, words: &[&str]) -> Command {
    let mut command = lathe(home.path());
    command.args(words).stdin(Stdio::null());
    command
}

fn path(name: &str) -> String {
    fixtures().join(name).to_str().expect("UTF-8").to_owned()
}

#[test]
fn run_and_bench_divide() {
    let home = tempfile::tempdir().expect("a folder");
    let model = path("qwen2-moe");
    let words = ["run", &model, "--prompt-ids", "5,9,2,33,7", "--max-tokens", "8", "--json"];
    for device in ["cpu", "reference"] {
        let run = |flags: &[&str]| {
            let words = [&words[..], &["--exact", "--device", device], flags].concat();
            run_json(&mut command(&home, &words))["token_ids"].clone()
        };
        let one = run(&[]);
        assert_eq!(one.as_array().map(Vec::len), Some(8));
        assert_eq!(run(&["--tensor-parallel", "2"]), one);
        assert_eq!(run(&["--tensor-parallel", "4", "--threads", "1"]), one);
        assert_eq!(run(&["--tensor-parallel", "2", "--expert-parallel"]), one);
    }
    let bench = |flags: &[&str]| {
        let words = ["bench", &model, "--prompt", "8", "--generate", "4", "--json"];
        run_json(&mut command(&home, &[&words, flags].concat()))
    };
    let report = bench(&["--tensor-parallel", "2", "--expert-parallel"]);
    assert_eq!(report["tensor_parallel"], 2);
    assert_eq!(report["expert_parallel"], true);
    assert_eq!(report["ranks"], 2);
    let report = bench(&[]);
    assert_eq!((&report["ranks"], &report["expert_parallel"]), (&1.into(), &false.into()));
}

#[test]
fn impossible_divisions_take_one_line() {
    let home = tempfile::tempdir().expect("a folder");
    let (dense, experts) = (path("llama"), path("qwen2-moe"));
    let ids = ["--prompt-ids", "1,2"];
    for (model, flags, reason) in [
        (&dense, &["--tensor-parallel", "0"][..], "0"),
        (&dense, &["--tensor-parallel", "8"], "4 heads with 2 KV heads"),
        (&dense, &["--tensor-parallel", "2", "--expert-parallel"], "has no experts"),
        (&experts, &["--expert-parallel"], "at least 2"),
        (&experts, &["--tensor-parallel", "2", "--device", "cuda"], "CUDA"),
    ] {
        let words = [&["run", model][..], &ids, flags].concat();
        let error = run_error(&mut command(&home, &words), 2);
        assert!(error.contains(reason), "{flags:?}: {error}");
        let words = [&["inspect", model, "--no-measure", "--context", "64"][..], flags].concat();
        if reason != "CUDA" {
            let error = run_error(&mut command(&home, &words), 2);
            assert!(error.contains(reason), "{flags:?}: {error}");
        }
    }
    let words = ["inspect", &experts, "--no-measure", "--context", "64", "--link-gb-s", "0"];
    assert!(run_error(&mut command(&home, &words), 2).contains("--link-gb-s"));
}

#[test]
fn inspect_predicts_ranks() {
    let home = tempfile::tempdir().expect("a folder");
    let model = path("deepseek-v3");
    let inspect = |flags: &[&str]| {
        let words = ["inspect", &model, "--context", "64", "--no-measure", "--json"];
        run_json(&mut command(&home, &[&words, flags].concat()))
    };
    assert_eq!(inspect(&[]).get("parallel"), None);
    let report = inspect(&["--tensor-parallel", "2"]);
    let parallel = &report["parallel"];
    assert!(parallel["roofs"].is_null() && parallel["crossover_batch"].is_null());
    let decode = parallel["decode"].as_array().expect("a table");
    let batches: Vec<u64> = decode.iter().filter_map(|line| line["batch"].as_u64()).collect();
    assert_eq!(batches, [1, 2, 4, 8, 16, 32, 64, 128, 256]);
    let number = |line: &Value, strategy: &str, field: &str| {
        line[strategy][field].as_f64().unwrap_or_else(|| panic!("{field} of {strategy}: {line}"))
    };
    for line in decode.iter().chain([&parallel["prefill"]]) {
        let rows = line["rows"].as_f64().expect("rows");
        // Eight experts, three a token; half of them on a rank.
        let touched = 8.0 * (1.0 - (1.0_f64 - 3.0 / 8.0).powf(rows));
        let column = number(line, "tensor", "experts_touched");
        assert!((column - touched).abs() < 1e-9, "{column} {touched}");
        let mean = number(line, "expert", "experts_touched_mean");
        assert!((mean - touched / 2.0).abs() < 0.05 * touched, "{mean} {touched}");
        let imbalance = number(line, "expert", "imbalance");
        assert!(imbalance >= 1.0 && number(line, "tensor", "imbalance") == 1.0);
        let [by_column, by_expert] =
            ["tensor", "expert"].map(|strategy| number(line, strategy, "weight_bytes"));
        assert!(by_expert >= 0.99 * by_column, "{by_expert} {by_column}");
        // Both send the same sums: embedding, and attention and feed-forward of each layer.
        let sent = |strategy: &str| &line[strategy]["communication"];
        assert_eq!(sent("tensor"), sent("expert"));
        let layers = report["spec"]["layers"].as_array().map_or(0, Vec::len);
        let sums = sent("tensor")["all_reduce_bytes"].as_f64().expect("bytes");
        assert!(layers == 0 || sums == (1.0 + 2.0 * layers as f64) * rows * 32.0 * 4.0);
        assert!(line["expert"]["exchange"]["all_to_all_bytes"].as_u64() > Some(0));
    }
    // With roofs the time is theirs: reading alone, no link to speak of.
    let roofs = ["--tensor-parallel", "2", "--rank-read-gb-s", "1", "--rank-gflop-s", "1e9"];
    let fast = [&roofs[..], &["--link-gb-s", "1e9", "--link-us", "0"]].concat();
    let line = &inspect(&fast)["parallel"]["decode"][3];
    let fields = ["weight_bytes", "kv_bytes", "moved_bytes"];
    let bytes: f64 = fields.iter().map(|field| number(line, "expert", field)).sum();
    let ms = number(line, "expert", "ms");
    assert!((ms * 1e6 / bytes - 1.0).abs() < 1e-3, "{ms} {bytes}");
    let slow = [&roofs[..], &["--link-us", "1000"]].concat();
    let line = &inspect(&slow)["parallel"]["decode"][3];
    assert!(number(line, "expert", "ms") > 5.0, "{line}");
}
