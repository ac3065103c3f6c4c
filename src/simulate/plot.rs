//! The figures as one SVG picture: load time over the limit, and the wait over
//! the limit, a line for each policy. It needs no other file and no script.
//! Values go up in powers of ten: the first GiB change them a hundredfold, the
//! last ones by a tenth, and both are to be seen.

use std::collections::BTreeMap;
use std::fmt::Write;

use super::report::{short, time};
use super::study::{Figures, Mode};
use crate::model::Bytes;

const WIDTH: f64 = 720.0;
const PANEL: f64 = 240.0;
const LEFT: f64 = 80.0;
const RIGHT: f64 = 36.0;
const TOP: f64 = 44.0;
const BOTTOM: f64 = 40.0;
/// Colours that are told apart by the colour-blind too.
const COLOURS: [&str; 4] = ["#0072b2", "#d55e00", "#009e73", "#cc79a7"];
/// Powers of ten in a panel at most; what is smaller lies at its bottom.
const DECADES: i32 = 5;
/// Width of a letter of the key, about.
const LETTER: f64 = 7.0;

/// One line of a panel: a name, and a value in seconds for each limit.
struct Line {
    name: String,
    points: Vec<(Bytes, f64)>,
}

/// Draws the figures.
#[must_use]
pub fn svg(all: &[Figures]) -> String {
    let timed = all.iter().any(|figures| figures.mode == Mode::Timed);
    let mut loads = lines(all, |figures| figures.load_seconds);
    if !timed {
        // Requests that wait share loads, which the plan cannot: it is no bound then.
        loads.push(offline(all));
    }
    let mut panels = vec![("time of all loads", loads)];
    if timed {
        panels.push((
            "mean wait of a request",
            lines(all, |figures| figures.waits.mean),
        ));
    }
    let height = panels.iter().fold(0.0, |height, _| height + PANEL);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" \
         font-family=\"system-ui, sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    let mut top = 0.0;
    for (title, lines) in &panels {
        panel(&mut out, top, title, lines);
        top += PANEL;
    }
    out.push_str("</svg>\n");
    out
}

fn lines(all: &[Figures], value: impl Fn(&Figures) -> f64) -> Vec<Line> {
    let mut by_policy = BTreeMap::<&str, BTreeMap<Bytes, f64>>::new();
    for figures in all {
        let line = by_policy.entry(figures.policy.as_str()).or_default();
        line.insert(figures.limit, value(figures));
    }
    let line = |(name, points): (&str, BTreeMap<Bytes, f64>)| Line {
        name: name.to_owned(),
        points: points.into_iter().collect(),
    };
    by_policy.into_iter().map(line).collect()
}

fn offline(all: &[Figures]) -> Line {
    let points: BTreeMap<_, _> = all
        .iter()
        .map(|figures| (figures.limit, figures.offline.load_seconds))
        .collect();
    Line {
        name: "a plan that knows the future".to_owned(),
        points: points.into_iter().collect(),
    }
}

/// Where a panel's values lie in the picture.
struct Scale {
    top: f64,
    limits: (f64, f64),
    /// The powers of ten at the bottom and at the top.
    decades: (i32, i32),
}

impl Scale {
    fn of(top: f64, lines: &[Line]) -> Self {
        let points = || lines.iter().flat_map(|line| &line.points);
        let limits = || points().map(|(limit, _)| limit.as_f64());
        Self {
            top,
            limits: (
                limits().fold(f64::INFINITY, f64::min),
                limits().fold(0.0, f64::max),
            ),
            decades: decades(points().map(|(_, value)| *value)),
        }
    }

    fn x(&self, limit: Bytes) -> f64 {
        let (least, most) = self.limits;
        let width = WIDTH - LEFT - RIGHT;
        if most <= least {
            return LEFT + width / 2.0;
        }
        LEFT + (limit.as_f64() - least) / (most - least) * width
    }

    fn y(&self, value: f64) -> f64 {
        let (least, most) = (f64::from(self.decades.0), f64::from(self.decades.1));
        let power = value.log10().clamp(least, most);
        let part = (power - least) / (most - least);
        let height = PANEL - TOP - BOTTOM;
        self.top + TOP + (1.0 - part) * height
    }
}

/// Returns the powers of ten around these values: one at least.
fn decades(values: impl Iterator<Item = f64> + Clone) -> (i32, i32) {
    let seen = || values.clone().filter(|value| *value > 0.0);
    let powers = -6..10;
    let over = |power: &i32| seen().all(|value| value <= 10_f64.powi(*power));
    let most = powers.clone().find(over).unwrap_or(10);
    let under = |power: &i32| seen().all(|value| value >= 10_f64.powi(*power));
    let least = powers.rev().find(under).unwrap_or(most - DECADES);
    (least.clamp(most - DECADES, most - 1), most)
}

fn panel(out: &mut String, top: f64, title: &str, lines: &[Line]) {
    let scale = Scale::of(top, lines);
    let mut put = |text: std::fmt::Arguments<'_>| {
        out.write_fmt(text).expect("a string takes every text");
        out.push('\n');
    };
    let y = top + 18.0;
    put(format_args!(
        "<text x=\"{LEFT}\" y=\"{y}\" font-weight=\"600\">{title}, by limit</text>"
    ));
    for decade in scale.decades.0..=scale.decades.1 {
        let value = 10_f64.powi(decade);
        let (y, right) = (scale.y(value), WIDTH - RIGHT);
        put(format_args!(
            "<line x1=\"{LEFT}\" x2=\"{right}\" y1=\"{y:.1}\" y2=\"{y:.1}\" stroke=\"#ddd\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\" fill=\"#555\">{}</text>",
            LEFT - 6.0,
            y + 4.0,
            format_args!("{value} s"),
        ));
    }
    let limits = lines.first().map_or(&[][..], |line| &line.points);
    let every = limits.len().div_ceil(9).max(1);
    for (limit, _) in limits.iter().step_by(every) {
        put(format_args!(
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\" fill=\"#555\">{}</text>",
            scale.x(*limit),
            top + PANEL - BOTTOM + 18.0,
            short(*limit),
        ));
    }
    let mut key = LEFT + 230.0;
    for (line, colour) in lines.iter().zip(COLOURS.iter().cycle()) {
        let place = |(limit, value): &(Bytes, f64)| {
            format!("{:.1},{:.1}", scale.x(*limit), scale.y(*value))
        };
        let path: Vec<_> = line.points.iter().map(place).collect();
        put(format_args!(
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>",
            path.join(" "),
        ));
        for (limit, value) in &line.points {
            put(format_args!(
                "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"3\" fill=\"{colour}\"><title>{}, {}: {}</title></circle>",
                scale.x(*limit),
                scale.y(*value),
                line.name,
                short(*limit),
                time(*value),
            ));
        }
        put(format_args!(
            "<text x=\"{key}\" y=\"{y}\" fill=\"{colour}\">● {}</text>",
            line.name
        ));
        let letters = u32::try_from(line.name.len()).unwrap_or(0);
        key += LETTER * f64::from(letters) + 4.0 * LETTER;
    }
}
