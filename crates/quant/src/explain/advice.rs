//! Advice on what to try next, by rules on the numbers of an [`Explanation`].

use serde::{Deserialize, Serialize};

use super::{Explanation, Sources};

/// One piece of advice.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Advice {
    /// The rule's name.
    pub rule: String,
    /// What was found.
    pub because: String,
    /// What to try.
    pub try_next: String,
}

/// The least share of the error that makes a cause worth a technique.
const SHARE: f64 = 0.25;
/// At most this share of all layers counts as a few layers.
const FEW: f64 = 0.15;
/// The share of the sum of the layers' KL that a few layers must have, to be named.
const MOST_OF_KL: f64 = 0.5;
/// Errors count as compounding if the model's KL is more than this many times the sum of its
/// layers' KL.
const COMPOUNDING: f64 = 1.5;

type Rule = fn(&Explanation, &Sources) -> Option<Advice>;

/// All rules, the most important first.
const RULES: [Rule; 8] = [
    no_error,
    outlier_channels,
    clipping,
    scale_format,
    harmful_codes,
    plain_rounding,
    few_layers,
    compounding,
];

/// The advice for `explanation`. It depends on the numbers alone.
pub fn advise(explanation: &Explanation) -> Vec<Advice> {
    let sources = explanation.sources();
    let mut found: Vec<Advice> =
        RULES.iter().filter_map(|rule| rule(explanation, &sources)).collect();
    found.extend(activations(explanation, &sources));
    found
}

fn advice(rule: &str, because: String, try_next: impl Into<String>) -> Option<Advice> {
    Some(Advice { rule: rule.to_owned(), because, try_next: try_next.into() })
}

fn uses(explanation: &Explanation, technique: &str) -> bool {
    explanation.techniques.iter().any(|it| it == technique)
}

fn percent(share: f64) -> String {
    format!("{:.0} %", 100.0 * share)
}

fn no_error(_: &Explanation, sources: &Sources) -> Option<Advice> {
    if sources.total >= 1e-5 {
        return None;
    }
    let because = format!("errors are {:.1e} of the signal", sources.total);
    advice("no_error", because, "fewer bits, or larger groups: little is lost yet")
}

fn outlier_channels(explanation: &Explanation, sources: &Sources) -> Option<Advice> {
    let share = sources.outliers / sources.total;
    if sources.total <= 0.0 || share < SHARE {
        return None;
    }
    let unused: Vec<&str> =
        ["awq", "smooth", "rotate"].into_iter().filter(|it| !uses(explanation, it)).collect();
    let try_next = match unused.is_empty() {
        true => "smaller groups: scales and rotations are used already".to_owned(),
        false => unused.join(", or "),
    };
    advice(
        "outlier_channels",
        format!("outlier channels are {} of the error", percent(share)),
        try_next,
    )
}

fn clipping(_: &Explanation, sources: &Sources) -> Option<Advice> {
    let clipping = sources.clipping.unwrap_or(0.0);
    // A searched scale accepts clipping for a smaller step. Its gain is subtracted from the
    // clipping.
    let net = clipping + sources.scale_choice.min(0.0);
    if sources.total <= 0.0 || net / sources.total < SHARE {
        return None;
    }
    let because =
        format!("numbers beyond the last code are {} of the error", percent(net / sources.total));
    advice(
        "clipping",
        because,
        "clip with error = \"output\", or with a smaller `shrink`; smaller groups",
    )
}

fn scale_format(explanation: &Explanation, sources: &Sources) -> Option<Advice> {
    let share = sources.scale_format.unwrap_or(0.0) / sources.total;
    if sources.total <= 0.0 || share < SHARE {
        return None;
    }
    let try_next = if explanation.format.contains("e8m0") {
        "rtn with power_of_two = \"mse\", or clip; nvfp4 where the device has it"
    } else if explanation.format.contains("e4m3global") {
        "four_over_six, or clip"
    } else {
        "scales of more bits: f16 or f32 in the format's name"
    };
    let because = format!("the type of the scales is {} of the error", percent(share));
    advice("scale_format", because, try_next)
}

