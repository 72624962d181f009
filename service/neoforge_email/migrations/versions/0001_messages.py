"""Messages, recipients, events, the queue, idempotency keys, users and their keys, with row-level security."""

from neoforge_email.migrations import run

revision = "0001"
down_revision = None


def upgrade() -> None:
    run(TYPES)
    run(TABLES)
    run(INDEXES)
    run(SECURITY)


TYPES = """
-- in the order of their rank: see lifecycle.py
create type recipient_status as enum ('queued', 'deferred', 'uncertain', 'sent', 'delivered', 'cancelled', 'suppressed',
    'expired', 'failed', 'bounced', 'complained');
create type queue_state as enum ('scheduled', 'queued', 'leased', 'uncertain');
create type recipient_kind as enum ('to', 'cc', 'bcc');
create type event_type as enum ('sent', 'deferred', 'uncertain', 'failed', 'bounce', 'dropped', 'expired', 'cancelled',
    'duplicate', 'delivered', 'open', 'click', 'spam_report', 'unsubscribe');
create type uncertain_policy as enum ('resend', 'hold');

-- every clock of the service; `app.clock_offset` moves it in tests
create function clock() returns timestamptz language sql stable parallel safe
    return now() + coalesce(nullif(current_setting('app.clock_offset', true), '')::interval, interval '0');
"""

TABLES = """
create table users (
    id int generated always as identity primary key,
    name text not null unique check (name ~ '^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$'),
    created_at timestamptz not null default now()
);

create table api_keys (
    id int generated always as identity primary key,
    user_id int not null references users,
    name text not null,
    prefix text not null,
    key_hash bytea not null unique check (length(key_hash) = 32),
    created_at timestamptz not null default now(),
    last_used_at timestamptz,
    revoked_at timestamptz
);

-- what a client sent; bodies stand here or once in email_contents
create table email_messages (
    id uuid not null,
    created_at timestamptz not null,
    user_id int not null,
    lane smallint not null,
    sender text not null,
    sender_name text not null,
    reply_to text,
    reply_to_name text,
    subject text not null,
    headers jsonb,
    tags text[],
    metadata jsonb,
    html text,
    text text,
    content_id uuid,
    primary key (id, created_at)
) partition by range (created_at);

-- bodies that several messages of one request share
create table email_contents (
    id uuid not null,
    created_at timestamptz not null,
    user_id int not null,
    html text,
    text text,
    primary key (id, created_at)
) partition by range (created_at);

-- a row a recipient
create table email_tracking (
    id uuid not null,
    email_id uuid not null,
    created_at timestamptz not null,
    updated_at timestamptz not null,
    user_id int not null,
    kind recipient_kind not null,
    status recipient_status not null default 'queued',
    recipient text not null,
    recipient_name text not null,
    provider text,
    response text,
    primary key (email_id, id, created_at)
) partition by range (created_at);

-- what happened, by arrival; an attempt is an event at its end
create table email_events (
    arrived_at timestamptz not null,
    occurred_at timestamptz not null,
    started_at timestamptz,
    email_id uuid not null,
    tracking_id uuid,
    user_id int not null,
    attempt int,
    type event_type not null,
    provider text,
    response text,
    detail jsonb
) partition by range (arrived_at);

-- a row an unfinished message, with its open attempt; small and hot, no history
create table email_queue (
    id uuid not null primary key,
    created_at timestamptz not null,
    due timestamptz not null,
    expires_at timestamptz not null,
    since timestamptz not null,
    lease_until timestamptz,
    attempt_at timestamptz,
    user_id int not null,
    lease_no int not null default 0,
    lane smallint not null,
    tries smallint not null default 0,
    state queue_state not null default 'queued',
    on_uncertain uncertain_policy not null default 'resend',
    suspect boolean not null default false,
    owner text
) with (fillfactor = 90, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 20000,
        autovacuum_vacuum_cost_delay = 0);
comment on column email_queue.since is 'in this state since';
comment on column email_queue.suspect is 'taken up singly, because an attempt on it ended in a crash';

create table idempotency_keys (
    user_id int not null,
    key text not null,
    email_id uuid not null,
    body_hash bytea not null,
    created_at timestamptz not null,
    primary key (user_id, key)
);

create table suppressions (
    user_id int not null references users,
    address text not null check (address = lower(address)),
    reason text not null,
    created_at timestamptz not null default now(),
    primary key (user_id, address)
);

-- which outbox.sql the functions came from
create table functions_installed (sha256 text not null);

create function ensure_partitions(p_months_ahead int) returns setof text language plpgsql security definer
    set search_path = public, pg_temp as $$
declare
    parent text;
    month date;
    name text;
begin
    foreach parent in array array['email_messages', 'email_contents', 'email_tracking', 'email_events'] loop
        for step in 0 .. p_months_ahead loop
            month := (date_trunc('month', clock() at time zone 'UTC') + make_interval(months => step))::date;
            name := format('%s_y%sm%s', parent, to_char(month, 'YYYY'), to_char(month, 'MM'));
            if to_regclass(name) is null then
                execute format('create table %I partition of %I for values from (%L) to (%L)', name, parent,
                    month::timestamp at time zone 'UTC', (month + interval '1 month') at time zone 'UTC');
                return next name;
            end if;
        end loop;
    end loop;
end $$;
revoke execute on function ensure_partitions(int) from public;
select ensure_partitions(3);
"""

