"""Provider events, receipts, the ids that providers give, the policy for uncertain messages, and those that are held."""

from neoforge_email.migrations import drop_functions, run

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    drop_functions("accept", "attempt", "claim", "complete", "sweep")  # their arguments or columns changed before 1.0
    run(STATUS)
    run(QUEUE)
    run(EVENTS)
    run(SECURITY)


# An enumeration's order is its rank, and PostgreSQL cannot reorder one: a new type takes its place.
STATUS = """
drop index idx_email_tracking_status_created;
alter type recipient_status rename to recipient_status_0001;
create type recipient_status as enum ('queued', 'deferred', 'uncertain', 'cancelled', 'suppressed', 'expired', 'failed',
    'sent', 'dropped', 'delivered', 'bounced', 'complained');
alter table email_tracking
    alter column status drop default,
    alter column status type recipient_status using status::text::recipient_status,
    alter column status set default 'queued';
drop type recipient_status_0001;
create index idx_email_tracking_status_created on email_tracking (status, created_at desc)
    where status in ('deferred', 'uncertain', 'failed', 'dropped', 'bounced', 'complained');
"""

QUEUE = """
alter type queue_state add value 'held';
alter type event_type add value 'held';
alter type event_type add value 'released';
alter table email_queue
    add column lapses smallint not null default 0,
    add column attempt_provider text,
    add column held_reason text;
comment on column email_queue.lapses is 'leases that ran out without an attempt, since the last attempt';
comment on column email_queue.held_reason is 'why an operator has to decide';
"""

EVENTS = """
alter table email_events add column event_id text;
comment on column email_events.event_id is 'the provider''s own; null for what we did ourselves';

-- which message a provider means by its own id; only for providers that give one
create table provider_message_ids (
    provider text not null,
    message_id text not null,
    email_id uuid not null,
    email_created_at timestamptz not null,
    user_id int not null,
    attempt int not null,
    created_at timestamptz not null,
    primary key (provider, message_id, email_id)
);
create index provider_message_ids_created on provider_message_ids (created_at);

-- what providers told us, as it came and once; the worker makes events of it
create type receipt_state as enum ('waiting', 'done', 'unmatched', 'malformed');
create table provider_receipts (
    id bigint generated always as identity primary key,
    provider text not null,
    event_id text not null,
    body bytea not null,
    received_at timestamptz not null,
    due timestamptz not null,
    tries smallint not null default 0,
    state receipt_state not null default 'waiting',
    error text,
    finished_at timestamptz,
    unique (provider, event_id)
);
create index provider_receipts_waiting on provider_receipts (due) where state = 'waiting';
create index provider_receipts_finished on provider_receipts (finished_at) where state <> 'waiting';
create index provider_receipts_left on provider_receipts (state, finished_at) where state in ('unmatched', 'malformed');
"""

SECURITY = """
do $$
declare
    name text;
begin
    foreach name in array array['provider_message_ids', 'provider_receipts'] loop
        execute format('alter table %I enable row level security', name);
        execute format('alter table %I force row level security', name);
        execute format('create policy %I on %I to neoforge_owner using (true) with check (true)', name || '_owner', name);
        execute format('create policy %I on %I to neoforge_outbox using (true) with check (true)', name || '_outbox', name);
        execute format('create policy %I on %I to neoforge_worker using (true) with check (true)', name || '_worker', name);
    end loop;
end $$;
grant select, insert, delete on provider_message_ids to neoforge_worker;
grant select, update, delete on provider_receipts to neoforge_worker;
grant insert on suppressions to neoforge_worker;
grant select, insert on provider_receipts to neoforge_outbox;
"""
