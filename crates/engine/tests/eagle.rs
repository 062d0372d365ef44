//! The EAGLE drafter on the reference backend, with the drafters of `tests/fixtures/make_eagle.py`:
//! its trees hold what the reference modelling drafts, and no text changes by them.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use lathe_engine::{
    DraftText, DraftTree, Drafter, EagleDrafter, Engine, EngineConfig, Event, Request, RequestId,
    Sampling, Stats, TokenLogprobs,
};
use lathe_model::Model;
use lathe_model::eagle::Eagle;
use lathe_model::lower::{LowerOptions, lower};
use lathe_program::reference::ReferenceBackend;
use lathe_program::{
    Backend, BackendError, BlockTable, Choice, Executor, ExecutorOptions, Program, SequenceId,
    Step, StepSequence, TokenSource, WeightSource, replace_tables,
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::Value;

const NAMES: [&str; 5] = ["sglang", "sglang-norm", "speculators", "speculators-norms", "eagle1"];
const CONTEXT: usize = 64;

fn fixtures() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures"))
}

fn target() -> Model {
    Model::open(&fixtures().join("tiny/llama")).unwrap()
}

fn eagle(name: &str, target: &Model) -> Eagle {
    Eagle::open(&fixtures().join("eagle").join(name), &target.spec).unwrap()
}

fn prepare(
    program: &Arc<Program>,
    weights: &dyn WeightSource,
    (rows_max, kv_blocks): (usize, usize),
) -> Box<dyn Executor> {
    let options =
        ExecutorOptions { kv_blocks, kv_format: None, rows_max, threads: Some(1), exact: true };
    ReferenceBackend::new().prepare(Arc::clone(program), weights, &options).unwrap()
}

/// The model with the taps of `eagle`.
fn tapped(target: &Model, eagle: &Eagle, sizes: (usize, usize)) -> Box<dyn Executor> {
    let options = eagle.taps().into_options(LowerOptions::new(CONTEXT));
    let program = Arc::new(lower(&target.spec, &options).unwrap());
    prepare(&program, &target.weights(&program).unwrap(), sizes)
}

fn drafter(target: &Model, eagle: &Eagle, sizes: (usize, usize)) -> EagleDrafter {
    let program = Arc::new(eagle.program(&LowerOptions::new(CONTEXT)).unwrap());
    let weights = eagle.weights(&program, target).unwrap();
    let executor = prepare(&program, &weights, sizes);
    EagleDrafter::new(executor, eagle.embedding(target).unwrap(), eagle.tokens().to_vec())
}

/// The taps of a text's rows, side by side.
fn features(executor: &mut dyn Executor, tokens: &[u32]) -> Vec<f32> {
    let (id, rows) = (SequenceId(0), tokens.len());
    let step = Step {
        tokens: tokens.iter().map(|token| TokenSource::Given(*token)).collect(),
        positions: (0..rows as u32).collect(),
        sequences: vec![StepSequence {
            id,
            first_row: 0,
            rows: rows as u32,
            cached: 0,
            expanded: 0,
            long_rope: false,
            ancestors: None,
        }],
        tables: replace_tables(id, &[BlockTable { first: 0, blocks: (0..4).collect() }]),
        choices: vec![Choice::logits_of(0)],
        ..Step::default()
    };
    let made = executor.run(&step).unwrap();
    let mut all = Vec::new();
    for row in 0..rows {
        for tap in &made.captures {
            let width = tap.len() / rows;
            all.extend_from_slice(&tap[row * width..(row + 1) * width]);
        }
    }
    all
}

#[test]
fn a_tree_holds_the_reference_chain() {
    let target = target();
    let mut deepest = 0;
    for name in NAMES {
        let eagle = eagle(name, &target);
        let golden = fs::read_to_string(fixtures().join("eagle").join(name).join("golden.json"));
        let golden: Value = serde_json::from_str(&golden.unwrap()).unwrap();
        let list = |key: &str| -> Vec<u32> {
            let ids = golden[key].as_array().unwrap().iter();
            ids.map(|id| id.as_u64().unwrap() as u32).collect()
        };
        let (tokens, drafted) = (list("tokens"), list("drafted"));
        let mut model = tapped(&target, &eagle, (CONTEXT, 8));
        let rows = features(&mut *model, &tokens);
        let width = rows.len() / tokens.len();
        // However the features come: at once, in two parts, or a part of them twice.
        for (cuts, rows_max) in
            [(vec![(0, 13)], 64), (vec![(0, 5), (5, 13)], 5), (vec![(0, 9), (4, 13)], 7)]
        {
            let mut drafter = drafter(&target, &eagle, (rows_max, 8));
            for (start, end) in cuts {
                let part = &rows[start * width..end * width];
                drafter.features(RequestId(0), start, part);
            }
            let text = DraftText {
                request: RequestId(0),
                tokens: &tokens,
                sampling: Sampling::default(),
                nodes_max: DraftTree::NODES_MAX,
                depth_max: 4,
                probability_min: 1e-6,
                step_seconds: 1e9,
            };
            // A tree that was not verified is made again.
            for _ in 0..2 {
                let mut trees = [DraftTree::default()];
                drafter.propose(&[text], &mut trees).unwrap();
                let tree = &trees[0];
                assert_eq!(tree.child(None, drafted[0]), Some(0), "{name}: the best comes first");
                // Children come in the order of their probabilities.
                let (mut node, mut depth) = (Some(0), 1);
                while let Some(best) = (0..tree.len()).find(|it| tree.parent(*it) == node) {
                    assert_eq!(tree.token(best), drafted[depth], "{name}: {tree:?}");
                    (node, depth) = (Some(best), depth + 1);
                }
                assert!(depth > 1, "{name}: {tree:?}");
                deepest = deepest.max(depth);
            }
        }
    }
    assert!(deepest > 2, "rows that read drafted rows");
}

