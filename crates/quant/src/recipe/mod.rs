//! Recipes: what to do to which tensors, in TOML.
//!
//! ```toml
//! format = "int4-g64-bf16"        # or a preset: w4a16, w8a16, mxfp4, q4_k, ...
//! tensors = ["layers.*"]          # canonical names, * is anything; default: all linear layers
//! keep = ["layers.0.*"]           # those of them that stay as they are
//! prefix = "quantized"            # the layers that calibration runs through; or "float"
//! activations = "int4-token"      # the format of the matrices' inputs; default: floats
//!
//! [formats]                       # other formats for some tensors; the last match counts
//! "layers.0.*" = "int8-channel-bf16"
//!
//! [budget]                        # chooses a format for each layer and puts it in [formats]
//! bits = 4.5                      # mean bits of a weight, scales of groups included
//! formats = ["int4-g64-bf16", "int8-channel-bf16"]
//! sensitivity = "kl"              # the loss to minimise; or "hessian"
//!
//! [[technique]]
//! use = "awq"
//!
//! [[technique]]
//! use = "gptq"
//! tensors = ["*.ffn.*"]           # some of the quantized tensors; default: all
//! act_order = true
//! ```

mod budget;
mod file;
mod presets;

use lathe_tensor::{ActivationFormat, Format};
use serde::{Deserialize, Serialize};

use crate::error::QuantError;
use crate::parameters::Parameters;
use crate::technique::{self, Apply, Stage, Technique};
pub use budget::{Budget, Sensitivity};
pub use presets::{PRESETS, Preset, activations_named, activations_of, format_named};

/// One step of a recipe.
#[derive(Debug, Clone)]
pub struct TechniqueStep {
    /// The technique.
    pub technique: &'static Technique,
    /// Its parameters.
    pub parameters: Parameters,
    /// Patterns of canonical names. `None` means all quantized tensors.
    pub tensors: Option<Vec<String>>,
}

/// The layers that calibration's text runs through before it reaches a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Prefix {
    /// The quantized layers. A layer then sees the errors before it and compensates them.
    Quantized,
    /// The original layers.
    Float,
}

/// What is to be done to a model.
#[derive(Debug, Clone)]
pub struct Recipe {
    /// The format of quantized tensors.
    pub format: Format,
    /// Patterns of the tensors to quantize. `None` means all linear layers.
    pub tensors: Option<Vec<String>>,
    /// Patterns of tensors that are never quantized. They override everything else.
    pub keep: Vec<String>,
    /// The layers that calibration runs through.
    pub prefix: Prefix,
    /// Patterns of tensors with another format. The last match counts.
    pub formats: Vec<(String, Format)>,
    /// The limit of bits. It is planned before anything else.
    pub budget: Option<Budget>,
    /// The format that inputs of quantized matrices are rounded to while the model runs.
    pub activations: Option<ActivationFormat>,
    /// The steps in order. Those that round come last; only corrections follow them.
    pub steps: Vec<TechniqueStep>,
}

fn wrong(message: String) -> QuantError {
    QuantError::Recipe(message)
}

impl Recipe {
    /// A recipe of a format and technique names joined by `+`, with default parameters. If they
    /// only prepare, `clip` is added, which chooses codes by the output error.
    ///
    /// # Errors
    /// If a technique does not exist, or two conflict.
    pub fn simple(format: Format, methods: &str) -> Result<Recipe, QuantError> {
        let mut steps = Vec::new();
        for name in methods.split('+') {
            let technique = technique::find(name.trim())?;
            let parameters = Parameters::defaults(technique.parameters);
            steps.push(TechniqueStep { technique, parameters, tensors: None });
        }
        if steps.iter().all(|step| step.technique.stage != Stage::Round) {
            let technique = technique::find("clip")?;
            let mut parameters = Parameters::defaults(technique.parameters);
            parameters.set(technique.parameters, "error", &toml::Value::String("output".into()))?;
            let corrects = |step: &TechniqueStep| step.technique.stage == Stage::Correct;
            let at = steps.iter().position(corrects).unwrap_or(steps.len());
            steps.insert(at, TechniqueStep { technique, parameters, tensors: None });
        }
        let recipe = Recipe {
            format,
            tensors: None,
            keep: Vec::new(),
            prefix: Prefix::of(&steps),
            activations: None,
            formats: Vec::new(),
            budget: None,
            steps,
        };
        recipe.check()?;
        Ok(recipe)
    }