fn harmful_codes(_: &Explanation, sources: &Sources) -> Option<Advice> {
    let share = sources.codes / sources.total;
    if sources.total <= 0.0 || share < SHARE {
        return None;
    }
    let because = format!(
        "codes that are not the nearest are {} of the error of outputs on text that calibration did \
         not see",
        percent(share)
    );
    advice(
        "harmful_codes",
        because,
        "more calibration tokens, of text like the text that matters; more `damping`",
    )
}

fn plain_rounding(explanation: &Explanation, sources: &Sources) -> Option<Advice> {
    let share = sources.rounding / sources.total;
    let nearest = sources.codes == 0.0;
    if sources.total < 1e-5 || !nearest || share < 0.5 || uses(explanation, "gptq") {
        return None;
    }
    let because = format!("{} of the error is plain rounding to nearest", percent(share));
    let try_next = match uses(explanation, "awq") {
        true => "awq+gptq: codes that make up for one another",
        false => "gptq or awq, which make up for it; smaller groups or more bits",
    };
    advice("plain_rounding", because, try_next)
}

fn few_layers(explanation: &Explanation, _: &Sources) -> Option<Advice> {
    let mut layers: Vec<(usize, f64)> =
        explanation.layers.iter().map(|it| (it.layer, it.kl.mean)).collect();
    let all: f64 = layers.iter().map(|it| it.1).sum();
    layers.sort_by(|a, b| b.1.total_cmp(&a.1));
    let few = ((layers.len() as f64 * FEW) as usize).max(1);
    let most: f64 = layers.iter().take(few).map(|it| it.1).sum();
    if all <= 0.0 || layers.len() <= 2 * few || most < MOST_OF_KL * all {
        return None;
    }
    let names: Vec<String> =
        layers[..few].iter().map(|(layer, _)| format!("\"layers.{layer}.*\"")).collect();
    let because = format!(
        "{few} of {} layers have {} of the sum of all layers' KL",
        layers.len(),
        percent(most / all)
    );
    advice("few_layers", because, format!("more bits for them: keep = [{}]", names.join(", ")))
}

fn compounding(explanation: &Explanation, _: &Sources) -> Option<Advice> {
    let sum: f64 = explanation.layers.iter().map(|it| it.kl.mean).sum();
    let whole = explanation.kl.mean;
    if sum <= 0.0 || whole < COMPOUNDING * sum || explanation.layers.len() < 2 {
        return None;
    }
    let because = format!(
        "the whole model's KL is {whole:.4}, its layers' alone add up to {sum:.4}: errors grow on their way"
    );
    let try_next = match explanation.quantized_prefix {
        true => "more bits for the first layers, whose errors all others amplify",
        false => "prefix = \"quantized\", so that each layer sees and makes up for those before it",
    };
    advice("compounding", because, try_next)
}

/// Applies if rounding the inputs to int8 would cost more than rounding the weights does.
fn activations(explanation: &Explanation, sources: &Sources) -> Option<Advice> {
    let all = explanation.layers.iter().flat_map(|layer| &layer.tensors);
    let found: Vec<(f64, &str)> =
        all.filter_map(|it| it.activation_int8.map(|error| (error, it.tensor.as_str()))).collect();
    let mean = found.iter().map(|it| it.0).sum::<f64>() / found.len().max(1) as f64;
    if mean <= sources.total.max(1e-4) {
        return None;
    }
    let worst = found.iter().max_by(|a, b| a.0.total_cmp(&b.0))?;
    let because = format!(
        "inputs in int8 with a scale a token would err by {mean:.1e} of the outputs, weights err by \
         {:.1e}; {} most",
        sources.total, worst.1
    );
    advice(
        "activations",
        because,
        "keep activations in floats, or smooth or rotate before they are rounded",
    )
}

