//! Quality of a model over a text: perplexity, and how far its distributions are from another
//! model's. Windows by windows and chunk by chunk, so that memory does not grow with the text.

use std::ops::Range;

use lathe_program::Executor;
use lathe_program::logits::{argmax, exp_negative, finite, log_sum_exp};

use crate::score::{Feed, ScoreError, logprob};

/// How a long text is cut: each window starts from an empty cache, and its first token is not
/// scored. Of overlapping windows each scores only tokens that the one before did not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Windows {
    /// Tokens of a window, at least 2; the last one may be shorter.
    pub context: usize,
    /// Tokens between the starts of windows, 1 to as many of the text as a window has.
    pub stride: usize,
    /// The token that each window begins with, before those of the text; `None`: the text's own.
    pub beginning: Option<u32>,
}

impl Windows {
    /// Windows side by side.
    pub fn of(context: usize) -> Self {
        Windows { context, stride: context, beginning: None }
    }

    /// Tokens of the text in a window.
    fn reach(self) -> usize {
        self.context.saturating_sub(usize::from(self.beginning.is_some()))
    }

    /// The window of `range`, and how many of its first tokens are not scored if those of the text
    /// are `skipped`.
    fn text(self, tokens: &[u32], range: Range<usize>, skipped: usize) -> (Vec<u32>, usize) {
        let text = self.beginning.into_iter().chain(tokens[range].iter().copied()).collect();
        (text, skipped + usize::from(self.beginning.is_some()))
    }

    /// Each window of a text of `tokens` tokens, and how many of its first tokens are not scored.
    fn cut(self, tokens: usize) -> Result<Vec<(Range<usize>, usize)>, ScoreError> {
        let Windows { context, stride, beginning } = self;
        let reach = self.reach();
        if context < 2 || stride == 0 || stride > reach {
            return Err(ScoreError::Windows { context: reach, stride });
        }
        let unscored = usize::from(beginning.is_none());
        if tokens < 1 + unscored {
            return Err(ScoreError::TooFewTokens { found: tokens, expected: 1 + unscored });
        }
        let (mut windows, mut start, mut scored) = (Vec::new(), 0, 0);
        while scored < tokens {
            let end = tokens.min(start + reach);
            let skipped = (scored - start).max(unscored);
            if start + skipped < end {
                windows.push((start..end, skipped));
            }
            (start, scored) = (start + stride, end);
        }
        Ok(windows)
    }
}

/// Negative log-likelihood of a text.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Perplexity {
    /// Sum over the scored tokens, in nats.
    pub nll: f64,
    /// Tokens scored.
    pub tokens: usize,
}

impl Perplexity {
    /// `exp` of the mean negative log-likelihood of a token.
    pub fn perplexity(&self) -> f64 {
        (self.nll / self.tokens as f64).exp()
    }

    /// Bits for a byte of a text of `tokens` tokens and `bytes` bytes, if tokens that were not
    /// scored cost what the others do.
    pub fn bits_per_byte(&self, tokens: usize, bytes: usize) -> f64 {
        self.nll / self.tokens as f64 * tokens as f64 / (bytes as f64 * std::f64::consts::LN_2)
    }

    fn take(&mut self, logits: &[f32], next: u32) {
        self.nll -= logprob(logits, next);
        self.tokens += 1;
    }
}

/// How a model's distributions differ from a base's.
#[derive(Debug, Clone, PartialEq)]
pub struct Comparison {
    /// The model's own.
    pub model: Perplexity,
    /// The base's own.
    pub base: Perplexity,
    /// Mean over positions of `KL(base || model)`, in nats.
    pub kl_mean: f64,
    /// The value that 99 % of the positions do not exceed.
    pub kl_p99: f64,
    /// Share of positions where both prefer the same token.
    pub top1_agreement: f64,
}