INDEXES = """
create index email_queue_ready on email_queue (lane, user_id, due) where state = 'queued';
create index email_queue_leased on email_queue (lease_until) where state = 'leased';
create index email_queue_waiting on email_queue (due) where state in ('scheduled', 'uncertain');
create index idempotency_keys_created on idempotency_keys (created_at);

-- the guide's three; status is partial, since an index of every row costs 9 % of the throughput
create index idx_email_tracking_recipient on email_tracking (recipient);
create index idx_email_tracking_status_created on email_tracking (status, created_at desc)
    where status in ('deferred', 'uncertain', 'failed', 'bounced', 'complained');
create index idx_email_events_email_occurred on email_events (email_id, occurred_at desc);
"""

SECURITY = """
-- the API sees the rows of the user it acts for; an unset user sees none
do $$
declare
    name text;
begin
    foreach name in array array['users', 'api_keys', 'email_messages', 'email_contents', 'email_tracking', 'email_events',
            'email_queue', 'idempotency_keys', 'suppressions'] loop
        execute format('alter table %I enable row level security', name);
        execute format('alter table %I force row level security', name);
        execute format('create policy %I on %I to neoforge_api using (%s = nullif(current_setting(%L, true), %L)::integer)',
            name || '_policy', name, case name when 'users' then 'id' else 'user_id' end, 'app.current_user_id', '');
        execute format('create policy %I on %I to neoforge_owner using (true) with check (true)', name || '_owner', name);
        execute format('create policy %I on %I to neoforge_outbox using (true) with check (true)', name || '_outbox', name);
        execute format('create policy %I on %I to neoforge_worker using (true) with check (true)', name || '_worker', name);
    end loop;
end $$;

grant usage on schema public to neoforge_app, neoforge_outbox;
grant select on users, email_messages, email_contents, email_tracking, email_events, email_queue, suppressions
    to neoforge_api, neoforge_worker;
grant update on email_tracking to neoforge_worker;
grant insert on email_events to neoforge_worker;
grant update, delete on email_queue to neoforge_worker;
grant select, delete on idempotency_keys to neoforge_worker;
grant execute on function ensure_partitions(int) to neoforge_worker;

grant select, insert on email_messages, email_contents, email_tracking, email_queue, idempotency_keys to neoforge_outbox;
grant select, update on api_keys to neoforge_outbox;
"""
