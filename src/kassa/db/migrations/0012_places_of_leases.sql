-- Whether somebody else was quicker is asked of leases only that were not there when the messages were chosen, of ids and not of rows,
-- and only what is ours is read then. A lease says where its messages are in their table, so that they are found there when they are
-- acknowledged: by their ids, which are in no order, it took as long as all the rest.
ALTER TABLE message_lease
    ADD COLUMN places tid[],
    ALTER COLUMN places SET STORAGE EXTERNAL,
    SET (toast_tuple_target = 8160);

CREATE OR REPLACE FUNCTION claim_messages(queue text, wanted bigint, lease_for interval, windows integer DEFAULT 6)
RETURNS TABLE (lease bigint, id uuid, home bigint, key text, priority smallint, created_at timestamptz, attempts integer,
               lapses smallint, headers text, body bytea)
LANGUAGE plpgsql
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_bitmapscan = off SET enable_sort = off AS $$
#variable_conflict use_column
DECLARE
    ids uuid[];
    places tid[];
    turns bigint[];
    known bigint[];
    others uuid[];
    found bigint;
    look bigint := greatest(wanted, 16);
    passed bigint := 0;
    lapsed uuid[];
    alone CONSTANT smallint := 3;
    ended CONSTANT text := 'whoever had it in hand ended, or held it longer than its lease';
