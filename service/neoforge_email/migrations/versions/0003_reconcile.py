"""What the reconciler found, and how far it has walked."""

from neoforge_email.migrations import run

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    run(TABLES)


TABLES = """
create table stuck_rows (
    kind text not null,
    id text collate "C" not null,
    part text not null,
    what text not null,
    found_at timestamptz not null,
    checked_at timestamptz not null,
    primary key (kind, id)
);
comment on table stuck_rows is 'rows that no rule will move again; taken away when they are mended';

create table stuck_walks (
    name text primary key,
    position uuid not null,
    saved_at timestamptz not null
);
comment on column stuck_walks.position is 'the next message to look at';
comment on column stuck_walks.saved_at is 'when a run last did all of its work';
insert into stuck_walks (name, position, saved_at)
select name, '00000000-0000-0000-0000-000000000000', clock() from unnest(array['queue', 'recent', 'all']) name;

grant select, insert, update, delete on stuck_rows to neoforge_worker;
grant select, update on stuck_walks to neoforge_worker;
grant select on stuck_rows, stuck_walks to neoforge_outbox;
"""
