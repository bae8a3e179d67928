//! Reads a libpq connection string, in either form, with the TLS parameters that `tokio_postgres` leaves out.
//!
//! Understood beyond `tokio_postgres::Config`: `sslmode=allow|verify-ca|verify-full`, `sslrootcert`,
//! `sslcert`, `sslkey`, `passfile`, `target_session_attrs=primary`. Several hosts are those that one server may be at.

use std::env;
use std::fmt;
use std::io::{self, BufRead, BufReader};
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustls::ClientConfig;
use tokio_postgres::config::{Config, Host, SslMode, TargetSessionAttrs};
use tracing::warn;

use super::primary::{Pin, ServerId};
use super::tls::{self, Files, Verify};
use super::{Error, PINNED_OPTIONS};

const DEFAULT_PORT: u16 = 5432;
const DEFAULT_SOCKET_FOLDERS: [&str; 2] = ["/var/run/postgresql", "/tmp"];
const DEFAULT_CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// A connection string, complete: where, as whom, with which password, settings and TLS.
#[derive(Clone)]
pub struct Dsn {
    config: Config,
    /// The same for each host alone, with that host's password.
    each: Vec<Config>,
    tls: Arc<ClientConfig>,
    /// Only a server that takes writes will do.
    wants_primary: bool,
    /// Only this very one will do.
    server: Option<ServerId>,
    /// A password file of libpq that may have the password that is lacking: it is ignored.
    unread: Option<PathBuf>,
}

impl fmt::Debug for Dsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // `Config` hides the password itself.
        f.debug_tuple("Dsn").field(&self.config).finish()
    }
}

impl Dsn {
    /// Reads `text`, a libpq keyword/value string or URL. The password is the first found of: `text`, the
    /// first line of `password_file`, `ANABRANCH_POSTGRES_PASSWORD`, `PGPASSWORD`, the password file of libpq
    /// (`passfile`, `PGPASSFILE` or `~/.pgpass`).
    ///
    /// # Errors
    /// When `text` is not a connection string or a file that it names cannot be read.
    pub fn new(text: &str, password_file: Option<&Path>) -> Result<Self, Error> {
        Self::beside(text, password_file, None)
    }

