//! Envoy accepts every file of the directory `envoy` as it is shipped.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use portcullis_tests::certificates::{Authority, For, TokenIssuer};
use portcullis_tests::control_plane::fresh_key;
use portcullis_tests::{paths, tools};
use tempfile::TempDir;

#[test]
fn envoy_takes_every_configuration_as_it_is_shipped() -> Result<()> {
    let home = TempDir::with_prefix("portcullis-")?;
    std::fs::copy(paths::wasm(), home.path().join("portcullis.wasm")).context("the filter; run `cargo xtask wasm`")?;
    let tls = home.path().join("tls");
    std::fs::create_dir_all(&tls)?;
    let authority = Authority::new("any")?;
    authority.issue(&["api.example.com"], For::Servers)?.write(&tls, "ingress")?;
    authority.issue(&["envoy-1"], For::Clients)?.write(&tls, "envoy")?;
    std::fs::write(tls.join("control-plane-ca.pem"), &authority.certificate)?;
    std::fs::write(home.path().join("jwks.json"), TokenIssuer::new()?.jwks().to_string())?;
    let binary = tools::envoy(&tools::silently)?;
    let mut taken = Vec::new();
    for file in std::fs::read_dir(paths::workspace().join("envoy"))? {
        let file = file?.path();
        if file.extension().is_none_or(|kind| kind != "yaml") {
            continue;
        }
        let output = Command::new(&binary)
            .args(["--mode", "validate", "--use-dynamic-base-id", "-l", "error", "-c"])
            .arg(&file)
            .current_dir(home.path())
            .env("PORTCULLIS_SYNC_KEY", fresh_key()?.reveal())
            .output()?;
        let output_text =
            [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
        ensure!(output.status.success(), "{} refuses {}: {output_text}", binary.display(), file.display());
        taken.extend(file.file_name().map(|name| name.to_string_lossy().into_owned()));
    }
    taken.sort();
    assert_eq!(taken, ["existing.yaml", "hardened.yaml", "minimal.yaml"]);
    Ok(())
}
