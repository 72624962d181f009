"""Customers' webhook endpoints, what is to be delivered to them, and what happened to them."""

from neoforge_email.migrations import run

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    run(TABLES)
    run(INDEXES)
    run(SECURITY)


TABLES = """
create type webhook_state as enum ('pending', 'leased', 'delivered', 'dead');
create type webhook_endpoint_event_type as enum ('created', 'changed', 'secret_rotated', 'failing', 'recovered', 'disabled',
    'enabled');

create table webhook_endpoints (
    id uuid primary key,
    user_id int not null references users,
    created_at timestamptz not null,
    url text not null,
    description text not null,
    types text[] not null,
    failures int not null default 0,
    failing_since timestamptz,
    failed_at timestamptz,
    paused_until timestamptz,
    disabled_at timestamptz,
    disabled_reason text
);
comment on column webhook_endpoints.types is 'empty: all';
comment on column webhook_endpoints.failures is 'attempts since the last success';
comment on column webhook_endpoints.paused_until is 'nothing is sent before';

-- In clear, since HMAC needs them so. Only the worker may read them; the API writes one and shows it in that answer alone.
create table webhook_secrets (
    endpoint_id uuid not null references webhook_endpoints on delete cascade,
    user_id int not null,
    created_at timestamptz not null,
    expires_at timestamptz,
    secret text not null
);
comment on column webhook_secrets.expires_at is 'signs beside the present one until then; null: the present one';

-- The outbox. No foreign key to webhook_endpoints: its check would lock the endpoint in every transaction that tells it
-- something. What is left of a deleted endpoint the sweep takes away.
create table webhook_deliveries (
    id uuid primary key,
    endpoint_id uuid not null,
    email_id uuid,
    number bigint generated always as identity,
    created_at timestamptz not null,
    due timestamptz not null,
    expires_at timestamptz,
    lease_until timestamptz,
    finished_at timestamptz,
    user_id int not null,
    lease_no int not null default 0,
    tries int not null default 0,
    state webhook_state not null,
    status smallint,
    answer text,
    owner text,
    type text not null,
    payload jsonb not null
);
comment on column webhook_deliveries.id is 'UUIDv7; as webhook-id it is msg_ and its 32 digits';
comment on column webhook_deliveries.number is 'in this order the deliveries of one message go to an endpoint';
comment on column webhook_deliveries.expires_at is 'dead if it fails after this; set by the first failure';
comment on column webhook_deliveries.status is 'HTTP status of the last answer';
comment on column webhook_deliveries.answer is 'the last answer, or why there is none: one line';

create table webhook_endpoint_events (
    id bigint generated always as identity primary key,
    endpoint_id uuid not null references webhook_endpoints on delete cascade,
    user_id int not null,
    at timestamptz not null,
    type webhook_endpoint_event_type not null,
    detail text
);
"""

INDEXES = """
create index webhook_endpoints_user on webhook_endpoints (user_id);
create unique index webhook_secrets_present on webhook_secrets (endpoint_id) where expires_at is null;
create index webhook_secrets_endpoint on webhook_secrets (endpoint_id);
create index webhook_deliveries_due on webhook_deliveries (endpoint_id, due, number) where state = 'pending';
create index webhook_deliveries_order on webhook_deliveries (endpoint_id, email_id, number)
    where state in ('pending', 'leased');
create index webhook_deliveries_leased on webhook_deliveries (endpoint_id) where state = 'leased';
create index webhook_deliveries_listed on webhook_deliveries (endpoint_id, state, id);
create index webhook_deliveries_finished on webhook_deliveries (state, finished_at) where finished_at is not null;
create index webhook_endpoint_events_endpoint on webhook_endpoint_events (endpoint_id, id);
"""

SECURITY = """
do $$
declare
    name text;
begin
    foreach name in array array['webhook_endpoints', 'webhook_secrets', 'webhook_deliveries', 'webhook_endpoint_events'] loop
        execute format('alter table %I enable row level security', name);
        execute format('alter table %I force row level security', name);
        execute format('create policy %I on %I to neoforge_api using (user_id = nullif(current_setting(%L, true), %L)::integer)',
            name || '_policy', name, 'app.current_user_id', '');
        execute format('create policy %I on %I to neoforge_owner using (true) with check (true)', name || '_owner', name);
        execute format('create policy %I on %I to neoforge_outbox using (true) with check (true)', name || '_outbox', name);
        execute format('create policy %I on %I to neoforge_worker using (true) with check (true)', name || '_worker', name);
    end loop;
end $$;

grant select, insert, update, delete on webhook_endpoints to neoforge_api;
grant select (endpoint_id, user_id, created_at, expires_at), insert, update (expires_at), delete on webhook_secrets
    to neoforge_api;
grant select, insert, update (state, due, expires_at, finished_at, lease_no, tries) on webhook_deliveries to neoforge_api;
grant select, insert on webhook_endpoint_events to neoforge_api;

grant select, update on webhook_endpoints to neoforge_worker;
grant select, delete on webhook_secrets to neoforge_worker;
grant select, insert, update, delete on webhook_deliveries to neoforge_worker;
grant select, insert, delete on webhook_endpoint_events to neoforge_worker;

grant select on webhook_endpoints, webhook_deliveries to neoforge_outbox;
grant insert on webhook_deliveries to neoforge_outbox;
"""
