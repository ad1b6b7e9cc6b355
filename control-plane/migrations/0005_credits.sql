-- Credits and quotas: what is left, what Envoys hold of it, and every change of a balance.

create table ledger (
    id bigint generated always as identity primary key,
    owner_id uuid not null references user_preferences,
    at timestamptz not null default now(),
    kind text not null constraint ledger_kind check (kind in ('opening', 'top_up', 'refill', 'usage', 'correction')),
    amount bigint not null,
    balance bigint not null,
    note text not null default '',
    actor_key_id uuid,
    refill_due timestamptz,
    constraint ledger_refill unique (owner_id, refill_due)
);

comment on table ledger is 'Every change of a balance of credits. A balance is the sum of its rows.';
comment on column ledger.amount is 'Credits that came in, or, below zero, were used.';
comment on column ledger.balance is 'The balance with this row; set by a trigger.';
comment on column ledger.refill_due is 'Of a refill: when it was due, so that each is booked once.';

create index ledger_owner on ledger (owner_id, id);
create index ledger_detail on ledger (at) where kind = 'usage' and note = '';

-- A balance changes by a row of the ledger, and by nothing else.

create function book() returns trigger language plpgsql as $$
begin
    update user_preferences set balance = balance + new.amount where id = new.owner_id returning balance into new.balance;
    return new;
end $$;

create function keep_balance() returns trigger language plpgsql as $$
begin
    if pg_trigger_depth() < 2 then
        raise exception 'a balance is the sum of its rows in ledger: insert a row there instead';
    end if;
    return new;
end $$;

-- Balances from before there was a ledger.
insert into ledger (owner_id, kind, amount, balance)
    select id, 'opening', balance, balance from user_preferences where balance <> 0;

create trigger ledger_1_book before insert on ledger for each row execute function book();
create trigger user_preferences_0_keep_balance before update of balance on user_preferences
    for each row when (new.balance <> old.balance) execute function keep_balance();
create trigger user_preferences_0_no_gift before insert on user_preferences
    for each row when (new.balance <> 0) execute function keep_balance();

create function keep_ledger() returns trigger language plpgsql as $$
begin
    if current_setting('portcullis.roll_up', true) = 'on' then
        return coalesce(new, old);
    end if;
    raise exception 'rows of ledger are never changed: insert a correction instead';
end $$;

create trigger ledger_2_keep before update or delete on ledger for each row execute function keep_ledger();

create table quota_use (
    key_id uuid primary key references api_keys,
    window_start timestamptz not null,
    window_end timestamptz not null,
    kind text not null,
    used bigint not null default 0,
    slots bigint[] not null default '{}'
);

comment on table quota_use is 'What was used of the quotas of keys, in the running window.';
comment on column quota_use.kind is 'What windows these are, as day/Europe/Berlin or rolling/3600: a quota of another kind begins a new window.';
comment on column quota_use.slots is 'Of a rolling window: what was used in each sixtieth of it, the oldest first; the last is the running one.';

create table leases (
    stock smallint not null,
    subject uuid not null,
    reporter uuid not null,
    told bigint not null,
    held bigint not null,
    told_seq bigint not null,
    turn integer not null default 0,
    spent bigint not null default 0,
    demand double precision not null default 0,
    renewed_at timestamptz not null default now(),
    primary key (stock, subject, reporter)
);

comment on table leases is 'What each Envoy holds of stocks that all of them draw from.';
comment on column leases.reporter is 'The Envoy process; all zeros in the row whose lock orders the changes of a stock.';
comment on column leases.stock is '0: share of a key''s rate limits, parts per million; 1: quota of a key, requests; 2: credits of an owner.';
comment on column leases.subject is 'The key, or the owner.';
comment on column leases.told is 'What the Envoy was last told: a share, or all that it was ever granted.';
comment on column leases.held is 'The most that the Envoy may believe it holds, until a report shows that it has heard what it was told last.';
comment on column leases.told_seq is 'The report that was answered with it.';
comment on column leases.turn is 'As of which turn of the stock.';
comment on column leases.spent is 'All that the Envoy has reported as spent.';
comment on column leases.demand is 'Requests or credits a second, lately.';

create index leases_reporter on leases (reporter);

-- Calendar windows of quotas and refills. A time zone that this server does not know counts as UTC.

create function calendar_window(period text, zone text, at timestamptz, out starts timestamptz, out ends timestamptz)
language plpgsql stable strict as $$
begin
    starts := date_trunc(period, at, zone);
    ends := ((starts at time zone zone) + ('1 ' || period)::interval) at time zone zone;
exception when invalid_parameter_value then
    starts := date_trunc(period, at, 'UTC');
    ends := ((starts at time zone 'UTC') + ('1 ' || period)::interval) at time zone 'UTC';
end $$;
