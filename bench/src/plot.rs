//! Bar chart of the figures as SVG, with one panel for each suite and unit.

use std::fmt::Write;

use crate::report::{Figure, Report, short};

const WIDTH: f64 = 1_000.0;
const LABELS: f64 = 430.0;
const BARS: f64 = 440.0;
const ROW: f64 = 22.0;

pub(crate) fn draw(report: &Report) -> String {
    let mut panels: Vec<(String, Vec<&Figure>)> = Vec::new();
    for figure in &report.figures {
        let title = format!("{} [{}]", figure.suite, figure.unit);
        match panels.iter_mut().find(|(known, _)| *known == title) {
            Some((_, figures)) => figures.push(figure),
            None => panels.push((title, vec![figure])),
        }
    }
    let mut body = String::new();
    let mut y = 10.0;
    for (title, figures) in &panels {
        y += 26.0;
        let _ = writeln!(body, r#"<text x="10" y="{y}" class="title">{}</text>"#, escape(title));
        let most = figures.iter().map(|figure| figure.estimate.judged.max(figure.estimate.high)).fold(0.0, f64::max);
        let scale = |value: f64| if most > 0.0 && value.is_finite() { value.max(0.0) / most * BARS } else { 0.0 };
        for figure in figures {
            y += ROW;
            let estimate = figure.estimate;
            let (text, bar) = (y - 5.0, y - ROW + 4.0);
            let middle = y - ROW / 2.0;
            let (low, high) = (LABELS + scale(estimate.low), LABELS + scale(estimate.high));
            let colour = if figure.name.starts_with("Portcullis") { "#2a6fbb" } else { "#9aa5b1" };
            let _ = writeln!(
                body,
                r#"<text x="{}" y="{text}" text-anchor="end">{}</text>"#,
                LABELS - 8.0,
                escape(&figure.name)
            );
            let _ = writeln!(
                body,
                r#"<rect x="{LABELS}" y="{bar}" width="{:.1}" height="{}" fill="{colour}"/>"#,
                scale(estimate.judged),
                ROW - 6.0
            );
            if estimate.low.is_finite() && estimate.high.is_finite() {
                let _ =
                    writeln!(body, r##"<path d="M{low:.1} {middle}H{high:.1}" stroke="#222" stroke-width="1.5"/>"##);
            }
            let _ = writeln!(
                body,
                r#"<text x="{:.1}" y="{text}">{}</text>"#,
                high.max(LABELS + scale(estimate.judged)) + 6.0,
                short(estimate.judged)
            );
        }
    }
    let height = y + 20.0;
    format!(
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="13">
<style>.title {{ font-weight: bold; font-size: 15px }}</style>
<rect width="{WIDTH}" height="{height}" fill="#fff"/>
{body}</svg>
"##
    )
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}
