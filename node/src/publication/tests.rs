use super::read::Table;
use super::*;

const ITEM: u32 = 100;
const THING: u32 = 101;
const PROGRESS: u32 = 90;

fn listed(name: &str, entry: u32) -> Listed {
    Listed {
        name: name.to_owned(),
        entries: [entry].into(),
    }
}

/// A publication of `item` and `thing`.
fn whole() -> Now {
    let tables = [
        (PROGRESS, "anabranch.progress"),
        (91, "anabranch.clock"),
        (92, "anabranch.member"),
        (ITEM, "public.item"),
        (THING, "public.thing"),
    ];
    let table = |(oid, name): (u32, &str)| {
        let listed = listed(name, oid + 1_000);
        (
            oid,
            Table {
                listed,
                filtered: false,
            },
        )
    };
    Now {
        published: Some(Published {
            oid: 7,
            xmin: 700,
            all_operations: true,
            tables: tables.into_iter().map(table).collect(),
            ..Published::default()
        }),
        xmin: 1_000,
        xmax: 1_001,
        removed: BTreeSet::new(),
        relations: tables.map(|(oid, name)| (oid, name.to_owned())).into(),
    }
}

pub(crate) fn begun() -> Kept {
    let now = whole();
    let published = now.published.clone().unwrap();
    Kept::begin(&now, &published, BTreeMap::new())
}

fn changed(change: impl FnOnce(&mut Published)) -> Now {
    let mut now = whole();
    change(now.published.as_mut().unwrap());
    now
}

/// `item` was taken out and put in again, and has this entry since.
pub(crate) fn put_in_again(entry: u32) -> Now {
    changed(|it| it.tables.get_mut(&ITEM).unwrap().listed.entries = [entry].into())
}

/// The doubted tables.
fn doubted(kept: &Kept) -> Vec<&str> {
    kept.doubts().keys().map(String::as_str).collect()
}

#[test]
fn nothing_is_wrong_where_nothing_was_changed_and_time_goes_on() {
    let mut kept = begun();
    let later = Now {
        xmin: 2_000,
        xmax: 2_000,
        ..whole()
    };
    assert_eq!(kept.compare(&later), Faults::default());
    assert!(kept.broken().is_none() && kept.doubts().is_empty());
    assert_eq!(kept.good_xid(), Some(2_000));
    assert!(!kept.differs_from(&begun()));
}

#[test]
fn what_blinds_the_daemon_breaks_it_for_good_and_the_last_good_place_is_kept() {
    let broken: [(&str, Now); 6] = [
        (
            "does not exist",
            Now {
                published: None,
                xmin: 2_000,
                ..whole()
            },
        ),
        ("created again", changed(|it| it.oid = 8)),
        ("omits", changed(|it| it.all_operations = false)),
        ("root", changed(|it| it.via_root = true)),
        (
            "anabranch.progress",
            changed(|it| drop(it.tables.remove(&PROGRESS))),
        ),
        (
            "anabranch.progress",
            changed(|it| it.tables.get_mut(&PROGRESS).unwrap().listed.entries = [5_000].into()),
        ),
    ];
    for (why, now) in broken {
        let mut kept = begun();
        kept.compare(&now);
        assert!(kept.broken().unwrap().contains(why), "{:?}", kept.broken());
        // Restored, it is as before for whoever looks, and is not.
        kept.compare(&whole());
        assert!(kept.broken().is_some());
        assert_eq!(kept.good_xid(), Some(1_000));
        assert!(kept.healed().broken().is_none());
    }
}

#[test]
fn a_table_that_was_away_is_doubted_until_it_is_settled() {
    let without = || changed(|it| drop(it.tables.remove(&ITEM)));
    let again = || put_in_again(5_000);
    // Seen, or not.
    for looks in [vec![without(), again()], vec![again()]] {
        let mut kept = begun();
        for now in looks {
            let faults = kept.compare(&now);
            let is_away = !now.published.unwrap().tables.contains_key(&ITEM);
            assert_eq!(faults.tables.contains_key("public.item"), is_away);
            assert_eq!(doubted(&kept), ["public.item"]);
        }
        kept.settle("public.item");
        assert_eq!(kept.compare(&again()), Faults::default());
        assert!(kept.doubts().is_empty());
    }
}

#[test]
fn each_time_that_a_table_was_away_is_a_reason_to_doubt_it() {
    let mut kept = begun();
    let item: BTreeSet<String> = ["public.item".to_owned()].into();
    for entry in [5_000, 5_001] {
        assert_eq!(kept.compare(&put_in_again(entry)).doubted, item);
        assert!(kept.compare(&put_in_again(entry)).doubted.is_empty());
    }
    assert_eq!(doubted(&kept), ["public.item"]);
}

