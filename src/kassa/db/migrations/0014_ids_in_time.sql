-- The row of a record whose id says when it was made says so too, as those that Kassa sends itself: new rows then lie side by side in
-- the index of ids, and a batch of them changes one of its pages and not one for each row.
CREATE OR REPLACE FUNCTION kassa_send(
    topic text, body text, reply_to text DEFAULT NULL, correlation_id text DEFAULT NULL, id text DEFAULT NULL
) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE
    record_id text := COALESCE(kassa_send.id, gen_random_uuid()::text);
    receiver record;
    digits text;
    time_digits text;
BEGIN
    FOR receiver IN SELECT queue FROM subscription AS s WHERE s.topic = kassa_send.topic LOOP
        digits := encode(
            sha256(convert_to(receiver.queue, 'UTF8') || '\x00'::bytea || convert_to(record_id, 'UTF8')), 'hex');
        time_digits := CASE WHEN record_id ~ '^[0-9a-f]{32}$' THEN substr(record_id, 1, 12)
                            WHEN record_id ~ '^evt_[0-9a-f]{24}$' THEN substr(record_id, 7, 2) || substr(record_id, 15, 10)
                            ELSE substr(digits, 1, 12) END;
        INSERT INTO message (id, home, topic, key, priority, due, created_at, headers, body)
        VALUES ((time_digits || '8' || substr(digits, 14, 3) || '8' || substr(digits, 18, 15))::uuid, 0,
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
