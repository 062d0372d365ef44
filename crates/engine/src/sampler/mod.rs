//! Chooses a token from logits.
//!
//! Order of operations: repetition penalty (Hugging Face's rule, over prompt and generated
//! tokens), presence and frequency penalties (OpenAI's rule, over generated tokens), logit bias,
//! temperature, top-k, top-p, min-p. From the temperature on it is the order of Hugging Face
//! transformers; vLLM applies min-p before top-k and top-p, which differs only in the mass that
//! top-p counts. Each truncation counts the mass that the earlier ones left.
//!
//! Randomness is counter-based: the number drawn depends on the request's seed and on the
//! position of the token in its text and on nothing else, so that batching, preemption and prefix
//! hits never change a text.

mod draw;

use std::collections::HashMap;

use crate::math;

/// How tokens are chosen. The default is greedy.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0 is greedy: the largest logit, the lowest id on ties.
    pub temperature: f32,
    /// Only the `top_k` best tokens; 0 means all. Exactly so many stay: ties go to the lower id.
    pub top_k: usize,
    /// Only the fewest best tokens whose probabilities sum to `top_p` or more; 1 means all.
    pub top_p: f32,
    /// Only tokens with at least `min_p` times the best token's probability; 0 means all.
    pub min_p: f32,
    /// Divides the positive and multiplies the negative logits of tokens in prompt or text; 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted from the logits of tokens in the generated text.
    pub presence_penalty: f32,
    /// Subtracted once for each time that a token occurs in the generated text.
    pub frequency_penalty: f32,
    /// Added to the logits of these tokens; minus infinity forbids one.
    pub logit_bias: Vec<(u32, f32)>,
    /// Same seed, same text.
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
            logit_bias: Vec::new(),
            seed: 0,
        }
    }
}

/// A sampling parameter out of range.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum SamplingError {
    /// A number that is not in its range.
    #[error("{name} is {found}, expected {expected}")]
    OutOfRange {
        /// Which field.
        name: &'static str,
        /// Its value.
        found: f32,
        /// What it may be.
        expected: &'static str,
    },
    /// A bias for a token that the model does not have.
    #[error("logit_bias names token {token}, outside the vocabulary of {vocabulary}")]
    BiasOutOfRange {
        /// The id.
        token: u32,
        /// Ids that exist: `0..vocabulary`.
        vocabulary: usize,
    },
}

impl Sampling {
    /// Checks every field; `vocabulary` is the number of logits.
    pub fn validate(&self, vocabulary: usize) -> Result<(), SamplingError> {
        let any = f32::NEG_INFINITY..=f32::MAX;
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
        for (name, found, range, expected) in checks {
            if !range.contains(&found) {
                return Err(SamplingError::OutOfRange { name, found, expected });
            }
        }
        for &(token, found) in &self.logit_bias {
            if token as usize >= vocabulary {
                return Err(SamplingError::BiasOutOfRange { token, vocabulary });
            }
            if !any.contains(&found) {
                let expected = "a number or minus infinity";
                return Err(SamplingError::OutOfRange { name: "logit_bias", found, expected });
            }
        }
        Ok(())
    }

    fn has_penalties(&self) -> bool {
        self.repetition_penalty != 1.0
            || self.presence_penalty != 0.0
            || self.frequency_penalty != 0.0
    }
}

/// Buffers that samplers share, so that drawing allocates nothing.
#[derive(Debug, Default)]
pub struct Scratch {
    logits: Vec<f32>,
    buffers: draw::Buffers,
}

/// One request's sampler: its parameters, and the tokens that penalties look at.
#[derive(Debug)]
pub struct Sampler {
    sampling: Sampling,
    /// How often each token of the prompt (0) or of the text was generated; empty unless there
    /// are penalties.
    seen: HashMap<u32, u32>,
}

impl Sampler {
    /// For a text that continues `prompt`; `sampling` is valid.
    pub fn new(sampling: Sampling, prompt: &[u32]) -> Self {
        let seen = if sampling.has_penalties() {
            prompt.iter().map(|&token| (token, 0)).collect()
        } else {
            HashMap::new()
        };
        Sampler { sampling, seen }
    }

    /// Takes note of a generated token.
    pub fn record(&mut self, token: u32) {
        if self.sampling.has_penalties() {
            *self.seen.entry(token).or_insert(0) += 1;
        }
    }

    /// Chooses the token at `position` of the sequence from `logits` `[vocabulary]`; `None` if no
    /// logit is a number above minus infinity. Logits that are not numbers are never chosen.
    pub fn sample(&self, logits: &[f32], position: usize, scratch: &mut Scratch) -> Option<u32> {
        let Scratch { logits: adjusted, buffers } = scratch;
        let logits = if self.seen.is_empty() && self.sampling.logit_bias.is_empty() {
            logits
        } else {
            adjusted.clear();
            adjusted.extend_from_slice(logits);
            self.adjust(adjusted);
            adjusted
        };
        if self.sampling.temperature == 0.0 {
            return math::argmax(logits);
        }
        let point = draw::uniform(self.sampling.seed, position as u64);
        draw::draw(logits, &self.sampling, point, buffers)
    }

    fn adjust(&self, logits: &mut [f32]) {
        let Sampling { repetition_penalty, presence_penalty, frequency_penalty, .. } =
            self.sampling;
        for (&token, &count) in &self.seen {
            let Some(logit) = logits.get_mut(token as usize) else { continue };
            // Keskar et al. 2019, section 4.1, with the sign rule that transformers added.
            *logit = if *logit < 0.0 {
                *logit * repetition_penalty
            } else {
                *logit / repetition_penalty
            };
            if count > 0 {
                *logit -= presence_penalty + frequency_penalty * count as f32;
            }
        }
        for &(token, bias) in &self.sampling.logit_bias {
            logits[token as usize] += bias;
        }
    }
}

#[cfg(test)]
mod tests;