BEGIN
    IF wanted <= 0 OR EXISTS (SELECT FROM subscription AS s WHERE s.queue = claim_messages.queue AND s.paused) THEN
        RETURN;
    END IF;
    -- A lease that is lost only means that somebody else acts earlier, so nobody waits for the disk.
    PERFORM set_config('synchronous_commit', 'off', true);
    WITH over AS (
        DELETE FROM message_lease AS l
         WHERE l.id = ANY(ARRAY(
               SELECT old.id FROM message_lease AS old
                WHERE old.topic = queue AND old.leased_until <= clock_timestamp()
                  FOR UPDATE SKIP LOCKED))
        RETURNING l.messages
    )
    SELECT array_agg(m.id) INTO lapsed FROM over, unnest(over.messages) AS m (id);
    IF lapsed IS NOT NULL THEN
        UPDATE message AS m
           SET lapses = least(m.lapses + 1, 100),
               first_error = COALESCE(m.first_error, ended),
               last_error = ended
         WHERE m.id = ANY(ARRAY(SELECT n.id FROM message AS n WHERE n.id = ANY(lapsed) FOR UPDATE SKIP LOCKED));
    END IF;
    FOR attempt IN 1..windows LOOP
        WITH held AS MATERIALIZED (
            SELECT unnest(l.messages) AS id FROM message_lease AS l WHERE l.topic = queue
        ),
        candidate AS MATERIALIZED (
            SELECT c.place, c.key, c.position, row_number() OVER () AS rank
              FROM generate_series(9, 0, -1) AS p (priority)
             CROSS JOIN LATERAL (
                   SELECT m.ctid AS place, m.key, m.position
                     FROM message AS m
                    WHERE m.topic = queue
                      AND m.priority = p.priority
                      AND m.due <= clock_timestamp()
                      AND m.id NOT IN (SELECT h.id FROM held AS h)
                    ORDER BY m.due, m.position
                    LIMIT passed + look) AS c
             LIMIT look OFFSET passed
        ),
        turn AS MATERIALIZED (
            SELECT c.key, min(c.rank) AS rank, array_agg(c.place ORDER BY c.position) AS places,
                   min(c.position) AS first, max(c.position) AS last, count(*) AS length
              FROM candidate AS c
             WHERE c.key <> ''
             GROUP BY c.key
        ),
        free AS MATERIALIZED (
            SELECT t.rank, t.places,
                   CASE WHEN earlier.number = t.length - 1 THEN t.length
                        WHEN (SELECT m.position FROM message AS m
                               WHERE m.topic = queue AND m.key = t.key AND m.position < t.first
                                 AND (m.returned OR m.due <= clock_timestamp())
                               ORDER BY m.position
                               LIMIT 1) IS NULL THEN 1
                   END AS length
              FROM turn AS t
             CROSS JOIN LATERAL (
                   SELECT count(*) AS number
                     FROM (SELECT FROM message AS m
                            WHERE m.topic = queue AND m.key = t.key AND m.position < t.last
                              AND (m.returned OR m.due <= clock_timestamp())
                            ORDER BY m.position
                            LIMIT t.length) AS m) AS earlier
        ),
        picked AS MATERIALIZED (
            SELECT p.place, f.rank AS turn, p.number
              FROM free AS f
             CROSS JOIN LATERAL unnest(f.places[1:f.length]) WITH ORDINALITY AS p (place, number)
             WHERE f.length IS NOT NULL
             UNION ALL
            SELECT c.place, c.rank, 1 FROM candidate AS c WHERE c.key = ''
        ),
        -- The first of each turn before any other: what is behind one that somebody else has is not locked.
        first AS MATERIALIZED (
            SELECT p.turn, p.number, m.ctid AS place, m.id, m.lapses
              FROM (SELECT * FROM picked WHERE number = 1 ORDER BY turn) AS p
              JOIN message AS m ON m.ctid = p.place
             WHERE m.due <= clock_timestamp()
             LIMIT wanted
               FOR UPDATE OF m SKIP LOCKED
        ),
        behind AS MATERIALIZED (
            SELECT p.turn, p.number, m.ctid AS place, m.id, m.lapses
              FROM (SELECT * FROM picked WHERE number > 1 AND turn IN (SELECT f.turn FROM first AS f) ORDER BY turn, number) AS p
              JOIN message AS m ON m.ctid = p.place
             WHERE m.due <= clock_timestamp()
             LIMIT wanted
               FOR UPDATE OF m SKIP LOCKED
        ),
        locked AS MATERIALIZED (
            SELECT * FROM first UNION ALL SELECT * FROM behind
        ),
        in_a_row AS MATERIALIZED (
            SELECT l.turn, l.place, l.id, l.lapses, row_number() OVER () AS nth
              FROM (SELECT l.*, row_number() OVER (PARTITION BY l.turn ORDER BY l.number) AS expected FROM locked AS l) AS l
             WHERE l.number = l.expected
        ),
        cut AS MATERIALIZED (
            SELECT CASE min(r.nth) FILTER (WHERE r.lapses >= alone)
                   WHEN 1 THEN 1
                   ELSE least(min(r.nth) FILTER (WHERE r.lapses >= alone) - 1, wanted)
                   END AS last
              FROM in_a_row AS r
        )
        SELECT array_agg(r.id), array_agg(r.place), array_agg(r.turn), (SELECT count(*) FROM candidate),
               ARRAY(SELECT l.id FROM message_lease AS l WHERE l.topic = queue)
          INTO ids, places, turns, found, known
          FROM (SELECT r.* FROM in_a_row AS r, cut WHERE r.nth <= cut.last ORDER BY r.nth) AS r;
        IF ids IS NOT NULL THEN
            SELECT array_agg(m.id)
              INTO others
              FROM message_lease AS l
             CROSS JOIN LATERAL unnest(l.messages) AS m (id)
             WHERE l.topic = queue
               AND l.id <> ALL(known);
            IF others && ids THEN
                SELECT array_agg(c.id ORDER BY c.nth), array_agg(c.place ORDER BY c.nth)
                  INTO ids, places
                  FROM unnest(ids, places, turns) WITH ORDINALITY AS c (id, place, turn, nth)
                 WHERE c.turn NOT IN (SELECT t.turn FROM unnest(ids, turns) AS t (id, turn) WHERE t.id = ANY(others));
            END IF;
            EXIT WHEN ids IS NOT NULL;
            -- Somebody was quicker with all of it. By now that is seen, so the same window once more.
            CONTINUE;
        END IF;
        EXIT WHEN found < look;
        passed := passed + look;
        look := look * 4;
    END LOOP;
    IF ids IS NULL THEN
        RETURN;
    END IF;
    RETURN QUERY
    WITH leased AS (
        INSERT INTO message_lease (id, topic, leased_until, messages, places)
        VALUES (nextval('message_lease_number'), queue, clock_timestamp() + lease_for, ids, places)
        RETURNING id
    )
    SELECT leased.id, m.id, m.home, m.key, m.priority, m.created_at, m.attempts, m.lapses, m.headers, m.body
      FROM leased
     CROSS JOIN unnest(places) WITH ORDINALITY AS p (at, nth)
      JOIN message AS m ON m.ctid = p.at
     ORDER BY p.nth;
