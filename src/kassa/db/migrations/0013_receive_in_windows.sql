-- A program that receives by SQL read the whole queue for each batch: 0.6 s for one record of a hundred thousand.
CREATE OR REPLACE FUNCTION kassa_receive(topic text, group_name text DEFAULT 'client', at_most integer DEFAULT 1)
RETURNS TABLE (correlation_id text, body text, headers jsonb)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_bitmapscan = off SET enable_sort = off AS $$
DECLARE
    of_group text := kassa_receive.topic || ':' || kassa_receive.group_name;
    wanted bigint := COALESCE(at_most, 1000);
    look bigint := greatest(wanted, 16);
    passed bigint := 0;
    found bigint;
    locked uuid[];
    free uuid[];
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'kassa_receive needs READ COMMITTED, and this transaction is %', upper(current_setting('transaction_isolation'))
            USING HINT = 'Its snapshot would be older than what others have in hand by now: BEGIN ISOLATION LEVEL READ COMMITTED.',
                  ERRCODE = 'invalid_transaction_state';
    END IF;
    IF wanted <= 0 OR EXISTS (SELECT FROM subscription AS s WHERE s.queue = of_group AND s.paused) THEN
        RETURN;
    END IF;
    FOR attempt IN 1..6 LOOP
        WITH held AS MATERIALIZED (
            SELECT unnest(l.messages) AS id FROM message_lease AS l WHERE l.topic = of_group AND l.leased_until > clock_timestamp()
        ),
        candidate AS MATERIALIZED (
            SELECT c.place, c.key, c.position, row_number() OVER () AS rank
              FROM generate_series(9, 0, -1) AS p (priority)
             CROSS JOIN LATERAL (
                   SELECT m.ctid AS place, m.key, m.position
                     FROM message AS m
                    WHERE m.topic = of_group
                      AND m.priority = p.priority
                      AND m.due <= clock_timestamp()
                      AND m.id NOT IN (SELECT h.id FROM held AS h)
                    ORDER BY m.due, m.position
                    LIMIT passed + look) AS c
             LIMIT look OFFSET passed
        ),
        taken AS MATERIALIZED (
            SELECT m.id
              FROM candidate AS c
              JOIN message AS m ON m.ctid = c.place
             WHERE m.due <= clock_timestamp()
               AND (c.key = '' OR (
                    SELECT earlier.position
                      FROM message AS earlier
                     WHERE earlier.topic = of_group AND earlier.key = c.key AND earlier.position < c.position
                       AND (earlier.returned OR earlier.due <= clock_timestamp())
                     ORDER BY earlier.position
                     LIMIT 1) IS NULL)
             ORDER BY c.rank
             LIMIT wanted
               FOR UPDATE OF m SKIP LOCKED
        )
        SELECT array_agg(t.id), (SELECT count(*) FROM candidate) INTO locked, found FROM taken AS t;
        EXIT WHEN locked IS NOT NULL OR found < look;
        passed := passed + look;
        look := look * 4;
    END LOOP;
    locked := locked || ARRAY(
        SELECT m.id
          FROM (SELECT DISTINCT first.key FROM message AS first WHERE first.id = ANY(locked) AND first.key <> '') AS k
         CROSS JOIN LATERAL (
               SELECT b.ctid AS place
                 FROM message AS b
                WHERE b.topic = of_group AND b.key = k.key AND b.due <= clock_timestamp() AND b.id <> ALL(locked)
                  AND b.id NOT IN (SELECT unnest(l.messages) FROM message_lease AS l
                                    WHERE l.topic = of_group AND l.leased_until > clock_timestamp())
                ORDER BY b.position
                LIMIT wanted - cardinality(locked)) AS behind
          JOIN message AS m ON m.ctid = behind.place
         WHERE m.due <= clock_timestamp()
         ORDER BY m.position
         LIMIT wanted - cardinality(locked)
           FOR UPDATE OF m SKIP LOCKED);
    free := ARRAY(
        SELECT one.id
          FROM unnest(locked) AS one (id)
         WHERE one.id NOT IN (SELECT unnest(l.messages) FROM message_lease AS l
                               WHERE l.topic = of_group AND l.leased_until > clock_timestamp()));
    RETURN QUERY
    WITH barrier AS MATERIALIZED (
        SELECT k.key,
               (SELECT other.position
                  FROM message AS other
                 WHERE other.topic = of_group AND other.key = k.key
                   AND (other.returned OR other.due <= clock_timestamp())
                   AND other.id <> ALL(free)
                 ORDER BY other.position
                 LIMIT 1) AS position
          FROM (SELECT DISTINCT m.key FROM message AS m WHERE m.id = ANY(free) AND m.key <> '') AS k
    ),
    gone AS (
        DELETE FROM message AS m
         WHERE m.id = ANY(free)
           AND NOT EXISTS (SELECT FROM barrier AS b WHERE b.key = m.key AND b.position < m.position)
        RETURNING m.position, m.headers::jsonb AS said, m.body AS raw, body_text(m.body) AS text
    )
    SELECT g.said ->> 'correlation-id', COALESCE(g.text, translate(encode(g.raw, 'base64'), E'\n', '')),
           CASE WHEN g.text IS NULL THEN g.said || '{"content-transfer-encoding": "base64"}' ELSE g.said END
      FROM gone AS g
     ORDER BY g.position;
END
$$;
