-- The functions of the hot path; outbox.py calls them and says what they promise. `neoforge migrate` installs them after
-- the schema's migrations, as neoforge_migrator. Version N-1 of the service runs beside version N: a function whose
-- arguments or meaning change gets a new name, and the old one stays for one version.

-- Accept: everything of one flush in one transaction. Index: the primary keys alone.
create or replace function accept(
    p_at timestamptz, p_expire_after interval,
    p_id uuid[], p_user int[], p_lane smallint[], p_sender text[], p_sender_name text[], p_reply_to text[],
    p_reply_to_name text[], p_subject text[], p_headers jsonb[], p_tags text[], p_metadata jsonb[], p_html text[],
    p_text text[], p_content uuid[], p_key text[], p_hash bytea[],
    p_content_id uuid[], p_content_user int[], p_content_html text[], p_content_text text[],
    p_email uuid[], p_recipient_id uuid[], p_recipient_user int[], p_kind text[], p_recipient text[], p_recipient_name text[]
) returns uuid[] language plpgsql security definer set search_path = public, pg_temp as $$
declare
    v_lost uuid[] := '{}';
    v_now timestamptz := clock();
begin
    -- keys first and sorted, so that two flushes with the same keys wait for each other in one order
    if exists (select from unnest(p_key) k where k is not null) then
        with won as (
            insert into idempotency_keys (user_id, key, email_id, body_hash, created_at)
            select u.usr, u.key, u.id, u.hash, v_now
            from unnest(p_user, p_key, p_id, p_hash) u(usr, key, id, hash)
            where u.key is not null
            order by u.usr, u.key
            on conflict do nothing
            returning email_id
        )
        select coalesce(array_agg(u.id), '{}') into v_lost
        from unnest(p_id, p_key) u(id, key)
        where u.key is not null and not exists (select from won where won.email_id = u.id);
    end if;

    if cardinality(p_content_id) > 0 then
        insert into email_contents (id, created_at, user_id, html, text)
        select u.id, p_at, u.usr, u.html, u.text
        from unnest(p_content_id, p_content_user, p_content_html, p_content_text) u(id, usr, html, text);
    end if;

    insert into email_messages (id, created_at, user_id, lane, sender, sender_name, reply_to, reply_to_name, subject,
        headers, tags, metadata, html, text, content_id)
    select u.id, p_at, u.usr, u.lane, u.sender, u.sender_name, u.reply_to, u.reply_to_name, u.subject,
        u.headers, u.tags::text[], u.metadata, u.html, u.text, u.content
    from unnest(p_id, p_user, p_lane, p_sender, p_sender_name, p_reply_to, p_reply_to_name, p_subject, p_headers, p_tags,
        p_metadata, p_html, p_text, p_content)
        u(id, usr, lane, sender, sender_name, reply_to, reply_to_name, subject, headers, tags, metadata, html, text, content)
    where u.id <> all(v_lost);

    insert into email_tracking (id, email_id, created_at, updated_at, user_id, kind, recipient, recipient_name)
    select u.id, u.email, p_at, p_at, u.usr, u.kind::recipient_kind, u.recipient, u.name
    from unnest(p_recipient_id, p_email, p_recipient_user, p_kind, p_recipient, p_recipient_name)
        u(id, email, usr, kind, recipient, name)
    where u.email <> all(v_lost);

    insert into email_queue (id, created_at, due, expires_at, since, user_id, lane)
    select u.id, p_at, v_now, v_now + p_expire_after, v_now, u.usr, u.lane
    from unnest(p_id, p_user, p_lane) u(id, usr, lane)
    where u.id <> all(v_lost);

    return v_lost;
end $$;

-- The message that an idempotency key belongs to. Index: idempotency_keys_pkey.
create or replace function find_idempotency_keys(p_user int[], p_key text[])
    returns table (user_id int, key text, email_id uuid, body_hash bytea)
    language sql stable security definer set search_path = public, pg_temp as $$
    select k.user_id, k.key, k.email_id, k.body_hash
    from unnest(p_user, p_key) u(usr, key) join idempotency_keys k on k.user_id = u.usr and k.key = u.key
$$;

