//! Log-probabilities of given tokens, in chunks, so that memory stays bounded.

use lathe_program::{BackendError, Choice, Executor, Step, StepSequence, TokenSource, logits};

use crate::kv::{KvCache, SequenceBlocks};

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
    /// Windows that cannot cover a text.
    #[error(
        "windows of {context} tokens every {stride} tokens, expected at least 2 and a stride of 1 to that"
    )]
    Windows {
        /// Tokens of a window.
        context: usize,
        /// Tokens between the starts of windows.
        stride: usize,
    },
    /// Two models that cannot be compared.
    #[error("the model has {found} logits a token, the base has {expected}")]
    Vocabularies {
        /// The model's.
        found: usize,
        /// The base's.
        expected: usize,
    },
    /// The executor failed.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// The model gave NaN or plus infinity as a logit.
    #[error("the model gives no finite logits at position {position}")]
    NotFinite {
        /// Where.
        position: usize,
    },
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

/// Scores `tokens` from an empty cache. The cache's contents are overwritten: not for an executor
/// that an engine owns.
///
/// # Errors
/// [`ScoreError`] if the tokens do not fit the model or its cache, or the executor fails.
pub fn score(
    executor: &mut dyn Executor,
    tokens: &[u32],
    top_k: usize,
) -> Result<Score, ScoreError> {
    let mut logprobs = Vec::with_capacity(tokens.len());
    let mut top = Vec::new();
    let mut feed = Feed::new(executor, tokens, 0)?;
    while feed.rows() > 0 {
        let (first, logits) = feed.run(executor, feed.rows())?;
        for (position, row) in (first..).zip(logits.chunks_exact(feed.vocabulary)) {
            match tokens.get(position + 1) {
                Some(&next) => logprobs.push(logprob(row, next)),
                None => logits::top(row, top_k, &mut top),
            }
        }
    }
    Ok(Score { logprobs, top: top.into_iter().map(|(logit, token)| (token, logit)).collect() })
}

/// Natural log-probability of `token` under a row of logits.
pub fn logprob(logits: &[f32], token: u32) -> f64 {
    f64::from(logits::finite(logits[token as usize])) - logits::log_sum_exp(logits)
}

/// Feeds one text to an executor chunk by chunk, from an empty cache.
#[derive(Debug)]
pub struct Feed<'a> {
    tokens: &'a [u32],
    /// First row whose logits are wanted.
    wanted: usize,
    rows_max: usize,
    /// Logits of a row.
    pub vocabulary: usize,
    cache: KvCache,
    blocks: SequenceBlocks,
    computed: usize,
}

impl<'a> Feed<'a> {
    /// Checks the tokens; runs nothing yet. Logits are made for the rows from `wanted` on.
    pub fn new(
        executor: &dyn Executor,
        tokens: &'a [u32],
        wanted: usize,
    ) -> Result<Self, ScoreError> {
        let program = executor.program();
        let vocabulary = program.vocabulary;
        if tokens.is_empty() {
            return Err(ScoreError::TooFewTokens { found: 0, expected: 1 });
        }
        if let Some(position) = tokens.iter().position(|&token| token as usize >= vocabulary) {
            let token = tokens[position];
            return Err(ScoreError::TokenOutOfRange { token, position, vocabulary });
        }
        let limits = executor.limits();
        let cache = KvCache::new(&program.kv, limits.kv_blocks, 1, None);
        let length_max = cache.length_max(program.context_max);
        if tokens.len() > length_max {
            return Err(ScoreError::TooLong { tokens: tokens.len(), length_max });
        }
        let (rows_max, blocks) = (limits.rows_max, SequenceBlocks::default());
        Ok(Feed { tokens, wanted, rows_max, vocabulary, cache, blocks, computed: 0 })
    }

    /// Rows that the next chunk may have; 0 at the end.
    pub fn rows(&self) -> usize {
        let affordable = self.cache.length_affordable(&self.blocks, 0) - self.computed;
        let (until, most) = match self.wanted.checked_sub(self.computed) {
            Some(before @ 1..) => (before, self.rows_max),
            _ => (self.tokens.len() - self.computed, LOGITS_MAX / self.vocabulary.max(1)),
        };
        let left = until.min(self.tokens.len() - self.computed);
        left.min(self.rows_max).min(most.max(1)).min(affordable)
    }

    /// Runs the next `rows` rows, at most [`Feed::rows`]: the position of the first, and logits
    /// `[rows, vocabulary]`, or none before the first wanted row.
    pub fn run<'e>(
        &mut self,
        executor: &'e mut dyn Executor,
        rows: usize,
    ) -> Result<(usize, &'e [f32]), ScoreError> {
        let (first, logits) = self.rehearse(executor, rows)?;
        self.computed = first + rows;
        self.cache.commit(&mut self.blocks, &self.tokens[..self.computed]);
        Ok((first, logits))
    }

    /// As [`Feed::run`], but stays where it is: the same rows, or more or fewer, may run again.
    pub fn rehearse<'e>(
        &mut self,
        executor: &'e mut dyn Executor,
        rows: usize,
    ) -> Result<(usize, &'e [f32]), ScoreError> {
        let (first, end) = (self.computed, self.computed + rows);
        self.cache.grow(&mut self.blocks, end);
        let wanted = if first < self.wanted { 0 } else { rows as u32 };
        let given = self.tokens[first..end].iter().map(|token| TokenSource::Given(*token));
        let mut step = Step {
            tokens: given.collect(),
            positions: (first as u32..end as u32).collect(),
            sequences: vec![StepSequence {
                id: self.blocks.id(),
                first_row: 0,
                rows: rows as u32,
                cached: first as u32,
                expanded: executor.expanded_until(self.tokens.len()) as u32,
                long_rope: executor.program().long_rope(self.tokens.len()),
                ancestors: None,
            }],
            choices: (0..wanted).map(Choice::logits_of).collect(),
            ..Step::default()
        };
        self.cache.take_changes(&mut step.tables);
        let logits = executor.run(&step)?.logits;
        let expected = wanted as usize * self.vocabulary;
        if logits.len() != expected {
            return Err(ScoreError::Logits { found: logits.len(), expected });
        }
        // Minus infinity forbids a token, as long as another one is left.
        let strange = |row: &[f32]| {
            row.iter().any(|x| x.is_nan() || *x == f32::INFINITY)
                || row.iter().all(|x| *x == f32::NEG_INFINITY)
        };
        if let Some(row) = logits.chunks_exact(self.vocabulary).position(strange) {
            return Err(ScoreError::NotFinite { position: first + row });
        }
        Ok((first, logits))
    }
}
