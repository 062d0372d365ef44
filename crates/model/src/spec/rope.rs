//! `RopeSpec`: a rotary embedding and its scaling, and the table of frequencies that it means.
//!
//! The arithmetic is in `f32` and in the order of transformers' `modeling_rope_utils.py` (5.17),
//! so that tables agree with the reference to the last bits; a fixture compares every kind.

use std::f64::consts::PI;

use lathe_program::{LongRope, RopeStyle, RopeTable};
use serde::Serialize;

/// How frequencies are stretched for contexts longer than the pretrained one.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// Every frequency divided by `factor` (kaiokendev).
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// A larger base beyond `original` positions (dynamic NTK).
    Dynamic {
        /// How fast the base grows.
        factor: f64,
        /// Positions of the pretrained context.
        original: usize,
    },
    /// Low frequencies interpolated, high ones kept (YaRN, arXiv 2309.00071).
    Yarn {
        /// Divisor of interpolated frequencies.
        factor: f64,
        /// Positions of the pretrained context.
        original: usize,
        /// Turns over `original` positions above which a frequency is kept.
        beta_fast: f64,
        /// Turns below which it is interpolated.
        beta_slow: f64,
        /// Whether the ramp's ends are rounded to whole pairs.
        truncate: bool,
        /// Multiplies cosine and sine.
        magnitude: f64,
    },
    /// Llama 3.1's piecewise interpolation.
    Llama3 {
        /// Divisor of low frequencies.
        factor: f64,
        /// Positions of the pretrained context.
        original: usize,
        /// `original / low_factor` is the wavelength above which a frequency is divided.
        low_factor: f64,
        /// `original / high_factor` is the wavelength below which it is kept.
        high_factor: f64,
    },
    /// A divisor for each pair, one list for short and one for long contexts (LongRoPE,
    /// arXiv 2402.13753).
    LongRope {
        /// Divisors up to `original` positions, one a pair.
        short: Vec<f32>,
        /// Divisors beyond.
        long: Vec<f32>,
        /// Positions of the pretrained context.
        original: usize,
        /// Multiplies cosine and sine.
        magnitude: f64,
    },
    /// A divisor for each pair, given outright (GGUF's `rope_freqs.weight`).
    Divisors {
        /// One a pair.
        divisors: Vec<f32>,
    },
}

/// A rotary embedding (RoFormer, arXiv 2104.09864).
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RopeSpec {
    /// Base of the frequencies.
    pub theta: f64,
    /// Elements of a head that turn, the first ones; even. The others pass (partial rotary).
    pub rotary: usize,
    /// Which elements pair up.
    pub style: RopeStyle,
    /// Scaling for long contexts.
    pub scaling: RopeScaling,
}

impl RopeSpec {
    /// Plain frequencies `theta^(-2i / rotary)`, half-split.
    pub fn plain(theta: f64, rotary: usize) -> Self {
        RopeSpec { theta, rotary, style: RopeStyle::HalfSplit, scaling: RopeScaling::None }
    }

    /// Positions that the scaling makes of `positions`, which the file gives (vLLM's rule: a linear
    /// factor stretches them, YaRN stretches those of the pretrained context).
    pub fn stretched(&self, positions: usize) -> usize {
        match self.scaling {
            RopeScaling::Linear { factor } => (positions as f64 * factor.max(1.0)) as usize,
            RopeScaling::Yarn { factor, original, .. } => {
                positions.max((original as f64 * factor) as usize)
            }
            _ => positions,
        }
    }

    /// Positions beyond which the table would have to change with each token, if it would (dynamic
    /// NTK).
    pub fn limit(&self) -> Option<usize> {
        match self.scaling {
            RopeScaling::Dynamic { original, .. } => Some(original),
            _ => None,
        }
    }

    /// Positions beyond which the table depends on the text's length, if it does: dynamic NTK and
    /// LongRoPE have one table up to here and another for longer texts.
    pub fn switches_at(&self) -> Option<usize> {
        match self.scaling {
            RopeScaling::Dynamic { original, .. } | RopeScaling::LongRope { original, .. } => {
                Some(original)
            }
            _ => None,
        }
    }

