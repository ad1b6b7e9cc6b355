//! Usage reports in Envoy's log: a signed line with the reports of an Envoy that were not acknowledged.
//!
//! Clients can write into a log too, if an access log prints a request header. A line therefore has an HMAC-SHA-256
//! (RFC 2104). Its key is derived from the sync key and not from the hash of it, since the database and every filter have the
//! hashes of all keys. The control plane gets the sync key in each call of the filter and stores the derived key, which
//! reveals neither the sync key nor its hash.
//!
//! ```text
//! portcullis-usage <HMAC, 64 hexadecimal digits> <reports, hexadecimal>
//! ```

use std::fmt;

use hmac::{Hmac, KeyInit, Mac};
use sha2::{Digest, Sha256};
use zeroize::Zeroize;

/// The start of a line, after the prefix that Envoy adds.
pub const MARK: &str = "portcullis-usage ";

/// Bytes of a log key, of a signature and of a digest.
pub const LOG_KEY_BYTES: usize = 32;

/// Input of the derivation. Each use of a key has its own input, so that no result can be used for another purpose.
const DERIVATION: &[u8] = b"portcullis: key of usage lines in a log, 1";
/// Input of the signature, before the digest.
const SIGNATURE: &[u8] = b"portcullis: usage reports in a log, 1";

/// The key that signs usage lines, zeroed when it is dropped. `Debug` prints nothing of it.
#[derive(Clone, PartialEq, Eq)]
pub struct LogKey([u8; LOG_KEY_BYTES]);

/// The reports of a line and its signature, which is not verified yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SignedReports {
    signature: [u8; LOG_KEY_BYTES],
    digest: [u8; LOG_KEY_BYTES],
    /// The encoded reports, for [`read_reports`](crate::usage::read_reports).
    pub reports: Vec<u8>,
}

/// Why a line cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LineError {
    /// The line does not start with a signature of 64 hexadecimal digits.
    #[error("the line has no signature: it was cut short, or a filter did not write it")]
    Signature,
    /// The reports are not hexadecimal digits up to the end of the line.
    #[error("the reports are not hexadecimal digits up to the end of the line")]
    Reports,
}

impl LogKey {
    /// Derives the key from the sync key.
    #[must_use]
    pub fn derive(sync_key: &[u8]) -> Self {
        Self(mac(sync_key, &[DERIVATION]).map_or([0; LOG_KEY_BYTES], |mac| mac.finalize().into_bytes().into()))
    }

    /// A key that was derived before.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; LOG_KEY_BYTES]) -> Self {
        Self(bytes)
    }

    /// The bytes of the key, for storage.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; LOG_KEY_BYTES] {
        &self.0
    }

    /// The line with these reports, as [`write_reports`](crate::usage::write_reports) encoded them.
    #[must_use]
    pub fn line(&self, reports: &[u8]) -> String {
        let signature = self.mac(&Sha256::digest(reports).into()).map(|mac| hex::encode(mac.finalize().into_bytes()));
        format!("{MARK}{} {}", signature.unwrap_or_default(), hex::encode(reports))
    }

    /// Whether this key made the signature. The comparison takes constant time.
    #[must_use]
    pub fn has_signed(&self, signed: &SignedReports) -> bool {
        self.mac(&signed.digest).is_some_and(|mac| mac.verify_slice(&signed.signature).is_ok())
    }

    /// Signs the digest and not the reports, so that trying many keys on a long line is cheap.
    fn mac(&self, digest: &[u8; LOG_KEY_BYTES]) -> Option<Hmac<Sha256>> {
        mac(&self.0, &[SIGNATURE, digest])
    }
}

impl SignedReports {
    /// Parses the line after the [`MARK`].
    ///
    /// # Errors
    /// Each variant of [`LineError`].
    pub fn parse(text: &[u8]) -> Result<Self, LineError> {
        let (digits, rest) = text.split_at_checked(2 * LOG_KEY_BYTES).ok_or(LineError::Signature)?;
        let mut signature = [0; LOG_KEY_BYTES];
        hex::decode_to_slice(digits, &mut signature).map_err(|_| LineError::Signature)?;
        let reports = rest.strip_prefix(b" ").ok_or(LineError::Signature)?;
        let reports = hex::decode(reports).map_err(|_| LineError::Reports)?;
        Ok(Self { signature, digest: Sha256::digest(&reports).into(), reports })
    }
}

/// The HMAC of all parts. Never `None`, since HMAC accepts keys of any length.
fn mac(key: &[u8], parts: &[&[u8]]) -> Option<Hmac<Sha256>> {
    let mut mac = <Hmac<Sha256> as KeyInit>::new_from_slice(key).ok()?;
    parts.iter().for_each(|part| mac.update(part));
    Some(mac)
}

impl Drop for LogKey {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl fmt::Debug for LogKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LogKey(…)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<SignedReports, LineError> {
        SignedReports::parse(line.strip_prefix(MARK).unwrap().as_bytes())
    }

    #[test]
    fn the_signature_is_hmac_sha_256_of_the_digest_under_the_derived_key() {
        // key=$(printf 'portcullis: key of usage lines in a log, 1' | openssl sha256 -hmac sk -binary | xxd -p -c 99)
        // (printf 'portcullis: usage reports in a log, 1'; printf abc | openssl sha256 -binary) |
        //     openssl sha256 -mac hmac -macopt hexkey:$key
        let expected = "portcullis-usage 8502ef62de5050ebdab1d14f76aecabdddc4d50ccb41bf5e2eedc2d7b67898bf 616263";
        assert_eq!(LogKey::derive(b"sk").line(b"abc"), expected);
    }

    #[test]
    fn only_the_key_that_signed_a_line_verifies_it_and_only_as_it_was() {
        let (ours, other) = (LogKey::derive(b"sk_live_ours"), LogKey::derive(b"sk_live_other"));
        let line = ours.line(b"reports");
        let signed = parsed(&line).unwrap();
        assert_eq!(signed.reports, b"reports");
        assert!(ours.has_signed(&signed) && !other.has_signed(&signed));
        // Others may know the hash, which every filter has, and the derived key. Neither signs as a sync key.
        let hash = crate::hash::KeyHash::of(b"sk_live_ours");
        for wrong in [LogKey::derive(&hash.0), LogKey::from_bytes(hash.0), LogKey::derive(ours.as_bytes())] {
            assert!(!wrong.has_signed(&signed));
        }
        for place in MARK.len()..line.len() {
            let mut changed = line.clone().into_bytes();
            changed[place] = if changed[place] == b'0' { b'1' } else { b'0' };
            let changed = parsed(std::str::from_utf8(&changed).unwrap());
            assert!(!changed.is_ok_and(|signed| ours.has_signed(&signed)), "byte {place}");
        }
    }

    #[test]
    fn a_line_that_was_cut_or_has_more_text_is_refused() {
        let line = LogKey::derive(b"sk").line(b"abc");
        assert_eq!(parsed(&line[..MARK.len() + 63]), Err(LineError::Signature));
        assert_eq!(parsed(&line[..MARK.len() + 64]), Err(LineError::Signature));
        assert_eq!(parsed(&line[..line.len() - 1]), Err(LineError::Reports));
        assert_eq!(parsed(&format!("{line}\"")), Err(LineError::Reports));
        assert_eq!(parsed("portcullis-usage 504b"), Err(LineError::Signature));
    }

    #[test]
    fn debug_prints_nothing_of_the_key() {
        assert_eq!(format!("{:?}", LogKey::derive(b"sk")), "LogKey(…)");
    }
}
