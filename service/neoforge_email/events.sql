-- The functions of provider_receipts: what providers told us is stored as it came, once, and worked off by the worker.
-- inbound/receipts.py calls them and says what they promise. A receipt is `waiting` until it is `done`, `unmatched` (its
-- message was not found in time) or `malformed`; `tries` counts how often the database refused it.

-- Receive: store what a provider told us, once each; returns how many are new. Index: provider_receipts_provider_event_id_key.
create or replace function receive(p_provider text, p_event_id text[], p_body bytea[]) returns int
    language sql security definer set search_path = public, pg_temp as $$
    with new as (
        insert into provider_receipts (provider, event_id, body, received_at, due)
        select p_provider, u.event_id, u.body, clock(), clock()
        from unnest(p_event_id, p_body) u(event_id, body)
        order by u.event_id -- sorted, so that two requests with the same events wait for each other in one order
        on conflict do nothing
        returning 1)
    select count(*)::int from new
$$;

-- Waiting receipts that are due, locked for this transaction, until p_bytes are together; those that another worker has are
-- skipped. p_providers are those that this version can read. Index: provider_receipts_waiting.
create or replace function waiting_receipts(p_providers text[], p_most int, p_bytes bigint)
    returns table (id bigint, provider text, event_id text, body bytea, received_at timestamptz)
    language sql as $$
    with due as (
        select r.id, r.due, octet_length(r.body) as size from provider_receipts r
        where r.state = 'waiting' and r.due <= clock() and r.provider = any(p_providers)
        order by r.due, r.id limit p_most for update skip locked
    ), measured as (
        select d.id, sum(d.size) over (order by d.due, d.id) - d.size as before from due d
    )
    select r.id, r.provider, r.event_id, r.body, r.received_at
    from measured m join provider_receipts r on r.id = m.id where m.before < p_bytes
$$;

-- Settle receipts of this transaction by their outcome, and return the state of each: `done` and `malformed` are final;
-- `unmatched` waits as long again as it has waited, from a second to 15 minutes, until p_patience is over; `failed` may
-- come p_max_tries times and then is malformed. Index: provider_receipts_pkey.
create or replace function settle_receipts(p_id bigint[], p_outcome text[], p_error text[], p_patience interval, p_max_tries int)
    returns table (id bigint, state text) language sql as $$
    update provider_receipts r
    set state = s.state, error = u.error, tries = r.tries + (u.outcome = 'failed')::int,
        finished_at = case when s.state <> 'waiting' then clock() end,
        due = case when s.state = 'waiting' then clock() + s.delay else r.due end
    from unnest(p_id, p_outcome, p_error) u(id, outcome, error)
    join provider_receipts x on x.id = u.id
    cross join lateral (select
        case
            when u.outcome = 'unmatched' and x.received_at > clock() - p_patience then 'waiting'
            when u.outcome = 'failed' then case when x.tries < p_max_tries then 'waiting' else 'malformed' end
            else u.outcome
        end::receipt_state as state,
        case u.outcome
            when 'failed' then interval '1 second' * 2 ^ least(x.tries, 9)
            else greatest(interval '1 second', least(clock() - x.received_at, interval '15 minutes'))
        end as delay) s
    where r.id = u.id
    returning r.id, r.state::text
$$;

-- Forget receipts that were done p_done ago, and the others that were finished p_other ago. Index: provider_receipts_finished.
create or replace function forget_receipts(p_done interval, p_other interval, p_most int) returns int language sql as $$
    with gone as (
        delete from provider_receipts where id in (
            select id from provider_receipts
            where state <> 'waiting' and finished_at < clock() - case state when 'done' then p_done else p_other end
                and finished_at < clock() - least(p_done, p_other)
            order by finished_at limit p_most)
        returning 1)
    select count(*)::int from gone
$$;

-- Forget which messages providers meant by their own ids. Index: provider_message_ids_created.
create or replace function forget_provider_message_ids(p_age interval, p_most int) returns int language sql as $$
    with gone as (
        delete from provider_message_ids where (provider, message_id, email_id) in (
            select provider, message_id, email_id from provider_message_ids
            where created_at < clock() - p_age order by created_at limit p_most)
        returning 1)
    select count(*)::int from gone
$$;

-- How many receipts stand in each state that is of interest, and for how long the oldest has: `waiting` ones since they are
-- due, `postponed` ones (whose message is not known yet, or that failed) since they came, the others since they ended.
-- Those that are done are many and not counted. Indexes: provider_receipts_waiting, provider_receipts_left.
create or replace function receipt_stats() returns table (state text, size bigint, oldest_seconds double precision)
    language sql stable security definer set search_path = public, pg_temp as $$
    select s.state, coalesce(c.size, 0), coalesce(extract(epoch from clock() - c.oldest), 0)
    from unnest(array['waiting', 'postponed', 'unmatched', 'malformed']) s(state)
    left join (
        select case when r.due > clock() then 'postponed' else 'waiting' end as state, count(*) as size,
            min(case when r.due > clock() then r.received_at else r.due end) as oldest
        from provider_receipts r where r.state = 'waiting' group by 1
        union all
        select r.state::text, count(*), min(r.finished_at)
        from provider_receipts r where r.state in ('unmatched', 'malformed') group by 1) c on c.state = s.state
$$;

-- Who may call what. The definer functions belong to neoforge_outbox, which no one can log in as.
do $$
declare
    name text;
begin
    foreach name in array array['receive', 'receipt_stats'] loop
        execute format('alter function %I owner to neoforge_outbox', name);
        execute format('revoke execute on function %I from public', name);
        execute format('grant execute on function %I to neoforge_api, neoforge_migrator', name);
    end loop;
    foreach name in array array['waiting_receipts', 'settle_receipts', 'forget_receipts', 'forget_provider_message_ids'] loop
        execute format('revoke execute on function %I from public', name);
        execute format('grant execute on function %I to neoforge_worker', name);
    end loop;
    grant execute on function receive, receipt_stats to neoforge_worker; -- the worker takes in bounces by mail
end $$;
