-- name: claim_timers
-- Due timers of some kinds, oldest first, leased for a while. A lease that is lost in a crash only means that somebody else
-- acts earlier, so it need not be synced to disk.
WITH lazy AS MATERIALIZED (SELECT set_config('synchronous_commit', 'off', true)),
picked AS MATERIALIZED (
    SELECT t.place
      FROM lazy
     CROSS JOIN unnest($1::text[]) AS k (kind)
     CROSS JOIN LATERAL (
           SELECT ctid AS place, due
             FROM timer
            WHERE kind = k.kind
              AND due <= clock_timestamp()
              AND (leased_until IS NULL OR leased_until <= clock_timestamp())
            ORDER BY due
            LIMIT $2
              FOR UPDATE SKIP LOCKED) AS t
     ORDER BY t.due
     LIMIT $2
)
UPDATE timer
   SET leased_until = clock_timestamp() + $3
 WHERE ctid = ANY(ARRAY(SELECT place FROM picked))
RETURNING home, root, entity, kind, generation, tries, due;

-- name: retry_timer
-- Again later; counts. Nothing happens when the timer was set again, cancelled or acted on since.
UPDATE timer
   SET due = clock_timestamp() + $4,
       tries = tries + 1,
       leased_until = NULL,
       last_error = $5
 WHERE entity = $1
   AND kind = $2
   AND generation = $3;

-- name: postpone_timer
-- Again later, without counting: it was not its turn.
UPDATE timer
   SET due = clock_timestamp() + $4,
       leased_until = NULL
 WHERE entity = $1
   AND kind = $2
   AND generation = $3;

-- name: next_due
-- Seconds until the next timer of these kinds that nobody holds.
SELECT extract(epoch FROM min(t.due) - clock_timestamp())::float8
  FROM unnest($1::text[]) AS k (kind)
 CROSS JOIN LATERAL (
       SELECT due
         FROM timer
        WHERE kind = k.kind
          AND (leased_until IS NULL OR leased_until <= clock_timestamp())
        ORDER BY due
        LIMIT 1) AS t;

-- name: stuck_timers
-- What keeps failing, most tries first.
SELECT home, root, entity, kind, generation, tries, due, last_error
  FROM timer
 WHERE tries >= 5
   AND tries >= $1
 ORDER BY tries DESC, due
 LIMIT $2;
