//! Which policies are in force here: those of the file, those that the members agreed on, or both while they are changed.
//!
//! In:   the policy file, what the members said, what this node ran with last        Out: the policies; what to write down
//! Invariants: 1. what was agreed on goes before a file that is the one of before; another file is a change with all daemons
//!        stopped, and has to pass that gate (`crate::daemon`, `policy`); 2. a change is taken up once: what replaced it later stays
//! On crash: the same again: both files are written before anything is decided by what they say, the policy first
//! Not here: may it change now (`crate::daemon`, `policy`)

use std::collections::BTreeSet;
use std::path::{Component, Path, PathBuf};

use anabranch_conflict::change::{Asked, Phase, Point};
use anabranch_conflict::policy::Policies;
use anabranch_proto::NodeId;
use tokio_postgres::Client;
use uuid::Uuid;

use super::{Body, Known, Source};
use crate::config::{Config, PolicyError};
use crate::membership::Membership;
use crate::small_file;

/// What this node ran with last.
pub(crate) const RAN: &str = "policy.txt";
/// The change that was taken up last.
const TAKEN: &str = "policy_change.txt";
/// The change whose outcome the policy file was once seen to be: from then on another file is a change by files.
const SEEN: &str = "policy_file.txt";
/// What was agreed on, to be copied to where the configuration names it.
pub const AGREED: &str = "agreed-policy";

/// What is in force cannot be told.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The policy file.
    #[error(transparent)]
    Policy(#[from] PolicyError),
    /// The table of changes.
    #[error("anabranch.policy_change: {}", crate::error::sql(.0))]
    Sql(#[from] tokio_postgres::Error),
    /// What the node ran with last.
    #[error("the policy in node.data_dir: {0}; correct its permissions, or free disk space")]
    File(#[from] std::io::Error),
    /// The members agreed on what this release takes otherwise.
    #[error(
        "the policy that the members agreed on is not the same here: {0}; run the release here that the other members run"
    )]
    Unlike(String),
}

/// A change that was agreed on and is over.
#[derive(Debug, Clone)]
struct Agreed {
    id: Uuid,
    former: Policies,
    next: Policies,
    source: Source,
}

/// What is in force.
#[derive(Debug, Clone)]
pub struct InForce {
    /// The policies; on their way to others while they are changed.
    pub policies: Policies,
    /// How they are written; nothing where the file is what is in force.
    pub source: Option<Source>,
    /// The change that is under way.
    pub change: Option<Uuid>,
    /// Where it was made, as far as it is known.
    pub point: Option<Point>,
    /// The file is not what is in force: it is the one of before.
    pub is_file_stale: bool,
    taken: Option<Box<Agreed>>,
}

/// Both policies of a change, if they are here what they are at the node that asked.
///
/// # Errors
/// What differs.
pub fn both(body: &Body) -> Result<(Policies, Policies), String> {
    let names = super::ids(&body.nodes);
    let one = |what: &str, source: &Source, hash: &str| {
        let policies = source
            .parse(&names)
            .map_err(|faults| format!("the {what} policy: {faults}"))?;
        if policies.hash() == hash {
            Ok(policies)
        } else {
            Err(format!(
                "the {what} policy has hash {} here, and {hash} at the node that asked: names of nodes differ, or releases do",
                policies.hash()
            ))
        }
    };
    Ok((
        one("former", &body.former, &body.former_hash)?,
        one("new", &body.next, &body.next_hash)?,
    ))
}

/// Tells it. `file`: the policies of the file, read once for the life of a process.
///
/// # Errors
/// When it cannot be told.
pub async fn find(
    config: &Config,
    file: &Policies,
    sql: &Client,
    members: &Membership,
) -> Result<InForce, Error> {
    let known = super::read(sql).await?;
    let dir = &config.node.data_dir;
    let ran = read_file(&dir.join(RAN))?;
    let taken = read_file(&dir.join(TAKEN))?;
    let live = members.live();
    let own = config.node.id;
    let agreed = match known.changes.last(own, &live) {
        Some((id, _)) => known.bodies.get(&id).map(|body| agreed(id, body)).transpose()?,
        None => None,
    };
    let hashes = hashes(&known, &live);
    let is_taken = |agreed: &Agreed| taken.as_deref() == Some(agreed.id.to_string().as_str());
    let seen = read_file(&dir.join(SEEN))?;
    let is_seen = |agreed: &Agreed| seen.as_deref() == Some(agreed.id.to_string().as_str());
    let base = choose(file, agreed, (is_taken, is_seen), ran.as_deref(), &hashes);
    let Some((id, change)) = known.changes.under_way(own, &live) else {
        return Ok(base);
    };
    let Some(body) = known.bodies.get(&id) else {
        return Ok(base);
    };
    match both(body) {
        Ok((former, next)) if change.is_ready(own) || former.hash() == base.policies.hash() => Ok(InForce {
            policies: former.changing_to(next),
            change: Some(id),
            point: change.point,
            ..base
        }),
        Err(why) if change.is_ready(own) => Err(Error::Unlike(why)),
        // It is refused.
        Ok(_) | Err(_) => Ok(base),
    }
}

