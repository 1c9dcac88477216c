-- The tables of Kassa, in the order in which to read them. Money is bigint minor units, times are timestamptz, ids are
-- UUID version 7. `home` is whose a row is (0: the system's own). Only the journal writes here (docs/map.md lists the
-- exceptions). Rows that are written once carry (writer, seq, ord): the writer's slot, the number of the change in that
-- writer's chain, and the place in the change. A chain row keeps one digest per table of what its batch wrote.

-- The chain: one row per batch of a writer. `digests` is JSON, one digest per table; `digest` covers them and `previous`.
CREATE TABLE chain (
    writer smallint NOT NULL,
    batch bigint NOT NULL,
    first_seq bigint NOT NULL,
    last_seq bigint NOT NULL,
    at timestamptz NOT NULL,
    digests text NOT NULL,
    previous bytea NOT NULL,
    digest bytea NOT NULL,
    PRIMARY KEY (writer, batch)
);

-- The writers' heads, tied together from time to time and signed by a key outside the database.
CREATE TABLE anchor (
    number bigint PRIMARY KEY,
    at timestamptz NOT NULL,
    heads text NOT NULL,
    key_id text NOT NULL,
    signature bytea NOT NULL
);

-- Ledger accounts. `code` and `owner` say what for and whom for (ledger/chart.py); `id` is compact for the hot tables.
CREATE TABLE account (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    home bigint NOT NULL,
    code smallint NOT NULL,
    owner text NOT NULL,
    currency text NOT NULL,
    limit_side smallint NOT NULL,
    overdraft bigint NOT NULL,
    debits_posted bigint NOT NULL DEFAULT 0,
    credits_posted bigint NOT NULL DEFAULT 0,
    debits_pending bigint NOT NULL DEFAULT 0,
    credits_pending bigint NOT NULL DEFAULT 0,
    version bigint NOT NULL DEFAULT 0,
    CHECK (debits_pending >= 0 AND credits_pending >= 0)
) WITH (fillfactor = 50);
CREATE UNIQUE INDEX account_key ON account (home, code, owner, currency);

-- Transfers, never changed. One row carries debit, credit and one amount, so it cannot be unbalanced; both sides' new
-- balance and version make statements gapless and any past balance readable. `kind`: 1 single, 2 hold, 3 settle, 4 release.
CREATE TABLE transfer (
    debit bigint NOT NULL,
    debit_version bigint NOT NULL,
    debit_balance bigint NOT NULL,
    credit bigint NOT NULL,
    credit_version bigint NOT NULL,
    credit_balance bigint NOT NULL,
    amount bigint NOT NULL,
    hold_amount bigint NOT NULL,
    seq bigint NOT NULL,
    at timestamptz NOT NULL,
    root uuid,
    hold uuid,
    hold_part smallint,
    writer smallint NOT NULL,
    ord smallint NOT NULL,
    kind smallint NOT NULL,
    code smallint NOT NULL,
    CHECK (amount > 0 OR kind = 4),
    PRIMARY KEY (debit, debit_version)
);
CREATE UNIQUE INDEX transfer_credit ON transfer (credit, credit_version);
CREATE INDEX transfer_seq ON transfer USING brin (seq) WITH (pages_per_range = 16, autosummarize = on);

-- Money reserved until it is settled or released.
CREATE TABLE hold (
    id uuid NOT NULL,
    part smallint NOT NULL,
    debit bigint NOT NULL,
    credit bigint NOT NULL,
    amount bigint NOT NULL,
    expires_at timestamptz,
    state text NOT NULL,
    PRIMARY KEY (id, part)
);
CREATE INDEX hold_expiry ON hold (expires_at) WHERE state = 'open' AND expires_at IS NOT NULL;

-- Requests that were taken under an idempotency key: the first answer, for repeats. Dropped after the time the settings say.
CREATE TABLE once (
    home bigint NOT NULL,
    operation text NOT NULL,
    key text NOT NULL,
    digest bytea NOT NULL,
    status smallint,
    resource uuid,
    problem bytea,
    at timestamptz NOT NULL,
    PRIMARY KEY (home, operation, key)
);

-- Names that may exist once, for ever: order numbers, refund numbers.
CREATE TABLE claim (
    home bigint NOT NULL,
    kind text NOT NULL,
    name text NOT NULL,
    resource uuid NOT NULL,
    PRIMARY KEY (home, kind, name)
);

-- What moved: every change of a row that may change. `after` is JSON of its changing columns, `before` only where version is 1,
-- so that any row can be replayed from its creation.
CREATE TABLE move (
    home bigint NOT NULL,
    root uuid NOT NULL,
    id uuid NOT NULL,
    version bigint NOT NULL,
    at timestamptz NOT NULL,
    seq bigint NOT NULL,
    writer smallint NOT NULL,
    ord smallint NOT NULL,
    table_number smallint NOT NULL,
    event text NOT NULL,
    from_state text NOT NULL,
    to_state text NOT NULL,
    before text,
    after text NOT NULL,
    PRIMARY KEY (home, root, id, version)
);

