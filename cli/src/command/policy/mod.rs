//! `anabranch policy`: what the policy file says, whether it is right, how two differ, what a script chooses, and another policy for
//! a cluster that runs.

mod change;
mod trial;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::ExitCode;

use anabranch_conflict::policy::{Name, Policies, TablePolicy};
use anabranch_conflict::script::Script;
use anabranch_node::config::Config;
use anabranch_node::membership;
use anabranch_node::policy_change::Body;
use anabranch_node::setup::{self, Finding};
use anabranch_node::status::PolicyStatus;
use anabranch_proto::NodeId;
use anabranch_proto::schema::split_name;

use crate::args::Policy;
use crate::command::admin_dsn;
use crate::failure::Failure;
use crate::output::{self, Format, say};

pub(crate) async fn run(config: &Path, verb: &Policy, format: Format) -> Result<ExitCode, Failure> {
    let config = match verb {
        // An author needs no node.
        Policy::Test { script, rows } => return trial::run(script, rows, format),
        _ => super::load(config)?,
    };
    match verb {
        Policy::Test { script, rows } => trial::run(script, rows, format),
        Policy::Check { file } => {
            let mut names = Names::ask(&config).await;
            let is_answered = names.unknown.is_none();
            let policies = names.read(&config, file.as_deref())?;
            let unfit = match is_answered {
                true => Some(unfit(&config, &policies).await?),
                false => None,
            };
            check(&policies, unfit, format)
        }
        Policy::Change { cancel: true, .. } => change::cancel(&config, format).await,
        Policy::Change { file: Some(file), .. } => change::run(&config, file, format).await,
        Policy::Change { .. } => Err(Failure::Usage("name the new policy file".to_owned())),
        Policy::Show { file, table } => {
            // Of its daemon, if that runs.
            let running = match file {
                None => super::status::read(&config).await.ok(),
                Some(_) => None,
            };
            let policies = Names::ask(&config).await.read(&config, file.as_deref())?;
            show(
                &policies,
                table.as_deref(),
                running.map(|status| status.policy),
                format,
            )
        }
        Policy::Diff { old, new } => {
            let mut names = Names::ask(&config).await;
            let (old, new) = match new {
                Some(new) => (names.read(&config, Some(old))?, names.read(&config, Some(new))?),
                None => (names.read(&config, None)?, names.read(&config, Some(old))?),
            };
            diff(&old, &new, format)
        }
    }
}

/// What nodes are called: all that are members, or were, as this node's daemon knows them.
struct Names {
    names: BTreeMap<String, NodeId>,
    /// Why those in `peers` are all, until it was said.
    unknown: Option<Failure>,
}

impl Names {
    async fn ask(config: &Config) -> Self {
        let (members, unknown) = match members(config).await {
            Ok(members) => (members, None),
            Err(failure) => (BTreeMap::new(), Some(failure)),
        };
        Self {
            names: config.names(&members),
            unknown,
        }
    }

    /// The named file, or the one that the configuration names.
    fn read(&mut self, config: &Config, file: Option<&Path>) -> Result<Policies, Failure> {
        let file = match file {
            Some(path) => config.policy_file_in(path)?,
            None => config.policy_file()?,
        };
        let policies = file.policies(&self.names);
        let is_named = match &policies {
            Ok(policies) => names_nodes(policies),
            Err(error) => error.is_of_names(),
        };
        if let Some(failure) = self.unknown.take_if(|_| is_named) {
            output::remark(format_args!(
                "anabranch: of nodes only those in `peers` are known, since the database cannot be asked who else is, or was, a member: \
                 {failure}"
            ));
        }
        Ok(policies?)
    }
}

/// What every node is called that ever was a member.
async fn members(config: &Config) -> Result<BTreeMap<String, u16>, Failure> {
    let client = setup::connect(&admin_dsn(config, None).await?).await?;
    let members = membership::read(&client)
        .await
        .map_err(Failure::query("who is a member"))?;
    Ok(Body::names(&members))
}

/// Does any rule name nodes?
fn names_nodes(policies: &Policies) -> bool {
    let mut rules = policies.rules().iter();
    rules.any(|(_, policy)| policy.name() == Name::OriginPriority)
}

/// What the tables here have that the policy does not accept.
async fn unfit(config: &Config, policies: &Policies) -> Result<Vec<Finding>, Failure> {
    let client = setup::connect(&admin_dsn(config, None).await?).await?;
    let publication = config.postgres.publication.as_str();
    let read = Failure::query("the constraints of the tables");
    let mut findings = setup::exclusion::examine(&client, publication, policies)
        .await
        .map_err(&read)?;
    let keys = setup::pairwise::examine(&client, publication, policies).await;
    findings.extend(keys.map_err(&read)?);
    let together = setup::together::examine(&client, policies).await;
    findings.extend(together.map_err(&read)?);
    // `init` sets the identity that such tables need, once the policy names them.
    let merged = setup::merged::unfit(&client, policies).await;
    findings.extend(merged.map_err(&read)?.columns);
    Ok(findings)
}

