//! Prometheus and Grafana beside the stack of `cargo xtask up --observe`, with the alerts and dashboards of `deploy/`.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use clap::Args;
use portcullis_harness::log::Log;
use portcullis_harness::output::progress;
use portcullis_harness::process::{Process, Signal};
use portcullis_harness::tools::on_path;
use portcullis_harness::wait::DEADLINE;
use portcullis_harness::{http, paths};

#[derive(Args)]
pub(crate) struct ObserveOptions {
    /// Also start Prometheus, with the alerts of deploy/prometheus, and Grafana, with the dashboards of deploy/grafana, if
    /// this machine has it.
    #[arg(long)]
    observe: bool,
    /// Port of Prometheus. Debian's package runs a Prometheus of its own on 9090.
    #[arg(long, value_name = "PORT", default_value_t = 9_091, requires = "observe")]
    prometheus_port: u16,
    /// Port of Grafana.
    #[arg(long, value_name = "PORT", default_value_t = 3_001, requires = "observe")]
    grafana_port: u16,
}

/// The programs that this machine has.
pub(crate) struct Programs {
    prometheus: PathBuf,
    grafana: Option<PathBuf>,
}

impl ObserveOptions {
    /// The ports in use, with their flags.
    pub(crate) fn ports(&self) -> Vec<(&'static str, u16)> {
        let ports = [("--prometheus-port", self.prometheus_port), ("--grafana-port", self.grafana_port)];
        ports.into_iter().filter(|_| self.observe).collect()
    }

    /// Finds the programs. None without `--observe`. Fails if there is no Prometheus.
    pub(crate) fn programs(&self) -> Result<Option<Programs>> {
        if !self.observe {
            return Ok(None);
        }
        let prometheus = on_path("prometheus").context(
            "--observe needs the program prometheus in PATH; install it: `apt-get install prometheus` on Debian and \
             Ubuntu, `brew install prometheus` on macOS, https://prometheus.io/download elsewhere",
        )?;
        let grafana = on_path("grafana").or_else(|| on_path("grafana-server"));
        if grafana.is_none() {
            progress(
                "there is no program grafana or grafana-server in PATH, so Grafana is not started; import the files of \
                 deploy/grafana into a Grafana that you have",
            );
        }
        Ok(Some(Programs { prometheus, grafana }))
    }
}

/// The running programs. Fields are dropped in their order.
pub(crate) struct Observers {
    grafana: Option<(Process, SocketAddr)>,
    prometheus: (Process, SocketAddr),
}

impl Observers {
    /// Starts the programs, with their data below `home`, and waits until they answer.
    pub(crate) async fn start(
        options: &ObserveOptions,
        programs: Programs,
        home: &Path,
        targets: Targets,
    ) -> Result<Self> {
        let listen = |port| SocketAddr::new(targets.envoy.ip(), port);
        progress("starting Prometheus");
        let prometheus = start_prometheus(&programs.prometheus, listen(options.prometheus_port), home, targets).await?;
        let grafana = match programs.grafana {
            None => None,
            Some(program) => {
                progress("starting Grafana");
                Some(start_grafana(&program, listen(options.grafana_port), prometheus.1, home).await?)
            }
        };
        Ok(Self { grafana, prometheus })
    }

    /// Fails if one of them has ended.
    pub(crate) fn must_run(&self) -> Result<()> {
        self.grafana.as_ref().map_or(Ok(()), |(process, _)| process.must_run())?;
        self.prometheus.0.must_run()
    }

    pub(crate) async fn stop(self) {
        if let Some((grafana, _)) = self.grafana {
            let _ = grafana.stop(Signal::SIGTERM).await;
        }
        let _ = self.prometheus.0.stop(Signal::SIGTERM).await;
    }

    /// The addresses, for the user.
    pub(crate) fn introduction(&self) -> String {
        let prometheus = self.prometheus.1;
        let mut lines =
            format!("\n  Prometheus        http://{prometheus}           alerts at http://{prometheus}/alerts");
        if let Some((_, address)) = &self.grafana {
            let line = format!(
                "\n  Grafana           http://{address}           dashboards at /d/portcullis-operator and \
                 /d/portcullis-api-owner"
            );
            lines.push_str(&line);
        }
        lines
    }
}

/// What Prometheus reads.
#[derive(Clone, Copy)]
pub(crate) struct Targets {
    /// Envoy's admin interface.
    pub(crate) envoy: SocketAddr,
    pub(crate) control_plane: SocketAddr,
}

async fn start_prometheus(
    program: &Path,
    listen: SocketAddr,
    home: &Path,
    targets: Targets,
) -> Result<(Process, SocketAddr)> {
    let deploy = paths::workspace().join("deploy/prometheus");
    let template = std::fs::read_to_string(deploy.join("prometheus.yaml"))?;
    let directory = home.join("prometheus");
    std::fs::create_dir_all(&directory)?;
    let file = directory.join("prometheus.yaml");
    std::fs::write(&file, configuration(&template, &deploy.join("alerts.yaml"), targets)?)?;

    let mut command = Command::new(program);
    command.arg("--config.file").arg(&file).arg("--storage.tsdb.path").arg(directory.join("data"));
    command.arg("--web.listen-address").arg(listen.to_string());
    let log = Log::create(&home.join("prometheus.log"))?;
    let process = Process::spawn("Prometheus", command, &log, Signal::SIGTERM)?;
    answers(&process, "Prometheus", listen, "/-/ready").await?;
    Ok((process, listen))
}

