//! Charts as SVG: lines and bars.

use std::path::Path;

use anyhow::{Error, anyhow};
use plotters::prelude::*;

/// How a series is drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mark {
    /// A line through the points.
    Line,
    /// A bar at each point.
    Bars,
}

/// One series of points with its name.
pub(crate) struct Curve<'a> {
    /// Its name in the legend.
    pub name: &'a str,
    /// `(x, y)`.
    pub points: Vec<(f64, f64)>,
    /// How it is drawn.
    pub mark: Mark,
}

/// The scale of the y axis.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scale {
    /// Linear, from zero.
    Linear,
    /// Logarithmic. Points that are not positive are left out.
    Logarithmic,
}

/// The place of a chart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// A file of its own: black on white.
    File,
    /// Part of a page: in the colour of the page's text, without a background.
    Page,
}

/// A chart.
pub(crate) struct Chart<'a> {
    /// The title above it.
    pub title: &'a str,
    /// The label of the x axis.
    pub x: &'a str,
    /// The label of the y axis.
    pub y: &'a str,
    /// The scale of the y axis.
    pub scale: Scale,
    /// The series.
    pub curves: &'a [Curve<'a>],
}

/// Colours that are legible on white and on black.
const COLOURS: [RGBColor; 4] =
    [RGBColor(46, 125, 200), RGBColor(217, 120, 30), RGBColor(60, 150, 90), RGBColor(190, 80, 140)];
/// A placeholder for the colour of a page's text.
const INK: RGBColor = RGBColor(1, 2, 3);

/// Draws the curves of seconds over tokens to `path`. The file is written under a temporary name
/// and then renamed.
pub(crate) fn draw(path: &Path, title: &str, curves: &[Curve]) -> Result<(), Error> {
    let (x, y) = ("generated tokens", "seconds, in all");
    let svg = svg(&Chart { title, x, y, scale: Scale::Linear, curves }, Place::File)?;
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".partial");
    std::fs::write(&temporary, svg)
        .and_then(|()| std::fs::rename(&temporary, path))
        .map_err(|error| anyhow!("{}: {error}", path.display()))
}

/// The chart as an `<svg>` element.
pub(crate) fn svg(chart: &Chart, place: Place) -> Result<String, Error> {
    let mut svg = String::new();
    render(&mut svg, chart, place).map_err(|error| anyhow!("drawing: {error}"))?;
    Ok(match place {
        Place::File => svg,
        Place::Page => svg.replace("#010203", "currentColor"),
    })
}

/// A point on the chart's scale. `None` if the scale cannot show it.
fn placed(scale: Scale, (x, y): &(f64, f64)) -> Option<(f64, f64)> {
    let y = if scale == Scale::Logarithmic { y.log10() } else { *y };
    (x.is_finite() && y.is_finite()).then_some((*x, y))
}

/// The ranges of x and y that hold all points.
fn ranges(chart: &Chart) -> (std::ops::Range<f64>, std::ops::Range<f64>) {
    let all = chart.curves.iter().flat_map(|curve| &curve.points);
    let points: Vec<(f64, f64)> = all.filter_map(|point| placed(chart.scale, point)).collect();
    let least = |of: fn(&(f64, f64)) -> f64| points.iter().map(of).fold(f64::MAX, f64::min);
    let most = |of: fn(&(f64, f64)) -> f64| points.iter().map(of).fold(f64::MIN, f64::max);
    if points.is_empty() {
        return (0.0..1.0, 0.0..1.0);
    }
    let bars = chart.curves.iter().any(|curve| curve.mark == Mark::Bars);
    let side = if bars { 0.5 } else { 0.0 };
    let left = least(|point| point.0) - side;
    let right = (most(|point| point.0) + side).max(left + 1e-9);
    match chart.scale {
        Scale::Linear => (left..right, 0.0..most(|point| point.1).max(1e-9) * 1.05),
        Scale::Logarithmic => {
            let bottom = least(|point| point.1).floor();
            (left..right, bottom..(most(|point| point.1) + 0.1).max(bottom + 0.2))
        }
    }
}

