"""Whether `schema.sql`, the page that people read, says what the migrations make.

`python -m kassa.db.schema_check URL` puts both into databases of their own and compares what PostgreSQL then knows of
each. Where a column stands in its table does not count, because a migration can only add one at the end.
"""

import asyncio
import secrets
import sys
from importlib.resources import files
from urllib.parse import urlsplit, urlunsplit

from kassa.db.migrate import migrate
from kassa.db.pool import connect

_CATALOG = """
WITH ours AS (
    SELECT c.oid, c.relname, c.relkind, c.reloptions, c.relpersistence, c.relrowsecurity
    FROM pg_class AS c
    WHERE c.relnamespace = 'public'::regnamespace AND c.relname NOT LIKE 'schema_migration%'
)
SELECT 'relation ' || relname,
    concat_ws(' ', relkind, relpersistence, reloptions, relrowsecurity, pg_get_partkeydef(oid),
        CASE WHEN relkind IN ('v', 'm') THEN pg_get_viewdef(oid) END,
        (SELECT pg_get_expr(p.relpartbound, p.oid) FROM pg_class AS p WHERE p.oid = ours.oid),
        (SELECT string_agg(i.inhparent::regclass::text, ',') FROM pg_inherits AS i WHERE i.inhrelid = ours.oid))
FROM ours
UNION ALL
SELECT 'column ' || relname || '.' || attname,
    concat_ws(' ', format_type(atttypid, atttypmod), CASE WHEN attnotnull THEN 'not null' END, attidentity,
        attgenerated, attstorage, attcompression, attcollation::regcollation, pg_get_expr(adbin, adrelid))
FROM ours
JOIN pg_attribute ON attrelid = ours.oid AND attnum > 0 AND NOT attisdropped
LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
WHERE relkind NOT IN ('i', 'I')
UNION ALL
SELECT 'constraint ' || relname || '.' || conname, pg_get_constraintdef(pg_constraint.oid)
FROM ours JOIN pg_constraint ON conrelid = ours.oid
UNION ALL
SELECT 'index ' || relname, pg_get_indexdef(oid) FROM ours WHERE relkind IN ('i', 'I')
UNION ALL
SELECT 'sequence ' || relname, concat_ws(' ', format_type(seqtypid, NULL), seqstart, seqincrement, seqmin, seqmax,
    seqcache, seqcycle)
FROM ours JOIN pg_sequence ON seqrelid = ours.oid
UNION ALL
SELECT 'function ' || p.oid::regprocedure, pg_get_functiondef(p.oid)
FROM pg_proc AS p
WHERE p.pronamespace = 'public'::regnamespace AND p.prokind IN ('f', 'p')
UNION ALL
SELECT 'trigger ' || relname || '.' || tgname, pg_get_triggerdef(pg_trigger.oid) || ' ' || tgenabled::text
FROM ours JOIN pg_trigger ON tgrelid = ours.oid AND NOT tgisinternal
UNION ALL
SELECT 'type ' || t.typname, concat_ws(' ', t.typtype, format_type(t.typbasetype, t.typtypmod), t.typnotnull,
    (SELECT string_agg(enumlabel, ',' ORDER BY enumsortorder) FROM pg_enum WHERE enumtypid = t.oid),
    (SELECT string_agg(pg_get_constraintdef(c.oid), ' ' ORDER BY c.conname) FROM pg_constraint AS c
        WHERE c.contypid = t.oid))
FROM pg_type AS t
WHERE t.typnamespace = 'public'::regnamespace AND t.typtype IN ('e', 'd', 'r')
UNION ALL
SELECT 'comment ' || relname || coalesce('.' || attname, ''), description
FROM ours
JOIN pg_description ON objoid = ours.oid AND classoid = 'pg_class'::regclass
LEFT JOIN pg_attribute ON attrelid = ours.oid AND attnum = objsubid AND objsubid > 0
UNION ALL
SELECT 'extension ' || extname, '' FROM pg_extension
"""


async def difference(dsn: str, *, page: str | None = None) -> list[str]:
    """What differs between the migrations and `page` (schema.sql unless given), one sentence each.

    dsn: any database on a server where databases may be created; two are made and dropped.
    """
    text = files("kassa.db").joinpath("schema.sql").read_text(encoding="utf-8") if page is None else page
    administrator = await connect(dsn, application="kassa schema check")
    names = [f"kassa_{part}_{secrets.token_hex(4)}" for part in ("page", "migrations")]
    try:
        for name in names:
            await administrator.execute(f"CREATE DATABASE {name} TEMPLATE template0")
        await _execute(_named(dsn, names[0]), text)
        from_page = await _catalog(_named(dsn, names[0]))
        await migrate(_named(dsn, names[1]))
        from_migrations = await _catalog(_named(dsn, names[1]))
    finally:
        for name in names:
            await administrator.execute(f"DROP DATABASE IF EXISTS {name}")
        await administrator.close()
    return compare(from_page, from_migrations)


def compare(page: dict[str, str], migrations: dict[str, str]) -> list[str]:
    """The differing entries of two catalogs."""
    sentences = []
    for name in sorted(page.keys() | migrations.keys()):
        if name not in page:
            sentences.append(f"{name}: only the migrations make it ({migrations[name]})")
        elif name not in migrations:
            sentences.append(f"{name}: only schema.sql has it ({page[name]})")
        elif page[name] != migrations[name]:
            sentences.append(f"{name}: schema.sql says ({page[name]}), the migrations say ({migrations[name]})")
    return sentences


async def _execute(dsn: str, script: str) -> None:
    connection = await connect(dsn, application="kassa schema check")
    try:
        await connection.execute(script)
    finally:
        await connection.close()


async def _catalog(dsn: str) -> dict[str, str]:
    connection = await connect(dsn, application="kassa schema check")
    try:
        return {name: definition or "" for name, definition in await connection.fetch(_CATALOG)}
    finally:
        await connection.close()


def _named(dsn: str, name: str) -> str:
    return urlunsplit(urlsplit(dsn)._replace(path=f"/{name}"))


def main() -> int:
    """Print the differences; 0 when there are none."""
    if len(sys.argv) != 2:
        print("usage: python -m kassa.db.schema_check DATABASE_URL", file=sys.stderr)
        return 2
    differences = asyncio.run(difference(sys.argv[1]))
    print("\n".join(differences) or "schema.sql equals the migrations")
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
