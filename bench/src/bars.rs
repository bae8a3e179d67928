//! Ratios to native replication, and the bars that are set for some figures.

use std::fmt;

use crate::results::{CPU_PER_MILLION, Figures, Key, Medians};

/// What a figure is divided by before it is held against the bar.
#[derive(Clone, Copy)]
enum Against {
    /// Nothing: the figure itself has the bar.
    Itself,
    /// Native replication of one version, in the same run.
    Native(&'static str),
    /// Native replication of the system's own version: where the server's cost is in the figure.
    NativeOfSame,
    /// The same with one peer.
    OnePeer,
}

#[derive(Clone, Copy)]
enum Limit {
    AtLeast(f64),
    AtMost(f64),
}

struct Bar {
    /// Names of work; those that end in `-` mean all that begin so.
    works: &'static [&'static str],
    figure: &'static str,
    against: Against,
    limit: Limit,
}

const NATIVE_15: Against = Against::Native("native-15");
const ALL_BACKLOG: &[&str] = &[
    "insert-one",
    "insert-500",
    "update-one",
    "update-all",
    "update-hot",
    "delete-one",
    "tpc-b",
];

const fn bar(works: &'static [&'static str], figure: &'static str, against: Against, limit: Limit) -> Bar {
    Bar {
        works,
        figure,
        against,
        limit,
    }
}

/// All of them.
const BARS: &[Bar] = &[
    bar(&["insert-one"], "rows_per_s", NATIVE_15, Limit::AtLeast(1.0)),
    bar(&["insert-500"], "rows_per_s", NATIVE_15, Limit::AtLeast(1.5)),
    bar(&["update-one"], "rows_per_s", NATIVE_15, Limit::AtLeast(2.0)),
    bar(&["update-all"], "rows_per_s", NATIVE_15, Limit::AtLeast(0.9)),
    bar(
        &["update-all"],
        "rows_per_s",
        Against::Native("native-18"),
        Limit::AtLeast(1.5),
    ),
    bar(&["update-hot"], "rows_per_s", NATIVE_15, Limit::AtLeast(1.5)),
    bar(&["delete-one"], "rows_per_s", NATIVE_15, Limit::AtLeast(1.0)),
    bar(&["tpc-b"], "rows_per_s", NATIVE_15, Limit::AtLeast(1.5)),
    bar(
        ALL_BACKLOG,
        CPU_PER_MILLION,
        Against::NativeOfSame,
        Limit::AtMost(1.5),
    ),
    bar(
        &["one-txn-"],
        CPU_PER_MILLION,
        Against::NativeOfSame,
        Limit::AtMost(1.5),
    ),
    // What never arrived has no costs that could miss a bar.
    bar(&["one-txn-"], "arrived", Against::Itself, Limit::AtLeast(1.0)),
    bar(&["lag-200"], "p50_ms", Against::Itself, Limit::AtMost(1.0)),
    bar(&["lag-200"], "p99_ms", Against::Itself, Limit::AtMost(4.0)),
    bar(&["overhead-"], "tps", Against::NativeOfSame, Limit::AtLeast(0.9)),
    bar(
        &["first-copy-"],
        "rows_per_s",
        Against::NativeOfSame,
        Limit::AtLeast(1.0),
    ),
    // "The same": within a tenth, which is less than the same run differs from itself.
    bar(
        &["fan-out-"],
        "cpu_walsender",
        Against::OnePeer,
        Limit::AtMost(1.1),
    ),
    bar(
        &["catch-up-", "one-txn-"],
        "mib_source_daemon",
        Against::Itself,
        Limit::AtMost(256.0),
    ),
    bar(
        &["catch-up-", "one-txn-"],
        "mib_target_daemon",
        Against::Itself,
        Limit::AtMost(256.0),
    ),
];

/// A figure held against one of its bars.
#[derive(Clone, Debug, PartialEq)]
pub struct Verdict {
    /// `at least 1.5 of native-15`.
    pub bar: String,
    /// The ratio, or the figure itself; nothing when what it is compared with was not measured.
    pub value: Option<f64>,
    /// Nothing without a value.
    pub met: Option<bool>,
}

