-- The schema of the control plane.
--
--    1. Revisions and versions
--    2. Roles, plans and policies
--    3. Users
--    4. Keys
--    5. Old secrets of keys
--    6. Values that a key copies from its user
--    7. Rules that the database enforces on keys
--    8. Audit trail and idempotency
--    9. Envoys
--   10. Usage
--   11. Credits
--   12. Quotas
--   13. Pools and allowances
--   14. Views
--
-- Locks. Every transaction takes its locks in this order, so that no two transactions deadlock:
--   usage_reporters → usage tables → user_preferences → definitions → store_state → api_keys → allowance_callers →
--   lone_caller → pools → quota_use → allowances. The rows of policy_uses and then of unknown_keys come last, in the order of
--   their keys.
-- Several rows of one table are locked in the order of their ids. Pools come late, because requests wait for them: a
-- transaction that has locked a pool waits for nothing but other pools.
--
-- Triggers. PostgreSQL fires BEFORE STATEMENT triggers first, then BEFORE ROW, then AFTER ROW; triggers of one kind fire in
-- the alphabetical order of their names. This schema relies on the first rule and not on the second: next_revision
-- (BEFORE STATEMENT) has to run before every row trigger. No row trigger reads a column that another one of its table sets.
--
-- Settings. A transaction lifts a rule with `set local`:
--   portcullis.force = 'on'      allows a change that ends the last admin key
--   portcullis.purge = 'on'      allows deletion of keys and of old secrets
--   portcullis.ledger = 'on'     allows changes of ledger rows
-- The control plane also sets portcullis.address: see section 7.


-- 1. Revisions and versions
--
-- A revision numbers the changes that filters see. A statement that makes such a change locks the row of store_state, takes
-- the next revision, and keeps the lock until it commits. Revisions therefore follow commit order: a reader that has seen
-- revision n has seen every change up to n.
--
-- A version numbers all changes of one row. It is the ETag of that row in the REST API.

create table store_state (
    one boolean primary key default true constraint store_state_one check (one),
    epoch uuid not null default gen_random_uuid(),
    identity text not null default '',
    revision bigint not null default 0,
    pepper_check bytea
);

comment on table store_state is 'The state of the key store, in a single row. Its lock orders the commits of all changes that filters see.';
comment on column store_state.epoch is 'Identifies one history of revisions. A restored database gets a new epoch, and every filter then loads a snapshot.';
comment on column store_state.identity is 'Server, timeline and database for which the epoch was generated.';
comment on column store_state.revision is 'Revision of the newest change.';
comment on column store_state.pepper_check is 'Hash under the pepper of imported keys, to detect a missing or a different pepper; null before the first use of a pepper.';

insert into store_state default values;

create function next_revision() returns trigger language plpgsql as $$
declare
    next bigint;
begin
    update store_state set revision = revision + 1 returning revision into next;
    perform pg_notify('portcullis_changes', next::text);
    return null;
end $$;

create function assign_revision() returns trigger language plpgsql as $$
begin
    select revision into new.revision from store_state;
    return new;
end $$;

create function increment_version() returns trigger language plpgsql as $$
begin
    new.version := old.version + 1;
    return new;
end $$;


-- 2. Roles, plans and policies

create table definitions (
    number integer generated always as identity primary key,
    kind text not null constraint definitions_kind check (kind in ('role', 'plan', 'policy')),
    name text not null,
    description text not null default '',
    scopes text[] not null default '{}' constraint definitions_scopes check (not scopes && '{admin, sync}'),
    rate_limits jsonb not null default '[]',
    quota jsonb,
    policy jsonb constraint definitions_policy check ((kind = 'policy') = (policy is not null)),
    removed boolean not null default false,
    version bigint not null default 1,
    revision bigint not null,
    created_at timestamptz not null default now()
);

comment on table definitions is 'Roles, plans and policies. Keys reference roles and plans by number, so that one change takes effect for all keys immediately. Routes name policies.';
comment on column definitions.scopes is 'Scopes granted to each key of the role or plan. The scopes of the control plane itself are granted to single keys only.';
comment on column definitions.rate_limits is 'Plans only: see api_keys.rate_limits. Applies to keys without rate limits of their own.';
comment on column definitions.quota is 'Plans only: see api_keys.quota. Applies to keys without a quota of their own.';
comment on column definitions.policy is 'Policies only: what it requires and what picks it, as filters get it.';
comment on column definitions.removed is 'The row stays, so that filters learn of the removal. The name can be used again.';
comment on column definitions.version is 'Incremented by each change: the ETag.';
comment on column definitions.revision is 'Revision of the last change.';

create unique index definitions_name on definitions (kind, name) where not removed;
create index definitions_revision on definitions (revision);

create trigger definitions_next_revision before insert or update on definitions
    for each statement execute function next_revision();
create trigger definitions_assign_revision before insert or update on definitions
    for each row execute function assign_revision();
create trigger definitions_version before update on definitions
    for each row execute function increment_version();

create table policy_uses (
    number integer primary key references definitions,
    last_named_at timestamptz not null default now()
);

comment on table policy_uses is 'When routes of Envoys last named each policy.';
comment on column policy_uses.last_named_at is 'Accurate to ten minutes: a VM reports a name every ten minutes.';


-- 3. Users
--
-- A user owns keys. The user's plan and credits apply to all of them.

create function merge_attributes(present jsonb, change jsonb) returns jsonb language sql immutable as $$
    select case when change is null then present else (
        select jsonb_object_agg(key, value) from jsonb_each(coalesce(present, '{}') || change) where value <> 'null'
    ) end
$$;

comment on function merge_attributes is 'Attributes after a change, in which an absent member is kept and null removes it; null if none is left.';