/// `deploy/prometheus/prometheus.yaml` with the addresses of this stack and the path of the rules.
fn configuration(template: &str, rules: &Path, targets: Targets) -> Result<String> {
    let rules = serde_json::Value::from(rules.display().to_string()).to_string();
    let replacements = [
        ("alerts.yaml", rules),
        ("127.0.0.1:9901", targets.envoy.to_string()),
        ("127.0.0.1:8081", targets.control_plane.to_string()),
    ];
    let mut replaced = 0;
    let mut text = String::new();
    // At most one replacement for each line: an address of this stack may be that of another job in the template.
    for line in template.lines() {
        let setting = line.trim_start().starts_with('-');
        match replacements.iter().find(|(from, _)| setting && line.contains(from)) {
            Some((from, to)) => {
                replaced += 1;
                text.push_str(&line.replace(from, to));
            }
            None => text.push_str(line),
        }
        text.push('\n');
    }
    ensure!(replaced == replacements.len(), "deploy/prometheus/prometheus.yaml lacks an address or the rules");
    Ok(text)
}

async fn start_grafana(
    program: &Path,
    listen: SocketAddr,
    prometheus: SocketAddr,
    home: &Path,
) -> Result<(Process, SocketAddr)> {
    let directory = home.join("grafana");
    let provisioning = directory.join("provisioning");
    for (kind, text) in [("datasources", data_sources(prometheus)), ("dashboards", dashboards())] {
        let directory = provisioning.join(kind);
        std::fs::create_dir_all(&directory)?;
        std::fs::write(directory.join("portcullis.yaml"), text)?;
    }
    let mut command = Command::new(program);
    if program.ends_with("grafana") {
        command.arg("server");
    }
    if let Some(home) = grafana_home(program) {
        command.arg("--homepath").arg(home);
    }
    let data = directory.join("data");
    command.env("GF_PATHS_DATA", &data).env("GF_PATHS_LOGS", data.join("log"));
    command.env("GF_PATHS_PLUGINS", data.join("plugins")).env("GF_PATHS_PROVISIONING", &provisioning);
    command.env("GF_SERVER_HTTP_ADDR", listen.ip().to_string());
    command.env("GF_SERVER_HTTP_PORT", listen.port().to_string());
    // Grafana listens on this machine only, so it needs no sign-in.
    command.env("GF_AUTH_ANONYMOUS_ENABLED", "true").env("GF_AUTH_ANONYMOUS_ORG_ROLE", "Admin");
    for report in ["REPORTING_ENABLED", "CHECK_FOR_UPDATES", "CHECK_FOR_PLUGIN_UPDATES"] {
        command.env(format!("GF_ANALYTICS_{report}"), "false");
    }
    let log = Log::create(&home.join("grafana.log"))?;
    let process = Process::spawn("Grafana", command, &log, Signal::SIGTERM)?;
    answers(&process, "Grafana", listen, "/api/health").await?;
    Ok((process, listen))
}

/// The directory with Grafana's defaults: that of the archive, of the packages, or of Homebrew. Without one, Grafana looks
/// in the current directory.
fn grafana_home(program: &Path) -> Option<PathBuf> {
    let installed = program.canonicalize().ok()?;
    let above = installed.parent()?.parent()?;
    let known = [above.to_owned(), above.join("share/grafana"), "/usr/share/grafana".into()];
    known.into_iter().find(|home| home.join("conf/defaults.ini").is_file())
}

fn data_sources(prometheus: SocketAddr) -> String {
    format!(
        "apiVersion: 1
datasources:
  - name: Prometheus
    uid: portcullis
    type: prometheus
    access: proxy
    url: http://{prometheus}
    isDefault: true
"
    )
}

fn dashboards() -> String {
    let directory = serde_json::Value::from(paths::workspace().join("deploy/grafana").display().to_string());
    format!(
        "apiVersion: 1
providers:
  - name: portcullis
    folder: Portcullis
    type: file
    options: {{path: {directory}}}
"
    )
}

/// Waits until a program answers with 200.
async fn answers(process: &Process, name: &str, address: SocketAddr, path: &str) -> Result<()> {
    let ready = async || http::get(address, path).await.ok().filter(|reply| reply.status == 200).map(|_| ());
    process.eventually_within(&format!("{name} to be ready"), DEADLINE, ready).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_names_the_addresses_of_the_stack_and_the_rules() {
        let template = std::fs::read_to_string(paths::workspace().join("deploy/prometheus/prometheus.yaml")).unwrap();
        // Each address is that of the other job in the template.
        let targets =
            Targets { envoy: "127.0.0.1:8081".parse().unwrap(), control_plane: "127.0.0.1:9901".parse().unwrap() };
        let text = configuration(&template, Path::new("/a b/alerts.yaml"), targets).unwrap();
        let settings: Vec<_> = text.lines().map(str::trim).filter(|line| line.starts_with('-')).collect();
        let expected = [
            "- \"/a b/alerts.yaml\"",
            "- job_name: portcullis-envoy",
            "- targets: [\"127.0.0.1:8081\"]",
            "- job_name: portcullis-control-plane",
            "- targets: [\"127.0.0.1:9901\"]",
        ];
        assert_eq!(settings, expected);
        let error = configuration("rule_files: []", Path::new("/alerts.yaml"), targets).unwrap_err();
        assert!(error.to_string().contains("prometheus.yaml lacks"), "{error}");
    }
}
