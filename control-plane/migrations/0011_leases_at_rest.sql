-- An Envoy that gives a lease back because it does not use it may spend a little when it begins again, so that requests that
-- come seldom are not refused first.

alter table leases add column rest bigint not null default 0;

comment on column leases.rest is 'What the Envoy was told beyond told, to begin again with. Nobody else is leased less for it.';
