//! The reference against itself: batch invariance, both forms of latent attention, cache formats.

use std::sync::Arc;

use lathe_program::conformance::models::SmallDecoder;
use lathe_program::conformance::{
    Case, Report, SeededWeights, Settings, Tolerance, batch_invariance, cases, check, check_case,
};
use lathe_program::reference::{LatentForm, ReferenceBackend};
use lathe_program::*;
use lathe_tensor::Format;

#[test]
fn every_case_runs_and_agrees_with_itself() {
    let exact = Tolerance { absolute: 0.0, relative: 0.0 };
    let settings = Settings { tolerance: exact, ..Settings::default() };
    let settings = Settings { tolerance: Tolerance { absolute: 1e-30, ..exact }, ..settings };
    let report = check(&ReferenceBackend::new(), &settings).unwrap();
    assert_eq!(report.cases, 14 * 12);
    assert!(report.unsupported.is_empty());
}

#[test]
fn block_formats_run() {
    for name in ["bf16", "q4_0", "q8_0", "q6_k"] {
        let format = Format::parse(name).unwrap();
        let settings = Settings { format, seeds: 1, ..Settings::default() };
        check(&ReferenceBackend::new(), &settings).unwrap();
    }
}

#[test]
fn rows_do_not_depend_on_the_batch() {
    for kv_format in [KvFormat::F32, KvFormat::Int4] {
        let settings = Settings { kv_format, ..Settings::default() };
        batch_invariance(&ReferenceBackend::new(), &settings).unwrap();
    }
}

#[test]
fn latent_attention_agrees_absorbed_and_expanded() {
    let absorbed = ReferenceBackend::new().latent_form(LatentForm::Absorbed);
    let settings = Settings::default();
    let mut report = Report::default();
    let latent = |case: &Case| case.name.starts_with("attend_latent");
    for case in cases(30, 1).iter().filter(|case| latent(case)) {
        check_case(&absorbed, &settings, case, &mut report).unwrap();
    }
    assert_eq!(report.cases, 30);
    assert!(report.worst > 0.0);
    batch_invariance(&absorbed, &settings).unwrap();
}

fn executor(program: &Program, options: &ExecutorOptions) -> Box<dyn Executor> {
    let weights = SeededWeights { program, format: Format::F32, seed: 3 };
    let program = Arc::new(program.clone());
    ReferenceBackend::new().prepare(program, &weights, options).unwrap()
}

fn options(kv_format: KvFormat) -> ExecutorOptions {
    ExecutorOptions {
        kv_blocks: 64,
        kv_format: Some(kv_format),
        rows_max: 32,
        threads: Some(2),
        exact: true,
    }
}

/// One sequence of `rows` new tokens.
fn step(program: &Program, rows: u32) -> Step {
    let groups = program.kv.groups.len() as u32;
    let blocks = rows.div_ceil(program.kv.block_tokens as u32);
    let table =
        |group| BlockTable { first: 0, blocks: (0..blocks).map(|b| b * groups + group).collect() };
    let tables = (0..groups).map(table).collect();
    let sequence =
        StepSequence { first_row: 0, rows, cached: 0, tables, expanded: 0, ancestors: None };
    Step {
        tokens: (0..rows).map(|i| i * 7 % 90).collect(),
        positions: (0..rows).collect(),
        sequences: vec![sequence],
        logits_rows: (0..rows).collect(),
    }
}

#[test]
fn a_tree_that_is_a_chain_is_causal_and_branches_do_not_see_each_other() {
    let program = SmallDecoder::grouped().program();
    let causal = step(&program, 6);
    let mut chain = causal.clone();
    chain.sequences[0].ancestors = Some((0..6).map(|i| (2u64 << i) - 1).collect());
    let run = |step: &Step| {
        executor(&program, &options(KvFormat::F32)).run(step).unwrap().logits.to_vec()
    };
    let expected = run(&causal);
    assert_eq!(run(&chain), expected);
    // Rows 0, 1, 2 and 0, 3, 4 are two branches; the second repeats the first's tokens.
    let mut tree = step(&program, 5);
    tree.tokens[3..5].copy_from_slice(&causal.tokens[1..3]);
    tree.positions = vec![0, 1, 2, 1, 2];
    tree.sequences[0].ancestors = Some(vec![0b1, 0b11, 0b111, 0b1001, 0b11001]);
    let found = run(&tree);
    let n = program.vocabulary;
    assert_eq!(found[..3 * n], expected[..3 * n]);
    assert_eq!(found[3 * n..], expected[n..3 * n]);
}

