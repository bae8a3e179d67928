#!/usr/bin/env bash
# Sets up the machine, builds Anabranch and shows it: three throwaway servers, three daemons, writes at all
# three, a real conflict and its log line. Arguments go to `anabranch demo`.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
. scripts/cargo-env.sh
cargo build --locked -p anabranch
exec "${CARGO_TARGET_DIR:-target}/debug/anabranch" demo "$@"
