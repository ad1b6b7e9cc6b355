-- Usage, as filters report it.

create table usage_reporters (
    reporter uuid primary key,
    sync_key_id uuid references api_keys,
    last_seq bigint not null,
    reported_at timestamptz not null default now()
);

comment on table usage_reporters is 'Envoy processes, each with the last report that was applied.';
comment on column usage_reporters.sync_key_id is 'The key that the reporter first used; no other may report for it. Null if it is known from log lines only.';

create table key_usage (
    key_id uuid not null references api_keys,
    generation integer not null,
    requests bigint not null,
    last_used_at timestamptz not null,
    primary key (key_id, generation)
);

comment on table key_usage is 'Allowed requests of each secret of each key.';

create table usage_hourly (
    key_id uuid not null references api_keys,
    hour timestamptz not null,
    outcome smallint not null,
    generation integer not null,
    requests bigint not null,
    cost bigint not null,
    primary key (key_id, hour, outcome, generation)
);

comment on column usage_hourly.hour is 'The start of the hour.';
comment on column usage_hourly.outcome is 'Code of the outcome.';
comment on column usage_hourly.cost is 'Credits.';

create table usage_keyless_hourly (
    hour timestamptz not null,
    outcome smallint not null,
    requests bigint not null,
    primary key (hour, outcome)
);

comment on table usage_keyless_hourly is 'Requests without a known key, which are only ever counted in total.';
