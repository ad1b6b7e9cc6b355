-- Counts are added to the same rows over and over. PostgreSQL leaves all indexes alone where a row changes within its page
-- and no column that an index names changes with it: pages keep some room, and no index names the counts any longer.

alter table usage_hourly
    add column unexported boolean generated always as (requests <> exported_requests) stored,
    set (fillfactor = 70);

comment on column usage_hourly.unexported is 'Whether some of it is not in usage_events yet.';

drop index usage_hourly_unexported;
create index usage_hourly_unexported on usage_hourly (hour) where unexported;

alter table key_usage set (fillfactor = 70);