/// The perplexity of `tokens`. The executor's cache is overwritten; `progress` hears how many
/// tokens are scored and how many there are.
pub fn perplexity(
    executor: &mut dyn Executor,
    tokens: &[u32],
    windows: Windows,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Perplexity, ScoreError> {
    let mut total = Perplexity::default();
    for (window, skipped) in windows.cut(tokens.len())? {
        let (text, skipped) = windows.text(tokens, window, skipped);
        let mut feed = Feed::new(executor, &text, skipped - 1)?;
        while feed.rows() > 0 {
            let (first, logits) = feed.run(executor, feed.rows())?;
            let rows = logits.chunks_exact(feed.vocabulary);
            text[first + 1..].iter().zip(rows).for_each(|(&next, row)| total.take(row, next));
            progress(total.tokens, tokens.len());
        }
    }
    Ok(total)
}

/// Compares a model with a base of the same vocabulary over `tokens`, row by row. Both executors'
/// caches are overwritten.
pub fn compare(
    model: &mut dyn Executor,
    base: &mut dyn Executor,
    tokens: &[u32],
    windows: Windows,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Comparison, ScoreError> {
    let vocabulary = base.program().vocabulary;
    let found = model.program().vocabulary;
    if found != vocabulary {
        return Err(ScoreError::Vocabularies { found, expected: vocabulary });
    }
    let mut perplexities = [Perplexity::default(); 2];
    let (mut divergences, mut agreements) = (Vec::new(), 0);
    for (window, skipped) in windows.cut(tokens.len())? {
        let (text, skipped) = windows.text(tokens, window, skipped);
        let wanted = skipped - 1;
        let mut feeds = [Feed::new(model, &text, wanted)?, Feed::new(base, &text, wanted)?];
        loop {
            let rows = feeds[0].rows().min(feeds[1].rows());
            if rows == 0 {
                break;
            }
            let (first, ours) = feeds[0].run(model, rows)?;
            let (_, theirs) = feeds[1].run(base, rows)?;
            let [ours, theirs] = [ours, theirs].map(|all| all.chunks_exact(vocabulary));
            for ((&next, ours), theirs) in text[first + 1..].iter().zip(ours).zip(theirs) {
                perplexities[0].take(ours, next);
                perplexities[1].take(theirs, next);
                divergences.push(kl_divergence(theirs, ours));
                agreements += usize::from(argmax(ours) == argmax(theirs));
            }
            progress(divergences.len(), tokens.len());
        }
    }
    let [model, base] = perplexities;
    let count = divergences.len() as f64;
    let kl_mean = divergences.iter().sum::<f64>() / count;
    let kl_p99 = quantile(&mut divergences, 0.99);
    Ok(Comparison { model, base, kl_mean, kl_p99, top1_agreement: agreements as f64 / count })
}

/// `KL(base || model)` of the softmaxes of two rows of logits, in nats, summed in `f64`.
pub fn kl_divergence(base: &[f32], model: &[f32]) -> f64 {
    let (base_sum, model_sum) = (log_sum_exp(base), log_sum_exp(model));
    let mut sum = 0.0;
    for (&base, &model) in base.iter().zip(model) {
        let base = f64::from(finite(base)) - base_sum;
        let probability = f64::from(exp_negative(base.min(0.0) as f32));
        if probability > 0.0 {
            sum += probability * (base - (f64::from(finite(model)) - model_sum));
        }
    }
    // It cannot be negative but for rounding.
    sum.max(0.0)
}

/// The smallest value that a share of `at` of the values does not exceed.
fn quantile(values: &mut [f64], at: f64) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values[((values.len() as f64 * at).ceil() as usize).clamp(1, values.len()) - 1]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::fake::{FakeExecutor, layout, naive_logits};

    fn executor(windows: &[Option<usize>], rows_max: usize) -> FakeExecutor {
        FakeExecutor::new(layout(4, windows), 100, rows_max, 40)
    }

    #[test]
    fn windows_score_each_token_once() {
        for tokens in 2..60 {
            for context in 2..20 {
                for stride in 1..=context {
                    let mut scored = vec![0; tokens];
                    let windows = Windows { context, stride, beginning: None };
                    for (window, skipped) in windows.cut(tokens).unwrap() {
                        assert!(window.len() <= context && skipped < window.len());
                        window.skip(skipped).for_each(|at| scored[at] += 1);
                    }
                    // The first token of a window is not scored unless windows overlap.
                    let starts =
                        |at: usize| at == 0 || (stride == context && at.is_multiple_of(context));
                    let expected: Vec<_> = (0..tokens).map(|at| u32::from(!starts(at))).collect();
                    assert_eq!(scored, expected, "{tokens} tokens, {context} every {stride}");
                }
            }
        }
        assert!(Windows { context: 8, stride: 9, beginning: None }.cut(20).is_err());
        assert!(Windows { context: 8, stride: 8, beginning: Some(1) }.cut(20).is_err());
        assert!(Windows::of(1).cut(20).is_err());
        assert!(Windows::of(8).cut(1).is_err());
    }

    #[test]
    fn behind_a_beginning_every_token_is_scored_once() {
        for tokens in 1..40 {
            for context in 2..12 {
                for stride in 1..context {
                    let mut scored = vec![0; tokens];
                    let windows = Windows { context, stride, beginning: Some(1) };
                    for (window, skipped) in windows.cut(tokens).unwrap() {
                        assert!(window.len() < context && skipped < window.len());
                        window.skip(skipped).for_each(|at| scored[at] += 1);
                    }
                    assert_eq!(scored, vec![1; tokens], "{context} every {stride}");
                }
            }
        }
    }

    #[test]
    fn perplexity_is_the_naive_one_in_any_chunks() {
        let tokens: Vec<u32> = (0..77).map(|n| n * n % 61).collect();
        for windows in [
            Windows::of(20),
            Windows { context: 20, stride: 7, beginning: None },
            Windows { context: 20, stride: 7, beginning: Some(3) },
            Windows { context: 20, stride: 19, beginning: Some(3) },
            Windows::of(100),
        ] {
            let mut expected = Perplexity::default();
            for (window, skipped) in windows.cut(tokens.len()).unwrap() {
                for at in window.start + skipped..window.end {
                    let (seen, _) = windows.text(&tokens, window.start..at, 0);
                    let logits = naive_logits(&seen, &[None, Some(6)]);
                    expected.take(&logits, tokens[at]);
                }
            }
            for rows_max in [1, 5, 64] {
                let mut executor = executor(&[None, Some(6)], rows_max);
                let found = perplexity(&mut executor, &tokens, windows, &mut |_, _| ()).unwrap();
                assert_eq!(found, expected);
            }
        }
    }

    #[test]
    fn a_model_does_not_diverge_from_itself() {
        let tokens: Vec<u32> = (0..50).map(|n| n * n % 61).collect();
        let run = |windows: &[Option<usize>], rows: [usize; 2]| {
            let (mut ours, mut theirs) = (executor(windows, rows[0]), executor(&[None], rows[1]));
            compare(&mut ours, &mut theirs, &tokens, Windows::of(30), &mut |_, _| ()).unwrap()
        };
        let same = run(&[None], [7, 16]);
        assert_eq!((same.kl_mean, same.kl_p99, same.top1_agreement), (0.0, 0.0, 1.0));
        assert_eq!(same.model, same.base);
        let other = run(&[Some(3)], [7, 16]);
        assert!(other.kl_mean > 0.1 && other.kl_p99 > other.kl_mean && other.top1_agreement < 0.5);
    }

    #[test]
    fn divergence_of_two_coins() {
        let (base, model) = ([0.0f32, 3f32.ln()], [0.0f32, 0.0]);
        let expected = 0.25 * (0.25f64 / 0.5).ln() + 0.75 * (0.75f64 / 0.5).ln();
        assert!((kl_divergence(&base, &model) - expected).abs() < 1e-6);
        assert_eq!(kl_divergence(&[f32::NEG_INFINITY, 0.0], &[f32::NEG_INFINITY, 5.0]), 0.0);
        assert_eq!(quantile(&mut [3.0, 1.0, 2.0], 0.99), 3.0);
        assert_eq!(quantile(&mut (0..1000).map(f64::from).collect::<Vec<_>>(), 0.99), 989.0);
    }
}