-- The owner of an API key, by the key's SHA-256. Index: api_keys_key_hash_key.
create or replace function find_api_key(p_hash bytea) returns table (api_key_id int, user_id int)
    language sql security definer set search_path = public, pg_temp as $$
    update api_keys set last_used_at = clock()
    where key_hash = p_hash and revoked_at is null and (last_used_at is null or last_used_at < clock() - interval '1 minute');
    select k.id, k.user_id from api_keys k where k.key_hash = p_hash and k.revoked_at is null
$$;

-- How many messages stand in each state, and how long ago the oldest of them was accepted: an age that no retry resets.
create or replace function queue_stats() returns table (state text, size bigint, oldest_seconds double precision)
    language sql stable security definer set search_path = public, pg_temp as $$
    select s.state::text, count(q.id), coalesce(extract(epoch from clock() - min(q.created_at)), 0)
    from unnest(enum_range(null::queue_state)) s(state) left join email_queue q on q.state = s.state
    group by s.state
$$;

-- The users with due messages in a lane after user p_after, wrapping round, at most p_most. Index: email_queue_ready.
create or replace function due_users(p_lane smallint, p_after int, p_most int) returns int[]
    language plpgsql as $$
declare
    v_users int[];
    v_more int[];
begin
    with recursive u as (
        (select q.user_id from email_queue q where q.state = 'queued' and q.lane = p_lane and q.user_id > p_after
         order by q.user_id limit 1)
        union all
        select n.user_id from u, lateral (
            select q.user_id from email_queue q where q.state = 'queued' and q.lane = p_lane and q.user_id > u.user_id
            order by q.user_id limit 1) n
    )
    select array_agg(x.user_id) into v_users from (select u.user_id from u limit p_most) x;
    if coalesce(cardinality(v_users), 0) = p_most or p_after = 0 then
        return coalesce(v_users, '{}');
    end if;
    with recursive u as (
        (select q.user_id from email_queue q where q.state = 'queued' and q.lane = p_lane and q.user_id <= p_after
         order by q.user_id limit 1)
        union all
        select n.user_id from u, lateral (
            select q.user_id from email_queue q
            where q.state = 'queued' and q.lane = p_lane and q.user_id > u.user_id and q.user_id <= p_after
            order by q.user_id limit 1) n
    )
    select array_agg(x.user_id) into v_more
    from (select u.user_id from u limit p_most - coalesce(cardinality(v_users), 0)) x;
    return coalesce(v_users, '{}') || coalesce(v_more, '{}');
end $$;

-- Claim: lease due messages, lane by lane with a share kept for each, a turn for each user. Rows that another worker
-- holds are skipped. `turn` is the last user served in each lane, for the next call. Index: email_queue_ready.
create or replace function claim(p_owner text, p_limit int, p_lease interval, p_after int[]) returns table (
    id uuid, created_at timestamptz, user_id int, lane smallint, lease_no int, tries smallint, suspect boolean,
    sender text, sender_name text, reply_to text, reply_to_name text, subject text, headers text, html text, body text,
    recipient_ids uuid[], kinds text[], recipients text[], names text[], opens boolean[], suppressed boolean[], turn int[])
    language plpgsql as $$
#variable_conflict use_column
declare
    v_ids uuid[] := '{}';
    v_got uuid[];
    v_users int[];
    v_room int := p_limit;
    v_share int;
    v_turn int[] := p_after;
