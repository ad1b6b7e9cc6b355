-- How many Envoys came under each sync key lately.

alter table usage_reporters add column created_at timestamptz not null default now();

comment on column usage_reporters.created_at is 'When its first report came.';

create index usage_reporters_sync_key on usage_reporters (sync_key_id, created_at);