-- Facts, for ever: what merchants and brokers are told. `sequence` counts per root. Readers keep a cursor per writer.
CREATE TABLE event (
    writer smallint NOT NULL,
    seq bigint NOT NULL,
    ord smallint NOT NULL,
    home bigint NOT NULL,
    root uuid NOT NULL,
    sequence bigint NOT NULL,
    at timestamptz NOT NULL,
    type text NOT NULL,
    data bytea NOT NULL,
    PRIMARY KEY (writer, seq, ord)
);
CREATE UNIQUE INDEX event_root ON event (home, root, sequence);
CREATE INDEX event_home ON event (home, at, writer, seq, ord);

-- Work for one receiver; the delete in the handler's own commit is the acknowledgement. `position` is drawn inside the
-- writing transaction, so messages of one key have the order in which their root's lock was held. `returned`: it was given
-- back, came from a broker so, or stands behind one that was; it holds up what comes later in its key, also before it is due.
CREATE TABLE message (
    id uuid PRIMARY KEY,
    position bigint GENERATED ALWAYS AS IDENTITY,
    home bigint NOT NULL,
    topic text NOT NULL,
    key text NOT NULL,
    priority smallint NOT NULL,
    due timestamptz NOT NULL,
    created_at timestamptz NOT NULL,
    attempts integer NOT NULL DEFAULT 0,
    returned boolean NOT NULL DEFAULT false,
    lapses smallint NOT NULL DEFAULT 0,
    first_error text,
    last_error text,
    headers text NOT NULL,
    body bytea NOT NULL
);
CREATE INDEX message_work ON message (topic, priority, due, position);
CREATE INDEX message_key ON message (topic, key, position);

-- Who works on which messages, a row per batch that was handed out: a message itself is written once and deleted once. Lost in a
-- crash of the database, which only means that what was in hand is handed out again. Numbers come from a sequence that is not
-- lost, so that nobody from before a crash is taken for a holder of after it. `places`: where the messages were in their table when
-- they were handed out, unless a part of them was given back since.
CREATE UNLOGGED TABLE message_lease (
    id bigint PRIMARY KEY,
    topic text NOT NULL,
    leased_until timestamptz NOT NULL,
    messages uuid[] NOT NULL,
    places tid[]
) WITH (toast_tuple_target = 8160);
ALTER TABLE message_lease ALTER COLUMN messages SET STORAGE EXTERNAL, ALTER COLUMN places SET STORAGE EXTERNAL;
CREATE INDEX message_lease_topic ON message_lease (topic);
CREATE SEQUENCE message_lease_number;

-- Due messages of one queue, urgent ones first, leased for a while. Of each key only the oldest messages in a row come, and
-- only if nobody holds an earlier one: a key has one holder. What was only sent with a delay and never handed out holds up
-- nothing. The candidates are bounded, so that a long queue behind one key costs no more than a short one; where all of them
-- wait or are somebody else's, the next and larger window is looked at, and so on: so many windows at most. Whether somebody
-- else was quicker is asked once more behind the locks; then the bodies are read, of what is ours only.
--
-- The planner's settings: a queue that was nearly empty when PostgreSQL last looked is believed to be so still, and sorting what any
-- index finds of it to be as good as the index that is in order. It would read the whole queue ten times for each batch. What is
-- before one in its key is asked for in order, though any order would do, so that it is found by the index of keys.
--
-- A lease that ran out was of somebody who ended, or stood still, with all of it in hand. What three of them had is handed out
-- alone, so that one message that ends its consumer does not go on ending him for all.
CREATE FUNCTION claim_messages(queue text, wanted bigint, lease_for interval, windows integer DEFAULT 6)
RETURNS TABLE (lease bigint, id uuid, home bigint, key text, priority smallint, created_at timestamptz, attempts integer,
               lapses smallint, headers text, body bytea)
LANGUAGE plpgsql
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_bitmapscan = off SET enable_sort = off AS $$
#variable_conflict use_column
DECLARE
    ids uuid[];
    places tid[];
    turns bigint[];
    known bigint[];
    others uuid[];
    found bigint;
    look bigint := greatest(wanted, 16);
    passed bigint := 0;
    lapsed uuid[];
    alone CONSTANT smallint := 3;
    ended CONSTANT text := 'whoever had it in hand ended, or held it longer than its lease';