#[cfg(test)]
mod tests {
    use super::super::Divergence;
    use super::super::tests::explanation;
    use super::*;

    const EVEN: [f64; 10] = [0.01; 10];

    fn rules(explanation: &Explanation) -> Vec<String> {
        advise(explanation).into_iter().map(|it| it.rule).collect()
    }

    fn only(sources: Sources) -> Explanation {
        explanation(&EVEN, Sources { total: 0.01, ..sources })
    }

    #[test]
    fn each_rule_speaks_of_its_own_cause_alone() {
        let some = Some(0.0);
        let base = Sources {
            rounding: 0.008,
            scale_format: some,
            clipping: some,
            codes: -0.001,
            ..Sources::default()
        };
        let cases = [
            ("outlier_channels", Sources { outliers: 0.005, ..base }),
            ("clipping", Sources { clipping: Some(0.006), ..base }),
            ("scale_format", Sources { scale_format: Some(0.004), ..base }),
            ("harmful_codes", Sources { codes: 0.004, ..base }),
        ];
        assert_eq!(rules(&only(base)), Vec::<String>::new());
        for (rule, sources) in cases {
            assert_eq!(rules(&only(sources)), [rule]);
        }
        // A smaller step gained more than the clipping cost.
        let paid = Sources { clipping: Some(0.006), scale_choice: -0.005, ..base };
        assert_eq!(rules(&only(paid)), Vec::<String>::new());
        assert_eq!(
            rules(&explanation(&EVEN, Sources { total: 1e-7, ..Sources::default() })),
            ["no_error"]
        );
    }

    #[test]
    fn advice_names_what_the_recipe_does_not_use() {
        let outliers = Sources { outliers: 0.005, codes: -0.001, ..Sources::default() };
        let mut found = only(outliers);
        assert_eq!(advise(&found)[0].try_next, "awq, or smooth, or rotate");
        found.techniques = vec!["rotate".to_owned(), "gptq".to_owned()];
        assert_eq!(advise(&found)[0].try_next, "awq, or smooth");
        let mut scales =
            only(Sources { scale_format: Some(0.005), codes: -0.001, ..Sources::default() });
        for (format, expected) in [
            ("f4e2m1-g32-e8m0", "mse"),
            ("f4e2m1-g16-e4m3global", "four_over_six"),
            ("int4-g64-bf16", "f32"),
        ] {
            scales.format = format.to_owned();
            assert!(advise(&scales)[0].try_next.contains(expected));
        }
        let mut plain = only(Sources { rounding: 0.01, ..Sources::default() });
        assert!(rules(&plain).is_empty(), "gptq is used");
        plain.techniques = vec!["rtn".to_owned()];
        assert_eq!(advise(&plain)[0].try_next.split_whitespace().next(), Some("gptq"));
    }

    #[test]
    fn layers_and_growth() {
        let quiet = Sources { total: 0.01, codes: -0.001, ..Sources::default() };
        let mut kls = EVEN;
        kls[7] = 0.2;
        let found = advise(&explanation(&kls, quiet));
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].try_next, "more bits for them: keep = [\"layers.7.*\"]");
        assert!(found[0].because.contains("69 %"), "{}", found[0].because);
        let mut growing = explanation(&EVEN, quiet);
        growing.kl = Divergence { mean: 0.2, standard_error: 0.0 };
        assert_eq!(rules(&growing), ["compounding"]);
        growing.quantized_prefix = false;
        assert!(advise(&growing)[0].try_next.contains("prefix = \"quantized\""));
        let mut inputs = explanation(&EVEN, quiet);
        inputs.layers[3].tensors[0].activation_int8 = Some(0.5);
        let found = advise(&inputs);
        assert_eq!(found[0].rule, "activations");
        assert!(found[0].because.contains("layers.3.ffn.down"));
    }
}