fn render(svg: &mut String, chart: &Chart, place: Place) -> Result<(), Box<dyn std::error::Error>> {
    let area = SVGBackend::with_string(svg, (760, 440)).into_drawing_area();
    let ink = if place == Place::File { BLACK } else { INK };
    if place == Place::File {
        area.fill(&WHITE)?;
    }
    let (x_range, y_range) = ranges(chart);
    let bottom = y_range.start;
    let text = |size: u32| ("sans-serif", size).into_font().color(&ink);
    let mut context = ChartBuilder::on(&area)
        .caption(chart.title, text(18))
        .margin(14)
        .x_label_area_size(38)
        .y_label_area_size(72)
        .build_cartesian_2d(x_range, y_range)?;
    let logarithmic = chart.scale == Scale::Logarithmic;
    context
        .configure_mesh()
        .x_desc(chart.x)
        .y_desc(chart.y)
        .label_style(text(12))
        .axis_desc_style(text(14))
        .axis_style(ink)
        .bold_line_style(ink.mix(0.15))
        .light_line_style(ink.mix(0.04))
        .y_label_formatter(&|value: &f64| match logarithmic {
            true => format!("{:.1e}", 10f64.powf(*value)),
            false => ((value * 1e6).round() / 1e6).to_string(),
        })
        .draw()?;
    for (index, curve) in chart.curves.iter().enumerate() {
        let colour = COLOURS[index % COLOURS.len()];
        let style = colour.stroke_width(2);
        let points = curve.points.iter().filter_map(|point| placed(chart.scale, point));
        let series = match curve.mark {
            Mark::Line => context.draw_series(LineSeries::new(points, style))?,
            Mark::Bars => context.draw_series(points.map(|(x, y)| {
                Rectangle::new([(x - 0.4, bottom), (x + 0.4, y)], colour.filled())
            }))?,
        };
        series
            .label(curve.name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], style));
    }
    if chart.curves.len() > 1 || place == Place::File {
        let mut labels = context.configure_series_labels();
        labels.position(SeriesLabelPosition::UpperLeft).label_font(text(13));
        labels.border_style(ink.mix(0.3));
        if place == Place::File {
            labels.background_style(WHITE.mix(0.8));
        }
        labels.draw()?;
    }
    area.present()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn curve(name: &str, power: i32) -> Curve<'_> {
        let points = (1..20).map(|n| (f64::from(n), f64::from(n).powi(power))).collect();
        Curve { name, points, mark: Mark::Line }
    }

    /// Counts the curves: the only lines with that many points.
    fn curves_in(svg: &str) -> usize {
        let long = |line: &&str| line.contains("<polyline") && line.matches(',').count() >= 19;
        svg.lines().filter(long).count()
    }

    #[test]
    fn an_svg_with_both_curves() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("x.svg");
        draw(&path, "title", &[curve("with", 1), curve("without", 2)]).expect("an SVG");
        let svg = std::fs::read_to_string(&path).expect("the file");
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
        assert!(svg.contains("with\n") && svg.contains("without\n"), "a legend: {svg}");
        assert_eq!(curves_in(&svg), 2);
    }

    #[test]
    fn a_page_lends_its_colours() {
        let bars = Curve { mark: Mark::Bars, ..curve("bars", 1) };
        let curves = [curve("line", 2), bars];
        for scale in [Scale::Linear, Scale::Logarithmic] {
            let chart = Chart { title: "t", x: "x", y: "y", scale, curves: &curves };
            let svg = svg(&chart, Place::Page).expect("an SVG");
            assert!(svg.contains("currentColor") && !svg.contains("#FFFFFF"));
            assert!(svg.matches("<rect").count() >= 19 && curves_in(&svg) == 1);
        }
        // Without points the chart is empty.
        let none = Curve { points: vec![(1.0, 0.0)], ..curve("none", 1) };
        let chart =
            Chart { title: "t", x: "x", y: "y", scale: Scale::Logarithmic, curves: &[none] };
        assert!(svg(&chart, Place::Page).expect("an SVG").contains("</svg>"));
    }
}