BEGIN
    IF wanted <= 0 OR EXISTS (SELECT FROM subscription AS s WHERE s.queue = claim_messages.queue AND s.paused) THEN
        RETURN;
    END IF;
    -- A lease that is lost only means that somebody else acts earlier, so nobody waits for the disk.
    PERFORM set_config('synchronous_commit', 'off', true);
    WITH over AS (
        DELETE FROM message_lease AS l
         WHERE l.id = ANY(ARRAY(
               SELECT old.id FROM message_lease AS old
                WHERE old.topic = queue AND old.leased_until <= clock_timestamp()
                  FOR UPDATE SKIP LOCKED))
        RETURNING l.messages
    )
    SELECT array_agg(m.id) INTO lapsed FROM over, unnest(over.messages) AS m (id);
    IF lapsed IS NOT NULL THEN
        UPDATE message AS m
           SET lapses = least(m.lapses + 1, 100),
               first_error = COALESCE(m.first_error, ended),
               last_error = ended
         WHERE m.id = ANY(ARRAY(SELECT n.id FROM message AS n WHERE n.id = ANY(lapsed) FOR UPDATE SKIP LOCKED));
    END IF;
    FOR attempt IN 1..windows LOOP
        WITH held AS MATERIALIZED (
            SELECT unnest(l.messages) AS id FROM message_lease AS l WHERE l.topic = queue
        ),
        candidate AS MATERIALIZED (
            SELECT c.place, c.key, c.position, row_number() OVER () AS rank
              FROM generate_series(9, 0, -1) AS p (priority)
             CROSS JOIN LATERAL (
                   SELECT m.ctid AS place, m.key, m.position
                     FROM message AS m
                    WHERE m.topic = queue
                      AND m.priority = p.priority
                      AND m.due <= clock_timestamp()
                      AND m.id NOT IN (SELECT h.id FROM held AS h)
                    ORDER BY m.due, m.position
                    LIMIT passed + look) AS c
             LIMIT look OFFSET passed
        ),
        turn AS MATERIALIZED (
            SELECT c.key, min(c.rank) AS rank, array_agg(c.place ORDER BY c.position) AS places,
                   min(c.position) AS first, max(c.position) AS last, count(*) AS length
              FROM candidate AS c
             WHERE c.key <> ''
             GROUP BY c.key
        ),
        free AS MATERIALIZED (
            SELECT t.rank, t.places,
                   CASE WHEN earlier.number = t.length - 1 THEN t.length
                        WHEN (SELECT m.position FROM message AS m
                               WHERE m.topic = queue AND m.key = t.key AND m.position < t.first
                                 AND (m.returned OR m.due <= clock_timestamp())
                               ORDER BY m.position
                               LIMIT 1) IS NULL THEN 1
                   END AS length
              FROM turn AS t
             CROSS JOIN LATERAL (
                   SELECT count(*) AS number
                     FROM (SELECT FROM message AS m
                            WHERE m.topic = queue AND m.key = t.key AND m.position < t.last
                              AND (m.returned OR m.due <= clock_timestamp())
                            ORDER BY m.position
                            LIMIT t.length) AS m) AS earlier
        ),
        picked AS MATERIALIZED (
            SELECT p.place, f.rank AS turn, p.number
              FROM free AS f
             CROSS JOIN LATERAL unnest(f.places[1:f.length]) WITH ORDINALITY AS p (place, number)
             WHERE f.length IS NOT NULL
             UNION ALL
            SELECT c.place, c.rank, 1 FROM candidate AS c WHERE c.key = ''
        ),
        -- The first of each turn before any other: what is behind one that somebody else has is not locked.
        first AS MATERIALIZED (
            SELECT p.turn, p.number, m.ctid AS place, m.id, m.lapses
              FROM (SELECT * FROM picked WHERE number = 1 ORDER BY turn) AS p
              JOIN message AS m ON m.ctid = p.place
             WHERE m.due <= clock_timestamp()
             LIMIT wanted
               FOR UPDATE OF m SKIP LOCKED
        ),
        behind AS MATERIALIZED (
            SELECT p.turn, p.number, m.ctid AS place, m.id, m.lapses
              FROM (SELECT * FROM picked WHERE number > 1 AND turn IN (SELECT f.turn FROM first AS f) ORDER BY turn, number) AS p
              JOIN message AS m ON m.ctid = p.place
             WHERE m.due <= clock_timestamp()
             LIMIT wanted
               FOR UPDATE OF m SKIP LOCKED
        ),
        locked AS MATERIALIZED (
            SELECT * FROM first UNION ALL SELECT * FROM behind
        ),
        in_a_row AS MATERIALIZED (
            SELECT l.turn, l.place, l.id, l.lapses, row_number() OVER () AS nth
              FROM (SELECT l.*, row_number() OVER (PARTITION BY l.turn ORDER BY l.number) AS expected FROM locked AS l) AS l
             WHERE l.number = l.expected
        ),
        cut AS MATERIALIZED (
            SELECT CASE min(r.nth) FILTER (WHERE r.lapses >= alone)
                   WHEN 1 THEN 1
                   ELSE least(min(r.nth) FILTER (WHERE r.lapses >= alone) - 1, wanted)
                   END AS last
              FROM in_a_row AS r
        )
        SELECT array_agg(r.id), array_agg(r.place), array_agg(r.turn), (SELECT count(*) FROM candidate),
               ARRAY(SELECT l.id FROM message_lease AS l WHERE l.topic = queue)
          INTO ids, places, turns, found, known
          FROM (SELECT r.* FROM in_a_row AS r, cut WHERE r.nth <= cut.last ORDER BY r.nth) AS r;
        IF ids IS NOT NULL THEN
            SELECT array_agg(m.id)
              INTO others
              FROM message_lease AS l
             CROSS JOIN LATERAL unnest(l.messages) AS m (id)
             WHERE l.topic = queue
               AND l.id <> ALL(known);
            IF others && ids THEN
                SELECT array_agg(c.id ORDER BY c.nth), array_agg(c.place ORDER BY c.nth)
                  INTO ids, places
                  FROM unnest(ids, places, turns) WITH ORDINALITY AS c (id, place, turn, nth)
                 WHERE c.turn NOT IN (SELECT t.turn FROM unnest(ids, turns) AS t (id, turn) WHERE t.id = ANY(others));
            END IF;
            EXIT WHEN ids IS NOT NULL;
            -- Somebody was quicker with all of it. By now that is seen, so the same window once more.
            CONTINUE;
        END IF;
        EXIT WHEN found < look;
        passed := passed + look;
        look := look * 4;
    END LOOP;
    IF ids IS NULL THEN
        RETURN;
    END IF;
    RETURN QUERY
    WITH leased AS (
        INSERT INTO message_lease (id, topic, leased_until, messages, places)
        VALUES (nextval('message_lease_number'), queue, clock_timestamp() + lease_for, ids, places)
        RETURNING id
    )
    SELECT leased.id, m.id, m.home, m.key, m.priority, m.created_at, m.attempts, m.lapses, m.headers, m.body
      FROM leased
     CROSS JOIN unnest(places) WITH ORDINALITY AS p (at, nth)
      JOIN message AS m ON m.ctid = p.at
     ORDER BY p.nth;
