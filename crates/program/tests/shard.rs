//! Programs over two and four ranks make the logits of one.

use std::sync::Arc;

use lathe_program::conformance::models::{GroupedStyle, SmallAttention, SmallDecoder};
use lathe_program::conformance::{Random, Schedule, SeededWeights};
use lathe_program::cost::parallel::Division;
use lathe_program::cost::{StepShape, count};
use lathe_program::reference::ReferenceBackend;
use lathe_program::shard::{ExpertSplit, ShardOptions, ShardedBackend, shard};
use lathe_program::*;
use lathe_tensor::Format;

fn reference_rank(collective: Arc<HostCollective>) -> Box<dyn Backend> {
    Box::new(ReferenceBackend::new().collective(collective))
}

/// Logits of three sequences in chunks.
fn logits(backend: &dyn Backend, program: &Program, format: Format) -> Vec<f32> {
    let options = ExecutorOptions {
        kv_blocks: 200,
        kv_format: None,
        rows_max: 16,
        threads: Some(2),
        exact: true,
    };
    let weights = SeededWeights { program, format, seed: 2 };
    let mut executor = backend.prepare(Arc::new(program.clone()), &weights, &options).unwrap();
    let mut random = Random::new(4);
    let vocabulary = program.vocabulary;
    let sequences = [30, 11, 2].map(|n| (0..n).map(|_| random.below(vocabulary) as u32).collect());
    let mut schedule = Schedule::new(program, sequences.to_vec(), 200, &mut random);
    let mut logits = Vec::new();
    while let Some(step) = schedule.random_step(16, &mut random) {
        logits.extend_from_slice(executor.run(&step).unwrap().logits);
    }
    logits
}

fn check(name: &str, decoder: &SmallDecoder, options: &ShardOptions, format: Format) {
    let program = decoder.program();
    let expected = logits(&ReferenceBackend::new(), &program, format);
    let sharded = ShardedBackend::new(options.clone(), reference_rank);
    let found = logits(&sharded, &program, format);
    assert_eq!(found.len(), expected.len());
    for (index, (e, f)) in expected.iter().zip(&found).enumerate() {
        // Sums over ranks are added in another order, through two layers.
        let close = (e - f).abs() <= 1e-4 + 1e-4 * e.abs();
        assert!(close, "{name}, {options:?}: logit {index} is {f}, expected {e}");
    }
}

#[test]
fn ranks_make_the_logits_of_one() {
    for ranks in [1, 2, 4] {
        for vocabulary in [false, true] {
            for experts in [ExpertSplit::ByExpert, ExpertSplit::ByColumn] {
                let options = ShardOptions { vocabulary, experts, ..ShardOptions::new(ranks) };
                check("mixture", &SmallDecoder::mixture(), &options, Format::F32);
            }
            let options = ShardOptions { vocabulary, ..ShardOptions::new(ranks) };
            check("grouped", &SmallDecoder::grouped(), &options, Format::F32);
            check("gated", &SmallDecoder::gated(), &options, Format::F32);
            check("latent", &SmallDecoder::latent(), &options, Format::F32);
        }
    }
}

#[test]
fn ranks_share_kv_heads_and_vocabularies_need_not_divide() {
    for (style, kv_heads) in [
        (GroupedStyle::HeadNorms, 2),
        (GroupedStyle::HeadNorms, 1),
        (GroupedStyle::RowNormsAndGates, 2),
    ] {
        let attention = SmallAttention::Grouped { style, heads: 8, kv_heads, head_dim: 16 };
        let decoder = SmallDecoder { attention, vocabulary: 97, ..SmallDecoder::grouped() };
        check("shared", &decoder, &ShardOptions::new(4), Format::F32);
    }
}

#[test]
fn heads_need_not_divide() {
    let attention = SmallAttention::Grouped {
        style: GroupedStyle::HeadNorms,
        heads: 9,
        kv_heads: 3,
        head_dim: 16,
    };
    let decoder = SmallDecoder { attention, ..SmallDecoder::mixture() };
    check("uneven", &decoder, &ShardOptions::new(2), Format::F32);
    check("uneven", &decoder, &ShardOptions::new(3), Format::F32);
    assert!(shard(&decoder.program(), &ShardOptions::new(4)).is_err());
}

#[test]
fn blocks_of_formats_stay_whole_where_they_can() {
    let format = Format::parse("q8_0").unwrap();
    for decoder in [SmallDecoder::grouped(), SmallDecoder::latent(), SmallDecoder::mixture()] {
        for alignment in [1, 32] {
            let options = ShardOptions { alignment, ..ShardOptions::new(2) };
            check("q8_0", &decoder, &options, format);
        }
    }
    let bf16 = Format::parse("bf16").unwrap();
    check("bf16", &SmallDecoder::mixture(), &ShardOptions::new(2), bf16);
}

#[test]
fn experts_of_both_kinds_are_reduced_once_a_layer() {
    let program = SmallDecoder::mixture().program();
    let ranks = shard(&program, &ShardOptions::new(2)).unwrap();
    for rank in &ranks {
        let reduces = rank.program.ops.iter().filter(|op| op.kind() == "all_reduce").count();
        // The embedding, and attention and feed-forward of two layers.
        assert_eq!(reduces, 1 + 2 * 2);
    }
    let bytes = |program: &Program| {
        let size =
            |weight: Weight| 4 * program.weight(weight).shape.iter().product::<usize>() as u64;
        count(program, &StepShape::prefill(0, 500), &size, KvFormat::F32).total
    };
    let (whole, half) = (bytes(&program), bytes(&ranks[1].program));
    let share = half.weight_bytes as f64 / whole.weight_bytes as f64;
    assert!((0.5..0.52).contains(&share), "{share}");
    assert_eq!(half.kv_write_bytes * 2, whole.kv_write_bytes);
}

