//! A real process, killed while it appends.

use std::env;
use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};

use super::*;

/// Folder of the child's journal.
const DIR: &str = "ANABRANCH_TEST_JOURNAL";
const ORIGINS: u16 = 3;

/// Frame number `seq`, the same in parent and child.
fn frame(origins: &mut [Origin], seq: u64) -> Frame {
    let which = (seq % u64::from(ORIGINS)) as usize;
    origins[which].whole((seq * 131 % 5_000) as usize)
}

fn origins() -> Vec<Origin> {
    (1..=ORIGINS).map(Origin::new).collect()
}

/// Not a test of its own: what the test below starts and kills. Nothing where all that are ignored are run.
#[tokio::test]
#[ignore = "runs as a child process of the next test"]
async fn child_that_appends_until_it_is_killed() {
    let Some(dir) = env::var_os(DIR) else {
        return;
    };
    let (journal, recovered) = open(Path::new(&dir));
    let mut origins = origins();
    for seq in 0..recovered.next_seq {
        frame(&mut origins, seq);
    }
    let mut durable = journal.durable();
    tokio::spawn(async move {
        loop {
            durable.changed().await.unwrap();
            let upto = *durable.borrow_and_update();
            let mut out = std::io::stdout().lock();
            writeln!(out, "\ndurable {upto}")
                .and_then(|()| out.flush())
                .unwrap();
        }
    });
    for seq in recovered.next_seq.. {
        assert_eq!(journal.append(frame(&mut origins, seq)).await.unwrap(), seq);
        if seq % 7 == 0 {
            tokio::task::yield_now().await;
        }
    }
}

#[tokio::test]
async fn a_killed_process_leaves_everything_it_called_durable() {
    let dir = tempfile::tempdir().unwrap();
    let mut before = 0;
    for round in 0..8u64 {
        let mut child = Command::new(env::current_exe().unwrap())
            .args([
                "--exact",
                "journal::tests::killed::child_that_appends_until_it_is_killed",
                "--ignored",
                "--nocapture",
            ])
            .env(DIR, dir.path())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut durable = 0;
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut reports = 0;
        for line in lines.map_while(Result::ok) {
            if let Some(upto) = line.strip_prefix("durable ") {
                durable = upto.parse().unwrap_or(durable);
                reports += 1;
                if reports == 5 + round * 40 {
                    child.kill().unwrap();
                }
            }
        }
        child.wait().unwrap();
        assert!(durable > before, "round {round}: the child made nothing durable");

        let (journal, recovered) = open(dir.path());
        assert!(
            recovered.next_seq >= durable,
            "round {round}: {} of {durable}",
            recovered.next_seq
        );
        let mut model = origins();
        let expected: Vec<_> = (0..recovered.next_seq)
            .map(|seq| frame(&mut model, seq))
            .collect();
        let mut count = 0;
        for origin in &model {
            for located in read_all(&journal, origin.id, Position::ZERO).unwrap() {
                assert!(same(&located.frame, &expected[located.seq as usize]));
                count += 1;
            }
        }
        assert_eq!(count, expected.len());
        before = recovered.next_seq;
        journal.close().await.unwrap();
    }
}