create function quota_in_zone(quota jsonb, owner_zone text) returns jsonb language sql immutable as $$
    select case when quota ->> 'time_zone' = 'owner'
        then quota || jsonb_build_object('time_zone', coalesce(owner_zone, 'UTC')) else quota end
$$;

comment on function quota_in_zone is 'A quota with the time zone of the user in place of owner.';

create table user_preferences (
    id uuid primary key,
    email text not null constraint user_preferences_email_key unique
        constraint user_preferences_email_lower check (email = lower(email collate "C")),
    primary_key_id uuid,
    plan_number integer references definitions,
    balance bigint not null default 0,
    credits_spent bigint not null default 0,
    metered boolean not null default false,
    credits_fill integer not null default 0,
    attributes jsonb,
    time_zone text,
    refill jsonb,
    refill_at timestamptz,
    makes integer not null default 0,
    changes integer not null default 0,
    makes_since timestamptz,
    version bigint not null default 1,
    created_at timestamptz not null default now()
);

comment on table user_preferences is 'Users: the owners of keys.';
comment on column user_preferences.email is 'In the canonical form of the control plane. Only ASCII letters have lower case there: what lower() does to others depends on the locale.';
comment on column user_preferences.primary_key_id is 'The key that the endpoints below /api/user manage.';
comment on column user_preferences.plan_number is 'Applies to keys without a plan of their own.';
comment on column user_preferences.balance is 'Credits: the sum of the user''s rows in ledger.';
comment on column user_preferences.credits_spent is 'Credits that all requests so far have cost.';
comment on column user_preferences.metered is 'Whether requests cost credits.';
comment on column user_preferences.credits_fill is 'Incremented when the balance changes other than by usage. An Envoy that knows the balance to be used up then asks again.';
comment on column user_preferences.attributes is 'Attributes: {"external_id", "metadata": {name: value}}; null: none.';
comment on column user_preferences.time_zone is 'Name of the IANA database, for quotas whose time zone is owner; null: UTC.';
comment on column user_preferences.refill is 'Scheduled credits: {"amount", "period": "day" | "week" | "month", "time_zone", "up_to"}; amount and up_to in credits.';
comment on column user_preferences.refill_at is 'When the next refill is due.';
comment on column user_preferences.makes is 'Keys created and rotated by the user''s own keys in the 24 hours from makes_since.';
comment on column user_preferences.changes is 'Changes made by the user''s own keys in the 24 hours from makes_since.';
comment on column user_preferences.makes_since is 'Start of the 24 hours; null before the first creation or change.';
comment on column user_preferences.version is 'Incremented when email, plan, attributes, time zone, metered or refill change: the ETag. Usage, refills and other changes of the balance do not count.';

create index user_preferences_primary_key on user_preferences (primary_key_id) where primary_key_id is not null;
create unique index user_preferences_external_id on user_preferences ((attributes ->> 'external_id'));
create index user_preferences_refill on user_preferences (refill_at) where refill_at is not null;

create trigger user_preferences_version before update of email, plan_number, attributes, time_zone, metered, refill on user_preferences
    for each row when (
        new.email <> old.email
        or new.plan_number is distinct from old.plan_number
        or new.attributes is distinct from old.attributes
        or new.time_zone is distinct from old.time_zone
        or new.metered <> old.metered
        or new.refill is distinct from old.refill
    ) execute function increment_version();


-- 4. Keys
--
-- A row holds the present secret of a key. Rotation replaces the secret and keeps the row.

create table api_keys (
    id uuid primary key,
    owner_id uuid not null references user_preferences,
    name text not null,

    -- The present secret.
    hash bytea not null constraint api_keys_hash_length check (octet_length(hash) = 32),
    prefix text,
    generation integer not null default 1,
    kind text not null default 'live' constraint api_keys_kind check (kind in ('live', 'test')),

    -- Attributes.
    attributes jsonb,
    owner_attributes jsonb,

    -- Permissions.
    scopes text[] not null default '{}',
    role_numbers integer[] not null default '{}',
    plan_number integer references definitions,
    owner_plan_number integer,
    networks text[] not null default '{}',

    -- Limits.
    rate_limits jsonb not null default '[]',
    cost integer not null default 1 constraint api_keys_cost_not_negative check (cost >= 0),
    quota jsonb,
    applied_quota jsonb,
    owner_time_zone text,
    quota_fill integer not null default 0,
    quota_exceeded boolean not null default false,
    quota_resets_at timestamptz,
    metered boolean not null default false,
    credits_fill integer not null default 0,
    credits_exhausted boolean not null default false,

    -- Life.
    created_at timestamptz not null default now(),
    expires_at timestamptz,
    disabled boolean not null default false,
    disabled_by_admin boolean not null default false
        constraint api_keys_disabled_by_admin check (disabled or not disabled_by_admin),
    revoked_at timestamptz,
    withdrawn boolean not null default false,

    version bigint not null default 1,
    revision bigint not null
);

