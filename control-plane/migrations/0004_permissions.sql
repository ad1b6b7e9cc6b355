-- Roles, plans, networks: what a key may, beside what stands in its own row.

create table definitions (
    number integer generated always as identity primary key,
    kind text not null constraint definitions_kind check (kind in ('role', 'plan')),
    name text not null,
    description text not null default '',
    scopes text[] not null default '{}' constraint definitions_scopes check (not scopes && '{admin, sync}'),
    rate_limits jsonb not null default '[]',
    quota jsonb,
    removed boolean not null default false,
    version bigint not null default 1,
    revision bigint not null,
    created_at timestamptz not null default now()
);

comment on table definitions is 'Roles and plans. Keys refer to them by number; names are free again once they are removed.';
comment on column definitions.scopes is 'Never those that open the control plane: a key has them from nobody but itself.';
comment on column definitions.rate_limits is 'As in api_keys; of plans.';
comment on column definitions.quota is 'As in api_keys; of plans.';
comment on column definitions.version is 'Counted up with each change: the ETag.';
comment on column definitions.revision is 'Of the last change that filters see; assigned by a trigger.';

create unique index definitions_name on definitions (kind, name) where not removed;
create index definitions_revision on definitions (revision);

create trigger definitions_0_version before update on definitions for each row execute function count_version();
create trigger definitions_1_next_revision before insert or update on definitions
    for each statement execute function next_revision();
create trigger definitions_2_assign_revision before insert or update on definitions
    for each row execute function assign_revision();

alter table user_preferences
    add column plan_number integer references definitions,
    add column metered boolean not null default false,
    add column credits_starter integer not null default 0,
    add column credits_turn integer not null default 1,
    add column refill jsonb,
    add column refill_at timestamptz;

comment on column user_preferences.plan_number is 'The plan of keys that have none of their own.';
comment on column user_preferences.metered is 'Whether requests cost credits. Otherwise they are free.';
comment on column user_preferences.credits_starter is 'Credits that an Envoy may spend before it was leased any in this turn.';
comment on column user_preferences.credits_turn is 'Counted up whenever credits come in after they were used up.';
comment on column user_preferences.refill is '{"amount", "period": "day" | "week" | "month", "time_zone", "up_to"}: credits that come in by themselves.';
comment on column user_preferences.refill_at is 'When they next do.';

create index user_preferences_refill on user_preferences (refill_at) where refill_at is not null;

drop trigger api_keys_1_next_revision on api_keys;
drop trigger api_keys_2_assign_revision on api_keys;

alter table api_keys
    drop column address_list_id,
    add column plan_number integer references definitions,
    add column owner_plan_number integer,
    add column role_numbers integer[] not null default '{}',
    add column networks text[] not null default '{}',
    add column quota jsonb,
    add column quota_starter integer,
    add column quota_turn integer not null default 1,
    add column quota_resets_at timestamptz,
    add column credits_starter integer,
    add column credits_turn integer not null default 1;

comment on column api_keys.rate_limits is 'List of {"name", "requests", "window_s", "burst", "alone"}; window in seconds; alone: each Envoy judges it by itself.';
comment on column api_keys.plan_number is 'The key''s own plan.';
comment on column api_keys.owner_plan_number is 'Its owner''s, which applies if it has none of its own; kept by triggers. It refers to definitions by way of the owner, whose row has the foreign key: a check here would lock the definition after store_state.';
comment on column api_keys.role_numbers is 'Its roles.';
comment on column api_keys.networks is 'Networks in CIDR notation that it may be used from; empty: any.';
comment on column api_keys.quota is '{"requests", "period": "day" | "week" | "month" | "rolling", "time_zone", "window_s"}; the plan''s applies if it has none of its own.';
comment on column api_keys.quota_starter is 'Requests that an Envoy may let in before it was leased any in this turn; null without a quota.';
comment on column api_keys.quota_turn is 'Counted up whenever the quota opens again after it was used up.';
comment on column api_keys.quota_resets_at is 'When a quota that is used up is filled anew.';
comment on column api_keys.credits_starter is 'Its owner''s, null if the owner is not metered; kept by triggers.';
comment on column api_keys.credits_turn is 'Its owner''s; kept by triggers.';

create index api_keys_plan on api_keys (coalesce(plan_number, owner_plan_number))
    where coalesce(plan_number, owner_plan_number) is not null;
create index api_keys_roles on api_keys using gin (role_numbers) where role_numbers <> '{}';
create index api_keys_prefix on api_keys (prefix text_pattern_ops);
create index api_keys_quota_reset on api_keys (quota_resets_at) where quota_exceeded;

create trigger api_keys_1_next_revision
    before insert or update of
        owner_id, hash, generation, scopes, rate_limits, cost, expires_at, disabled, quota_exceeded, credits_exhausted,
        revoked_at, withdrawn, plan_number, owner_plan_number, role_numbers, networks, quota_starter, quota_turn,
        quota_resets_at, credits_starter, credits_turn
    on api_keys for each statement execute function next_revision();

create trigger api_keys_2_assign_revision
    before insert or update of
        owner_id, hash, generation, scopes, rate_limits, cost, expires_at, disabled, quota_exceeded, credits_exhausted,
        revoked_at, withdrawn, plan_number, owner_plan_number, role_numbers, networks, quota_starter, quota_turn,
        quota_resets_at, credits_starter, credits_turn
    on api_keys for each row execute function assign_revision();

-- What a key has from its owner stands in its row, so that filters' records come from one table.

create function inherit_from_owner() returns trigger language plpgsql as $$
begin
    select plan_number, case when metered then credits_starter end, credits_turn, metered and balance <= 0
        into new.owner_plan_number, new.credits_starter, new.credits_turn, new.credits_exhausted
        from user_preferences where id = new.owner_id;
    return new;
end $$;

create trigger api_keys_6_inherit before insert on api_keys for each row execute function inherit_from_owner();

create function pass_on_to_keys() returns trigger language plpgsql as $$
begin
    update api_keys set
        owner_plan_number = new.plan_number,
        credits_starter = case when new.metered then new.credits_starter end,
        credits_turn = new.credits_turn,
        credits_exhausted = new.metered and new.balance <= 0
    where owner_id = new.id and not withdrawn;
    return null;
end $$;

create trigger user_preferences_1_pass_on
    after update of plan_number, metered, credits_starter, credits_turn, balance on user_preferences
    for each row when (
        new.plan_number is distinct from old.plan_number
        or new.metered <> old.metered
        or new.credits_starter <> old.credits_starter
        or new.credits_turn <> old.credits_turn
        or (new.metered and (new.balance <= 0) <> (old.balance <= 0))
    ) execute function pass_on_to_keys();