#[test]
fn communication_is_counted() {
    let program = SmallDecoder::grouped().program();
    let rank = &shard(&program, &ShardOptions::new(4)).unwrap()[2];
    let shape = StepShape { ranks: 4, ..StepShape::prefill(0, 10) };
    let total = count(&rank.program, &shape, &|_| 0, KvFormat::F32).total;
    // Five sums of 10 x 64 floats, three quarters sent twice; 96 logits gathered.
    assert_eq!(total.communication_bytes, 5 * 10 * 64 * 4 * 2 * 3 / 4 + 96 * 4 * 3 / 4);
}

/// Predictions are the counter's for whole rows; for experts they are about the busiest rank.
#[test]
fn predictions_agree_with_the_counter() {
    let program = SmallDecoder::mixture().program();
    let bytes = |weight: Weight| 4 * program.weight(weight).shape.iter().product::<usize>() as u64;
    let divide = |experts| {
        let options = ShardOptions { experts, ..ShardOptions::new(2) };
        let format = |_| Ok(Format::F32);
        Division::new(&program, &options, &format, &bytes, KvFormat::F16, 64).unwrap()
    };
    let shape = StepShape { ranks: 2, ..StepShape::decode(32, 100) };
    let options = ShardOptions { experts: ExpertSplit::ByColumn, ..ShardOptions::new(2) };
    let rank = &shard(&program, &options).unwrap()[0].program;
    let size = |weight: Weight| 4 * rank.weight(weight).shape.iter().product::<usize>() as u64;
    let counted = count(rank, &shape, &size, KvFormat::F16).total;
    let (column, expert) = (divide(ExpertSplit::ByColumn), divide(ExpertSplit::ByExpert));
    let step = column.step(&shape);
    let near = |a: u64, b: u64| (a as f64 / b as f64 - 1.0).abs() < 1e-3;
    assert!(near(step.weight_bytes, counted.weight_bytes), "{step:?} {counted:?}");
    // The other rank is without the biases that are added to a sum once.
    let mean = step.weight_bytes_mean as f64 / counted.weight_bytes as f64;
    assert!((0.99..1.0).contains(&mean), "{step:?} {counted:?}");
    assert!(near(step.flops, counted.flops), "{step:?} {counted:?}");
    assert_eq!(step.kv_bytes, counted.kv_read_bytes + counted.kv_write_bytes);
    assert_eq!(step.communication.bytes(), counted.communication_bytes);
    // The embedding, attention and feed-forward of two layers, and the logits.
    assert_eq!(step.communication.collectives, 1 + 2 * 2 + 1);
    // A rank that is luckless with the router has more to do, and moves fewer rows on average.
    let whole = expert.step(&shape);
    assert!(whole.flops > step.flops && whole.flops < step.flops * 3 / 2, "{whole:?} {step:?}");
    assert!(whole.moved_bytes < step.moved_bytes, "{whole:?} {step:?}");
    // 32 rows of 64 floats: half a sum each way, and half of the rows to the other rank and back
    // where one of two of eight experts is there (1 - 4/8 3/7).
    let exchange = expert.exchange(&shape).unwrap();
    assert_eq!(exchange.reduce_scatter_bytes, 2 * 32 * 64 * 4 / 2);
    let rows = 16.0 * (1.0 - 4.0 / 8.0 * 3.0 / 7.0);
    let expected = 2.0 * 2.0 * rows * 256.0;
    assert!((exchange.all_to_all_bytes as f64 / expected - 1.0).abs() < 1e-3, "{exchange:?}");
    assert_eq!(exchange.collectives, step.communication.collectives + 2 * 2);
    assert!(column.exchange(&shape).is_none());
}

#[test]
fn what_does_not_divide_is_refused() {
    let program = SmallDecoder::grouped().program();
    let reason = |options: ShardOptions| shard(&program, &options).unwrap_err().to_string();
    assert!(reason(ShardOptions::new(6)).contains("8 heads with 4 KV heads"));
    assert!(reason(ShardOptions::new(0)).contains("start at 1"));
    let coarse = ShardOptions { alignment: 128, ..ShardOptions::new(2) };
    assert!(reason(coarse).contains("leave a rank without"));
    let ranks = shard(&program, &ShardOptions::new(2)).unwrap();
    let again = shard(&ranks[0].program, &ShardOptions::new(2)).unwrap_err();
    assert!(again.reason.contains("already"), "{again}");
}

#[test]
fn a_rank_that_fails_fails_the_step_and_not_the_process() {
    let program = SmallDecoder::grouped().program();
    let weights = SeededWeights { program: &program, format: Format::F32, seed: 2 };
    let options = ExecutorOptions {
        kv_blocks: 2,
        kv_format: None,
        rows_max: 16,
        threads: Some(1),
        exact: true,
    };
    let backend = ShardedBackend::new(ShardOptions::new(2), reference_rank);
    let mut executor = backend.prepare(Arc::new(program.clone()), &weights, &options).unwrap();
    let mut random = Random::new(4);
    let mut schedule = Schedule::new(&program, vec![vec![1; 9]], 50, &mut random);
    let step = schedule.random_step(9, &mut random).unwrap();
    let error = executor.run(&step).unwrap_err().to_string();
    assert!(error.contains("the cache has 2"), "{error}");
}