END
$$;

-- Done: the messages that were given out under these leases, each with its own, are deleted; how many, and which if it is not all of
-- them or none. `ended`: leases of which nothing is in hand any more. The others stay as they are (unlike in `let_go`), so that those
-- who acknowledge parts of a batch need not wait for each other's commits: what is deleted is in nobody's hand.
--
-- They are looked for where they were when they were handed out, and by their ids if they are not there any more. The planner's
-- setting: where it believes the table to be empty, as it was when it last looked, it would read it all.
CREATE FUNCTION acknowledge_messages(ids uuid[], leases bigint[], ended bigint[]) RETURNS TABLE (count bigint, which uuid[])
LANGUAGE plpgsql
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_bitmapscan = off AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
    WITH over AS (
        DELETE FROM message_lease AS l WHERE l.id = ANY(ended) RETURNING l.id, l.messages, l.places
    ),
    going_on AS (
        SELECT l.id, l.messages, l.places
          FROM message_lease AS l
         WHERE l.id = ANY(leases)
           AND l.id <> ALL(ended)
           FOR SHARE
    ),
    given AS MATERIALIZED (
        SELECT g.id, g.lease FROM unnest(ids, leases) AS g (id, lease)
    ),
    handed_out AS MATERIALIZED (
        SELECT m.id, l.id AS lease, m.place
          FROM (SELECT * FROM over UNION ALL SELECT * FROM going_on) AS l
         CROSS JOIN LATERAL unnest(l.messages, l.places) AS m (id, place)
    ),
    ours AS MATERIALIZED (
        SELECT h.id, h.place FROM handed_out AS h WHERE (h.id, h.lease) IN (SELECT g.id, g.lease FROM given AS g)
    ),
    gone AS (
        DELETE FROM message AS m
         USING ours AS o
         WHERE m.ctid = o.place
           -- Another one may be there now. Asked for so that no index is used for it.
           AND m.id IS NOT DISTINCT FROM o.id
        RETURNING m.id
    ),
    moved AS (
        DELETE FROM message AS m
         WHERE m.id = ANY(ARRAY(SELECT o.id FROM ours AS o EXCEPT SELECT g.id FROM gone AS g))
        RETURNING m.id
    ),
    done AS MATERIALIZED (
        SELECT array_agg(d.id) AS ids, count(*) AS count FROM (SELECT g.id FROM gone AS g UNION ALL SELECT m.id FROM moved AS m) AS d
    )
    SELECT d.count, CASE WHEN d.count < cardinality(acknowledge_messages.ids) THEN d.ids END FROM done AS d;
END
$$;

-- Gives messages back before their lease is over: those of them that were held under the leases given, and are not any more.
-- `ended`: leases of which nothing is in hand any more.
CREATE FUNCTION let_go(ids uuid[], leases bigint[], ended bigint[]) RETURNS TABLE (id uuid, lease bigint)
LANGUAGE sql AS $$
    WITH over AS (
        DELETE FROM message_lease AS l WHERE l.id = ANY(ended) RETURNING l.id, l.messages
    ),
    before AS MATERIALIZED (
        SELECT l.id, l.messages
          FROM message_lease AS l
         WHERE l.id = ANY(leases)
           AND l.id <> ALL(ended)
           FOR UPDATE
    ),
    after AS (
        UPDATE message_lease AS l
           SET messages = ARRAY(SELECT m FROM unnest(before.messages) AS m WHERE m <> ALL(ids)),
               places = NULL
          FROM before
         WHERE l.id = before.id
        RETURNING before.id, before.messages
    )
    SELECT given.id, given.lease
      FROM unnest(ids, leases) AS given (id, lease)
     WHERE (given.id, given.lease) IN (
           SELECT unnest(o.messages), o.id FROM over AS o
            UNION ALL
           SELECT unnest(a.messages), a.id FROM after AS a)
