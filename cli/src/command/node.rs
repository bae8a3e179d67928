//! `anabranch node`: takes a lost member out.

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anabranch_node::config::Config;
use anabranch_node::membership::{self, Fact, FactKind, Membership};
use anabranch_node::setup;
use anabranch_node::status::Dropping;
use anabranch_proto::NodeId;
use serde_json::json;
use tokio_postgres::Client;

use crate::args::Node;
use crate::failure::Failure;
use crate::output::{self, Format, Waiting, say};

/// Between two looks at how far it is.
const LOOK_EVERY: Duration = Duration::from_millis(500);

pub(crate) async fn run(path: &Path, verb: &Node, format: Format) -> Result<ExitCode, Failure> {
    let Node::Drop { node } = verb;
    let config = super::load(path)?;
    let client = setup::connect(&super::admin_dsn(&config, None).await?).await?;
    let lost = match find(&read(&client).await?, node)? {
        Found::Live(fact) => fact,
        Found::Dropped(fact) => return end(&fact, format),
    };
    check(&config, &client, &lost).await?;
    let dropping = Fact {
        kind: FactKind::Dropping,
        by: config.node.id,
        ..lost.clone()
    };
    membership::say(&client, &dropping)
        .await
        .map_err(Failure::query("whether the node can be dropped"))?;
    let dropped = wait(&config, &client, &lost, format).await?;
    end(&dropped, format)
}

async fn read(client: &Client) -> Result<Membership, Failure> {
    membership::read(client)
        .await
        .map_err(Failure::query("who is a member"))
}

/// Whom a name or an id means.
enum Found {
    /// A member.
    Live(Fact),
    /// A former one; how it went out.
    Dropped(Fact),
}

/// A live member's name goes before an id, and both before what is gone.
fn find(members: &Membership, node: &str) -> Result<Found, Failure> {
    let live: Vec<&Fact> = members
        .live()
        .into_iter()
        .filter_map(|id| members.entry(id))
        .collect();
    let is_id = |fact: &Fact| fact.node.to_string() == node;
    let named = live.iter().find(|fact| fact.name == node);
    if let Some(fact) = named.or_else(|| live.iter().find(|fact| is_id(fact))) {
        return Ok(Found::Live((*fact).clone()));
    }
    let dropped = members
        .iter()
        .filter(|fact| fact.kind == FactKind::Dropped)
        .find(|fact| fact.name == node || is_id(fact));
    if let Some(fact) = dropped {
        return Ok(Found::Dropped(fact.clone()));
    }
    let all: Vec<String> = live
        .iter()
        .map(|fact| format!("`{}` (id {})", fact.name, fact.node))
        .collect();
    Err(Failure::Usage(format!(
        "`{node}` is no member of this cluster; its members are {}",
        all.join(", ")
    )))
}

/// Is this the place to drop it from, and is it lost?
async fn check(config: &Config, client: &Client, lost: &Fact) -> Result<(), Failure> {
    if lost.node == config.node.id {
        return Err(Failure::Usage(format!(
            "`{}` is this node: run this at a member that stays",
            lost.name
        )));
    }
    let members = read(client).await?;
    stays(&members, config.node.id)?;
    let status = super::status::read(config).await?;
    let connected = |peer: &&anabranch_node::status::PeerStatus| peer.id == lost.node.0 && peer.connected;
    if status.peers.iter().any(|peer| connected(&peer)) && !members.dropping().contains(&lost.node) {
        return Err(Failure::Refused(format!(
            "`{}` is not lost, its daemon is connected: `anabranch leave`, run there, takes it out without losing anything. \
             To give it up all the same, stop its daemon first; what it has not sent is lost to the others",
            lost.name
        )));
    }
    Ok(())
}

/// Who is being dropped has no say in who else is.
fn stays(members: &Membership, own: NodeId) -> Result<(), Failure> {
    if members.survivors().contains(&own) {
        return Ok(());
    }
    Err(Failure::Refused(
        "this node is being dropped itself, or was: run this at a member that stays".to_owned(),
    ))
}

