-- For programs that have SQL and nothing else (docs/guides/queues.md). Nobody may call these until he is granted it: who may,
-- may read and write every queue.

-- Puts a record into the queue of every group of a topic, and says under which id. A record that is sent again under the same
-- id while it waits is there once.
CREATE FUNCTION kassa_send(
    topic text, body text, reply_to text DEFAULT NULL, correlation_id text DEFAULT NULL, id text DEFAULT NULL
) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE
    record_id text := COALESCE(kassa_send.id, gen_random_uuid()::text);
    receiver record;
    digits text;
BEGIN
    FOR receiver IN SELECT queue FROM subscription AS s WHERE s.topic = kassa_send.topic LOOP
        digits := encode(
            sha256(convert_to(receiver.queue, 'UTF8') || '\x00'::bytea || convert_to(record_id, 'UTF8')), 'hex');
        INSERT INTO message (id, home, topic, key, priority, due, created_at, headers, body)
        VALUES ((substr(digits, 1, 12) || '8' || substr(digits, 14, 3) || '8' || substr(digits, 18, 15))::uuid, 0,
                receiver.queue, '', 4, clock_timestamp(), clock_timestamp(),
                jsonb_strip_nulls(jsonb_build_object(
                    'kassa-record', record_id, 'content-type', 'application/json', 'reply-to', reply_to,
                    'correlation-id', correlation_id))::text,
                convert_to(body, 'UTF8'))
        ON CONFLICT DO NOTHING;
    END LOOP;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'nobody receives %', kassa_send.topic USING HINT = 'Is Kassa started with --broker postgres?';
    END IF;
    PERFORM pg_notify('kassa_wake', 'messages');
    RETURN record_id;
END
$$;

-- From now on a group receives a topic: an address for answers, or one more reader of events. A repeat changes nothing.
CREATE FUNCTION kassa_listen(topic text, group_name text DEFAULT 'client') RETURNS void
LANGUAGE sql SECURITY DEFINER SET search_path = public, pg_temp AS $$
    INSERT INTO subscription (topic, group_name) VALUES (kassa_listen.topic, kassa_listen.group_name) ON CONFLICT DO NOTHING
$$;

-- The next records of a group. They are gone with the caller's commit, and there again after his rollback: what he does with
-- them in the same transaction is done once.
CREATE FUNCTION kassa_receive(topic text, group_name text DEFAULT 'client', at_most integer DEFAULT 1)
RETURNS TABLE (correlation_id text, body text, headers jsonb)
LANGUAGE sql SECURITY DEFINER SET search_path = public, pg_temp AS $$
    WITH picked AS MATERIALIZED (
        SELECT id
          FROM message AS m
         WHERE m.topic = kassa_receive.topic || ':' || kassa_receive.group_name
           AND due <= clock_timestamp()
           AND (leased_until IS NULL OR leased_until <= clock_timestamp())
         ORDER BY position
         LIMIT at_most
           FOR UPDATE SKIP LOCKED
    ),
    gone AS (
        DELETE FROM message
         WHERE id = ANY(ARRAY(SELECT id FROM picked))
        RETURNING position, message.headers::jsonb AS said, message.body AS raw
    )
    SELECT said ->> 'correlation-id', convert_from(raw, 'UTF8'), said FROM gone ORDER BY position
$$;

REVOKE EXECUTE ON FUNCTION kassa_send, kassa_listen, kassa_receive FROM PUBLIC;