$$;

-- Messages that were given up, with reason and history. Browse, replay one, a range or all.
CREATE TABLE dead_letter (
    id uuid PRIMARY KEY,
    home bigint NOT NULL,
    topic text NOT NULL,
    key text NOT NULL,
    priority smallint NOT NULL,
    created_at timestamptz NOT NULL,
    died_at timestamptz NOT NULL,
    attempts integer NOT NULL,
    reason text NOT NULL,
    first_error text,
    last_error text,
    headers text NOT NULL,
    body bytea NOT NULL,
    replayed_at timestamptz
);
CREATE INDEX dead_letter_topic ON dead_letter (topic, died_at);

-- What is due: named by entity and kind, so that setting it again replaces it. Never goes to the dead letters.
CREATE TABLE timer (
    entity uuid NOT NULL,
    kind text NOT NULL,
    home bigint NOT NULL,
    root uuid NOT NULL,
    due timestamptz NOT NULL,
    generation bigint NOT NULL,
    tries integer NOT NULL DEFAULT 0,
    leased_until timestamptz,
    last_error text,
    PRIMARY KEY (entity, kind)
);
CREATE INDEX timer_due ON timer (kind, due);
CREATE INDEX timer_stuck ON timer (kind, due) WHERE tries >= 5;

-- Records from a broker that were handled, per consumer group.
CREATE TABLE inbox (
    group_name text NOT NULL,
    record text NOT NULL,
    at timestamptz NOT NULL,
    PRIMARY KEY (group_name, record)
);

-- The groups that read the event log. One process at a time reads for a group: the holder.
CREATE TABLE log_group (
    name text PRIMARY KEY,
    created_at timestamptz NOT NULL,
    holder uuid,
    held_until timestamptz
);

-- How far a group of readers has come in each writer's events.
CREATE TABLE cursor_position (
    group_name text NOT NULL,
    writer smallint NOT NULL,
    seq bigint NOT NULL,
    ord smallint NOT NULL,
    PRIMARY KEY (group_name, writer)
);

-- Where each broker was, and what it carried, when Kassa last ran: none is to get another one's place in the log by its place in the
-- settings.
CREATE TABLE broker (
    name text,
    address text,
    topics text[] NOT NULL,
    seen_at timestamptz NOT NULL,
    PRIMARY KEY (name, address)
);

-- Which groups receive a topic on the PostgreSQL binder: each has a queue of its own among the messages.
CREATE TABLE subscription (
    topic text NOT NULL,
    group_name text NOT NULL,
    queue text NOT NULL UNIQUE GENERATED ALWAYS AS (topic || ':' || group_name) STORED,
    paused boolean NOT NULL DEFAULT false,
    PRIMARY KEY (topic, group_name)
);

-- Who consumes a topic of a broker now, so that several can share its lanes; the broker itself is the fence. A crash may forget it.
CREATE UNLOGGED TABLE consumer (
    place text NOT NULL,
    id text NOT NULL,
    in_hand integer NOT NULL,
    seen_at timestamptz NOT NULL,
    PRIMARY KEY (place, id)
) WITH (fillfactor = 50);

-- The first packets of lanes that came to a consumer, of brokers which do not count how often they hand one out: whoever had the lane
-- before may have ended with one of these in hand. How often a lane began so. A crash of the database may forget it.
CREATE UNLOGGED TABLE suspect (
    id uuid PRIMARY KEY,
    handed integer NOT NULL,
    seen_at timestamptz NOT NULL
);

-- What each process counts about the queues, for whoever watches them from elsewhere. Lost in a crash of the database, and
-- written again within a second.
CREATE UNLOGGED TABLE queue_meter (
    process uuid NOT NULL,
    topic text NOT NULL,
    group_name text NOT NULL,
    at timestamptz NOT NULL,
    sent bigint NOT NULL,
    received bigint NOT NULL,
    handled bigint NOT NULL,
    retried bigint NOT NULL,
    dead bigint NOT NULL,
    latency bigint[] NOT NULL,
    PRIMARY KEY (process, topic, group_name)
) WITH (fillfactor = 50);

-- Records of a group that wait: the one that failed, and the later ones of its root behind it. States: retry, waiting, dead.
CREATE TABLE parked (
    group_name text NOT NULL,
    root uuid NOT NULL,
    home bigint NOT NULL,
    writer smallint NOT NULL,
    seq bigint NOT NULL,
    ord smallint NOT NULL,
    sequence bigint NOT NULL,
    attempts integer NOT NULL,
    due timestamptz NOT NULL,
    parked_at timestamptz NOT NULL,
    first_reason text,
    reason text,
    state text NOT NULL,
    PRIMARY KEY (group_name, home, root, sequence)
);
CREATE INDEX parked_due ON parked (group_name, due) WHERE state = 'retry';

