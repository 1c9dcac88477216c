-- A body that is no text kept `kassa_receive` from all that was behind it.
CREATE FUNCTION body_text(body bytea) RETURNS text
LANGUAGE plpgsql IMMUTABLE AS $$
BEGIN
    RETURN convert_from(body, 'UTF8');
EXCEPTION WHEN character_not_in_repertoire OR untranslatable_character THEN
    RETURN NULL;
END
$$;

CREATE OR REPLACE FUNCTION kassa_receive(topic text, group_name text DEFAULT 'client', at_most integer DEFAULT 1)
RETURNS TABLE (correlation_id text, body text, headers jsonb)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE
    of_group text := kassa_receive.topic || ':' || kassa_receive.group_name;
    locked uuid[];
    free uuid[];
BEGIN
    IF EXISTS (SELECT FROM subscription AS s WHERE s.queue = of_group AND s.paused) THEN
        RETURN;
    END IF;
    locked := ARRAY(
        SELECT m.id
          FROM message AS m
         WHERE m.topic = of_group
           AND m.due <= clock_timestamp()
           AND m.id NOT IN (SELECT unnest(l.messages) FROM message_lease AS l
                             WHERE l.topic = of_group AND l.leased_until > clock_timestamp())
           AND (m.key = '' OR NOT EXISTS (
               SELECT FROM message AS earlier
                WHERE earlier.topic = of_group AND earlier.key = m.key AND earlier.position < m.position
                  AND (earlier.returned OR earlier.due <= clock_timestamp())))
         ORDER BY m.position
         LIMIT at_most
           FOR UPDATE SKIP LOCKED);
    locked := locked || ARRAY(
        SELECT m.id
          FROM message AS m
         WHERE m.topic = of_group
           AND m.due <= clock_timestamp()
           AND m.key = ANY(ARRAY(SELECT first.key FROM message AS first WHERE first.id = ANY(locked) AND first.key <> ''))
           AND m.id <> ALL(locked)
         ORDER BY m.position
         LIMIT at_most - cardinality(locked)
           FOR UPDATE SKIP LOCKED);
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
