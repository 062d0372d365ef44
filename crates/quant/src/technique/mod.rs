//! The registry of techniques. Each has one file, one signature and one row here.

mod awq;
mod clip;
mod damping;
mod divergence;
mod four_over_six;
mod gptaq;
mod gptq;
mod hadamard;
mod imatrix;
mod low_rank;
mod rotate;
mod rtn;
mod smooth;

use std::fmt::Write as _;

use lathe_program::{Program, Weight};
use lathe_tensor::codec::scaled::E8m0Rounding;
use lathe_tensor::suggest::one_of;
use lathe_tensor::{Format, Tensor};

use crate::correction::Correction;
use crate::error::QuantError;
use crate::matrix::{Group, Outcome};
use crate::parameters::{Kind, Parameter, Parameters};
use crate::rotate::turns::Turns;
pub(crate) use low_rank::{bits_of as correction_bits, rounds_of as correction_rounds};

/// Applies a technique to matrices that share an input. Takes the group with its statistics, the
/// format and the parameters. Returns quantized matrices or scales of channels.
pub type ApplyToGroup = fn(&Group<'_>, Format, &Parameters) -> Result<Outcome, QuantError>;

/// Applies a technique to the weights of the whole program. It needs no statistics.
pub type ApplyToProgram = fn(&Program, &Parameters) -> Result<Turns, QuantError>;

/// For techniques that rotate inputs while the model runs. Takes a weight and the index of the op
/// that reads its input. Returns the elements of a rotated block, or `None` to leave the input
/// alone.
pub type ApplyToInput = fn(&Program, Weight, usize, &Parameters) -> Option<usize>;

/// For techniques that correct rounding errors. Takes the matrices before and after rounding, and
/// the elements of a block of their input if it is rotated while the model runs. Returns a
/// correction for each, and a note.
pub type ApplyToErrors = fn(
    &Group<'_>,
    &[Tensor],
    Option<usize>,
    &Parameters,
) -> Result<Vec<(Correction, Option<String>)>, QuantError>;

/// What a technique works on.
#[derive(Debug, Clone, Copy)]
pub enum Apply {
    /// On matrices that share an input.
    Group(ApplyToGroup),
    /// The same, with the difference of the input from the float model's.
    Asymmetric(ApplyToGroup),
    /// On all weights at once.
    Program(ApplyToProgram),
    /// On the input of each matrix.
    Inputs(ApplyToInput),
    /// On matrices that share an input, and their rounding errors.
    Errors(ApplyToErrors),
}

/// The stage at which a technique runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// First: changes weights of the whole model in ways that cancel.
    Rotate,
    /// Changes weights and the ops before them, so that rounding loses less.
    Prepare,
    /// Chooses codes. Each tensor has exactly one such technique.
    Round,
    /// Adds a correction beside the codes.
    Correct,
}

/// One technique.
#[derive(Debug, Clone, Copy)]
pub struct Technique {
    /// Its name in recipes and after `--method`.
    pub name: &'static str,
    /// When it runs.
    pub stage: Stage,
    /// Its effect and its source, for help.
    pub effect: &'static str,
    /// What it requires, for help.
    pub requires: &'static str,
    /// Techniques that cannot be used on the same tensor.
    pub conflicts: &'static [&'static str],
    /// Whether it needs statistics of a tensor's inputs.
    pub calibrated: bool,
    /// Whether it needs products of input channels. Otherwise their magnitudes are enough.
    pub products: bool,
    /// Its parameters.
    pub parameters: &'static [Parameter],
    /// Its function.
    pub apply: Apply,
}

/// Every technique, the simplest first.
pub static TECHNIQUES: [&Technique; 11] = [
    &rtn::TECHNIQUE,
    &clip::TECHNIQUE,
    &four_over_six::TECHNIQUE,
    &imatrix::TECHNIQUE,
    &gptq::TECHNIQUE,
    &gptaq::TECHNIQUE,
    &low_rank::TECHNIQUE,
    &awq::TECHNIQUE,
    &smooth::TECHNIQUE,
    &rotate::TECHNIQUE,
    &hadamard::TECHNIQUE,
];

/// The parameter that says how the power-of-two scale of an MX block is chosen.
pub(crate) const POWER_OF_TWO: Parameter = Parameter {
    name: "power_of_two",
    kind: Kind::Choice(&["even", "floor", "ceil", "mse"]),
    meaning: "how MX formats choose a block's power of two (floor: OCP; ceil: RCEIL)",
};

/// The value of [`POWER_OF_TWO`].
pub(crate) fn power_of_two(parameters: &Parameters) -> E8m0Rounding {
    match parameters.choice(POWER_OF_TWO.name) {
        "floor" => E8m0Rounding::Floor,
        "ceil" => E8m0Rounding::Ceil,
        "mse" => E8m0Rounding::Mse,
        _ => E8m0Rounding::Even,
    }
}

impl Technique {
    /// Its function for groups.
    ///
    /// # Panics
    /// If it works on something else.
    pub fn group(&self) -> ApplyToGroup {
        match self.apply {
            Apply::Group(apply) | Apply::Asymmetric(apply) => apply,
            Apply::Program(_) | Apply::Inputs(_) | Apply::Errors(_) => {
                panic!("{} works on no group", self.name)
            }
        }
    }