-- The home of the next merchant.
CREATE SEQUENCE home;

-- A merchant and its policies. `home` is where all that belongs to it lives.
CREATE TABLE merchant (
    home bigint NOT NULL,
    id uuid NOT NULL,
    version bigint NOT NULL,
    sequence bigint NOT NULL,
    state text NOT NULL,
    created_at timestamptz NOT NULL,
    name text NOT NULL,
    fee_ppm bigint NOT NULL,
    fee_on_refund text NOT NULL,
    late_success text NOT NULL,
    overdraft bigint NOT NULL,
    writer smallint NOT NULL,
    seq bigint NOT NULL,
    ord smallint NOT NULL,
    PRIMARY KEY (home, id)
) WITH (fillfactor = 85);

-- An API key of a merchant; only its SHA-256 is stored.
CREATE TABLE api_key (
    home bigint NOT NULL,
    id uuid NOT NULL,
    version bigint NOT NULL,
    root uuid NOT NULL,
    state text NOT NULL,
    key_hash bytea NOT NULL,
    label text NOT NULL,
    scopes text NOT NULL,
    shown text NOT NULL,
    created_at timestamptz NOT NULL,
    revoked_at timestamptz,
    writer smallint NOT NULL,
    seq bigint NOT NULL,
    ord smallint NOT NULL,
    PRIMARY KEY (home, id)
) WITH (fillfactor = 85);
CREATE UNIQUE INDEX api_key_hash ON api_key (key_hash);

-- A merchant's account at a channel; its credentials are encrypted under a key outside the database.
CREATE TABLE channel_account (
    home bigint NOT NULL,
    id uuid NOT NULL,
    version bigint NOT NULL,
    root uuid NOT NULL,
    state text NOT NULL,
    channel text NOT NULL,
    created_at timestamptz NOT NULL,
    credentials bytea NOT NULL,
    updated_at timestamptz NOT NULL,
    writer smallint NOT NULL,
    seq bigint NOT NULL,
    ord smallint NOT NULL,
    PRIMARY KEY (home, id)
) WITH (fillfactor = 85);
CREATE UNIQUE INDEX channel_account_name ON channel_account (home, channel);

-- An order to be paid, or a top-up of a wallet (kind). The root of its attempts, refunds and exchanges.
CREATE TABLE payment (
    home bigint NOT NULL,
    id uuid NOT NULL,
    version bigint NOT NULL,
    sequence bigint NOT NULL,
    state text NOT NULL,
    kind text NOT NULL,
    order_id text NOT NULL,
    amount bigint NOT NULL,
    currency text NOT NULL,
    channel text NOT NULL,
    method text NOT NULL,
    wallet uuid,
    openid text,
    payer_ip text,
    description text NOT NULL,
    metadata text NOT NULL,
    return_url text,
    fee_ppm bigint NOT NULL,
    fee_on_refund text NOT NULL,
    late_success text NOT NULL,
    created_at timestamptz NOT NULL,
    expires_at timestamptz NOT NULL,
    succeeded_at timestamptz,
    closed_at timestamptz,
    paid_attempt uuid,
    failure_code text,
    failure_reason text,
    amount_refunded bigint NOT NULL,
    amount_refunding bigint NOT NULL,
    fee_refunded bigint NOT NULL,
    fee_refunding bigint NOT NULL,
    refunds bigint NOT NULL,
    refund_slot_at timestamptz,
    writer smallint NOT NULL,
    seq bigint NOT NULL,
    ord smallint NOT NULL,
    PRIMARY KEY (home, id)
) WITH (fillfactor = 85);
-- Partial, so that a payment that is born final costs no entry.
CREATE INDEX payment_topup ON payment (home, id) WHERE kind = 'topup';
CREATE INDEX payment_open ON payment (home, id) WHERE state NOT IN ('succeeded', 'closed', 'late_refunded');

-- One request to one channel; `id` is its number there.
CREATE TABLE attempt (
    home bigint NOT NULL,
    id uuid NOT NULL,
    version bigint NOT NULL,
    root uuid NOT NULL,
    state text NOT NULL,
    channel text NOT NULL,
    method text NOT NULL,
    openid text,
    payer_ip text,
    created_at timestamptz NOT NULL,
    request text,
    channel_id text,
    next_action text,
    failure_code text,
    failure_reason text,
    tries bigint NOT NULL,
    doubt_since timestamptz,
    done_at timestamptz,
    writer smallint NOT NULL,
    seq bigint NOT NULL,
    ord smallint NOT NULL,
    PRIMARY KEY (home, id)
) WITH (fillfactor = 85);
-- The root first: led by home, it would serve `home = … AND id = …` as well as the primary key does, as far as the planner
-- knows before the first ANALYZE, and each update would walk through all that the home has.
CREATE INDEX attempt_root ON attempt (root, home);
CREATE INDEX attempt_open ON attempt (id) WHERE state IN ('new', 'sending', 'pending_payer', 'unknown');
CREATE INDEX attempt_doubt ON attempt (doubt_since) WHERE doubt_since IS NOT NULL;

