//! The report of `lathe quantize --explain`: one self-contained HTML file, a short table for
//! terminals, and JSON.

use std::fmt::Write as _;

use anyhow::Error;
use lathe_quant::explain::{Distribution, Explanation, Histogram, LayerExplanation, Sources};

use crate::plot::{Chart, Curve, Mark, Place, Scale, svg};

const STYLE: &str = "
:root { color-scheme: light dark; --line: color-mix(in srgb, currentColor 20%, transparent); }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; width: 100%; }
th, td { text-align: right; padding: .2rem .5rem; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left }
.wide { overflow-x: auto } .charts { display: flex; flex-wrap: wrap; gap: 1rem }
svg { max-width: 100%; height: auto; flex: 1 1 30rem }
dt { font-weight: 600 } dd { margin: 0 0 .8rem 1rem }
";

/// The legend of the HTML report.
const NOTES: &str = "Errors are squared errors over the squared signal, of outputs where inputs were seen and of \
weights otherwise. They add up: <i>rounding</i> is nearest codes under exact scales without outlier channels; \
<i>outliers</i> is what channels beyond six times the median add; <i>scale format</i> what the type of the scales \
adds; <i>scale choice</i> what scales other than those of the range add (a smaller step is a negative number); \
<i>clipping</i> what numbers beyond the last code add; <i>codes</i> what codes that are not the nearest add \
(negative where they make up for one another). <i>Theory</i> is the noise that is uniform between two \
neighbours, under exact scales of each block's range. <i>Inputs int8</i> is the error of outputs if inputs were \
rounded to int8 with a scale a token, and nothing else. <i>Corrected</i> is what a low-rank correction leaves of \
the error; all other columns are of the codes alone. Streams and KL are with it.";

/// The report as HTML.
pub(crate) fn html(model: &str, found: &Explanation) -> Result<String, Error> {
    let mut page =
        String::from("<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\n");
    let model = escaped(model);
    let _ = write!(
        page,
        "<meta name=\"viewport\" content=\"width=device-width\"><title>{model}: what quantization did</title>\n\
         <style>{STYLE}</style></head><body>\n<h1>{model} in {}</h1>\n<p>{}</p>\n",
        escaped(&found.format),
        escaped(&summary(found))
    );
    page.push_str("<h2>What to try next</h2>\n<dl>\n");
    for advice in &found.advice {
        let (try_next, because) = (escaped(&advice.try_next), escaped(&advice.because));
        let _ = writeln!(page, "<dt>{try_next}</dt><dd>{because}.</dd>");
    }
    if found.advice.is_empty() {
        page.push_str("<dd>No single cause stands out: more bits or smaller groups.</dd>");
    }
    page.push_str("</dl>\n<h2>Through the network</h2>\n<div class=\"charts\">\n");
    for chart in charts_of_layers(found)? {
        page.push_str(&chart);
    }
    let _ =
        write!(page, "</div>\n<h2>By layer</h2>\n<div class=\"wide\">{}</div>\n", layers(found));
    page.push_str("<h2>Distributions</h2>\n<div class=\"charts\">\n");
    for (title, what) in [("weights", &found.weights), ("inputs of layers", &found.activations)] {
        page.push_str(&distribution(title, what)?);
    }
    let tensors = tensors(found);
    let _ = write!(
        page,
        "</div>\n<h2>By tensor</h2>\n<p>{NOTES}</p>\n<div class=\"wide\">{tensors}</div>\n</body></html>\n"
    );
    Ok(page)
}

/// The summary in one line.
pub(crate) fn summary(found: &Explanation) -> String {
    let sum: f64 = found.layers.iter().map(|it| it.kl.mean).sum();
    format!(
        "{}; KL to the base {:.4} ± {:.4} nats a token, {sum:.4} if layers added up; measured on {} tokens \
         that calibration did not see, in windows of {}",
        found.techniques.join(" + "),
        found.kl.mean,
        found.kl.standard_error,
        found.tokens,
        found.window
    )
}