    /// Its function for rounding errors.
    ///
    /// # Panics
    /// If it works on something else.
    pub fn errors(&self) -> ApplyToErrors {
        match self.apply {
            Apply::Errors(apply) => apply,
            _ => panic!("{} works on no errors", self.name),
        }
    }
}

/// The technique called `name`.
///
/// # Errors
/// If there is none. The message lists the names.
pub fn find(name: &str) -> Result<&'static Technique, QuantError> {
    let found = TECHNIQUES.iter().copied().find(|technique| technique.name == name);
    found.ok_or_else(|| {
        let known: Vec<&str> = TECHNIQUES.iter().map(|technique| technique.name).collect();
        QuantError::Recipe(format!("unknown technique `{name}`, expected {}", one_of(name, &known)))
    })
}

/// The registry as text, for `--help`.
pub fn help() -> String {
    let mut text = String::from("Techniques (--method A+B, or `use` in a recipe):\n");
    for technique in TECHNIQUES {
        let _ = writeln!(text, "  {:<13} {}", technique.name, technique.effect);
        let _ = writeln!(text, "                requires {}", technique.requires);
        if !technique.conflicts.is_empty() {
            let _ = writeln!(text, "                not with {}", technique.conflicts.join(", "));
        }
        for parameter in technique.parameters {
            let default = match parameter.kind {
                Kind::Whole { default, .. } => default.to_string(),
                Kind::Number { default, .. } => default.to_string(),
                Kind::Flag { default } => default.to_string(),
                Kind::Choice(words) => words.join("|"),
            };
            let _ = writeln!(
                text,
                "                {} = {default}: {}",
                parameter.name, parameter.meaning
            );
        }
    }
    text
}

#[cfg(test)]
pub(crate) mod tests {
    use lathe_tensor::codec::scaled::{BlockScale, encode};
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;
    use crate::matrix::{Matrix, Scales};
    use crate::statistics::Statistics;

    /// A random matrix, and correlated inputs whose channels differ much in size, like those of a
    /// decoder.
    pub(crate) struct Case {
        pub rows: usize,
        pub columns: usize,
        pub values: Vec<f32>,
        pub statistics: Statistics,
    }

    pub(crate) fn normal(random: &mut ChaCha8Rng) -> f32 {
        (0..12).map(|_| random.random::<f32>()).sum::<f32>() - 6.0
    }

    pub(crate) fn case(rows: usize, columns: usize, seed: u64) -> Case {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let values = (0..rows * columns).map(|_| 0.05 * normal(&mut random)).collect();
        let factors = 24;
        let mixing: Vec<f32> = (0..factors * columns).map(|_| normal(&mut random)).collect();
        let sizes: Vec<f32> = (0..columns)
            .map(|i| if i % 17 == 3 { 12.0 } else { 0.3 + random.random::<f32>() })
            .collect();
        let mut statistics = Statistics::new(columns);
        let mut inputs = Vec::new();
        for _ in 0..600 {
            let hidden: Vec<f32> = (0..factors).map(|_| normal(&mut random)).collect();
            for column in 0..columns {
                let shared: f32 =
                    (0..factors).map(|f| hidden[f] * mixing[f * columns + column]).sum();
                inputs.push(sizes[column] * (0.3 * shared + normal(&mut random)));
            }
        }
        statistics.add(&inputs);
        Case { rows, columns, values, statistics }
    }

    impl Case {
        pub(crate) fn group(&self) -> Group<'_> {
            let matrix = Matrix {
                name: "layers.0.ffn.gate",
                rows: self.rows,
                columns: self.columns,
                values: &self.values,
                fused_largest: None,
            };
            Group {
                matrices: vec![matrix],
                statistics: Some(&self.statistics),
                asymmetry: None,
                tied: None,
            }
        }
    }

    /// The decoded nearest code, by the scalar definition.
    pub(crate) fn nearest(scales: &Scales, value: f32, block: BlockScale) -> f32 {
        let (element, step) = (scales.format.element, scales.step(block));
        let code = encode(element, value, step, block.zero);
        (lathe_tensor::codec::element::to_f32(element, code) - f32::from(block.zero)) * step
    }

    pub(crate) fn parameters(
        technique: &Technique,
        settings: &[(&str, toml::Value)],
    ) -> Parameters {
        let mut parameters = Parameters::defaults(technique.parameters);
        for (key, value) in settings {
            parameters.set(technique.parameters, key, value).unwrap();
        }
        parameters
    }

    /// The output error of a rounding technique.
    pub(crate) fn error_of(
        name: &str,
        case: &Case,
        format: &str,
        settings: &[(&str, toml::Value)],
    ) -> f64 {
        let technique = find(name).unwrap();
        let format = Format::parse(format).unwrap();
        let settings = parameters(technique, settings);
        match (technique.group())(&case.group(), format, &settings).unwrap() {
            Outcome::Quantized(list) => list[0].report.output_error.unwrap(),
            Outcome::Scaled(_) => panic!("{name} rounds nothing"),
        }
    }

    #[test]
    fn help_tells_of_every_technique_and_parameter() {
        let text = help();
        for technique in TECHNIQUES {
            assert!(text.contains(technique.effect) && text.contains(technique.requires));
            assert!(technique.parameters.iter().all(|it| text.contains(it.meaning)));
            assert!(technique.conflicts.iter().all(|other| find(other).is_ok()));
        }
        assert!(find("magic").unwrap_err().to_string().contains("rtn, clip"));
    }
}
