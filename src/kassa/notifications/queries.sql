-- name: endpoint
-- One endpoint of a home.
SELECT home, id, version, sequence, state, created_at, url, events, secrets, description, replays, failing_since, paused_reason
  FROM webhook_endpoint
 WHERE home = $1
   AND id = $2;

-- name: endpoints
-- A page of a home's endpoints, newest first; those that were deleted are not shown.
SELECT home, id, version, sequence, state, created_at, url, events, secrets, description, replays, failing_since, paused_reason
  FROM webhook_endpoint
 WHERE home = $1
   AND id < $2
   AND state <> 'deleted'
 ORDER BY id DESC
 LIMIT $3;

-- name: enabled_endpoints
-- Who is to be told in these homes.
SELECT home, id, version, sequence, state, created_at, url, events, secrets, description, replays, failing_since, paused_reason
  FROM webhook_endpoint
 WHERE home = ANY($1::bigint[])
   AND state = 'enabled'
 ORDER BY home, id;

-- name: is_any_enabled
-- Whether anybody is to be told in any of these homes.
SELECT EXISTS (SELECT 1 FROM webhook_endpoint WHERE home = ANY($1::bigint[]) AND state = 'enabled');

-- name: delivery
-- One delivery of a home.
SELECT home, id, version, sequence, state, endpoint, event, event_type, event_root, event_sequence, replay, created_at,
       tries, next_at, last_at, last_status, last_error, last_duration_ms
  FROM webhook_delivery
 WHERE home = $1
   AND id = $2;

-- name: deliveries
-- A page of an endpoint's deliveries, newest first; in one state or all.
SELECT home, id, version, sequence, state, endpoint, event, event_type, event_root, event_sequence, replay, created_at,
       tries, next_at, last_at, last_status, last_error, last_duration_ms
  FROM webhook_delivery
 WHERE home = $1
   AND endpoint = $2
   AND (created_at, id) < ($3::timestamptz, $4::uuid)
   AND ($5::text IS NULL OR state = $5)
 ORDER BY created_at DESC, id DESC
 LIMIT $6;

-- name: deliveries_of_event
-- Where an event went, for a payment's story.
SELECT home, id, version, sequence, state, endpoint, event, event_type, event_root, event_sequence, replay, created_at,
       tries, next_at, last_at, last_status, last_error, last_duration_ms
  FROM webhook_delivery
 WHERE home = $1
   AND event_root = $2
 ORDER BY event_sequence, created_at, id
 LIMIT $3;

-- name: before_and_behind
-- Of one object's deliveries to one endpoint: when the one before is tried next, and which one waits behind.
SELECT (SELECT count(*) FROM webhook_delivery AS b
         WHERE b.home = $1 AND b.endpoint = $2 AND b.event_root = $3 AND b.replay = $4 AND b.event_sequence < $5
           AND b.state = 'due') AS before,
       (SELECT extract(epoch FROM min(b.next_at) - clock_timestamp())::float8 FROM webhook_delivery AS b
         WHERE b.home = $1 AND b.endpoint = $2 AND b.event_root = $3 AND b.replay = $4 AND b.event_sequence < $5
           AND b.state = 'due') AS before_s,
       (SELECT b.id FROM webhook_delivery AS b
         WHERE b.home = $1 AND b.endpoint = $2 AND b.event_root = $3 AND b.replay = $4 AND b.event_sequence > $5
           AND b.state = 'due'
         ORDER BY b.event_sequence LIMIT 1) AS behind;

-- name: replay
-- One replay of a home.
SELECT home, id, version, sequence, state, endpoint, replay, created_from, created_to, created_at, position, deliveries
  FROM webhook_replay
 WHERE home = $1
   AND id = $2;