comment on table api_keys is 'Keys. Only the hash of a secret is stored.';
comment on column api_keys.hash is 'SHA-256 of the present secret; of an imported key, HMAC-SHA-256 under the pepper if there is one.';
comment on column api_keys.prefix is 'First characters of the secret, by which people recognise it; null for imported keys of another format.';
comment on column api_keys.generation is 'Number of the present secret, from 1. Rotation increments it.';
comment on column api_keys.kind is 'Whether the key is for production or for tests.';
comment on column api_keys.attributes is 'As user_preferences.attributes, of the key itself.';
comment on column api_keys.owner_attributes is 'As user_preferences.attributes; kept by triggers.';
comment on column api_keys.scopes is 'Scopes of the key itself. Its roles and its plan grant more.';
comment on column api_keys.role_numbers is 'Roles, in the order in which they were given.';
comment on column api_keys.plan_number is 'The key''s own plan.';
comment on column api_keys.owner_plan_number is 'The plan of the user, which applies if the key has none of its own; kept by triggers. It has no foreign key: the check would lock the definition after store_state.';
comment on column api_keys.networks is 'Networks in CIDR notation from which the key can be used; empty: all.';
comment on column api_keys.rate_limits is 'List of {"name", "requests", "window_s", "burst", "shared", "per": "key" | "owner"}; window_s in seconds; not shared: each Envoy enforces the limit by itself; per owner, which only plans have: one limit for all keys of a user that have the plan. Empty: those of the plan apply.';
comment on column api_keys.cost is 'Credits for each request, unless the route sets another price.';
comment on column api_keys.quota is '{"requests", "period": "day" | "week" | "month" | "rolling", "time_zone", "window_s", "per": "key" | "owner"}; window_s in seconds; per as in rate_limits. Null: that of the plan applies.';
comment on column api_keys.quota_exceeded is 'The quota is used up, and filters refuse the key until quota_resets_at.';
comment on column api_keys.applied_quota is 'The quota that applies: the key''s own or that of its plan, with the time zone of the user in place of owner.';
comment on column api_keys.owner_time_zone is 'As user_preferences.time_zone; kept by triggers.';
comment on column api_keys.quota_fill is 'Incremented when applied_quota changes. An Envoy that knows the quota to be used up then asks again.';
comment on column api_keys.quota_resets_at is 'When a used-up quota opens again.';
comment on column api_keys.metered is 'As user_preferences.metered; kept by triggers.';
comment on column api_keys.credits_fill is 'As user_preferences.credits_fill; kept by triggers.';
comment on column api_keys.credits_exhausted is 'The user is metered and has no credits; kept by triggers.';
comment on column api_keys.disabled_by_admin is 'Whether an admin disabled the key. Then only an admin can enable it.';
comment on column api_keys.withdrawn is 'Filters no longer hold the key and refuse it as unknown. It ended long ago, or many keys of its user ended later.';
comment on column api_keys.version is 'Incremented by each change, also by those that filters do not see: the ETag.';
comment on column api_keys.revision is 'Revision of the last change that filters see.';

-- The predicate keeps foreign keys from referencing this index. Otherwise a change of the hash would conflict with the row
-- locks of foreign key checks, and rotation would wait for each transaction that counts usage of the key.
create unique index api_keys_hash_key on api_keys (hash) where hash is not null;
create index api_keys_owner on api_keys (owner_id, id);
create index api_keys_prefix on api_keys (prefix text_pattern_ops);
create index api_keys_external_id on api_keys ((attributes ->> 'external_id')) where attributes is not null;
create index api_keys_revision on api_keys (revision);
create index api_keys_plan on api_keys (coalesce(plan_number, owner_plan_number))
    where coalesce(plan_number, owner_plan_number) is not null;
create index api_keys_roles on api_keys using gin (role_numbers) where role_numbers <> '{}';
create index api_keys_admins on api_keys (id) where 'admin' = any (scopes) and revoked_at is null;
create index api_keys_ended on api_keys (owner_id, (least(revoked_at, expires_at))) where not withdrawn;
create index api_keys_quota_reset on api_keys (quota_resets_at) where quota_exceeded;

create index api_keys_booked on api_keys (id) where applied_quota is not null or metered;

comment on index api_keys_booked is 'Keys whose usage counts against a quota or credits. Most keys have neither, so reports find them without a look at each counted key.';

alter table user_preferences
    add constraint user_preferences_primary_key_fkey foreign key (primary_key_id) references api_keys;

-- A statement that names one of these columns takes a revision and wakes every filter, even if it changes no value. The
-- columns that are left out are those that filters do not see: name, prefix, quota, disabled_by_admin, version.

create trigger api_keys_next_revision
    before insert or update of
        owner_id, hash, generation, scopes, rate_limits, cost, expires_at, disabled, quota_exceeded, credits_exhausted,
        revoked_at, withdrawn, plan_number, owner_plan_number, role_numbers, networks, applied_quota, quota_fill,
        quota_resets_at, metered, credits_fill, kind, attributes, owner_attributes, owner_time_zone
    on api_keys for each statement execute function next_revision();

create trigger api_keys_assign_revision
    before insert or update of
        owner_id, hash, generation, scopes, rate_limits, cost, expires_at, disabled, quota_exceeded, credits_exhausted,
        revoked_at, withdrawn, plan_number, owner_plan_number, role_numbers, networks, applied_quota, quota_fill,
        quota_resets_at, metered, credits_fill, kind, attributes, owner_attributes, owner_time_zone
    on api_keys for each row execute function assign_revision();

create trigger api_keys_version before update on api_keys for each row execute function increment_version();


-- 5. Old secrets of keys
--
-- Rotation moves the replaced secret here. It goes on working until ends_at.

create table retired_secrets (
    hash bytea primary key constraint retired_secrets_hash_length check (octet_length(hash) = 32),
    key_id uuid not null references api_keys,
    owner_id uuid not null,
    generation integer not null,
    prefix text,
    ends_at timestamptz not null,
    withdrawn boolean not null default false,
    revision bigint not null
);

