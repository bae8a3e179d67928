//! `conflicts suggest`: which policy would have lost least.

use anabranch_node::review::{self, Suggestion};
use tokio_postgres::Client;

use crate::failure::Failure;
use crate::output::{self, Format, say_plainly, table};

pub(super) async fn run(client: &Client, name: &str, format: Format) -> Result<(), Failure> {
    let suggestion = review::suggest(client, name).await?;
    match format {
        Format::Json => output::json(&suggestion),
        Format::Table => say_plainly(&render(&suggestion)),
    }
}

fn render(suggestion: &Suggestion) -> String {
    if suggestion.conflicts == 0 {
        return format!("no conflicts of {} that a policy decides\n", suggestion.table);
    }
    let mut out = format!(
        "{}: {} logged conflict(s)\n",
        suggestion.table, suggestion.conflicts
    );
    if suggestion.not_of_policy > 0 {
        out.push_str(&format!(
            "and {} line(s) that no policy decides (unique values, refused rows, truncates, rows of before the replication)\n",
            suggestion.not_of_policy
        ));
    }
    if suggestion.only_counted > 0 {
        out.push_str(&format!(
            "and {} losing write(s) that were only counted, of which nothing more is known\n",
            suggestion.only_counted
        ));
    }
    out.push_str(&table(
        ["policy", "nothing lost", "something lost", "cannot be known"],
        suggestion.policies.iter().map(|outcome| {
            [
                outcome.policy.clone(),
                outcome.kept.to_string(),
                outcome.lost.to_string(),
                outcome.unknown.to_string(),
            ]
        }),
    ));
    out.push_str(&table(
        ["column", "type", "differs in", "keeps what both wrote"],
        suggestion.columns.iter().map(|column| {
            [
                column.column.clone(),
                column.type_name.clone().unwrap_or_else(|| "(gone)".to_owned()),
                column.conflicts.to_string(),
                match (&column.rule, &column.rule_under_check) {
                    (None, Some(rule)) => format!("({rule})"),
                    (rule, _) => rule.clone().unwrap_or_default(),
                },
            ]
        }),
    ));
    if suggestion
        .columns
        .iter()
        .any(|column| column.rule_under_check.is_some())
    {
        out.push_str(
            "(...): a CHECK is over the column, which merging could break although each writer keeps it. The rule is for it only with \
             check_constraints = \"quarantine\" in the table's rule: a row that the CHECK refuses then waits in the quarantine.\n",
        );
    }
    if suggestion.deletes.lost + suggestion.deletes.won > 0 {
        out.push_str(&format!(
            "{} delete(s) lost to a write, which deletes = \"delete_wins\" would lose instead; {} won over one, and \
             \"update_wins\" would lose the delete\n",
            suggestion.deletes.lost, suggestion.deletes.won
        ));
    }
    out.push_str(
        "The log holds the two rows and not the row before them: of a column in which they differ, it does not tell whether one \
         had changed it or both. Policies that choose a whole row lose one of two, only which differs. delta is for counts and balances, \
         where the change matters and not the value. jsonb_merge keeps what both wrote but of a key that both set: there the last writer's \
         value stays.\n",
    );
    match &suggestion.policy_file {
        Some(text) => out.push_str(&format!("\nWould have lost least:\n\n{text}")),
        None => out.push_str("\nNo policy is known to lose less than choosing one of the rows.\n"),
    }
    out
}
