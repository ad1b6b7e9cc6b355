-- Reports of usage ask which of thousands of keys draw from quotas, credits or limits over all Envoys. Most draw from none.

create index api_keys_drawing on api_keys (id) where
    rate_limits <> '[]' or quota is not null or credits_starter is not null
    or coalesce(plan_number, owner_plan_number) is not null;

comment on index api_keys_drawing is 'Keys that usage may draw a stock for.';
