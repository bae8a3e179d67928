#!/usr/bin/env bash
# The architecture's invariant that machines can check: `anabranch-conflict` and the domain half of
# `anabranch-proto` decide, they do not act. No I/O, no clock, no async runtime.
set -euo pipefail
cd "$(dirname "$0")/.."
bad=0

for crate in anabranch-conflict anabranch-proto; do
    tree=$(cargo tree --locked --offline --edges normal --prefix none --no-default-features -p "$crate" 2>/dev/null \
        || cargo tree --locked --edges normal --prefix none --no-default-features -p "$crate")
    if found=$(grep -E '^(tokio|tonic|hyper|async-std|mio|socket2)[a-z0-9_-]* v' <<<"$tree" | sort -u) && [ -n "$found" ]; then
        printf 'purity: %s must not depend on:\n%s\n' "$crate" "$found" >&2
        bad=1
    fi
done

# Comments may name what the code must not use.
forbidden='SystemTime|Instant|std::(net|fs|process|env|thread)|thread_rng|rand::rng\b|tokio::'
while IFS= read -r -d '' file; do
    if found=$(sed 's://.*$::' "$file" | grep -nE "$forbidden"); then
        printf 'purity: %s uses what decides nothing deterministically:\n%s\n' "$file" "$found" >&2
        bad=1
    fi
done < <(find conflict/src proto/src -name '*.rs' -print0)

exit $bad