-- Money given back; `id` is its number at the channel.
CREATE TABLE refund (
    home bigint NOT NULL,
    id uuid NOT NULL,
    version bigint NOT NULL,
    root uuid NOT NULL,
    state text NOT NULL,
    attempt uuid,
    refund_id text NOT NULL,
    amount bigint NOT NULL,
    currency text NOT NULL,
    fee_returned bigint NOT NULL,
    reason text,
    cause text NOT NULL,
    metadata text NOT NULL,
    created_at timestamptz NOT NULL,
    request text,
    channel_id text,
    failure_code text,
    failure_reason text,
    tries bigint NOT NULL,
    doubt_since timestamptz,
    succeeded_at timestamptz,
    sent_at timestamptz,
    sent_before timestamptz,
    writer smallint NOT NULL,
    seq bigint NOT NULL,
    ord smallint NOT NULL,
    PRIMARY KEY (home, id)
) WITH (fillfactor = 85);
CREATE INDEX refund_root ON refund (root, home);
CREATE INDEX refund_open ON refund (id) WHERE state IN ('reserved', 'sending', 'processing', 'unknown', 'abnormal');
CREATE INDEX refund_doubt ON refund (doubt_since) WHERE doubt_since IS NOT NULL;

-- A user's wallet; its money is a ledger account.
CREATE TABLE wallet (
    home bigint NOT NULL,
    id uuid NOT NULL,
    version bigint NOT NULL,
    sequence bigint NOT NULL,
    state text NOT NULL,
    "user" text NOT NULL,
    currency text NOT NULL,
    created_at timestamptz NOT NULL,
    writer smallint NOT NULL,
    seq bigint NOT NULL,
    ord smallint NOT NULL,
    PRIMARY KEY (home, id)
);

-- What was said to or by a channel about a payment, without secrets and personal data.
CREATE TABLE exchange (
    home bigint NOT NULL,
    id uuid NOT NULL,
    version bigint NOT NULL,
    root uuid NOT NULL,
    state text NOT NULL,
    subject uuid NOT NULL,
    operation text NOT NULL,
    method text,
    path text,
    status bigint,
    outcome text NOT NULL,
    code text,
    text text,
    at timestamptz NOT NULL,
    duration_ms bigint NOT NULL,
    writer smallint NOT NULL,
    seq bigint NOT NULL,
    ord smallint NOT NULL,
    PRIMARY KEY (home, id)
);
CREATE INDEX exchange_root ON exchange (root, home);
CREATE INDEX exchange_quarantined ON exchange (at) WHERE state = 'quarantined';

-- Where a merchant wants to be told.
CREATE TABLE webhook_endpoint (
    home bigint NOT NULL,
    id uuid NOT NULL,
    version bigint NOT NULL,
    sequence bigint NOT NULL,
    state text NOT NULL,
    created_at timestamptz NOT NULL,
    url text NOT NULL,
    events text NOT NULL,
    secrets bytea NOT NULL,
    description text NOT NULL,
    replays bigint NOT NULL,
    failing_since timestamptz,
    paused_reason text,
    writer smallint NOT NULL,
    seq bigint NOT NULL,
    ord smallint NOT NULL,
    PRIMARY KEY (home, id)
) WITH (fillfactor = 85);

-- One event for one endpoint.
CREATE TABLE webhook_delivery (
    home bigint NOT NULL,
    id uuid NOT NULL,
    version bigint NOT NULL,
    sequence bigint NOT NULL,
    state text NOT NULL,
    endpoint uuid NOT NULL,
    event text NOT NULL,
    event_type text NOT NULL,
    event_root uuid NOT NULL,
    event_sequence bigint NOT NULL,
    replay bigint NOT NULL,
    created_at timestamptz NOT NULL,
    tries bigint NOT NULL,
    next_at timestamptz,
    last_at timestamptz,
    last_status bigint,
    last_error text,
    last_duration_ms bigint,
    writer smallint NOT NULL,
    seq bigint NOT NULL,
    ord smallint NOT NULL,
    PRIMARY KEY (home, id)
) WITH (fillfactor = 85);
-- The endpoint first, as with attempt_root.
CREATE INDEX webhook_delivery_endpoint ON webhook_delivery (endpoint, home, created_at, id);
CREATE INDEX webhook_delivery_order ON webhook_delivery (home, endpoint, event_root, replay, event_sequence)
    WHERE state = 'due';

-- Events of a time that a merchant wants again at one endpoint. `position` is how far it has come.
CREATE TABLE webhook_replay (
    home bigint NOT NULL,
    id uuid NOT NULL,
    version bigint NOT NULL,
    sequence bigint NOT NULL,
    state text NOT NULL,
    endpoint uuid NOT NULL,
    replay bigint NOT NULL,
    created_from timestamptz NOT NULL,
    created_to timestamptz NOT NULL,
    created_at timestamptz NOT NULL,
    position text NOT NULL,
    deliveries bigint NOT NULL,
    writer smallint NOT NULL,
    seq bigint NOT NULL,
    ord smallint NOT NULL,
    PRIMARY KEY (home, id)
) WITH (fillfactor = 85);

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