    /// The same with inputs rounded to `activations`.
    ///
    /// # Errors
    /// If the format cannot be written to a folder.
    pub fn with_activations(
        self,
        activations: Option<ActivationFormat>,
    ) -> Result<Recipe, QuantError> {
        let recipe = Recipe { activations, ..self };
        recipe.check()?;
        Ok(recipe)
    }

    /// Whether a technique needs statistics of inputs, or a budget needs a plan.
    pub fn needs_calibration(&self) -> bool {
        self.budget.is_some() || self.steps.iter().any(TechniqueStep::needs_calibration)
    }

    /// Whether a technique needs products of different input channels.
    pub(crate) fn needs_products(&self) -> bool {
        self.budget.is_some() || self.steps.iter().any(TechniqueStep::needs_products)
    }

    /// Whether a technique compares inputs with the float model's.
    pub(crate) fn is_asymmetric(&self) -> bool {
        self.steps.iter().any(|step| matches!(step.technique.apply, Apply::Asymmetric(_)))
    }

    /// The format of tensor `name`.
    pub fn format_of(&self, name: &str) -> Format {
        let named = self.formats.iter().rev().find(|(pattern, _)| matches(pattern, name));
        named.map_or(self.format, |(_, format)| *format)
    }

    /// The step that chooses the codes of tensor `name`.
    ///
    /// # Errors
    /// If there is none or more than one.
    pub fn rounding_of(&self, name: &str) -> Result<&TechniqueStep, QuantError> {
        let rounds =
            |step: &&TechniqueStep| step.technique.stage == Stage::Round && step.applies_to(name);
        let mut found = self.steps.iter().filter(rounds);
        match (found.next(), found.next()) {
            (Some(step), None) => Ok(step),
            (None, _) => Err(wrong(format!("no technique rounds tensor {name}"))),
            (Some(a), Some(b)) => Err(wrong(format!(
                "{} and {} both round tensor {name}, expected one technique",
                a.technique.name, b.technique.name
            ))),
        }
    }

    /// The step that corrects the rounding error of tensor `name`, if there is one.
    ///
    /// # Errors
    /// If there is more than one.
    pub fn correction_of(&self, name: &str) -> Result<Option<&TechniqueStep>, QuantError> {
        let corrects =
            |step: &&TechniqueStep| step.technique.stage == Stage::Correct && step.applies_to(name);
        let mut found = self.steps.iter().filter(corrects);
        match (found.next(), found.next()) {
            (found, None) => Ok(found),
            (_, Some(second)) => Err(wrong(format!(
                "{} corrects tensor {name} twice, expected once",
                second.technique.name
            ))),
        }
    }

    /// The technique that writes corrections beside the quantized weights, if there is one.
    pub fn corrects(&self) -> Option<&'static Technique> {
        let mut techniques = self.steps.iter().map(|step| step.technique);
        techniques.find(|technique| technique.stage == Stage::Correct)
    }

    fn check(&self) -> Result<(), QuantError> {
        if self.steps.is_empty() {
            return Err(wrong("it has no [[technique]]".to_owned()));
        }
        if self.is_asymmetric() && self.prefix == Prefix::Float {
            return Err(wrong(
                "`prefix` is \"float\", expected \"quantized\": gptaq makes up for quantized layers"
                    .to_owned(),
            ));
        }
        let mut rounded = false;
        if self.activations.is_some() && !matches!(self.format, Format::Scaled(_)) {
            return Err(wrong(format!(
                "`activations` beside {}, expected a folder's format",
                self.format
            )));
        }
        for (index, step) in self.steps.iter().enumerate() {
            let technique = step.technique;
            let rotates = |step: &TechniqueStep| step.technique.stage == Stage::Rotate;
            let corrects = |step: &TechniqueStep| step.technique.stage == Stage::Correct;
            match technique.stage {
                Stage::Round | Stage::Prepare if self.steps[..index].iter().any(corrects) => {
                    let name = technique.name;
                    return Err(wrong(format!(
                        "{name} comes after a correction of what rounding loses, expected before"
                    )));
                }
                Stage::Round => rounded = true,
                Stage::Correct => {}
                Stage::Rotate if !self.steps[..index].iter().all(rotates) => {
                    let name = technique.name;
                    return Err(wrong(format!(
                        "{name} comes after another technique, expected before"
                    )));
                }
                Stage::Rotate if step.tensors.is_some() => {
                    let name = technique.name;
                    return Err(wrong(format!("{name} is for the whole model, found `tensors`")));
                }
                Stage::Rotate => {}
                Stage::Prepare if rounded => {
                    let name = technique.name;
                    return Err(wrong(format!(
                        "{name} comes after a technique that rounds, expected before"
                    )));
                }
                Stage::Prepare => {}
            }
            for other in &self.steps[..index] {
                let same = technique.name == other.technique.name;
                let conflicts = technique.conflicts.contains(&other.technique.name);
                // Two techniques for different tensors may go together. Overlaps are found later.
                if (same || conflicts) && (step.tensors.is_none() || other.tensors.is_none()) {
                    return Err(wrong(format!(
                        "{} does not go with {} on the same tensors",
                        technique.name, other.technique.name
                    )));
                }
            }
        }
        Ok(())
    }
}

