//! How tokens are chosen: what the command line says, over what the model's own settings say.

use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Error;
use lathe_engine::{Sampling, SamplingError};
use lathe_model::GenerationDefaults;
use lathe_program::sampling::validate_bias;

use crate::arguments::SamplingArguments;
use crate::output::bad_input;

/// How tokens are chosen.
#[derive(Debug, Clone)]
pub struct Chosen {
    /// The parameters.
    pub sampling: Sampling,
    /// Added to the logits of these tokens.
    pub logit_bias: Vec<(u32, f32)>,
}

impl Chosen {
    /// Checks everything for a model of `vocabulary` tokens.
    ///
    /// # Errors
    /// The first number or token that is out of range.
    pub fn validate(&self, vocabulary: usize) -> Result<(), SamplingError> {
        self.sampling.validate()?;
        validate_bias(&self.logit_bias, vocabulary)
    }
}

/// The sampling that `arguments` ask for.
///
/// Greedy unless somebody asked for randomness: the command line with a temperature or a
/// truncation, or the model's `generation_config.json` with `do_sample`. (The same rule as Hugging
/// Face's `generate`; vLLM's server takes the model's settings too.)
pub fn sampling(
    arguments: &SamplingArguments,
    defaults: &GenerationDefaults,
) -> Result<Chosen, Error> {
    let truncates =
        arguments.top_p.is_some() || arguments.top_k.is_some() || arguments.min_p.is_some();
    let own = defaults.sample;
    let fallback = match own {
        true => defaults.temperature.unwrap_or(1.0),
        false if truncates => 1.0,
        false => 0.0,
    };
    let none = Sampling::default();
    let own_bias = defaults.suppress_tokens.iter().map(|token| Ok((*token, f32::NEG_INFINITY)));
    let typed_bias = arguments.logit_bias.iter().map(|text| bias(text));
    let logit_bias = own_bias.chain(typed_bias).collect::<Result<_, _>>()?;
    let sampling = Sampling {
        temperature: arguments.temperature.unwrap_or(fallback),
        top_k: arguments.top_k.or(defaults.top_k.filter(|_| own)).unwrap_or(none.top_k),
        top_p: arguments.top_p.or(defaults.top_p.filter(|_| own)).unwrap_or(none.top_p),
        min_p: arguments.min_p.or(defaults.min_p.filter(|_| own)).unwrap_or(none.min_p),
        repetition_penalty: arguments
            .repetition_penalty
            .or(defaults.repetition_penalty)
            .unwrap_or(none.repetition_penalty),
        presence_penalty: arguments.presence_penalty.unwrap_or(none.presence_penalty),
        frequency_penalty: arguments.frequency_penalty.unwrap_or(none.frequency_penalty),
        seed: arguments.seed.unwrap_or_else(clock_seed),
    };
    Ok(Chosen { sampling, logit_bias })
}

/// Strings that end an answer: those of the command line and those of the model.
pub fn stop_strings(arguments: &SamplingArguments, defaults: &GenerationDefaults) -> Vec<String> {
    // A model's end tokens are left out with `--ignore-eos`, and so are its strings.
    let own = defaults.stop_strings.iter().filter(|_| !arguments.ignore_eos);
    arguments.stop.iter().chain(own).cloned().collect()
}

fn bias(text: &str) -> Result<(u32, f32), Error> {
    let parts = text
        .split_once('=')
        .and_then(|(token, value)| Some((token.trim().parse().ok()?, value.trim().parse().ok()?)));
    parts.ok_or_else(|| bad_input(format!("--logit-bias {text}: expected ID=NUMBER")))
}

/// A seed that differs from run to run.
fn clock_seed() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos());
    // Kept within what a JSON number carries exactly.
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
        let chosen = sampling(&SamplingArguments::default(), &none).expect("valid");
        assert_eq!((chosen.sampling.temperature, chosen.sampling.top_p), (0.0, 1.0));
        let arguments = SamplingArguments { top_p: Some(0.5), ..Default::default() };
        assert_eq!(sampling(&arguments, &none).expect("valid").sampling.temperature, 1.0);
        let quiet = GenerationDefaults { sample: false, ..model() };
        let chosen = sampling(&SamplingArguments::default(), &quiet).expect("valid");
        assert_eq!((chosen.sampling.temperature, chosen.sampling.top_p), (0.0, 1.0));
    }

    #[test]
    fn what_the_model_suppresses_is_never_chosen() {
        let defaults = GenerationDefaults { suppress_tokens: vec![9], ..Default::default() };
        let chosen = sampling(&SamplingArguments::default(), &defaults).expect("valid");
        assert_eq!(chosen.logit_bias, [(9, f32::NEG_INFINITY)]);
    }

    #[test]
    fn the_command_line_wins() {
        let chosen = sampling(&SamplingArguments::default(), &model()).expect("valid");
        assert_eq!((chosen.sampling.temperature, chosen.sampling.top_p), (0.6, 0.9));
        let arguments = SamplingArguments {
            temperature: Some(0.0),
            logit_bias: vec!["5=-2.5".into()],
            seed: Some(7),
            ..Default::default()
        };
        let chosen = sampling(&arguments, &model()).expect("valid");
        assert_eq!((chosen.sampling.temperature, chosen.sampling.seed), (0.0, 7));
        assert_eq!(chosen.logit_bias, [(5, -2.5)]);
        let arguments = SamplingArguments { logit_bias: vec!["x".into()], ..Default::default() };
        assert!(sampling(&arguments, &model()).is_err());
    }
}
