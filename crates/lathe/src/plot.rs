//! The curves of a run with the KV cache and one without, as an SVG file.

use std::path::Path;

use anyhow::{Error, anyhow};
use plotters::prelude::*;

/// One curve: its name, and points of tokens and seconds.
pub struct Curve<'a> {
    /// For the legend.
    pub name: &'a str,
    /// `(tokens, seconds)`.
    pub points: Vec<(f64, f64)>,
}

/// Draws the curves to `path`, which is written under a temporary name and renamed.
pub fn draw(path: &Path, title: &str, curves: &[Curve]) -> Result<(), Error> {
    let mut svg = String::new();
    render(&mut svg, title, curves).map_err(|error| anyhow!("drawing: {error}"))?;
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".partial");
    std::fs::write(&temporary, svg)
        .and_then(|()| std::fs::rename(&temporary, path))
        .map_err(|error| anyhow!("{}: {error}", path.display()))
}

fn render(
    svg: &mut String,
    title: &str,
    curves: &[Curve],
) -> Result<(), Box<dyn std::error::Error>> {
    let area = SVGBackend::with_string(svg, (760, 440)).into_drawing_area();
    area.fill(&WHITE)?;
    let points = || curves.iter().flat_map(|curve| &curve.points);
    let most = |values: &mut dyn Iterator<Item = f64>| values.fold(1e-9, f64::max);
    let tokens_max = most(&mut points().map(|point| point.0));
    let seconds_max = most(&mut points().map(|point| point.1)) * 1.05;
    let mut chart = ChartBuilder::on(&area)
        .caption(title, ("sans-serif", 18))
        .margin(14)
        .x_label_area_size(38)
        .y_label_area_size(62)
        .build_cartesian_2d(0.0..tokens_max, 0.0..seconds_max)?;
    chart.configure_mesh().x_desc("generated tokens").y_desc("seconds, in all").draw()?;
    for (index, curve) in curves.iter().enumerate() {
        let style = Palette99::pick(index).stroke_width(2);
        chart
            .draw_series(LineSeries::new(curve.points.iter().copied(), style))?
            .label(curve.name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], style));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK)
        .draw()?;
    area.present()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_svg_with_both_curves() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("x.svg");
        let curve = |name, power| Curve {
            name,
            points: (1..20).map(|n| (f64::from(n), f64::from(n).powi(power))).collect(),
        };
        draw(&path, "title", &[curve("with", 1), curve("without", 2)]).expect("an SVG");
        let svg = std::fs::read_to_string(&path).expect("the file");
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
        assert!(svg.contains("with\n") && svg.contains("without\n"), "a legend: {svg}");
        // The curves are the only lines of so many points.
        let long = |line: &&str| line.contains("<polyline") && line.matches(',').count() >= 19;
        assert_eq!(svg.lines().filter(long).count(), 2);
    }
}
