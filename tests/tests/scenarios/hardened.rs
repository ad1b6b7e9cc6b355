//! `envoy/hardened.yaml`: TLS for clients and mutual TLS to the control plane. Everything that
//! works with `minimal.yaml` works there, and neither side accepts an invalid certificate.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;
use contract::outcome::Outcome;
use portcullis_tests::certificates::{Authority, For, Identity};
use portcullis_tests::control_plane::{self, ControlPlane};
use portcullis_tests::envoy::{self, Envoy};
use portcullis_tests::envoy_config::Replacements;
use portcullis_tests::expect::{IDENTITY, assert_refused, assert_upstream};
use portcullis_tests::http::{Outgoing, Reply, get_request};
use portcullis_tests::log::Log;
use portcullis_tests::ports::LOCAL;
use portcullis_tests::process::Signal;
use portcullis_tests::stack::Stack;
use portcullis_tests::tls::Client;
use portcullis_tests::tools::silently;
use portcullis_tests::wait::eventually;

use crate::cors;

const CONTROL_PLANE: &str = "portcullis-control-plane";
const API: &str = "api.example.com";
const HEAP: &str = "heap/full";

/// A stack whose Envoy and control plane speak TLS. A second control plane in the clear is there for the test to manage
/// keys with.
struct Hardened {
    envoy: Envoy,
    home: PathBuf,
    control_plane: ControlPlane,
    stack: Stack,
    authorities: Authorities,
}

/// Who vouches for whom.
struct Authorities {
    public: Authority,
    control_plane: Authority,
    envoys: Authority,
}

/// A control plane with this certificate, over the database of the stack.
async fn control_plane_with(
    stack: &Stack,
    identity: &Identity,
    clients: &Authority,
    name: &str,
) -> Result<ControlPlane> {
    let home = stack.directory().join(name);
    std::fs::create_dir_all(&home)?;
    let (certificate, key) = identity.write(&home, "control-plane")?;
    let client_ca = home.join("client-ca.pem");
    std::fs::write(&client_ca, &clients.certificate)?;
    let mut arguments = Vec::new();
    for (setting, file) in
        [("--tls-cert-file", certificate), ("--tls-key-file", key), ("--tls-client-ca-file", client_ca)]
    {
        arguments.extend([setting.to_owned(), file.display().to_string()]);
    }
    let settings = control_plane::Settings { listen: LOCAL, arguments, ..stack.control_plane.settings() };
    let control_plane = ControlPlane::prepare(settings, &home, Log::create(&home.join("control-plane.log"))?);
    control_plane.launch().await?;
    Ok(control_plane)
}

impl Hardened {
    /// Started, with a key that works.
    async fn with_key() -> Result<(Self, String)> {
        let authorities = Authorities {
            public: Authority::new("public")?,
            control_plane: Authority::new("control planes")?,
            envoys: Authority::new("Envoys")?,
        };
        let stack = Stack::builder().envoys(0).start().await?;
        let identity = authorities.control_plane.issue(&[CONTROL_PLANE], For::Servers)?;
        let control_plane = control_plane_with(&stack, &identity, &authorities.envoys, "secure").await?;
        let home = stack.directory().join("hardened");
        std::fs::create_dir_all(home.join("tls"))?;
        authorities.public.issue(&[API], For::Servers)?.write(&home.join("tls"), "ingress")?;
        authorities.envoys.issue(&["envoy-1"], For::Clients)?.write(&home.join("tls"), "envoy")?;
        std::fs::write(home.join("tls/control-plane-ca.pem"), &authorities.control_plane.certificate)?;
        let replacements = Replacements::between(control_plane.address(), stack.demo.address());
        let settings = envoy::Settings::new(replacements, stack.control_plane.settings().sync_key);
        let log = Log::create(&home.join("envoy.log"))?;
        let envoy = Envoy::prepare(settings, &home, log, &silently)?.with_template("hardened.yaml");
        envoy.restart().await?;
        let hardened = Self { envoy, home, control_plane, stack, authorities };
        let key = hardened.stack.rest().generate("ada@example.com").await?;
        hardened.wait_for(&key, 200).await?;
        Ok((hardened, key))
    }

    /// Writes the fill level of Envoy's heap into the file [`HEAP`]. Envoy reads it again when another file is renamed to it.
    fn fill_heap(&self, part: &str) -> Result<()> {
        let next = self.home.join("next");
        std::fs::write(&next, part)?;
        Ok(std::fs::rename(next, self.home.join(HEAP))?)
    }

    async fn get(&self, protocol: &str, key: Option<&str>) -> Result<Reply> {
        self.send(protocol, get_request("/orders", key)?).await
    }

    async fn send(&self, protocol: &str, request: Outgoing) -> Result<Reply> {
        let client = Client::new(&self.authorities.public.certificate, None, &[protocol])?;
        let (reply, spoken) = client.send(self.envoy.address(), API, request).await?;
        assert_eq!(spoken, protocol);
        Ok(reply)
    }