comment on table retired_secrets is 'Secrets that rotation has replaced.';
comment on column retired_secrets.hash is 'As api_keys.hash.';
comment on column retired_secrets.owner_id is 'The user of the key, to find old secrets by user; set by a trigger. It has no foreign key: the check would lock the user after store_state.';
comment on column retired_secrets.generation is 'Number of the secret, from 1.';
comment on column retired_secrets.ends_at is 'When the secret stops working.';
comment on column retired_secrets.withdrawn is 'As api_keys.withdrawn.';
comment on column retired_secrets.revision is 'Revision of the last change.';

create index retired_secrets_key on retired_secrets (key_id, generation);
create index retired_secrets_owner on retired_secrets (owner_id, ends_at) where not withdrawn;
create index retired_secrets_prefix on retired_secrets (prefix text_pattern_ops);
create index retired_secrets_revision on retired_secrets (revision);

create trigger retired_secrets_next_revision before insert or update on retired_secrets
    for each statement execute function next_revision();
create trigger retired_secrets_assign_revision before insert or update on retired_secrets
    for each row execute function assign_revision();

create function set_secret_owner() returns trigger language plpgsql as $$
begin
    select owner_id into new.owner_id from api_keys where id = new.key_id;
    return new;
end $$;

create trigger retired_secrets_owner before insert on retired_secrets
    for each row execute function set_secret_owner();


-- 6. Values that a key copies from its user
--
-- Filters' records are read from api_keys alone: a million records are loaded without a join, and a change of a user raises
-- the revision of each key that it concerns.

create function copy_owner_to_key() returns trigger language plpgsql as $$
begin
    select plan_number, attributes, time_zone, metered, credits_fill, metered and balance <= 0
        into new.owner_plan_number, new.owner_attributes, new.owner_time_zone, new.metered, new.credits_fill,
            new.credits_exhausted
        from user_preferences where id = new.owner_id;
    return new;
end $$;

create trigger api_keys_copy_owner before insert on api_keys for each row execute function copy_owner_to_key();

-- Withdrawn keys miss the changes of their user. An expired key that gets a later expiry is no longer withdrawn.
create trigger api_keys_copy_owner_again before update of withdrawn on api_keys
    for each row when (old.withdrawn and not new.withdrawn) execute function copy_owner_to_key();

create function copy_owner_to_keys() returns trigger language plpgsql as $$
begin
    update api_keys set
        owner_plan_number = new.plan_number,
        owner_attributes = new.attributes,
        owner_time_zone = new.time_zone,
        metered = new.metered,
        credits_fill = new.credits_fill,
        credits_exhausted = new.metered and new.balance <= 0
    where owner_id = new.id and not withdrawn;
    return null;
end $$;

create trigger user_preferences_copy_to_keys
    after update of plan_number, attributes, time_zone, metered, credits_fill, balance on user_preferences
    for each row when (
        new.plan_number is distinct from old.plan_number
        or new.attributes is distinct from old.attributes
        or new.time_zone is distinct from old.time_zone
        or new.metered <> old.metered
        or new.credits_fill <> old.credits_fill
        or (new.metered and (new.balance <= 0) <> (old.balance <= 0))
    ) execute function copy_owner_to_keys();


-- 7. Rules that the database enforces on keys

-- Filters identify a secret by its hash. They would go on accepting the old hash of a row whose hash just changed.

create function refuse_hash_change() returns trigger language plpgsql as $$
begin
    if tg_table_name = 'api_keys' and new.generation = old.generation + 1
        and exists (select from retired_secrets where hash = old.hash and key_id = old.id)
    then
        return new;
    end if;
    raise exception 'the hash of a secret never changes: retire the secret and give the key a new one';
end $$;

create trigger api_keys_refuse_hash_change before update of hash on api_keys
    for each row when (new.hash is distinct from old.hash) execute function refuse_hash_change();
create trigger retired_secrets_refuse_hash_change before update of hash, key_id, generation on retired_secrets
    for each row when (new.hash is distinct from old.hash or new.key_id <> old.key_id or new.generation <> old.generation)
    execute function refuse_hash_change();

-- A hash is unique over both tables.

create function refuse_retired_hash() returns trigger language plpgsql as $$
begin
    if exists (select from retired_secrets where hash = new.hash) then
        raise unique_violation using message = 'this key was used before', constraint = 'api_keys_hash_key';
    end if;
    return new;
end $$;

create trigger api_keys_refuse_retired_hash before insert or update of hash on api_keys
    for each row execute function refuse_retired_hash();

-- Filters learn of the end of a key from its row. Only the clean-up of withdrawn keys deletes rows.

create function refuse_key_deletion() returns trigger language plpgsql as $$
begin
    if tg_op = 'DELETE' and current_setting('portcullis.purge', true) = 'on' then
        return null;
    end if;
    raise exception 'rows of api_keys are never deleted: revoke the key instead';
end $$;

create trigger api_keys_refuse_deletion before delete or truncate on api_keys
    for each statement execute function refuse_key_deletion();

create function refuse_secret_deletion() returns trigger language plpgsql as $$
begin
    if tg_op = 'DELETE' and current_setting('portcullis.purge', true) = 'on' then
        return null;
    end if;
    raise exception 'rows of retired_secrets are never deleted: set their end instead';
end $$;

create trigger retired_secrets_refuse_deletion before delete or truncate on retired_secrets
    for each statement execute function refuse_secret_deletion();

-- A change must leave an admin key that works now and one that works tomorrow. Without one, no caller could manage keys.
--
-- A key that is bound to networks counts only for a caller in one of them. The control plane puts the address of the present
-- caller into portcullis.address. Changes by hand give no address: only keys without networks count for them.

create function allows_address(networks text[], address text) returns boolean language plpgsql stable as $$
begin
    return networks = '{}' or (coalesce(address, '') <> '' and address::inet <<= any (networks::inet[]));
exception when invalid_text_representation then
    return false;
