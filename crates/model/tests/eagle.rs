//! EAGLE drafters with random weights (`tests/fixtures/make_eagle.py`) against the logits of the
//! reference modelling, and folders that are refused.

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use lathe_model::Model;
use lathe_model::eagle::{Eagle, EagleError, EagleTaps};
use lathe_model::lower::{LowerOptions, lower};
use lathe_model::weights::WeightsError;
use lathe_program::{
    BlockTable, Choice, Executor, SequenceId, Step, StepInput, StepSequence, TokenSource,
    replace_tables,
};
use lathe_tensor::safetensors::Checkpoint;
use serde_json::{Value, json};
use support::prepare_with;

const NAMES: [&str; 5] = ["sglang", "sglang-norm", "speculators", "speculators-norms", "eagle1"];
/// Positions that the executors hold.
const CONTEXT: usize = 32;

fn fixtures() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures"))
}

fn target() -> Model {
    Model::open(&fixtures().join("tiny/llama")).expect("the target")
}

fn golden(name: &str) -> Value {
    let path = fixtures().join("eagle").join(name).join("golden.json");
    serde_json::from_str(&fs::read_to_string(path).expect(name)).expect(name)
}

fn tokens(value: &Value) -> Vec<u32> {
    value.as_array().expect("a list").iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

fn floats(value: &Value) -> Vec<f32> {
    let rows = value.as_array().expect("rows").iter();
    rows.flat_map(|row| row.as_array().unwrap()).map(|x| x.as_f64().unwrap() as f32).collect()
}

/// Feeds rows that follow `cached` others; logits of all of them, and the taps.
fn feed(
    executor: &mut dyn Executor,
    cached: usize,
    tokens: &[u32],
    inputs: Vec<Vec<f32>>,
) -> (Vec<f32>, Vec<Vec<f32>>) {
    let rows = tokens.len();
    let program = Arc::clone(executor.program());
    let pages = CONTEXT.div_ceil(program.kv.block_tokens) as u32;
    let table = |group: u32| BlockTable {
        first: 0,
        blocks: (group * pages..(group + 1) * pages).collect(),
    };
    let tables: Vec<BlockTable> = (0..program.kv.groups.len() as u32).map(table).collect();
    let id = SequenceId(0);
    let step = Step {
        tokens: tokens.iter().map(|token| TokenSource::Given(*token)).collect(),
        positions: (cached as u32..(cached + rows) as u32).collect(),
        sequences: vec![StepSequence {
            id,
            first_row: 0,
            rows: rows as u32,
            cached: cached as u32,
            expanded: 0,
            long_rope: false,
            ancestors: None,
        }],
        tables: replace_tables(id, &tables),
        choices: (0..rows as u32).map(Choice::logits_of).collect(),
        inputs: inputs.into_iter().map(|values| StepInput { values }).collect(),
    };
    let made = executor.run(&step).expect("runs");
    (made.logits.to_vec(), made.captures.iter().map(|tap| tap.to_vec()).collect())
}

/// The taps of `rows` rows side by side.
fn joined(taps: &[Vec<f32>], rows: usize) -> Vec<f32> {
    let row = |row: usize| {
        let part = move |tap: &Vec<f32>| {
            let width = tap.len() / rows;
            tap[row * width..(row + 1) * width].to_vec()
        };
        taps.iter().flat_map(part)
    };
    (0..rows).flat_map(row).collect()
}

fn best(logits: &[f32]) -> usize {
    let by_logit = |a: &(usize, &f32), b: &(usize, &f32)| a.1.total_cmp(b.1);
    logits.iter().enumerate().max_by(by_logit).expect("logits").0
}

fn largest_difference(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn draft_logits_equal_the_reference() {
    let target = target();
    for name in NAMES {
        let golden = golden(name);
        let eagle = Eagle::open(&fixtures().join("eagle").join(name), &target.spec)
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        let text = tokens(&golden["tokens"]);
        let options = eagle.taps().into_options(LowerOptions::new(CONTEXT));
        let program = Arc::new(lower(&target.spec, &options).expect("lowers"));
        let mut model = prepare_with(&program, &target.weights(&program).expect("weights"));
        let (_, taps) = feed(&mut *model, 0, &text, Vec::new());
        let features = joined(&taps, text.len());

        let program = Arc::new(eagle.program(&LowerOptions::new(CONTEXT)).expect("lowers"));
        let weights = eagle.weights(&program, &target).expect("weights");
        let mut drafter = prepare_with(&program, &weights);
        let embedding = eagle.embedding(&target).expect("embedding");
        let width = eagle.spec.decoder.width;
        let embed = |tokens: &[u32]| {
            let mut rows = vec![0.0; tokens.len() * width];
            for (row, token) in rows.chunks_exact_mut(width).zip(tokens) {
                embedding.row_into(*token as usize, row);
            }
            rows
        };
        let fuses = matches!(eagle.taps(), EagleTaps::Layers(_));
        let feature_width = features.len() / text.len();
        let rows = text.len() - 1;
        let mut inputs = vec![embed(&text[1..]), features[..rows * feature_width].to_vec()];
        inputs.extend(fuses.then(|| vec![0.0; rows * width]));
        let (mut logits, mut hidden) = feed(&mut *drafter, 0, &vec![0; rows], inputs);
        let off = largest_difference(&logits, &floats(&golden["logits"]));
        assert!(off < 1e-4, "{name}: {off:.1e}");

        let vocabulary = eagle.tokens().len();
        let mut chain = Vec::new();
        for (drafted, expected) in tokens(&golden["drafted"]).into_iter().enumerate() {
            let last = &logits[logits.len() - vocabulary..];
            let token = eagle.tokens()[best(last)];
            assert_eq!(token, expected, "{name}: drafted token {drafted}");
            let own = hidden[0][hidden[0].len() - width..].to_vec();
            let mut inputs = vec![embed(&[token])];
            inputs.extend(fuses.then(|| vec![0.0; feature_width]));
            inputs.push(own);
            (logits, hidden) = feed(&mut *drafter, rows + drafted, &[0], inputs);
            chain.extend_from_slice(&logits);
        }
        let off = largest_difference(&chain, &floats(&golden["drafted_logits"]));
        assert!(off < 1e-4, "{name}, drafted: {off:.1e}");
    }
}

/// A copy of the drafter `name` with another configuration, and tensors left out or renamed.
fn altered(
    name: &str,
    config: impl FnOnce(&mut Value),
    tensor: impl Fn(&str) -> Option<String>,
) -> Result<Eagle, EagleError> {
    let from = fixtures().join("eagle").join(name);
    let folder = tempfile::tempdir().expect("a folder");
    let text = fs::read_to_string(from.join("config.json")).unwrap();
    let mut value: Value = serde_json::from_str(&text).unwrap();
    config(&mut value);
    fs::write(folder.path().join("config.json"), value.to_string()).unwrap();
    copy_tensors(&from, folder.path(), tensor);
    Eagle::open(folder.path(), &target().spec)
}

/// Writes a safetensors file with the tensors of another under the names that `tensor` gives.
fn copy_tensors(from: &Path, to: &Path, tensor: impl Fn(&str) -> Option<String>) {
    let files = Checkpoint::open(from).expect("the tensors");
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for name in files.names() {
        let Some(renamed) = tensor(name) else { continue };
        let raw = files.raw(name).unwrap();
        let start = data.len();
        data.extend_from_slice(&raw.bytes);
        let offsets = [start, data.len()];
        let dtype = raw.dtype.to_string();
        let entry = json!({"dtype": dtype, "shape": raw.shape, "data_offsets": offsets});
        header.insert(renamed, entry);
    }
    let header = Value::Object(header).to_string();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.extend_from_slice(&data);
    fs::write(to.join("model.safetensors"), file).unwrap();
}

fn same(name: &str) -> Option<String> {
    Some(name.to_owned())
}

#[test]
fn a_copy_opens() {
    for name in NAMES {
        altered(name, |_| {}, same).unwrap_or_else(|error| panic!("{name}: {error}"));
    }
}

#[test]
fn taps_out_of_range_are_refused() {
    let far = altered(
        "speculators",
        |config| config["eagle_aux_hidden_state_layer_ids"] = json!([0, 2, 5]),
        same,
    );
    assert!(matches!(far, Err(EagleError::Tap { found: 5, layers: 4, .. })), "{far:?}");
    // SGLang counts the layer whose output is the feature: 3 is the last of 4.
    let ids = |last: u32| {
        let set = move |config: &mut Value| {
            config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] = json!([0, 1, last]);
        };
        altered("sglang", set, same)
    };
    assert_eq!(ids(3).unwrap().taps(), &EagleTaps::Layers(vec![1, 2, 4]));
    assert!(matches!(ids(4), Err(EagleError::Tap { found: 5, layers: 4, .. })));
}

#[test]
fn a_missing_or_wrong_map_is_refused() {
    let without = altered("sglang", |_| {}, |name| (name != "d2t").then(|| name.to_owned()));
    let missing = matches!(without, Err(EagleError::MapMissing { draft: 24, vocabulary: 64 }));
    assert!(missing, "{without:?}");
    let swapped = |name: &str| match name {
        "d2t" => same("t2d"),
        "t2d" => same("d2t"),
        name => same(name),
    };
    let wrong = altered("sglang", |_| {}, swapped);
    assert!(matches!(wrong, Err(EagleError::Map { tensor: "d2t", .. })), "{wrong:?}");
}

#[test]
fn tensors_without_a_place_or_missing_ones_are_refused() {
    let renamed = altered("sglang", |_| {}, |name| same(&name.replace("midlayer", "middle")));
    let missing = matches!(renamed, Err(EagleError::Weights(WeightsError::Missing { .. })));
    assert!(missing, "{renamed:?}");
    let more = altered("eagle1", |_| {}, |name| same(&name.replace("fc.bias", "fc.bais")));
    match more {
        Err(EagleError::Weights(WeightsError::Unused { tensor })) => assert_eq!(tensor, "fc.bais"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_drafter_for_another_model_is_refused() {
    let vocabulary = altered(
        "speculators",
        |config| config["transformer_layer_config"]["vocab_size"] = json!(65),
        same,
    );
    let wrong = matches!(
        vocabulary,
        Err(EagleError::Target { what: "vocabulary", found: 65, expected: 64 })
    );
    assert!(wrong, "{vocabulary:?}");
    let width = altered("sglang", |config| config["target_hidden_size"] = json!(16), same);
    assert!(matches!(width, Err(EagleError::Target { found: 16, .. })), "{width:?}");
}

#[test]
fn other_drafters_are_refused_by_name() {
    let kind = altered("speculators", |c| c["speculators_model_type"] = json!("hydra"), same);
    assert!(kind.unwrap_err().to_string().contains("speculators_model_type `hydra`"));
    let class = altered("sglang", |c| c["architectures"] = json!(["OtherEagle3"]), same);
    assert!(class.unwrap_err().to_string().contains("OtherEagle3"));
}

#[test]
fn a_folder_is_known_as_a_drafter() {
    for name in NAMES {
        assert!(Eagle::is_in(&fixtures().join("eagle").join(name)), "{name}");
    }
    assert!(!Eagle::is_in(&fixtures().join("tiny/llama")));
    assert!(!Eagle::is_in(&fixtures().join("tiny")));
}
