//! Programs that are divided over ranks make the logits of one rank, in every format whose rows can
//! be cut. A rank that fails makes the step fail.

use std::sync::Arc;

use lathe_cpu::{CpuBackend, CpuOptions};
use lathe_program::conformance::models::{GroupedStyle, SmallAttention, SmallDecoder};
use lathe_program::conformance::{Random, Schedule, SeededWeights};
use lathe_program::shard::{ExpertSplit, RankWeights, ShardOptions, ShardedBackend, shard};
use lathe_program::{
    Backend, BackendError, CollectiveError, Executor, ExecutorOptions, HostCollective, Program,
    Step, ThreadRank, WeightSource,
};
use lathe_tensor::{Format, GgmlType};

const KV_BLOCKS: usize = 200;
const ROWS: usize = 16;

fn backend() -> CpuBackend {
    CpuBackend::new(CpuOptions::default())
}

fn rank(end: Arc<HostCollective>) -> Box<dyn Backend> {
    Box::new(backend().collective(end))
}

fn options(exact: bool) -> ExecutorOptions {
    let (kv_blocks, rows_max) = (KV_BLOCKS, ROWS);
    ExecutorOptions { kv_blocks, kv_format: None, rows_max, threads: Some(2), exact }
}

/// Steps of three sequences in chunks.
fn steps(program: &Program) -> Vec<Step> {
    let mut random = Random::new(4);
    let sequences =
        [30, 11, 2].map(|n| (0..n).map(|_| random.below(program.vocabulary) as u32).collect());
    let mut schedule = Schedule::new(program, sequences.to_vec(), KV_BLOCKS, &mut random);
    std::iter::from_fn(|| schedule.random_step(ROWS, &mut random)).collect()
}

fn logits(executor: &mut dyn Executor, steps: &[Step]) -> Vec<f32> {
    steps.iter().flat_map(|step| executor.run(step).expect("it runs").logits.to_vec()).collect()
}

/// Compares `ranks` with one, for weights in `format`.
fn check(name: &str, decoder: &SmallDecoder, options: &ShardOptions, format: Format, exact: bool) {
    let program = Arc::new(decoder.program());
    let weights = SeededWeights { program: &program, format, seed: 2 };
    let steps = steps(&program);
    let prepare = |backend: &dyn Backend| {
        let prepared = backend.prepare(Arc::clone(&program), &weights, &self::options(exact));
        prepared.unwrap_or_else(|error| panic!("{name} in {format}, {options:?}: {error}"))
    };
    let expected = logits(&mut *prepare(&backend()), &steps);
    let found = logits(&mut *prepare(&ShardedBackend::new(options.clone(), rank)), &steps);
    assert_eq!(found.len(), expected.len());
    // Ranks add in another order. Numbers that are rounded on the way may be rounded differently.
    let tolerance = if exact { 2e-4 } else { 3e-2 };
    for (index, (e, f)) in expected.iter().zip(&found).enumerate() {
        let close = (e - f).abs() <= tolerance * (1.0 + e.abs());
        assert!(close, "{name} in {format}, {options:?}: logit {index} is {f}, expected {e}");
    }
}

fn splits(ranks: usize) -> [ShardOptions; 2] {
    [ExpertSplit::ByExpert, ExpertSplit::ByColumn]
        .map(|experts| ShardOptions { experts, ..ShardOptions::new(ranks) })
}

#[test]
fn ranks_make_the_logits_of_one() {
    for ranks in [2, 3, 4] {
        for options in splits(ranks) {
            for (vocabulary, exact) in [(false, true), (true, true), (true, false)] {
                let options = ShardOptions { vocabulary, ..options.clone() };
                check("mixture", &SmallDecoder::mixture(), &options, Format::BF16, exact);
            }
        }
        for exact in [true, false] {
            let options = ShardOptions::new(ranks);
            check("latent", &SmallDecoder::latent(), &options, Format::BF16, exact);
            check("grouped", &SmallDecoder::grouped(), &options, Format::BF16, exact);
            // Norms over all heads gather whole rows, which uneven parts cannot do.
            if ranks != 3 {
                check("gated", &SmallDecoder::gated(), &options, Format::BF16, exact);
            }
        }
    }
}

#[test]
fn kv_heads_are_shared_and_vocabularies_need_not_divide() {
    for (style, kv_heads) in [
        (GroupedStyle::HeadNorms, 2),
        (GroupedStyle::HeadNorms, 1),
        (GroupedStyle::RowNormsAndGates, 2),
    ] {
        let attention = SmallAttention::Grouped { style, heads: 8, kv_heads, head_dim: 16 };
        let decoder = SmallDecoder { attention, vocabulary: 97, ..SmallDecoder::grouped() };
        for exact in [true, false] {
            check("shared", &decoder, &ShardOptions::new(4), Format::BF16, exact);
        }
    }
}

/// A decoder whose rows have two blocks of 256 for each of two ranks.
fn wide() -> SmallDecoder {
    let attention = SmallAttention::Grouped {
        style: GroupedStyle::HeadNorms,
        heads: 8,
        kv_heads: 4,
        head_dim: 64,
    };
    let experts = Some((4, 2));
    SmallDecoder {
        attention,
        experts,
        layers: 1,
        width: 256,
        hidden: 512,
        ..SmallDecoder::mixture()
    }
}