end $$;

create function keep_admin_key() returns trigger language plpgsql as $$
declare
    moment timestamptz;
    address text := current_setting('portcullis.address', true);
begin
    if current_setting('portcullis.force', true) = 'on' then
        return null;
    end if;
    -- Two changes at once cannot each rely on the other's key: both hold the lock of store_state, one after the other.
    foreach moment in array array[clock_timestamp(), clock_timestamp() + interval '1 day'] loop
        if old.expires_at is not null and old.expires_at <= moment then
            continue;
        end if;
        if not exists (
            select from api_keys
            where 'admin' = any (scopes) and revoked_at is null and not disabled
                and (expires_at is null or expires_at > moment)
        ) then
            raise exception 'this would end the last key that manages keys'
                using errcode = 'check_violation', constraint = 'api_keys_last_admin';
        end if;
        if allows_address(old.networks, address) and not exists (
            select from api_keys
            where 'admin' = any (scopes) and revoked_at is null and not disabled
                and (expires_at is null or expires_at > moment) and allows_address(networks, address)
        ) then
            raise exception 'no key that manages keys could be used from here any more'
                using errcode = 'check_violation', constraint = 'api_keys_last_admin_here';
        end if;
    end loop;
    return null;
end $$;

create trigger api_keys_keep_admin_key after update on api_keys
    for each row when ('admin' = any (old.scopes) and old.revoked_at is null and not old.disabled)
    execute function keep_admin_key();


-- 8. Audit trail and idempotency

create table audit (
    id bigint generated always as identity primary key,
    at timestamptz not null default now(),
    actor_key_id uuid,
    actor_email text,
    address text,
    request_id text,
    action text not null,
    key_id uuid,
    target text,
    detail jsonb not null default '{}'
);

comment on table audit is 'Who changed what, when and from where. Contains no secrets. Rows reference keys without foreign keys, because they outlive them.';
comment on column audit.actor_key_id is 'The key of the caller; null for the command line and for the control plane itself.';
comment on column audit.address is 'Address of the caller.';
comment on column audit.key_id is 'The key that was changed, if a key was changed.';
comment on column audit.target is 'The user, role or plan that was changed, if no key was changed.';

create index audit_at on audit (at);
create index audit_key on audit (key_id, id);
create index audit_actor on audit (actor_key_id, id);

create table idempotent_replies (
    caller_key_id uuid not null references api_keys,
    idempotency_key text not null,
    fingerprint bytea not null,
    status smallint not null,
    location text,
    etag text,
    nonce bytea not null,
    body bytea not null,
    created_at timestamptz not null default now(),
    primary key (caller_key_id, idempotency_key)
);

comment on table idempotent_replies is 'Replies to requests with an Idempotency-Key, kept for a day and given again to a retry.';
comment on column idempotent_replies.fingerprint is 'SHA-256 of method, target, preconditions and body. Another request with the same Idempotency-Key is refused.';
comment on column idempotent_replies.status is 'HTTP status.';
comment on column idempotent_replies.nonce is 'Nonce of the encryption of body.';
comment on column idempotent_replies.body is 'Encrypted under the secret of the caller, because it can contain a new secret.';

create index idempotent_replies_created on idempotent_replies (created_at);


-- 9. Envoys
--
-- One Envoy process is one reporter: it has a random id from its start to its end.

create table filters (
    reporter uuid primary key,
    sync_key_id uuid references api_keys,
    address text,
    version text,
    epoch uuid not null,
    revision bigint not null,
    confirmed_at timestamptz not null,
    seen_at timestamptz not null,
    pending_requests bigint,
    reported_at timestamptz
);

comment on table filters is 'Envoys that sync, as each described itself with its last poll. Kept for a day.';
comment on column filters.sync_key_id is 'The key under which the Envoy polls.';
comment on column filters.address is 'Address from which the Envoy polled last.';
comment on column filters.version is 'Version of the filter.';
comment on column filters.epoch is 'Epoch of the Envoy''s store; all zeros while the store is incomplete.';
comment on column filters.revision is 'The Envoy''s store contains every change up to this revision.';
comment on column filters.confirmed_at is 'When the Envoy last confirmed epoch and revision; before the first confirmation, when it first polled.';
comment on column filters.seen_at is 'When the Envoy last polled or reported.';
comment on column filters.pending_requests is 'Requests that the Envoy has counted and that are not acknowledged yet.';
comment on column filters.reported_at is 'When a report of the Envoy last reached the database.';

create index filters_seen on filters (seen_at);

create table usage_reporters (
    reporter uuid primary key,
    sync_key_id uuid references api_keys,
    last_seq bigint not null,
    created_at timestamptz not null default now(),
    reported_at timestamptz not null default now()
);

comment on table usage_reporters is 'The last report of each Envoy that was applied, so that no report is applied twice.';
comment on column usage_reporters.sync_key_id is 'The key of the first report. Reports under another key are refused. Null if all reports came from log lines.';
comment on column usage_reporters.last_seq is 'Number of the last applied report.';
comment on column usage_reporters.created_at is 'When the first report came.';
comment on column usage_reporters.reported_at is 'When the last report came.';

create index usage_reporters_sync_key on usage_reporters (sync_key_id, created_at);

create table usage_log_keys (
    key_id uuid not null references api_keys on delete cascade,
    generation integer not null,
    log_key bytea not null constraint usage_log_keys_length check (octet_length(log_key) = 32),
    primary key (key_id, generation)
);

comment on table usage_log_keys is 'Keys that verify the signed usage lines in Envoys'' logs: one for each secret of a sync key that a filter has used.';
comment on column usage_log_keys.log_key is 'Derived from the secret by HMAC-SHA-256. It signs such lines and nothing else.';


