//! Negative controls: rules that a build with the feature `break` breaks on purpose, so that a harness which does not
//! notice is known to be blind. `ANABRANCH_BREAK` names the rule. Without the feature nothing of this is compiled in.
//!
//! In:   an environment variable        Out: [`is`], and an [`admit`] that may be wrong
//! Not here: who must notice (`jepsen/`)

/// A rule that can be broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rule {
    /// The slow path does not wait for the decoder.
    Fence,
    /// Statements overwrite rows whatever their `xmin`.
    Guard,
    /// What members say on the side counts as stable, before their own streams have said it.
    Stability,
    /// What a transaction had seen is ignored: whatever meets is called concurrent.
    Frontier,
    /// A delete leaves no tombstone.
    Tombstone,
    /// Transactions are sent before they are visible at their origin.
    VisibilityGate,
    /// The journal calls durable what it did not sync.
    JournalFsync,
    /// Stamps of the same second count as equal, and then whatever is here stays.
    Tie,
}

#[cfg(not(feature = "break"))]
pub use anabranch_conflict::admit;

/// Is this rule broken?
#[cfg(not(feature = "break"))]
#[must_use]
pub const fn is(_: Rule) -> bool {
    false
}

#[cfg(feature = "break")]
pub use on::{admit, is};

#[cfg(feature = "break")]
mod on {
    use std::sync::OnceLock;

    use anabranch_conflict::{Verdict, Version};
    use anabranch_proto::Vector;

    use super::Rule;

    fn named(name: &str) -> Option<Rule> {
        Some(match name {
            "fence" => Rule::Fence,
            "guard" => Rule::Guard,
            "stability" => Rule::Stability,
            "frontier" => Rule::Frontier,
            "tombstone" => Rule::Tombstone,
            "visibility-gate" => Rule::VisibilityGate,
            "journal-fsync" => Rule::JournalFsync,
            "tie" => Rule::Tie,
            _ => return None,
        })
    }

    /// Is this rule broken?
    #[must_use]
    pub fn is(rule: Rule) -> bool {
        static BROKEN: OnceLock<Option<Rule>> = OnceLock::new();
        let broken = BROKEN.get_or_init(|| {
            let rule = std::env::var("ANABRANCH_BREAK")
                .ok()
                .and_then(|name| named(&name));
            if let Some(rule) = rule {
                tracing::warn!(?rule, "this build breaks a rule on purpose");
            }
            rule
        });
        *broken == Some(rule)
    }

    /// [`anabranch_conflict::admit`], unless a rule about it is broken.
    #[must_use]
    pub fn admit(current: Option<&Version>, incoming: &Version, deps: &Vector) -> Verdict {
        if is(Rule::Frontier) {
            return anabranch_conflict::admit(current, incoming, &Vector::new());
        }
        if let (true, Some(current)) = (is(Rule::Tie), current) {
            let second = |version: &Version| version.stamp.time.as_u64() >> 32;
            let concurrent = !current.covered_by(deps) && current.stamp != incoming.stamp;
            if concurrent && second(current) == second(incoming) {
                return Verdict::Loses;
            }
        }
        anabranch_conflict::admit(current, incoming, deps)
    }
}
