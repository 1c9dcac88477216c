-- Who claims the next batch while he still has the last one in hand looks at one window only: of what is behind it he may have the
-- keys himself.
--
-- And what is before one in its key is asked for in order, so that it is found by the index of keys: of a queue that was nearly empty
-- when a session first asked, the planner believed that the other index is as good, and read half of the queue for each message.
DROP FUNCTION claim_messages(text, bigint, interval);

CREATE FUNCTION claim_messages(queue text, wanted bigint, lease_for interval, windows integer DEFAULT 6)
RETURNS TABLE (lease bigint, id uuid, home bigint, key text, priority smallint, created_at timestamptz, attempts integer,
               lapses smallint, headers text, body bytea)
LANGUAGE plpgsql
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_bitmapscan = off SET enable_sort = off AS $$
#variable_conflict use_column
DECLARE
    number bigint;
    places tid[];
    turns bigint[];
    are_locked boolean[];
    found bigint;
    enough bigint := greatest(wanted, 16);
    look bigint := enough;
    passed bigint := 0;
    lapsed uuid[];
    alone CONSTANT smallint := 3;
    ended CONSTANT text := 'whoever had it in hand ended, or held it longer than its lease';
BEGIN
    IF EXISTS (SELECT FROM subscription AS s WHERE s.queue = claim_messages.queue AND s.paused) THEN
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
             ORDER BY 2, 3
             LIMIT enough
        ),
        locked AS MATERIALIZED (
            SELECT m.ctid AS place
              FROM picked AS p
              JOIN message AS m ON m.ctid = p.place
             LIMIT wanted
               FOR UPDATE OF m SKIP LOCKED
        )
        SELECT array_agg(p.place), array_agg(p.turn), array_agg(p.place IN (SELECT l.place FROM locked AS l)),
               (SELECT count(*) FROM candidate)
          INTO places, turns, are_locked, found
          FROM picked AS p;
        EXIT WHEN true = ANY(are_locked) OR found < look;
        passed := passed + look;
        look := look * 4;
    END LOOP;
    IF places IS NULL OR true <> ALL(are_locked) THEN
        RETURN;
    END IF;
    number := nextval('message_lease_number');
    RETURN QUERY
    WITH held AS MATERIALIZED (
        SELECT unnest(l.messages) AS id FROM message_lease AS l WHERE l.topic = queue
    ),
    checked AS MATERIALIZED (
        SELECT m.id, m.home, m.key, m.priority, m.created_at, m.attempts, m.lapses, m.headers, m.body, p.place,
               bool_and(p.is_locked AND m.id NOT IN (SELECT h.id FROM held AS h))
                  OVER (PARTITION BY p.turn ORDER BY p.place) AS is_ours
          FROM unnest(places, turns, are_locked) WITH ORDINALITY AS p (at, turn, is_locked, place)
          LEFT JOIN message AS m ON m.ctid = p.at
    ),
    cut AS MATERIALIZED (
        SELECT min(c.place) AS first, min(c.place) FILTER (WHERE c.lapses >= alone) AS lone FROM checked AS c WHERE c.is_ours
    ),
    chosen AS MATERIALIZED (
        SELECT c.*
          FROM checked AS c, cut
         WHERE c.is_ours AND (cut.lone IS NULL OR c.place < cut.lone OR (c.place = cut.lone AND c.place = cut.first))
    ),
    leased AS (
        INSERT INTO message_lease (id, topic, leased_until, messages)
        SELECT number, queue, clock_timestamp() + lease_for, array_agg(c.id) FROM chosen AS c HAVING count(*) > 0
    )
    SELECT number, c.id, c.home, c.key, c.priority, c.created_at, c.attempts, c.lapses, c.headers, c.body
      FROM chosen AS c
     ORDER BY c.place;
END
$$;