-- 10. Usage
--
-- Sums saturate: a forged report that overflows a count must not stop the reports that are applied with it. The sum of no
-- rows is 0. Both functions are single expressions, which PostgreSQL inlines into the calling statement.

create function saturate(sum numeric) returns bigint language sql immutable parallel safe as $$
    select least(coalesce(sum, 0), 9223372036854775807)::bigint
$$;

create function saturating_add(count bigint, more bigint) returns bigint language sql immutable parallel safe as $$
    select least(count, 9223372036854775807 - greatest(more, 0)) + more
$$;

-- Counts are added to existing rows again and again. PostgreSQL leaves the indexes alone if the page of the row has room and
-- no indexed column changes. The fill factor keeps that room, and no index names a count.

create table key_usage (
    key_id uuid not null constraint key_usage_key_id_fkey references api_keys,
    generation integer not null,
    requests bigint not null,
    last_used_at timestamptz not null,
    primary key (key_id, generation)
) with (fillfactor = 70);

comment on table key_usage is 'Allowed requests of each secret of a key, in total.';

create table usage_hourly (
    key_id uuid not null constraint usage_hourly_key_id_fkey references api_keys,
    hour timestamptz not null,
    outcome smallint not null,
    generation integer not null,
    requests bigint not null,
    cost bigint not null,
    exported_requests bigint not null default 0,
    exported_cost bigint not null default 0,
    unexported boolean generated always as (requests <> exported_requests) stored,
    primary key (key_id, hour, outcome, generation)
) with (fillfactor = 70);

comment on table usage_hourly is 'Requests of each secret of a key, by hour and outcome.';
comment on column usage_hourly.hour is 'Start of the hour.';
comment on column usage_hourly.outcome is 'Code of the outcome, as in the wire format: 0 allowed, 1 missing, 2 unknown, 3 revoked, 4 expired, 5 disabled, 6 scope_denied, 7 address_denied, 8 rate_limited, 9 quota_exceeded, 10 credits_exhausted, 11 not_ready, 12 stale, 13 unsupported, 14 failed_open, 15 anonymous, 16 policy_unknown, 17 limits_unavailable, 18 kind_denied. 128 is added if the refusal was shadowed and not enforced.';
comment on column usage_hourly.cost is 'Credits.';
comment on column usage_hourly.exported_requests is 'Requests that are in usage_events.';
comment on column usage_hourly.exported_cost is 'Credits that are in usage_events.';
comment on column usage_hourly.unexported is 'Whether some requests are not in usage_events yet.';

create index usage_hourly_hour on usage_hourly (hour);
create index usage_hourly_unexported on usage_hourly (hour) where unexported;

create table usage_daily (
    key_id uuid not null references api_keys,
    day timestamptz not null,
    outcome smallint not null,
    requests bigint not null,
    cost bigint not null,
    primary key (key_id, day, outcome)
);

comment on table usage_daily is 'Old rows of usage_hourly, summed up by day.';
comment on column usage_daily.day is 'Start of the day in UTC.';
comment on column usage_daily.outcome is 'As in usage_hourly.';
comment on column usage_daily.cost is 'Credits.';

create table usage_keyless_hourly (
    hour timestamptz not null,
    outcome smallint not null,
    requests bigint not null,
    primary key (hour, outcome)
);

comment on table usage_keyless_hourly is 'Requests without a known key. They are counted in total only.';
comment on column usage_keyless_hourly.hour is 'Start of the hour.';
comment on column usage_keyless_hourly.outcome is 'As in usage_hourly.';

create table usage_keyless_daily (
    day timestamptz not null,
    outcome smallint not null,
    requests bigint not null,
    primary key (day, outcome)
);

comment on table usage_keyless_daily is 'Old rows of usage_keyless_hourly, summed up by day.';
comment on column usage_keyless_daily.day is 'Start of the day in UTC.';
comment on column usage_keyless_daily.outcome is 'As in usage_hourly.';

create table unknown_keys (
    hash bytea primary key constraint unknown_keys_hash_length check (octet_length(hash) = 32),
    first_seen_at timestamptz not null default now(),
    last_seen_at timestamptz not null default now()
);

comment on table unknown_keys is 'Keys that clients sent under a policy with capture_unknown and that are not in the store. The import of a key deletes its row.';
comment on column unknown_keys.hash is 'SHA-256 of the key, without the pepper.';
comment on column unknown_keys.last_seen_at is 'To the hour.';

create index unknown_keys_last_seen on unknown_keys (last_seen_at);

create table usage_events (
    seq bigint primary key,
    id uuid not null default gen_random_uuid(),
    key_id uuid not null,
    owner_id uuid not null,
    hour timestamptz not null,
    outcome smallint not null,
    requests bigint not null,
    cost bigint not null,
    created_at timestamptz not null default now()
);

comment on table usage_events is 'Usage for other systems: what was counted since the event before, by key, hour and outcome. Events never change. They have no foreign keys, because they outlive keys.';
comment on column usage_events.seq is 'Numbered without gaps in commit order, so that a reader resumes from the last number it has.';
comment on column usage_events.hour is 'Start of the hour.';
comment on column usage_events.outcome is 'As in usage_hourly.';
comment on column usage_events.cost is 'Credits.';

create index usage_events_created on usage_events (created_at);


-- 11. Credits
--
-- A balance is the sum of the user's rows in ledger. Inserting a row is the only way to change it.

