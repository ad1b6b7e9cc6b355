//! Callers of the REST API, and what they may do.

use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use contract::definition::covers;
use contract::key::KeyKind;
use contract::network::Network;
use contract::policy::Policy;
use contract::record::{RateLimit, Record};
use time::OffsetDateTime;
use uuid::Uuid;

use super::presented_key::{PresentedKey, peer};
use crate::App;
use crate::api::observe::REQUEST_ID;
use crate::audit::Actor;
use crate::domain::{ADMIN, Email, Patch, SYNC, Scopes};
use crate::error::ApiError;
use crate::keys::model::{LIVE_KEYS, NewKey, OwnTerms};
use crate::keys::permissions::{Permissions, PlanRef, within};

/// An admitted caller.
#[derive(Clone, Debug)]
pub struct Caller {
    /// The key that was presented.
    pub key_id: Uuid,
    /// Which of its secrets that was.
    generation: u32,
    /// Whether the key is for production or for tests.
    kind: KeyKind,
    /// The id of its owner.
    pub owner_id: Uuid,
    /// The owner's address.
    pub email: String,
    /// Scopes granted to the key itself. Those of its roles and plan open nothing here, and are not the key's to give: they
    /// would outlive a change of the role.
    pub scopes: Vec<String>,
    /// Who that is, for the audit trail.
    pub actor: Actor,
    /// The key's own rate limits.
    rate_limits: Vec<RateLimit>,
    /// Networks that the key may be used from.
    networks: Vec<Network>,
    /// Credits that a request with the key costs.
    cost: u32,
    /// The key's own plan and quota.
    own: OwnTerms,
    /// When the key ends, in seconds of Unix time.
    expires_at_s: Option<u64>,
}

impl Caller {
    /// Whether the key was granted a scope.
    pub fn has_scope(&self, scope: &str) -> bool {
        self.scopes.iter().any(|granted| granted == scope)
    }

    /// Whether the key has the scope `admin`.
    pub fn is_admin(&self) -> bool {
        self.has_scope(ADMIN)
    }

    /// Admits keys that may manage keys at all: not those of filters, which lie in the configuration of Envoys.
    pub fn require_manager(&self) -> Result<(), ApiError> {
        let detail = "A key with the scope sync cannot manage keys. Use another key.";
        allow(!self.has_scope(SYNC) || self.is_admin(), detail)
    }

    /// Admits admins.
    pub fn require_admin(&self) -> Result<(), ApiError> {
        allow(self.is_admin(), "Use a key with the scope admin.")
    }

    /// Admits admins, and users to what is their own.
    pub fn require_owner_or_admin(&self, email: &Email) -> Result<(), ApiError> {
        self.require_own(self.email == email.as_str())
    }

    /// The same for a user's id.
    pub fn require_user_or_admin(&self, user: Uuid) -> Result<(), ApiError> {
        self.require_own(self.owner_id == user)
    }

    fn require_own(&self, is_own: bool) -> Result<(), ApiError> {
        self.require_manager()?;
        let detail = "This key manages only its owner's data. Use a key with the scope admin.";
        allow(is_own || self.is_admin(), detail)
    }

    /// Whether the caller presented the secret of this number, rather than one that was rotated away.
    pub const fn presents(&self, generation: i32) -> bool {
        self.generation == generation.cast_unsigned()
    }

    /// Whether the caller may see and manage a key of this owner.
    pub fn manages(&self, owner_id: Uuid) -> bool {
        self.is_admin() || self.owner_id == owner_id
    }

    /// Admits keys that the caller may switch off or revoke: those that open the control plane are for admins, or any key
    /// of their owner could end the sync of all filters.
    pub fn require_changeable(&self, scopes: &[String]) -> Result<(), ApiError> {
        match scopes.iter().find(|scope| opens_the_control_plane(scope)) {
            Some(scope) if !self.is_admin() => Err(ApiError::Forbidden(format!(
                "Only an admin changes or revokes a key with the scope {scope}. Use a key with the scope admin."
            ))),
            _ => Ok(()),
        }
    }

    /// Admits scopes that the caller may give to a new key: any for admins, a subset of their own for others, and never
    /// those that open the control plane.
    pub fn require_grantable(&self, scopes: &Scopes) -> Result<(), ApiError> {
        let own = |scope: &str| self.scopes.iter().any(|granted| covers(granted, scope));
        match scopes.as_slice().iter().find(|scope| opens_the_control_plane(scope) || !own(scope)) {
            Some(scope) if !self.is_admin() => Err(ApiError::Forbidden(format!(
                "This key cannot grant the scope {scope}, which it does not have itself. Use a key with the scope admin."
            ))),
            _ => Ok(()),
        }
    }

    /// Admits an end that the caller may give to a key in place of its present one: any for admins; for others any that is
    /// no later, and later ones up to the end of their own key. A key that has ended comes back by an admin only.
    pub fn require_end(
        &self,
        end: Option<OffsetDateTime>,
        present: Option<OffsetDateTime>,
        now: OffsetDateTime,
    ) -> Result<(), ApiError> {
        let later = |one: Option<OffsetDateTime>, other: Option<OffsetDateTime>| match (one, other) {
            (_, None) => false,
            (None, Some(_)) => true,
            (Some(one), Some(other)) => one > other,
        };
        if self.is_admin() || !later(end, present) {
            return Ok(());
        }
        let has_ended = present.is_some_and(|present| present <= now);
        allow(!has_ended, "This key has expired. Only a key with the scope admin can extend it.")?;
        allow(!later(end, self.end()), "expires_at must not be later than the expiry of the calling key.")
    }

