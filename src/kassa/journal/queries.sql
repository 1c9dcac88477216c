-- name: note_first_status
-- What the first request of a key was told, where that was not known when its effect was stored. Only of a request that was
-- not refused. Lost in a crash, a repeat is told the status of the effect instead, so it need not be synced to disk.
WITH lazy AS MATERIALIZED (SELECT set_config('synchronous_commit', 'off', true))
UPDATE once
   SET status = $4
  FROM lazy
 WHERE once.home = $1
   AND once.operation = $2
   AND once.key = $3
   AND once.problem IS NULL;
