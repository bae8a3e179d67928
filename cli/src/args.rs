//! What can be asked for on the command line.

use std::path::PathBuf;

use anabranch_conflict::ConflictType;
use anabranch_node::review::Status as ReviewStatus;
use clap::builder::PossibleValuesParser;
use clap::{Parser, Subcommand};

use crate::output::Format;

/// Active-active replication for ordinary PostgreSQL: every node takes writes, all end with the same rows.
///
/// Exit codes: 0 done, 1 failed or a precondition is not met, 2 wrong usage; `verify`, `repair`, `tables add`, `wait` and
/// `status --check` have their own.
#[derive(Debug, Parser)]
#[command(name = "anabranch", version, propagate_version = true)]
pub(crate) struct Args {
    /// Configuration file.
    #[arg(
        long,
        short,
        global = true,
        env = "ANABRANCH_CONFIG",
        default_value = "/etc/anabranch/anabranch.toml",
        value_name = "FILE"
    )]
    pub(crate) config: PathBuf,
    /// How to print results.
    #[arg(long, short, global = true, value_enum, default_value_t = Format::Table)]
    pub(crate) output: Format,
    #[command(subcommand)]
    pub(crate) verb: Verb,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Set this node's database up: schema, publication, slot, replica identities, grants. Can be repeated.
    Init(Init),
    /// A cluster, from one server with its data.
    Cluster {
        #[command(subcommand)]
        verb: Cluster,
    },
    /// Check every precondition; say what to do about each that is not met.
    Doctor,
    /// Run the daemon. SIGTERM and SIGINT make it drain and exit 0.
    Run(Run),
    /// Ask the running daemon: links, positions, lag, clocks, journal, quarantine.
    Status(Status),
    /// Wait until everything that another node had committed is visible here.
    ///
    /// Exit codes: 0 it is visible, 1 not in time, 2 could not tell.
    Wait(Wait),
    /// Review the conflict log. Needs the database; the daemon only for --all-nodes.
    Conflicts(Box<Review>),
    /// Which rule decides the conflicts of which table. Asks the database what nodes are called that `peers` has not; `change` needs the
    /// daemon.
    Policy {
        #[command(subcommand)]
        verb: Policy,
    },
    /// Print the exact SQL that makes an ordinary role fit to run the daemon.
    Grants(Grants),
    /// Take everything away that `init` made.
    Remove(Remove),
    /// Show the configuration as it is understood, with the environment applied and secrets hidden.
    Config,
    /// Show it: three throwaway servers, three daemons, writes at all three, a real conflict.
    Demo(Demo),
    /// Make this node's empty database a member of a running cluster, with a copy of another member's rows.
    ///
    /// Interrupted, it goes on where it was when it is run again.
    Join(Join),
    /// Take this node out of its cluster, after all that it wrote is applied at every other member.
    ///
    /// Makes its database read only by default. Interrupted, the daemon goes on with it; run again, it shows how far it is.
    Leave(Leave),
    /// Members of the cluster.
    Node {
        #[command(subcommand)]
        verb: Node,
    },
    /// Compare the rows of all nodes, while they are written. Exit codes: 0 equal, 1 different, 2 could not tell.
    Verify(Verify),
    /// Make rows that differ what they are at one node; the others hear nothing of it. Exit codes as of `verify`.
    Repair(Repair),
    /// Bring this node back, with the rows that it has, after its slot, its journal or its publication was lost, or a standby promoted.
    ///
    /// The slot was dropped or lost WAL; the journal was lost, damaged, or is an older copy; the publication was gone or incomplete for a
    /// while; a promoted standby lacks the end of what this node had sent. To be run with the daemon stopped. What a standby lacks is put
    /// back. Rows that were written here and that nobody has heard of are sent to the others as new writes; rows deleted so come back,
    /// or are deleted everywhere. Interrupted, it goes on where it was when it is run again.
    Heal(Heal),
    /// Change the schema of all nodes: run a DDL statement here, and at every other node at its place in the stream.
    ///
    /// Without a statement: what has travelled, and what waits at this node.
    Ddl(Ddl),
    /// Ids that never collide: every node hands out its own share of each sequence.
    Sequences {
        #[command(subcommand)]
        verb: Sequences,
    },
    /// Which tables are replicated; taking one with its rows in, and one out.
    Tables {
        #[command(subcommand)]
        verb: Tables,
    },
    /// Print a completion script for a shell.
    Completion {
        #[arg(value_enum)]
        shell: clap_complete::Shell,
    },
}

