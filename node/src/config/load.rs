//! From a file and the environment to a [`Config`], gathering every fault on the way.
//!
//! The known keys and their types are those of [`Config::example`], so a new field needs no list kept beside it.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use toml::{Table, Value};

use super::{Config, Method, check};

/// Environment variables `ANABRANCH_SECTION__KEY` set `section.key`.
const PREFIX: &str = "ANABRANCH_";
/// Keys without a default, per section; `peers` stands for each of its tables.
const REQUIRED: &[(&str, &[&str])] = &[
    ("node", &["name", "id", "data_dir"]),
    ("cluster", &["id"]),
    ("postgres", &["dsn"]),
    ("listen", &["address"]),
];
/// The same of sections that need not be there.
const REQUIRED_WHERE_THERE: &[(&str, &[&str])] = &[
    ("tls", &["ca", "cert", "key"]),
    ("web", &["listen"]),
    ("metrics", &["listen"]),
];
const REQUIRED_WEB_TLS: &[&str] = &["cert", "key"];
const REQUIRED_PEER: &[&str] = &["name", "id", "address"];
const REQUIRED_RULE: &[&str] = &["column", "method"];
/// Numbers of 32 bits.
const SMALL: &[&str] = &[
    "conflict_log.retention_days",
    "conflict_log.lines_per_second",
    "conflict_log.burst_lines",
    "sequences.increment",
];

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// The key, such as `peers[0].address`.
    pub key: String,
    /// What is wrong and what would be right.
    pub text: String,
}

impl Fault {
    pub(super) fn new(key: impl Into<String>, text: impl Into<String>) -> Self {
        Self {
            key: key.into(),
            text: text.into(),
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.key, self.text)
    }
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The file.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Not TOML.
    #[error("{} is not TOML: {reason}", path.display())]
    Syntax {
        /// Which file.
        path: PathBuf,
        /// Where and why.
        reason: String,
    },
    /// Everything that is wrong.
    #[error("{} fault(s) in {}:{}", faults.len(), path.display(), list(faults))]
    Faults {
        /// Which file.
        path: PathBuf,
        /// What.
        faults: Vec<Fault>,
    },
}

fn list(faults: &[Fault]) -> String {
    faults.iter().map(|fault| format!("\n  {fault}")).collect()
}

/// Reads the file at `path` with the environment on top.
///
/// # Errors
/// When the file cannot be read or is not TOML; else all faults at once.
pub fn load(path: &Path) -> Result<Config, ConfigError> {
    let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
        path: path.to_owned(),
        source,
    })?;
    let variables = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .collect::<Vec<_>>();
    from_toml(path, &text, &variables)
}

/// Reads `text` with `variables` on top; `path` is for messages.
///
/// # Errors
/// As [`load`].
pub fn from_toml(path: &Path, text: &str, variables: &[(String, String)]) -> Result<Config, ConfigError> {
    // The library's message quotes the offending line, which may hold a password; line and column are enough.
    let mut table: Table = text
        .parse()
        .map_err(|error: toml::de::Error| ConfigError::Syntax {
            path: path.to_owned(),
            reason: syntax_reason(text, &error),
        })?;
    let mut faults = Vec::new();
    let known = known_keys();
    overlay(&mut table, variables, &known, &mut faults);
    prune(&mut table, &known, "", &mut faults);
    complete(&mut table, &known, &mut faults);
    match Config::deserialize(Value::Table(table)) {
        Ok(mut config) => {
            if let Some(folder) = path.parent() {
                settle_paths(&mut config, folder);
                let is_of_file = !variables.iter().any(|(name, _)| is_dsn(name));
                config.postgres.dsn_folder = is_of_file.then(|| folder.to_owned());
            }
            let named: Vec<String> = faults.iter().map(|fault| fault.key.clone()).collect();
            // A key that was mended with the example's value, to get this far, has had its say.
            faults.extend(
                check::faults(&config)
                    .into_iter()
                    .filter(|fault| !named.contains(&fault.key)),
            );
            if faults.is_empty() {
                Ok(config)
            } else {
                Err(ConfigError::Faults {
                    path: path.to_owned(),
                    faults,
                })
            }
        }
        Err(error) => {
            faults.push(Fault::new("configuration", error.message().to_owned()));
            Err(ConfigError::Faults {
                path: path.to_owned(),
                faults,
            })
        }
    }
}