    /// The table for texts of up to `context` positions.
    ///
    /// LongRoPE has two, and a text turns by the one for the length that it has reached
    /// ([`RopeTable::long`]). Dynamic NTK has one for every length beyond the original; this is
    /// that for `context`.
    pub fn table(&self, context: usize) -> RopeTable {
        let plain = || powers(self.theta as f32, self.rotary).map(|power| 1.0 / power);
        let divided = |divisors: &[f32]| -> Vec<f32> {
            let powers = powers(self.theta as f32, self.rotary);
            powers.zip(divisors).map(|(p, d)| 1.0 / (d * p)).collect()
        };
        let mut long = None;
        let (frequencies, magnitude): (Vec<f32>, f64) = match &self.scaling {
            RopeScaling::None => (plain().collect(), 1.0),
            RopeScaling::Linear { factor } => (plain().map(|f| f / *factor as f32).collect(), 1.0),
            RopeScaling::Dynamic { factor, original } => {
                let base = dynamic_base(self.theta, self.rotary, *factor, *original, context);
                (powers(base as f32, self.rotary).map(|power| 1.0 / power).collect(), 1.0)
            }
            RopeScaling::Yarn { factor, original, beta_fast, beta_slow, truncate, magnitude } => {
                let ends = self.yarn_ends(*original as f64, *beta_fast, *beta_slow, *truncate);
                (self.yarn(*factor, ends), *magnitude)
            }
            RopeScaling::Llama3 { factor, original, low_factor, high_factor } => {
                let scale = |f| llama3(f, *factor, *original as f64, *low_factor, *high_factor);
                (plain().map(scale).collect(), 1.0)
            }
            RopeScaling::LongRope { short, long: beyond, original, magnitude } => {
                long = (context > *original).then(|| LongRope {
                    original: *original,
                    inverse_frequencies: divided(beyond),
                });
                (divided(short), *magnitude)
            }
            RopeScaling::Divisors { divisors } => {
                (plain().zip(divisors).map(|(f, d)| f / d).collect(), 1.0)
            }
        };
        RopeTable {
            inverse_frequencies: frequencies,
            long,
            magnitude: magnitude as f32,
            style: self.style,
        }
    }

    /// The pairs between which YaRN's ramp lies (section 3.2, `find_correction_range`).
    fn yarn_ends(&self, original: f64, fast: f64, slow: f64, truncate: bool) -> (f64, f64) {
        let dim = self.rotary as f64;
        let pair_of =
            |turns: f64| dim * (original / (turns * 2.0 * PI)).ln() / (2.0 * self.theta.ln());
        let (mut low, mut high) = (pair_of(fast), pair_of(slow));
        if truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        (low.max(0.0), high.min(dim - 1.0))
    }

    fn yarn(&self, factor: f64, (low, high): (f64, f64)) -> Vec<f32> {
        // The reference widens an empty ramp to avoid a division by zero.
        let high = if low == high { high + 0.001 } else { high };
        powers(self.theta as f32, self.rotary)
            .enumerate()
            .map(|(pair, power)| {
                let ramp = ((pair as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
                let kept = 1.0 - ramp;
                1.0 / (factor as f32 * power) * (1.0 - kept) + 1.0 / power * kept
            })
            .collect()
    }
}

/// `base^(2i / rotary)` for each pair.
fn powers(base: f32, rotary: usize) -> impl Iterator<Item = f32> {
    (0..rotary / 2).map(move |pair| base.powf((2 * pair) as f32 / rotary as f32))
}

fn dynamic_base(theta: f64, rotary: usize, factor: f64, original: usize, context: usize) -> f64 {
    let stretch = context.max(original) as f64 / original as f64;
    let dim = rotary as f64;
    theta * (factor * stretch - (factor - 1.0)).powf(dim / (dim - 2.0))
}

fn llama3(frequency: f32, factor: f64, original: f64, low_factor: f64, high_factor: f64) -> f32 {
    let wavelength = (2.0 * PI) as f32 / frequency;
    let (factor, original) = (factor as f32, original as f32);
    let (low, high) = (low_factor as f32, high_factor as f32);
    if wavelength > original / low {
        frequency / factor
    } else if wavelength < original / high {
        frequency
    } else {
        let smooth = (original / wavelength - low) / (high - low);
        (1.0 - smooth) * frequency / factor + smooth * frequency
    }
}

/// YaRN's `get_mscale` (arXiv 2309.00071, equation 22): `0.1 * m * ln(scale) + 1`.
pub fn yarn_magnitude(scale: f64, m: f64) -> f64 {
    if scale <= 1.0 { 1.0 } else { 0.1 * m * scale.ln() + 1.0 }
}