/// A compact table for a terminal, and the advice.
pub(crate) fn table(found: &Explanation) -> String {
    let mut text = summary(found) + "\n";
    let parts = found.sources();
    let _ = write!(text, "error of outputs {:.2e} =", parts.total);
    for (name, part) in parts.parts() {
        let _ = write!(text, " {name} {:+.0} %", 100.0 * part / parts.total.max(f64::MIN_POSITIVE));
    }
    text.push_str("\nlayer  bits  stream error  alone  KL alone\n");
    for layer in &found.layers {
        let _ = writeln!(
            text,
            "{:>5} {:>5.2} {:>13.4} {:>6.4} {:>9.5}",
            layer.layer, layer.bits, layer.stream_error, layer.alone_error, layer.kl.mean
        );
    }
    for advice in &found.advice {
        let _ = writeln!(text, "try next: {} ({})", advice.try_next, advice.because);
    }
    text
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

fn charts_of_layers(found: &Explanation) -> Result<[String; 3], Error> {
    let points = |of: &dyn Fn(&LayerExplanation) -> f64| -> Vec<(f64, f64)> {
        found.layers.iter().map(|it| (it.layer as f64, of(it))).collect()
    };
    let line = |name, points| Curve { name, points, mark: Mark::Line };
    let errors = [
        line("all layers up to it quantized", points(&|it| it.stream_error)),
        line("this layer alone", points(&|it| it.alone_error)),
    ];
    let kl = Curve { name: "KL", points: points(&|it| it.kl.mean), mark: Mark::Bars };
    let budget = found.budgets.iter().map(|it| (it.bits, it.kl)).collect();
    let draw = |title, x, y, scale, curves: &[Curve]| {
        svg(&Chart { title, x, y, scale, curves }, Place::Page)
    };
    Ok([
        draw(
            "Relative error of the stream",
            "layer",
            "|error| / |stream|",
            Scale::Linear,
            &errors,
        )?,
        draw("KL with one layer quantized", "layer", "nats a token", Scale::Linear, &[kl])?,
        draw(
            "Bits against KL: the most sensitive layers in floats",
            "mean bits of a weight",
            "sum of layers' KL",
            Scale::Linear,
            &[line("KL", budget)],
        )?,
    ])
}

fn distribution(title: &str, what: &Distribution) -> Result<String, Error> {
    let points = |of: &Histogram| -> Vec<(f64, f64)> {
        let all = of.total().max(1) as f64 * of.bin;
        let at = |(index, count): (usize, &u64)| {
            (of.first + (index as f64 + 0.5) * of.bin, *count as f64 / all)
        };
        of.counts.iter().enumerate().map(at).collect()
    };
    let curve = |name, of: &Histogram| Curve { name, points: points(of), mark: Mark::Line };
    let mut curves = vec![curve("in the file", &what.before)];
    curves.extend(what.after.as_ref().map(|it| curve("as they are rounded", it)));
    let tail = |of: &Histogram| format!("kurtosis {:.1}, peak {:.0}", of.kurtosis, of.peak);
    let mut title = format!("Density of {title}: {}", tail(&what.before));
    if let Some(after) = &what.after {
        let _ = write!(title, "; then {}", tail(after));
    }
    let (x, y, scale) = ("over the root of the mean square", "density", Scale::Logarithmic);
    svg(&Chart { title: &title, x, y, scale, curves: &curves }, Place::Page)
}

fn layers(found: &Explanation) -> String {
    let head = ["layer", "bits", "stream error", "alone", "KL alone", "±", "KL x bits"];
    let row = |it: &LayerExplanation| {
        vec![
            it.layer.to_string(),
            format!("{:.2}", it.bits),
            format!("{:.4}", it.stream_error),
            format!("{:.4}", it.alone_error),
            format!("{:.5}", it.kl.mean),
            format!("{:.5}", it.kl.standard_error),
            format!("{:.4}", it.kl.mean * it.bits),
        ]
    };
    rows(&head, found.layers.iter().map(row))
}

fn tensors(found: &Explanation) -> String {
    let head = [
        "tensor",
        "SQNR dB",
        "theory",
        "outputs dB",
        "theory",
        "error",
        "rounding",
        "outliers",
        "scale format",
        "scale choice",
        "clipping",
        "codes",
        "outlier channels",
        "inputs int8",
        "corrected",
    ];
    let all = found.layers.iter().flat_map(|layer| &layer.tensors);
    rows(
        &head,
        all.map(|it| {
            let weights = &it.error.weights;
            let outputs = it.error.outputs.as_ref();
            let decibels =
                |value: Option<f64>| value.map_or("".to_owned(), |db| format!("{db:.2}"));
            let sources: Sources = outputs.unwrap_or(weights).sources;
            let mut row = vec![
                escaped(&it.tensor),
                decibels(Some(weights.sqnr_db)),
                decibels(Some(weights.theory_sqnr_db)),
                decibels(outputs.map(|it| it.sqnr_db)),
                decibels(outputs.map(|it| it.theory_sqnr_db)),
                format!("{:.2e}", sources.total),
            ];
            let share = |part: f64| match sources.total > 0.0 {
                true => format!("{:+.0} %", 100.0 * part / sources.total),
                false => String::new(),
            };
            row.extend(sources.parts().map(|(_, part)| share(part)));
            row.push(it.error.outlier_channels.to_string());
            row.push(it.activation_int8.map_or(String::new(), |error| format!("{error:.1e}")));
            let corrected = it.corrected.map(|it| it.outputs.unwrap_or(it.weights));
            row.push(corrected.map_or(String::new(), |error| format!("{error:.2e}")));
            row
        }),
    )
}

fn rows(head: &[&str], rows: impl Iterator<Item = Vec<String>>) -> String {
    let mut text = String::from("<table><tr>");
    head.iter().for_each(|it| text.push_str(&format!("<th>{it}</th>")));
    text.push_str("</tr>\n");
    for row in rows {
        text.push_str("<tr>");
        row.iter().for_each(|it| text.push_str(&format!("<td>{it}</td>")));
        text.push_str("</tr>\n");
    }
    text + "</table>"
}