/// Drafts trees whatever they cost.
struct Eager(EagleDrafter);

impl Drafter for Eager {
    fn propose(
        &mut self,
        texts: &[DraftText<'_>],
        trees: &mut [DraftTree],
    ) -> Result<(), BackendError> {
        let mut texts = texts.to_vec();
        for text in &mut texts {
            (text.probability_min, text.step_seconds) = (1e-6, 1e9);
            text.depth_max = text.depth_max.min(3);
        }
        self.0.propose(&texts, trees)
    }

    fn reads_features(&self) -> bool {
        self.0.reads_features()
    }

    fn features(&mut self, request: RequestId, first: usize, rows: &[f32]) {
        self.0.features(request, first, rows);
    }

    fn forget(&mut self, request: RequestId) {
        self.0.forget(request);
    }
}

fn requests() -> Vec<Request> {
    let mut random = ChaCha8Rng::seed_from_u64(3);
    let shared: Vec<u32> = (0..20).map(|_| random.random_range(0..64)).collect();
    let request = |index: u64| {
        let mut prompt = shared[..random.random_range(0..20)].to_vec();
        prompt.extend((0..random.random_range(1..12)).map(|_| random.random_range(0..64u32)));
        let temperature = [0.0, 0.0, 0.7, 1.2][index as usize % 4];
        let sampling = Sampling { temperature, seed: index, ..Sampling::default() };
        let max_tokens = Some(random.random_range(2..28));
        Request { prompt, sampling, max_tokens, logprobs: Some(2), ..Request::default() }
    };
    (0..10).map(request).collect()
}

type Text = Vec<(u32, Option<TokenLogprobs>)>;

/// Serves the requests twice, so that the second time finds what the first left.
fn serve(mut engine: Engine) -> (BTreeMap<RequestId, Text>, Stats) {
    let mut texts = BTreeMap::<RequestId, Text>::new();
    for _ in 0..2 {
        for request in requests() {
            engine.add(request, None).unwrap();
        }
        while !engine.is_idle() {
            for event in engine.step().unwrap() {
                if let Event::Token { request, token, logprobs, .. } = event {
                    texts.entry(request).or_default().push((token, logprobs));
                }
            }
            engine.validate();
        }
    }
    (texts, engine.stats())
}

#[test]
fn an_eagle_drafter_changes_no_text() {
    let target = target();
    let mut accepted = 0;
    for (index, name) in NAMES.into_iter().enumerate() {
        let eagle = eagle(name, &target);
        // Few pages preempt, few rows cut prompts into chunks.
        let sizes = [(64, 40), (12, 40), (24, 7), (64, 12), (30, 9)][index];
        let config = EngineConfig { sequences_max: 4, ..EngineConfig::default() };
        let engine = || Engine::new(tapped(&target, &eagle, sizes), config.clone()).unwrap();
        let (plain, _) = serve(engine());
        let eager = Eager(drafter(&target, &eagle, (24, 20)));
        let (drafted, stats) = serve(engine().with_drafter(Box::new(eager), 20));
        assert_eq!(plain, drafted, "{name}");
        assert!(stats.drafted_tokens > 100, "{name}: {stats:?}");
        accepted += stats.accepted_tokens;
        assert!(stats.prefix_hit_tokens > 0, "{name}: {stats:?}");
        assert!(index != 2 || stats.preemptions > 0, "{name}: {stats:?}");
    }
    assert!(accepted > 20, "{accepted} nodes were accepted");
}

#[test]
fn a_drafter_that_is_never_right_drafts_no_more() {
    let target = target();
    let eagle = eagle("sglang", &target);
    let mut model = tapped(&target, &eagle, (CONTEXT, 8));
    let tokens: Vec<u32> = (0..16).collect();
    let rows = features(&mut *model, &tokens);
    let mut drafter = drafter(&target, &eagle, (CONTEXT, 8));
    drafter.features(RequestId(0), 0, &rows);
    let text = DraftText {
        request: RequestId(0),
        tokens: &tokens,
        sampling: Sampling::default(),
        nodes_max: 16,
        depth_max: 4,
        probability_min: 0.05,
        step_seconds: 1e9,
    };
    let mut sizes = Vec::new();
    for _ in 0..400 {
        let mut trees = [DraftTree::default()];
        drafter.propose(&[text], &mut trees).unwrap();
        drafter.observe(RequestId(0), &trees[0], 0);
        sizes.push(trees[0].len());
    }
    let drafting =
        |range: std::ops::Range<usize>| sizes[range].iter().filter(|it| **it > 0).count();
    assert!(sizes[0] > 0 && drafting(50..400) < 40, "{sizes:?}");
    // It is tried again now and then, for texts change.
    assert!(drafting(50..400) > 0, "{sizes:?}");
}
