//! The command line's filters as the log's.

use anabranch_node::names::Names;
use anabranch_node::review::{self, Filter, Status};
use jiff::{Span, Timestamp, Zoned};

use crate::args::Filters;
use crate::failure::Failure;

pub(super) fn read(names: &Names, filters: &Filters, limit: u32) -> Result<Filter, Failure> {
    let now = Zoned::now();
    let at = |text: &Option<String>| text.as_ref().map(|text| time(text, &now)).transpose();
    if let Some(status) = &filters.status {
        status.parse::<Status>().map_err(Failure::Usage)?;
    }
    let id = |option: &str, name: &Option<String>| {
        name.as_ref().map(|name| node_id(names, option, name)).transpose()
    };
    Ok(Filter {
        since: at(&filters.since)?.map(|time| time.to_string()),
        until: at(&filters.until)?.map(|time| time.to_string()),
        table: filters.table.clone(),
        kind: filters.kind.clone(),
        keys: filters
            .key
            .as_ref()
            .map_or(Ok(Vec::new()), |key| review::keys_of(key))
            .map_err(|error| Failure::Usage(format!("--key: {error}")))?,
        node: id("--node", &filters.node)?,
        winner: id("--winner", &filters.winner)?,
        status: filters.status.clone(),
        group: filters.group.clone(),
        limit,
        ..Filter::default()
    })
}

fn node_id(names: &Names, option: &str, node: &str) -> Result<u16, Failure> {
    if let Ok(id) = node.parse() {
        return Ok(id);
    }
    names.id_of(node).ok_or_else(|| {
        let known: Vec<&str> = names.all().collect();
        Failure::Usage(format!(
            "{option} {node} is neither an id nor the name of a node that is known here: {}",
            known.join(", ")
        ))
    })
}

/// RFC 3339, a date (midnight here), or a span back from now.
fn time(text: &str, now: &Zoned) -> Result<Timestamp, Failure> {
    if let Ok(time) = text.parse::<Timestamp>() {
        return Ok(time);
    }
    if let Ok(date) = text.parse::<jiff::civil::DateTime>()
        && let Ok(zoned) = date.to_zoned(now.time_zone().clone())
    {
        return Ok(zoned.timestamp());
    }
    let back = text
        .parse::<Span>()
        .ok()
        // Both `2h` and `2h ago` mean two hours back.
        .and_then(|span| now.checked_sub(span.abs()).ok())
        .map(|zoned| zoned.timestamp());
    back.ok_or_else(|| {
        Failure::Usage(format!(
            "`{text}` is not a time; write 2026-11-24T10:00:00Z, 2026-11-24, 2h or \"3 days ago\""
        ))
    })
}

#[cfg(test)]
mod tests {
    use anabranch_node::config::Config;

    use super::*;

    #[test]
    fn times_are_read_in_every_promised_form() {
        let now: Zoned = "2026-11-24T12:00:00+00:00[UTC]".parse().unwrap();
        for (text, expected) in [
            ("2026-11-24T10:00:00Z", "2026-11-24T10:00:00Z"),
            ("2026-11-24T10:00:00+02:00", "2026-11-24T08:00:00Z"),
            ("2026-11-23", "2026-11-23T00:00:00Z"),
            ("2h", "2026-11-24T10:00:00Z"),
            ("2h ago", "2026-11-24T10:00:00Z"),
            ("3 days ago", "2026-11-21T12:00:00Z"),
        ] {
            assert_eq!(time(text, &now).unwrap().to_string(), expected, "{text}");
        }
        assert!(matches!(time("yesterday-ish", &now), Err(Failure::Usage(_))));
    }

    #[test]
    fn options_become_a_filter_or_are_refused() {
        let names = Names::configured(&Config::example());
        let filters = Filters {
            key: Some("id=7, name=x".to_owned()),
            node: Some("beta".to_owned()),
            winner: Some("1".to_owned()),
            ..Filters::default()
        };
        let filter = read(&names, &filters, 5).unwrap();
        assert_eq!(
            filter.keys,
            [r#"{"id":7,"name":"x"}"#, r#"{"id":"7","name":"x"}"#]
        );
        assert_eq!((filter.node, filter.winner, filter.limit), (Some(2), Some(1), 5));
        for wrong in [
            Filters {
                node: Some("gamma".to_owned()),
                ..Filters::default()
            },
            Filters {
                status: Some("done".to_owned()),
                ..Filters::default()
            },
            Filters {
                key: Some("id".to_owned()),
                ..Filters::default()
            },
            Filters {
                since: Some("soonish".to_owned()),
                ..Filters::default()
            },
        ] {
            assert!(
                matches!(read(&names, &wrong, 5), Err(Failure::Usage(_))),
                "{wrong:?}"
            );
        }
    }
}
