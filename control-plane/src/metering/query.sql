-- $1 are the cuts between the spans, the start and the end of the range included: span n lies between cuts n and n + 1.
-- A cut day is one that is stored as a whole and lies in more than one span. All of it is in the first of them.
with counted as (
    select key_id, width_bucket(at, $1::timestamptz[]) as span, case when 'outcome' = any($2) then outcome end as outcome,
        sum(requests) as requests, sum(requests) filter (where outcome = $13) as allowed,
        sum(requests) filter (where outcome = any($14)) as refused, sum(cost) as cost,
        max(at) filter (
            where last > at and width_bucket(at, $1::timestamptz[]) <> width_bucket(last, $1::timestamptz[])
        ) as cut_day
    from (
        select key_id, hour as at, hour as last, outcome, requests, cost from usage_hourly
        where hour >= $3 and hour < $4
        union all
        select key_id, day, day + interval '23 hours', outcome, requests, cost from usage_daily
        where day > $3 - interval '24 hours' and day < $4
        union all
        select null, hour, hour, outcome, requests, 0 from usage_keyless_hourly
        where $5 and hour >= $3 and hour < $4
        union all
        select null, day, day + interval '23 hours', outcome, requests, 0 from usage_keyless_daily
        where $5 and day > $3 - interval '24 hours' and day < $4
    ) all_of_it
    where ($6::uuid is null or key_id = $6) and ($7::smallint is null or outcome = $7)
        and ($8::text is null or key_id in (
            select k.id from api_keys k join user_preferences p on p.id = k.owner_id where p.email = $8
        ))
    group by 1, 2, 3
),
described as (
    select c.span, c.outcome, c.requests, c.allowed, c.refused, c.cost, c.key_id, k.name, p.email, d.name as plan,
        s.scope
    from counted c
    left join api_keys k on k.id = c.key_id
    left join user_preferences p on p.id = k.owner_id
    left join definitions d on d.number = coalesce(k.plan_number, k.owner_plan_number) and not d.removed
    left join lateral (
        select unnest(k.scopes) as scope
        union
        select unnest(r.scopes) from definitions r
        where not r.removed and (r.number = any(k.role_numbers) or r.number = d.number)
    ) s on 'scope' = any($2) or $9::text is not null
    where ($10::text is null or d.name = $10) and ($9::text is null or s.scope = $9)
),
placed as (
    select span, coalesce(case when 'key' = any($2) then key_id end, '00000000-0000-0000-0000-000000000000') as key_id,
        coalesce(case when 'user' = any($2) then email end, '') collate "C" as email,
        coalesce(case when 'plan' = any($2) then plan end, '') collate "C" as plan,
        coalesce(case when 'scope' = any($2) then scope end, '') collate "C" as scope,
        coalesce(outcome, -1) as outcome, case when 'key' = any($2) then name end as name, requests, allowed, refused,
        cost
    from described
)
select span as "span!", key_id as "key_id!", email as "email!", plan as "plan!", scope as "scope!",
    outcome::smallint as "outcome!", max(name) as name, saturate(sum(requests)) as "requests!",
    saturate(sum(allowed)) as "allowed!", saturate(sum(refused)) as "refused!", saturate(sum(cost)) as "cost!",
    (select max(cut_day) from counted) as cut_day
from placed
where $11::jsonb is null or (span, key_id, email, plan, scope, outcome) > (
    select a.span, a.key_id, a.email, a.plan, a.scope, a.outcome from jsonb_to_record($11)
        as a (span integer, key_id uuid, email text, plan text, scope text, outcome integer)
)
group by 1, 2, 3, 4, 5, 6
order by 1, 2, 3, 4, 5, 6
limit $12
