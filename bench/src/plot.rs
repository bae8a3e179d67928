//! Bars as SVG, for the documentation.

use std::fmt::Write as _;

use crate::results::{Medians, is_backlog, short, systems};

const BAR: f64 = 13.0;
const LEFT: f64 = 150.0;
const WIDTH: f64 = 460.0;
const COLOURS: [(&str, &str); 5] = [
    ("anabranch-15", "#1b6ca8"),
    ("native-15", "#8a8f98"),
    ("pglogical-15", "#c9a227"),
    ("anabranch-18", "#4aa3df"),
    ("native-18", "#b9bec6"),
];

/// Rows a second of each job and system; the longest bar of each job fills the width.
pub fn backlog(medians: &Medians) -> String {
    let systems = systems(medians);
    let rate = |job: &(String, String), system: &String| {
        let key = (job.0.clone(), job.1.clone(), system.clone());
        medians
            .get(&key)
            .filter(|figures| is_backlog(figures))
            .and_then(|figures| figures.get("rows_per_s").copied())
    };
    let mut jobs: Vec<(String, String)> = medians.keys().map(|key| (key.0.clone(), key.1.clone())).collect();
    jobs.dedup();
    jobs.retain(|job| systems.iter().any(|system| rate(job, system).is_some()));
    let mut body = String::new();
    let mut y = 30.0;
    for job in &jobs {
        let most = systems
            .iter()
            .filter_map(|system| rate(job, system))
            .fold(1.0, f64::max);
        let _ = writeln!(
            body,
            "<text x=\"4\" y=\"{}\" font-weight=\"bold\">{} {}</text>",
            y + 10.0,
            job.0,
            job.1
        );
        for system in &systems {
            let Some(value) = rate(job, system) else { continue };
            let colour = COLOURS
                .iter()
                .find(|known| known.0 == system)
                .map_or("#000", |known| known.1);
            let length = WIDTH * value / most;
            let _ = writeln!(
                body,
                "<rect x=\"{LEFT}\" y=\"{y}\" width=\"{length:.1}\" height=\"{}\" fill=\"{colour}\"/>\
                 <text x=\"{:.1}\" y=\"{}\">{} {system}</text>",
                BAR - 2.0,
                LEFT + length + 4.0,
                y + 10.0,
                short(value)
            );
            y += BAR;
        }
        y += 9.0;
    }
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"760\" height=\"{y}\" font-family=\"sans-serif\" \
         font-size=\"10\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"4\" y=\"16\" font-size=\"13\">Catching up, rows a second (each job to its own scale)</text>\n{body}</svg>\n"
    )
}
