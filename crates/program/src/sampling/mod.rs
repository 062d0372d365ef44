//! Chooses a token from a row of logits: the one definition that every backend reproduces.
//!
//! **Order of operations**, all in `f32` unless said otherwise. `x` is the row of logits.
//!
//! 1. Penalties, for each token of [`TokenCounts`]: `x = x * r` if `x < 0`, else `x / r`, with the
//!    repetition penalty `r` (Keskar et al. 2019, section 4.1, with the sign rule that Hugging Face
//!    transformers added; over prompt and generated tokens). Then, if the token was generated
//!    `n > 0` times, `x = x - (presence + frequency * n)` (OpenAI's rule, over generated tokens).
//! 2. Logit bias: `x = x + bias`, in the order of the list.
//! 3. Token mask: `x` is minus infinity for every token that is not in the mask.
//! 4. Temperature 0: the token of the largest `x`, the lowest id on ties. Otherwise the token's
//!    weight is `exp_negative((x - max) / temperature)` ([`crate::logits::exp_negative`]); the best
//!    token's is 1.
//! 5. Top-k: exactly the `top_k` best tokens stay, ties go to the lower id.
//! 6. Top-p: the fewest best of these whose weights sum to `top_p` of their sum or more.
//! 7. Min-p: of these, the tokens whose weight is at least `min_p`.
//! 8. The draw: the candidates in the order below, the first whose running sum of weights (in
//!    `f64`) exceeds `point` times the sum of all candidates' weights (in `f64`). `point` is
//!    [`uniform`] of the seed and the counter.
//!
//! From the temperature on this is the order of Hugging Face transformers. vLLM applies min-p
//! before top-k and top-p, which differs only in the mass that top-p counts.
//!
//! **Order of candidates.** With `0 < top_k < vocabulary`: best first. Otherwise by ascending id.
//! Where top-p cuts either list, the candidates are in the order in which a quickselect leaves
//! them. A kernel that sorts them otherwise draws another token for the same point: the
//! distribution is the same, the text is not. The conformance suite says which of the two it asks.
//!
//! **Strange logits.** NaN counts as minus infinity, plus infinity as the largest `f32`. Tokens at
//! minus infinity are never chosen; if there are no others, no token is chosen.
//!
//! **Randomness is counter-based.** The number drawn depends on the seed and on the counter (the
//! position of the token in its text) and on nothing else, so that batching, preemption and prefix
//! hits never change a text.

mod chooser;
mod draw;

use std::collections::HashMap;

use crate::logits;
use crate::step::Choice;

pub use chooser::Chooser;
pub use draw::uniform;

/// How tokens are chosen. The default is greedy.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0 is greedy: the largest logit, the lowest id on ties.
    pub temperature: f32,
    /// Only the `top_k` best tokens; 0 means all. Exactly so many stay: ties go to the lower id.
    pub top_k: usize,
    /// Only the fewest best tokens whose probabilities sum to `top_p` or more; 1 means all.
    pub top_p: f32,
    /// Only tokens with at least `min_p` times the best token's probability; 0 means all.
    pub min_p: f32,
    /// Divides the positive and multiplies the negative logits of tokens in prompt or text; 1 is
    /// off.
    pub repetition_penalty: f32,
    /// Subtracted from the logits of tokens in the generated text.
    pub presence_penalty: f32,
    /// Subtracted once for each time that a token occurs in the generated text.
    pub frequency_penalty: f32,
    /// The same seed gives the same text.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Sampling {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            seed: 0,
        }
    }
}

/// An error of sampling parameters.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum SamplingError {
    /// A number is out of its range.
    #[error("{name} is {found}, expected {expected}")]
    OutOfRange {
        /// The field.
        name: &'static str,
        /// Its value.
        found: f32,
        /// Its range.
        expected: &'static str,
    },
    /// A bias names a token that the model does not have.
    #[error("logit_bias names token {token}, outside the vocabulary of {vocabulary}")]
    BiasOutOfRange {
        /// The id.
        token: u32,
        /// Ids that exist: `0..vocabulary`.
        vocabulary: usize,
    },
}