    /// The same, where files that `text` names relatively are in `folder`; in the current one without.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn beside(text: &str, password_file: Option<&Path>, folder: Option<&Path>) -> Result<Self, Error> {
        let (text, mut extra) = take_extra(text)?;
        if let Some(folder) = folder {
            extra.settle_paths(folder);
        }
        let mut config: Config = text.parse().map_err(Error::Dsn)?;
        complete(&mut config)?;
        // In milliseconds, as libpq reads it; `tokio_postgres` takes the number for seconds.
        if let Some(&patience) = config.get_tcp_user_timeout() {
            config.tcp_user_timeout(Duration::from_millis(patience.as_secs()));
        }
        if let Some(mode) = extra.ssl_mode {
            config.ssl_mode(mode);
        }
        let wants_primary =
            extra.wants_primary || config.get_target_session_attrs() == TargetSessionAttrs::ReadWrite;
        // Asked by `primary`: what `tokio_postgres` looks at, `transaction_read_only`, a database that joins or leaves has, too.
        config.target_session_attrs(TargetSessionAttrs::Any);
        let verify = match extra.verify {
            // As libpq: require with a root certificate means verify-ca.
            Verify::Nothing if extra.files.root.is_some() && config.get_ssl_mode() == SslMode::Require => {
                Verify::Authority
            }
            verify => verify,
        };
        let (mut each, mut unread) = (Vec::new(), None);
        for at in 0..config.get_hosts().len() {
            let mut host = of_host(&config, at);
            if host.get_password().is_none() {
                match find_password(&host, password_file, extra.passfile.as_deref())? {
                    Found::Password(password) => {
                        host.password(password);
                    }
                    Found::Unread(file) => unread = Some(file),
                    Found::Nothing => {}
                }
            }
            each.push(host);
        }
        let tls = Arc::new(tls::client_config(verify, &extra.files)?);
        Ok(Self {
            // For one host, complete; for several, what they have in common.
            config: match each.as_slice() {
                [only] => only.clone(),
                _ => config,
            },
            each,
            tls,
            wants_primary,
            server: None,
            unread,
        })
    }

    /// How many hosts it names.
    pub(crate) fn count(&self) -> usize {
        self.each.len()
    }

    /// Can it lead to more than one server? A name can have several addresses, and another one from one day to the next.
    pub(crate) fn may_be_several(&self) -> bool {
        let is_name = |config: &Config| match (config.get_hosts(), config.get_hostaddrs()) {
            ([Host::Tcp(name)], []) => name.parse::<IpAddr>().is_err(),
            _ => false,
        };
        self.each.len() > 1 || self.each.iter().any(is_name)
    }

    /// Is there anything to choose, or to find out, before a connection may be made?
    pub(super) const fn is_settled(&self) -> bool {
        self.server.is_some() || self.each.len() == 1 && !self.wants_primary
    }

    /// The server that every connection must reach, if that is known.
    pub(crate) const fn server(&self) -> Option<ServerId> {
        self.server
    }

    /// Host number `at` alone, at this address of it if its name has several.
    pub(super) fn only(&self, at: usize, address: Option<IpAddr>) -> Option<Self> {
        let mut config = self.each.get(at)?.clone();
        if let Some(address) = address.filter(|_| config.get_hostaddrs().is_empty()) {
            config.hostaddr(address);
        }
        Some(Self {
            each: vec![config.clone()],
            config,
            tls: Arc::clone(&self.tls),
            wants_primary: false,
            server: None,
            unread: self.unread.clone(),
        })
    }

    /// The server that was chosen, and no other.
    pub(crate) fn pinned(&self, pin: &Pin) -> Option<Self> {
        let mut only = self.only(pin.at, pin.address)?;
        only.server = Some(pin.id);
        Some(only)
    }

    /// The password file that is ignored, since others may read it, where no password was found.
    pub(crate) fn unread(&self) -> Option<&Path> {
        self.unread.as_deref()
    }

    /// Everything that `tokio_postgres` knows of.
    #[must_use]
    pub const fn config(&self) -> &Config {
        &self.config
    }

    /// How to do TLS where `config().get_ssl_mode()` wants it.
    #[must_use]
    pub const fn tls(&self) -> &Arc<ClientConfig> {
        &self.tls
    }

    /// The hosts and ports, in order, for messages.
    #[must_use]
    pub fn hosts(&self) -> String {
        let hosts = self.config.get_hosts().iter().enumerate();
        let shown = hosts.map(|(at, host)| {
            let port = port(&self.config, at);
            match host {
                Host::Tcp(name) => format!("{name}:{port}"),
                Host::Unix(folder) => format!("{}:{port}", folder.display()),
            }
        });
        shown.collect::<Vec<_>>().join(", ")
    }

    /// The port of host number `at`.
    #[must_use]
    pub fn port(&self, at: usize) -> u16 {
        port(&self.config, at)
    }
}

fn port(config: &Config, at: usize) -> u16 {
    let ports = config.get_ports();
    ports
        .get(at)
        .or_else(|| ports.first())
        .copied()
        .unwrap_or(DEFAULT_PORT)
}

/// The same, of host number `at` alone.
fn of_host(config: &Config, at: usize) -> Config {
    let mut only = Config::new();
    match config.get_hosts().get(at) {
        Some(Host::Tcp(name)) => drop(only.host(name)),
        Some(Host::Unix(folder)) => drop(only.host_path(folder)),
        None => {}
    }
    if let Some(address) = config.get_hostaddrs().get(at) {
        only.hostaddr(*address);
    }
    only.port(port(config, at));
    if let Some(user) = config.get_user() {
        only.user(user);
    }
    if let Some(name) = config.get_dbname() {
        only.dbname(name);
    }
    if let Some(options) = config.get_options() {
        only.options(options);
    }
    if let Some(name) = config.get_application_name() {
        only.application_name(name);
    }
    if let Some(password) = config.get_password() {
        only.password(password);
    }
    only.ssl_mode(match config.get_hosts().get(at) {
        // As libpq: TLS is of no use on a Unix socket, whatever sslmode says.
        Some(Host::Unix(_)) => SslMode::Disable,
        _ => config.get_ssl_mode(),
    });
    only.ssl_negotiation(config.get_ssl_negotiation());
    if let Some(timeout) = config.get_connect_timeout() {
        only.connect_timeout(*timeout);
    }
    if let Some(timeout) = config.get_tcp_user_timeout() {
        only.tcp_user_timeout(*timeout);
    }
    only.keepalives(config.get_keepalives());
    only.keepalives_idle(config.get_keepalives_idle());
    if let Some(interval) = config.get_keepalives_interval() {
        only.keepalives_interval(interval);
    }
    if let Some(retries) = config.get_keepalives_retries() {
        only.keepalives_retries(retries);
    }
    only.channel_binding(config.get_channel_binding());
    only.target_session_attrs(TargetSessionAttrs::Any);
    only
}

