-- Rotation, conditional changes, retries of requests, and who did what.

alter table api_keys add column version bigint not null default 1;

comment on column api_keys.version is 'Counted up with each change, also of what filters do not see: the ETag.';

create function count_version() returns trigger language plpgsql as $$
begin
    new.version := old.version + 1;
    return new;
end $$;

create trigger api_keys_0_version before update on api_keys for each row execute function count_version();

-- A key that is rotated keeps its row and gets a new hash. The old secret moves here, where it works until its end.

create table retired_secrets (
    hash bytea primary key constraint retired_secrets_hash_length check (octet_length(hash) = 32),
    key_id uuid not null references api_keys,
    generation integer not null,
    prefix text,
    ends_at timestamptz not null,
    withdrawn boolean not null default false,
    revision bigint not null,
    retired_at timestamptz not null default now()
);

comment on table retired_secrets is 'Secrets of keys that were rotated.';
comment on column retired_secrets.hash is 'SHA-256 of the secret.';
comment on column retired_secrets.ends_at is 'When it stops working.';
comment on column retired_secrets.withdrawn is 'Ended so long ago that filters need not tell it from an unknown key.';
comment on column retired_secrets.revision is 'Of the last change that filters see; assigned by a trigger.';

create index retired_secrets_key on retired_secrets (key_id, generation);
create index retired_secrets_revision on retired_secrets (revision);
create index retired_secrets_prefix on retired_secrets (prefix text_pattern_ops);

create trigger retired_secrets_1_next_revision before insert or update on retired_secrets
    for each statement execute function next_revision();
create trigger retired_secrets_2_assign_revision before insert or update on retired_secrets
    for each row execute function assign_revision();

create function keep_secrets() returns trigger language plpgsql as $$
begin
    raise exception 'rows of retired_secrets are never deleted: set their end instead';
end $$;

create trigger retired_secrets_3_keep before delete or truncate on retired_secrets
    for each statement execute function keep_secrets();
create trigger retired_secrets_4_keep_hash before update of hash, key_id, generation on retired_secrets
    for each row when (new.hash is distinct from old.hash or new.key_id <> old.key_id or new.generation <> old.generation)
    execute function keep_hashes();

-- Filters know a secret by its hash: they would keep the old one alive if it just changed.

drop trigger api_keys_4_keep_hash on api_keys;

create or replace function keep_hashes() returns trigger language plpgsql as $$
begin
    if tg_table_name = 'api_keys' and new.generation = old.generation + 1
        and exists (select from retired_secrets where hash = old.hash and key_id = old.id)
    then
        return new;
    end if;
    raise exception 'the hash of a secret never changes: retire the secret and give the key a new one';
end $$;

-- With a predicate, so that no foreign key could refer to it: otherwise a rotation would wait for every transaction that
-- counts the key's usage, and could wait in a circle.
alter table api_keys drop constraint api_keys_hash_key;
create unique index api_keys_hash_key on api_keys (hash) where hash is not null;

create trigger api_keys_4_keep_hash before update of hash on api_keys
    for each row when (new.hash is distinct from old.hash) execute function keep_hashes();

create function refuse_retired() returns trigger language plpgsql as $$
begin
    if exists (select from retired_secrets where hash = new.hash) then
        raise unique_violation using message = 'this key was used before', constraint = 'api_keys_hash_key';
    end if;
    return new;
end $$;

create trigger api_keys_5_refuse_retired before insert or update of hash on api_keys
    for each row execute function refuse_retired();

-- Answers to requests that carry an Idempotency-Key, for those that come again.

create table idempotent_replies (
    caller_key_id uuid not null references api_keys,
    idempotency_key text not null,
    fingerprint bytea not null,
    status smallint,
    location text,
    etag text,
    nonce bytea,
    body bytea,
    created_at timestamptz not null default now(),
    primary key (caller_key_id, idempotency_key)
);

comment on table idempotent_replies is 'Kept for a day.';
comment on column idempotent_replies.fingerprint is 'SHA-256 of method, path and body: the same key with another request is a mistake.';
comment on column idempotent_replies.body is 'The reply, sealed under the secret of the caller: new secrets stand in it.';

create index idempotent_replies_created on idempotent_replies (created_at);

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

comment on table audit is 'Who changed what, when, from where. Never a secret.';
comment on column audit.actor_key_id is 'The key that called; null for the command line and for what happens by itself.';
comment on column audit.key_id is 'The key that was changed, if it was one.';
comment on column audit.target is 'What was changed, if it was not a key: a user, a role, a plan.';

create index audit_key on audit (key_id, id);
create index audit_actor on audit (actor_key_id, id);
