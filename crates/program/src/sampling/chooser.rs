//! `Chooser`: makes all choices of a step, for executors on the host.

use super::{Sampler, TokenLogprobs};
use crate::step::{Step, StepSequence, TokenSource};

/// The tokens and reports of steps, in memory that is reused.
#[derive(Debug, Default)]
pub struct Chooser {
    sampler: Sampler,
    /// The token id of each row. Chosen tokens are resolved.
    row_tokens: Vec<u32>,
    /// The token of each choice.
    tokens: Vec<Option<u32>>,
    logprobs: Vec<Option<TokenLogprobs>>,
    generated: Vec<u32>,
    logits_rows: usize,
}

impl Chooser {
    /// Begins a step that follows the last one. Resolves [`TokenSource::Chosen`] and drops the
    /// earlier choices.
    pub fn begin(&mut self, step: &Step) {
        let Self { row_tokens, tokens, logprobs, .. } = self;
        row_tokens.clear();
        row_tokens.extend(step.tokens.iter().map(|source| match *source {
            TokenSource::Given(token) => token,
            TokenSource::Chosen(choice) => {
                tokens.get(choice as usize).copied().flatten().unwrap_or(0)
            }
        }));
        tokens.clear();
        logprobs.clear();
        self.logits_rows = 0;
    }

    /// The token of each row of the step.
    pub fn row_tokens(&self) -> &[u32] {
        &self.row_tokens
    }

    /// Makes the choices of the step from `logits`, `[choices, vocabulary]`. Afterwards the first
    /// rows of `logits` are those to hand out.
    pub fn choose(&mut self, step: &Step, vocabulary: usize, logits: &mut [f32]) {
        let mut sequences = step.sequences.iter();
        let mut sequence = sequences.next();
        for (index, choice) in step.choices.iter().enumerate() {
            while let Some(passed) =
                sequence.filter(|it| !it.row_range().contains(&(choice.row as usize)))
            {
                debug_assert!(passed.first_row <= choice.row, "choices ascend");
                sequence = sequences.next();
            }
            let row = &logits[index * vocabulary..(index + 1) * vocabulary];
            let penalties = choice.sampling.is_some_and(|sampling| sampling.has_penalties());
            self.generated.clear();
            if let Some(sequence) = sequence.filter(|_| penalties) {
                self.see(step, sequence, choice.row as usize);
            }
            let token = self.sampler.choose(choice, &self.generated, row);
            let report = choice.report.logprobs.zip(token);
            self.logprobs
                .push(report.map(|(count, token)| TokenLogprobs::of(row, token, count as usize)));
            self.tokens.push(token);
            if choice.report.logits {
                let (from, to) = (index * vocabulary, self.logits_rows * vocabulary);
                if from != to {
                    logits.copy_within(from..from + vocabulary, to);
                }
                self.logits_rows += 1;
            }
        }
    }

    /// Takes the step's tokens from a device that chose them itself. There is no report.
    pub fn accept(&mut self, tokens: impl ExactSizeIterator<Item = Option<u32>>) {
        self.logprobs.resize(tokens.len(), None);
        self.tokens.extend(tokens);
    }

    /// Collects the tokens of the chosen rows that `row` of the step sees.
    fn see(&mut self, step: &Step, sequence: &StepSequence, row: usize) {
        let first = sequence.first_row as usize;
        for other in sequence.row_range() {
            let chosen = matches!(step.tokens[other], TokenSource::Chosen(_));
            if chosen && sequence.sees(row - first, other - first) {
                self.generated.push(self.row_tokens[other]);
            }
        }
    }

    /// For each choice the token, if one was asked for and could be chosen.
    pub fn tokens(&self) -> &[Option<u32>] {
        &self.tokens
    }

    /// For each choice the log-probabilities, if they were asked for and a token was chosen.
    pub fn logprobs(&self) -> &[Option<TokenLogprobs>] {
        &self.logprobs
    }

    /// The number of rows of logits to hand out.
    pub fn logits_rows(&self) -> usize {
        self.logits_rows
    }
}