-- From now on a group receives a topic: an address for answers, or one more reader of events. A repeat changes nothing.
CREATE FUNCTION kassa_listen(topic text, group_name text DEFAULT 'client') RETURNS void
LANGUAGE sql SECURITY DEFINER SET search_path = public, pg_temp AS $$
    INSERT INTO subscription (topic, group_name) VALUES (kassa_listen.topic, kassa_listen.group_name) ON CONFLICT DO NOTHING
$$;

-- A body as text; NULL for one that is none.
CREATE FUNCTION body_text(body bytea) RETURNS text
LANGUAGE plpgsql IMMUTABLE AS $$
BEGIN
    RETURN convert_from(body, 'UTF8');
EXCEPTION WHEN character_not_in_repertoire OR untranslatable_character THEN
    RETURN NULL;
END
$$;

-- The next records of a group, urgent ones first; what comes at once is in the order in which it was sent. They are gone with the caller's
-- commit, and there again after his rollback: what he does with them in the same transaction is done once. Of each key the first one
-- comes, unless somebody else has it or has not committed it; if there is room, those behind it too. A body that is no text comes as
-- base64, and a header says so. Whether somebody else has one in hand is asked once more behind the lock, when his lease is there to
-- be seen.
--
-- Looked at in windows, as in `claim_messages`, and planned like that.
CREATE FUNCTION kassa_receive(topic text, group_name text DEFAULT 'client', at_most integer DEFAULT 1)
RETURNS TABLE (correlation_id text, body text, headers jsonb)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_bitmapscan = off SET enable_sort = off AS $$
DECLARE
    of_group text := kassa_receive.topic || ':' || kassa_receive.group_name;
    wanted bigint := COALESCE(at_most, 1000);
    look bigint := greatest(wanted, 16);
    passed bigint := 0;
    found bigint;
    locked uuid[];
    free uuid[];
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'kassa_receive needs READ COMMITTED, and this transaction is %', upper(current_setting('transaction_isolation'))
            USING HINT = 'Its snapshot would be older than what others have in hand by now: BEGIN ISOLATION LEVEL READ COMMITTED.',
                  ERRCODE = 'invalid_transaction_state';
    END IF;
    IF wanted <= 0 OR EXISTS (SELECT FROM subscription AS s WHERE s.queue = of_group AND s.paused) THEN
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
             WHERE m.due <= clock_timestamp()
               AND (c.key = '' OR (
                    SELECT earlier.position
                      FROM message AS earlier
                     WHERE earlier.topic = of_group AND earlier.key = c.key AND earlier.position < c.position
                       AND (earlier.returned OR earlier.due <= clock_timestamp())
                     ORDER BY earlier.position
                     LIMIT 1) IS NULL)
             ORDER BY c.rank
             LIMIT wanted
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
                  AND b.id NOT IN (SELECT unnest(l.messages) FROM message_lease AS l
                                    WHERE l.topic = of_group AND l.leased_until > clock_timestamp())
                ORDER BY b.position
                LIMIT wanted - cardinality(locked)) AS behind
          JOIN message AS m ON m.ctid = behind.place
         WHERE m.due <= clock_timestamp()
         ORDER BY m.position
         LIMIT wanted - cardinality(locked)
           FOR UPDATE OF m SKIP LOCKED);
    free := ARRAY(
        SELECT one.id
          FROM unnest(locked) AS one (id)
         WHERE one.id NOT IN (SELECT unnest(l.messages) FROM message_lease AS l
                               WHERE l.topic = of_group AND l.leased_until > clock_timestamp()));
    RETURN QUERY
    WITH barrier AS MATERIALIZED (
        SELECT k.key,
               (SELECT other.position
                  FROM message AS other
                 WHERE other.topic = of_group AND other.key = k.key
                   AND (other.returned OR other.due <= clock_timestamp())
                   AND other.id <> ALL(free)
                 ORDER BY other.position
                 LIMIT 1) AS position
          FROM (SELECT DISTINCT m.key FROM message AS m WHERE m.id = ANY(free) AND m.key <> '') AS k
    ),
    gone AS (
        DELETE FROM message AS m
         WHERE m.id = ANY(free)
           AND NOT EXISTS (SELECT FROM barrier AS b WHERE b.key = m.key AND b.position < m.position)
        RETURNING m.position, m.headers::jsonb AS said, m.body AS raw, body_text(m.body) AS text
    )
    SELECT g.said ->> 'correlation-id', COALESCE(g.text, translate(encode(g.raw, 'base64'), E'\n', '')),
           CASE WHEN g.text IS NULL THEN g.said || '{"content-transfer-encoding": "base64"}' ELSE g.said END
      FROM gone AS g
     ORDER BY g.position;
END
$$;

REVOKE EXECUTE ON FUNCTION kassa_send, kassa_listen, kassa_receive FROM PUBLIC;
