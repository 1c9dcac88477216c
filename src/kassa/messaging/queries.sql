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

-- name: postpone_timers
-- Several again later, without counting, not all at the same time.
UPDATE timer
   SET due = clock_timestamp() + $4::interval * (1 + random()),
       leased_until = NULL
 WHERE entity = ANY($1::uuid[])
   AND ((entity, kind, generation) IN (SELECT * FROM unnest($1::uuid[], $2::text[], $3::bigint[]))) IS TRUE;

-- name: hurry_timer
-- What waited for its turn has it now. Not for a timer that somebody holds: he looks again when he lets go of it.
UPDATE timer
   SET due = clock_timestamp()
 WHERE entity = $1
   AND kind = $2
   AND due > clock_timestamp()
   AND (leased_until IS NULL OR leased_until <= clock_timestamp());

-- name: timer_is_current
-- Whether a timer is still as it fired: not set again, cancelled or acted on since.
SELECT EXISTS (SELECT 1 FROM timer WHERE entity = $1 AND kind = $2 AND generation = $3);

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

-- name: timer_health
-- How many timers keep failing, and for how many seconds the oldest that nobody holds has been due. Kinds are found by jumps.
WITH RECURSIVE known AS (
    SELECT min(kind) AS kind FROM timer
     UNION ALL
    SELECT (SELECT min(kind) FROM timer WHERE kind > known.kind) FROM known WHERE known.kind IS NOT NULL
)
SELECT (SELECT count(*) FROM timer WHERE tries >= 5) AS stuck,
       COALESCE(extract(epoch FROM clock_timestamp() - min(t.due)), 0)::float8 AS overdue_s
  FROM known AS k
 CROSS JOIN LATERAL (
       SELECT due
         FROM timer
        WHERE kind = k.kind
          AND due <= clock_timestamp()
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

-- name: claim_messages
-- Due messages of one queue ($1), at most $2, leased for $3, of so many windows ($4): `claim_messages` of db/schema.sql.
SELECT lease, id, home, key, priority, created_at, attempts, lapses, headers, body FROM claim_messages($1, $2, $3, $4);

-- name: send_messages
-- Puts messages into queues ($1; `place_of_queue` says which of them), unless they are there already: a repeat changes nothing.
-- Only if these are the queues of all groups of a topic ($2), in their order; which they are is the answer. `place` keeps the order
-- of the batch.
WITH receiving AS MATERIALIZED (
    SELECT ARRAY(SELECT queue FROM subscription WHERE topic = $2 ORDER BY queue) AS queues
),
sent AS (
    INSERT INTO message (id, home, topic, key, priority, due, created_at, headers, body)
    SELECT id, home, ($1::text[])[place_of_queue], key, priority, clock_timestamp() + make_interval(secs => delay_s),
           clock_timestamp(), headers, body
      FROM unnest($3::text::uuid[], $4::text::bigint[], $5::text::integer[], $6::text::smallint[], $7::text::float8[],
                  $8::text[], $9::text[], $10::bytea[])
           WITH ORDINALITY AS m (id, home, place_of_queue, priority, delay_s, key, headers, body, place)
     WHERE (SELECT queues FROM receiving) = $1
     ORDER BY place
    ON CONFLICT (id) DO NOTHING
)
SELECT queues FROM receiving;

-- name: park_messages
-- Records that came from a broker and could not be handled now, and those that came behind them in their key. They count as
-- given back, so that they hold up what comes later in their key. Those that wait equally long are due at the same
-- moment: a key comes back as a whole. One that is there already stays as it is.
INSERT INTO message (id, home, topic, key, priority, due, created_at, attempts, lapses, returned, first_error, last_error, headers,
                     body)
SELECT id, home, $2, key, priority, statement_timestamp() + delay, statement_timestamp(), attempts, lapses, true, error, error,
       headers, body
  FROM unnest($1::uuid[], $3::bigint[], $4::text[], $5::smallint[], $6::interval[], $7::integer[], $8::smallint[], $9::text[],
              $10::text[], $11::bytea[])
       WITH ORDINALITY AS m (id, home, key, priority, delay, attempts, lapses, error, headers, body, place)
 ORDER BY place
ON CONFLICT (id) DO NOTHING;

-- name: bury_records
-- Records that came from a broker and were given up: to the dead letters at once.
INSERT INTO dead_letter (id, home, topic, key, priority, created_at, died_at, attempts, reason, first_error, last_error,
                         headers, body)
SELECT id, home, $2, key, priority, clock_timestamp(), clock_timestamp(), attempts, reason, reason, reason, headers, body
  FROM unnest($1::uuid[], $3::bigint[], $4::text[], $5::smallint[], $6::integer[], $7::text[], $8::text[], $9::bytea[])
       AS m (id, home, key, priority, attempts, reason, headers, body)
ON CONFLICT (id) DO UPDATE
   SET died_at = EXCLUDED.died_at, attempts = dead_letter.attempts + EXCLUDED.attempts, reason = EXCLUDED.reason,
       last_error = EXCLUDED.last_error, replayed_at = NULL;

-- name: parked_keys
-- Which of these keys have a message in a queue that what comes later has to wait behind.
SELECT k.key
  FROM unnest($2::text[]) AS k (key)
 CROSS JOIN LATERAL (
       SELECT 1
         FROM message
        WHERE topic = $1
          AND key = k.key
          AND (returned OR due <= clock_timestamp())
        -- So that it is found by the index of keys.
        ORDER BY position
        LIMIT 1) AS m;

-- name: no_messages
-- Whether nothing is in a queue.
SELECT NOT EXISTS (
       SELECT 1
         FROM message
        WHERE topic = $1);

-- name: group_paused
-- Whether a group gets nothing for now.
SELECT paused
  FROM subscription
 WHERE topic = $1
   AND group_name = $2;

-- name: acknowledge_messages
-- Done ($1, $2: by text), for handlers whose effect is elsewhere: `acknowledge_messages` of db/schema.sql. Nobody waits for the disk:
-- the effect is on it, and an acknowledgement that a crash of the database takes back means that the message comes again.
WITH unhurried AS MATERIALIZED (
    SELECT set_config('synchronous_commit', 'off', true)
)
SELECT done.count, done.which
  FROM unhurried, acknowledge_messages($1::text::uuid[], $2::text::bigint[], $3::bigint[]) AS done;

-- name: retry_messages
-- Again later, only under the lease that was given. What waits behind it in its key waits as long and holds up the rest of the
-- key by itself, so that a parked key is not looked at again before its time. Those that wait equally long are due at the same
-- moment: a key comes back as a whole.
WITH failed AS MATERIALIZED (
    UPDATE message AS m
       SET attempts = m.attempts + d.counted,
           due = statement_timestamp() + d.delay,
           returned = true,
           first_error = COALESCE(m.first_error, d.error),
           last_error = COALESCE(d.error, m.last_error)
      FROM unnest($1::uuid[], $2::bigint[], $3::interval[], $4::text[], $5::integer[]) AS d (id, lease, delay, error, counted)
      JOIN let_go($1, $2, $6) AS held USING (id, lease)
     WHERE m.id = d.id
       AND m.id = ANY($1::uuid[])
    RETURNING m.id, m.topic, m.key, m.position, m.due
),
behind AS (
    UPDATE message AS m
       SET due = failed.due,
           returned = true
      FROM failed
     WHERE failed.key <> ''
       AND m.topic = failed.topic
       AND m.key = failed.key
       AND m.position > failed.position
       AND m.due < failed.due
       AND m.id <> ALL($1::uuid[])
       -- So that a planner which begins with the table reads no other keys.
       AND m.topic = ANY(ARRAY(SELECT topic FROM failed))
       AND m.key = ANY(ARRAY(SELECT key FROM failed))
)
SELECT id FROM failed;

-- name: release_messages
-- As if they had never been handed out: they keep their place. Only under the lease that was given.
WITH unhurried AS MATERIALIZED (
    SELECT set_config('synchronous_commit', 'off', true)
)
SELECT held.id FROM unhurried, let_go($1, $2, $3) AS held;

-- name: end_leases
-- `claim_messages` deletes what ran out, and counts it.
UPDATE message_lease SET leased_until = clock_timestamp() WHERE id = ANY($1::bigint[]);

-- name: extend_leases
-- Those of these leases that are not over last so long ($2) from now on. What somebody settles from at this moment is left out and
-- asked for again: who holds several of these rows waits for none, so nobody waits in a circle.
UPDATE message_lease
   SET leased_until = clock_timestamp() + $2
 WHERE id = ANY(ARRAY(
       SELECT id
         FROM message_lease
        WHERE id = ANY($1::bigint[])
          AND leased_until > clock_timestamp()
          FOR NO KEY UPDATE SKIP LOCKED))
RETURNING id;

-- name: bury_messages
-- To the dead letters, with reason and history; what waited behind them in their key goes on. Only under the lease given.
WITH dead AS (
    DELETE FROM message
     USING unnest($1::uuid[], $2::bigint[], $3::text[], $4::integer[]) AS d (id, lease, reason, counted)
      JOIN let_go($1, $2, $5) AS held USING (id, lease)
     WHERE message.id = d.id
       AND message.id = ANY($1::uuid[])
    RETURNING message.id, home, topic, key, priority, created_at, attempts + d.counted AS attempts, d.reason,
              COALESCE(first_error, d.reason) AS first_error, headers, body
)
INSERT INTO dead_letter (id, home, topic, key, priority, created_at, died_at, attempts, reason, first_error, last_error,
                         headers, body)
SELECT id, home, topic, key, priority, created_at, clock_timestamp(), attempts, reason, first_error, reason, headers, body
  FROM dead
ON CONFLICT (id) DO UPDATE
   SET died_at = EXCLUDED.died_at, attempts = dead_letter.attempts + EXCLUDED.attempts, reason = EXCLUDED.reason,
       last_error = EXCLUDED.last_error, replayed_at = NULL
RETURNING id;

-- name: topics
-- Every topic with messages or dead letters: waiting, in flight, delayed, dead, and the age in seconds of the oldest that is due.
SELECT t.topic,
       (SELECT count(*) FROM message AS m WHERE m.topic = t.topic) AS depth,
       (SELECT count(*)
          FROM message AS m
          JOIN (SELECT unnest(l.messages) AS id FROM message_lease AS l
                 WHERE l.topic = t.topic AND l.leased_until > clock_timestamp()) AS held ON held.id = m.id) AS in_flight,
       (SELECT count(*) FROM message AS m WHERE m.topic = t.topic AND m.due > clock_timestamp()) AS delayed,
       (SELECT count(*) FROM dead_letter AS d WHERE d.topic = t.topic AND d.replayed_at IS NULL) AS dead,
       (SELECT extract(epoch FROM clock_timestamp() - min(m.created_at))::float8
          FROM message AS m WHERE m.topic = t.topic AND m.due <= clock_timestamp()) AS oldest_s
  FROM (SELECT topic FROM message UNION SELECT topic FROM dead_letter) AS t
 WHERE $1::text IS NULL OR t.topic = $1
 ORDER BY t.topic;

-- name: next_messages
-- Seconds until a message of each of these queues is due that nobody holds. Most are empty, which one step in an index says: it is
-- ordered, so that no planner reads the table for it. A paused one has nothing.
SELECT q.queue, extract(epoch FROM n.due - clock_timestamp())::float8
  FROM unnest($1::text[]) AS q (queue)
 CROSS JOIN LATERAL (
       SELECT 1
         FROM message
        WHERE topic = q.queue
        ORDER BY priority, due, position
        LIMIT 1) AS there
 CROSS JOIN LATERAL (
       WITH held AS MATERIALIZED (
           SELECT unnest(messages) AS id
             FROM message_lease
            WHERE topic = q.queue
              AND leased_until > clock_timestamp()
       )
       SELECT min(m.due) AS due
         FROM generate_series(0, 9) AS p (priority)
        CROSS JOIN LATERAL (
              SELECT due
                FROM message
               WHERE topic = q.queue
                 AND priority = p.priority
                 AND id NOT IN (SELECT id FROM held)
               ORDER BY due
               LIMIT 1) AS m
       OFFSET 0) AS n
 WHERE n.due IS NOT NULL
   AND NOT EXISTS (SELECT FROM subscription AS s WHERE s.queue = q.queue AND s.paused);

-- name: peek_messages
-- The first messages of a topic, oldest first, without touching them.
SELECT m.id, home, m.topic, key, priority, created_at, due, attempts, held.leased_until, first_error, last_error, headers, body
  FROM message AS m
  LEFT JOIN (SELECT unnest(messages) AS id, leased_until FROM message_lease WHERE topic = $1) AS held ON held.id = m.id
 WHERE m.topic = $1
 ORDER BY position
 LIMIT $2;

-- name: purge_messages
-- Empties a topic, except for what somebody is working on: also an answer that is owed, until it is due.
WITH gone AS (
    DELETE FROM message
     WHERE topic = $1
       AND NOT (due > clock_timestamp() AND headers LIKE '%"kassa-owed"%')
       AND id NOT IN (SELECT unnest(messages) FROM message_lease WHERE topic = $1 AND leased_until > clock_timestamp())
    RETURNING 1
)
SELECT count(*) FROM gone;

-- name: dead_letters
-- A topic's dead letters that were not replayed, newest first.
SELECT id, home, topic, key, priority, created_at, died_at, attempts, reason, first_error, last_error, headers, body
  FROM dead_letter
 WHERE topic = $1
   AND replayed_at IS NULL
   AND (died_at, id) < (COALESCE($2::timestamptz, 'infinity'), $3::uuid)
 ORDER BY died_at DESC, id DESC
 LIMIT $4;

-- name: replay_dead_letters
-- Puts dead letters of a topic back under the same id, so that whoever handled one already refuses it. Oldest first.
WITH chosen AS MATERIALIZED (
    SELECT id
      FROM dead_letter
     WHERE topic = $1
       AND replayed_at IS NULL
       AND ($2::uuid[] IS NULL OR id = ANY($2))
       AND ($3::timestamptz IS NULL OR died_at >= $3)
       AND ($4::timestamptz IS NULL OR died_at < $4)
     ORDER BY died_at, id
     LIMIT $5
       FOR UPDATE SKIP LOCKED
),
marked AS (
    UPDATE dead_letter
       SET replayed_at = clock_timestamp()
     WHERE id = ANY(ARRAY(SELECT id FROM chosen))
    RETURNING id, home, topic, key, priority, created_at, died_at, headers, body
),
sent AS (
    INSERT INTO message (id, home, topic, key, priority, due, created_at, headers, body)
    SELECT id, home, topic, key, priority, clock_timestamp(), created_at, headers, body
      FROM marked
     ORDER BY died_at, id
    ON CONFLICT (id) DO NOTHING
)
SELECT count(*) FROM marked;

-- name: count_dead_letters
-- How many `replay_dead_letters` would still take.
SELECT count(*)
  FROM dead_letter
 WHERE topic = $1
   AND replayed_at IS NULL
   AND ($2::uuid[] IS NULL OR id = ANY($2))
   AND ($3::timestamptz IS NULL OR died_at >= $3)
   AND ($4::timestamptz IS NULL OR died_at < $4);

-- name: purge_dead_letters
-- Forgets a topic's dead letters that died before a time.
WITH gone AS (
    DELETE FROM dead_letter
     WHERE topic = $1
       AND died_at < $2
    RETURNING replayed_at
)
SELECT count(*) FROM gone WHERE replayed_at IS NULL;

-- name: database_time
-- The database's clock, by which everything here is due.
SELECT clock_timestamp();

-- name: create_group
-- A group of readers of the event log; a repeat changes nothing.
INSERT INTO log_group (name, created_at)
VALUES ($1, clock_timestamp())
ON CONFLICT DO NOTHING
RETURNING name;

-- name: start_group_now
-- A new group that is not interested in what was before: its cursors begin at the end of each writer's events.
INSERT INTO cursor_position (group_name, writer, seq, ord)
SELECT $1, w.writer, w.last_seq, 32767
  FROM (SELECT writer, max(last_seq) AS last_seq FROM chain GROUP BY writer) AS w
ON CONFLICT DO NOTHING;

-- name: log_heads
-- The end of each writer's part of the log.
WITH RECURSIVE writers AS (
    (SELECT writer FROM chain ORDER BY writer LIMIT 1)
     UNION ALL
    SELECT (SELECT c.writer FROM chain AS c WHERE c.writer > w.writer ORDER BY c.writer LIMIT 1)
      FROM writers AS w
     WHERE w.writer IS NOT NULL
)
SELECT w.writer, last.last_seq AS seq, 32767::smallint AS ord
  FROM writers AS w
 CROSS JOIN LATERAL (SELECT last_seq FROM chain WHERE writer = w.writer ORDER BY batch DESC LIMIT 1) AS last
 WHERE w.writer IS NOT NULL;

-- name: count_written
-- How many events each writer ($1) has committed behind one change ($2) and up to another ($3), at most $4 of each. `ORDER BY`: else
-- the planner may take a scan of the log for a short way.
SELECT written.events
  FROM unnest($1::smallint[], $2::bigint[], $3::bigint[]) AS w (writer, since, until)
 CROSS JOIN LATERAL (
       SELECT count(*) AS events
         FROM (SELECT 1
                 FROM event
                WHERE writer = w.writer
                  AND seq > w.since
                  AND seq <= w.until
                ORDER BY seq, ord
                LIMIT $4) AS bounded) AS written;

-- name: hold_group
-- One process at a time reads for a group. No row: another one does.
UPDATE log_group
   SET holder = $2,
       held_until = clock_timestamp() + $3
 WHERE name = $1
   AND (holder = $2 OR held_until IS NULL OR held_until <= clock_timestamp())
RETURNING name;

-- name: keep_group
-- A reader goes on holding its group, also when its time was over and nobody came. No row: somebody took it over.
UPDATE log_group
   SET held_until = clock_timestamp() + $3
 WHERE name = $1
   AND holder = $2
RETURNING name;

-- name: release_group
-- Lets the next process read at once.
UPDATE log_group
   SET held_until = NULL
 WHERE name = $1
   AND holder = $2;

-- name: fence_group
-- Locks the group for this transaction if we still hold it. No row: we do not.
SELECT name
  FROM log_group
 WHERE name = $1
   AND holder = $2
   FOR UPDATE;

-- name: read_log
-- The next events of every writer for a group, in one snapshot, each with the place of its root's previous event, and
-- whether its root is parked. $3, $4, $5: places up to which the group's reader has them in hand already; where it has
-- nothing, the cursor says. The writers are found by jumps through the chain's key. LIMIT 1: else the planner reads the whole log
-- into a hash table to find a few rows by their whole key.
WITH RECURSIVE writers AS (
    (SELECT writer FROM chain ORDER BY writer LIMIT 1)
     UNION ALL
    SELECT (SELECT c.writer FROM chain AS c WHERE c.writer > w.writer ORDER BY c.writer LIMIT 1)
      FROM writers AS w
     WHERE w.writer IS NOT NULL
)
SELECT e.writer, e.seq, e.ord, e.home, e.root, e.sequence, e.at, e.type, e.data,
       p.writer AS previous_writer, p.seq AS previous_seq, p.ord AS previous_ord,
       EXISTS (SELECT 1 FROM parked AS k
                WHERE k.group_name = $1 AND k.home = e.home AND k.root = e.root AND k.state <> 'dead') AS is_parked
  FROM writers AS w
  LEFT JOIN cursor_position AS c ON c.group_name = $1 AND c.writer = w.writer
  LEFT JOIN unnest($3::smallint[], $4::bigint[], $5::smallint[]) AS h (writer, seq, ord) ON h.writer = w.writer
 CROSS JOIN LATERAL (
       SELECT writer, seq, ord, home, root, sequence, at, type, data
         FROM event
        WHERE writer = w.writer
          AND (seq, ord) > (COALESCE(h.seq, c.seq, -1), COALESCE(h.ord, c.ord, -1::smallint))
        ORDER BY seq, ord
        LIMIT $2) AS e
  LEFT JOIN LATERAL (
       SELECT writer, seq, ord
         FROM event
        WHERE home = e.home
          AND root = e.root
          AND sequence = e.sequence - 1
          AND e.sequence > 1
        LIMIT 1) AS p ON true
 WHERE w.writer IS NOT NULL
 ORDER BY e.writer, e.seq, e.ord;

-- name: skim_log
-- For every writer how far a page of the next events for a group goes, how many they are, and whose: all that a reader needs
-- to know where nothing of it concerns anybody.
WITH RECURSIVE writers AS (
    (SELECT writer FROM chain ORDER BY writer LIMIT 1)
     UNION ALL
    SELECT (SELECT c.writer FROM chain AS c WHERE c.writer > w.writer ORDER BY c.writer LIMIT 1)
      FROM writers AS w
     WHERE w.writer IS NOT NULL
)
SELECT w.writer, p.seq, p.ord, p.events, p.homes
  FROM writers AS w
  LEFT JOIN cursor_position AS c ON c.group_name = $1 AND c.writer = w.writer
 CROSS JOIN LATERAL (
       SELECT max(e.seq) AS seq, (array_agg(e.ord ORDER BY e.seq DESC, e.ord DESC))[1] AS ord, count(*) AS events,
              array_agg(DISTINCT e.home) AS homes
         FROM (SELECT seq, ord, home
                 FROM event
                WHERE writer = w.writer
                  AND (seq, ord) > (COALESCE(c.seq, -1), COALESCE(c.ord, -1::smallint))
                ORDER BY seq, ord
                LIMIT $2) AS e) AS p
 WHERE p.events > 0
 ORDER BY w.writer;

-- name: advance_cursors
-- A group has come this far. It never goes back, so a repeat changes nothing.
INSERT INTO cursor_position AS c (group_name, writer, seq, ord)
SELECT $1, writer, seq, ord
  FROM unnest($2::smallint[], $3::bigint[], $4::smallint[]) AS n (writer, seq, ord)
ON CONFLICT (group_name, writer) DO UPDATE
   SET seq = EXCLUDED.seq,
       ord = EXCLUDED.ord
 WHERE (c.seq, c.ord) < (EXCLUDED.seq, EXCLUDED.ord);

-- name: take_over_group
-- Nobody else's reading counts any more: whoever was in the middle of one loses it, and reads again. A group that an operator has
-- paused stays paused.
UPDATE log_group
   SET holder = CASE WHEN held_until = 'infinity' THEN holder ELSE $2 END,
       held_until = CASE WHEN held_until = 'infinity' THEN held_until ELSE clock_timestamp() + interval '1 second' END
 WHERE name = $1
RETURNING name;

-- name: is_held_by
-- Whether a reader still holds its group.
SELECT holder = $2
  FROM log_group
 WHERE name = $1;

-- name: rewind_cursors
-- A group goes back, in each writer's events, to the first change that was committed at a time or after it. Never forward.
UPDATE cursor_position AS c
   SET seq = back.first_seq,
       ord = -1
  FROM (SELECT writer, min(first_seq) AS first_seq FROM chain WHERE at >= $2 GROUP BY writer) AS back
 WHERE c.group_name = $1
   AND c.writer = back.writer
   AND (c.seq, c.ord) > (back.first_seq, -1::smallint)
RETURNING c.writer;

-- name: count_unread
-- How many events a group has before it.
SELECT count(*)
  FROM event AS e
  LEFT JOIN cursor_position AS p ON p.group_name = $1 AND p.writer = e.writer
 WHERE (e.seq, e.ord) > (COALESCE(p.seq, -1), COALESCE(p.ord, -1::smallint));

-- name: park
-- Records that failed (state retry), and those of their roots that wait behind them. One that was given up, and is read again
-- because its group went back, is tried from the start of the ladder.
INSERT INTO parked AS k (group_name, home, root, writer, seq, ord, sequence, attempts, due, parked_at, first_reason, reason, state)
SELECT $1, home, root, writer, seq, ord, sequence, attempts, clock_timestamp() + delay, clock_timestamp(), reason, reason, state
  FROM unnest($2::bigint[], $3::uuid[], $4::smallint[], $5::bigint[], $6::smallint[], $7::bigint[], $8::integer[],
              $9::interval[], $10::text[], $11::text[])
       AS n (home, root, writer, seq, ord, sequence, attempts, delay, reason, state)
ON CONFLICT (group_name, home, root, sequence) DO UPDATE
   SET attempts = EXCLUDED.attempts,
       due = EXCLUDED.due,
       reason = EXCLUDED.reason,
       state = EXCLUDED.state
 WHERE k.state = 'dead';

-- name: line_up
-- Of each root the first record that is not given up is tried, at once if it had to wait until now.
UPDATE parked AS k
   SET state = 'retry',
       due = clock_timestamp()
  FROM unnest($2::bigint[], $3::uuid[]) AS n (home, root)
 CROSS JOIN LATERAL (
       SELECT sequence
         FROM parked
        WHERE group_name = $1
          AND home = n.home
          AND root = n.root
          AND state <> 'dead'
        ORDER BY sequence
        LIMIT 1) AS first
 WHERE k.group_name = $1
   AND k.home = n.home
   AND k.root = n.root
   AND k.sequence = first.sequence
   AND k.state = 'waiting';

-- name: parked_due
-- Parked records that may be tried again: of each root only the first that is not given up.
SELECT k.attempts, e.writer, e.seq, e.ord, e.home, e.root, e.sequence, e.at, e.type, e.data
  FROM parked AS k
  JOIN event AS e ON e.writer = k.writer AND e.seq = k.seq AND e.ord = k.ord
 WHERE k.group_name = $1
   AND k.state = 'retry'
   AND k.due <= clock_timestamp()
   AND NOT EXISTS (SELECT 1 FROM parked AS b
                    WHERE b.group_name = $1 AND b.home = k.home AND b.root = k.root AND b.sequence < k.sequence
                      AND b.state <> 'dead')
 ORDER BY k.due
 LIMIT $2;

-- name: unpark
-- Handled at last.
DELETE FROM parked
 WHERE group_name = $1
   AND home = $2
   AND root = $3
   AND sequence = $4;

-- name: park_again
-- Failed again.
UPDATE parked
   SET attempts = attempts + 1,
       due = clock_timestamp() + $5,
       reason = $6
 WHERE group_name = $1
   AND home = $2
   AND root = $3
   AND sequence = $4;

-- name: park_dead
-- Given up; `due` says when.
UPDATE parked
   SET attempts = attempts + 1,
       due = clock_timestamp(),
       state = 'dead',
       reason = $5
 WHERE group_name = $1
   AND home = $2
   AND root = $3
   AND sequence = $4;

-- name: parked_records
-- What is parked in a group, in one state or all, oldest first.
SELECT k.home, k.root, k.sequence, k.attempts, k.due, k.parked_at, k.first_reason, k.reason, k.state,
       e.writer, e.seq, e.ord, e.type
  FROM parked AS k
  JOIN event AS e ON e.writer = k.writer AND e.seq = k.seq AND e.ord = k.ord
 WHERE k.group_name = $1
   AND ($2::text IS NULL OR k.state = $2)
 ORDER BY k.parked_at, k.home, k.root, k.sequence
 LIMIT $3;

-- name: lock_group
-- What is parked in a group stays as it is until this transaction ends.
SELECT name
  FROM log_group
 WHERE name = $1
   FOR UPDATE;

-- name: replay_parked
-- Given up once, tried again from the start of the ladder when nothing of the root is before it: some events, or all.
WITH chosen AS (
    SELECT group_name, home, root, sequence
      FROM parked
     WHERE group_name = $1
       AND state = 'dead'
       AND ($2::uuid IS NULL OR root = $2)
       AND ($4::bigint[] IS NULL
            OR (writer, seq, ord) IN (SELECT * FROM unnest($4::bigint[], $5::bigint[], $6::bigint[])))
     ORDER BY parked_at, sequence
     LIMIT $3
       FOR UPDATE SKIP LOCKED
)
UPDATE parked
   SET state = 'waiting',
       attempts = 0
  FROM chosen
 WHERE parked.group_name = chosen.group_name
   AND parked.home = chosen.home
   AND parked.root = chosen.root
   AND parked.sequence = chosen.sequence
RETURNING parked.home, parked.root;

-- name: count_dead_parked
-- How many `replay_parked` would still take, of those that were given up before a time ($2): some events, or all.
SELECT count(*)
  FROM parked
 WHERE group_name = $1
   AND state = 'dead'
   AND due < $2
   AND ($3::bigint[] IS NULL
        OR (writer, seq, ord) IN (SELECT * FROM unnest($3::bigint[], $4::bigint[], $5::bigint[])));

-- name: group_names
-- Every group of readers of the event log.
SELECT name
  FROM log_group
 ORDER BY name;

-- name: group_lag
-- How many changes and seconds a group is behind, per writer; events are counted up to a bound. Writers are found by their
-- first batch each, since the chain is long and they are few.
WITH RECURSIVE known AS (
    SELECT min(writer) AS writer FROM chain
     UNION ALL
    SELECT (SELECT min(writer) FROM chain WHERE writer > known.writer) FROM known WHERE known.writer IS NOT NULL
)
SELECT c.writer,
       (SELECT count(*) FROM (SELECT 1 FROM event AS e
                               WHERE e.writer = c.writer
                                 AND (e.seq, e.ord) > (COALESCE(p.seq, -1), COALESCE(p.ord, -1::smallint))
                               LIMIT 100000) AS bounded) AS behind,
       (SELECT extract(epoch FROM clock_timestamp() - e.at)::float8 FROM event AS e
         WHERE e.writer = c.writer
           AND (e.seq, e.ord) > (COALESCE(p.seq, -1), COALESCE(p.ord, -1::smallint))
         ORDER BY e.seq, e.ord LIMIT 1) AS oldest_s
  FROM known AS c
  LEFT JOIN cursor_position AS p ON p.group_name = $1 AND p.writer = c.writer
 WHERE c.writer IS NOT NULL
 ORDER BY c.writer;

-- name: events_of_home
-- A home's events, newest first, from a place on; of one type, noun (`payment.%`) or root if asked for.
SELECT writer, seq, ord, home, root, sequence, at, type, data
  FROM event
 WHERE home = $1
   AND (at, writer, seq, ord) < ($2::timestamptz, $3::smallint, $4::bigint, $5::smallint)
   AND at >= $6::timestamptz
   AND ($7::text IS NULL OR type LIKE $7)
 ORDER BY at DESC, writer DESC, seq DESC, ord DESC
 LIMIT $8;

-- name: events_of_time
-- A home's events of a time, oldest first, from a place on.
SELECT writer, seq, ord, home, root, sequence, at, type, data
  FROM event
 WHERE home = $1
   AND (at, writer, seq, ord) > ($2::timestamptz, $3::smallint, $4::bigint, $5::smallint)
   AND at < $6::timestamptz
 ORDER BY at, writer, seq, ord
 LIMIT $7;

-- name: events_of_root
-- A root's events in their order.
SELECT writer, seq, ord, home, root, sequence, at, type, data
  FROM event
 WHERE home = $1
   AND root = $2
   AND sequence > $3
 ORDER BY sequence
 LIMIT $4;

-- name: event_by_place
-- One event by its place in the log, if it is of this home.
SELECT writer, seq, ord, home, root, sequence, at, type, data
  FROM event
 WHERE writer = $1
   AND seq = $2
   AND ord = $3
   AND home = $4;

-- name: event_data
-- The object that an event tells of, whosever it is, for operators.
SELECT data
  FROM event
 WHERE writer = $1
   AND seq = $2
   AND ord = $3;

-- name: groups_of_topic
-- Which groups receive a topic on the PostgreSQL binder.
SELECT group_name
  FROM subscription
 WHERE topic = $1
 ORDER BY group_name;

-- name: subscribe_group
-- A group receives a topic from now on; a repeat changes nothing.
INSERT INTO subscription (topic, group_name)
VALUES ($1, $2)
ON CONFLICT DO NOTHING
RETURNING group_name;

-- name: pause_group
-- Whether a group gets anything.
UPDATE subscription
   SET paused = $3
 WHERE topic = $1
   AND group_name = $2
RETURNING group_name;

-- name: announce_consumers
-- Says that these consumers are there, and tells who else is. Losing it in a crash means nothing, so it need not be synced.
WITH lazy AS MATERIALIZED (SELECT set_config('synchronous_commit', 'off', true)),
said AS (
    INSERT INTO consumer (place, id, in_hand, seen_at)
    SELECT m.place, m.id, m.in_hand, clock_timestamp()
      FROM lazy
     CROSS JOIN unnest($1::text[], $2::text[], $3::integer[]) AS m (place, id, in_hand)
        ON CONFLICT (place, id) DO UPDATE
       SET in_hand = EXCLUDED.in_hand,
           seen_at = EXCLUDED.seen_at
)
SELECT place, id, in_hand
  FROM consumer
 WHERE place = ANY($1::text[])
   AND id <> ALL($2::text[])
   AND seen_at > clock_timestamp() - make_interval(secs => $4);

-- name: consumers_at
-- Who consumes a place now.
SELECT id, in_hand
  FROM consumer
 WHERE place = $1
   AND seen_at > clock_timestamp() - make_interval(secs => $2);

-- name: forget_consumers
-- These are gone, and so are those that were silent for a minute.
DELETE FROM consumer
 WHERE ctid = ANY(ARRAY(
       SELECT ctid
         FROM consumer
        WHERE id = ANY($1::text[])
           OR seen_at < clock_timestamp() - interval '1 minute'
          FOR UPDATE SKIP LOCKED));
-- name: subscriptions
-- Every group of every topic, and whether it is paused.
SELECT topic, group_name, paused
  FROM subscription
 ORDER BY topic, group_name;

-- name: queue_counts
-- Every queue with messages: waiting, in somebody's hands, not due yet, failed before, and the age in seconds of the oldest
-- that is due. One pass over all of them.
SELECT topic,
       count(*) AS waiting,
       count(*) FILTER (WHERE id IN (SELECT unnest(messages) FROM message_lease WHERE leased_until > clock_timestamp()))
           AS in_flight,
       count(*) FILTER (WHERE due > clock_timestamp()) AS delayed,
       count(*) FILTER (WHERE attempts > 0) AS retrying,
       extract(epoch FROM clock_timestamp() - min(created_at) FILTER (WHERE due <= clock_timestamp()))::float8 AS oldest_s
  FROM message
 GROUP BY topic
 ORDER BY topic;

-- name: dead_counts
-- Every queue with dead letters that were not replayed.
SELECT topic, count(*) AS dead
  FROM dead_letter
 WHERE replayed_at IS NULL
 GROUP BY topic
 ORDER BY topic;

-- name: log_groups
-- Every group of readers of the event log: whether an operator ($1) holds it for ever, so that nobody reads; whether somebody
-- reads; and what is parked in it.
SELECT g.name,
       COALESCE(g.holder = $1 AND g.held_until = 'infinity', false) AS paused,
       COALESCE(g.holder <> $1 AND g.held_until > clock_timestamp(), false) AS is_read,
       count(*) FILTER (WHERE p.state = 'retry') AS retrying,
       count(*) FILTER (WHERE p.state = 'waiting') AS behind,
       count(*) FILTER (WHERE p.state = 'dead') AS dead,
       extract(epoch FROM clock_timestamp() - min(p.parked_at) FILTER (WHERE p.state <> 'dead'))::float8 AS oldest_s
  FROM log_group AS g
  LEFT JOIN parked AS p ON p.group_name = g.name
 GROUP BY g.name, g.holder, g.held_until
 ORDER BY g.name;

-- name: pause_log_group
-- An operator holds the group, so nobody reads for it.
UPDATE log_group
   SET holder = $2,
       held_until = 'infinity'
 WHERE name = $1
RETURNING name;

-- name: resume_log_group
-- Whoever comes first reads.
UPDATE log_group
   SET held_until = NULL
 WHERE name = $1
   AND holder = $2
RETURNING name;

-- name: forget_parked
-- Dead records of a group that nobody wants any more; the events themselves stay in the log.
WITH gone AS (
    DELETE FROM parked
     WHERE group_name = $1
       AND state = 'dead'
    RETURNING 1
)
SELECT count(*) FROM gone;

-- name: publish_meters
-- What a process has counted so far. It is no loss when it is lost.
WITH lazy AS MATERIALIZED (SELECT set_config('synchronous_commit', 'off', true))
INSERT INTO queue_meter (process, topic, group_name, at, sent, received, handled, retried, dead, latency)
SELECT $1, n.topic, n.group_name, clock_timestamp(), n.sent, n.received, n.handled, n.retried, n.dead, n.latency::bigint[]
  FROM lazy
 CROSS JOIN unnest($2::text[], $3::text[], $4::bigint[], $5::bigint[], $6::bigint[], $7::bigint[], $8::bigint[], $9::text[])
       AS n (topic, group_name, sent, received, handled, retried, dead, latency)
ON CONFLICT (process, topic, group_name) DO UPDATE
   SET at = EXCLUDED.at, sent = EXCLUDED.sent, received = EXCLUDED.received, handled = EXCLUDED.handled,
       retried = EXCLUDED.retried, dead = EXCLUDED.dead, latency = EXCLUDED.latency;

-- name: forget_meters
-- Those of processes that are gone.
DELETE FROM queue_meter
 WHERE at < clock_timestamp() - interval '1 minute';

-- name: meters
-- What each process that is alive has counted so far.
SELECT process, topic, group_name, at, sent, received, handled, retried, dead, latency
  FROM queue_meter
 WHERE at > clock_timestamp() - interval '10 seconds';

-- name: wake
-- Wakes other processes. Without waiting for the disk, as any commit with a NOTIFY would: a wake-up may be lost.
WITH lazy AS MATERIALIZED (SELECT set_config('synchronous_commit', 'off', true))
SELECT pg_notify('kassa_wake', $1)
  FROM lazy;

-- name: brokers_seen
-- Which brokers there were at the starts of Kassa.
SELECT name, address, topics, seen_at
  FROM broker;

-- name: see_brokers
-- Which there are now, by columns; each one's topics are joined by commas.
INSERT INTO broker (name, address, topics, seen_at)
SELECT name, address, string_to_array(topics, ','), statement_timestamp()
  FROM unnest($1::text[], $2::text[], $3::text[]) AS b (name, address, topics)
 ORDER BY name
ON CONFLICT (name, address) DO UPDATE
   SET topics = ARRAY(SELECT DISTINCT unnest(broker.topics || EXCLUDED.topics)), seen_at = EXCLUDED.seen_at;

-- name: suspect
-- These are handed out now; how often each was before. In order, so that two who are handed the same ones wait for each other.
INSERT INTO suspect AS s (id, handed, seen_at)
SELECT id, 1, clock_timestamp() FROM unnest($1::uuid[]) AS u (id) ORDER BY id
ON CONFLICT (id) DO UPDATE SET handed = s.handed + 1, seen_at = EXCLUDED.seen_at
RETURNING id, handed - 1 AS before;

-- name: clear_suspects
-- Whoever had these has lived; and what was never settled within a day will not come again.
DELETE FROM suspect WHERE id = ANY($1::uuid[]) OR seen_at < clock_timestamp() - interval '1 day';