create table ledger (
    id bigint generated always as identity primary key,
    owner_id uuid not null references user_preferences,
    at timestamptz not null default now(),
    kind text not null constraint ledger_kind check (kind in ('top_up', 'refill', 'usage', 'correction')),
    amount bigint not null,
    balance bigint not null,
    note text not null default '',
    actor_key_id uuid,
    refill_due timestamptz,
    constraint ledger_refill unique (owner_id, refill_due)
);

comment on table ledger is 'Every change of a balance.';
comment on column ledger.kind is 'top_up and correction are made by hand, refill by schedule, usage by reports of filters.';
comment on column ledger.amount is 'Credits; below zero: spent or taken away.';
comment on column ledger.balance is 'Credits of the user after this row; set by a trigger.';
comment on column ledger.actor_key_id is 'The key of the caller; null for refills and usage.';
comment on column ledger.refill_due is 'Refills only: when the refill was due. Its uniqueness keeps a refill from being booked twice.';

create index ledger_owner on ledger (owner_id, id);
create index ledger_detail on ledger (at) where kind = 'usage' and note = '';

create function book() returns trigger language plpgsql as $$
declare
    cost bigint := case when new.kind = 'usage' then -new.amount else 0 end;
begin
    update user_preferences
    set balance = balance + new.amount,
        credits_spent = saturating_add(credits_spent, cost)
    where id = new.owner_id returning balance into new.balance;
    return new;
end $$;

create trigger ledger_book before insert on ledger for each row execute function book();

-- The trigger depth is 1 for a statement of a client, and 2 for the update in book().

create function require_ledger_row() returns trigger language plpgsql as $$
begin
    if pg_trigger_depth() < 2 then
        raise exception 'a balance is the sum of its rows in ledger: insert a row there instead';
    end if;
    return new;
end $$;

create trigger user_preferences_require_ledger_row before update of balance on user_preferences
    for each row when (new.balance <> old.balance) execute function require_ledger_row();
create trigger user_preferences_start_at_zero before insert on user_preferences
    for each row when (new.balance <> 0) execute function require_ledger_row();

-- Two jobs change rows: the roll-up merges old rows of usage and keeps their sum, and the erasure of a user empties notes.

create function refuse_ledger_change() returns trigger language plpgsql as $$
begin
    if current_setting('portcullis.ledger', true) = 'on' then
        return coalesce(new, old);
    end if;
    raise exception 'rows of ledger are never changed: insert a correction instead';
end $$;

create trigger ledger_refuse_change before update or delete on ledger
    for each row execute function refuse_ledger_change();


-- 12. Quotas

create table quota_use (
    subject uuid not null,
    plan_number integer not null default 0,
    window_start timestamptz not null,
    window_end timestamptz not null,
    kind text not null,
    used bigint not null default 0,
    slots bigint[] not null default '{}',
    primary key (subject, plan_number)
);

comment on table quota_use is 'Requests counted against a quota in the present window.';
comment on column quota_use.subject is 'The key; of a quota that all keys of a user share, the user.';
comment on column quota_use.plan_number is 'The plan that such a quota belongs to; otherwise 0.';
comment on column quota_use.kind is 'Kind of the window, such as day/Europe/Berlin or rolling/3600. A quota of another kind starts a new window. Empty before the first window.';
comment on column quota_use.used is 'Requests.';
comment on column quota_use.slots is 'Rolling windows only: requests in each sixtieth of the window, the oldest first; the last one is still filling.';


-- 13. Pools and allowances
--
-- A pool is what all Envoys together may spend: of a rate limit, a quota or a balance. An allowance is what one Envoy was
-- granted of a pool. A transaction locks the row of the pool before it reads or changes its allowances, or books usage of
-- it. The allowances therefore always fit the usage. See the crate `limits`.

create table pools (
    kind smallint not null,
    subject uuid not null,
    tag bigint not null,
    arrival_ns bigint not null default 0,
    interval_ns bigint not null default 0,
    primary key (kind, subject, tag)
) with (fillfactor = 50);

comment on table pools is 'The use of shared rate limits. Of a quota and a balance, whose use is in quota_use and ledger, the row to lock.';
comment on column pools.kind is '0: rate limit; 1: quota; 2: credits.';
comment on column pools.subject is 'The key; of credits, and of what all keys of a user share, the user.';
comment on column pools.tag is 'Of a rate limit, a hash of its name; of a quota that all keys of a user share, the number of its plan; otherwise 0.';
comment on column pools.arrival_ns is 'Rate limits: theoretical arrival time of the next request, in nanoseconds of Unix time.';
comment on column pools.interval_ns is 'Rate limits: the interval between two requests by which arrival_ns was computed, in nanoseconds.';

create table allowances (
    kind smallint not null,
    subject uuid not null,
    tag bigint not null,
    reporter uuid not null,
    session bigint not null,
    granted bigint not null,
    spent bigint not null,
    returned bigint not null,
    used_at timestamptz not null,
    recalled boolean not null default false,
    primary key (kind, subject, tag, reporter)
) with (fillfactor = 50);

comment on table allowances is 'What each Envoy was granted of a pool, in requests or credits. It holds granted - spent - returned.';
comment on column allowances.reporter is 'The Envoy process.';
comment on column allowances.session is 'Number of the session, in which the sums only grow. A greater one replaces a lesser one.';
comment on column allowances.spent is 'What is booked of the grants as used.';
comment on column allowances.returned is 'What the Envoy handed back.';
comment on column allowances.used_at is 'When the Envoy last used the pool.';
comment on column allowances.recalled is 'The Envoy must hand back what it holds, and does not know it yet.';

create index allowances_recalled on allowances (reporter) where recalled;
create index allowances_reporter on allowances (reporter);

create table allowance_callers (
    reporter uuid primary key,
    sync_key_id uuid not null,
    heard_at timestamptz not null,
    ended_at timestamptz
) with (fillfactor = 50);

