-- Keys and their owners. Only hashes of keys are stored.

create table user_preferences (
    id uuid primary key,
    email text not null constraint user_preferences_email_key unique
        constraint user_preferences_email_lower check (email = lower(email)),
    balance bigint not null default 0,
    primary_key_id uuid,
    created_at timestamptz not null default now()
);

comment on table user_preferences is 'Users: the owners of keys.';
comment on column user_preferences.balance is 'Credits.';
comment on column user_preferences.primary_key_id is 'The key that the endpoints below /api/user manage.';

create table api_keys (
    id uuid primary key,
    owner_id uuid not null references user_preferences,
    name text not null,
    hash bytea not null constraint api_keys_hash_key unique
        constraint api_keys_hash_length check (octet_length(hash) = 32),
    prefix text,
    generation integer not null default 1,
    scopes text[] not null default '{}',
    rate_limits jsonb not null default '[]',
    cost integer not null default 1 constraint api_keys_cost_positive check (cost >= 0),
    address_list_id integer,
    expires_at timestamptz,
    disabled boolean not null default false,
    quota_exceeded boolean not null default false,
    credits_exhausted boolean not null default false,
    revoked_at timestamptz,
    withdrawn boolean not null default false,
    revision bigint not null,
    created_at timestamptz not null default now()
);

comment on column api_keys.hash is 'SHA-256 of the key.';
comment on column api_keys.prefix is 'What people recognise the key by.';
comment on column api_keys.rate_limits is 'List of {"name", "requests", "window_s", "burst"}; window in seconds.';
comment on column api_keys.cost is 'Credits that a request costs.';
comment on column api_keys.withdrawn is 'Revoked so long ago that filters need not tell it from an unknown key.';
comment on column api_keys.revision is 'Of the last change that filters see; assigned by a trigger.';

create index api_keys_revision on api_keys (revision);
create index api_keys_owner on api_keys (owner_id, id);

alter table user_preferences
    add constraint user_preferences_primary_key_fkey foreign key (primary_key_id) references api_keys;

create table store_state (
    one boolean primary key default true constraint store_state_one check (one),
    epoch uuid not null default gen_random_uuid(),
    identity text not null default '',
    revision bigint not null default 0
);

comment on table store_state is 'One row: how far the key store is. Its lock orders the commits of all changes.';
comment on column store_state.epoch is 'Names this life of the database.';
comment on column store_state.identity is 'Server, timeline and database that the epoch was drawn for.';

insert into store_state default values;

-- A change of what filters see takes the next revision while it holds the lock of store_state until it commits, so that
-- revisions follow commit order: whoever has seen revision n has seen every change up to n.

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

create function keep_keys() returns trigger language plpgsql as $$
begin
    raise exception 'rows of api_keys are never deleted: revoke the key instead';
end $$;

create trigger api_keys_1_next_revision
    before insert or update of
        owner_id, generation, scopes, rate_limits, cost, address_list_id, expires_at, disabled, quota_exceeded,
        credits_exhausted, revoked_at, withdrawn
    on api_keys for each statement execute function next_revision();

create trigger api_keys_2_assign_revision
    before insert or update of
        owner_id, generation, scopes, rate_limits, cost, address_list_id, expires_at, disabled, quota_exceeded,
        credits_exhausted, revoked_at, withdrawn
    on api_keys for each row execute function assign_revision();

-- Filters know a key by its hash: they would keep the old one alive if it changed.

create function keep_hashes() returns trigger language plpgsql as $$
begin
    raise exception 'the hash of a key never changes: make another key and revoke this one';
end $$;

create trigger api_keys_4_keep_hash before update of hash on api_keys
    for each row when (new.hash is distinct from old.hash) execute function keep_hashes();

create trigger api_keys_3_keep before delete or truncate on api_keys for each statement execute function keep_keys();