END
$$;

CREATE FUNCTION acknowledge_messages(ids uuid[], leases bigint[], ended bigint[]) RETURNS TABLE (count bigint, which uuid[])
LANGUAGE plpgsql
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_bitmapscan = off AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
    WITH over AS (
        DELETE FROM message_lease AS l WHERE l.id = ANY(ended) RETURNING l.id, l.messages, l.places
    ),
    going_on AS (
        SELECT l.id, l.messages, l.places
          FROM message_lease AS l
         WHERE l.id = ANY(leases)
           AND l.id <> ALL(ended)
           FOR SHARE
    ),
    given AS MATERIALIZED (
        SELECT g.id, g.lease FROM unnest(ids, leases) AS g (id, lease)
    ),
    handed_out AS MATERIALIZED (
        SELECT m.id, l.id AS lease, m.place
          FROM (SELECT * FROM over UNION ALL SELECT * FROM going_on) AS l
         CROSS JOIN LATERAL unnest(l.messages, l.places) AS m (id, place)
    ),
    ours AS MATERIALIZED (
        SELECT h.id, h.place FROM handed_out AS h WHERE (h.id, h.lease) IN (SELECT g.id, g.lease FROM given AS g)
    ),
    gone AS (
        DELETE FROM message AS m
         USING ours AS o
         WHERE m.ctid = o.place
           -- Another one may be there now. Asked for so that no index is used for it.
           AND m.id IS NOT DISTINCT FROM o.id
        RETURNING m.id
    ),
    moved AS (
        DELETE FROM message AS m
         WHERE m.id = ANY(ARRAY(SELECT o.id FROM ours AS o EXCEPT SELECT g.id FROM gone AS g))
        RETURNING m.id
    ),
    done AS MATERIALIZED (
        SELECT array_agg(d.id) AS ids, count(*) AS count FROM (SELECT g.id FROM gone AS g UNION ALL SELECT m.id FROM moved AS m) AS d
    )
    SELECT d.count, CASE WHEN d.count < cardinality(acknowledge_messages.ids) THEN d.ids END FROM done AS d;
END
$$;

CREATE OR REPLACE FUNCTION let_go(ids uuid[], leases bigint[], ended bigint[]) RETURNS TABLE (id uuid, lease bigint)
LANGUAGE sql AS $$
    WITH over AS (
        DELETE FROM message_lease AS l WHERE l.id = ANY(ended) RETURNING l.id, l.messages
    ),
    before AS MATERIALIZED (
        SELECT l.id, l.messages
          FROM message_lease AS l
         WHERE l.id = ANY(leases)
           AND l.id <> ALL(ended)
           FOR UPDATE
    ),
    after AS (
        UPDATE message_lease AS l
           SET messages = ARRAY(SELECT m FROM unnest(before.messages) AS m WHERE m <> ALL(ids)),
               places = NULL
          FROM before
         WHERE l.id = before.id
        RETURNING before.id, before.messages
    )
    SELECT given.id, given.lease
      FROM unnest(ids, leases) AS given (id, lease)
     WHERE (given.id, given.lease) IN (
           SELECT unnest(o.messages), o.id FROM over AS o
            UNION ALL
           SELECT unnest(a.messages), a.id FROM after AS a)
$$;