fn agreed(id: Uuid, body: &Body) -> Result<Agreed, Error> {
    let (former, next) = both(body).map_err(Error::Unlike)?;
    Ok(Agreed {
        id,
        former,
        next,
        source: body.next.clone(),
    })
}

/// Of all policies that changes were made from or to.
fn hashes(known: &Known, live: &BTreeSet<NodeId>) -> BTreeSet<String> {
    let made = |change: &&Asked| matches!(change.phase(live), Phase::Made | Phase::Over | Phase::Ended);
    let all = known.changes.iter().map(|(_, change)| change).filter(made);
    all.flat_map(|change| [change.former.clone(), change.next.clone()])
        .collect()
}

/// The file, or what was agreed on. `ran`: what this node ran with last.
fn choose(
    file: &Policies,
    agreed: Option<Agreed>,
    (is_taken, is_seen): (impl Fn(&Agreed) -> bool, impl Fn(&Agreed) -> bool),
    ran: Option<&str>,
    hashes: &BTreeSet<String>,
) -> InForce {
    let of_file = InForce {
        policies: file.clone(),
        source: None,
        change: None,
        point: None,
        is_file_stale: false,
        taken: None,
    };
    let Some(agreed) = agreed else { return of_file };
    let is_in_force = match ran {
        Some(ran) if is_taken(&agreed) => ran == agreed.next.canonical(),
        Some(ran) => ran == agreed.next.canonical() || ran == agreed.former.canonical(),
        // The folder is a new one.
        None => true,
    };
    if !is_in_force {
        return of_file;
    }
    // Another file than any of before is a change with all daemons stopped; any other file, once it has been replaced.
    let is_file_stale =
        file.hash() != agreed.next.hash() && hashes.contains(&file.hash()) && !is_seen(&agreed);
    if !is_file_stale {
        return InForce {
            taken: Some(Box::new(agreed)),
            ..of_file
        };
    }
    InForce {
        policies: agreed.next.clone(),
        source: Some(agreed.source.clone()),
        is_file_stale,
        taken: Some(Box::new(agreed)),
        ..of_file
    }
}

impl InForce {
    /// Did the members once agree on what is in force?
    pub(crate) fn is_by_change(&self) -> bool {
        self.taken.is_some() && self.change.is_none()
    }

    /// The members go by the file, which they have put back since the change, and the folder that would tell is lost: so does this node, and
    /// what was agreed on is over for it.
    ///
    /// # Errors
    /// When the files cannot be written.
    pub(crate) fn go_by_file(&self, dir: &Path, file: &Policies) -> std::io::Result<()> {
        // This one first: with the policy alone it would be the one of before.
        if let Some(agreed) = &self.taken {
            small_file::replace(&dir.join(TAKEN), agreed.id.to_string().as_bytes())?;
        }
        small_file::replace(&dir.join(RAN), file.canonical().as_bytes())
    }

    /// Writes down what was taken up, before anything is decided by it. Only while the node runs with nothing else.
    ///
    /// # Errors
    /// When the files cannot be written.
    pub(crate) fn keep(&self, dir: &Path) -> std::io::Result<()> {
        let Some(agreed) = self.taken.as_ref().filter(|_| self.change.is_none()) else {
            return Ok(());
        };
        let id = agreed.id.to_string();
        let is_of_file = !self.is_file_stale && self.policies.hash() == agreed.next.hash();
        if is_of_file && read_file(&dir.join(SEEN))?.as_deref() != Some(id.as_str()) {
            small_file::replace(&dir.join(SEEN), id.as_bytes())?;
        }
        if read_file(&dir.join(TAKEN))?.as_deref() == Some(id.as_str()) {
            return Ok(());
        }
        tracing::info!(change = %agreed.id, hash = %agreed.next.hash(), "another policy from here on");
        write_agreed(dir, &agreed.source)?;
        // What is left of an earlier change by files is not gone back to.
        match std::fs::remove_file(dir.join("policy_before.json")) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        small_file::replace(&dir.join(RAN), agreed.next.canonical().as_bytes())?;
        small_file::replace(&dir.join(TAKEN), agreed.id.to_string().as_bytes())
    }
}

