-- A program that receives by SQL read the whole queue for each batch: 0.6 s for one record of a hundred thousand.
CREATE OR REPLACE FUNCTION kassa_receive(topic text, group_name text DEFAULT 'client', at_most integer DEFAULT 1)
RETURNS TABLE (correlation_id text, body text, headers jsonb)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_bitmapscan = off SET enable_sort = off AS $$
DECLARE
    of_group text := kassa_receive.topic || ':' || kassa_receive.group_name;
    look bigint := greatest(at_most, 16);
    passed bigint := 0;
    found bigint;
    locked uuid[];
    free uuid[];
BEGIN
    IF EXISTS (SELECT FROM subscription AS s WHERE s.queue = of_group AND s.paused) THEN
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
             WHERE c.key = ''
                OR (SELECT earlier.position
                      FROM message AS earlier
                     WHERE earlier.topic = of_group AND earlier.key = c.key AND earlier.position < c.position
                       AND (earlier.returned OR earlier.due <= clock_timestamp())
                     ORDER BY earlier.position
                     LIMIT 1) IS NULL
             ORDER BY c.rank
             LIMIT at_most
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
                ORDER BY b.position
                LIMIT at_most - cardinality(locked)) AS behind
          JOIN message AS m ON m.ctid = behind.place
         ORDER BY m.position
         LIMIT at_most - cardinality(locked)
           FOR UPDATE OF m SKIP LOCKED);
    free := ARRAY(
        SELECT one.id
          FROM unnest(locked) AS one (id)
         WHERE one.id NOT IN (SELECT unnest(l.messages) FROM message_lease AS l
                               WHERE l.topic = of_group AND l.leased_until > clock_timestamp()));
    RETURN QUERY
    WITH gone AS (
        DELETE FROM message AS m
         WHERE m.id = ANY(free)
           AND (m.key = '' OR NOT EXISTS (
               SELECT FROM message AS earlier
                WHERE earlier.topic = of_group AND earlier.key = m.key AND earlier.position < m.position
                  AND (earlier.returned OR earlier.due <= clock_timestamp())
                  AND earlier.id <> ALL(free)))
        RETURNING m.position, m.headers::jsonb AS said, m.body AS raw, body_text(m.body) AS text
    )
    SELECT g.said ->> 'correlation-id', COALESCE(g.text, translate(encode(g.raw, 'base64'), E'\n', '')),
           CASE WHEN g.text IS NULL THEN g.said || '{"content-transfer-encoding": "base64"}' ELSE g.said END
      FROM gone AS g
     ORDER BY g.position;
END
$$;
