//! Batch invariance: a row's logits have the same bits whatever else is in the step.

use std::sync::Arc;

use super::compare::{Failure, Settings, options};
use super::models::SmallDecoder;
use super::random::Random;
use super::schedule::{Chunk, Schedule};
use super::weights::SeededWeights;
use crate::backend::{Backend, BackendError};
use crate::program::Program;

/// Tokens of the longest sequence. They fill several tiles and segments of an attention that walks
/// the cache in pieces.
const TOKENS: usize = 530;
const KV_BLOCKS: usize = 1200;
const ROWS_MAX: usize = 600;

/// Runs the same sequences whole and alone, token by token, and batched in random chunks over other
/// pages, on small decoders of every kind. Compares all logits bit by bit.
///
/// # Errors
/// [`Failure`] names the first row that differs.
pub fn batch_invariance(backend: &dyn Backend, settings: &Settings) -> Result<(), Failure> {
    for (name, decoder) in [
        ("grouped", SmallDecoder::grouped()),
        ("gated", SmallDecoder::gated()),
        ("latent", SmallDecoder::latent()),
        ("mixture", SmallDecoder::mixture()),
        // With the room for trees, two of the sequences are long.
        ("long rope", SmallDecoder::grouped().long_rope_after(110)),
    ] {
        let decoder = decoder.fitting(settings.format.block_len());
        let failure = |reason| Failure { case: format!("batch invariance, {name}"), reason };
        check(backend, settings, decoder.program()).map_err(failure)?;
    }
    Ok(())
}

/// Logits by sequence and position.
type Logits = Vec<Vec<Vec<u32>>>;

fn check(backend: &dyn Backend, settings: &Settings, program: Program) -> Result<(), String> {
    let mut random = Random::new(11);
    let sequences: Vec<Vec<u32>> = [TOKENS, 1, 37, 70]
        .iter()
        .map(|n| (0..*n).map(|_| random.below(program.vocabulary) as u32).collect())
        .collect();
    let runner = Runner { backend, settings, program: Arc::new(program), sequences };
    let alone = runner.run(1, &mut |schedule, _| {
        let open = (0..4).find(|index| schedule.left(*index) > 0)?;
        Some(vec![Chunk { sequence: open, rows: schedule.left(open), tree: None }])
    })?;
    let decoded = runner.run(2, &mut |schedule, _| {
        let open = (0..4).filter(|index| schedule.left(*index) > 0);
        let chunks: Vec<Chunk> =
            open.map(|sequence| Chunk { sequence, rows: 1, tree: None }).collect();
        (!chunks.is_empty()).then_some(chunks)
    })?;
    differ(&alone, &decoded).map_or(Ok(()), |at| Err(format!("token by token: {at}")))?;
    for seed in 3..6 {
        let chunked = runner.run(seed, &mut |schedule, random| {
            let mut open: Vec<usize> = (0..4).filter(|index| schedule.left(*index) > 0).collect();
            random.shuffle(&mut open);
            let chunk = |sequence: usize, random: &mut Random| Chunk {
                sequence,
                rows: random.between(1, schedule.left(sequence).min(90)),
                tree: None,
            };
            let chunks: Vec<Chunk> = open.into_iter().map(|s| chunk(s, random)).collect();
            (!chunks.is_empty()).then_some(chunks)
        })?;
        differ(&alone, &chunked).map_or(Ok(()), |at| Err(format!("chunked by {seed}: {at}")))?;
    }
    Ok(())
}

struct Runner<'a> {
    backend: &'a dyn Backend,
    settings: &'a Settings,
    program: Arc<Program>,
    sequences: Vec<Vec<u32>>,
}

impl Runner<'_> {
    /// Runs all sequences in the chunks that `next` returns. `seed` gives the order of the pages.
    fn run(
        &self,
        seed: u64,
        next: &mut dyn FnMut(&Schedule<'_>, &mut Random) -> Option<Vec<Chunk>>,
    ) -> Result<Logits, String> {
        let (program, format) = (&*self.program, self.settings.format);
        let weights = SeededWeights { program, format, seed: 5 };
        let options = options(self.settings, KV_BLOCKS, ROWS_MAX);
        let text = |error: BackendError| error.to_string();
        let prepared = self.backend.prepare(Arc::clone(&self.program), &weights, &options);
        let mut executor = prepared.map_err(text)?;
        let mut random = Random::new(seed);
        let sequences = self.sequences.clone();
        let mut schedule = Schedule::new(program, sequences, KV_BLOCKS, &mut random);
        let mut logits: Logits = vec![Vec::new(); self.sequences.len()];
        while let Some(chunks) = next(&schedule, &mut random) {
            let step = schedule.step(&chunks);
            let output = executor.run(&step).map_err(text)?;
            let mut rows = output.logits.chunks_exact(program.vocabulary);
            for chunk in &chunks {
                for row in rows.by_ref().take(chunk.rows) {
                    logits[chunk.sequence].push(row.iter().map(|x| x.to_bits()).collect());
                }
            }
        }
        Ok(logits)
    }
}

/// The first row whose bits differ.
fn differ(expected: &Logits, found: &Logits) -> Option<String> {
    for (sequence, (expected, found)) in expected.iter().zip(found).enumerate() {
        for (position, (e, f)) in expected.iter().zip(found).enumerate() {
            if let Some(token) = (0..e.len()).find(|token| e[*token] != f[*token]) {
                let [e, f] = [e[token], f[token]].map(f32::from_bits);
                return Some(format!(
                    "sequence {sequence}, position {position}, token {token}: {f} is not {e}"
                ));
            }
        }
        if expected.len() != found.len() {
            return Some(format!("sequence {sequence}: {} rows", found.len()));
        }
    }
    None
}