#[test]
fn coarser_caches_change_logits_a_little() {
    for decoder in [SmallDecoder::grouped(), SmallDecoder::latent()] {
        let program = decoder.program();
        let step = step(&program, 20);
        let run = |format| executor(&program, &options(format)).run(&step).unwrap().logits.to_vec();
        let expected = run(KvFormat::F32);
        let error = |format| {
            let found = run(format);
            let squares = expected.iter().zip(&found).map(|(a, b)| (a - b).powi(2));
            (squares.sum::<f32>() / expected.len() as f32).sqrt()
        };
        let errors = KvFormat::ALL.map(error);
        assert_eq!(errors[0], 0.0);
        assert!(errors[1..].iter().all(|error| (1e-6..0.5).contains(error)), "{errors:?}");
        let [_, f16, bf16, int16, fp8, int8, int4] = errors;
        assert!(int16 < f16 && f16 < bf16 && bf16 < fp8 && int8 < int4, "{errors:?}");
    }
}

#[derive(Default)]
struct Recorder {
    kinds: Vec<&'static str>,
    expert_rows: usize,
    routed: usize,
}

impl Observer for Recorder {
    fn op(&mut self, index: usize, op: &Op, inputs: &[ObservedInput<'_>]) {
        assert_eq!(index, self.kinds.len());
        assert_eq!(inputs.len(), op.inputs().count());
        assert!(inputs.iter().all(|input| input.data.len() == 9 * input.width));
        self.kinds.push(op.kind());
    }

    fn routing(&mut self, _: usize, _: &Op, routing: ObservedRouting<'_>) {
        assert_eq!(routing.experts.len(), 9 * routing.experts_per_token);
        self.routed += routing.weights.len();
    }

    fn expert(&mut self, _: usize, _: &Op, expert: ObservedExpert<'_>) {
        assert_eq!(expert.input.len(), expert.rows.len() * 64);
        assert_eq!(expert.hidden.len(), expert.rows.len() * 64);
        self.expert_rows += expert.rows.len();
    }
}

#[test]
fn observers_see_every_op_and_change_nothing() {
    let program = SmallDecoder::mixture().program();
    let step = step(&program, 9);
    let mut executor = executor(&program, &options(KvFormat::F32));
    let expected = executor.run(&step).unwrap().logits.to_vec();
    let mut recorder = Recorder::default();
    let found = executor.run_observed(&step, &mut recorder).unwrap().logits.to_vec();
    assert_eq!(found, expected);
    let kinds: Vec<&str> = program.ops.iter().map(Op::kind).collect();
    assert_eq!(recorder.kinds, kinds);
    assert_eq!((recorder.routed, recorder.expert_rows), (2 * 9 * 2, 2 * 9 * 2));
}

#[test]
fn wrong_weights_and_steps_are_refused() {
    let program = SmallDecoder::grouped().program();
    let mut other = program.clone();
    other.weights[0].shape[0] += 1;
    let weights = SeededWeights { program: &other, format: Format::F32, seed: 3 };
    let options = options(KvFormat::F32);
    let prepared = ReferenceBackend::new().prepare(Arc::new(program.clone()), &weights, &options);
    assert!(matches!(prepared.err(), Some(BackendError::Weight { .. })));
    let mut executor = executor(&program, &options);
    let error = executor.run(&step(&program, 33)).unwrap_err().to_string();
    assert!(error.contains("33 rows"), "{error}");
}
