-- The last admin key is not bound to networks that its holder is not in. A key that is bound to networks is taken to work
-- only for a caller in one of them: the control plane says where the present caller is (portcullis.address). Changes by hand
-- say nothing; for them only keys count that are bound to no network.

create function serves_address(networks text[], address text) returns boolean language plpgsql stable as $$
begin
    return networks = '{}' or (coalesce(address, '') <> '' and address::inet <<= any (networks::inet[]));
exception when invalid_text_representation then
    return false;
end $$;

create or replace function keep_an_admin() returns trigger language plpgsql as $$
declare
    moment timestamptz;
    address text := current_setting('portcullis.address', true);
begin
    if current_setting('portcullis.force', true) = 'on' then
        return null;
    end if;
    -- One that works now, and one that will still work tomorrow, if there was one before. Revisions are taken under the lock
    -- of store_state, so two changes at once cannot each count on the other's key.
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
        if serves_address(old.networks, address) and not exists (
            select from api_keys
            where 'admin' = any (scopes) and revoked_at is null and not disabled
                and (expires_at is null or expires_at > moment) and serves_address(networks, address)
        ) then
            raise exception 'no key that manages keys could be used from here any more'
                using errcode = 'check_violation', constraint = 'api_keys_last_admin_here';
        end if;
    end loop;
    return null;
end $$;