impl Verdict {
    fn of(bar: &Bar, key: &Key, medians: &Medians) -> Self {
        let own = medians
            .get(key)
            .and_then(|figures| figures.get(bar.figure))
            .copied();
        let to_native = |system| (format!(" of {system}"), ratio(medians, key, bar.figure, system));
        let (name, value) = match (bar.against, native_of(&key.2)) {
            (Against::Itself, _) => (String::new(), own),
            (Against::Native(system), _) | (Against::NativeOfSame, Some(system)) => to_native(system),
            (Against::NativeOfSame, None) => (" of native".to_owned(), None),
            (Against::OnePeer, _) => {
                let one = (key.0.clone(), crate::fanout::shape(1), key.2.clone());
                let one = medians.get(&one).and_then(|figures| figures.get(bar.figure));
                (" of one peer's".to_owned(), divided(own, one.copied()))
            }
        };
        let (word, limit) = match bar.limit {
            Limit::AtLeast(least) => ("at least", least),
            Limit::AtMost(most) => ("at most", most),
        };
        Self {
            bar: format!("{word} {limit}{name}"),
            value,
            met: value.map(|value| match bar.limit {
                Limit::AtLeast(least) => value >= least,
                Limit::AtMost(most) => value <= most,
            }),
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let met = match self.met {
            Some(true) => "met",
            Some(false) => "not met",
            None => "not known",
        };
        write!(f, "{}: {met}", self.bar)
    }
}

/// The bars of one of our figures; others' have none.
pub fn verdicts(medians: &Medians, key: &Key, figure: &str) -> Vec<Verdict> {
    if !key.2.starts_with("anabranch-") {
        return Vec::new();
    }
    BARS.iter()
        .filter(|bar| bar.figure == figure && bar.works.iter().any(|work| is_work(work, &key.0)))
        .map(|bar| Verdict::of(bar, key, medians))
        .collect()
}

/// Which bars are set for none of these names of work.
#[cfg(test)]
pub fn without(works: &std::collections::BTreeSet<String>) -> Vec<&'static str> {
    let of_bars = BARS.iter().flat_map(|bar| bar.works);
    of_bars
        .filter(|pattern| !works.iter().any(|work| is_work(pattern, work)))
        .copied()
        .collect()
}

fn is_work(pattern: &str, work: &str) -> bool {
    if pattern.ends_with('-') {
        work.starts_with(pattern)
    } else {
        work == pattern
    }
}

/// Native replication of the same version as a system's.
pub fn native_of(system: &str) -> Option<&'static str> {
    match system.rsplit_once('-')?.1 {
        "15" => Some("native-15"),
        "18" => Some("native-18"),
        _ => None,
    }
}

/// A figure divided by another system's of the same work and shape; nothing where a ratio would say nothing.
pub fn ratio(medians: &Medians, key: &Key, figure: &str, to: &str) -> Option<f64> {
    if !is_compared(figure) {
        return None;
    }
    let of = |figures: Option<&Figures>| figures.and_then(|figures| figures.get(figure)).copied();
    let other = (key.0.clone(), key.1.clone(), to.to_owned());
    divided(of(medians.get(key)), of(medians.get(&other)))
}

fn divided(one: Option<f64>, by: Option<f64>) -> Option<f64> {
    match (one?, by?) {
        (_, by) if by <= 0.0 => None,
        (one, by) => Some(one / by),
    }
}

