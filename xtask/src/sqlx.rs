//! `cargo xtask sqlx` and the step `sqlx`: the descriptions of the control plane's queries (`control-plane/.sqlx`), with
//! which it compiles without a database. They are written, or compared with the committed ones, from a fresh database.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use portcullis_harness::cargo::{cargo, run};
use portcullis_harness::output::{progress, say};
use portcullis_harness::paths;
use portcullis_harness::postgres::Postgres;

pub(crate) async fn write() -> Result<()> {
    let fresh = described().await?;
    let kept = kept();
    let _ = std::fs::remove_dir_all(&kept);
    std::fs::create_dir_all(&kept)?;
    for (name, text) in &fresh {
        std::fs::write(kept.join(name), text)?;
    }
    say(&format!("{}: {} queries", kept.display(), fresh.len()));
    Ok(())
}

/// Fails if the committed descriptions differ from those of the present queries and migrations.
pub(crate) async fn check() -> Result<()> {
    let (fresh, kept) = (described().await?, files(&kept())?);
    let names = fresh.keys().chain(kept.keys());
    let stale: Vec<_> = names.filter(|name| fresh.get(*name) != kept.get(*name)).collect();
    ensure!(stale.is_empty(), "control-plane/.sqlx is out of date ({stale:?}); run `cargo xtask sqlx` and commit it");
    Ok(())
}

fn kept() -> PathBuf {
    paths::workspace().join("control-plane/.sqlx")
}

/// Compiles the control plane against a database that has just been migrated, which writes the descriptions.
async fn described() -> Result<BTreeMap<String, String>> {
    let server = Postgres::private().await?;
    let database = server.create_database().await?;
    let migrations = paths::workspace().join("control-plane/migrations");
    let mut in_order: Vec<_> = files(&migrations)?.into_iter().collect();
    in_order.sort();
    ensure!(!in_order.is_empty(), "{} holds no migrations", migrations.display());
    for (name, sql) in in_order {
        database.execute(&sql).await.with_context(|| format!("migration {name}"))?;
    }
    let home = tempfile::TempDir::new()?;
    progress("compiling the control plane against a live database");
    // By itself, as it is shipped: tests are built with features that it may have forgotten to ask for. They query nothing
    // that is checked.
    let mut check = cargo(&["check", "--locked", "--package", "control-plane"]);
    check.env("DATABASE_URL", &database.url).env("SQLX_OFFLINE", "false").env("SQLX_OFFLINE_DIR", home.path());
    // What is compiled already would not be asked about again: cargo does not know that queries depend on the database.
    let known = paths::target().join("debug/.fingerprint");
    for entry in std::fs::read_dir(&known).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with("control-plane-") {
            std::fs::remove_dir_all(entry.path())?;
        }
    }
    run(check)?;
    let fresh = files(home.path())?;
    if fresh.is_empty() {
        bail!("sqlx described no query");
    }
    Ok(fresh)
}

fn files(directory: &Path) -> Result<BTreeMap<String, String>> {
    let mut files = BTreeMap::new();
    let entries = std::fs::read_dir(directory).with_context(|| format!("cannot read {}", directory.display()))?;
    for entry in entries {
        let entry = entry?;
        files.insert(entry.file_name().to_string_lossy().into_owned(), std::fs::read_to_string(entry.path())?);
    }
    Ok(files)
}
