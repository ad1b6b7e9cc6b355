-- What one owner makes a day and leaves behind is bounded, and what nobody needs any more can be deleted.

alter table user_preferences
    add column makes integer not null default 0,
    add column changes integer not null default 0,
    add column makes_since timestamptz;

comment on column user_preferences.makes is 'Keys that the owner''s own keys made, and rotations, in the 24 hours since makes_since.';
comment on column user_preferences.changes is 'Changes of keys that the owner''s own keys made in that time.';
comment on column user_preferences.makes_since is 'When the first of these was made; null: none yet.';

create index user_preferences_primary_key on user_preferences (primary_key_id) where primary_key_id is not null;

comment on column api_keys.withdrawn is 'Filters need not tell it from an unknown key: it was revoked long ago, or its owner has many keys that ended later.';

create index api_keys_ended on api_keys (owner_id, (least(revoked_at, expires_at))) where not withdrawn;

-- A key that ended and was withdrawn may be given a later end. It missed the changes of its owner meanwhile.
create trigger api_keys_8_inherit_again before update of withdrawn on api_keys
    for each row when (old.withdrawn and not new.withdrawn) execute function inherit_from_owner();

alter table retired_secrets add column owner_id uuid;

comment on column retired_secrets.owner_id is 'The owner of the key, so that ended secrets are found by owner; set by a trigger. No foreign key: its check would lock the owner after store_state.';

create function owner_of_secret() returns trigger language plpgsql as $$
begin
    select owner_id into new.owner_id from api_keys where id = new.key_id;
    return new;
end $$;

create trigger retired_secrets_5_owner before insert on retired_secrets
    for each row execute function owner_of_secret();

create index retired_secrets_owner on retired_secrets (owner_id, ends_at) where not withdrawn;

-- Rows of keys that filters have forgotten are deleted only where the operator chose so.

create or replace function keep_keys() returns trigger language plpgsql as $$
begin
    if tg_op = 'DELETE' and current_setting('portcullis.purge', true) = 'on' then
        return null;
    end if;
    raise exception 'rows of api_keys are never deleted: revoke the key instead';
end $$;

create or replace function keep_secrets() returns trigger language plpgsql as $$
begin
    if tg_op = 'DELETE' and current_setting('portcullis.purge', true) = 'on' then
        return null;
    end if;
    raise exception 'rows of retired_secrets are never deleted: set their end instead';
end $$;

create index audit_at on audit (at);

-- Events name the owner themselves. They outlive a key whose usage is not kept as long as they are.
alter table usage_events drop constraint usage_events_key_id_fkey;
