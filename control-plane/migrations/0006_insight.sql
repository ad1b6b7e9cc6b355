-- Which Envoys sync and how far they are; usage that is rolled up; usage for others to take over.

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

comment on table filters is 'Envoys that sync, as they said with their last poll.';
comment on column filters.epoch is 'All zeros if it has not said yet that its store is complete.';
comment on column filters.revision is 'Every change up to it is in the Envoy''s store.';
comment on column filters.confirmed_at is 'When the Envoy last said so; when it first came, if it has not yet.';
comment on column filters.seen_at is 'When it was last heard of.';
comment on column filters.pending_requests is 'Requests that it counted and has not seen acknowledged.';

create index filters_seen on filters (seen_at);

create table usage_daily (
    key_id uuid not null references api_keys,
    day timestamptz not null,
    outcome smallint not null,
    requests bigint not null,
    cost bigint not null,
    primary key (key_id, day, outcome)
);

comment on table usage_daily is 'Rows of usage_hourly that were rolled up.';
comment on column usage_daily.day is 'The start of the day, in UTC.';

create table usage_keyless_daily (
    day timestamptz not null,
    outcome smallint not null,
    requests bigint not null,
    primary key (day, outcome)
);

comment on table usage_keyless_daily is 'Rows of usage_keyless_hourly that were rolled up.';
comment on column usage_keyless_daily.day is 'The start of the day, in UTC.';

alter table usage_hourly
    add column exported_requests bigint not null default 0,
    add column exported_cost bigint not null default 0;

comment on column usage_hourly.outcome is 'Code of the outcome; 128 more if it was told and not enforced.';
comment on column usage_hourly.exported_requests is 'So many are in usage_events.';
comment on column usage_hourly.exported_cost is 'So many are in usage_events.';

create index usage_hourly_hour on usage_hourly (hour);
create index usage_hourly_unexported on usage_hourly (hour) where requests <> exported_requests;

create table usage_events (
    seq bigint primary key,
    id uuid not null default gen_random_uuid(),
    key_id uuid not null references api_keys,
    owner_id uuid not null,
    hour timestamptz not null,
    outcome smallint not null,
    requests bigint not null,
    cost bigint not null,
    created_at timestamptz not null default now()
);

comment on table usage_events is 'What was counted since the event before, by key, hour and outcome. Events never change.';
comment on column usage_events.seq is 'Counted up without gaps in the order of commits.';

create index usage_events_created on usage_events (created_at);