#[test]
fn who_removes_a_table_or_drops_it_is_not_doubted() {
    let mut removed = changed(|it| drop(it.tables.remove(&ITEM)));
    removed.removed.insert("public.item".to_owned());
    let mut dropped = changed(|it| drop(it.tables.remove(&ITEM)));
    dropped.relations.remove(&ITEM);
    let mut anew = changed(|it| {
        it.tables.remove(&ITEM);
        let listed = listed("public.item", 5_000);
        it.tables.insert(
            200,
            Table {
                listed,
                filtered: false,
            },
        );
    });
    anew.relations.remove(&ITEM);
    anew.relations.insert(200, "public.item".to_owned());
    for now in [removed, dropped, anew] {
        let mut kept = begun();
        assert_eq!(kept.compare(&now), Faults::default());
        assert!(kept.doubts().is_empty() && kept.broken().is_none());
    }
    let mut by_hand = changed(|it| drop(it.tables.remove(&ITEM)));
    by_hand.relations.remove(&ITEM);
    by_hand.relations.insert(200, "public.item".to_owned());
    let mut kept = begun();
    assert!(kept.compare(&by_hand).tables.contains_key("public.item"));
    assert_eq!(doubted(&kept), ["public.item"]);
}

#[test]
fn options_that_were_changed_and_changed_back_doubt_every_table() {
    let mut kept = begun();
    kept.compare(&changed(|it| it.xmin = 701));
    assert_eq!(doubted(&kept), ["public.item", "public.thing"]);
    // Let in by `init` or DDL.
    let mut kept = begun();
    kept.compare(&changed(|it| (it.xmin, it.generated) = (701, true)));
    assert!(kept.doubts().is_empty());
    kept.compare(&changed(|it| (it.xmin, it.generated) = (702, true)));
    assert!(!kept.doubts().is_empty());
}

#[test]
fn filters_and_whole_schemas_are_faults() {
    let mut kept = begun();
    let faults = kept.compare(&changed(|it| it.tables.get_mut(&ITEM).unwrap().filtered = true));
    assert!(faults.tables["public.item"].contains("row filter"));
    assert_eq!(doubted(&kept), ["public.item"]);
    let name = "\"my.shop\".Item";
    let mut kept = begun();
    let faults = kept.compare(&changed(|it| {
        let item = it.tables.get_mut(&ITEM).unwrap();
        (item.filtered, item.listed.name) = (true, name.to_owned());
    }));
    let remedy = &faults.tables[name];
    assert!(
        remedy.contains("DROP TABLE \"my.shop\".\"Item\", and run"),
        "{remedy}"
    );
    let mut kept = begun();
    assert_eq!(kept.compare(&changed(|it| it.open_ended = true)).whole.len(), 1);
    assert!(kept.doubts().is_empty());
}

#[test]
fn a_partition_that_is_detached_is_not_published_any_more() {
    let mut now = whole();
    let both = |it: &mut Published| it.tables.get_mut(&ITEM).unwrap().listed.entries = [3_000, 1_100].into();
    both(now.published.as_mut().unwrap());
    let published = now.published.clone().unwrap();
    let mut kept = Kept::begin(&now, &published, BTreeMap::new());
    // By one of two ways still.
    kept.compare(&whole());
    assert!(kept.doubts().is_empty());
    kept.compare(&changed(|it| drop(it.tables.remove(&ITEM))));
    assert_eq!(doubted(&kept), ["public.item"]);
}

#[test]
fn a_node_is_healed_only_with_a_publication_that_is_whole() {
    let kept = begun();
    assert_eq!(kept.unfit(&whole()), None);
    // Made again: that is what it is healed for.
    let again = changed(|it| {
        it.oid = 8;
        for (oid, table) in &mut it.tables {
            table.listed.entries = [oid + 9_000].into();
        }
    });
    assert_eq!(kept.unfit(&again), None);
    for (why, now) in [
        (
            "does not exist",
            Now {
                published: None,
                ..whole()
            },
        ),
        ("omits", changed(|it| it.all_operations = false)),
        (
            "public.item is not published",
            changed(|it| drop(it.tables.remove(&ITEM))),
        ),
        (
            "row filter",
            changed(|it| it.tables.get_mut(&ITEM).unwrap().filtered = true),
        ),
    ] {
        assert!(kept.unfit(&now).unwrap().contains(why), "{:?}", kept.unfit(&now));
    }
}

#[test]
fn it_is_kept_and_read_back_and_marked_only_once() {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(Kept::read(dir.path()).unwrap(), None);
    let mut kept = begun();
    kept.compare(&changed(|it| drop(it.tables.remove(&ITEM))));
    kept.keep(dir.path()).unwrap();
    assert_eq!(Kept::read(dir.path()).unwrap(), Some(kept));
    Kept::mark_broken(dir.path(), "was away").unwrap();
    Kept::mark_broken(dir.path(), "was away again").unwrap();
    let read = Kept::read(dir.path()).unwrap().unwrap();
    assert_eq!(read.broken(), Some("was away"));
    assert_eq!(read.good_xid(), Some(1_000));
    std::fs::write(dir.path().join(FILE), "{").unwrap();
    assert!(Kept::read(dir.path()).is_err());
}