/// Is this the variable that says `postgres.dsn`?
fn is_dsn(name: &str) -> bool {
    name.strip_prefix(PREFIX)
        .is_some_and(|path| path.eq_ignore_ascii_case("postgres__dsn"))
}

/// Files that are named relatively are beside the configuration, wherever the program is run.
fn settle_paths(config: &mut Config, folder: &Path) {
    let mut paths: Vec<&mut PathBuf> = Vec::new();
    paths.extend(config.cluster.policy.as_mut());
    paths.extend(config.postgres.password_file.as_mut());
    if let Some(tls) = &mut config.tls {
        paths.extend([&mut tls.ca, &mut tls.cert, &mut tls.key]);
    }
    if let Some(web) = &mut config.web {
        paths.extend(web.token_file.as_mut());
        if let Some(tls) = &mut web.tls {
            paths.extend([&mut tls.cert, &mut tls.key]);
            paths.extend(tls.client_ca.as_mut());
        }
    }
    for path in paths {
        // An absolute path stays what it is.
        *path = folder.join(&*path);
    }
}

fn syntax_reason(text: &str, error: &toml::de::Error) -> String {
    let line = error.span().map_or(1, |span| {
        text.get(..span.start).unwrap_or("").lines().count().max(1)
    });
    format!("line {line}: {}", error.message())
}

fn known_keys() -> Table {
    match Value::try_from(Config::example()) {
        Ok(Value::Table(table)) => table,
        _ => Table::new(),
    }
}

/// Lays `ANABRANCH_A__B=value` over `a.b`; list entries are numbers: `ANABRANCH_PEERS__0__ADDRESS`.
fn overlay(table: &mut Table, variables: &[(String, String)], known: &Table, faults: &mut Vec<Fault>) {
    let mut sorted: Vec<_> = variables
        .iter()
        .filter(|(name, _)| name.starts_with(PREFIX))
        .collect();
    sorted.sort();
    for (name, text) in sorted {
        let Some(path) = name.strip_prefix(PREFIX).filter(|path| path.contains("__")) else {
            continue;
        };
        let parts: Vec<String> = path.split("__").map(str::to_ascii_lowercase).collect();
        if let Err(reason) = set(table, &parts, text, known) {
            faults.push(Fault::new(name.clone(), reason));
        }
    }
}

fn set(table: &mut Table, parts: &[String], text: &str, known: &Table) -> Result<(), String> {
    let [key, rest @ ..] = parts else {
        return Err("names no key".to_owned());
    };
    let Some(example) = known.get(key) else {
        return Err(unknown(key, known));
    };
    match (example, rest) {
        (Value::Table(known), [_, ..]) => match table
            .entry(key.clone())
            .or_insert_with(|| Value::Table(Table::new()))
        {
            Value::Table(inner) => set(inner, rest, text, known),
            _ => Err(format!("{key} is not a section in the file")),
        },
        (Value::Array(known), [index, rest @ ..]) => {
            let Some(Value::Table(known)) = known.first() else {
                return Err(format!("{key} has no keys below it"));
            };
            let index: usize = index
                .parse()
                .map_err(|_| format!("`{index}` is not the number of an entry"))?;
            match table
                .entry(key.clone())
                .or_insert_with(|| Value::Array(Vec::new()))
            {
                Value::Array(entries) if index <= entries.len() => {
                    if index == entries.len() {
                        entries.push(Value::Table(Table::new()));
                    }
                    match entries.get_mut(index) {
                        Some(Value::Table(inner)) => set(inner, rest, text, known),
                        _ => Err(format!("{key} is not a list of sections in the file")),
                    }
                }
                Value::Array(entries) => Err(format!("entry {index} comes after only {}", entries.len())),
                _ => Err(format!("{key} is not a list in the file")),
            }
        }
        (example, []) => {
            table.insert(key.clone(), read_as(example, text)?);
            Ok(())
        }
        _ => Err(format!("{key} has no keys below it")),
    }
}

