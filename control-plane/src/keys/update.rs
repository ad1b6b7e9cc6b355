//! Changes a key: name, expiry, whether it is disabled, and its permissions. One statement sets all fields, so the version of
//! the key counts one change, and the audit trail has one entry.

use serde_json::{Value, json};
use sqlx::types::Json;
use time::OffsetDateTime;

use super::lock::LockedKey;
use super::permissions::{Permissions, ResolvedPermissions};
use crate::audit::AuditEvent;
use crate::change::Change;
use crate::domain::{KeyName, Patch, Timestamp};
use crate::error::ApiError;
use crate::quota::{Whose, apply_quotas};

/// What a change sets. An absent field keeps its value.
#[derive(Clone, Debug, Default)]
pub struct KeyPatch {
    pub name: Option<KeyName>,
    pub disabled: Option<bool>,
    pub expires_at: Patch<OffsetDateTime>,
    pub permissions: Permissions,
}

impl KeyPatch {
    pub fn is_empty(&self) -> bool {
        let Self { name, disabled, expires_at, permissions } = self;
        name.is_none() && disabled.is_none() && expires_at.is_keep() && permissions.is_empty()
    }

    /// The fields whose values differ from those of the key.
    fn differing_from(self, key: &LockedKey) -> Self {
        let expires_at = match self.expires_at {
            Patch::Clear if key.expires_at.is_none() => Patch::Keep,
            Patch::Set(end) if key.expires_at == Some(end) => Patch::Keep,
            expires_at => expires_at,
        };
        Self {
            name: self.name.filter(|name| name.as_str() != key.name),
            disabled: self.disabled.filter(|disabled| *disabled != key.disabled),
            expires_at,
            permissions: self.permissions,
        }
    }

    /// The fields that change, for the audit trail: as they were and as they are.
    fn audit_detail(&self, key: &LockedKey, takes_over: bool, permissions_differ: bool) -> Value {
        let mut detail = json!({});
        let end = |end: Option<OffsetDateTime>| end.map(Timestamp::from);
        if let Some(name) = &self.name {
            detail["name"] = json!({"from": key.name, "to": name.as_str()});
        }
        if let Some(disabled) = self.disabled {
            detail["disabled"] = json!({"from": key.disabled, "to": disabled});
        }
        if let Some(expires_at) = self.expires_at.clone().given() {
            detail["expires_at"] = json!({"from": end(key.expires_at), "to": end(expires_at)});
        }
        if takes_over {
            detail["disabled_by_admin"] = json!({"from": false, "to": true});
        }
        if let (true, Value::Object(fields)) = (permissions_differ, self.permissions.audit_detail()) {
            fields.into_iter().for_each(|(field, value)| detail[field] = value);
        }
        detail
    }
}

/// Changes a key. `permissions` are those of the patch, resolved before the key was locked. A key that an admin disabled, only
/// an admin enables. 403 for a key that only an admin may enable, 409 for a revoked key or the last admin key.
pub async fn update(
    change: &mut Change,
    by_admin: bool,
    key: &LockedKey,
    patch: KeyPatch,
    permissions: &ResolvedPermissions,
) -> Result<(), ApiError> {
    if key.revoked_at.is_some() {
        return Err(ApiError::Conflict("This key is revoked and cannot be changed.".into()));
    }
    if patch.disabled == Some(false) && key.disabled_by_admin && !by_admin {
        return Err(ApiError::Forbidden("An admin disabled this key. Ask an admin to enable it.".into()));
    }
    // A key that its owner disabled stays disabled, and from now on only an admin enables it.
    let takes_over = patch.disabled == Some(true) && key.disabled && !key.disabled_by_admin && by_admin;
    let sets_expiry = !patch.expires_at.is_keep();
    let patch = patch.differing_from(key);
    let disabled_by_admin = patch.disabled.map(|disabled| disabled && by_admin).or(takes_over.then_some(true));
    let stored = stored(change, key, permissions).await?;
    // Filters forget an expired key some time after its end.
    let returns_to_filters = sets_expiry && stored.withdrawn;
    let detail = patch.audit_detail(key, takes_over, stored.differs);
    let seen_by_filters =
        patch.disabled.is_some() || !patch.expires_at.is_keep() || stored.differs || returns_to_filters;
    if seen_by_filters {
        set_all(change, key, &patch, disabled_by_admin, returns_to_filters, permissions).await?;
    } else if patch.name.is_some() || disabled_by_admin.is_some() {
        set_unseen(change, key, &patch, disabled_by_admin).await?;
    } else {
        return Ok(());
    }
    if stored.differs || returns_to_filters {
        // A new quota may admit the key again, or exhaust it.
        apply_quotas(change, Whose::Keys(&[key.id])).await?;
    }
    change.record(AuditEvent::on_key("key.update", key.id, detail)).await?;
    Ok(())
}

