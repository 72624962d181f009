-- The database roles that the schema needs. Run by a superuser on embedded servers and in tests; on the fleet the
-- role `postgresql` makes the same ones, with SCRAM verifiers.
do $$
declare
    name text;
begin
    foreach name in array array['neoforge_owner', 'neoforge_outbox', 'neoforge_app'] loop
        if not exists (select from pg_roles where rolname = name) then
            execute format('create role %I nologin', name);
        end if;
    end loop;
    foreach name in array array['neoforge_migrator', 'neoforge_api', 'neoforge_worker'] loop
        if not exists (select from pg_roles where rolname = name) then
            execute format('create role %I login', name);
        end if;
    end loop;
end $$;
grant neoforge_owner, neoforge_outbox to neoforge_migrator;
grant neoforge_app to neoforge_api, neoforge_worker;
