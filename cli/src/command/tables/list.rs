//! `anabranch tables list`.

use std::process::ExitCode;

use anabranch_node::config::Config;
use anabranch_node::setup;
use anabranch_node::setup::pattern::Patterns;
use anabranch_node::setup::tables::{self, State, View};

use crate::args::Admin;
use crate::failure::Failure;
use crate::output::{self, Format, say};

pub(super) async fn run(config: &Config, admin: &Admin, format: Format) -> Result<ExitCode, Failure> {
    let patterns = Patterns::parse(&config.postgres.tables).map_err(setup::Error::from)?;
    let mut client = super::connect(config, admin).await?;
    let role = crate::command::role(config)?;
    let facts = crate::command::facts(&mut client, config, &role).await?;
    setup::check::same_node(facts.ours.node.as_ref(), config)?;
    let policies = config.policies_among(&facts.ours.names)?;
    let sizes = tables::sizes(&client).await?;
    let views = tables::views(&facts, (&patterns, &config.node.data_dir), &policies, &sizes);
    match format {
        Format::Json => output::json(&serde_json::json!({ "tables": views }))?,
        Format::Table => say(&words(&views))?,
    }
    Ok(ExitCode::SUCCESS)
}

fn words(views: &[View]) -> String {
    let header = [
        "table",
        "replicated",
        "why",
        "identity",
        "policy",
        "rows",
        "size",
        "",
    ];
    let mut out = output::table(header, views.iter().map(row));
    for view in views {
        for finding in &view.obstacles {
            out.push_str(&format!(
                "{}: {}\n  {}\n",
                view.table, finding.found, finding.remedy
            ));
        }
    }
    out
}

fn row(view: &View) -> [String; 8] {
    let replicated = match view.state {
        State::Replicated => "yes",
        State::NotReplicated => "no",
        State::NotYet => "NOT YET",
        State::NotChosen => "STILL",
    };
    let why = match &view.partition_of {
        Some(above) => format!("{} ({above})", view.why),
        None => view.why.clone(),
    };
    let mut notes = Vec::new();
    if view.passed_over {
        notes.push("what others send of it is passed over here".to_owned());
    }
    if !view.obstacles.is_empty() {
        notes.push("cannot be replicated, see below".to_owned());
    }
    notes.extend(view.advice.clone());
    [
        view.table.clone(),
        replicated.to_owned(),
        why,
        view.identity.clone(),
        view.policy.clone(),
        view.rows.map_or_else(|| "-".to_owned(), |rows| rows.to_string()),
        output::bytes(view.bytes),
        notes.join("; "),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_that_is_not_as_the_configuration_says_is_told_what_to_do() {
        let view = View {
            table: "public.item".to_owned(),
            state: State::NotYet,
            why: "chosen by \"public.*\"".to_owned(),
            partition_of: None,
            identity: "default".to_owned(),
            policy: "last_update_wins".to_owned(),
            rows: None,
            bytes: 8192,
            obstacles: Vec::new(),
            advice: Some("`anabranch tables add public.item`".to_owned()),
            passed_over: false,
        };
        let text = words(&[view]);
        assert!(
            text.contains("NOT YET") && text.contains("tables add public.item"),
            "{text}"
        );
    }
}