/// Sets all fields, in one statement.
async fn set_all(
    change: &mut Change,
    key: &LockedKey,
    patch: &KeyPatch,
    disabled_by_admin: Option<bool>,
    returns_to_filters: bool,
    permissions: &ResolvedPermissions,
) -> Result<(), sqlx::Error> {
    sqlx::query!(
        "update api_keys set name = coalesce($2, name), disabled = coalesce($3, disabled),
                disabled_by_admin = coalesce($4, disabled_by_admin),
                expires_at = case when $5 then $6 else expires_at end, withdrawn = withdrawn and not $7,
                role_numbers = coalesce($8, role_numbers), plan_number = case when $9 then $10 else plan_number end,
                networks = coalesce($11, networks), quota = case when $12 then $13 else quota end,
                cost = coalesce($14, cost), rate_limits = coalesce($15, rate_limits),
                attributes = merge_attributes(attributes, $16),
                (applied_quota, quota_fill) = (
                    select q.quota, api_keys.quota_fill + (q.quota is distinct from api_keys.applied_quota)::integer
                    from (
                        select quota_in_zone(
                            coalesce(case when $12 then $13 else api_keys.quota end, d.quota), api_keys.owner_time_zone
                        ) as quota
                        from (select) one left join definitions d on d.number = coalesce(
                            case when $9 then $10 else api_keys.plan_number end, api_keys.owner_plan_number
                        ) and not d.removed
                    ) q
                )
            where id = $1",
        key.id,
        patch.name.as_ref().map(KeyName::as_str),
        patch.disabled,
        disabled_by_admin,
        !patch.expires_at.is_keep(),
        patch.expires_at.value().copied(),
        returns_to_filters,
        permissions.roles.as_deref(),
        !permissions.plan.is_keep(),
        permissions.plan.value().copied(),
        permissions.networks.as_deref(),
        !permissions.quota.is_keep(),
        permissions.quota.value().map(Json) as _,
        permissions.cost,
        permissions.rate_limits.as_ref().map(Json) as _,
        permissions.attributes.merge()
    )
    .execute(&mut **change)
    .await?;
    Ok(())
}

/// Sets the fields that filters do not see. A statement that names a column that they see would wake them.
async fn set_unseen(
    change: &mut Change,
    key: &LockedKey,
    patch: &KeyPatch,
    disabled_by_admin: Option<bool>,
) -> Result<(), sqlx::Error> {
    sqlx::query!(
        "update api_keys set name = coalesce($2, name), disabled_by_admin = coalesce($3, disabled_by_admin)
            where id = $1",
        key.id,
        patch.name.as_ref().map(KeyName::as_str),
        disabled_by_admin
    )
    .execute(&mut **change)
    .await?;
    Ok(())
}

struct Stored {
    withdrawn: bool,
    /// Whether the permissions that are to be set differ from those that are set.
    differs: bool,
}

async fn stored(change: &mut Change, key: &LockedKey, new: &ResolvedPermissions) -> Result<Stored, sqlx::Error> {
    sqlx::query_as!(
        Stored,
        r#"select withdrawn, (role_numbers, plan_number, networks, quota, cost, rate_limits, attributes) is distinct from (
                coalesce($2, role_numbers), case when $3 then $4 else plan_number end, coalesce($5, networks),
                case when $6 then $7 else quota end, coalesce($8, cost), coalesce($9, rate_limits),
                merge_attributes(attributes, $10)
            ) as "differs!"
        from api_keys where id = $1"#,
        key.id,
        new.roles.as_deref(),
        !new.plan.is_keep(),
        new.plan.value().copied(),
        new.networks.as_deref(),
        !new.quota.is_keep(),
        new.quota.value().map(Json) as _,
        new.cost,
        new.rate_limits.as_ref().map(Json) as _,
        new.attributes.merge()
    )
    .fetch_one(&mut **change)
    .await
}