/// Waits until the node is dropped, and says for whom it waits whenever that changes.
async fn wait(config: &Config, client: &Client, lost: &Fact, format: Format) -> Result<Fact, Failure> {
    let mut waiting = Waiting::new(format);
    let name = &lost.name;
    loop {
        let members = read(client).await?;
        if let Some(dropped) = members.get(lost.node, FactKind::Dropped) {
            return Ok(dropped.clone());
        }
        // The other one, or another member, was told to drop this one.
        stays(&members, config.node.id)?;
        let drop = match super::status::read(config).await {
            Ok(status) => status.dropping.into_iter().find(|drop| drop.id == lost.node.0),
            // It begins anew when the members change; else it is to be started again.
            Err(error) => Some(Dropping {
                text: format!("waits for the daemon of this node: {error}"),
                ..Dropping::default()
            }),
        };
        if let Some(drop) = drop {
            let event = json!({ "event": "waiting", "node": name, "for": drop.waits_for, "text": drop.text });
            waiting.tell(format!("dropping `{name}`: {}", drop.text), event)?;
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

fn end(dropped: &Fact, format: Format) -> Result<ExitCode, Failure> {
    let (name, id, position) = (&dropped.name, dropped.node, dropped.position);
    match format {
        Format::Table => say(&format!(
            "node `{name}` (id {id}) is dropped; its stream ends at {position}. Its id is not used again. To let a node \
             take its place, `anabranch join` an empty database under a new id\n"
        ))?,
        Format::Json => {
            output::line(&json!({ "event": "dropped", "node": name, "id": id, "position": position }))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use anabranch_proto::Position;

    use super::*;

    fn members() -> Membership {
        let fact = |node, name: &str, kind| Fact {
            node: NodeId(node),
            kind,
            name: name.to_owned(),
            address: String::new(),
            incarnation: String::new(),
            position: Position::ZERO,
            by: NodeId(1),
        };
        [
            fact(1, "amber", FactKind::Founder),
            fact(2, "birch", FactKind::Founder),
            fact(2, "birch", FactKind::Dropped),
            fact(3, "5", FactKind::Joined),
            fact(4, "birch", FactKind::Joined),
            fact(5, "elm", FactKind::Joined),
            fact(6, "fir", FactKind::Joined),
            fact(6, "fir", FactKind::Dropped),
        ]
        .into_iter()
        .collect()
    }

    fn live(node: &str) -> Option<u16> {
        match find(&members(), node) {
            Ok(Found::Live(fact)) => Some(fact.node.0),
            _ => None,
        }
    }

    #[test]
    fn a_node_is_named_by_its_name_or_its_id_and_the_living_go_first() {
        assert_eq!(live("amber"), Some(1));
        assert_eq!(live("4"), Some(4));
        // The second of that name, and a name that looks like another's id.
        assert_eq!(live("birch"), Some(4));
        assert_eq!(live("5"), Some(3));
        for dropped in ["2", "fir", "6"] {
            assert!(
                matches!(find(&members(), dropped), Ok(Found::Dropped(_))),
                "{dropped}"
            );
        }
    }

    #[test]
    fn who_is_being_dropped_itself_waits_for_no_other_drop() {
        let mut members = members();
        let amber = NodeId(1);
        let drop = |node: u16, by: u16| Fact {
            node: NodeId(node),
            kind: FactKind::Dropping,
            name: String::new(),
            address: String::new(),
            incarnation: String::new(),
            position: Position::ZERO,
            by: NodeId(by),
        };
        members.add(drop(5, 1));
        assert!(stays(&members, amber).is_ok());
        members.add(drop(1, 5));
        let Err(failure) = stays(&members, amber) else {
            panic!("it stays");
        };
        assert!(
            failure.to_string().contains("is being dropped itself"),
            "{failure}"
        );
    }

    #[test]
    fn who_is_no_member_is_told_who_is() {
        let Err(failure) = find(&members(), "oak") else {
            panic!("oak was found");
        };
        let said = failure.to_string();
        assert!(said.contains("`oak` is no member"), "{said}");
        assert!(
            said.contains("`amber` (id 1), `5` (id 3), `birch` (id 4), `elm` (id 5)"),
            "{said}"
        );
    }
}
