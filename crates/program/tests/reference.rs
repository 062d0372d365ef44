//! The reference against itself: batch invariance, both forms of latent attention, cache formats.

use std::sync::Arc;

use lathe_program::conformance::models::SmallDecoder;
use lathe_program::conformance::{
    Case, SeededWeights, Settings, Summary, Tolerance, batch_invariance, cases, check, check_case,
    choices, trees,
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
    assert_eq!(report.cases, 15 * 12);
    assert!(report.unsupported.is_empty());
}

#[test]
fn choices_are_those_of_the_sampler_with_steps_in_flight() {
    let settings = Settings { seeds: 4, ..Settings::default() };
    for steps in [1, 2] {
        choices(&ReferenceBackend::new().steps_in_flight(steps), &settings).unwrap();
    }
}

/// The reference adds up what a row sees in the order of slots, which is that of positions in a
/// chain and in an accepted branch alike: all bits are those of plain decoding.
#[test]
fn trees_are_plain_decoding_to_the_bit() {
    let exact = Tolerance { absolute: 0.0, relative: 0.0 };
    for form in [LatentForm::Expanded, LatentForm::Absorbed] {
        let backend = ReferenceBackend::new().latent_form(form);
        let settings = Settings { tolerance: exact, seeds: 2, ..Settings::default() };
        trees(&backend, &settings).unwrap();
    }
    for kv_format in KvFormat::ALL {
        let settings = Settings { kv_format, tolerance: exact, seeds: 1, ..Settings::default() };
        trees(&ReferenceBackend::new(), &settings).unwrap();
    }
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
    let mut report = Summary::default();
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
    let id = SequenceId(0);
    let extend = |group| TableChange::Extend {
        sequence: id,
        group,
        pages: (0..blocks).map(|b| b * groups + group).collect(),
    };
    let clear = TableChange::Clear { sequence: id };
    Step {
        tokens: (0..rows).map(|i| TokenSource::Given(i * 7 % 90)).collect(),
        positions: (0..rows).collect(),
        sequences: vec![StepSequence {
            id,
            first_row: 0,
            rows,
            cached: 0,
            expanded: 0,
            long_rope: false,
            ancestors: None,
        }],
        tables: [clear].into_iter().chain((0..groups).map(extend)).collect(),
        choices: (0..rows).map(Choice::logits_of).collect(),
        inputs: Vec::new(),
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
