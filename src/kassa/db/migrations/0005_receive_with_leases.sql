-- As before; who has a message in hand is said by message_lease.
-- The next records of a group. They are gone with the caller's commit, and there again after his rollback: what he does with
-- them in the same transaction is done once. Whether somebody else has one in hand is asked behind the lock, when his lease is
-- there to be seen.
CREATE OR REPLACE FUNCTION kassa_receive(topic text, group_name text DEFAULT 'client', at_most integer DEFAULT 1)
RETURNS TABLE (correlation_id text, body text, headers jsonb)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE
    of_group text := kassa_receive.topic || ':' || kassa_receive.group_name;
    locked uuid[];
BEGIN
    locked := ARRAY(
        SELECT m.id
          FROM message AS m
         WHERE m.topic = of_group
           AND m.due <= clock_timestamp()
           AND m.id NOT IN (SELECT unnest(l.messages) FROM message_lease AS l
                             WHERE l.topic = of_group AND l.leased_until > clock_timestamp())
         ORDER BY m.position
         LIMIT at_most
           FOR UPDATE SKIP LOCKED);
    RETURN QUERY
    WITH gone AS (
        DELETE FROM message AS m
         WHERE m.id = ANY(locked)
           AND m.id NOT IN (SELECT unnest(l.messages) FROM message_lease AS l
                             WHERE l.topic = of_group AND l.leased_until > clock_timestamp())
        RETURNING m.position, m.headers::jsonb AS said, m.body AS raw
    )
    SELECT g.said ->> 'correlation-id', convert_from(g.raw, 'UTF8'), g.said FROM gone AS g ORDER BY g.position;
END
$$;
