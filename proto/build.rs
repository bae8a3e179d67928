//! Compiles the link and admin protocols without an installed `protoc`.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    if std::env::var_os("CARGO_FEATURE_TRANSPORT").is_none() {
        return Ok(());
    }
    let files = protox::compile(["proto/link.proto", "proto/admin.proto"], ["proto"])?;
    let mut prost = tonic_prost_build::Config::new();
    prost.bytes(["."]);
    tonic_prost_build::configure().compile_fds_with_config(files, prost)?;
    Ok(())
}
