//! Can the policy of the tables here be changed while they are written?
//!
//! In:   the catalog, both policies         Out: what stands in the way, each with what to do
//! Not here: what is right in the policy itself (`anabranch_conflict::policy`)

use anabranch_conflict::change::Change;
use anabranch_conflict::policy::{Columns, Policies};
use tokio_postgres::Client;

use crate::setup::{exclusion, pairwise, together};

/// The published tables, and how many unique keys each has beside the primary one.
const TABLES: &str = "
SELECT p.schemaname::text, p.tablename::text,
    (SELECT count(*) FROM pg_index i WHERE i.indrelid = c.oid AND i.indisunique AND NOT i.indisprimary)::int8
FROM pg_publication_tables p JOIN pg_namespace n ON n.nspname = p.schemaname
JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = p.tablename
WHERE p.pubname = $1 AND p.schemaname <> 'anabranch' ORDER BY 1, 2";

/// What to do instead.
const OTHERWISE: &str = "change it with all daemons stopped (docs/policies.md, `With all daemons stopped`)";

/// The rules up to the last one that merges columns, as far as they say which tables are merged and how.
fn up_to_merging(policies: &Policies) -> Vec<(&str, Option<&Columns>)> {
    let rules = policies.rules();
    let count = rules.iter().rposition(|(_, policy)| policy.columns.is_some());
    let rules = rules.iter().take(count.map_or(0, |at| at + 1));
    rules
        .map(|(pattern, policy)| (pattern.as_str(), policy.columns.as_ref()))
        .collect()
}

/// Everything that stands in the way of changing `old` to `new` here.
///
/// # Errors
/// When the catalog cannot be read.
pub async fn obstacles(
    sql: &Client,
    publication: &str,
    old: &Policies,
    new: &Policies,
) -> Result<Vec<String>, tokio_postgres::Error> {
    let mut out = Vec::new();
    // Also of tables that are made meanwhile: the first rule that fits decides.
    if up_to_merging(old) != up_to_merging(new) {
        out.push(format!(
            "rules that merge columns differ: what such a row becomes depends on more than its concurrent versions; {OTHERWISE}"
        ));
    }
    for row in sql.query(TABLES, &[&publication]).await? {
        let (schema, table): (String, String) = (row.try_get(0)?, row.try_get(1)?);
        let unique: i64 = row.try_get(2)?;
        let (before, after) = (old.of(&schema, &table), new.of(&schema, &table));
        match Change::between(before, after) {
            Err(why) => out.push(format!("{schema}.{table}: {why}; {OTHERWISE}")),
            Ok(Some(_)) if unique > 0 && (before.is_last_writer() || after.is_last_writer()) => {
                out.push(format!(
                    "{schema}.{table} has {unique} unique key(s) beside its primary key: under last_update_wins their values are \
                     claimed by more versions than those of one row, so it cannot go to or from that; {OTHERWISE}"
                ));
            }
            Ok(_) => {}
        }
    }
    let mut findings = exclusion::examine(sql, publication, new).await?;
    findings.extend(pairwise::examine(sql, publication, new).await?);
    // Constraints that the former policy accepted. One that came since then is alarmed, whichever policy is in force.
    let known = together::examine(sql, old).await?;
    let unfit = together::examine(sql, new).await?.into_iter();
    findings.extend(unfit.filter(|finding| !known.contains(finding)));
    for finding in findings {
        out.push(format!(
            "{}: {}; {}",
            finding.check, finding.found, finding.remedy
        ));
    }
    Ok(out)
}
