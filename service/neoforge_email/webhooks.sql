-- The outbox of customers' webhooks and the sender's side of it; webhooks.py calls these functions and says what they promise.
-- Installed after outbox.sql, and under the same rules. The planner does not know how few rows a claim or a sweep is after,
-- and would rather read the whole table of a dead endpoint's backlog: where that must not happen it may not.

-- A UUIDv7 (RFC 9562, 5.7) of this time.
create or replace function uuid7(p_at timestamptz) returns uuid language sql volatile parallel safe as $$
    select encode(set_bit(set_bit(overlay(uuid_send(gen_random_uuid())
        placing substring(int8send(floor(extract(epoch from p_at) * 1000)::bigint) from 3) from 1 for 6), 52, 1), 53, 1),
        'hex')::uuid
$$;

-- A time as the payloads write it: RFC 3339, UTC, milliseconds.
create or replace function webhook_time(p_at timestamptz) returns text language sql stable parallel safe as $$
    select to_char(p_at at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"')
$$;

-- The outbox: what is recorded about a recipient is queued for its owner's endpoints in the same transaction, whichever way it
-- was recorded. Where an endpoint was disabled for its failures its events are kept as dead for 30 days, so that a replay
-- brings them after it has been mended. A payload stays below 20 KB; what is the client's own gives way.
-- Events that one transaction records about a message are in the order of their times; those that several record at the same
-- moment have no order. Indexes: webhook_endpoints_user, the primary keys.
create or replace function webhook_outbox() returns trigger language plpgsql security definer
    set search_path = public, pg_temp as $$
declare
    v_now timestamptz := clock();
begin
    if not exists (select from arrived a join webhook_endpoints w on w.user_id = a.user_id) then
        return null;
    end if;
    insert into webhook_deliveries (id, endpoint_id, email_id, created_at, due, finished_at, user_id, state, answer, type, payload)
    select uuid7(v_now), w.id, a.email_id, v_now, v_now, case when w.disabled_at is not null then v_now end, a.user_id,
        case when w.disabled_at is null then 'pending' else 'dead' end::webhook_state,
        case when w.disabled_at is not null then 'not sent, since the endpoint was disabled' end,
        'email.' || a.type, case when octet_length(p.payload::text) < 20000 then p.payload
            else p.payload #- '{data,metadata}' #- '{data,detail}' || '{"truncated": true}' end
    from arrived a
    join webhook_endpoints w on w.user_id = a.user_id and (w.types = '{}' or 'email.' || a.type = any(w.types)) and (
        w.disabled_at is null or w.disabled_reason = 'failing' and w.disabled_at > v_now - interval '30 days')
    cross join lateral ( -- the limits keep a plan that was made for small tables from reading large ones
        select m.tags, m.metadata from email_messages m
        where m.id = a.email_id and m.created_at = accepted_at(a.email_id) limit 1) m
    cross join lateral (
        select t.recipient, t.kind, t.status from email_tracking t
        where t.email_id = a.email_id and t.id = a.tracking_id and t.created_at = accepted_at(a.email_id) limit 1) t
    cross join lateral (
        select jsonb_build_object('type', 'email.' || a.type, 'timestamp', webhook_time(a.occurred_at), 'data',
            jsonb_strip_nulls(jsonb_build_object('email_id', a.email_id, 'recipient', t.recipient, 'kind', t.kind,
                'status', t.status, 'attempt', a.attempt, 'provider', a.provider, 'response', a.response))
            || jsonb_build_object('tags', coalesce(to_jsonb(m.tags), '[]'), 'metadata', coalesce(m.metadata, '{}'),
                'detail', coalesce(a.detail, '{}'))) as payload offset 0) p
    order by a.occurred_at, a.type;
    return null;
end $$;

-- Claim: lease what is due, at most p_each of an endpoint at a time, one of an endpoint that keeps failing, and of a message
-- only its first one. An endpoint that another sender claims from at this moment is skipped. The endpoints are locked in a
-- statement before, so that what is in flight there is counted after it. Indexes: webhook_deliveries_due, _order, _leased.
create or replace function claim_webhooks(p_owner text, p_limit int, p_each int, p_failing int, p_lease interval)
    returns table (id uuid, endpoint_id uuid, url text, secrets text[], lease_no int, tries int, created_at timestamptz, body text)
    language plpgsql set enable_seqscan = off as $$
#variable_conflict use_column
declare
    v_now timestamptz := clock();
    v_endpoints uuid[];
begin
    v_endpoints := array(
        select e.id from webhook_endpoints e
        where e.id in (select pending_webhook_endpoints()) and e.disabled_at is null
            and (e.paused_until is null or e.paused_until <= v_now)
        order by random() limit p_limit for no key update skip locked);
    return query
    with chosen as (
        select c.id
        from unnest(v_endpoints) u(id) join webhook_endpoints e on e.id = u.id
        cross join lateral (
            select d.id from webhook_deliveries d
            where d.endpoint_id = e.id and d.state = 'pending' and d.due <= v_now and not exists (
                select from webhook_deliveries o
                where o.endpoint_id = d.endpoint_id and o.email_id = d.email_id and o.number < d.number
                    and o.state in ('pending', 'leased'))
            order by d.due, d.number
            limit greatest(case when e.failures >= p_failing then 1 else p_each end - (
                select count(*) from webhook_deliveries l where l.endpoint_id = e.id and l.state = 'leased'), 0)
            for update skip locked) c
        limit p_limit
    ), leased as (
        update webhook_deliveries d
        set state = 'leased', owner = p_owner, lease_no = d.lease_no + 1, lease_until = v_now + p_lease
        from chosen where d.id = chosen.id
        returning d.id, d.endpoint_id, d.lease_no, d.tries, d.created_at, d.number, d.payload
    )
    select l.id, l.endpoint_id, e.url, s.secrets, l.lease_no, l.tries, l.created_at, l.payload::text
    from leased l join webhook_endpoints e on e.id = l.endpoint_id
    cross join lateral (
        select coalesce(array_agg(s.secret order by s.created_at desc), '{}') as secrets from webhook_secrets s
        where s.endpoint_id = l.endpoint_id and (s.expires_at is null or s.expires_at > v_now)) s
    order by l.number;
end $$;

-- The endpoints that something is pending for, each found in one step of the index. Index: webhook_deliveries_due.
create or replace function pending_webhook_endpoints() returns setof uuid language sql stable as $$
    with recursive e as (
        (select d.endpoint_id from webhook_deliveries d where d.state = 'pending' order by d.endpoint_id, d.due limit 1)
        union all
        select n.endpoint_id from e, lateral (
            select d.endpoint_id from webhook_deliveries d
            where d.state = 'pending' and d.endpoint_id > e.endpoint_id order by d.endpoint_id, d.due limit 1) n
    )
    select e.endpoint_id from e
$$;

-- Complete: what became of calls. The outcome is fenced by the lease; a success counts as well where its lease was lost and
-- nobody has taken the delivery up since. A failure is due again after its p_wait, or dead where it has failed for p_life;
-- later ones of its message wait for it. An endpoint is paused for p_pause where it asks for that, and more and more, up to
-- five minutes, while it fails p_failing times or more in a row; one that failed for p_life without a success, or is gone, is
-- disabled. Returns what each delivery came to; the endpoints are locked first, as everywhere. Index: webhook_deliveries_pkey.
create or replace function complete_webhooks(
    p_id uuid[], p_endpoint uuid[], p_lease_no int[], p_ok boolean[], p_gone boolean[], p_status int[], p_answer text[],
    p_wait interval[], p_pause interval[], p_failing int, p_life interval
) returns table (id uuid, state text) language plpgsql set enable_seqscan = off as $$
#variable_conflict use_column
declare
    v_now timestamptz := clock();
    v_ids uuid[];
    v_states text[];
    e record;
    v_failures int;
    v_since timestamptz;
begin
    perform from webhook_endpoints e
    where e.id in (
        select u.id from unnest(p_endpoint, p_ok) u(id, ok) join webhook_endpoints w on w.id = u.id
        where not u.ok or w.failures > 0 or w.paused_until is not null)
    order by e.id for no key update;

    with done as (
        update webhook_deliveries d
        set state = case when u.ok then 'delivered' when u.gone or d.expires_at <= v_now then 'dead' else 'pending' end::webhook_state,
            due = case when u.ok then d.due
                else least(v_now + u.wait, greatest(coalesce(d.expires_at, v_now + p_life), v_now)) end,
            expires_at = coalesce(d.expires_at, case when not u.ok then v_now + p_life end),
            finished_at = case when u.ok or u.gone or d.expires_at <= v_now then v_now end,
            tries = d.tries + 1, status = u.status, answer = u.answer, lease_until = null, owner = null
        from unnest(p_id, p_lease_no, p_ok, p_gone, p_status, p_answer, p_wait) u(id, lease_no, ok, gone, status, answer, wait)
        where d.id = u.id and d.lease_no = u.lease_no and (d.state = 'leased' or d.state = 'pending' and u.ok)
        returning d.id, d.state::text as state, d.endpoint_id, d.email_id, d.number, d.due
    ), behind as (
        update webhook_deliveries d set due = f.due
        from done f
        where f.state = 'pending' and d.endpoint_id = f.endpoint_id and d.email_id = f.email_id and d.number > f.number
            and d.state = 'pending' and d.due < f.due
    )
    select array_agg(f.id), array_agg(f.state) into v_ids, v_states from done f;

    for e in
        select w.id, w.user_id, w.failures, w.failing_since, w.failed_at, w.paused_until, x.ok, x.failed, x.gone, x.pause, x.answer
        from webhook_endpoints w join (
            select u.endpoint, bool_or(u.ok) as ok, count(*) filter (where not u.ok)::int as failed, bool_or(u.gone) as gone,
                max(u.pause) as pause, max(u.answer) filter (where not u.ok) as answer
            from unnest(p_id, p_endpoint, p_ok, p_gone, p_answer, p_pause) u(id, endpoint, ok, gone, answer, pause)
            where u.id = any(v_ids) group by u.endpoint) x on x.endpoint = w.id
        where w.disabled_at is null and (not x.ok or x.gone or x.pause is not null or w.failures > 0 or w.paused_until is not null)
        order by w.id
    loop
        -- a silence ends a row of failures: nobody tried in it
        if e.ok or e.failed_at is null or e.failed_at < v_now - interval '8 hours' then
            e.failing_since := null;
            e.failures := case when e.ok then e.failures else 0 end;
        end if;
        -- calls that were under way together are one failure of an endpoint that fails already, and none where it is paused
        v_failures := case when e.ok then 0 when e.failures >= p_failing and e.paused_until > v_now then e.failures
            else least(e.failures + e.failed, greatest(e.failures + 1, p_failing)) end;
        v_since := case when not e.ok then coalesce(e.failing_since, v_now) end;
        update webhook_endpoints w
        set failures = v_failures, failing_since = v_since, failed_at = case when not e.ok then v_now else w.failed_at end,
            paused_until = greatest(case when not e.ok then w.paused_until end, v_now + e.pause, case when v_failures >= p_failing
                then v_now + least(interval '15 seconds' * 2 ^ least(v_failures - p_failing, 10), interval '5 minutes') end)
        where w.id = e.id;
        if e.ok and e.failures >= p_failing then
            insert into webhook_endpoint_events (endpoint_id, user_id, at, type) values (e.id, e.user_id, v_now, 'recovered');
            update webhook_deliveries d set due = v_now where d.endpoint_id = e.id and d.state = 'pending' and d.due > v_now;
        elsif v_failures >= p_failing and (e.failing_since is null or e.failures < p_failing) then
            insert into webhook_endpoint_events (endpoint_id, user_id, at, type, detail)
            values (e.id, e.user_id, v_now, 'failing', e.answer);
        end if;
        if e.gone then
            perform disable_webhook_endpoint(e.id, 'gone', 'it answered 410 Gone');
        elsif v_since <= v_now - p_life then
            perform disable_webhook_endpoint(e.id, 'failing', 'nothing could be delivered since ' || webhook_time(v_since));
        end if;
    end loop;
    return query select u.id, u.state from unnest(v_ids, v_states) u(id, state);
end $$;

-- Disable an endpoint: its owner sees it there and at the other endpoints. The sweep buries what waits for it.
create or replace function disable_webhook_endpoint(p_id uuid, p_reason text, p_detail text) returns void
    language plpgsql as $$
declare
    v_now timestamptz := clock();
begin
    update webhook_endpoints w set disabled_at = v_now, disabled_reason = p_reason, paused_until = null where w.id = p_id;
    insert into webhook_endpoint_events (endpoint_id, user_id, at, type, detail)
    select w.id, w.user_id, v_now, 'disabled', p_detail from webhook_endpoints w where w.id = p_id;
    insert into webhook_deliveries (id, endpoint_id, created_at, due, user_id, state, type, payload)
    select uuid7(v_now), o.id, v_now, v_now, o.user_id, 'pending', 'webhook.disabled', jsonb_build_object(
        'type', 'webhook.disabled', 'timestamp', webhook_time(v_now), 'data', jsonb_build_object(
            'endpoint_id', w.id, 'url', w.url, 'description', w.description, 'reason', p_reason, 'detail', p_detail))
    from webhook_endpoints w
    join webhook_endpoints o on o.user_id = w.user_id and o.id <> w.id and o.disabled_at is null
        and (o.types = '{}' or 'webhook.disabled' = any(o.types))
    where w.id = p_id;
end $$;

-- Sweep: leases that ran out (and with p_owner its own, for an instance that starts again) are pending again under the same
-- id; what waits for a disabled endpoint is dead, for a deleted one gone, also where it was queued at that very moment; of
-- each at most p_most, the rest by the next sweeps. Indexes: webhook_deliveries_leased, webhook_deliveries_due.
create or replace function sweep_webhooks(p_owner text, p_most int, out lapsed int, out buried int)
    language plpgsql set enable_seqscan = off as $$
declare
    v_now timestamptz := clock();
    v_waiting uuid[] := array(select pending_webhook_endpoints());
begin
    with ripe as (
        select d.id from webhook_deliveries d
        where d.state = 'leased' and (d.lease_until <= v_now or d.owner = p_owner) for update skip locked
    ), back as (
        update webhook_deliveries d set state = 'pending', lease_until = null, owner = null
        from ripe where d.id = ripe.id returning 1
    )
    select count(*) into lapsed from back;
    with doomed as (
        select d.id from webhook_endpoints w cross join lateral (
            select x.id from webhook_deliveries x where x.endpoint_id = w.id and x.state = 'pending' limit p_most) d
        where w.id = any(v_waiting) and w.disabled_at is not null limit p_most
    ), ended as (
        update webhook_deliveries d
        set state = 'dead', finished_at = v_now, answer = coalesce(d.answer || '; ', '') || 'the endpoint was disabled'
        from doomed where d.id = doomed.id and d.state = 'pending'
        returning 1
    )
    select count(*) into buried from ended;
    delete from webhook_deliveries d
    where d.state = 'pending' and d.id in (
        select x.id from unnest(v_waiting) u(id) cross join lateral (
            select x.id from webhook_deliveries x where x.endpoint_id = u.id and x.state = 'pending' limit p_most) x
        where not exists (select from webhook_endpoints w where w.id = u.id) limit p_most);
end $$;

-- Forget what was delivered or is dead, after a time each; what is left of deleted endpoints; secrets that no longer sign;
-- endpoints' events with the dead. Returns how many deliveries. Indexes: webhook_deliveries_finished, _listed.
create or replace function forget_webhooks(p_delivered interval, p_dead interval, p_most int) returns int
    language plpgsql as $$
declare
    v_now timestamptz := clock();
    v_count int;
begin
    delete from webhook_secrets where expires_at < v_now;
    delete from webhook_endpoint_events where at < v_now - p_dead;
    with recursive e as (
        (select d.endpoint_id from webhook_deliveries d order by d.endpoint_id limit 1)
        union all
        select n.endpoint_id from e, lateral (
            select d.endpoint_id from webhook_deliveries d
            where d.endpoint_id > e.endpoint_id order by d.endpoint_id limit 1) n
    ), old as (
        (select d.id from webhook_deliveries d
         where d.state = 'delivered' and d.finished_at < v_now - p_delivered order by d.finished_at limit p_most)
        union all
        (select d.id from webhook_deliveries d
         where d.state = 'dead' and d.finished_at < v_now - p_dead order by d.finished_at limit p_most)
        union all
        (select d.id from e cross join lateral (
            select d.id from webhook_deliveries d where d.endpoint_id = e.endpoint_id and d.state <> 'leased' limit p_most) d
         where not exists (select from webhook_endpoints w where w.id = e.endpoint_id) limit p_most)
    ), gone as (
        delete from webhook_deliveries d using (select id from old limit p_most) o where d.id = o.id returning 1
    )
    select count(*) into v_count from gone;
    return v_count;
end $$;

-- How many deliveries are in each state that an operator may ask about, and how long ago the oldest was queued. `overdue`
-- are those that only a sender has to take up, since they are due: nothing stands in their way, neither their time, nor an
-- earlier one of their message, nor an endpoint that fails or that others are on their way to. Of an endpoint at most 10,000
-- are counted. Indexes: webhook_deliveries_listed, _due, _order, _leased.
create or replace function webhook_stats() returns table (state text, size bigint, oldest_seconds double precision)
    language sql stable security definer set search_path = public, pg_temp set enable_seqscan = off as $$
    select s.state::text, coalesce(sum(c.size), 0)::bigint, coalesce(extract(epoch from clock() - min(accepted_at(o.id))), 0)
    from unnest(array['pending', 'leased', 'dead']::webhook_state[]) s(state)
    left join webhook_endpoints w on true
    left join lateral (
        select d.id from webhook_deliveries d where d.endpoint_id = w.id and d.state = s.state order by d.id limit 1) o on true
    left join lateral (
        select count(*) as size from (
            select from webhook_deliveries d where d.endpoint_id = w.id and d.state = s.state limit 10000) x) c on true
    group by s.state
    union all
    select 'overdue', count(d.due), coalesce(extract(epoch from clock() - min(d.due)), 0)
    from pending_webhook_endpoints() p(id) join webhook_endpoints w on w.id = p.id
    cross join lateral (
        select d.due from webhook_deliveries d
        where d.endpoint_id = w.id and d.state = 'pending' and d.due <= clock() and not exists (
            select from webhook_deliveries o
            where o.endpoint_id = d.endpoint_id and o.email_id = d.email_id and o.number < d.number
                and o.state in ('pending', 'leased'))
        order by d.due, d.number limit 10000) d
    where w.disabled_at is null and w.failing_since is null and (w.paused_until is null or w.paused_until <= clock())
        and not exists (select from webhook_deliveries l where l.endpoint_id = w.id and l.state = 'leased')
$$;

-- Who may call what, and the trigger.
do $$
declare
    name text;
begin
    foreach name in array array['webhook_outbox', 'webhook_stats'] loop
        execute format('alter function %I owner to neoforge_outbox', name);
        execute format('revoke execute on function %I from public', name);
    end loop;
    grant execute on function webhook_stats to neoforge_api, neoforge_worker, neoforge_migrator;
    foreach name in array array['uuid7', 'webhook_time', 'accepted_at', 'pending_webhook_endpoints'] loop
        execute format('revoke execute on function %I from public', name);
        execute format('grant execute on function %I to neoforge_outbox, neoforge_worker, neoforge_api', name);
    end loop;
    foreach name in array array['claim_webhooks', 'complete_webhooks', 'disable_webhook_endpoint',
            'sweep_webhooks', 'forget_webhooks'] loop
        execute format('revoke execute on function %I from public', name);
        execute format('grant execute on function %I to neoforge_worker', name);
    end loop;
    if not exists (select from pg_trigger where tgrelid = 'email_events'::regclass and tgname = 'webhook_outbox') then
        create trigger webhook_outbox after insert on email_events referencing new table as arrived
            for each statement execute function webhook_outbox();
    end if;
end $$;
