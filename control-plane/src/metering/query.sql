with counted as (
    select key_id, date_trunc($1, at, 'UTC') as start, case when 'outcome' = any($2) then outcome end as outcome,
        sum(requests) as requests, sum(requests) filter (where outcome = $13) as allowed,
        sum(requests) filter (where outcome = any($14)) as refused, sum(cost) as cost
    from (
        select key_id, hour as at, outcome, requests, cost from usage_hourly where hour >= $3 and hour < $4
        union all
        select key_id, day, outcome, requests, cost from usage_daily where day >= $3 and day < $4
        union all
        select null, hour, outcome, requests, 0 from usage_keyless_hourly
        where $5 and hour >= $3 and hour < $4
        union all
        select null, day, outcome, requests, 0 from usage_keyless_daily where $5 and day >= $3 and day < $4
    ) all_of_it
    where ($6::uuid is null or key_id = $6) and ($7::smallint is null or outcome = $7)
        and ($8::text is null or key_id in (
            select k.id from api_keys k join user_preferences p on p.id = k.owner_id where p.email = $8
        ))
    group by 1, 2, 3
),
described as (
    select c.start, c.outcome, c.requests, c.allowed, c.refused, c.cost, c.key_id, k.name, p.email, d.name as plan,
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
    select coalesce(extract(epoch from start), 0)::bigint as start,
        coalesce(case when 'key' = any($2) then key_id end, '00000000-0000-0000-0000-000000000000') as key_id,
        coalesce(case when 'user' = any($2) then email end, '') collate "C" as email,
        coalesce(case when 'plan' = any($2) then plan end, '') collate "C" as plan,
        coalesce(case when 'scope' = any($2) then scope end, '') collate "C" as scope,
        coalesce(outcome, -1) as outcome, case when 'key' = any($2) then name end as name, requests, allowed, refused,
        cost
    from described
)
select start as "start!", key_id as "key_id!", email as "email!", plan as "plan!", scope as "scope!",
    outcome::smallint as "outcome!", max(name) as name, saturate(sum(requests)) as "requests!",
    saturate(sum(allowed)) as "allowed!", saturate(sum(refused)) as "refused!", saturate(sum(cost)) as "cost!"
from placed
where $11::jsonb is null or (start, key_id, email, plan, scope, outcome) > (
    select a.start, a.key_id, a.email, a.plan, a.scope, a.outcome from jsonb_to_record($11)
        as a (start bigint, key_id uuid, email text, plan text, scope text, outcome integer)
)
group by 1, 2, 3, 4, 5, 6
order by 1, 2, 3, 4, 5, 6
limit $12