    async fn wait_for(&self, key: &str, status: u16) -> Result<()> {
        let seen = async || (self.get("h2", Some(key)).await.ok()?.status == status).then_some(());
        eventually(&format!("status {status}"), seen).await
    }

    /// Restarts Envoy, which then has no keys; a statistic shows the reason.
    async fn stays_without_keys(&self, key: &str, reason: &str) -> Result<()> {
        self.envoy.stop(Signal::SIGKILL).await?;
        self.envoy.restart().await?;
        self.envoy.wait_for_stat(&format!("cluster.portcullis_control_plane.{reason}"), |now| now > 1).await?;
        assert_refused(&self.get("h2", Some(key)).await?, Outcome::NotReady, &[]);
        Ok(())
    }
}

#[tokio::test]
async fn a_key_works_is_counted_and_revoked_over_tls_and_mutual_tls() -> Result<()> {
    let (hardened, key) = Hardened::with_key().await?;
    let rest = hardened.stack.rest();
    for protocol in ["h2", "http/1.1"] {
        let received = assert_upstream(&hardened.get(protocol, Some(&key)).await?, &IDENTITY);
        assert_eq!(received["x-forwarded-proto"][0], "https");
        assert_refused(&hardened.get(protocol, None).await?, Outcome::Missing, &[]);
    }
    hardened.stack.wait_for_usage("ada@example.com", hardened.stack.demo.requests()).await?;

    // Browsers and load balancers are answered without a key.
    for protocol in ["h2", "http/1.1"] {
        cors::assert_allowed(&hardened.send(protocol, cors::preflight(cors::ORIGIN)?).await?);
        assert_eq!(hardened.send(protocol, get_request("/healthz", None)?).await?.status, 200);
    }

    // Plain HTTP gets no answer, on either side.
    let plain = get_request("/", Some(&key))?;
    assert!(portcullis_tests::http::send(hardened.envoy.address(), plain).await.is_err());
    assert!(portcullis_tests::http::get(hardened.control_plane.address(), "/healthz").await.is_err());

    // The last report of an Envoy that ends arrives through TLS, or stands in its log.
    for _ in 0..5 {
        assert_upstream(&hardened.get("h2", Some(&key)).await?, &IDENTITY);
    }
    hardened.envoy.stop(Signal::SIGTERM).await?;
    hardened.control_plane.import_usage(&hardened.envoy.log().text())?;
    hardened.stack.wait_for_usage("ada@example.com", hardened.stack.demo.requests()).await?;
    hardened.envoy.restart().await?;
    hardened.wait_for(&key, 200).await?;

    // What an application server may read otherwise than Envoy does not reach it.
    for path in ["/;x/orders", "/a/%2e%2e;/orders", "/orders;v=1?a=b"] {
        let reply = hardened.send("h2", get_request(path, Some(&key))?).await?;
        assert_eq!((reply.status, &reply.body[..]), (400, &b"Semicolons are not served here."[..]), "{path}");
        assert_refused(&hardened.send("http/1.1", get_request(path, None)?).await?, Outcome::Missing, &[]);
    }
    let mut request = get_request("/orders?page=1;2", Some(&key))?;
    for name in ["x-original-url", "x-rewrite-url", "x-http-method-override", "x-http-method", "x-method-override"] {
        request.headers_mut().insert(name, "/admin".parse()?);
    }
    assert_upstream(&hardened.send("h2", request).await?, &IDENTITY);

    rest.revoke("ada@example.com").await?;
    hardened.wait_for(&key, 401).await?;
    assert_refused(&hardened.get("http/1.1", Some(&key)).await?, Outcome::Revoked, &[]);
    Ok(())
}

#[tokio::test]
async fn neither_side_believes_the_other_without_a_good_certificate() -> Result<()> {
    let (hardened, key) = Hardened::with_key().await?;
    let (stack, authorities) = (&hardened.stack, &hardened.authorities);

    // Somebody who has the database and the address, but a certificate of another authority; or of the right one for
    // another name.
    for (identity, reason) in [
        (Authority::new("false")?.issue(&[CONTROL_PLANE], For::Servers)?, "ssl.fail_verify_error"),
        (authorities.control_plane.issue(&["other.example.com"], For::Servers)?, "ssl.fail_verify_san"),
    ] {
        let pretender = control_plane_with(stack, &identity, &authorities.envoys, "pretender").await?;
        hardened.envoy.change_settings(|settings| settings.replacements.control_plane = pretender.address());
        hardened.stays_without_keys(&key, reason).await?;
    }

    // The right control plane answers no Envoy without a certificate of its authority.
    hardened.envoy.change_settings(|settings| settings.replacements.control_plane = hardened.control_plane.address());
    let good = std::fs::read_to_string(hardened.home.join("tls/envoy.pem"))?;
    let good = Identity { certificate: good, key: std::fs::read_to_string(hardened.home.join("tls/envoy.key"))? };
    Authority::new("false")?.issue(&["envoy-1"], For::Clients)?.write(&hardened.home.join("tls"), "envoy")?;
    hardened.stays_without_keys(&key, "upstream_cx_destroy_remote_with_active_rq").await?;

    good.write(&hardened.home.join("tls"), "envoy")?;
    hardened.envoy.stop(Signal::SIGKILL).await?;
    hardened.envoy.restart().await?;
    hardened.wait_for(&key, 200).await
}