comment on table allowance_callers is 'Envoys that ask for allowances. What an Envoy holds that has been silent for a minute counts no longer.';
comment on column allowance_callers.sync_key_id is 'The key of the first call. Calls under another key are refused.';
comment on column allowance_callers.heard_at is 'When the Envoy last called.';
comment on column allowance_callers.ended_at is 'When the Envoy said that it ends.';

create table lone_caller (
    one boolean primary key default true constraint lone_caller_one check (one),
    reporter uuid not null default '00000000-0000-0000-0000-000000000000',
    until timestamptz not null default 'epoch'
);

comment on table lone_caller is 'The only live Envoy, in a single row. It judges by itself, so no other Envoy is granted anything until then.';

insert into lone_caller default values;

-- In PL/pgSQL, since PostgreSQL plans the body of a function in SQL at each call.
create function other_live_envoys(callers uuid[]) returns bigint language plpgsql volatile as $$
begin
    return (
        select count(*) from (
            select reporter from allowance_callers
            where ended_at is null and heard_at > clock_timestamp() - interval '10 seconds'
            union
            select f.reporter from filters f left join allowance_callers c on c.reporter = f.reporter
            where f.seen_at > clock_timestamp() - interval '60 seconds'
                and (c.reporter is null or (c.ended_at is null and f.seen_at > c.heard_at + interval '10 seconds'))
        ) live where reporter <> all (callers)
    );
end
$$;

comment on function other_live_envoys is 'Number of live Envoys beside these. An Envoy that calls is live until 10 seconds after its last call. One that does not call, because it uses no shared limit, is live while it polls; a poll is held for up to 25 seconds.';


-- 14. Views
--
-- Shapes that several queries read. PostgreSQL does not say which columns of a view are never null, so the queries do.

create view keys_with_usage as
select k.id, k.owner_id, p.email, k.name, k.prefix, k.kind, k.attributes, k.scopes, k.rate_limits, k.generation, k.version, k.disabled,
    k.disabled_by_admin, k.created_at, k.expires_at, k.revoked_at, u.last_used_at, u.usage_count
from api_keys k
join user_preferences p on p.id = k.owner_id
cross join lateral (
    select saturate(sum(requests)) as usage_count, max(last_used_at) as last_used_at from key_usage where key_id = k.id
) u;

comment on view keys_with_usage is 'Keys as people see them, with the allowed requests of all their secrets.';

create view key_permissions as
select k.id, k.networks, k.quota, k.cost, own.name as plan, effective.name as effective_plan,
    array(
        select d.name from unnest(k.role_numbers) with ordinality as r (number, place)
        join definitions d on d.number = r.number where not d.removed order by r.place
    ) as roles,
    k.scopes || array(
        select s.scope from unnest(k.role_numbers) with ordinality as r (number, place)
        join definitions d on d.number = r.number
        cross join lateral unnest(d.scopes) with ordinality as s (scope, place)
        where not d.removed order by r.place, s.place
    ) || coalesce(effective.scopes, '{}') as scopes
from api_keys k
left join definitions own on own.number = k.plan_number and not own.removed
left join definitions effective
    on effective.number = coalesce(k.plan_number, k.owner_plan_number) and not effective.removed;

comment on view key_permissions is 'What keys may do, with roles and plans by name.';
comment on column key_permissions.plan is 'The key''s own plan.';
comment on column key_permissions.effective_plan is 'The plan that applies: the key''s own or that of the user.';
comment on column key_permissions.scopes is 'Scopes of the key, of its roles and of its plan, in this order; one may occur several times.';

create view key_quotas as
select k.id, k.owner_id, k.applied_quota as quota, s.subject, s.plan_number, k.quota_exceeded, k.quota_resets_at,
    coalesce(u.kind, '') as kind, coalesce(u.window_start, 'epoch') as window_start,
    coalesce(u.window_end, 'epoch') as window_end, coalesce(u.used, 0) as used, coalesce(u.slots, '{}') as slots
from api_keys k
cross join lateral (
    select case when shared then k.owner_id else k.id end as subject,
        case when shared then coalesce(k.plan_number, k.owner_plan_number, 0) else 0 end as plan_number
    from (select coalesce(k.applied_quota ->> 'per' = 'owner', false) as shared) per
) s
left join quota_use u on u.subject = s.subject and u.plan_number = s.plan_number;

comment on view key_quotas is 'The quota that applies to each key, its own or that of its plan, with the stored window. Kind is empty if there is none.';
comment on column key_quotas.subject is 'As quota_use.subject.';
comment on column key_quotas.plan_number is 'As quota_use.plan_number.';

create view held_tokens as
select a.kind, a.subject, a.tag, saturate(sum(greatest(a.granted - a.spent - a.returned, 0))) as held
from allowances a join allowance_callers c on c.reporter = a.reporter
where c.heard_at > now() - interval '60 seconds'
group by a.kind, a.subject, a.tag;

comment on view held_tokens is 'What Envoys hold of each pool and have not used.';

create view users_with_counts as
select p.id, p.email, d.name as plan, p.attributes, p.time_zone, p.balance, p.metered, p.refill, p.refill_at, p.created_at, p.version, k.live_keys,
    k.total_keys
from user_preferences p
left join definitions d on d.number = p.plan_number
cross join lateral (
    select count(*) as total_keys,
        count(*) filter (where revoked_at is null and (expires_at is null or expires_at > now())) as live_keys
    from api_keys where owner_id = p.id
) k;

comment on view users_with_counts is 'Users with the name of their plan and the number of their keys. A live key is neither revoked nor expired.';
