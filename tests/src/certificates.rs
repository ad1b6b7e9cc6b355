//! Certificates and JWTs for tests, made on demand.

use std::path::{Path, PathBuf};

use anyhow::Result;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    PKCS_ED25519, SigningKey,
};
use serde_json::{Value, json};

#[derive(Debug)]
pub struct Authority {
    /// Its own certificate, in PEM.
    pub certificate: String,
    issuer: Issuer<'static, KeyPair>,
}

/// A certificate and its private key, in PEM.
#[derive(Clone, Debug)]
pub struct Identity {
    pub certificate: String,
    pub key: String,
}

#[derive(Clone, Copy, Debug)]
pub enum For {
    Servers,
    Clients,
}

impl Authority {
    pub fn new(name: &str) -> Result<Self> {
        let mut params = CertificateParams::new(Vec::new())?;
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate()?;
        let certificate = params.self_signed(&key)?.pem();
        Ok(Self { certificate, issuer: Issuer::new(params, key) })
    }

    /// A certificate for these DNS names.
    pub fn issue(&self, names: &[&str], purpose: For) -> Result<Identity> {
        let mut params = CertificateParams::new(names.iter().map(ToString::to_string).collect::<Vec<_>>())?;
        params.distinguished_name.push(DnType::CommonName, names.first().copied().unwrap_or("nobody"));
        params.extended_key_usages = vec![match purpose {
            For::Servers => ExtendedKeyUsagePurpose::ServerAuth,
            For::Clients => ExtendedKeyUsagePurpose::ClientAuth,
        }];
        let key = KeyPair::generate()?;
        Ok(Identity { certificate: params.signed_by(&key, &self.issuer)?.pem(), key: key.serialize_pem() })
    }
}

impl Identity {
    /// Writes `NAME.pem` and `NAME.key` into a directory, and returns their paths.
    pub fn write(&self, directory: &Path, name: &str) -> Result<(PathBuf, PathBuf)> {
        let (certificate, key) = (directory.join(format!("{name}.pem")), directory.join(format!("{name}.key")));
        std::fs::write(&certificate, &self.certificate)?;
        std::fs::write(&key, &self.key)?;
        Ok((certificate, key))
    }
}

/// An issuer of JWTs (RFC 7519).
#[derive(Debug)]
pub struct TokenIssuer(KeyPair);

impl TokenIssuer {
    pub fn new() -> Result<Self> {
        Ok(Self(KeyPair::generate_for(&PKCS_ED25519)?))
    }

    /// Its public key as a set of keys (RFC 7517, RFC 8037).
    pub fn jwks(&self) -> Value {
        let public = URL_SAFE_NO_PAD.encode(self.0.public_key_raw());
        json!({"keys": [{"kty": "OKP", "crv": "Ed25519", "alg": "EdDSA", "use": "sig", "kid": "1", "x": public}]})
    }

    pub fn token(&self, claims: &Value) -> Result<String> {
        let header = json!({"alg": "EdDSA", "kid": "1", "typ": "JWT"});
        let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let signed = format!("{}.{}", part(&header), part(claims));
        let signature = self.0.sign(signed.as_bytes())?;
        Ok(format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature)))
    }
}
