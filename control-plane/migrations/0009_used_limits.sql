-- How far limits that Envoys share are used, over all of them. An Envoy whose share grows is told, lest the limit be used
-- anew wherever the load moves to.

alter table leases add column used jsonb not null default '{}';

comment on column leases.used is 'Of the anchor of a share: until when each limit is used at its whole rate, in milliseconds of Unix time, by its tag.';