    /// Admits fields that the caller may set at all: any for admins, `allowed_addresses` for others.
    pub fn require_privileges(&self, permissions: &Permissions) -> Result<(), ApiError> {
        match permissions.privileged() {
            Some(field) if !self.is_admin() => {
                Err(ApiError::Forbidden(format!("Only a key with the scope admin sets {field}.")))
            }
            _ => Ok(()),
        }
    }

    /// Admits what the caller may set of a key that may be used from the networks `present`: anything for admins; for
    /// others what narrows those networks, and nothing else.
    pub fn require_permissible(&self, permissions: &Permissions, present: &[Network]) -> Result<(), ApiError> {
        self.require_privileges(permissions)?;
        let widens = permissions.networks.as_ref().is_some_and(|networks| !within(networks, present));
        allow(self.is_admin() || !widens, "Only a key with the scope admin widens allowed_addresses.")
    }

    /// The kind of a key that the caller makes: the given one, or that of the caller. Otherwise a test key could make itself a
    /// live one.
    pub fn require_kind(&self, given: Option<KeyKind>) -> Result<KeyKind, ApiError> {
        let own = if self.is_admin() { KeyKind::Live } else { self.kind };
        let kind = given.unwrap_or(own);
        let detail = "A test key creates test keys only. Leave kind out, or use a live key.";
        allow(own == KeyKind::Live || kind == own, detail)?;
        Ok(kind)
    }

    fn end(&self) -> Option<OffsetDateTime> {
        self.expires_at_s.and_then(|end| OffsetDateTime::from_unix_timestamp(i64::try_from(end).ok()?).ok())
    }

    /// Networks that the caller may be used from.
    pub fn networks(&self) -> &[Network] {
        &self.networks
    }

    /// Admits the rotation of a key: of any key for admins, of itself for others. The response contains the new secret. An old
    /// secret may have been stolen, so it does not rotate its key.
    pub fn require_rotatable(&self, id: Uuid, generation: i32) -> Result<(), ApiError> {
        let is_own = self.key_id == id;
        allow(!is_own || self.presents(generation), "An old secret cannot rotate its key. Use the current secret.")?;
        let detail = "A key can rotate only itself. Use the key that is to be rotated, or a key with the scope admin.";
        allow(is_own || self.is_admin(), detail)
    }

    /// Passes the caller's bounds on to a key that it makes: it ends no later than the caller's own, is used from the same
    /// networks unless it has narrower ones, and has the same plan, quota, cost and rate limits. Its owner has at most
    /// [`LIVE_KEYS`] keys and makes at most `per_day` in 24 hours. Roles do not pass on. Where a plan applies, a key has
    /// no rate limits in its place. Admins are not bound.
    pub fn bind(&self, new: &mut NewKey, per_day: u32) {
        if self.is_admin() {
            return;
        }
        new.expires_at = [new.expires_at, self.end()].into_iter().flatten().min();
        new.rate_limits.clone_from(&self.rate_limits);
        let permissions = &mut new.permissions;
        if permissions.networks.is_none() && !self.networks.is_empty() {
            permissions.networks = Some(self.networks.clone());
        }
        permissions.plan = self.own.plan.map_or(Patch::Keep, |number| Patch::Set(PlanRef::Numbered(number)));
        permissions.quota = self.own.quota.clone().map_or(Patch::Keep, Patch::Set);
        permissions.cost = i32::try_from(self.cost).ok();
        new.at_most = Some(LIVE_KEYS);
        new.per_day = Some(per_day);
    }
}

fn allow(is_allowed: bool, refusal: &str) -> Result<(), ApiError> {
    if is_allowed { Ok(()) } else { Err(ApiError::Forbidden(refusal.into())) }
}

fn opens_the_control_plane(scope: &str) -> bool {
    [ADMIN, SYNC].contains(&scope)
}

impl FromRequestParts<App> for Caller {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, ApiError> {
        let presented = PresentedKey::find(app, parts, Policy::PLAIN).await?;
        // Before the database is asked, where the mirror knows the key.
        let counted = presented.admitted(Policy::PLAIN).map(|record| record.owner_id.into());
        if let Some(owner) = counted {
            app.rate_limiter.count_owner(owner)?;
        }
        let (record, beside) = presented.stored().await?.map(|found| (found.record, (found.email, found.own))).unzip();
        let record = presented.admit(record, Policy::PLAIN)?;
        let (key_id, owner) = (record.key_id.into(), record.owner_id.into());
        if counted != Some(owner) {
            app.rate_limiter.count_owner(owner)?;
        }
        let Record { owner_id, generation, kind, scopes, rate_limits, networks, expires_at_s, cost, .. } = record;
        let (email, own): (String, OwnTerms) = beside.unwrap_or_default();
        let request_id = parts.headers.get(REQUEST_ID).and_then(|id| id.to_str().ok());
        let actor = Actor {
            key_id: Some(key_id),
            email: Some(email.clone()),
            address: Some(peer(parts).to_string()),
            request_id: request_id.map(Into::into),
        };
        let owner_id = owner_id.into();
        Ok(Self {
            key_id,
            generation,
            kind,
            owner_id,
            email,
            scopes,
            actor,
            rate_limits,
            networks,
            cost,
            own,
            expires_at_s,
        })
    }
}
