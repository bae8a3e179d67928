# Sourced: finds a Rust that was installed by rustup but is not on PATH yet.
if [ -f "${CARGO_HOME:-$HOME/.cargo}/env" ]; then
    . "${CARGO_HOME:-$HOME/.cargo}/env"
fi
