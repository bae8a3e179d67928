//! `conflicts stats`: counts, and how they lie in time.

use anabranch_node::names::Names;
use anabranch_node::review::{self, Count, Stats};
use tokio_postgres::Client;

use super::{filter, render};
use crate::args::Filters;
use crate::failure::Failure;
use crate::output::{self, Format, say_plainly, table};

pub(super) async fn run(
    names: &Names,
    client: &Client,
    filters: &Filters,
    format: Format,
) -> Result<(), Failure> {
    let mut filter = filter::read(names, filters, 1)?;
    filter.partitions = review::partitions(client, &filter).await?;
    let stats = review::stats(client, &filter).await?;
    match format {
        Format::Json => output::json(&stats),
        Format::Table => say_plainly(&text(names, &stats)),
    }
}

fn text(names: &Names, stats: &Stats) -> String {
    let unknown = match stats.unknown {
        0 => String::new(),
        count => format!("{}, that were only counted\n", render::unknown(count)),
    };
    if stats.total == 0 {
        return format!("no conflicts\n{unknown}");
    }
    let mut out = format!("{} losing write(s)", stats.total);
    if stats.only_counted > 0 {
        out.push_str(&format!(
            ", {} of them only counted, their values not kept",
            stats.only_counted
        ));
    }
    out.push('\n');
    out.push_str(&unknown);
    for (label, counts) in [
        ("table", &stats.by_table),
        ("type", &stats.by_type),
        ("status", &stats.by_status),
    ] {
        out.push_str(&of(label, counts));
    }
    let named: Vec<Count> = stats
        .by_nodes
        .iter()
        .map(|pair| Count {
            name: pair_of(names, &pair.name),
            count: pair.count,
        })
        .collect();
    out.push_str(&of("loser > winner", &named));
    if let (Some(first), Some(last)) = (stats.by_hour.first(), stats.by_hour.last()) {
        let counts: Vec<i64> = stats.by_hour.iter().map(|hour| hour.count).collect();
        let most = counts.iter().max().copied().unwrap_or(0);
        out.push_str(&format!(
            "by hour    {}  {} to {}, at most {most}\n",
            sparkline(&counts),
            first.name,
            last.name
        ));
    }
    out
}

fn of(label: &str, counts: &[Count]) -> String {
    table(
        [label, "conflicts"],
        counts
            .iter()
            .map(|each| [each.name.clone(), each.count.to_string()]),
    )
}

/// `1 > 2` with names.
fn pair_of(names: &Names, pair: &str) -> String {
    let each = pair.split(" > ").map(|id| match id.parse() {
        Ok(id) => names.of(Some(id)),
        Err(_) => id.to_owned(),
    });
    each.collect::<Vec<_>>().join(" > ")
}

/// One character a number; an empty hour is a space above nothing, and anything else is seen.
fn sparkline(counts: &[i64]) -> String {
    const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let most = counts.iter().max().copied().unwrap_or(0).max(1);
    let bar = |&count: &i64| {
        if count <= 0 {
            return '·';
        }
        let at = usize::try_from((count * 8 + most - 1) / most).unwrap_or(1) - 1;
        BARS.get(at).copied().unwrap_or('█')
    };
    counts.iter().map(bar).collect()
}

#[cfg(test)]
mod tests {
    use anabranch_node::config::Config;

    use super::*;

    #[test]
    fn a_sparkline_shows_the_highest_whole_and_the_lowest_at_all() {
        assert_eq!(sparkline(&[0, 1, 4, 8, 1000]), "·▁▁▁█");
        assert_eq!(sparkline(&[1, 2, 3, 4, 5, 6, 7, 8]), "▁▂▃▄▅▆▇█");
        assert_eq!(sparkline(&[]), "");
    }

    #[test]
    fn pairs_are_shown_by_name() {
        let names = Names::configured(&Config::example());
        assert_eq!(pair_of(&names, "1 > 2"), "alpha > beta");
        assert_eq!(pair_of(&names, "? > 9"), "? > 9");
    }
}