fn read_as(example: &Value, text: &str) -> Result<Value, String> {
    Ok(match example {
        Value::String(_) => Value::String(text.to_owned()),
        Value::Integer(_) => Value::Integer(
            text.trim()
                .parse()
                .map_err(|_| "must be a whole number".to_owned())?,
        ),
        Value::Boolean(_) => Value::Boolean(
            text.trim()
                .parse()
                .map_err(|_| "must be true or false".to_owned())?,
        ),
        Value::Array(entries) if matches!(entries.first(), Some(Value::String(_))) => {
            let each = text.split(',').map(str::trim).filter(|entry| !entry.is_empty());
            Value::Array(each.map(|entry| Value::String(entry.to_owned())).collect())
        }
        _ => return Err("is a section; set its keys".to_owned()),
    })
}

/// Takes out keys that nobody knows and values of the wrong type, each with a fault.
fn prune(table: &mut Table, known: &Table, at: &str, faults: &mut Vec<Fault>) {
    let keys: Vec<String> = table.keys().cloned().collect();
    for key in keys {
        let path = if at.is_empty() {
            key.clone()
        } else {
            format!("{at}.{key}")
        };
        let Some(example) = known.get(&key) else {
            faults.push(Fault::new(path, unknown(&key, known)));
            table.remove(&key);
            continue;
        };
        let Some(value) = table.get_mut(&key) else {
            continue;
        };
        if let Some(wanted) = wrong_type(value, example) {
            faults.push(Fault::new(path, format!("must be {wanted}")));
            table.remove(&key);
            continue;
        }
        match (value, example) {
            (Value::Table(inner), Value::Table(known)) => prune(inner, known, &path, faults),
            (Value::Array(entries), Value::Array(examples)) => {
                for (index, entry) in entries.iter_mut().enumerate() {
                    if let (Value::Table(inner), Some(Value::Table(known))) = (entry, examples.first()) {
                        prune(inner, known, &format!("{path}[{index}]"), faults);
                    }
                }
            }
            (value, _) => {
                if let Some(reason) = wrong_value(&path, value) {
                    faults.push(Fault::new(path, reason));
                    table.remove(&key);
                }
            }
        }
    }
}

fn unknown(key: &str, known: &Table) -> String {
    let nearest = known
        .keys()
        .map(|candidate| (distance(key, candidate), candidate))
        .min()
        .filter(|(distance, candidate)| *distance <= candidate.len().max(key.len()) / 2);
    match nearest {
        Some((_, candidate)) => format!("`{key}` is not a known key; did you mean `{candidate}`?"),
        None => {
            let all: Vec<&str> = known.keys().map(String::as_str).collect();
            format!("`{key}` is not a known key; known are {}", all.join(", "))
        }
    }
}

fn wrong_type(value: &Value, example: &Value) -> Option<&'static str> {
    match (example, value) {
        (Value::String(_), Value::String(_))
        | (Value::Integer(_), Value::Integer(_))
        | (Value::Boolean(_), Value::Boolean(_))
        | (Value::Table(_), Value::Table(_)) => None,
        (Value::Array(examples), Value::Array(entries)) => {
            let fits = |entry: &Value| examples.first().is_none_or(|example| entry.same_type(example));
            if entries.iter().all(fits) {
                return None;
            }
            Some("a list whose entries all have the right type")
        }
        (Value::String(_), _) => Some("text in quotes"),
        (Value::Integer(_), _) => Some("a whole number"),
        (Value::Boolean(_), _) => Some("true or false"),
        (Value::Array(_), _) => Some("a list"),
        _ => Some("a section"),
    }
}

/// What serde would refuse, one value at a time so that it can be said of all of them.
fn wrong_value(path: &str, value: &Value) -> Option<String> {
    match value {
        Value::Integer(number)
            if path == "node.id" || (path.starts_with("peers[") && path.ends_with("].id")) =>
        {
            let fits = (1..=65_535).contains(number);
            (!fits).then(|| format!("{number} is not a node id; must be 1 to 65535"))
        }
        Value::Integer(number) if *number < 0 => Some(format!("{number} is negative")),
        Value::Integer(number) if SMALL.contains(&path) && *number > i64::from(u32::MAX) => {
            Some(format!("{number} is too large; at most {}", u32::MAX))
        }
        Value::String(text)
            if path == "sequences.method"
                || (path.starts_with("sequences.rule[") && path.ends_with("].method")) =>
        {
            Method::of(text)
                .is_none()
                .then(|| format!("`{text}` is no method; known are interleave, range and snowflake"))
        }
        Value::String(text) if path == "ddl.missing_columns" => {
            (text != "hold" && text != "drop").then(|| format!("`{text}` is neither hold nor drop"))
        }
        Value::String(text) if matches!(path, "listen.address" | "web.listen" | "metrics.listen") => {
            let such = match path {
                "listen.address" => "0.0.0.0:7432 or [::]:7432",
                "web.listen" => "127.0.0.1:7480 or [::1]:7480",
                _ => "127.0.0.1:9747 or [::1]:9747",
            };
            text.parse::<std::net::SocketAddr>()
                .is_err()
                .then(|| format!("`{text}` is not an address with a port, such as {such}"))
        }
        _ => None,
    }
}