/// Not compared: what was given, and what only says under which circumstances.
fn is_compared(figure: &str) -> bool {
    !matches!(
        figure,
        "rounds"
            | "rows"
            | "load_before"
            | "unseen"
            | "arrived"
            | "write_s"
            | "rows_per_s_min"
            | "rows_per_s_max"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(work: &str, shape: &str, system: &str) -> Key {
        (work.to_owned(), shape.to_owned(), system.to_owned())
    }

    fn medians(all: &[(&str, &str, &str, &str, f64)]) -> Medians {
        let mut medians = Medians::new();
        for &(work, shape, system, figure, value) in all {
            let figures = medians.entry(key(work, shape, system)).or_default();
            figures.insert(figure.to_owned(), value);
        }
        medians
    }

    fn met(medians: &Medians, key: &Key, figure: &str) -> Vec<Option<bool>> {
        verdicts(medians, key, figure)
            .into_iter()
            .map(|verdict| verdict.met)
            .collect()
    }

    #[test]
    fn rates_have_to_reach_and_costs_to_stay_below_native_s() {
        let medians = medians(&[
            ("update-all", "narrow", "anabranch-15", "rows_per_s", 95.0),
            ("update-all", "narrow", "native-15", "rows_per_s", 100.0),
            ("update-all", "narrow", "native-18", "rows_per_s", 70.0),
            ("update-all", "narrow", "anabranch-15", CPU_PER_MILLION, 16.0),
            ("update-all", "narrow", "native-15", CPU_PER_MILLION, 10.0),
        ]);
        let ours = key("update-all", "narrow", "anabranch-15");
        assert_eq!(met(&medians, &ours, "rows_per_s"), [Some(true), Some(false)]);
        assert_eq!(met(&medians, &ours, CPU_PER_MILLION), [Some(false)]);
        let told = verdicts(&medians, &ours, CPU_PER_MILLION)[0].to_string();
        assert_eq!(told, "at most 1.5 of native-15: not met");
        assert!(verdicts(&medians, &key("update-all", "narrow", "native-15"), "rows_per_s").is_empty());
    }

    #[test]
    fn a_first_copy_has_to_be_as_fast_as_native_s_of_the_same_version() {
        let medians = medians(&[
            ("first-copy-9", "narrow", "anabranch-18", "rows_per_s", 90.0),
            ("first-copy-9", "narrow", "native-18", "rows_per_s", 60.0),
            ("first-copy-9", "narrow", "native-15", "rows_per_s", 95.0),
        ]);
        let ours = key("first-copy-9", "narrow", "anabranch-18");
        assert_eq!(met(&medians, &ours, "rows_per_s"), [Some(true)]);
    }

    #[test]
    fn what_was_not_measured_beside_it_leaves_a_bar_open() {
        let medians = medians(&[("tpc-b", "", "anabranch-18", "rows_per_s", 95.0)]);
        assert_eq!(
            met(&medians, &key("tpc-b", "", "anabranch-18"), "rows_per_s"),
            [None]
        );
    }

    #[test]
    fn lag_and_memory_have_bars_of_their_own_and_fan_out_that_of_one_peer() {
        let medians = medians(&[
            ("lag-200", "", "anabranch-15", "p50_ms", 1.1),
            ("lag-2000", "", "anabranch-15", "p50_ms", 9.0),
            ("one-txn-10", "narrow", "anabranch-15", "mib_target_daemon", 255.0),
            ("fan-out-10", "1 peers", "anabranch-15", "cpu_walsender", 3.0),
            ("fan-out-10", "7 peers", "anabranch-15", "cpu_walsender", 3.2),
        ]);
        assert_eq!(
            met(&medians, &key("lag-200", "", "anabranch-15"), "p50_ms"),
            [Some(false)]
        );
        assert!(met(&medians, &key("lag-2000", "", "anabranch-15"), "p50_ms").is_empty());
        let large = key("one-txn-10", "narrow", "anabranch-15");
        assert_eq!(met(&medians, &large, "mib_target_daemon"), [Some(true)]);
        let seven = key("fan-out-10", "7 peers", "anabranch-15");
        assert_eq!(met(&medians, &seven, "cpu_walsender"), [Some(true)]);
    }

    #[test]
    fn circumstances_are_not_compared() {
        let medians = medians(&[
            ("lag-200", "", "anabranch-15", "load_before", 2.0),
            ("lag-200", "", "native-15", "load_before", 1.0),
        ]);
        let ours = key("lag-200", "", "anabranch-15");
        assert_eq!(ratio(&medians, &ours, "load_before", "native-15"), None);
    }
}
