//! Servers that join a running cluster.

use std::fs;
use std::process::{Child, Stdio};

use crate::cluster::{Cluster, Node, config_text, grant, private_dir};
use crate::daemon::{Daemon, anabranch, program};
use crate::postgres::{DATABASE, Options, Postgres, free_port};
use crate::process::{mortal, spawn};
use crate::wait::until;

impl Cluster {
    /// One more server with an empty database, its configuration written and its role granted; returns its place.
    pub async fn add_server(&mut self, version: u32) -> usize {
        assert!(
            self.network.is_none(),
            "a network has seats for the first members only"
        );
        let at = self.nodes.len();
        let name = format!("n{}", at + 1);
        let home = self.dir.path().join(&name);
        let options = Options {
            version,
            member: at,
            conf: Vec::new(),
            clock: None,
            tcp_port: None,
        };
        let mut server = Postgres::create(&home, options);
        let data_dir = home.join("daemon");
        private_dir(&data_dir);
        let port = free_port();
        let mut text = config_text(at, &server, &data_dir, ([127, 0, 0, 1], port).into(), None);
        for node in &self.nodes {
            text.push_str(&format!(
                "[[peers]]\nname = \"{}\"\nid = {}\naddress = \"127.0.0.1:{}\"\n",
                node.name, node.id, node.port
            ));
        }
        let policy = self.nodes[0].data_dir.with_file_name("policy.toml");
        if policy.exists() {
            fs::copy(&policy, home.join("policy.toml")).expect("copy the policy");
            let beside = fs::read_dir(policy.parent().expect("a folder")).expect("read the folder");
            for entry in beside.map(|entry| entry.expect("read the folder").path()) {
                if entry.extension().is_some_and(|extension| extension == "rhai") {
                    let name = entry.file_name().expect("a file");
                    fs::copy(&entry, home.join(name)).expect("copy a script");
                }
            }
            text = text.replace("[cluster]\n", "[cluster]\npolicy = \"policy.toml\"\n");
        }
        let config = home.join("anabranch.toml");
        fs::write(&config, text).expect("write the configuration");
        server.start().await;
        let daemon = Daemon::new(&config);
        grant(&server, daemon.config_arg()).await;
        self.nodes.push(Node {
            name,
            id: at + 1,
            server,
            daemon,
            port,
            data_dir,
        });
        for row in &mut self.proxies {
            row.push(None);
        }
        self.proxies.push((0..=at).map(|_| None).collect());
        at
    }

    /// The arguments of `anabranch join` for a server that was added.
    pub fn join_command(&self, node: usize, donor: usize) -> Vec<String> {
        let (joiner, donor) = (&self.nodes[node], &self.nodes[donor]);
        let newest = joiner.server.version().max(donor.server.version());
        [
            "join",
            "--config",
            joiner.daemon.config_arg(),
            "--output",
            "json",
            "--from",
            &donor.name,
            "--from-dsn",
            &donor.server.dsn("postgres", DATABASE),
            "--admin-dsn",
            &joiner.server.dsn("postgres", DATABASE),
            "--pg-bin",
            crate::postgres::dump_dir(newest)
                .to_str()
                .expect("a path in UTF-8"),
        ]
        .map(str::to_owned)
        .to_vec()
    }

    /// Copies, to the end. Returns the events.
    pub async fn join(&self, node: usize, donor: usize) -> String {
        self.join_args(node, donor, &[]).await
    }

    /// The same with more arguments.
    pub async fn join_args(&self, node: usize, donor: usize, more: &[&str]) -> String {
        let command = self.join_command(node, donor);
        let args: Vec<&str> = command
            .iter()
            .map(String::as_str)
            .chain(more.iter().copied())
            .collect();
        let output = anabranch(&args).await;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            output.status.success(),
            "the join failed:\n{said}\n{}",
            String::from_utf8_lossy(&output.stderr)
        );
        said
    }

    /// Begins to copy.
    pub fn spawn_join(&self, node: usize, donor: usize) -> Child {
        self.spawn_join_to(node, donor, Stdio::null())
    }

    /// The same with more arguments.
    pub fn spawn_join_args(&self, node: usize, donor: usize, more: &[&str]) -> Child {
        self.spawn(node, donor, more, Stdio::null())
    }

    /// The same; the events go to `out`.
    pub fn spawn_join_to(&self, node: usize, donor: usize, out: Stdio) -> Child {
        self.spawn(node, donor, &[], out)
    }

    fn spawn(&self, node: usize, donor: usize, more: &[&str], out: Stdio) -> Child {
        let mut command = mortal(&program(), "KILL", false);
        command
            .args(self.join_command(node, donor))
            .args(more)
            .stdout(out)
            .stderr(Stdio::null());
        spawn(command).expect("start the join")
    }

    /// Waits until a node that has joined takes writes.
    pub async fn wait_writable(&self, node: usize) {
        until(&format!("n{} takes writes", node + 1), async || {
            let session = self.session(node).await;
            session.value("show default_transaction_read_only").await == "off"
        })
        .await;
    }
}