#[derive(Debug, clap::Args)]
pub(crate) struct Status {
    /// For monitoring systems: say in one line whether all is well. Exit codes: 0 ok, 1 warning, 2 critical, 3 unknown.
    #[arg(long)]
    pub(crate) check: bool,
    /// With --check: a link may be down for so long.
    #[arg(long, default_value_t = 60, value_name = "SECONDS", requires = "check")]
    pub(crate) max_down: u32,
    /// With --check: a peer may be behind what was committed here for so long. Default: however long.
    #[arg(long, value_name = "SECONDS", requires = "check")]
    pub(crate) max_lag: Option<u32>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Wait {
    /// Name or id of the node whose commits are waited for.
    #[arg(long)]
    pub(crate) node: String,
    /// Up to this position of it, as `1:0/19D2920` (timeline and LSN) or `0/19D2920`. Default: what it has committed by now, for
    /// which its daemon is asked.
    #[arg(long, value_name = "POSITION")]
    pub(crate) position: Option<String>,
    /// How long.
    #[arg(long, default_value_t = 30, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(0..=3600))]
    pub(crate) timeout: u32,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Verify {
    /// `schema.table`, with `*` for anything in either part, or a table in any schema. Default: every replicated table.
    #[arg(value_name = "TABLE")]
    pub(crate) tables: Vec<String>,
    /// Rows that each node reads in a second at most; 0: no limit.
    #[arg(long, default_value_t = 100_000, value_name = "ROWS")]
    pub(crate) rate: u64,
    /// Leave a table once so many different rows of it are found.
    #[arg(long, default_value_t = 1_000, value_name = "ROWS", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub(crate) limit: u32,
    /// Seconds for which rows that are written all the time are looked at again.
    #[arg(long, default_value_t = 30, value_name = "SECONDS")]
    pub(crate) patience: u32,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Repair {
    /// Name of the node whose rows are right.
    #[arg(
        long,
        value_name = "NODE",
        required_unless_present = "newest",
        conflicts_with = "newest"
    )]
    pub(crate) from: Option<String>,
    /// What the newest write made of each row is right, where a journal still tells; other rows are left as they are.
    #[arg(long)]
    pub(crate) newest: bool,
    /// Only say what would be written where.
    #[arg(long)]
    pub(crate) dry_run: bool,
    #[command(flatten)]
    pub(crate) verify: Verify,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Heal {
    /// Only check, and count the rows that would be sent again; change nothing.
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// What becomes of rows that were deleted here meanwhile and that no other node has written since.
    #[arg(long, value_enum, default_value_t = Deleted::BringBack)]
    pub(crate) deleted: Deleted,
    /// Go on although rows of tables whose columns are merged were written here unheard of, or a promoted standby lacks writes of such
    /// (stop writes to them first): the record has the rows as they are here, and they become what the others make of them.
    #[arg(long)]
    pub(crate) leave_merged: bool,
    /// How long to wait for the other nodes.
    #[arg(long, default_value_t = 300, value_name = "SECONDS")]
    pub(crate) wait: u32,
    /// Rows that each node reads in a second at most while all are compared; 0: no limit.
    #[arg(long, default_value_t = 100_000, value_name = "ROWS")]
    pub(crate) rate: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Deleted {
    /// They come back here.
    BringBack,
    /// They are deleted everywhere.
    Delete,
}

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Cluster {
    /// Make this server's database, with the rows that it has, the first member of a new cluster: `init` for a node without peers.
    /// The others `join`.
    Create(Init),
}

#[derive(Debug, clap::Args)]
pub(crate) struct Init {
    #[command(flatten)]
    pub(crate) admin: Admin,
    /// Print the exact SQL, change nothing.
    #[arg(long)]
    pub(crate) dry_run: bool,
}

/// Who sets up and removes.
#[derive(Debug, clap::Args)]
pub(crate) struct Admin {
    /// Connection string of a superuser, or of the owner of the tables. Default: postgres.dsn of the configuration.
    #[arg(long, env = "ANABRANCH_ADMIN_DSN", hide_env_values = true, value_name = "DSN")]
    pub(crate) admin_dsn: Option<String>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Run {
    /// How log lines look.
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    pub(crate) log_format: LogFormat,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum LogFormat {
    Text,
    Json,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Review {
    /// Connect as somebody else than the daemon, such as a member of anabranch_reviewer.
    #[arg(
        long,
        global = true,
        env = "ANABRANCH_REVIEWER_DSN",
        hide_env_values = true,
        value_name = "DSN"
    )]
    pub(crate) dsn: Option<String>,
    #[command(subcommand)]
    pub(crate) verb: Conflicts,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Policy {
    /// Say everything that is wrong with it, or its hash, which must be the same at all nodes.
    Check {
        /// Default: the file that cluster.policy names.
        file: Option<PathBuf>,
    },
    /// The rules in the order in which they are tried.
    Show {
        /// Default: the file that cluster.policy names.
        file: Option<PathBuf>,
        /// What decides for this table, as `schema.table`.
        #[arg(long)]
        table: Option<String>,
    },
    /// What another file would change. Exit code 1 when it decides otherwise.
    Diff {
        /// The other file; with a second one, the former of both.
        old: PathBuf,
        /// Compare with this one instead of the file that cluster.policy names.
        new: Option<PathBuf>,
    },
    /// Change the policy of all nodes while they run, at one place of each node's stream. Needs the daemon.
    ///
    /// Run it at one node; the others get the file, and its scripts, over their links. All members must be there for it: one that is
    /// away is waited for. Interrupted, the daemons go on with it; run again, it shows how far it is. Exit code 1 when a member
    /// refuses.
    Change {
        /// The new policy file.
        #[arg(required_unless_present = "cancel")]
        file: Option<PathBuf>,
        /// Call it off instead, at the node that asked for it, as long as a member is waited for.
        #[arg(long, conflicts_with = "file")]
        cancel: bool,
    },
    /// What a script chooses in conflicts that you write down. Exit code 1 when it fails in one, or chooses otherwise than expected.
    ///
    /// The conflicts are a JSON list of objects: `versions`, the earliest first, each with `origin` and either `row` (columns
    /// with their values) or `"deleted": true`; and, if you like, `name` and `expect`, the index of the version that must be chosen.
    /// A script is always shown them in this order, so no other one is tried. Needs no configuration.
    Test {
        /// The script.
        script: PathBuf,
        /// The conflicts.
        #[arg(long)]
        rows: PathBuf,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum Conflicts {
    /// The newest conflicts first.
    List(List),
    /// One conflict, its rows side by side.
    Show {
        /// Its id, or the beginning of it.
        id: String,
    },
    /// How many, by table, type, pair of nodes and hour.
    Stats(Filters),
    /// The newest conflicts, oldest of them first; with -f new ones as they come.
    Tail(Tail),
    /// All of them, to a file or another program.
    Export(Export),
    /// Mark as seen.
    Ack(Mark),
    /// Mark as no concern.
    Dismiss(Mark),
    /// Write the losing values again, as a new transaction here; it wins everywhere.
    Replay(Replay),
    /// Which policy would have lost least of a table's logged conflicts, and what the log does not tell of that.
    Suggest {
        /// `schema.table`, or a table in any schema.
        table: String,
    },
    /// Why this side won: stamps, what each transaction had seen, policy.
    Explain {
        /// Its id, or the beginning of it.
        id: String,
    },
}

fn conflict_types() -> PossibleValuesParser {
    PossibleValuesParser::new(ConflictType::ALL.iter().map(|kind| kind.as_str()))
}

fn review_statuses() -> PossibleValuesParser {
    PossibleValuesParser::new(ReviewStatus::ALL.map(ReviewStatus::as_str))
}

#[derive(Debug, Clone, Default, PartialEq, Eq, clap::Args)]
pub(crate) struct Filters {
    /// Detected at or after: RFC 3339, a date, or a time back such as `2h` or "3 days ago".
    #[arg(long, value_name = "TIME")]
    pub(crate) since: Option<String>,
    /// Detected before.
    #[arg(long, value_name = "TIME")]
    pub(crate) until: Option<String>,
    /// `schema.table`, or a table in any schema.
    #[arg(long)]
    pub(crate) table: Option<String>,
    /// Such as `update_origin_differs`.
    #[arg(long = "type", value_name = "TYPE", hide_possible_values = true, value_parser = conflict_types())]
    pub(crate) kind: Option<String>,
    /// Key of the row: JSON such as '{"id": 7}', or `id=7` (several with commas).
    #[arg(long)]
    pub(crate) key: Option<String>,
    /// Name or id of the node that made either side.
    #[arg(long)]
    pub(crate) node: Option<String>,
    /// Name or id of the node whose write won.
    #[arg(long, value_name = "NODE")]
    pub(crate) winner: Option<String>,
    /// What became of it.
    #[arg(long, value_parser = review_statuses())]
    pub(crate) status: Option<String>,
    /// What one losing transaction lost, by its stamp.
    #[arg(long, value_name = "STAMP")]
    pub(crate) group: Option<String>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct List {
    #[command(flatten)]
    pub(crate) filters: Filters,
    /// At most so many; it is said when there are more, and how to see them.
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) limit: u32,
    /// The logs of all nodes, joined; asks the running daemon. A node that is away is named.
    #[arg(long)]
    pub(crate) all_nodes: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Tail {
    #[command(flatten)]
    pub(crate) filters: Filters,
    /// Go on with new ones as they are logged, until interrupted.
    #[arg(long, short)]
    pub(crate) follow: bool,
    /// How many to begin with.
    #[arg(long, short = 'n', default_value_t = 10)]
    pub(crate) lines: u32,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Export {
    #[command(flatten)]
    pub(crate) filters: Filters,
    /// Format of the export. Default: ndjson, or json with `--output json`.
    #[arg(long, value_enum)]
    pub(crate) format: Option<ExportFormat>,
    /// Write here instead of standard output.
    #[arg(long, value_name = "FILE")]
    pub(crate) file: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum ExportFormat {
    Csv,
    Json,
    Ndjson,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Mark {
    /// Ids, or the beginnings of them.
    #[arg(required_unless_present = "all")]
    pub(crate) ids: Vec<String>,
    /// Instead of ids: every new one that passes the filters.
    #[arg(long, conflicts_with = "ids")]
    pub(crate) all: bool,
    #[command(flatten)]
    pub(crate) filters: Filters,
    #[command(flatten)]
    pub(crate) reviewer: Reviewer,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Replay {
    /// Its id, or the beginning of it.
    pub(crate) id: String,
    /// Also when the row changed since, a column is merged of what several wrote, or the line was replayed before.
    #[arg(long)]
    pub(crate) force: bool,
    /// Only these columns, with commas; else all that were lost.
    #[arg(long, value_delimiter = ',', value_name = "COLUMNS")]
    pub(crate) columns: Option<Vec<String>>,
    #[command(flatten)]
    pub(crate) reviewer: Reviewer,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Reviewer {
    /// Who reviewed it. Default: $USER.
    #[arg(long, env = "USER", default_value = "unknown", hide_env_values = true)]
    pub(crate) by: String,
    /// A remark for the log.
    #[arg(long)]
    pub(crate) note: Option<String>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Grants {
    /// The role. Default: the user of postgres.dsn.
    #[arg(long, value_name = "NAME")]
    pub(crate) role: Option<String>,
    /// For this version of the server; with --connect the server says itself.
    #[arg(long, value_name = "MAJOR", value_parser = clap::value_parser!(i32).range(15..=18))]
    pub(crate) pg_version: Option<i32>,
    /// Ask the server which tables the patterns choose, and name each.
    #[arg(long)]
    pub(crate) connect: bool,
    #[command(flatten)]
    pub(crate) admin: Admin,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Remove {
    #[command(flatten)]
    pub(crate) admin: Admin,
    /// Do not ask.
    #[arg(long, short)]
    pub(crate) yes: bool,
    /// Leave the daemon's folder (journal and checkpoint) alone.
    #[arg(long)]
    pub(crate) keep_data_dir: bool,
    /// Although the node has not left its cluster: it was dropped, or this is only a copy of it. What it has not sent is lost.
    #[arg(long)]
    pub(crate) without_leaving: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Node {
    /// Take a member that is lost for good out of the cluster. To be run at one of the others.
    ///
    /// The others bring each other to the furthest position that one of them holds of it, and close its stream there.
    Drop {
        /// Its name, or its id.
        node: String,
    },
}

#[derive(Debug, clap::Args)]
pub(crate) struct Leave {
    #[command(flatten)]
    pub(crate) admin: Admin,
    /// End the sessions that began before the database became read only, instead of waiting for them.
    #[arg(long)]
    pub(crate) end_sessions: bool,
    /// Stay after all: possible until everything is drained and the node has said goodbye.
    #[arg(long, conflicts_with = "end_sessions")]
    pub(crate) cancel: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Ddl {
    /// One or more DDL statements, all in one transaction.
    #[arg(value_name = "SQL")]
    pub(crate) statement: Option<String>,
    /// Run it as this role, one of ddl.roles. Default: the only one.
    #[arg(long, value_name = "NAME", requires = "statement")]
    pub(crate) role: Option<String>,
    /// Where names without a schema are looked for.
    #[arg(long, value_name = "LIST", default_value = "public")]
    pub(crate) search_path: String,
    /// Give up here when a lock is not granted for so long (0: never); who wants the table queues behind it meanwhile.
    #[arg(long, value_name = "SECONDS", default_value_t = 5)]
    pub(crate) lock_timeout: u32,
    /// The statement of this id waits at this node, and what it does was brought about by hand: go on behind it.
    #[arg(long, value_name = "ID", conflicts_with = "statement")]
    pub(crate) done: Option<String>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Sequences {
    /// Print the SQL that `apply` would run at this node, with reasons; change nothing.
    Plan(SequenceChoice),
    /// Give this node its own share of the sequences of replicated tables: INCREMENT BY, and values above all known ones.
    ///
    /// To be run at every node. Can be repeated; one transaction.
    Apply(SequenceChoice),
    /// Each sequence, and whether its values can collide with another node's. Exit code 1 when one can.
    Status(Admin),
}

#[derive(Debug, Subcommand)]
pub(crate) enum Tables {
    /// Every table of the database: replicated or not, and why; what decides its conflicts; what stands in the way.
    List(Admin),
    /// Replicate tables that have rows: to be run at the node that has them, while everybody writes.
    ///
    /// The configuration of every node must choose them, and `anabranch init` be run at the others. Interrupted, it goes on where it
    /// was when it is run again. Exit codes as of `verify`: 0 equal everywhere, 1 different or refused, 2 could not tell.
    Add(TablesAdd),
    /// Replicate tables no more at this node; their rows stay, here and everywhere.
    ///
    /// The configuration must not choose them any more.
    Remove(TablesRemove),
}

#[derive(Debug, clap::Args)]
pub(crate) struct TablesAdd {
    /// `schema.table`, with `*` for anything in either part, or a table in any schema.
    #[arg(value_name = "TABLE", required = true)]
    pub(crate) tables: Vec<String>,
    #[command(flatten)]
    pub(crate) admin: Admin,
    /// Rows that each node reads, or gets, in a second at most; 0: no limit.
    #[arg(long, default_value_t = 100_000, value_name = "ROWS")]
    pub(crate) rate: u64,
    /// Leave the last comparison of a table once so many different rows of it are found.
    #[arg(long, default_value_t = 1_000, value_name = "ROWS", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub(crate) limit: u32,
    /// Seconds for which rows that are written all the time are looked at again.
    #[arg(long, default_value_t = 30, value_name = "SECONDS")]
    pub(crate) patience: u32,
    /// How long to wait for members that do not answer: all of them are needed.
    #[arg(long, default_value_t = 600, value_name = "SECONDS")]
    pub(crate) wait: u32,
    /// Only check, at this node and the others; change nothing.
    #[arg(long)]
    pub(crate) dry_run: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct TablesRemove {
    /// `schema.table`, with `*` for anything in either part, or a table in any schema.
    #[arg(value_name = "TABLE", required = true)]
    pub(crate) tables: Vec<String>,
    #[command(flatten)]
    pub(crate) admin: Admin,
    /// Print the exact SQL, change nothing.
    #[arg(long)]
    pub(crate) dry_run: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct SequenceChoice {
    #[command(flatten)]
    pub(crate) admin: Admin,
    /// Also this one, which no column of a replicated table uses, as schema.name; can be repeated.
    #[arg(long = "sequence", value_name = "NAME")]
    pub(crate) more: Vec<String>,
    /// Leave this one as it is; can be repeated.
    #[arg(long, value_name = "NAME")]
    pub(crate) skip: Vec<String>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Join {
    /// The member to copy from: the name of one of `peers` in the configuration.
    #[arg(long, value_name = "NODE")]
    pub(crate) from: String,
    /// Connection string of that member's database, as a role that may read all its tables.
    #[arg(long, env = "ANABRANCH_FROM_DSN", hide_env_values = true, value_name = "DSN")]
    pub(crate) from_dsn: String,
    #[command(flatten)]
    pub(crate) admin: Admin,
    /// Folder of pg_dump. Default: the newest that is found.
    #[arg(long, value_name = "DIR")]
    pub(crate) pg_bin: Option<PathBuf>,
    /// Connections that copy and build indexes at once.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub(crate) jobs: u16,
    /// A table of twice this size or more is copied in pieces of it, several at once. A join that goes on keeps those it began with.
    #[arg(long, default_value_t = 128, value_name = "MIB", value_parser = clap::value_parser!(u32).range(1..=1_048_576))]
    pub(crate) piece: u32,
    /// How long to wait for that member while its daemon or its server does not answer.
    #[arg(long, default_value_t = 600, value_name = "SECONDS")]
    pub(crate) wait: u32,
    /// Only check; change nothing.
    #[arg(long, conflicts_with = "abandon")]
    pub(crate) dry_run: bool,
    /// Give an unfinished join up: nothing of it stays here, and the members forget the node.
    #[arg(long)]
    pub(crate) abandon: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Demo {
    /// Folder of PostgreSQL's programs. Default: the newest of 15 to 18 that is found.
    #[arg(long, value_name = "DIR")]
    pub(crate) pg_bin: Option<PathBuf>,
    /// Leave servers' files and logs behind.
    #[arg(long)]
    pub(crate) keep: bool,
    /// Clean up and exit when everything was shown, instead of waiting for Ctrl-C.
    #[arg(long)]
    pub(crate) non_interactive: bool,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
    }
}
