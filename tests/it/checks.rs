//! Merged rows that a CHECK refuses, where the policy accepts that they wait in the quarantine.

use anabranch_tests::Cluster;
use anabranch_tests::daemon::{anabranch, anabranch_ok, anabranch_refuses};
use anabranch_tests::proxy::Mode;
use anabranch_tests::wait::PATIENCE;

const SCHEMA: &str =
    "create table stock (id int primary key, n int not null, note text, constraint there check (n >= 0))";
const SUMS: &str = "[[table]]\nname = \"public.stock\"\ncolumns = { n = \"delta\" }\n";
const ACCEPTED: &str =
    "[[table]]\nname = \"public.stock\"\ncheck_constraints = \"quarantine\"\ncolumns = { n = \"delta\" }\n";

const STOCK: &str = "select string_agg(concat_ws(' ', id, n, note), ', ' order by id) from stock";
const WAITING: &str = "select coalesce(string_agg(concat_ws(' ', key->>'id', sqlstate), ', '), 'none') from anabranch.quarantine";
/// What was refused, and what became of the line.
const LINES: &str = "select coalesce(string_agg(concat_ws(' ', conflict_type, conflict_resolution, constraint_name, \
    remote_tuple->>'n', status), ', ' order by detected_at), 'none') from anabranch.conflict_history";

/// Nodes with five things in stock.
async fn start<const N: usize>(versions: [u32; N]) -> Cluster {
    let cluster = Cluster::of(versions)
        .schema(SCHEMA)
        .policy(ACCEPTED)
        .start()
        .await;
    cluster.run(0, "insert into stock values (1, 5, 'x')").await;
    cluster.converge().await;
    cluster
}

/// Nodes 0 and 1 sell four of them each.
async fn sell_too_much(cluster: &Cluster) {
    cluster.isolate_all();
    cluster.run(0, "update stock set n = n - 4").await;
    cluster.run(1, "update stock set n = n - 4").await;
}

async fn wait_refused(cluster: &Cluster, node: usize) {
    cluster.wait_value(node, WAITING, "1 23514").await;
    let line = "check_violation skip there -3 new";
    cluster.wait_value(node, LINES, line).await;
    // Nothing is written that the server has not taken.
    cluster.wait_value(node, STOCK, "1 1 x").await;
}

/// The row fits, as everybody's writes together make it.
async fn expect_seven(cluster: &Cluster, refused_at: &[usize]) {
    cluster.converge().await;
    cluster.expect(STOCK, "1 7 x").await;
    cluster.expect(WAITING, "none").await;
    for node in cluster.all() {
        let line = if refused_at.contains(&node) {
            "check_violation skip there -3 acknowledged"
        } else {
            "none"
        };
        assert_eq!(cluster.value(node, LINES).await, line, "n{}", node + 1);
    }
}

#[tokio::test]
async fn what_two_nodes_sell_too_much_of_waits_until_an_increment_makes_it_fit() {
    let cluster = start([15, 18]).await;
    sell_too_much(&cluster).await;
    // The second hears of the first, and not the other way round.
    cluster.line(1, 0).set(Mode::Pass);
    wait_refused(&cluster, 1).await;
    cluster.run(0, "update stock set n = n + 10").await;
    cluster.wait_value(1, STOCK, "1 7 x").await;
    cluster.heal();
    expect_seven(&cluster, &[1]).await;
}

#[tokio::test]
async fn it_waits_at_all_nodes_that_know_of_it_and_through_a_crash() {
    let mut cluster = start([15, 18, 15]).await;
    sell_too_much(&cluster).await;
    cluster.run(2, "update stock set n = n + 10").await;
    cluster.set_lines(&[0], &[1], Mode::Pass);
    wait_refused(&cluster, 0).await;
    wait_refused(&cluster, 1).await;
    cluster.nodes[1].daemon.kill();
    cluster.nodes[1].daemon.start();
    wait_refused(&cluster, 1).await;
    cluster.heal();
    expect_seven(&cluster, &[0, 1]).await;
}

#[tokio::test]
async fn who_writes_the_row_where_it_waits_decides_all_of_it() {
    let cluster = start([15, 18]).await;
    sell_too_much(&cluster).await;
    cluster.heal();
    for node in cluster.all() {
        wait_refused(&cluster, node).await;
    }
    // Its server shows one thing that is left, which is what it adds to.
    cluster.run(1, "update stock set n = n + 10").await;
    cluster.converge().await;
    cluster.expect(STOCK, "1 11 x").await;
    for node in cluster.all() {
        cluster.wait_value(node, WAITING, "none").await;
    }
}

#[tokio::test]
async fn a_check_over_a_sum_is_refused_with_the_line_that_accepts_it() {
    let mut cluster = Cluster::of([15, 18])
        .schema(SCHEMA)
        .policy(SUMS)
        .without_daemons()
        .start()
        .await;
    let daemon = &mut cluster.nodes[0].daemon;
    let said = anabranch(&["doctor", "--config", daemon.config_arg()]).await;
    assert!(!said.status.success());
    let said = String::from_utf8_lossy(&said.stdout).into_owned();
    daemon.start();
    assert!(!daemon.wait_exit(PATIENCE).expect("it ends").success());
    for text in [said, daemon.log()] {
        for part in [
            "column `n` is merged by delta and has a CHECK",
            "write check_constraints = \"quarantine\" into the table's rule",
        ] {
            assert!(text.contains(part), "`{part}` is not in {text}");
        }
    }
    for node in &cluster.nodes {
        let path = node.data_dir.with_file_name("policy.toml");
        std::fs::write(path, ACCEPTED).expect("write the policy");
    }
    cluster.start_daemons();
    cluster.run(0, "insert into stock values (1, 5, 'x')").await;
    cluster.converge().await;
    let config = cluster.nodes[0].daemon.config_arg().to_owned();
    let said = anabranch(&["doctor", "--config", &config]).await;
    let said = String::from_utf8_lossy(&said.stdout).into_owned();
    let accepted = "merging columns can break what each writer keeps: CHECK \"there\" (n)";
    assert!(said.contains(accepted) && !said.contains("has a CHECK"), "{said}");
    let shown = anabranch_ok(&["policy", "show", "--table", "public.stock", "--config", &config]).await;
    assert!(shown.contains("checks quarantined"), "{shown}");
    // A key over a sum is no CHECK.
    let key = "alter table stock add constraint once unique (n)";
    let admin = cluster.admin(0).await;
    admin.run(key).await;
    let said = anabranch(&["doctor", "--config", &config]).await;
    let said = String::from_utf8_lossy(&said.stdout).into_owned();
    assert!(
        said.contains("column `n` is merged by delta and has a unique key \"once\""),
        "{said}"
    );
    admin.run("alter table stock drop constraint once").await;
    // While the cluster runs it is withdrawn only where nothing needs it.
    let next = cluster.nodes[0].data_dir.with_file_name("next.toml");
    std::fs::write(&next, SUMS).expect("write the policy");
    let next = next.to_str().expect("a path in UTF-8");
    let differs = anabranch_refuses(&["policy", "diff", next, "--config", &config]).await;
    assert!(differs.contains("checks quarantined"), "{differs}");
    let refused = anabranch_refuses(&["policy", "change", next, "--config", &config]).await;
    assert!(
        refused.contains("column `n` is merged by delta and has a CHECK"),
        "{refused}"
    );
}
