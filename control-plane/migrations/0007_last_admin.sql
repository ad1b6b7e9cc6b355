-- The last key that opens the management of keys is not lost by accident: neither revoked, disabled, deprived of its scope
-- nor made to end within a day. Whoever means it says so: set portcullis.force = 'on'.

create index api_keys_admins on api_keys (id) where 'admin' = any (scopes) and revoked_at is null;

create function keep_an_admin() returns trigger language plpgsql as $$
declare
    moment timestamptz;
begin
    if current_setting('portcullis.force', true) = 'on' then
        return null;
    end if;
    -- One that works now, and one that will still work tomorrow, if there was one before. Revisions are taken under the lock
    -- of store_state, so two changes at once cannot each count on the other's key.
    foreach moment in array array[clock_timestamp(), clock_timestamp() + interval '1 day'] loop
        if (old.expires_at is null or old.expires_at > moment) and not exists (
            select from api_keys
            where 'admin' = any (scopes) and revoked_at is null and not disabled
                and (expires_at is null or expires_at > moment)
        ) then
            raise exception 'this would end the last key that manages keys'
                using errcode = 'check_violation', constraint = 'api_keys_last_admin';
        end if;
    end loop;
    return null;
end $$;

create trigger api_keys_7_keep_an_admin after update on api_keys
    for each row when ('admin' = any (old.scopes) and old.revoked_at is null and not old.disabled)
    execute function keep_an_admin();
