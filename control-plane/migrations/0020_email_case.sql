-- The control plane keeps email addresses in one canonical form, in which only ASCII letters have lower case. What other
-- letters lower() changes depends on the locale of the database.

alter table user_preferences drop constraint user_preferences_email_lower;
alter table user_preferences
    add constraint user_preferences_email_lower check (email = lower(email collate "C"));
