-- Which pepper imported keys are stored under, so that a forgotten or another one is noticed before keys are stored under it.

alter table store_state add column pepper_check bytea;

comment on column store_state.pepper_check is 'A hash under the pepper of imported keys; null as long as there was none.';
