-- Envoys sign the usage that they write into their log. What the signatures are verified with is derived from the sync key,
-- which the control plane sees in each call of a filter and does not store.

create table usage_log_keys (
    key_id uuid not null references api_keys on delete cascade,
    generation integer not null,
    log_key bytea not null constraint usage_log_keys_length check (octet_length(log_key) = 32),
    primary key (key_id, generation)
);

comment on table usage_log_keys is 'Keys that lines of usage in Envoys'' logs are signed with, one for each secret of a sync key.';
comment on column usage_log_keys.log_key is 'HMAC-SHA-256 under the secret. Signs such lines and nothing else.';