/// For people, to be copied.
fn write_agreed(dir: &Path, source: &Source) -> std::io::Result<()> {
    let dir = dir.join(AGREED);
    std::fs::create_dir_all(&dir)?;
    small_file::replace(&dir.join("policy.toml"), source.text.as_bytes())?;
    for (name, text) in &source.scripts {
        let path = PathBuf::from(name);
        if !path.components().all(|part| matches!(part, Component::Normal(_))) {
            continue;
        }
        let path = dir.join(path);
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)?;
        }
        small_file::replace(&path, text.as_bytes())?;
    }
    Ok(())
}

fn read_file(path: &Path) -> std::io::Result<Option<String>> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policies(rule: &str) -> Policies {
        let text = format!("[[table]]\nname = \"public.a\"\npolicy = \"{rule}\"");
        let members = [("n1".to_owned(), NodeId(1))].into();
        Policies::parse(&text, &members, |_| Err(String::new())).unwrap()
    }

    fn change() -> (Agreed, BTreeSet<String>) {
        let agreed = Agreed {
            id: Uuid::from_u128(7),
            former: Policies::default(),
            next: policies("first_update_wins"),
            source: Source::default(),
        };
        let hashes = [agreed.former.hash(), agreed.next.hash()].into();
        (agreed, hashes)
    }

    /// The policies in force, whether the file is stale, and whether a change is to be written down.
    fn chosen(
        file: &Policies,
        (is_taken, is_seen): (bool, bool),
        ran: Option<&Policies>,
    ) -> (String, bool, bool) {
        let (agreed, hashes) = change();
        let ran = ran.map(Policies::canonical);
        let chosen = choose(
            file,
            Some(agreed),
            (|_| is_taken, |_| is_seen),
            ran.as_deref(),
            &hashes,
        );
        (
            chosen.policies.hash(),
            chosen.is_file_stale,
            chosen.taken.is_some(),
        )
    }

    #[test]
    fn what_was_agreed_on_goes_before_the_file_of_before() {
        let (old, new) = (Policies::default(), policies("first_update_wins"));
        for (is_taken, ran) in [
            (false, Some(&old)),
            (true, Some(&new)),
            (false, Some(&new)),
            (false, None),
        ] {
            assert_eq!(chosen(&old, (is_taken, false), ran), (new.hash(), true, true));
            assert_eq!(chosen(&new, (is_taken, false), ran), (new.hash(), false, true));
        }
        // Once the file was replaced, the one of before is a change like any other.
        assert_eq!(chosen(&old, (true, true), Some(&new)), (old.hash(), false, true));
    }

    #[test]
    fn the_file_that_the_members_have_put_back_stays_in_force_in_a_folder_that_is_new() {
        let old = Policies::default();
        let dir = tempfile::tempdir().unwrap();
        let find = || {
            let (agreed, hashes) = change();
            let (ran, taken) = (dir.path().join(RAN), dir.path().join(TAKEN));
            let (ran, taken) = (read_file(&ran).unwrap(), read_file(&taken).unwrap());
            let is_taken = |agreed: &Agreed| taken.as_deref() == Some(agreed.id.to_string().as_str());
            choose(&old, Some(agreed), (is_taken, |_| false), ran.as_deref(), &hashes)
        };
        let lost = find();
        assert!(lost.is_file_stale && lost.policies.hash() != old.hash());
        // Also where a daemon was started in it.
        for _ in 0..2 {
            lost.go_by_file(dir.path(), &old).unwrap();
            let found = find();
            assert!(!found.is_file_stale && found.policies.hash() == old.hash());
            found.keep(dir.path()).unwrap();
            assert_eq!(find().policies.hash(), old.hash());
            std::fs::remove_file(dir.path().join(TAKEN)).unwrap();
            lost.keep(dir.path()).unwrap();
            assert!(find().is_file_stale);
        }
    }

    #[test]
    fn a_third_file_is_a_change_with_all_daemons_stopped_and_what_replaced_the_agreed_one_stays() {
        let (old, third) = (Policies::default(), policies("column_merge"));
        assert_eq!(
            chosen(&third, (false, false), Some(&old)),
            (third.hash(), false, true)
        );
        // Replaced by the third one, and that by the first.
        assert_eq!(
            chosen(&third, (true, false), Some(&third)),
            (third.hash(), false, false)
        );
        assert_eq!(
            chosen(&old, (true, false), Some(&third)),
            (old.hash(), false, false)
        );
        assert_eq!(
            chosen(&old, (true, false), Some(&old)),
            (old.hash(), false, false)
        );
    }
}