#[test]
fn every_format_is_cut_at_its_blocks() {
    let scaled = [
        "int8-channel-f32",
        "int8-g32-f16",
        "int8-g128-f16",
        "int4-channel-f32",
        "int4-g32-f16",
        "int4-g64-bf16-asym",
        "int4-g128-f32",
        "mxfp4",
        "nvfp4",
    ];
    let ggml = GgmlType::ALL.map(Format::Ggml);
    let scaled = scaled.map(|name| Format::parse(name).expect("a format"));
    for format in ggml.into_iter().chain(scaled).chain([Format::F16, Format::F32]) {
        for options in splits(2) {
            check("wide", &wide(), &options, format, true);
        }
    }
}

#[test]
fn blocks_are_never_cut_and_never_become_floats() {
    // Heads have 16 elements. Four heads a rank end within a block of 256.
    let attention = SmallAttention::Grouped {
        style: GroupedStyle::HeadNorms,
        heads: 16,
        kv_heads: 4,
        head_dim: 16,
    };
    let decoder = SmallDecoder { attention, experts: None, ..wide() };
    let program = Arc::new(decoder.program());
    let prepare = |ranks: usize, format: &str| {
        let format = Format::parse(format).expect("a format");
        let weights = SeededWeights { program: &program, format, seed: 2 };
        ShardedBackend::new(ShardOptions::new(ranks), rank).prepare(
            Arc::clone(&program),
            &weights,
            &options(true),
        )
    };
    let Err(BackendError::Shard(error)) = prepare(2, "q4_k") else { panic!("it was cut") };
    let text = error.to_string();
    let expected = "columns 0..128 of layers.0.attention.output cut a block of 256";
    assert!(text.contains(expected), "{text}");
    // Hidden elements are cut at the borders of blocks: 512 in blocks of 256 are two parts.
    assert!(prepare(2, "q8_0").is_ok());
    // Groups with scales of their own become smaller. The bytes of codes stay the same.
    let whole = {
        let format = Format::parse("int8-g256-f32").expect("a format");
        let weights = SeededWeights { program: &program, format, seed: 2 };
        backend().prepare(Arc::clone(&program), &weights, &options(true)).expect("it prepares")
    };
    let divided = prepare(2, "int8-g256-f32").expect("it prepares");
    let share = divided.weight_bytes() as f64 / whole.weight_bytes() as f64;
    assert!((0.95..1.05).contains(&share), "{share}");
    check(
        "grouped",
        &decoder,
        &ShardOptions::new(2),
        Format::parse("int8-g256-f32").unwrap(),
        true,
    );
}

#[test]
fn a_program_of_another_rank_is_refused() {
    let program = SmallDecoder::gated().program();
    let ranks = shard(&program, &ShardOptions::new(2)).expect("it divides");
    let source = SeededWeights { program: &program, format: Format::F32, seed: 2 };
    let prepare = |backend: CpuBackend, rank: usize| {
        let rank = &ranks[rank];
        let weights = RankWeights { source: &source, rank };
        backend.prepare(Arc::new(rank.program.clone()), &weights, &options(true)).err()
    };
    let alone = prepare(backend(), 0).expect("it is refused").to_string();
    assert!(alone.contains("not that of rank 0 of 1"), "{alone}");
    let three: Vec<Arc<HostCollective>> =
        ThreadRank::group(3, 3).into_iter().map(|end| Arc::new(end) as _).collect();
    let error = prepare(backend().collective(Arc::clone(&three[1])), 1).expect("it is refused");
    assert!(matches!(error, BackendError::Collective(CollectiveError::Program { .. })), "{error}");
}

#[test]
fn a_rank_that_fails_fails_the_step_and_all_later_ones() {
    let program = Arc::new(SmallDecoder::grouped().program());
    let weights = SeededWeights { program: &program, format: Format::F32, seed: 2 };
    let sharded = ShardedBackend::new(ShardOptions::new(2), rank);
    let small = ExecutorOptions { kv_blocks: 2, ..options(true) };
    let mut executor = sharded.prepare(Arc::clone(&program), &weights, &small).expect("prepares");
    let mut random = Random::new(4);
    let mut schedule = Schedule::new(&program, vec![vec![1; 9]], 50, &mut random);
    let step = schedule.random_step(9, &mut random).expect("a step");
    let error = executor.run(&step).unwrap_err().to_string();
    assert!(error.contains("the cache has 2"), "{error}");
    assert!(executor.run(&step).is_err());
}

#[test]
fn a_rank_whose_partner_is_gone_says_so() {
    let program = SmallDecoder::grouped().program();
    let ranks = shard(&program, &ShardOptions::new(2)).expect("it divides");
    let source = SeededWeights { program: &program, format: Format::F32, seed: 2 };
    let mut group = ThreadRank::group(2, 2);
    let (gone, end) = (group.pop().expect("rank 1"), group.pop().expect("rank 0"));
    let backend = backend().collective(Arc::new(end));
    let weights: &dyn WeightSource = &RankWeights { source: &source, rank: &ranks[0] };
    let mut executor = backend
        .prepare(Arc::new(ranks[0].program.clone()), weights, &options(true))
        .expect("prepares");
    drop(gone);
    let error = executor.run(&steps(&program)[0]).unwrap_err();
    assert!(matches!(error, BackendError::Collective(CollectiveError::Gone(1))), "{error}");
}
