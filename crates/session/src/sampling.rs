//! How an answer is generated: the caller's settings, then those of the model.

use std::time::{SystemTime, UNIX_EPOCH};

use lathe_engine::{Request, Sampling, SamplingError};
use lathe_model::GenerationDefaults;
use lathe_program::sampling::validate_bias;

/// Tokens of an answer if neither the caller nor the model gives a number. It also ends the answers
/// of models that never stop.
pub const ANSWER_TOKENS: usize = 512;

/// The caller's settings for an answer. For `None` the model's `generation_config.json` decides.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct SamplingChoice {
    /// The most tokens to generate.
    pub max_tokens: Option<usize>,
    /// Divides the logits; 0 is greedy.
    pub temperature: Option<f32>,
    /// Samples from the likeliest tokens that together have this probability.
    pub top_p: Option<f32>,
    /// Samples from this many likeliest tokens; 0 means all.
    pub top_k: Option<usize>,
    /// Samples from tokens with at least this share of the likeliest one's probability.
    pub min_p: Option<f32>,
    /// Divides the logits of tokens that occurred before.
    pub repetition_penalty: Option<f32>,
    /// Subtracted from the logits of generated tokens.
    pub presence_penalty: Option<f32>,
    /// Subtracted from the logits of generated tokens, once for each occurrence.
    pub frequency_penalty: Option<f32>,
    /// Added to the logits of these tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// The same seed gives the same text. `None` takes a seed from the clock.
    pub seed: Option<u64>,
    /// Strings that end the answer, in addition to the model's own.
    pub stop: Vec<String>,
    /// Whether to continue after the model's end tokens.
    pub ignore_eos: bool,
}

impl SamplingChoice {
    /// The sampling of one request.
    ///
    /// It is greedy unless randomness is asked for. The caller asks with a temperature or a
    /// truncation; the model's `generation_config.json` asks with `do_sample`. (Hugging Face's
    /// `generate` has the same rule. vLLM's server uses the model's settings too.)
    pub fn sampling(&self, defaults: &GenerationDefaults) -> Sampling {
        let truncates = self.top_p.is_some() || self.top_k.is_some() || self.min_p.is_some();
        let own = defaults.sample;
        let fallback = match own {
            true => defaults.temperature.unwrap_or(1.0),
            false if truncates => 1.0,
            false => 0.0,
        };
        let none = Sampling::default();
        Sampling {
            temperature: self.temperature.unwrap_or(fallback),
            top_k: self.top_k.or(defaults.top_k.filter(|_| own)).unwrap_or(none.top_k),
            top_p: self.top_p.or(defaults.top_p.filter(|_| own)).unwrap_or(none.top_p),
            min_p: self.min_p.or(defaults.min_p.filter(|_| own)).unwrap_or(none.min_p),
            repetition_penalty: self
                .repetition_penalty
                .or(defaults.repetition_penalty)
                .unwrap_or(none.repetition_penalty),
            presence_penalty: self.presence_penalty.unwrap_or(none.presence_penalty),
            frequency_penalty: self.frequency_penalty.unwrap_or(none.frequency_penalty),
            seed: self.seed.unwrap_or_else(clock_seed),
        }
    }

    /// Values that are added to logits: the caller's biases, and minus infinity for tokens that the
    /// model suppresses.
    pub fn logit_bias(&self, defaults: &GenerationDefaults) -> Vec<(u32, f32)> {
        let own = defaults.suppress_tokens.iter().map(|token| (*token, f32::NEG_INFINITY));
        own.chain(self.logit_bias.iter().copied()).collect()
    }

    /// Checks all settings for a model of `vocabulary` tokens.
    ///
    /// # Errors
    /// The first number or token that is out of range.
    pub fn validate(
        &self,
        defaults: &GenerationDefaults,
        vocabulary: usize,
    ) -> Result<(), SamplingError> {
        self.sampling(defaults).validate()?;
        validate_bias(&self.logit_bias(defaults), vocabulary)
    }