impl TechniqueStep {
    /// Whether the step needs statistics of the inputs of its tensors.
    pub fn needs_calibration(&self) -> bool {
        self.technique.calibrated
            || self.error().is_some_and(|error| matches!(error, "channel" | "output" | "inputs"))
    }

    /// Whether it needs products of different channels of those inputs.
    pub(crate) fn needs_products(&self) -> bool {
        self.technique.products
            || self.error().is_some_and(|error| matches!(error, "output" | "inputs"))
    }

    /// The name of the error that it minimises, if it has such a choice.
    fn error(&self) -> Option<&str> {
        let mut parameters = self.technique.parameters.iter();
        let chosen = parameters.find(|it| matches!(it.name, "error" | "weighting"));
        chosen.map(|it| self.parameters.choice(it.name))
    }

    /// Whether the step is for tensor `name`.
    pub fn applies_to(&self, name: &str) -> bool {
        self.tensors.as_ref().is_none_or(|list| list.iter().any(|it| matches(it, name)))
    }
}

impl Prefix {
    /// The default prefix of `steps`. Techniques that only weigh columns by the sizes of their
    /// inputs compensate nothing, and the sizes hardly change. So they take the float layers, which
    /// is half the work.
    fn of(steps: &[TechniqueStep]) -> Self {
        match steps.iter().any(TechniqueStep::needs_products) {
            true => Prefix::Quantized,
            false => Prefix::Float,
        }
    }
}

