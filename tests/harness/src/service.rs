//! The service that `cargo xtask up --upstream` protects: parsed from its URL, and written into `envoy/minimal.yaml`.

use std::path::PathBuf;

use url::{Host, Position, Url};

use crate::envoy_config::UPSTREAM_ROUTE;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    url: Url,
    host: Host<String>,
    /// The file with the authorities that its certificate is checked against, in PEM; none for plain HTTP.
    authorities: Option<PathBuf>,
}

/// Where operating systems keep the authorities that they trust.
const SYSTEM_AUTHORITIES: [&str; 4] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
];

impl Service {
    pub fn parse(text: &str) -> Result<Self, String> {
        let lower = text.to_ascii_lowercase();
        if !lower.starts_with("http://") && !lower.starts_with("https://") {
            return Err("the URL must begin with http:// or https://, such as http://localhost:3000".into());
        }
        let url = Url::parse(text).map_err(|error| format!("{error}; write a URL such as http://localhost:3000"))?;
        if !url.username().is_empty() || url.password().is_some() {
            return Err("the URL must not name a user or a password; leave out what stands before the @".into());
        }
        if url.path() != "/" || url.query().is_some() || url.fragment().is_some() {
            let base = &url[..Position::AfterPort];
            return Err(format!(
                "the URL must end after the port, since Envoy passes paths on unchanged; write {base}"
            ));
        }
        if url.port() == Some(0) {
            return Err("the port must be 1 to 65535".into());
        }
        let host = url.host().ok_or("the URL names no host")?.to_owned();
        Ok(Self { url, host, authorities: None })
    }

    pub fn is_tls(&self) -> bool {
        self.url.scheme() == "https"
    }

    /// With the authorities that its certificate is checked against: those of this file or, without one, those that the
    /// operating system trusts.
    pub fn trusting(mut self, file: Option<PathBuf>) -> Result<Self, String> {
        self.authorities = match (file, self.is_tls()) {
            (None, false) => None,
            (Some(_), false) => return Err(format!("{} is not checked; it needs an https:// URL", self.url)),
            (Some(file), true) => {
                let found = file.canonicalize();
                Some(found.map_err(|error| format!("{} cannot be read: {error}", file.display()))?)
            }
            (None, true) => {
                let mut known = SYSTEM_AUTHORITIES.iter().map(PathBuf::from);
                let found = known.find(|file| file.is_file());
                Some(found.ok_or("this machine has no list of trusted authorities; name one in a PEM file")?)
            }
        };
        Ok(self)
    }

    /// Its host, without the brackets of an IPv6 address.
    pub fn host(&self) -> String {
        match &self.host {
            Host::Domain(name) => name.clone(),
            Host::Ipv4(address) => address.to_string(),
            Host::Ipv6(address) => address.to_string(),
        }
    }

    pub fn port(&self) -> u16 {
        self.url.port_or_known_default().unwrap_or(80)
    }

    /// The value of `Host` that it is called with: what a client that calls it directly sends.
    pub fn authority(&self) -> &str {
        &self.url[Position::BeforeHost..Position::AfterPort]
    }

    /// Its URL, without the slash at the end.
    pub fn url(&self) -> &str {
        self.url.as_str().trim_end_matches('/')
    }

    /// How a route of Envoy sends a request to it: under its own name, with the name that the client called in
    /// `x-forwarded-host`.
    pub fn route(&self) -> String {
        let authority = self.authority();
        format!("route: {{ cluster: upstream, host_rewrite_literal: \"{authority}\", append_x_forwarded_host: true }}")
    }

    pub fn replacements(&self) -> Vec<(String, String)> {
        let cluster = "    - name: upstream\n      type: STRICT_DNS\n      connect_timeout: 1s\n";
        // A name may have addresses of both families while the service listens on one only. Envoy then tries the other.
        let reached = format!(
            "    - name: upstream\n      type: LOGICAL_DNS\n      dns_lookup_family: ALL\n      connect_timeout: 5s\n{}",
            self.transport_socket()
        );
        let address = "{ address: 127.0.0.1, port_value: 8080 }";
        let host = format!("{{ address: \"{}\", port_value: {} }}", self.host(), self.port());
        // A client could forge it.
        let domains = "                      domains: [\"*\"]\n";
        let clean = format!("{domains}                      request_headers_to_remove: [x-forwarded-host]\n");
        vec![
            (cluster.into(), reached),
            (address.into(), host),
            (domains.into(), clean),
            (UPSTREAM_ROUTE.into(), self.route()),
        ]
    }

    fn transport_socket(&self) -> String {
        let Some(authorities) = &self.authorities else { return String::new() };
        let (sni, kind) = match &self.host {
            Host::Domain(name) => (format!("          sni: \"{name}\"\n"), "DNS"),
            // There is no server name indication for addresses (RFC 6066, section 3).
            Host::Ipv4(_) | Host::Ipv6(_) => (String::new(), "IP_ADDRESS"),
        };
        let context = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext";
        let file = serde_json::Value::from(authorities.display().to_string());
        let host = self.host();
        format!(
            "      transport_socket:
        name: envoy.transport_sockets.tls
        typed_config:
          \"@type\": {context}
{sni}          common_tls_context:
            alpn_protocols: [http/1.1]
            validation_context:
              trusted_ca: {{ filename: {file} }}
              match_typed_subject_alt_names: [{{ san_type: {kind}, matcher: {{ exact: \"{host}\" }} }}]
"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_names_host_port_and_host_header() {
        for (url, host, port, authority) in [
            ("http://localhost:3000", "localhost", 3_000, "localhost:3000"),
            ("HTTP://Localhost:80/", "localhost", 80, "localhost"),
            ("https://api.example.com", "api.example.com", 443, "api.example.com"),
            ("https://192.0.2.7:8443", "192.0.2.7", 8_443, "192.0.2.7:8443"),
            ("http://[::1]:3000", "::1", 3_000, "[::1]:3000"),
        ] {
            let service = Service::parse(url).unwrap();
            assert_eq!((&*service.host(), service.port(), service.authority()), (host, port, authority), "{url}");
            assert_eq!(service.is_tls(), url.starts_with("https"));
        }
    }

    #[test]
    fn what_is_wrong_with_a_url_is_said_with_the_remedy() {
        for (url, why) in [
            ("localhost:3000", "must begin with http:// or https://"),
            ("ftp://localhost", "must begin with http:// or https://"),
            ("http:localhost", "must begin with http:// or https://"),
            ("", "must begin with http:// or https://"),
            ("http://", "empty host; write a URL such as http://localhost:3000"),
            ("http://localhost:99999", "invalid port number; write"),
            ("http://localhost:0", "the port must be 1 to 65535"),
            ("http://a b", "invalid international domain name; write"),
            (
                "http://localhost:3000/api",
                "after the port, since Envoy passes paths on unchanged; write http://localhost:3000",
            ),
            ("http://localhost:3000?a=b", "must end after the port"),
            ("https://ada:secret@localhost", "must not name a user or a password"),
        ] {
            let error = Service::parse(url).unwrap_err();
            assert!(error.contains(why), "{url}: {error}");
            assert!(!error.contains("secret"), "{error}");
        }
        let plain = Service::parse("http://localhost").unwrap();
        assert!(plain.trusting(Some("/etc/hosts".into())).unwrap_err().contains("needs an https:// URL"));
        let secure = Service::parse("https://localhost").unwrap();
        assert!(
            secure.trusting(Some("/nowhere/ca.pem".into())).unwrap_err().contains("/nowhere/ca.pem cannot be read")
        );
    }
}