/// As many as there are hosts, or one for all.
fn check_count(parameter: &'static str, count: usize, hosts: usize, of_all: usize) -> Result<(), Error> {
    if count == hosts || count <= of_all {
        return Ok(());
    }
    Err(Error::Parameter {
        parameter,
        value: format!("({count} of them for {hosts} hosts)"),
        remedy: "give one for each host",
    })
}

/// Fills in what libpq would take from its defaults, and the pinned settings.
fn complete(config: &mut Config) -> Result<(), Error> {
    if config.get_hosts().is_empty() {
        // A name is needed for TLS and messages: the address serves as one.
        for addr in config.get_hostaddrs().to_vec() {
            config.host(addr.to_string());
        }
    }
    if config.get_hosts().is_empty() {
        let exists = |folder: &&str| Path::new(folder).is_dir();
        config.host(
            DEFAULT_SOCKET_FOLDERS
                .into_iter()
                .find(exists)
                .unwrap_or("localhost"),
        );
    }
    let hosts = config.get_hosts().len();
    check_count("port", config.get_ports().len(), hosts, 1)?;
    check_count("hostaddr", config.get_hostaddrs().len(), hosts, 0)?;
    if config.get_user().is_none() {
        let user = ["PGUSER", "USER", "LOGNAME"]
            .into_iter()
            .find_map(|name| env::var(name).ok());
        config.user(user.filter(|user| !user.is_empty()).ok_or(Error::NoUser)?);
    }
    if config.get_dbname().is_none() {
        let name = env::var("PGDATABASE")
            .ok()
            .or_else(|| config.get_user().map(str::to_owned));
        config.dbname(name.ok_or(Error::NoUser)?);
    }
    if config.get_connect_timeout().is_none() {
        config.connect_timeout(DEFAULT_CONNECT_TIMEOUT);
    }
    let options = match config.get_options() {
        // Later settings win, so ours come last.
        Some(options) => format!("{options} {PINNED_OPTIONS}"),
        None => PINNED_OPTIONS.to_owned(),
    };
    config.options(options);
    Ok(())
}

/// Parameters that `tokio_postgres` does not know.
struct Extra {
    ssl_mode: Option<SslMode>,
    verify: Verify,
    files: Files,
    passfile: Option<PathBuf>,
    wants_primary: bool,
}

impl Extra {
    /// Files that are named relatively are in `folder`.
    fn settle_paths(&mut self, folder: &Path) {
        let files = &mut self.files;
        let all = [
            &mut files.root,
            &mut files.cert,
            &mut files.key,
            &mut self.passfile,
        ];
        for path in all.into_iter().flatten() {
            // An absolute path stays what it is.
            *path = folder.join(&*path);
        }
    }

    /// Takes the parameter if it is one of ours. `None`: it is not.
    fn take(&mut self, key: &str, value: &str) -> Option<Result<(), Error>> {
        match key {
            "sslmode" => match value {
                "allow" => self.ssl_mode = Some(SslMode::Prefer),
                "verify-ca" => (self.ssl_mode, self.verify) = (Some(SslMode::Require), Verify::Authority),
                "verify-full" => {
                    (self.ssl_mode, self.verify) = (Some(SslMode::Require), Verify::AuthorityAndName);
                }
                _ => return None,
            },
            "target_session_attrs" => match value {
                "primary" => self.wants_primary = true,
                "read-only" | "standby" | "prefer-standby" => {
                    return Some(Err(Error::Parameter {
                        parameter: "target_session_attrs",
                        value: value.to_owned(),
                        remedy: "the daemon needs the server that takes writes: write read-write",
                    }));
                }
                _ => return None,
            },
            "load_balance_hosts" if value != "disable" => {
                return Some(Err(Error::Parameter {
                    parameter: "load_balance_hosts",
                    value: value.to_owned(),
                    remedy: "leave it out: all connections go to one server, which is the one of the hosts that takes writes",
                }));
            }
            "sslrootcert" if value == "system" => {
                return Some(Err(Error::Parameter {
                    parameter: "sslrootcert",
                    value: value.to_owned(),
                    remedy: "name the system's PEM bundle, such as /etc/ssl/certs/ca-certificates.crt",
                }));
            }
            "sslrootcert" => self.files.root = Some(PathBuf::from(value)),
            "sslcert" => self.files.cert = Some(PathBuf::from(value)),
            "sslkey" => self.files.key = Some(PathBuf::from(value)),
            "passfile" => self.passfile = Some(PathBuf::from(value)),
            _ => return None,
        }
        Some(Ok(()))
    }
}

