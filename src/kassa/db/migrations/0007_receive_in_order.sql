-- The next records of a group. They are gone with the caller's commit, and there again after his rollback: what he does with
-- them in the same transaction is done once. Of each key the first one comes, unless somebody else has it or has not committed it;
-- if there is room, those behind it too. Whether somebody else has one in hand is asked once more behind the lock, when his lease
-- is there to be seen.
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
        RETURNING m.position, m.headers::jsonb AS said, m.body AS raw
    )
    SELECT g.said ->> 'correlation-id', convert_from(g.raw, 'UTF8'), g.said FROM gone AS g ORDER BY g.position;
END
$$;