/// Whether `name` matches `pattern`, in which `*` stands for any text.
pub fn matches(pattern: &str, name: &str) -> bool {
    let Some((start, rest)) = pattern.split_once('*') else { return pattern == name };
    let Some(mut name) = name.strip_prefix(start) else { return false };
    let mut parts: Vec<&str> = rest.split('*').collect();
    let end = parts.pop().unwrap_or("");
    for part in parts {
        match name.find(part) {
            Some(at) => name = &name[at + part.len()..],
            None => return false,
        }
    }
    name.ends_with(end)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
        format = "w4a16"
        keep = ["layers.0.*"]
        [[technique]]
        use = "awq"
        tensors = ["*.ffn.down", "*.ffn.gate"]
        steps = 10
        [[technique]]
        use = "gptq"
        damping = 0.05
        act_order = false
    "#;

    #[test]
    fn a_recipe_is_read_and_written() {
        let recipe = Recipe::parse(GOOD, Some(64)).unwrap();
        assert_eq!(recipe.format.to_string(), "int4-g64-bf16");
        assert_eq!(recipe.steps[0].parameters.whole("steps"), 10);
        assert_eq!(recipe.steps[1].parameters.number("damping"), 0.05);
        assert!(recipe.steps[0].applies_to("layers.3.ffn.down"));
        assert!(!recipe.steps[0].applies_to("layers.3.ffn.up"));
        assert!(recipe.needs_calibration());
        assert_eq!(recipe.rounding_of("layers.3.ffn.up").unwrap().technique.name, "gptq");
        let again = Recipe::parse(&recipe.to_toml(), None).unwrap();
        assert_eq!(again.to_toml(), recipe.to_toml());
        let plain = Recipe::simple(recipe.format, "rtn").unwrap();
        assert!(!plain.needs_calibration());
        let awq = Recipe::simple(recipe.format, "awq").unwrap();
        assert_eq!(awq.steps[1].technique.name, "clip");
        assert!(awq.needs_products() && awq.to_toml().contains("prefix = \"quantized\""));
        // A correction follows the step that chooses codes. It weighs by inputs by default.
        let corrected = Recipe::simple(recipe.format, "awq+low-rank").unwrap();
        let names: Vec<&str> = corrected.steps.iter().map(|it| it.technique.name).collect();
        assert_eq!(names, ["awq", "clip", "low-rank"]);
        assert!(Recipe::simple(recipe.format, "rtn+low-rank").unwrap().needs_products());
        let plain = "format = \"w4a16\"\n[[technique]]\nuse = \"rtn\"\n[[technique]]\n\
                     use = \"low-rank\"\nweighting = \"none\"";
        let plain = Recipe::parse(plain, None).unwrap();
        assert!(!plain.needs_calibration());
        assert_eq!(Recipe::parse(&plain.to_toml(), None).unwrap().to_toml(), plain.to_toml());
        // A technique that only weighs columns needs neither products nor the quantized prefix.
        let sizes = "format = \"q4_k\"\n[[technique]]\nuse = \"imatrix\"\n";
        let weighed = Recipe::parse(sizes, None).unwrap();
        assert!(weighed.needs_calibration() && !weighed.needs_products());
        assert!(weighed.to_toml().contains("prefix = \"float\""));
        let told = Recipe::parse(&format!("prefix = \"quantized\"\n{sizes}"), None).unwrap();
        assert_eq!(told.prefix, Prefix::Quantized);
        assert_eq!(Recipe::parse(&awq.to_toml(), None).unwrap().to_toml(), awq.to_toml());
    }

    /// Recipes that are refused, with a part of the message.
    const BAD: &[(&str, &str)] = &[
        ("format = 4", "line 1, `format = 4`: invalid type: integer `4`, expected a string"),
        ("format = \"w9\"", "line 1, `format = \"w9\"`: unknown format `w9`"),
        ("[[technique]]\nuse = \"rtn\"", "missing field `format`"),
        ("format = \"q4_0\"", "no [[technique]]"),
        (
            "format = \"q4_0\"\nfromat = 1",
            "line 2, `fromat = 1`: unknown field `fromat`, expected one of `format`, `tensors`, `keep`, \
             `prefix`, `activations`, `formats`, `budget`, `technique`; did you mean `format`?",
        ),
        (
            "format = \"q4_0\"\n[[technique]]\nuse = \"gtpq\"",
            "line 3, `use = \"gtpq\"`: unknown technique `gtpq`, expected one of rtn, ",
        ),
        ("format = \"q4_0\"\n[[technique]]\nuse = \"gtpq\"", "; did you mean gptq?"),
        (
            "format = \"q4_0\"\n[[technique]]\nuse = \"gptq\"\ndampnig = 1",
            "line 4, `dampnig = 1`: technique gptq: unknown key `dampnig`, expected one of use, ",
        ),
        ("format = \"q4_0\"\n[[technique]]\nuse = \"gptq\"\ndampnig = 1", "did you mean damping?"),
        (
            "format = \"q4_0\"\n[[technique]]\nuse = \"gptq\"\ndamping = \"a\"",
            "line 4, `damping = \"a\"`: technique gptq: `damping` is \"a\"",
        ),
        ("format = \"q4_0\"\n[[technique]]\nuse = \"gptq\"\nblock_size = 0", "from 1 to"),
        ("format = \"q4_0\"\n[[technique]]\nuse = \"clip\"\nerror = \"x\"", "one of weight"),
        (
            "format = \"q4_0\"\n[[technique]]\nsteps = 3",
            "line 2, `[[technique]]`: missing field `use`",
        ),
        ("format = \"q4_0\"\ntensors = []\n", "`tensors = []`: the list is empty"),
        ("format = \"q4_0\"\nprefix = \"both\"\n", "`quantized` or `float`"),
        (
            "format = \"q4_0\"\ntechnique = 3\n",
            "`technique = 3`: invalid type: integer `3`, expected a sequence",
        ),
        ("format = \"w4a16\"\nactivations = \"int3\"\n", "one of int4-token"),
        (
            "format = \"q4_0\"\nactivations = \"int8-token\"\n[[technique]]\nuse = \"rtn\"",
            "`activations` beside q4_0",
        ),
        (
            "format = \"q4_0\"\nprefix = \"float\"\n[[technique]]\nuse = \"gptaq\"",
            "gptaq makes up for quantized layers",
        ),
        (
            "format = \"q4_0\"\nformats = 3\n",
            "`formats = 3`: invalid type: integer `3`, expected a map",
        ),
        (
            "format = \"q4_0\"\n[formats]\n\"layers.*\" = \"q9\"\n",
            "line 3, `\"layers.*\" = \"q9\"`: unknown format `q9`",
        ),
        (
            "format = \"q4_0\"\n[budget]\nbits = 4\nformats = [\"q9\"]\n",
            "line 4, `formats = [\"q9\"]`",
        ),
        ("format = \"q4_0\"\n[budget]\nbits = 4\n", "missing field `formats`"),
        (
            "format = \"q4_0\"\n[budget]\nbits = -4\n",
            "`bits = -4`: -4 bits, expected a number above 0",
        ),
        ("format = \"q4_0\"\n[budget]\nbit = 4\n", "unknown field `bit`, expected one of `bits`"),
        ("format = \"q4_0\"\n[budget]\nsensitivity = \"x\"\n", "`kl` or `hessian`"),
        (
            "format = \"q4_0\"\n[[technique]]\nuse = \"rtn\"\n[[technique]]\nuse = \"gptq\"",
            "gptq does not go with rtn",
        ),
        (
            "format = \"q4_0\"\n[[technique]]\nuse = \"rtn\"\n[[technique]]\nuse = \"awq\"",
            "awq comes after",
        ),
        (
            "format = \"q4_0\"\n[[technique]]\nuse = \"awq\"\n[[technique]]\nuse = \"rotate\"",
            "rotate comes after",
        ),
        (
            "format = \"q4_0\"\n[[technique]]\nuse = \"rotate\"\ntensors = [\"*\"]",
            "for the whole model",
        ),
        (
            "format = \"w4a16\"\n[[technique]]\nuse = \"low-rank\"\n[[technique]]\nuse = \"rtn\"",
            "rtn comes after a correction",
        ),
        (
            "format = \"w4a16\"\n[[technique]]\nuse = \"rtn\"\n[[technique]]\nuse = \"low-rank\"\nrank = 0",
            "from 1 to",
        ),
        ("format = ", "recipe: "),
    ];

    #[test]
    fn bad_recipes_say_what_is_bad() {
        let error_of = |text: &str| Recipe::parse(text, None).unwrap_err().to_string();
        let found: Vec<(&str, String)> =
            BAD.iter().map(|(text, _)| (*text, error_of(text))).collect();
        let wrong = found.iter().zip(BAD).filter(|(found, case)| !found.1.contains(case.1));
        let wrong: Vec<_> = wrong.collect();
        assert!(wrong.is_empty(), "{wrong:#?}");
        let error = format_named("q4_0", Some(64)).unwrap_err().to_string();
        assert!(error.contains("groups of 64"), "{error}");
    }

    #[test]
    fn tensors_may_have_formats_of_their_own() {
        let text = "format = \"int4-g64-bf16\"\n[formats]\n\"layers.1.*\" = \"w8a16\"\n\
                    \"layers.1.ffn.*\" = \"int3-g32-f16\"\n[budget]\nbits = 5\nformats = [\"q4_k\"]\n\
                    [[technique]]\nuse = \"rtn\"";
        let recipe = Recipe::parse(text, None).unwrap();
        for (name, format) in [
            ("layers.0.ffn.up", "int4-g64-bf16"),
            ("layers.1.attention.query", "int8-channel-bf16"),
            ("layers.1.ffn.up", "int3-g32-f16"),
        ] {
            assert_eq!(recipe.format_of(name).to_string(), format);
        }
        let again = Recipe::parse(&recipe.to_toml(), None).unwrap();
        assert_eq!((&again.formats, &again.budget), (&recipe.formats, &recipe.budget));
        assert_eq!(again.budget.unwrap().bits, 5.0);
    }

    #[test]
    fn presets_are_formats() {
        for preset in PRESETS {
            assert_eq!(format_named(preset.name, None).unwrap().to_string(), preset.format);
        }
        assert_eq!(activations_of("W4A4"), Some(ActivationFormat::Int4Token));
        let text =
            "format = \"w4a4\"\n[[technique]]\nuse = \"hadamard\"\n[[technique]]\nuse = \"rtn\"";
        let recipe = Recipe::parse(text, Some(64)).unwrap();
        assert_eq!(recipe.activations, Some(ActivationFormat::Int4Token));
        let again = Recipe::parse(&recipe.to_toml(), None).unwrap();
        assert_eq!((again.activations, again.to_toml()), (recipe.activations, recipe.to_toml()));
        assert_eq!(format_named("W8A16", Some(32)).unwrap().to_string(), "int8-g32-bf16");
    }

    #[test]
    fn stars_stand_for_anything() {
        for (pattern, name, expected) in [
            ("a.b", "a.b", true),
            ("a.b", "a.bc", false),
            ("*", "anything", true),
            ("layers.*.down", "layers.12.ffn.down", true),
            ("layers.*.down", "layers.12.ffn.downs", false),
            ("*.ffn.*", "layers.1.ffn.up", true),
            ("a*a", "a", false),
            ("*b*b*", "abcb", true),
        ] {
            assert_eq!(matches(pattern, name), expected, "{pattern} {name}");
        }
    }
}