begin
    for l in 1 .. 3 loop
        exit when v_room <= 0;
        v_share := case l when 1 then greatest(p_limit * 8 / 10, 1) when 2 then greatest(v_room - p_limit / 10, 1) else v_room end;
        v_users := due_users(l::smallint, v_turn[l], 64);
        continue when cardinality(v_users) = 0;
        v_turn[l] := v_users[cardinality(v_users)];
        select array_agg(q.id) into v_got
        from unnest(v_users) u(usr) cross join lateral (
            select q.id from email_queue q
            where q.state = 'queued' and q.lane = l and q.user_id = u.usr and q.due <= clock()
            order by q.due
            limit (v_share + cardinality(v_users) - 1) / cardinality(v_users)
            for update skip locked) q;
        if v_got is not null then
            v_ids := v_ids || v_got;
            v_room := v_room - cardinality(v_got);
        end if;
    end loop;
    if cardinality(v_ids) = 0 then
        return;
    end if;
    return query
    with leased as (
        update email_queue q
        set state = 'leased', since = clock(), lease_no = q.lease_no + 1, lease_until = clock() + p_lease, owner = p_owner,
            attempt_at = null
        where q.id = any(v_ids)
        returning q.id, q.created_at, q.user_id, q.lane, q.lease_no, q.tries, q.suspect
    )
    select c.id, c.created_at, c.user_id, c.lane, c.lease_no, c.tries, c.suspect, m.sender, m.sender_name, m.reply_to,
        m.reply_to_name, m.subject, m.headers::text, coalesce(m.html, s.html), coalesce(m.text, s.text),
        t.ids, t.kinds, t.recipients, t.names, t.opens, t.suppressed, v_turn
    from leased c
    join email_messages m on m.id = c.id and m.created_at = c.created_at
    left join email_contents s on s.id = m.content_id and s.created_at = m.created_at
    cross join lateral (
        select array_agg(t.id order by t.id) ids, array_agg(t.kind::text order by t.id) kinds,
            array_agg(t.recipient order by t.id) recipients, array_agg(t.recipient_name order by t.id) names,
            array_agg(t.status in ('queued', 'deferred', 'uncertain') order by t.id) opens,
            array_agg(exists (select from suppressions x where x.user_id = c.user_id and x.address = lower(t.recipient))
                order by t.id) suppressed
        from email_tracking t where t.email_id = c.id and t.created_at = c.created_at) t;
end $$;

-- Attempt: write down, before the provider call, that these leased messages may be sent now. Only those that come back
-- may be: the others' lease is lost or would not outlast the call. Index: email_queue_pkey.
create or replace function attempt(p_id uuid[], p_lease_no int[], p_call_time interval) returns setof uuid
    language sql as $$
    update email_queue q set attempt_at = clock()
    from unnest(p_id, p_lease_no) u(id, lease_no)
    where q.id = u.id and q.lease_no = u.lease_no and q.state = 'leased' and q.lease_until > clock() + p_call_time
    returning q.id
$$;

-- Renew: keep leases while their messages wait for their turn or their call is under way. Index: email_queue_pkey.
create or replace function renew(p_id uuid[], p_lease_no int[], p_lease interval) returns setof uuid
    language sql as $$
    update email_queue q set lease_until = clock() + p_lease
    from unnest(p_id, p_lease_no) u(id, lease_no)
    where q.id = u.id and q.lease_no = u.lease_no and q.state = 'leased'
    returning q.id
$$;

-- Release: give back leases on which no attempt was made. Index: email_queue_pkey.
create or replace function release(p_id uuid[], p_lease_no int[], p_delay interval) returns setof uuid
    language sql as $$
    update email_queue q
    set state = case when p_delay > interval '0' then 'scheduled' else 'queued' end::queue_state,
        since = clock(), due = clock() + p_delay, lease_until = null, owner = null
    from unnest(p_id, p_lease_no) u(id, lease_no)
    where q.id = u.id and q.lease_no = u.lease_no and q.state = 'leased' and q.attempt_at is null
    returning q.id
$$;

-- Complete: what became of a batch of attempts. The message's state is fenced by its lease; the attempt's own outcome is
-- recorded however late it comes, and a late "taken" cancels a resend that has not begun. Returns the messages whose
-- state was changed, and those that were taken a second time. Indexes: email_queue_pkey, email_tracking_pkey.
create or replace function complete(
    p_id uuid[], p_lease_no int[], p_state text[], p_delay_seconds double precision[], p_tries smallint[],
    p_email uuid[], p_recipient_id uuid[], p_created timestamptz[], p_user int[], p_attempt int[], p_status text[],
    p_event text[], p_response text[], p_started timestamptz[], p_provider text,
    out won uuid[], out twice uuid[]
) language plpgsql as $$
declare
    v_now timestamptz := clock();
    v_changed uuid[];
    v_late uuid[];