/// Splits the connection string into what `tokio_postgres` understands and the rest.
fn take_extra(text: &str) -> Result<(String, Extra), Error> {
    let mut extra = Extra {
        ssl_mode: None,
        verify: Verify::Nothing,
        files: Files::default(),
        passfile: None,
        wants_primary: false,
    };
    let is_url = ["postgres://", "postgresql://"]
        .iter()
        .any(|prefix| text.starts_with(prefix));
    let rest = if is_url {
        take_from_url(text, &mut extra)?
    } else {
        take_from_keywords(text, &mut extra)?
    };
    Ok((rest, extra))
}

fn take_from_url(text: &str, extra: &mut Extra) -> Result<String, Error> {
    // A question mark before the first at-sign belongs to the password, as in `tokio_postgres`.
    let after_user = text.find('@').unwrap_or(0);
    let Some(query_at) = text.get(after_user..).and_then(|tail| tail.find('?')) else {
        return Ok(text.to_owned());
    };
    let (base, query) = text.split_at(after_user + query_at);
    let mut kept = Vec::new();
    for pair in query
        .trim_start_matches('?')
        .split('&')
        .filter(|pair| !pair.is_empty())
    {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        match extra.take(key, &percent_decoded(value)) {
            Some(taken) => taken?,
            None => kept.push(pair),
        }
    }
    if kept.is_empty() {
        Ok(base.to_owned())
    } else {
        Ok(format!("{base}?{}", kept.join("&")))
    }
}

fn percent_decoded(text: &str) -> String {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.as_bytes();
    while let Some((&byte, rest)) = bytes.split_first() {
        let digit = |at: usize| rest.get(at).and_then(|&byte| char::from(byte).to_digit(16));
        let escaped = match (byte, digit(0), digit(1)) {
            (b'%', Some(high), Some(low)) => u8::try_from(high * 16 + low).ok(),
            _ => None,
        };
        out.push(escaped.unwrap_or(byte));
        bytes = match escaped {
            Some(_) => rest.get(2..).unwrap_or_default(),
            None => rest,
        };
    }
    String::from_utf8_lossy(&out).into_owned()
}

fn take_from_keywords(text: &str, extra: &mut Extra) -> Result<String, Error> {
    let mut kept = String::new();
    let mut rest = text.trim_start();
    while !rest.is_empty() {
        let Some((key, tail)) = rest.split_once('=') else {
            // Not a pair: `tokio_postgres` says what is wrong with it.
            kept.push_str(rest);
            break;
        };
        let (value, tail) = keyword_value(tail.trim_start());
        match extra.take(key.trim_end(), &value) {
            Some(taken) => taken?,
            None => {
                let quoted = value.replace('\\', "\\\\").replace('\'', "\\'");
                kept.push_str(&format!("{}='{quoted}' ", key.trim_end()));
            }
        }
        rest = tail.trim_start();
    }
    Ok(kept)
}

/// One value of the keyword form, unquoted, and what follows it.
fn keyword_value(text: &str) -> (String, &str) {
    let quoted = text.starts_with('\'');
    let mut value = String::new();
    let mut chars = text.char_indices().skip(usize::from(quoted));
    while let Some((at, c)) = chars.next() {
        match c {
            '\\' => value.extend(chars.next().map(|(_, escaped)| escaped)),
            '\'' if quoted => return (value, text.get(at + 1..).unwrap_or_default()),
            c if !quoted && c.is_whitespace() => return (value, text.get(at..).unwrap_or_default()),
            c => value.push(c),
        }
    }
    (value, "")
}

