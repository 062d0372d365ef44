//! Log-probabilities of given tokens, in chunks, so that memory stays bounded.

use lathe_program::{BackendError, Executor, ExecutorOptions, Step, StepSequence};

use crate::kv::{KvCache, SequenceBlocks};
use crate::math;

/// Logits held at a time at most, as numbers; a step has fewer rows if the vocabulary is large.
const LOGITS_MAX: usize = 1 << 24;

/// Why tokens could not be scored.
#[derive(Debug, thiserror::Error)]
pub enum ScoreError {
    /// Nothing to score.
    #[error("{found} tokens were given, expected at least {expected}")]
    TooFewTokens {
        /// Tokens given.
        found: usize,
        /// Tokens needed.
        expected: usize,
    },
    /// A token id that the model does not have.
    #[error("token {token} at position {position} is outside the vocabulary of {vocabulary}")]
    TokenOutOfRange {
        /// The id.
        token: u32,
        /// Where.
        position: usize,
        /// Ids that exist: `0..vocabulary`.
        vocabulary: usize,
    },
    /// More tokens than the context or the cache holds.
    #[error("{tokens} tokens were given, context and cache hold {length_max}")]
    TooLong {
        /// Tokens given.
        tokens: usize,
        /// Tokens that fit.
        length_max: usize,
    },
    /// The executor failed.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// The executor returned logits of another shape.
    #[error("the executor returned {found} logits, expected {expected}")]
    Logits {
        /// Numbers returned.
        found: usize,
        /// Rows asked for times vocabulary.
        expected: usize,
    },
}

/// Tokens with their log-probabilities.
#[derive(Debug, Clone, PartialEq)]
pub struct Score {
    /// Natural log-probability of each token but the first, given all before it.
    pub logprobs: Vec<f64>,
    /// Best tokens after the last position with their logits, best first, ties by lower id.
    pub top: Vec<(u32, f32)>,
}

impl Score {
    /// Mean negative log-probability, in nats; NaN without tokens to score.
    pub fn mean_nll(&self) -> f64 {
        -self.logprobs.iter().sum::<f64>() / self.logprobs.len() as f64
    }
}

/// Scores `tokens` from an empty cache; `options` are those that the executor was prepared with.
/// The cache's contents are overwritten: not for an executor that an engine owns.
pub fn score(
    executor: &mut dyn Executor,
    options: &ExecutorOptions,
    tokens: &[u32],
    top_k: usize,
) -> Result<Score, ScoreError> {
    let mut logprobs = Vec::with_capacity(tokens.len());
    let mut top = Vec::new();
    let mut feed = Feed::new(executor, options, tokens)?;
    while let Some((first, logits)) = feed.next(executor)? {
        for (position, row) in (first..).zip(logits.chunks_exact(feed.vocabulary)) {
            match tokens.get(position + 1) {
                Some(&next) => logprobs.push(logprob(row, next)),
                None => math::top(row, top_k, &mut top),
            }
        }
    }
    Ok(Score { logprobs, top: top.into_iter().map(|(logit, token)| (token, logit)).collect() })
}

/// Natural log-probability of `token` under a row of logits.
pub fn logprob(logits: &[f32], token: u32) -> f64 {
    f64::from(math::finite(logits[token as usize])) - math::log_sum_exp(logits)
}

/// Feeds one text to an executor chunk by chunk, asking for the logits of every row.
pub struct Feed<'a> {
    tokens: &'a [u32],
    rows: usize,
    /// Logits of a row.
    pub vocabulary: usize,
    cache: KvCache,
    blocks: SequenceBlocks,
    computed: usize,
}

impl<'a> Feed<'a> {
    /// Checks the tokens; runs nothing yet.
    pub fn new(
        executor: &dyn Executor,
        options: &ExecutorOptions,
        tokens: &'a [u32],
    ) -> Result<Self, ScoreError> {
        let program = executor.program();
        let vocabulary = program.vocabulary;
        if tokens.is_empty() {
            return Err(ScoreError::TooFewTokens { found: 0, expected: 1 });
        }
        if let Some(position) = tokens.iter().position(|&token| token as usize >= vocabulary) {
            return Err(ScoreError::TokenOutOfRange {
                token: tokens[position],
                position,
                vocabulary,
            });
        }
        let cache = KvCache::new(&program.kv, options.kv_blocks, None);
        let length_max = cache.length_max(program.context_max);
        if tokens.len() > length_max {
            return Err(ScoreError::TooLong { tokens: tokens.len(), length_max });
        }
        let rows = (LOGITS_MAX / vocabulary.max(1)).clamp(1, options.rows_max.max(1));
        Ok(Feed { tokens, rows, vocabulary, cache, blocks: SequenceBlocks::default(), computed: 0 })
    }

    /// Runs the next chunk: the position of its first row and logits `[rows, vocabulary]`; `None`
    /// at the end.
    pub fn next<'e>(
        &mut self,
        executor: &'e mut dyn Executor,
    ) -> Result<Option<(usize, &'e [f32])>, ScoreError> {
        let first = self.computed;
        let affordable = self.cache.length_affordable(&self.blocks) - first;
        let rows = (self.tokens.len() - first).min(self.rows).min(affordable);
        if rows == 0 {
            return Ok(None);
        }
        let end = first + rows;
        self.cache.grow(&mut self.blocks, end);
        let step = Step {
            tokens: self.tokens[first..end].to_vec(),
            positions: (first as u32..end as u32).collect(),
            sequences: vec![StepSequence {
                first_row: 0,
                rows: rows as u32,
                cached: first as u32,
                tables: self.blocks.tables.clone(),
                ancestors: None,
            }],
            logits_rows: (0..rows as u32).collect(),
        };
        let logits = executor.run(&step)?.logits;
        let expected = rows * self.vocabulary;
        if logits.len() != expected {
            return Err(ScoreError::Logits { found: logits.len(), expected });
        }
        self.computed = end;
        self.cache.commit(&mut self.blocks, &self.tokens[..end]);
        Ok(Some((first, logits)))
    }
}