begin
    with done as (
        delete from email_queue q using unnest(p_id, p_lease_no, p_state) u(id, lease_no, state)
        where u.state is null and q.id = u.id and q.lease_no = u.lease_no and q.state = 'leased'
        returning q.id
    ), moved as (
        update email_queue q
        set state = u.state::queue_state, since = v_now,
            due = case u.state when 'queued' then q.due else v_now + make_interval(secs => u.delay) end,
            tries = case u.state when 'queued' then q.tries else u.tries end,
            lease_until = null, attempt_at = null, owner = null, suspect = q.suspect or u.state = 'uncertain'
        from unnest(p_id, p_lease_no, p_state, p_delay_seconds, p_tries) u(id, lease_no, state, delay, tries)
        where u.state is not null and q.id = u.id and q.lease_no = u.lease_no and q.state = 'leased'
        returning q.id
    )
    select coalesce(array_agg(x.id), '{}') into won from (select id from done union all select id from moved) x;

    with changed as (
        update email_tracking t
        set status = u.status::recipient_status, updated_at = v_now, response = u.response, provider = p_provider
        from unnest(p_email, p_recipient_id, p_created, p_status, p_response) u(email, id, created, status, response)
        where t.email_id = u.email and t.id = u.id and t.created_at = u.created
            and t.status in ('queued', 'deferred', 'uncertain')
            and (u.email = any(won) or u.status = 'sent')
        returning t.id
    )
    select coalesce(array_agg(id), '{}') into v_changed from changed;

    insert into email_events (arrived_at, occurred_at, started_at, email_id, tracking_id, user_id, attempt, type, provider,
        response)
    select v_now, v_now, u.started, u.email, u.id, u.usr, u.attempt, u.event::event_type, p_provider, u.response
    from unnest(p_email, p_recipient_id, p_user, p_attempt, p_event, p_response, p_started)
        u(email, id, usr, attempt, event, response, started)
    where u.email = any(won) or not exists ( -- a repeated call after a lost connection tells it once
        select from email_events e
        where e.email_id = u.email and e.tracking_id = u.id and e.attempt = u.attempt and e.type = u.event::event_type);

    twice := '{}';
    if cardinality(won) < cardinality(p_id) or cardinality(v_changed) < cardinality(p_recipient_id) then
        -- a recipient that one attempt had been taken for is taken again: never silently
        with again as (
            insert into email_events (arrived_at, occurred_at, started_at, email_id, tracking_id, user_id, attempt, type,
                provider, response)
            select v_now, v_now, u.started, u.email, u.id, u.usr, u.attempt, 'duplicate', p_provider,
                'taken by more than one attempt'
            from unnest(p_email, p_recipient_id, p_created, p_user, p_attempt, p_status, p_started)
                u(email, id, created, usr, attempt, status, started)
            join email_tracking t on t.email_id = u.email and t.id = u.id and t.created_at = u.created
            where u.status = 'sent' and u.id <> all(v_changed) and exists (
                select from email_events e
                where e.email_id = u.email and e.tracking_id = u.id and e.type = 'sent' and e.attempt <> u.attempt)
            returning email_id
        )
        select coalesce(array_agg(distinct email_id), '{}') into twice from again;

        select coalesce(array_agg(distinct u.email), '{}') into v_late
        from unnest(p_email, p_status) u(email, status) where u.status = 'sent' and u.email <> all(won);
        delete from email_queue q
        where q.id = any(v_late) and q.state <> 'leased' and not exists (
            select from email_tracking t
            where t.email_id = q.id and t.created_at = q.created_at and t.status in ('queued', 'deferred', 'uncertain'));
    end if;
end $$;

-- Sweep: move on what waits for time alone. Leases that ran out (and with p_owner its own, for an instance that starts
-- again) go back to the queue, or are uncertain where an attempt was open, whose event is written before a new lease
-- overwrites it. Scheduled messages that are due are queued, uncertain ones by their policy and at most p_max_retries times. Indexes: email_queue_leased,
-- email_queue_waiting.
create or replace function sweep(p_owner text, p_uncertain_wait interval, p_max_retries int, p_most int,
    out lapsed int, out uncertain int, out promoted int, out resent int) language plpgsql as $$
#variable_conflict use_column
declare
    v_now timestamptz := clock();
