-- The functions of the hot path; outbox.py calls them and says what they promise. `neoforge migrate` installs them after
-- the schema's migrations, as neoforge_migrator. Version N-1 of the service runs beside version N: a function whose
-- arguments or meaning change gets a new name, and the old one stays for one version.

-- When a message was accepted: its id's own time stamp (RFC 9562, 5.7), which names its partition.
create or replace function accepted_at(p_id uuid) returns timestamptz language sql immutable parallel safe as $$
    select to_timestamp(('x' || substr(replace(p_id::text, '-', ''), 1, 12))::bit(48)::bigint / 1000.0)
$$;

-- Accept: everything of one flush in one transaction. Index: the primary keys alone.
create or replace function accept(
    p_at timestamptz, p_expire_after interval,
    p_id uuid[], p_user int[], p_lane smallint[], p_sender text[], p_sender_name text[], p_reply_to text[],
    p_reply_to_name text[], p_subject text[], p_headers jsonb[], p_tags text[], p_metadata jsonb[], p_html text[],
    p_text text[], p_content uuid[], p_on_uncertain text[], p_key text[], p_hash bytea[],
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

    insert into email_queue (id, created_at, due, expires_at, since, user_id, lane, on_uncertain)
    select u.id, p_at, v_now, v_now + p_expire_after, v_now, u.usr, u.lane, u.on_uncertain::uncertain_policy
    from unnest(p_id, p_user, p_lane, p_on_uncertain) u(id, usr, lane, on_uncertain)
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
create or replace function attempt(p_id uuid[], p_lease_no int[], p_call_time interval[], p_provider text[])
    returns setof uuid language sql as $$
    update email_queue q set attempt_at = clock(), attempt_provider = u.provider, lapses = 0
    from unnest(p_id, p_lease_no, p_call_time, p_provider) u(id, lease_no, call_time, provider)
    where q.id = u.id and q.lease_no = u.lease_no and q.state = 'leased' and q.lease_until > clock() + u.call_time
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

-- An event about each recipient of these messages that is still open. Index: email_tracking_pkey.
create or replace function tell(p_id uuid[], p_type text, p_response text[]) returns void language sql as $$
    insert into email_events (arrived_at, occurred_at, email_id, tracking_id, user_id, type, response)
    select clock(), clock(), t.email_id, t.id, t.user_id, p_type::event_type, u.response
    from unnest(p_id, p_response) u(id, response)
    join email_tracking t on t.email_id = u.id and t.created_at = accepted_at(u.id)
    where t.status in ('queued', 'deferred', 'uncertain')
$$;

-- Hold: leave messages to an operator that this worker cannot even begin with, and say so. Index: email_queue_pkey.
create or replace function hold(p_id uuid[], p_lease_no int[], p_reason text) returns setof uuid language plpgsql as $$
declare
    v_held uuid[];
begin
    with held as (
        update email_queue q
        set state = 'held', since = clock(), held_reason = p_reason, lease_until = null, owner = null
        from unnest(p_id, p_lease_no) u(id, lease_no)
        where q.id = u.id and q.lease_no = u.lease_no and q.state = 'leased' and q.attempt_at is null
        returning q.id
    )
    select array_agg(id) into v_held from held;
    perform tell(v_held, 'held', array_fill(p_reason, array[coalesce(cardinality(v_held), 0)]));
    return query select unnest(v_held);
end $$;

-- Resend: an operator lets uncertain and held messages be sent (again). Index: email_queue_pkey.
create or replace function resend(p_id uuid[]) returns setof uuid language plpgsql as $$
declare
    v_freed uuid[];
begin
    with freed as (
        update email_queue q
        set state = 'queued', since = clock(), due = clock(), expires_at = greatest(q.expires_at, clock() + interval '1 hour'),
            tries = 0, lapses = 0, held_reason = null, attempt_at = null
        where q.id = any(p_id) and q.state in ('uncertain', 'held')
        returning q.id
    )
    select array_agg(id) into v_freed from freed;
    perform tell(v_freed, 'released', array_fill('an operator had it sent'::text, array[coalesce(cardinality(v_freed), 0)]));
    return query select unnest(v_freed);
end $$;

-- Confirm: an operator knows that these messages arrived; only where an attempt may have been taken. Indexes:
-- email_queue_pkey, email_tracking_pkey.
create or replace function confirm(p_id uuid[]) returns setof uuid language plpgsql as $$
declare
    v_known uuid[];
begin
    with known as (
        delete from email_queue q
        where q.id = any(p_id) and q.state in ('uncertain', 'held') and exists (
            select from email_events e where e.email_id = q.id and e.type = 'uncertain')
        returning q.id, q.created_at
    ), marked as (
        update email_tracking t set status = 'sent', updated_at = clock()
        from known k
        where t.email_id = k.id and t.created_at = k.created_at and t.status in ('queued', 'deferred', 'uncertain')
        returning t.email_id, t.id, t.user_id
    ), told as (
        insert into email_events (arrived_at, occurred_at, email_id, tracking_id, user_id, type, response)
        select clock(), clock(), m.email_id, m.id, m.user_id, 'released', 'an operator confirmed that it arrived' from marked m
    )
    select array_agg(id) into v_known from known;
    return query select unnest(v_known);
end $$;

-- Complete: what became of a batch of attempts. The message's state is fenced by its lease; the attempt's own outcome is
-- recorded however late it comes, and a late "taken" cancels a resend that has not begun. Returns the messages whose
-- state was changed, and those that were taken a second time. Indexes: email_queue_pkey, email_tracking_pkey.
create or replace function complete(
    p_id uuid[], p_lease_no int[], p_state text[], p_delay_seconds double precision[], p_tries smallint[],
    p_email uuid[], p_recipient_id uuid[], p_created timestamptz[], p_user int[], p_attempt int[], p_status text[],
    p_event text[], p_response text[], p_started timestamptz[], p_provider text[], p_message_id text[],
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
        set status = u.status::recipient_status, updated_at = v_now, response = u.response, provider = u.provider
        from unnest(p_email, p_recipient_id, p_created, p_status, p_response, p_provider)
            u(email, id, created, status, response, provider)
        where t.email_id = u.email and t.id = u.id and t.created_at = u.created
            and (t.status in ('queued', 'deferred', 'uncertain') and u.email = any(won)
                or t.status < 'sent' and u.status = 'sent')
        returning t.id
    )
    select coalesce(array_agg(id), '{}') into v_changed from changed;

    insert into email_events (arrived_at, occurred_at, started_at, email_id, tracking_id, user_id, attempt, type, provider,
        response)
    select v_now, v_now, u.started, u.email, u.id, u.usr, u.attempt, u.event::event_type, u.provider, u.response
    from unnest(p_email, p_recipient_id, p_user, p_attempt, p_event, p_response, p_started, p_provider)
        u(email, id, usr, attempt, event, response, started, provider)
    where u.email = any(won) or not exists ( -- a repeated call after a lost connection tells it once
        select from email_events e
        where e.email_id = u.email and e.tracking_id = u.id and e.attempt = u.attempt and e.type = u.event::event_type);

    if exists (select from unnest(p_message_id) m where m is not null) then
        insert into provider_message_ids (provider, message_id, email_id, email_created_at, user_id, attempt, created_at)
        select distinct on (u.provider, u.message_id, u.email) u.provider, u.message_id, u.email, u.created, u.usr, u.attempt, v_now
        from unnest(p_email, p_created, p_user, p_attempt, p_provider, p_message_id)
            u(email, created, usr, attempt, provider, message_id)
        where u.message_id is not null
        on conflict do nothing;
    end if;

    twice := '{}';
    if cardinality(won) < cardinality(p_id) or cardinality(v_changed) < cardinality(p_recipient_id) then
        -- a recipient that one attempt had been taken for is taken again: never silently
        with again as (
            insert into email_events (arrived_at, occurred_at, started_at, email_id, tracking_id, user_id, attempt, type,
                provider, response)
            select v_now, v_now, u.started, u.email, u.id, u.usr, u.attempt, 'duplicate', u.provider,
                'taken by more than one attempt'
            from unnest(p_email, p_recipient_id, p_user, p_attempt, p_status, p_started, p_provider)
                u(email, id, usr, attempt, status, started, provider)
            where u.status = 'sent' and u.id <> all(v_changed) and taken_by_another(u.email, u.id, u.attempt)
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

-- Whether there is proof that another attempt at this recipient was taken: our own outcome or any event of a provider. It
-- is told once.
create or replace function taken_by_another(p_email uuid, p_recipient_id uuid, p_attempt int) returns boolean
    language sql stable as $$
    select exists (
        select from email_events e
        where e.email_id = p_email and e.tracking_id = p_recipient_id and e.attempt <> p_attempt
            and (e.type = 'sent' or e.event_id is not null))
    and not exists (
        select from email_events e
        where e.email_id = p_email and e.tracking_id = p_recipient_id and e.type = 'duplicate')
$$;

-- Record events of providers: each is kept, a recipient's status follows by rank, an uncertain message is settled when
-- nothing of it is open any more, an address that is dead or complained is suppressed, and a recipient that two attempts
-- were taken for is marked. `matched` says of each event whether its message was found, `twice` names the messages marked.
-- A message is named by p_email (from an attempt) or by the provider's own id. The queue rows are locked first: claim,
-- complete and this see one another. Indexes: email_queue_pkey, email_tracking_pkey, provider_message_ids_pkey.
create or replace function record_events(
    p_provider text[], p_event_id text[], p_type text[], p_status text[], p_occurred timestamptz[], p_recipient text[],
    p_email uuid[], p_attempt int[], p_message_id text[], p_suppress boolean[], p_response text[], p_detail jsonb[],
    out matched boolean[], out twice uuid[]
) language plpgsql as $$
declare
    v_now timestamptz := clock();
    v_email uuid[];
    v_attempt int[];
    v_recipient_id uuid[];
    v_user int[];
begin
    -- the message and the recipient of each event
    select array_agg(f.email order by f.n), array_agg(f.attempt order by f.n), array_agg(f.tracking order by f.n),
        array_agg(f.usr order by f.n)
    into v_email, v_attempt, v_recipient_id, v_user
    from (
        select u.n, m.id as email, coalesce(u.attempt, i.attempt) as attempt, t.id as tracking, m.user_id as usr
        from unnest(p_provider, p_recipient, p_email, p_attempt, p_message_id)
            with ordinality u(provider, recipient, email, attempt, message_id, n)
        left join lateral (
            select i.email_id, i.attempt from provider_message_ids i
            where u.email is null and i.provider = u.provider and i.message_id = u.message_id and (
                u.recipient is null or exists (
                    select from email_tracking t
                    where t.email_id = i.email_id and t.created_at = i.email_created_at
                        and lower(t.recipient) = lower(u.recipient)))
            order by i.email_id limit 1) i on true
        left join email_messages m on m.id = coalesce(u.email, i.email_id)
            and m.created_at = accepted_at(coalesce(u.email, i.email_id))
        left join lateral (
            select t.id from email_tracking t
            where t.email_id = m.id and t.created_at = m.created_at and (
                lower(t.recipient) = lower(u.recipient)
                or not exists ( -- an alias of the only recipient, or nobody named
                    select from email_tracking o
                    where o.email_id = m.id and o.created_at = m.created_at and o.id <> t.id))
            order by t.id limit 1) t on true) f;
    select array_agg(e.id is not null order by e.n) into matched from unnest(v_email) with ordinality e(id, n);

    perform from email_queue q where q.id = any(v_email) order by q.id for update;

    with told as (
        insert into email_events (arrived_at, occurred_at, email_id, tracking_id, user_id, attempt, type, provider, event_id,
            response, detail)
        select v_now, u.occurred, u.email, u.tracking, u.usr, u.attempt, u.type::event_type, u.provider, u.event_id, u.response,
            u.detail
        from unnest(p_provider, p_event_id, p_type, p_occurred, p_response, p_detail, v_email, v_attempt, v_recipient_id, v_user)
            u(provider, event_id, type, occurred, response, detail, email, attempt, tracking, usr)
        where u.email is not null
    ), highest as (
        select distinct on (u.email, u.tracking) u.email, u.tracking, u.status::recipient_status as status, u.provider, u.response
        from unnest(v_email, v_recipient_id, p_status, p_provider, p_response) u(email, tracking, status, provider, response)
        where u.tracking is not null
        order by u.email, u.tracking, u.status::recipient_status desc
    )
    update email_tracking t
    set status = h.status, updated_at = v_now, provider = h.provider, response = coalesce(h.response, t.response)
    from highest h
    where t.email_id = h.email and t.id = h.tracking and t.created_at = accepted_at(h.email) and t.status < h.status;

    insert into suppressions (user_id, address, reason, created_at)
    select distinct on (u.usr, lower(t.recipient)) u.usr, lower(t.recipient), u.type, v_now
    from unnest(v_email, v_recipient_id, v_user, p_type, p_suppress) u(email, tracking, usr, type, suppress)
    join email_tracking t on t.email_id = u.email and t.id = u.tracking and t.created_at = accepted_at(u.email)
    where u.suppress
    on conflict do nothing;

    with again as (
        insert into email_events (arrived_at, occurred_at, email_id, tracking_id, user_id, attempt, type, provider, response)
        select distinct on (u.email, u.tracking) v_now, v_now, u.email, u.tracking, u.usr, u.attempt, 'duplicate'::event_type,
            u.provider, 'taken by more than one attempt'
        from unnest(v_email, v_recipient_id, v_user, v_attempt, p_provider) u(email, tracking, usr, attempt, provider)
        where u.tracking is not null and u.attempt is not null and taken_by_another(u.email, u.tracking, u.attempt)
        returning email_id
    )
    select coalesce(array_agg(distinct email_id), '{}') into twice from again;

    -- a lease whose attempt is open is left: what is on its way answers for itself
    delete from email_queue q
    where q.id = any(v_email) and (q.state <> 'leased' or q.attempt_at is null) and not exists (
        select from email_tracking t
        where t.email_id = q.id and t.created_at = q.created_at and t.status in ('queued', 'deferred', 'uncertain'));
end $$;

-- Sweep: move on what waits for time alone. Leases that ran out (and with p_owner its own, for an instance that starts
-- again) go back to the queue, or are uncertain where an attempt was open, whose event is written before a new lease
-- overwrites it. Scheduled messages that are due are queued, uncertain ones by their policy and at most p_max_retries
-- times; the others, and what was lost p_max_lapses times before its attempt, wait for an operator. p_reporting are the
-- providers whose events may settle an attempt within p_wait. Indexes: email_queue_leased, email_queue_waiting.
create or replace function sweep(p_owner text, p_reporting text[], p_wait interval, p_other_wait interval,
    p_max_retries int, p_max_lapses int, p_most int,
    out lapsed int, out uncertain int, out promoted int, out resent int, out held int) language plpgsql as $$
#variable_conflict use_column
declare
    v_now timestamptz := clock();
    v_held uuid[];
    v_reasons text[];
begin
    with ripe as (
        select q.id from email_queue q
        where q.state = 'leased' and (q.lease_until <= v_now or q.owner = p_owner)
        order by q.lease_until limit p_most for update skip locked
    ), unsure as (
        update email_queue q
        set state = 'uncertain', since = v_now,
            due = v_now + case when q.attempt_provider = any(p_reporting) then p_wait else p_other_wait end,
            lease_until = null, owner = null, suspect = true, tries = q.tries + 1
        from ripe where q.id = ripe.id and q.attempt_at is not null
        returning q.id, q.created_at, q.user_id, q.lease_no, q.attempt_at, q.attempt_provider
    ), marked as (
        update email_tracking t set status = 'uncertain', updated_at = v_now
        from unsure u
        where t.email_id = u.id and t.created_at = u.created_at and t.status in ('queued', 'deferred', 'uncertain')
        returning t.email_id, t.id
    ), told as (
        insert into email_events (arrived_at, occurred_at, started_at, email_id, tracking_id, user_id, attempt, type, provider,
            response)
        select v_now, v_now, u.attempt_at, u.id, m.id, u.user_id, u.lease_no, 'uncertain', u.attempt_provider,
            'the worker was lost during this attempt'
        from unsure u join marked m on m.email_id = u.id
    ), back as (
        update email_queue q
        set state = case when q.lapses < p_max_lapses then 'queued' else 'held' end::queue_state, since = v_now,
            held_reason = case when q.lapses >= p_max_lapses then 'workers were lost again and again while they held it' end,
            lapses = q.lapses + 1, lease_until = null, owner = null
        from ripe where q.id = ripe.id and q.attempt_at is null
        returning q.id, q.held_reason
    )
    select count(*) filter (where b.held_reason is null), array_agg(b.id) filter (where b.held_reason is not null),
        array_agg(b.held_reason) filter (where b.held_reason is not null), (select count(*) from unsure)
    from back b into lapsed, v_held, v_reasons, uncertain;
    perform tell(v_held, 'held', v_reasons);
    held := coalesce(cardinality(v_held), 0);

    with ripe as (
        select q.id, q.state, case
            when q.state = 'uncertain' and q.on_uncertain = 'hold'
                then 'it is not known whether it was sent, and its policy is to hold'
            when q.state = 'uncertain' and q.tries > p_max_retries then 'no attempt got an answer'
            end as reason
        from email_queue q
        where q.state in ('scheduled', 'uncertain') and q.due <= v_now
        order by q.due limit p_most for update skip locked
    ), moved as (
        update email_queue q
        set state = case when r.reason is null then 'queued' else 'held' end::queue_state, since = v_now,
            held_reason = r.reason, attempt_at = null
        from ripe r where q.id = r.id
        returning q.id, r.state, r.reason
    )
    select count(*) filter (where m.state = 'scheduled'), count(*) filter (where m.state = 'uncertain' and m.reason is null),
        array_agg(m.id) filter (where m.reason is not null), array_agg(m.reason) filter (where m.reason is not null)
    from moved m into promoted, resent, v_held, v_reasons;
    perform tell(v_held, 'held', v_reasons);
    held := held + coalesce(cardinality(v_held), 0);
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

-- Follow a clock that was set back: what it wrote before lies in its future now, and would wait until it has caught up. Such
-- rows keep what they had left to wait for; when a scheduled message is due and a message expires is a time of day. A scan of
-- the whole queue, for a cron.
create or replace function follow_clock(p_most int) returns int language plpgsql as $$
declare
    v_now timestamptz := clock();
    v_count int;
begin
    with ahead as (
        select e.id from email_queue e
        where e.since > v_now + interval '10 seconds' and e.state in ('queued', 'leased', 'uncertain')
        limit p_most for update skip locked
    ), moved as (
        update email_queue q
        set since = v_now, due = q.due - (q.since - v_now), lease_until = q.lease_until - (q.since - v_now)
        from ahead a where q.id = a.id
        returning 1
    )
    select count(*) into v_count from moved;
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
    foreach name in array array['due_users', 'claim', 'attempt', 'renew', 'release', 'hold', 'tell', 'accepted_at', 'complete',
            'record_events', 'taken_by_another', 'sweep', 'expire',
            'follow_clock', 'forget_idempotency_keys'] loop
        execute format('revoke execute on function %I from public', name);
        execute format('grant execute on function %I to neoforge_worker', name);
    end loop;
    revoke execute on function resend, confirm from public, neoforge_worker; -- an operator decides, as neoforge_migrator
    grant execute on function queue_stats to neoforge_worker;
end $$;