    /// Strings that end an answer: the caller's and the model's. With `ignore_eos` the model's do
    /// not count.
    pub fn stop_strings(&self, defaults: &GenerationDefaults) -> Vec<String> {
        let own = defaults.stop_strings.iter().filter(|_| !self.ignore_eos);
        self.stop.iter().chain(own).cloned().collect()
    }

    /// The most tokens of an answer.
    pub fn answer_tokens(&self, defaults: &GenerationDefaults) -> usize {
        self.max_tokens.or(defaults.max_new_tokens).unwrap_or(ANSWER_TOKENS)
    }

    /// A request that continues `prompt`.
    pub fn request(&self, prompt: Vec<u32>, defaults: &GenerationDefaults) -> Request {
        let stop_tokens = if self.ignore_eos { Vec::new() } else { defaults.stop_tokens.clone() };
        Request {
            prompt,
            sampling: self.sampling(defaults),
            logit_bias: self.logit_bias(defaults),
            max_tokens: Some(self.answer_tokens(defaults)),
            stop_tokens,
            stop_strings: self.stop_strings(defaults),
            ignore_stop: false,
            logprobs: None,
        }
    }
}

/// A seed that differs from run to run.
fn clock_seed() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos());
    // Limited to the integers that a JSON number represents exactly.
    (now as u64) & ((1 << 53) - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model() -> GenerationDefaults {
        GenerationDefaults {
            sample: true,
            temperature: Some(0.6),
            top_p: Some(0.9),
            ..GenerationDefaults::default()
        }
    }

    #[test]
    fn greedy_unless_asked() {
        let none = GenerationDefaults::default();
        let chosen = SamplingChoice::default().sampling(&none);
        assert_eq!((chosen.temperature, chosen.top_p), (0.0, 1.0));
        let choice = SamplingChoice { top_p: Some(0.5), ..Default::default() };
        assert_eq!(choice.sampling(&none).temperature, 1.0);
        let quiet = GenerationDefaults { sample: false, ..model() };
        let chosen = SamplingChoice::default().sampling(&quiet);
        assert_eq!((chosen.temperature, chosen.top_p), (0.0, 1.0));
    }

    #[test]
    fn what_the_model_suppresses_is_never_chosen() {
        let defaults = GenerationDefaults { suppress_tokens: vec![9], ..Default::default() };
        let request = SamplingChoice::default().request(vec![1], &defaults);
        assert_eq!(request.logit_bias, [(9, f32::NEG_INFINITY)]);
    }

    #[test]
    fn the_caller_wins() {
        let chosen = SamplingChoice::default().sampling(&model());
        assert_eq!((chosen.temperature, chosen.top_p), (0.6, 0.9));
        let choice = SamplingChoice {
            temperature: Some(0.0),
            logit_bias: vec![(5, -2.5)],
            seed: Some(7),
            ..Default::default()
        };
        let chosen = choice.sampling(&model());
        assert_eq!((chosen.temperature, chosen.seed), (0.0, 7));
        assert_eq!(choice.logit_bias(&model()), [(5, -2.5)]);
    }

    #[test]
    fn answers_end_where_caller_and_model_say() {
        let defaults = GenerationDefaults {
            stop_tokens: vec![3],
            stop_strings: vec!["END".into()],
            max_new_tokens: Some(40),
            ..Default::default()
        };
        let choice = SamplingChoice { stop: vec!["x".into()], ..Default::default() };
        let request = choice.request(vec![1], &defaults);
        assert_eq!(request.stop_tokens, [3]);
        assert_eq!(request.stop_strings, ["x", "END"]);
        assert_eq!(request.max_tokens, Some(40));
        let choice = SamplingChoice { ignore_eos: true, max_tokens: Some(2), ..choice };
        let request = choice.request(vec![1], &defaults);
        assert_eq!((request.stop_tokens, request.max_tokens), (vec![], Some(2)));
        assert_eq!(request.stop_strings, ["x"]);
    }
}