/// Puts the example's value where a required key is missing, so that the rest can be checked too; says so.
fn complete(table: &mut Table, known: &Table, faults: &mut Vec<Fault>) {
    for (section, keys) in REQUIRED {
        let Some(Value::Table(example)) = known.get(*section) else {
            continue;
        };
        let inner = table
            .entry((*section).to_owned())
            .or_insert_with(|| Value::Table(Table::new()));
        if let Value::Table(inner) = inner {
            require(inner, keys, example, section, faults);
        }
    }
    for (section, keys) in REQUIRED_WHERE_THERE {
        if let (Some(Value::Table(inner)), Some(Value::Table(example))) =
            (table.get_mut(*section), known.get(*section))
        {
            require(inner, keys, example, section, faults);
        }
    }
    if let (Some(Value::Table(web)), Some(Value::Table(known))) = (table.get_mut("web"), known.get("web"))
        && let (Some(Value::Table(inner)), Some(Value::Table(example))) =
            (web.get_mut("tls"), known.get("tls"))
    {
        require(inner, REQUIRED_WEB_TLS, example, "web.tls", faults);
    }
    require_each(table, "peers", REQUIRED_PEER, known, "peers", faults);
    if let (Some(Value::Table(inner)), Some(Value::Table(known))) =
        (table.get_mut("sequences"), known.get("sequences"))
    {
        require_each(inner, "rule", REQUIRED_RULE, known, "sequences.rule", faults);
    }
}

/// As [`require`], in every table of the list `name`.
fn require_each(
    table: &mut Table,
    name: &str,
    keys: &[&str],
    known: &Table,
    at: &str,
    faults: &mut Vec<Fault>,
) {
    let example = known
        .get(name)
        .and_then(Value::as_array)
        .and_then(|entries| entries.first());
    if let (Some(Value::Array(entries)), Some(Value::Table(example))) = (table.get_mut(name), example) {
        for (index, entry) in entries.iter_mut().enumerate() {
            if let Value::Table(inner) = entry {
                require(inner, keys, example, &format!("{at}[{index}]"), faults);
            }
        }
    }
}

fn require(table: &mut Table, keys: &[&str], example: &Table, at: &str, faults: &mut Vec<Fault>) {
    for key in keys {
        if table.contains_key(*key) {
            continue;
        }
        let path = format!("{at}.{key}");
        if !faults.iter().any(|fault| fault.key == path) {
            faults.push(Fault::new(path, "is missing"));
        }
        if let Some(value) = example.get(*key) {
            table.insert((*key).to_owned(), value.clone());
        }
    }
}