impl Sampling {
    /// Checks every field.
    ///
    /// # Errors
    /// [`SamplingError::OutOfRange`] names the first field that is out of its range.
    pub fn validate(&self) -> Result<(), SamplingError> {
        let checks = [
            ("temperature", self.temperature, 0.0..=f32::MAX, "a number from 0 up"),
            ("top_p", self.top_p, 0.0..=1.0, "0 to 1"),
            ("min_p", self.min_p, 0.0..=1.0, "0 to 1"),
            (
                "repetition_penalty",
                self.repetition_penalty,
                f32::MIN_POSITIVE..=f32::MAX,
                "a number above 0",
            ),
            ("presence_penalty", self.presence_penalty, f32::MIN..=f32::MAX, "a number"),
            ("frequency_penalty", self.frequency_penalty, f32::MIN..=f32::MAX, "a number"),
        ];
        match checks.into_iter().find(|(_, found, range, _)| !range.contains(found)) {
            None => Ok(()),
            Some((name, found, _, expected)) => {
                Err(SamplingError::OutOfRange { name, found, expected })
            }
        }
    }

    /// Whether any penalty is on, so that [`TokenCounts`] matter.
    pub fn has_penalties(&self) -> bool {
        self.repetition_penalty != 1.0
            || self.presence_penalty != 0.0
            || self.frequency_penalty != 0.0
    }
}

/// Checks a logit bias for a model of `vocabulary` tokens.
///
/// # Errors
/// [`SamplingError`] names the first token or number that is out of range.
pub fn validate_bias(bias: &[(u32, f32)], vocabulary: usize) -> Result<(), SamplingError> {
    for &(token, found) in bias {
        if token as usize >= vocabulary {
            return Err(SamplingError::BiasOutOfRange { token, vocabulary });
        }
        if !(f32::NEG_INFINITY..=f32::MAX).contains(&found) {
            let expected = "a number or minus infinity";
            return Err(SamplingError::OutOfRange { name: "logit_bias", found, expected });
        }
    }
    Ok(())
}

/// The tokens of a text for penalties, with the number of times that each was generated.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct TokenCounts {
    /// Each token once, with the number of times that it was generated; 0 if it occurs only in the
    /// prompt.
    entries: Vec<(u32, u32)>,
    place_of: HashMap<u32, u32>,
}

impl TokenCounts {
    /// The counts of a text that begins with `prompt`.
    pub fn new(prompt: &[u32]) -> Self {
        let mut counts = Self::default();
        prompt.iter().for_each(|token| counts.add(*token, 0));
        counts
    }

    /// Counts a generated token.
    pub fn record(&mut self, token: u32) {
        self.add(token, 1);
    }

    fn add(&mut self, token: u32, times: u32) {
        let Self { entries, place_of } = self;
        let place = *place_of.entry(token).or_insert_with(|| {
            entries.push((token, 0));
            entries.len() as u32 - 1
        });
        entries[place as usize].1 += times;
    }

    /// Each token once, in order of first occurrence, with the number of times that it was
    /// generated.
    pub fn entries(&self) -> &[(u32, u32)] {
        &self.entries
    }

    /// The tokens of [`TokenCounts::entries`].
    pub fn tokens(&self) -> impl Iterator<Item = u32> {
        self.entries.iter().map(|(token, _)| *token)
    }

    /// Whether `token` occurs in prompt or text.
    pub fn contains(&self, token: u32) -> bool {
        self.place_of.contains_key(&token)
    }
}

/// The tokens that may be chosen, one bit for each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenMask {
    vocabulary: usize,
    words: Vec<u32>,
}

impl TokenMask {
    /// A mask that allows no token.
    pub fn none(vocabulary: usize) -> Self {
        Self { vocabulary, words: vec![0; vocabulary.div_ceil(32)] }
    }

    /// Allows a token.
    ///
    /// # Panics
    /// If the vocabulary does not have it.
    pub fn allow(&mut self, token: u32) {
        assert!((token as usize) < self.vocabulary, "token {token} of {}", self.vocabulary);
        self.words[token as usize / 32] |= 1 << (token % 32);
    }

    /// Whether a token may be chosen.
    pub fn allows(&self, token: u32) -> bool {
        self.words[token as usize / 32] >> (token % 32) & 1 == 1
    }

    /// The size of the vocabulary.
    pub fn vocabulary(&self) -> usize {
        self.vocabulary
    }

    /// Token `t` is bit `t % 32` of word `t / 32`.
    pub fn words(&self) -> &[u32] {
        &self.words
    }
}