/// A password, or why there is none.
#[derive(PartialEq, Eq)]
enum Found {
    /// This.
    Password(String),
    /// It may be in this file, which is ignored, since others may read it.
    Unread(PathBuf),
    /// It is nowhere.
    Nothing,
}

fn find_password(
    config: &Config,
    password_file: Option<&Path>,
    passfile: Option<&Path>,
) -> Result<Found, Error> {
    if let Some(path) = password_file {
        let what = "postgres.password_file";
        let file = |source: io::Error| Error::File {
            what,
            path: path.to_owned(),
            source,
        };
        let mut line = String::new();
        BufReader::new(std::fs::File::open(path).map_err(file)?)
            .read_line(&mut line)
            .map_err(file)?;
        return Ok(Found::Password(line.trim_end_matches(['\r', '\n']).to_owned()));
    }
    for name in ["ANABRANCH_POSTGRES_PASSWORD", "PGPASSWORD"] {
        if let Ok(password) = env::var(name) {
            return Ok(Found::Password(password));
        }
    }
    let path = passfile
        .map(Path::to_owned)
        .or_else(|| env::var_os("PGPASSFILE").map(PathBuf::from))
        .or_else(|| env::var_os("HOME").map(|home| Path::new(&home).join(".pgpass")));
    Ok(path.map_or(Found::Nothing, |path| look_up(path, config)))
}

/// What libpq's password file says; as with libpq, nothing when it is missing or others may read it.
fn look_up(path: PathBuf, config: &Config) -> Found {
    // Every connection looks again.
    static IS_SAID: AtomicBool = AtomicBool::new(false);
    let metadata = match std::fs::metadata(&path) {
        Ok(metadata) if metadata.is_file() => metadata,
        // `/dev/null` is a way to say that there is none.
        _ => return Found::Nothing,
    };
    if metadata.permissions().mode() & 0o077 != 0 {
        if !IS_SAID.swap(true, Ordering::Relaxed) {
            warn!(path = %path.display(), "password file ignored: others may read it; chmod 600 it");
        }
        return Found::Unread(path);
    }
    let lines = std::fs::read_to_string(&path).unwrap_or_default();
    match_pgpass(&lines, config).map_or(Found::Nothing, Found::Password)
}

/// The password of the first line that fits the first host that any line fits.
fn match_pgpass(lines: &str, config: &Config) -> Option<String> {
    let (user, database) = (config.get_user()?, config.get_dbname()?);
    config.get_hosts().iter().enumerate().find_map(|(at, host)| {
        let port = port(config, at).to_string();
        let host = match host {
            Host::Tcp(name) => name.clone(),
            Host::Unix(folder)
                if DEFAULT_SOCKET_FOLDERS
                    .iter()
                    .any(|known| folder == Path::new(known)) =>
            {
                "localhost".to_owned()
            }
            Host::Unix(folder) => folder.display().to_string(),
        };
        let wanted = [host.as_str(), port.as_str(), database, user];
        lines
            .lines()
            .filter(|line| !line.starts_with('#'))
            .find_map(|line| {
                let mut fields = pgpass_fields(line).into_iter();
                let fits = wanted.iter().all(|wanted| {
                    fields
                        .next()
                        .is_some_and(|field| field == "*" || field == *wanted)
                });
                if fits { fields.next() } else { None }
            })
    })
}