/// The book says that a request goes on that was admitted before its key was revoked, and what bounds it.
#[tokio::test]
async fn a_request_that_outlives_its_key_ends_with_the_longest_duration_of_a_stream() -> Result<()> {
    let (hardened, key) = Hardened::with_key().await?;
    let rest = hardened.stack.rest();
    hardened.envoy.stop(Signal::SIGTERM).await?;
    let shorten = |s: &mut envoy::Settings| s.replacements.edit("max_stream_duration: 900s", "max_stream_duration: 2s");
    hardened.envoy.change_settings(shorten);
    hardened.envoy.restart().await?;
    hardened.wait_for(&key, 200).await?;

    let admitted = hardened.stack.demo.requests();
    // Longer than the test; the route's own time limit is a minute.
    hardened.stack.demo.set_delay(Duration::from_secs(50));
    let revoke = async {
        let there = async || (hardened.stack.demo.requests() > admitted).then_some(());
        eventually("the request to reach the upstream", there).await?;
        rest.revoke("ada@example.com").await
    };
    let (reply, revoked) = tokio::join!(hardened.get("h2", Some(&key)), revoke);
    revoked?;
    let reply = reply?;
    assert_eq!((reply.status, &reply.body[..]), (504, &b"downstream duration timeout"[..]));
    assert_eq!(hardened.envoy.stat("http.ingress.downstream_rq_max_duration_reached").await?, 1);
    Ok(())
}

/// Before the heap is full, requests are refused, then connections; what has not come in cannot fill it further.
#[tokio::test]
async fn an_envoy_whose_memory_runs_out_refuses_and_then_goes_on() -> Result<()> {
    let (hardened, key) = Hardened::with_key().await?;
    std::fs::create_dir_all(hardened.home.join("heap"))?;
    hardened.fill_heap("0.5")?;
    hardened.envoy.stop(Signal::SIGTERM).await?;
    hardened.envoy.change_settings(|settings| {
        settings.replacements.edit("fixed_heap.v3.FixedHeapConfig", "injected_resource.v3.InjectedResourceConfig");
        settings.replacements.edit("max_heap_size_bytes: 1073741824", &format!("filename: {HEAP}"));
    });
    hardened.envoy.restart().await?;
    hardened.wait_for(&key, 200).await?;

    for (part, refused) in [("0.96", true), ("0.7", false)] {
        hardened.fill_heap(part)?;
        let active = "overload.envoy.overload_actions.stop_accepting_requests.active";
        hardened.envoy.wait_for_stat(active, |now| now == u64::from(refused)).await?;
        if refused {
            // Workers notice it a little later.
            hardened.wait_for(&key, 503).await?;
            let before = hardened.stack.demo.requests();
            for protocol in ["h2", "http/1.1"] {
                assert_eq!(hardened.get(protocol, Some(&key)).await?.status, 503);
            }
            assert_eq!(hardened.stack.demo.requests(), before);
        } else {
            hardened.wait_for(&key, 200).await?;
        }
    }
    // What the filter holds was not touched.
    hardened.stack.rest().revoke("ada@example.com").await?;
    hardened.wait_for(&key, 401).await
}

/// What one request may hold is bounded: 64 headers, 32 KiB of them.
#[tokio::test]
async fn more_headers_than_anybody_needs_are_refused_before_the_filter_sees_them() -> Result<()> {
    let (hardened, key) = Hardened::with_key().await?;
    let with = |headers: usize, bytes: usize| {
        let mut request = get_request("/orders", Some(&key))?;
        for number in 0..headers {
            request.headers_mut().insert(axum::http::HeaderName::try_from(format!("x-{number}"))?, "1".parse()?);
        }
        request.headers_mut().insert("x-long", "x".repeat(bytes).parse()?);
        Ok::<_, anyhow::Error>(request)
    };
    assert_eq!(hardened.send("http/1.1", with(40, 20_000)?).await?.status, 200);
    let before = hardened.stack.demo.requests();
    for (headers, bytes) in [(70, 1), (1, 33_000)] {
        assert_eq!(hardened.send("http/1.1", with(headers, bytes)?).await?.status, 431, "{headers} {bytes}");
        // Over HTTP/2 the stream is reset, or answered so.
        let reply = hardened.send("h2", with(headers, bytes)?).await;
        assert!(reply.as_ref().map_or(true, |reply| reply.status == 431), "{reply:?}");
    }
    assert_eq!(hardened.stack.demo.requests(), before);
    assert_upstream(&hardened.get("h2", Some(&key)).await?, &IDENTITY);
    Ok(())
}