/// Log-probabilities of one row in the model's own distribution: before penalties, bias, masks,
/// temperature and truncation. Natural logarithms.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprobs {
    /// The chosen token's log-probability.
    pub logprob: f32,
    /// The most probable tokens, best first; ties by lower id.
    pub top: Vec<(u32, f32)>,
}

impl TokenLogprobs {
    /// The log-probabilities of `token` and of the `count` best tokens of a row of logits.
    pub fn of(logits: &[f32], token: u32, count: usize) -> Self {
        let sum = logits::log_sum_exp(logits);
        let logprob = |logit: f32| (f64::from(logits::finite(logit)) - sum) as f32;
        let mut top = Vec::new();
        logits::top(logits, count, &mut top);
        let top = top.into_iter().map(|(logit, token)| (token, logprob(logit))).collect();
        TokenLogprobs { logprob: logprob(logits[token as usize]), top }
    }
}

/// Reusable memory for choosing tokens, so that choosing allocates nothing.
#[derive(Debug, Default)]
pub struct Sampler {
    adjusted: Vec<f32>,
    /// Generated tokens that the counts do not include, each once, with its number of occurrences.
    more: Vec<(u32, u32)>,
    buffers: draw::Buffers,
}

impl Sampler {
    /// Chooses a token from `logits` `[vocabulary]` as `choice` says. `generated` has the tokens of
    /// the [`crate::TokenSource::Chosen`] rows that the row sees. `None` if no token is asked for,
    /// or none can be chosen. Greedy choices without penalties, bias and mask do not copy the
    /// logits.
    pub fn choose(&mut self, choice: &Choice, generated: &[u32], logits: &[f32]) -> Option<u32> {
        let sampling = choice.sampling.as_ref()?;
        let counts = choice.counts.is_some() || !generated.is_empty();
        let penalties = counts && sampling.has_penalties();
        let bias = choice.bias.as_ref().is_some_and(|bias| !bias.is_empty());
        let logits = if penalties || bias || choice.mask.is_some() {
            self.adjusted.clear();
            self.adjusted.extend_from_slice(logits);
            self.adjust(choice, sampling, generated);
            &self.adjusted
        } else {
            logits
        };
        if sampling.temperature == 0.0 {
            return logits::argmax(logits);
        }
        let point = draw::uniform(sampling.seed, choice.counter);
        draw::draw(logits, sampling, point, &mut self.buffers)
    }

    fn adjust(&mut self, choice: &Choice, sampling: &Sampling, generated: &[u32]) {
        let Self { adjusted, more, .. } = self;
        if sampling.has_penalties() {
            more.clear();
            for &token in generated {
                match more.iter_mut().find(|(other, _)| *other == token) {
                    Some((_, times)) => *times += 1,
                    None => more.push((token, 1)),
                }
            }
            let counts = choice.counts.as_deref();
            for &(token, count) in counts.map_or(&[][..], TokenCounts::entries) {
                let Some(logit) = adjusted.get_mut(token as usize) else { continue };
                let times = more.iter().find(|(other, _)| *other == token).map_or(0, |it| it.1);
                penalize(logit, count + times, sampling);
            }
            for &(token, times) in more.iter() {
                if !counts.is_some_and(|counts| counts.contains(token)) {
                    penalize(&mut adjusted[token as usize], times, sampling);
                }
            }
        }
        for &(token, bias) in choice.bias.iter().flat_map(|bias| bias.iter()) {
            adjusted[token as usize] += bias;
        }
        if let Some(mask) = &choice.mask {
            for (words, logits) in mask.words().iter().zip(adjusted.chunks_mut(32)) {
                for (bit, logit) in logits.iter_mut().enumerate() {
                    if words >> bit & 1 == 0 {
                        *logit = f32::NEG_INFINITY;
                    }
                }
            }
        }
    }
}

/// Applies the penalties of a token that was generated `count` times; 0 if it occurs only in the
/// prompt.
fn penalize(logit: &mut f32, count: u32, sampling: &Sampling) {
    let Sampling { repetition_penalty, presence_penalty, frequency_penalty, .. } = *sampling;
    *logit = if *logit < 0.0 { *logit * repetition_penalty } else { *logit / repetition_penalty };
    if count > 0 {
        *logit -= presence_penalty + frequency_penalty * count as f32;
    }
}

#[cfg(test)]
mod tests;