begin
    with ripe as (
        select q.id from email_queue q
        where q.state = 'leased' and (q.lease_until <= v_now or q.owner = p_owner)
        order by q.lease_until limit p_most for update skip locked
    ), unsure as (
        update email_queue q
        set state = 'uncertain', since = v_now, due = v_now + p_uncertain_wait, lease_until = null, owner = null,
            suspect = true, tries = q.tries + 1
        from ripe where q.id = ripe.id and q.attempt_at is not null
        returning q.id, q.created_at, q.user_id, q.lease_no, q.attempt_at
    ), marked as (
        update email_tracking t set status = 'uncertain', updated_at = v_now
        from unsure u
        where t.email_id = u.id and t.created_at = u.created_at and t.status in ('queued', 'deferred', 'uncertain')
        returning t.email_id, t.id
    ), told as (
        insert into email_events (arrived_at, occurred_at, started_at, email_id, tracking_id, user_id, attempt, type, response)
        select v_now, v_now, u.attempt_at, u.id, m.id, u.user_id, u.lease_no, 'uncertain',
            'the worker was lost during this attempt'
        from unsure u join marked m on m.email_id = u.id
    ), back as (
        update email_queue q
        set state = 'queued', since = v_now, lease_until = null, owner = null
        from ripe where q.id = ripe.id and q.attempt_at is null
        returning q.id
    )
    select (select count(*) from back), (select count(*) from unsure) into lapsed, uncertain;

    with ripe as (
        select q.id from email_queue q
        where q.state in ('scheduled', 'uncertain') and q.due <= v_now
            and not (q.state = 'uncertain' and (q.on_uncertain = 'hold' or q.tries > p_max_retries))
        order by q.due limit p_most for update skip locked
    ), moved as (
        update email_queue q set state = 'queued', since = v_now, attempt_at = null
        from ripe join email_queue o on o.id = ripe.id where q.id = ripe.id
        returning o.state
    )
    select count(*) filter (where state = 'scheduled'), count(*) filter (where state = 'uncertain') from moved
    into promoted, resent;
end $$;

-- Expire: end what could not be sent in time. A scan of the whole queue, for a cron. Uncertain messages do not expire.
create or replace function expire(p_most int) returns int language plpgsql as $$
declare
    v_count int;
begin
    with gone as (
        delete from email_queue q
        where q.id in (
            select e.id from email_queue e
            where e.expires_at <= clock() and e.state in ('queued', 'scheduled') limit p_most for update skip locked)
        returning q.id, q.created_at, q.user_id
    ), ended as (
        update email_tracking t set status = 'expired', updated_at = clock()
        from gone g
        where t.email_id = g.id and t.created_at = g.created_at and t.status in ('queued', 'deferred', 'uncertain')
        returning t.email_id, t.id, t.user_id
    ), told as (
        insert into email_events (arrived_at, occurred_at, email_id, tracking_id, user_id, type, response)
        select clock(), clock(), e.email_id, e.id, e.user_id, 'expired', 'not sent before it expired' from ended e
    )
    select count(*) into v_count from gone;
    return v_count;
end $$;

-- Forget idempotency keys after their life time. Index: idempotency_keys_created.
create or replace function forget_idempotency_keys(p_age interval, p_most int) returns int language sql as $$
    with gone as (
        delete from idempotency_keys where (user_id, key) in (
            select user_id, key from idempotency_keys where created_at < clock() - p_age order by created_at limit p_most)
        returning 1)
    select count(*)::int from gone
$$;

-- Who may call what. The definer functions belong to neoforge_outbox, which no one can log in as.
do $$
declare
    name text;
begin
    foreach name in array array['accept', 'find_idempotency_keys', 'find_api_key', 'queue_stats'] loop
        execute format('alter function %I owner to neoforge_outbox', name);
        execute format('revoke execute on function %I from public', name);
        execute format('grant execute on function %I to neoforge_api, neoforge_migrator', name);
    end loop;
    foreach name in array array['due_users', 'claim', 'attempt', 'renew', 'release', 'complete', 'sweep', 'expire',
            'forget_idempotency_keys'] loop
        execute format('revoke execute on function %I from public', name);
        execute format('grant execute on function %I to neoforge_worker', name);
    end loop;
    grant execute on function queue_stats to neoforge_worker;
end $$;