/// Levenshtein distance.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = i;
        let mut left = i + 1;
        for (cell, y) in row.iter_mut().skip(1).zip(&b) {
            let up = *cell;
            let value = (diagonal + usize::from(x != *y)).min(up + 1).min(left + 1);
            diagonal = up;
            left = value;
            *cell = value;
        }
        if let Some(first) = row.first_mut() {
            *first = i + 1;
        }
    }
    row.last().copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
        [node]
        name = "a"
        id = 1
        data_dir = "/tmp/a"
        [cluster]
        id = "c"
        [postgres]
        dsn = "host=/tmp user=u dbname=d password=hunter2"
        [listen]
        address = "127.0.0.1:7432"
        [[peers]]
        name = "b"
        id = 2
        address = "127.0.0.1:7433"
    "#;

    fn read(text: &str, variables: &[(&str, &str)]) -> Result<Config, ConfigError> {
        let variables: Vec<_> = variables
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect();
        from_toml(Path::new("test.toml"), text, &variables)
    }

    fn faults(text: &str, variables: &[(&str, &str)]) -> Vec<String> {
        match read(text, variables) {
            Err(ConfigError::Faults { faults, .. }) => faults.iter().map(ToString::to_string).collect(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn files_are_beside_the_configuration_unless_they_are_elsewhere() {
        let text = GOOD.replace("[listen]", "password_file = \"pw\"\n[listen]")
            + "[tls]\nca = \"ca.pem\"\ncert = \"/etc/tls/a.pem\"\nkey = \"../a.key\"\n\
               [web]\nlisten = \"127.0.0.1:1\"\ntoken_file = \"token\"\n";
        let config = from_toml(Path::new("/etc/anabranch/anabranch.toml"), &text, &[]).unwrap();
        assert_eq!(
            config.postgres.password_file.as_deref(),
            Some(Path::new("/etc/anabranch/pw"))
        );
        let folder = |config: &Config| config.postgres.dsn_folder.clone();
        assert_eq!(folder(&config), Some(PathBuf::from("/etc/anabranch")));
        let variable = [(
            "ANABRANCH_POSTGRES__DSN".to_owned(),
            "host=/tmp user=v".to_owned(),
        )];
        let other = from_toml(Path::new("/etc/anabranch/anabranch.toml"), &text, &variable).unwrap();
        assert_eq!(folder(&other), None);
        let tls = config.tls.unwrap();
        assert_eq!(
            [tls.ca, tls.cert, tls.key],
            [
                "/etc/anabranch/ca.pem",
                "/etc/tls/a.pem",
                "/etc/anabranch/../a.key"
            ]
            .map(PathBuf::from)
        );
        let token = config.web.unwrap().token_file;
        assert_eq!(token.as_deref(), Some(Path::new("/etc/anabranch/token")));
    }

    #[test]
    fn the_example_names_every_key_and_reads_back() {
        let mut text = toml::to_string(&Config::example()).unwrap();
        text = text.replace("user=anabranch", "user=other");
        let config = read(&text, &[]).unwrap();
        assert!(config.postgres.dsn.ends_with("user=other"));
    }

    #[test]
    fn unknown_keys_are_refused_with_the_nearest_known_one() {
        let text = GOOD
            .replace("data_dir", "data_dri")
            .replace("[cluster]", "[clusters]");
        let found = faults(&text, &[]);
        assert!(
            found.contains(
                &"node.data_dri: `data_dri` is not a known key; did you mean `data_dir`?".to_owned()
            )
        );
        assert!(
            found.contains(&"clusters: `clusters` is not a known key; did you mean `cluster`?".to_owned())
        );
        assert!(
            found.contains(&"node.data_dir: is missing".to_owned()),
            "{found:?}"
        );
        assert!(found.contains(&"cluster.id: is missing".to_owned()));
        assert_eq!(found.len(), 4, "{found:?}");
    }

    #[test]
    fn what_is_wrong_in_sections_that_need_not_be_there_is_said_with_its_key() {
        let text = format!(
            "{GOOD}\n[web]\ntoken_file = \"/t\"\n[web.tls]\ncert = \"/c\"\n[metrics]\nlisten = \"localhost:9747\"\n\
             [ddl]\nmissing_columns = \"keep\"\n[conflict_log]\nretention_days = 5000000000\n"
        );
        let mut found = faults(&text, &[]);
        found.sort();
        assert_eq!(
            found,
            [
                "conflict_log.retention_days: 5000000000 is too large; at most 4294967295",
                "ddl.missing_columns: `keep` is neither hold nor drop",
                "metrics.listen: `localhost:9747` is not an address with a port, such as 127.0.0.1:9747 or [::1]:9747",
                "web.listen: is missing",
                "web.tls.key: is missing",
            ]
        );
    }

    #[test]
    fn a_page_that_others_could_read_or_that_asks_for_nothing_is_refused() {
        let with = |web: &str| format!("{GOOD}\n[web]\n{web}\n");
        let tls = "[web.tls]\ncert = \"/c\"\nkey = \"/k\"";
        let (inside, outside) = ("listen = \"127.0.0.1:7480\"", "listen = \"0.0.0.0:7480\"");
        let token = "token_file = \"/t\"";
        for (web, said) in [
            (
                format!("{outside}\n{token}"),
                "web.listen: 0.0.0.0:7480 is not loopback",
            ),
            (inside.to_owned(), "web.token_file: nothing says who may come in"),
            (
                format!("{outside}\n{tls}"),
                "web.token_file: nothing says who may come in",
            ),
        ] {
            let found = faults(&with(&web), &[]);
            assert!(found.len() == 1 && found[0].starts_with(said), "{found:?}");
        }
        for web in [
            format!("{inside}\n{token}"),
            format!("{outside}\n{token}\ninsecure = true"),
            format!("{outside}\n{tls}\nclient_ca = \"/a\""),
        ] {
            assert!(read(&with(&web), &[]).unwrap().web.is_some(), "{web}");
        }
        assert!(read(GOOD, &[]).unwrap().web.is_none());
    }

    #[test]
    fn everything_wrong_is_said_at_once() {
        let text = GOOD
            .replace("id = 2", "id = 1")
            .replace("127.0.0.1:7433", "nowhere")
            .replace("127.0.0.1:7432", "localhost")
            .replace("dsn = \"host", "dsn = \"hots");
        let found = faults(&text, &[("ANABRANCH_APPLY__BATCH_ROWS_MAX", "many")]).join("\n");
        for key in [
            "listen.address",
            "peers[0].id",
            "peers[0].address",
            "postgres.dsn",
            "ANABRANCH_APPLY__BATCH_ROWS_MAX",
        ] {
            assert!(found.contains(key), "{key} in {found}");
        }
        assert!(!found.contains("hunter2"));
    }

    #[test]
    fn the_environment_wins_over_the_file() {
        let config = read(
            GOOD,
            &[
                ("ANABRANCH_NODE__NAME", "z"),
                ("ANABRANCH_POSTGRES__TABLES", "public.a, !public.b"),
                ("ANABRANCH_PEERS__0__ADDRESS", "127.0.0.1:1"),
                ("ANABRANCH_PEERS__1__NAME", "c"),
                ("ANABRANCH_PEERS__1__ID", "3"),
                ("ANABRANCH_PEERS__1__ADDRESS", "127.0.0.1:2"),
                ("ANABRANCH_LISTEN__INSECURE", "true"),
                ("ANABRANCH_CONFIG", "ignored"),
            ],
        )
        .unwrap();
        assert_eq!(config.node.name, "z");
        assert_eq!(config.postgres.tables, ["public.a", "!public.b"]);
        assert_eq!(config.peers[0].address, "127.0.0.1:1");
        assert_eq!(config.peers[1].id.0, 3);
        assert!(config.listen.insecure);
        let found = faults(GOOD, &[("ANABRANCH_NODE__NAEM", "z")]);
        assert!(found[0].contains("did you mean `name`?"), "{found:?}");
    }

    #[test]
    fn a_folder_whose_socket_nobody_could_reach_is_refused() {
        let of = |len: usize| GOOD.replace("/tmp/a", &format!("/{}", "x".repeat(len - 1)));
        assert!(read(&of(96), &[]).is_ok());
        let found = faults(&of(97), &[]);
        assert_eq!(
            found,
            ["node.data_dir: must have 96 bytes at most, since a socket is in it"]
        );
    }

    #[test]
    fn plaintext_beyond_loopback_must_be_asked_for() {
        let text = GOOD.replace("127.0.0.1:7432", "0.0.0.0:7432");
        assert!(faults(&text, &[])[0].contains("listen.insecure = true"));
        assert!(read(&text, &[("ANABRANCH_LISTEN__INSECURE", "true")]).is_ok());
    }

    #[test]
    fn passwords_are_in_no_printed_form() {
        let config = read(GOOD, &[]).unwrap();
        for shown in [
            format!("{config:?}"),
            toml::to_string(&config).unwrap(),
            serde_json::to_string(&config).unwrap(),
        ] {
            assert!(!shown.contains("hunter2"), "{shown}");
            assert!(shown.contains("***"));
        }
        let broken = GOOD.replace("dbname=d password=hunter2\"", "dbname=d password=hunter2");
        assert!(!read(&broken, &[]).unwrap_err().to_string().contains("hunter2"));
    }
}