/// `unfit`: none where the database does not answer.
fn check(policies: &Policies, unfit: Option<Vec<Finding>>, format: Format) -> Result<ExitCode, Failure> {
    let (rules, hash) = (policies.rules().len(), policies.hash());
    let fits = unfit.as_ref().is_none_or(Vec::is_empty);
    match format {
        Format::Table => {
            let tried: String = policies.scripts().map(tried).collect();
            say(&format!("{rules} rule(s), hash {hash}\n{tried}"))?;
            match unfit {
                Some(findings) if !fits => {
                    say(&output::findings(&findings))?;
                    say("the tables here do not fit it\n")?;
                }
                Some(_) => {}
                None => {
                    say("the tables were not looked at: the database does not answer, or is no node yet\n")?;
                }
            }
        }
        Format::Json => {
            let scripts: Vec<_> = policies
                .scripts()
                .map(|script| {
                    let trial = script.trial();
                    serde_json::json!({
                        "name": script.name(), "hash": script.short_hash(), "tried": trial.conflicts, "failed": trial.failed,
                        "first_failure": trial.first.as_ref().map(ToString::to_string),
                    })
                })
                .collect();
            output::json(&serde_json::json!({
                "ok": fits, "rules": rules, "hash": hash, "scripts": scripts, "findings": unfit,
            }))?;
        }
    }
    Ok(ExitCode::from(u8::from(!fits)))
}

fn tried(script: &Script) -> String {
    let trial = script.trial();
    let failed = match &trial.first {
        Some(first) => format!(
            "; it failed in {} of them, first with: {first} (columns were made up, too: try real ones with `anabranch policy test`)",
            trial.failed
        ),
        None => String::new(),
    };
    format!(
        "{script}: tried with {} conflicts that were made up{failed}\n",
        trial.conflicts
    )
}

fn show(
    policies: &Policies,
    table: Option<&str>,
    running: Option<PolicyStatus>,
    format: Format,
) -> Result<ExitCode, Failure> {
    let rules: Vec<(String, &TablePolicy)> = match table {
        Some(name) => {
            let (Some(schema), relation) = split_name(name) else {
                return Err(Failure::Usage(format!(
                    "`{name}` is no table; write schema.table"
                )));
            };
            vec![(name.to_owned(), policies.of(&schema, &relation))]
        }
        None => {
            let rules = policies
                .rules()
                .iter()
                .map(|(name, policy)| (name.clone(), policy));
            rules
                .chain([("*".to_owned(), policies.default_policy())])
                .collect()
        }
    };
    match format {
        Format::Table => {
            let rows = rules
                .iter()
                .map(|(name, policy)| [name.clone(), policy.to_string()]);
            say(&output::table(["table", "policy"], rows))?;
            say(&format!("hash {}\n", policies.hash()))?;
            if let Some(running) = &running {
                say(&in_words(policies, running))?;
            }
        }
        Format::Json => {
            let rules: Vec<_> = rules
                .iter()
                .map(|(name, policy)| serde_json::json!({ "table": name, "policy": policy.to_string() }))
                .collect();
            output::json(
                &serde_json::json!({ "hash": policies.hash(), "rules": rules, "running": running }),
            )?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// What the daemon runs with, if that is something else, and a change of it.
fn in_words(policies: &Policies, running: &PolicyStatus) -> String {
    let other = (running.hash != policies.hash() && !running.hash.is_empty())
        .then(|| format!("the daemon runs with another one, hash {}\n", running.hash));
    let change = running.change.as_ref().map(|change| {
        format!(
            "it is being changed to one with hash {}: {}\n",
            change.next_hash, change.text
        )
    });
    [other, change].into_iter().flatten().collect()
}

/// Rules that only one of both has, in their order. Order alone may decide, so a rule that moved counts.
fn diff(old: &Policies, new: &Policies, format: Format) -> Result<ExitCode, Failure> {
    let (before, after) = (old.canonical(), new.canonical());
    let only = |these: &str, those: &str| -> Vec<String> {
        let those: Vec<&str> = those.lines().collect();
        let not_there = these.lines().filter(|line| !those.contains(line));
        not_there.map(str::to_owned).collect()
    };
    let (removed, added) = (only(&before, &after), only(&after, &before));
    let same = before == after;
    let is_reordered = added.is_empty() && removed.is_empty();
    match format {
        Format::Table => {
            let lines = removed.iter().map(|rule| format!("- {rule}\n"));
            say(&lines
                .chain(added.iter().map(|rule| format!("+ {rule}\n")))
                .collect::<String>())?;
            say(match (same, is_reordered) {
                (true, _) => "the same decisions\n",
                (false, true) => "the same rules in another order\n",
                (false, false) => "",
            })?;
        }
        Format::Json => output::json(&serde_json::json!({
            "same": same, "removed": removed, "added": added, "old_hash": old.hash(), "new_hash": new.hash(),
        }))?,
    }
    Ok(ExitCode::from(u8::from(!same)))
}
