-- Who switched a key off, and what requests have cost an owner: neither has to be looked up in the audit trail or added up.

alter table api_keys
    add column disabled_by_admin boolean not null default false,
    add constraint api_keys_disabled_by_admin check (disabled or not disabled_by_admin);

comment on column api_keys.disabled_by_admin is 'Whether an admin switched it off: then only an admin switches it on again.';

-- Nobody noted who it was: whoever wants such a key on asks an admin.
update api_keys set disabled_by_admin = true where disabled;

alter table user_preferences add column credits_spent bigint not null default 0;

comment on column user_preferences.credits_spent is 'Credits that requests have ever cost; kept by the trigger that keeps the balance.';

update user_preferences set credits_spent = used.spent
from (
    select owner_id, least(-sum(amount), 9223372036854775807)::bigint as spent
    from ledger where kind = 'usage' group by owner_id
) used
where used.owner_id = user_preferences.id;

create or replace function book() returns trigger language plpgsql as $$
declare
    cost bigint := case when new.kind = 'usage' then -new.amount else 0 end;
begin
    update user_preferences
    set balance = balance + new.amount,
        credits_spent = least(credits_spent, 9223372036854775807 - greatest(cost, 0)) + cost
    where id = new.owner_id returning balance into new.balance;
    return new;
end $$;
