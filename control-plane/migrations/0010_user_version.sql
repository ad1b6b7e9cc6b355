-- Conditional changes of users: what was set of them since somebody read it.

alter table user_preferences add column version bigint not null default 1;

comment on column user_preferences.version is 'Counted up whenever what is set of the user changes: plan, metered, refill. The ETag; what is used, and what comes in, does not count.';

create trigger user_preferences_0_version before update of plan_number, metered, refill on user_preferences
    for each row when (
        new.plan_number is distinct from old.plan_number
        or new.metered <> old.metered
        or new.refill is distinct from old.refill
    ) execute function count_version();
