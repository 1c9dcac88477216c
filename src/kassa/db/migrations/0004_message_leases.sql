-- Who works on which messages, a row per batch that was handed out: a message itself is written once and deleted once. Lost in a
-- crash of the database, which only means that what was in hand is handed out again. Numbers come from a sequence that is not
-- lost, so that nobody from before a crash is taken for a holder of after it.
CREATE UNLOGGED TABLE message_lease (
    id bigint PRIMARY KEY,
    topic text NOT NULL,
    leased_until timestamptz NOT NULL,
    messages uuid[] NOT NULL
);
ALTER TABLE message_lease ALTER COLUMN messages SET STORAGE EXTERNAL;
CREATE INDEX message_lease_topic ON message_lease (topic);
CREATE SEQUENCE message_lease_number;

ALTER TABLE message ADD COLUMN returned boolean NOT NULL DEFAULT false;
UPDATE message SET returned = true WHERE lease > 0;
ALTER TABLE message DROP COLUMN lease, DROP COLUMN leased_until, RESET (fillfactor);

-- Due messages of one queue, urgent ones first, leased for a while. Of each key only the oldest messages in a row come, and
-- only if nobody holds an earlier one: a key has one holder. What was only sent with a delay and never handed out holds up
-- nothing. The candidates are bounded, so that a long queue behind one key costs no more than a short one; where all of them
-- wait or are somebody else's, the next and larger window is looked at. Whether somebody else was quicker is asked once more behind the locks.
CREATE FUNCTION claim_messages(queue text, wanted bigint, lease_for interval)
RETURNS TABLE (lease bigint, id uuid, home bigint, key text, priority smallint, created_at timestamptz, attempts integer,
               headers text, body bytea)
LANGUAGE plpgsql
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_bitmapscan = off AS $$
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
BEGIN
    IF EXISTS (SELECT FROM subscription AS s WHERE s.queue = claim_messages.queue AND s.paused) THEN
        RETURN;
    END IF;
    -- A lease that is lost only means that somebody else acts earlier, so nobody waits for the disk.
    PERFORM set_config('synchronous_commit', 'off', true);
    DELETE FROM message_lease AS l
     WHERE l.id = ANY(ARRAY(
           SELECT old.id FROM message_lease AS old
            WHERE old.topic = queue AND old.leased_until <= clock_timestamp()
              FOR UPDATE SKIP LOCKED));
    FOR attempt IN 1..6 LOOP
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
                        WHEN NOT EXISTS (
                             SELECT FROM message AS m
                              WHERE m.topic = queue AND m.key = t.key AND m.position < t.first
                                AND (m.returned OR m.due <= clock_timestamp())) THEN 1
                   END AS length
              FROM turn AS t
             CROSS JOIN LATERAL (
                   SELECT count(*) AS number
                     FROM (SELECT FROM message AS m
                            WHERE m.topic = queue AND m.key = t.key AND m.position < t.last
                              AND (m.returned OR m.due <= clock_timestamp())
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
        SELECT m.id, m.home, m.key, m.priority, m.created_at, m.attempts, m.headers, m.body, p.place,
               bool_and(p.is_locked AND m.id NOT IN (SELECT h.id FROM held AS h))
                  OVER (PARTITION BY p.turn ORDER BY p.place) AS is_ours
          FROM unnest(places, turns, are_locked) WITH ORDINALITY AS p (at, turn, is_locked, place)
          LEFT JOIN message AS m ON m.ctid = p.at
    ),
    leased AS (
        INSERT INTO message_lease (id, topic, leased_until, messages)
        SELECT number, queue, clock_timestamp() + lease_for, array_agg(c.id) FROM checked AS c WHERE c.is_ours HAVING count(*) > 0
    )
    SELECT number, c.id, c.home, c.key, c.priority, c.created_at, c.attempts, c.headers, c.body
      FROM checked AS c
     WHERE c.is_ours
     ORDER BY c.place;
END
$$;

-- Gives messages back before their lease is over: those of them that were held under the leases given, and are not any more.
-- `ended`: leases of which nothing is in hand any more.
CREATE FUNCTION let_go(ids uuid[], leases bigint[], ended bigint[]) RETURNS TABLE (id uuid, lease bigint)
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
           SET messages = ARRAY(SELECT m FROM unnest(before.messages) AS m WHERE m <> ALL(ids))
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
