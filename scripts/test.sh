#!/usr/bin/env bash
# Sets up the machine and runs every test that fits into CI. Arguments go to `cargo nextest run`:
#   scripts/test.sh -E 'test(partitions)'          some of them
#   scripts/test.sh --run-ignored only -E '...'     the long ones, listed in docs/testing.md
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
. scripts/cargo-env.sh

# The end-to-end tests start the real program, so it is built first.
cargo build --workspace --bins --tests --locked
. scripts/scratch.sh
# More than there are processors: end-to-end tests wait a lot (and .config/nextest.toml says how many of them run at a time).
export NEXTEST_TEST_THREADS=${NEXTEST_TEST_THREADS:-$(($(nproc) + 2))}
exec cargo nextest run --workspace --locked "$@"
