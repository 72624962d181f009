-- The reconciler's functions: rows that no rule will move again, of which there must be none. reconcile.py calls them and
-- says what they promise. What waits for a time, a worker or an operator is not among them: its age is a metric.

-- Find what is stuck among the rows of a part whose message's id is between the two, both included; of `receipts` and
-- `webhooks`, which have none, all. One snapshot: what moves in one transaction is seen before or after it. Indexes: email_queue_pkey,
-- email_messages_pkey, email_tracking_pkey, provider_receipts_waiting, webhook_deliveries_due, webhook_deliveries_leased. Each range is read once and hashed: where a table has
-- no statistics yet a nested loop over two ranges looks cheap, and takes minutes.
create or replace function stuck(p_part text, p_from uuid, p_until uuid, p_providers text[])
    returns table (kind text, id text, what text) language plpgsql stable
    set plan_cache_mode = force_custom_plan set enable_nestloop = off as $$
begin
    case p_part
    when 'messages' then
        return query
        select 'recipient_without_queue', t.email_id::text,
            format('%s of its recipients are still to be sent to, but it is not in the queue', count(*))
        from email_tracking t
        where t.email_id between p_from and p_until and t.status in ('queued', 'deferred', 'uncertain')
            and not exists (select from email_queue q where q.id = t.email_id and q.id between p_from and p_until)
        group by t.email_id
        union all
        select 'message_without_recipients', m.id::text, 'it has no recipients'
        from email_messages m
        where m.id between p_from and p_until and not exists (
            select from email_tracking t
            where t.email_id = m.id and t.created_at = m.created_at and t.email_id between p_from and p_until);
    when 'queue' then
        return query
        select f.kind, q.id::text, f.what
        from email_queue q
        left join email_messages m on m.id = q.id and m.created_at = q.created_at and m.id between p_from and p_until
        cross join lateral (values
            ('queue_without_message', m.id is null, 'it is in the queue, but there is no such message'),
            ('queue_without_recipients',
                not exists (
                    select from email_tracking t
                    where t.email_id = q.id and t.created_at = q.created_at and t.email_id between p_from and p_until),
                'it is in the queue, but it has no recipients'),
            ('queue_without_content',
                m.content_id is not null and not exists (
                    select from email_contents c where c.id = m.content_id and c.created_at = m.created_at),
                'its bodies, which it shares with other messages, are not there'),
            ('never_claimed', q.lane not between 1 and 3 or q.user_id < 1,
                format('no claim looks at lane %s of user %s', q.lane, q.user_id)),
            ('never_swept', q.state = 'leased' and coalesce(q.lease_until, 'infinity') > clock() + interval '1 day',
                format('its lease runs until %s', coalesce(q.lease_until::text, 'nobody knows when'))),
            ('never_due',
                q.state in ('queued', 'scheduled', 'uncertain') and q.due > clock() + interval '100 days'
                    and (q.state = 'uncertain' or q.expires_at > clock() + interval '100 days'),
                format('it is %s and not due before %s', q.state, q.due)),
            ('held_without_reason', q.state = 'held' and coalesce(q.held_reason, '') = '',
                'it is held, and nobody wrote down why')
        ) f(kind, found, what)
        where q.id between p_from and p_until and f.found;
    when 'receipts' then
        return query
        select f.kind, r.id::text, f.what
        from provider_receipts r
        cross join lateral (values
            ('receipt_of_nobody', r.provider <> all(p_providers), format('no worker reads what %s reports', r.provider)),
            ('receipt_never_due', r.due > clock() + interval '100 days', format('it is not due before %s', r.due))
        ) f(kind, found, what)
        where r.state = 'waiting' and f.found;
    when 'webhooks' then
        return query
        select 'webhook_never_swept', d.id::text,
            format('its lease runs until %s', coalesce(d.lease_until::text, 'nobody knows when'))
        from webhook_deliveries d
        where d.state = 'leased' and coalesce(d.lease_until, 'infinity') > clock() + interval '1 day'
        union all
        select 'webhook_never_due', d.id::text, format('it is not due before %s', d.due)
        from pending_webhook_endpoints() p(id) cross join lateral (
            select x.id, x.due from webhook_deliveries x
            where x.endpoint_id = p.id and x.state = 'pending' and x.due > clock() + interval '1 day'
            order by x.due limit 100) d
        union all
        select 'webhook_never_tried', w.id::text, format('its endpoint is paused until %s', w.paused_until)
        from webhook_endpoints w where w.paused_until > clock() + interval '1 day';
    end case;
end $$;

-- How far a walk gets with p_rows rows from p_from on: the last message's id among them, or p_last where no more are left.
-- Indexes: email_queue_pkey, email_tracking_pkey.
create or replace function stuck_reach(p_part text, p_from uuid, p_last uuid, p_rows int) returns uuid
    language plpgsql stable set plan_cache_mode = force_custom_plan as $$
begin
    return case p_part
    when 'queue' then coalesce(
        (select q.id from email_queue q where q.id >= p_from order by q.id offset p_rows - 1 limit 1), p_last)
    when 'messages' then coalesce(
        (select t.email_id from email_tracking t where t.email_id >= p_from order by t.email_id offset p_rows - 1 limit 1),
        p_last)
    else p_last
    end;
end $$;

-- Look at a range as `stuck` does, and let what is written down about it be what was found; at most 1,000 findings are
-- kept. Returns those that are new. Index: stuck_rows_pkey.
create or replace function note_stuck(p_part text, p_from uuid, p_until uuid, p_providers text[])
    returns table (kind text, id text, what text) language sql as $$
    with found as materialized (
        select s.kind, s.id, s.what from stuck(p_part, p_from, p_until, p_providers) s
    ), mended as (
        delete from stuck_rows r
        where r.part = p_part and (p_part in ('receipts', 'webhooks') or r.id between p_from::text and p_until::text collate "C")
            and not exists (select from found f where f.kind = r.kind and f.id = r.id)
    ), seen as (
        update stuck_rows r set checked_at = clock() from found f where r.kind = f.kind and r.id = f.id
    )
    insert into stuck_rows (kind, id, part, what, found_at, checked_at)
    select f.kind, f.id, p_part, f.what, clock(), clock() from found f
    where not exists (select from stuck_rows r where r.kind = f.kind and r.id = f.id)
    limit 1000 - (select least(count(*), 1000) from stuck_rows)
    on conflict do nothing
    returning stuck_rows.kind, stuck_rows.id, stuck_rows.what
$$;

-- How many rows are known to be stuck by kind (none: no key), and when the reconciler last did all of its work.
create or replace function stuck_stats(out sizes jsonb, out checked_at timestamptz)
    language sql stable security definer set search_path = public, pg_temp as $$
    select coalesce((select jsonb_object_agg(k.kind, k.size) from (
            select r.kind, count(*) as size from stuck_rows r group by r.kind) k), '{}'),
        (select min(w.saved_at) from stuck_walks w)
$$;

-- Who may call what.
do $$
declare
    name text;
begin
    execute 'alter function stuck_stats owner to neoforge_outbox';
    foreach name in array array['stuck', 'stuck_reach', 'note_stuck', 'stuck_stats'] loop
        execute format('revoke execute on function %I from public', name);
        execute format('grant execute on function %I to neoforge_worker', name);
    end loop;
    grant execute on function stuck_stats to neoforge_api, neoforge_migrator;
end $$;