/// `host:port:database:user:password`, with backslash before a literal colon or backslash.
fn pgpass_fields(line: &str) -> Vec<String> {
    let mut fields = vec![String::new()];
    let mut chars = line.chars();
    while let Some(c) = chars.next() {
        let literal = match c {
            ':' if fields.len() < 5 => {
                fields.push(String::new());
                continue;
            }
            '\\' => chars.next(),
            c => Some(c),
        };
        if let Some(field) = fields.last_mut() {
            field.extend(literal);
        }
    }
    fields
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_of_a_connection_string_mean_the_same() {
        let texts = [
            "host=db1,db2 port=5433 user=u dbname='my db' password='a b\\'c' sslmode=verify-full \
             sslrootcert='/nonexistent/r oot.crt'",
            "postgresql://u:a%20b'c@db1:5433,db2:5433/my%20db?sslrootcert=/nonexistent/r%20oot.crt&sslmode=verify-full",
        ];
        for text in texts {
            let (rest, extra) = take_extra(text).unwrap();
            let config: Config = rest.parse().unwrap();
            assert_eq!(config.get_password(), Some(&b"a b'c"[..]), "{rest}");
            assert_eq!(config.get_dbname(), Some("my db"));
            assert_eq!(config.get_hosts().len(), 2);
            assert_eq!(port(&config, 1), 5433);
            assert_eq!(extra.verify, Verify::AuthorityAndName);
            assert_eq!(extra.ssl_mode, Some(SslMode::Require));
            assert_eq!(
                extra.files.root.as_deref(),
                Some(Path::new("/nonexistent/r oot.crt"))
            );
            let error = Dsn::new(text, None).unwrap_err().to_string();
            assert!(error.contains("sslrootcert /nonexistent/r oot.crt"), "{error}");
        }
    }

    #[test]
    fn sessions_are_pinned_and_secrets_hidden() {
        let dsn = Dsn::new("host=h user=u password=hunter2 options='-c work_mem=1MB'", None).unwrap();
        let options = dsn.config().get_options().unwrap();
        assert!(
            options.starts_with("-c work_mem=1MB -c datestyle=ISO"),
            "{options}"
        );
        assert!(
            options.contains(&format!("-c search_path={} ", crate::pg::SEARCH_PATH)),
            "{options}"
        );
        assert_eq!(dsn.config().get_dbname(), Some("u"));
        assert!(!format!("{dsn:?}").contains("hunter2"));
    }

    #[test]
    fn a_unix_socket_needs_no_tls() {
        let dsn = Dsn::new("host=/run/pg user=u sslmode=require", None).unwrap();
        assert_eq!(dsn.config().get_ssl_mode(), SslMode::Disable);
        assert_eq!(dsn.hosts(), "/run/pg:5432");
    }

    #[test]
    fn a_password_file_gives_its_first_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("password");
        std::fs::write(&path, "s3cret pass\nnot this\n").unwrap();
        let dsn = Dsn::new("host=h user=u", Some(&path)).unwrap();
        assert_eq!(dsn.config().get_password(), Some(&b"s3cret pass"[..]));
        let own = Dsn::new("host=h user=u password=own", Some(&path)).unwrap();
        assert_eq!(own.config().get_password(), Some(&b"own"[..]));
        assert!(Dsn::new("host=h user=u", Some(&folder.path().join("none"))).is_err());
    }

    #[test]
    fn libpqs_password_file_is_matched_field_by_field() {
        let config: Config = "host=db.example,other port=5433 user=u:v dbname=d"
            .parse()
            .unwrap();
        let lines = "# db.example:5433:d:u\\:v:comment\ndb.example:5432:*:*:wrong port\n\
                     db.example:*:d:u\\:v:p\\:a\\\\ss:word\n*:*:*:*:last";
        assert_eq!(match_pgpass(lines, &config).as_deref(), Some("p:a\\ss:word"));
        assert_eq!(
            match_pgpass("other:5433:d:*:second host", &config).as_deref(),
            Some("second host")
        );
        assert_eq!(match_pgpass("x:*:*:*:no", &config), None);
    }

    #[test]
    fn a_password_file_that_others_may_read_is_ignored() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pgpass");
        std::fs::write(&path, "*:*:*:*:p").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
        let config: Config = "host=h user=u dbname=d".parse().unwrap();
        assert!(look_up(path.clone(), &config) == Found::Unread(path.clone()));
        let text = format!("host=h user=u passfile={}", path.display());
        assert_eq!(Dsn::new(&text, None).unwrap().unread(), Some(path.as_path()));
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        assert!(look_up(path, &config) == Found::Password("p".to_owned()));
        assert_eq!(Dsn::new(&text, None).unwrap().unread(), None);
        assert!(look_up(PathBuf::from("/dev/null"), &config) == Found::Nothing);
    }

    #[test]
    fn files_that_are_named_relatively_are_in_the_folder_that_is_said() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pgpass");
        std::fs::write(&path, "*:*:*:*:p").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        let beside = |text| Dsn::beside(text, None, Some(folder.path()));
        let dsn = beside("host=h user=u passfile=pgpass").unwrap();
        assert_eq!(dsn.config().get_password(), Some(&b"p"[..]));
        for (text, named) in [
            ("host=h user=u sslmode=verify-full sslrootcert=ca.pem", "ca.pem"),
            (
                "postgresql://u@h/d?sslcert=tls%2Fu.pem&sslkey=/etc/u.key",
                "tls/u.pem",
            ),
        ] {
            let error = beside(text).unwrap_err().to_string();
            let path = folder.path().join(named);
            assert!(error.contains(&path.display().to_string()), "{error}");
        }
    }

    #[test]
    fn each_host_alone_has_its_own_port_password_and_tls() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pgpass");
        std::fs::write(&path, "db1:5432:*:*:first\ndb2:5433:*:*:second\n").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        let text = format!(
            "host=db1,/run/pg,db2 port=5432,5434,5433 user=u dbname=d sslmode=require target_session_attrs=read-write \
             connect_timeout=3 channel_binding=require passfile={}",
            path.display()
        );
        let dsn = Dsn::new(&text, None).unwrap();
        assert!(!dsn.is_settled());
        assert_eq!(dsn.hosts(), "db1:5432, /run/pg:5434, db2:5433");
        let told = |at: usize| {
            let only = dsn.only(at, None).unwrap();
            let config = only.config();
            let password = config
                .get_password()
                .map(|text| String::from_utf8_lossy(text).into_owned());
            assert_eq!((config.get_user(), config.get_dbname()), (Some("u"), Some("d")));
            assert_eq!(config.get_connect_timeout(), Some(&Duration::from_secs(3)));
            assert_eq!(
                config.get_channel_binding(),
                tokio_postgres::config::ChannelBinding::Require
            );
            assert!(config.get_options().unwrap().contains("-c datestyle=ISO"));
            (only.hosts(), password, config.get_ssl_mode())
        };
        let password = |text: &str| Some(text.to_owned());
        assert_eq!(
            told(0),
            ("db1:5432".to_owned(), password("first"), SslMode::Require)
        );
        assert_eq!(told(1), ("/run/pg:5434".to_owned(), None, SslMode::Disable));
        assert_eq!(
            told(2),
            ("db2:5433".to_owned(), password("second"), SslMode::Require)
        );
        assert!(dsn.only(3, None).is_none());
        let address = dsn.only(2, Some([10, 0, 0, 2].into())).unwrap();
        assert_eq!(address.config().get_hostaddrs(), [IpAddr::from([10, 0, 0, 2])]);
    }

    #[test]
    fn a_name_may_be_several_servers() {
        for (text, several) in [
            ("host=db user=u", true),
            ("host=localhost user=u", true),
            ("host=/run/pg,10.0.0.1 user=u", true),
            ("host=10.0.0.1 user=u", false),
            ("host=::1 user=u", false),
            ("host=/run/pg user=u", false),
            ("host=db hostaddr=10.0.0.1 user=u", false),
            ("hostaddr=10.0.0.1 user=u", false),
        ] {
            assert_eq!(Dsn::new(text, None).unwrap().may_be_several(), several, "{text}");
        }
    }

    #[test]
    fn what_does_not_lead_to_one_server_that_takes_writes_is_refused() {
        for (text, named) in [
            (
                "host=a,b load_balance_hosts=random user=u",
                "load_balance_hosts=random",
            ),
            ("host=a,b target_session_attrs=standby user=u", "write read-write"),
            (
                "host=a,b target_session_attrs=read-only user=u",
                "write read-write",
            ),
            (
                "postgresql://u@a,b/d?target_session_attrs=prefer-standby",
                "write read-write",
            ),
            ("host=a,b,c port=1,2 user=u", "port=(2 of them for 3 hosts)"),
            (
                "host=a,b hostaddr=10.0.0.1 user=u",
                "hostaddr=(1 of them for 2 hosts)",
            ),
        ] {
            let error = Dsn::new(text, None).unwrap_err().to_string();
            assert!(error.contains(named), "{text}: {error}");
        }
        let one = Dsn::new("host=a target_session_attrs=primary user=u", None).unwrap();
        assert!(!one.is_settled());
        assert!(
            Dsn::new("host=a target_session_attrs=any user=u", None)
                .unwrap()
                .is_settled()
        );
    }

    #[test]
    fn an_unknown_parameter_is_refused_by_name() {
        let error = Dsn::new("host=h user=u frobnicate=1", None).unwrap_err();
        assert!(
            std::error::Error::source(&error)
                .unwrap()
                .to_string()
                .contains("invalid"),
            "{error:?}"
        );
    }
}
