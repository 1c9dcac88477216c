-- name: payment
-- One payment or top-up of a merchant.
SELECT home, id, version, sequence, state, kind, order_id, amount, currency, channel, method, wallet, openid,
       payer_ip, description, metadata, return_url, fee_ppm, fee_on_refund, late_success, created_at, expires_at,
       succeeded_at, closed_at, paid_attempt, failure_code, failure_reason, amount_refunded, amount_refunding,
       fee_refunded, fee_refunding, refunds, refund_slot_at
  FROM payment
 WHERE home = $1
   AND id = $2;

-- name: payments_by_id
-- Some payments of one merchant.
SELECT home, id, version, sequence, state, kind, order_id, amount, currency, channel, method, wallet, openid,
       payer_ip, description, metadata, return_url, fee_ppm, fee_on_refund, late_success, created_at, expires_at,
       succeeded_at, closed_at, paid_attempt, failure_code, failure_reason, amount_refunded, amount_refunding,
       fee_refunded, fee_refunding, refunds, refund_slot_at
  FROM payment
 WHERE home = $1
   AND id = ANY($2::uuid[]);

-- name: payment_by_order
-- The payment (claim order) or top-up (claim topup) that a merchant's own number stands for.
SELECT p.home, p.id, p.version, p.sequence, p.state, p.kind, p.order_id, p.amount, p.currency, p.channel, p.method,
       p.wallet, p.openid, p.payer_ip, p.description, p.metadata, p.return_url, p.fee_ppm, p.fee_on_refund,
       p.late_success, p.created_at, p.expires_at, p.succeeded_at, p.closed_at, p.paid_attempt, p.failure_code,
       p.failure_reason, p.amount_refunded, p.amount_refunding, p.fee_refunded, p.fee_refunding, p.refunds,
       p.refund_slot_at
  FROM claim c
  JOIN payment p ON p.home = c.home AND p.id = c.resource
 WHERE c.home = $1
   AND c.kind = $2
   AND c.name = $3;

-- name: payments
-- A page of payments, newest first. Ids are in order of time, so bounds of time are bounds of ids too.
SELECT home, id, version, sequence, state, kind, order_id, amount, currency, channel, method, wallet, openid,
       payer_ip, description, metadata, return_url, fee_ppm, fee_on_refund, late_success, created_at, expires_at,
       succeeded_at, closed_at, paid_attempt, failure_code, failure_reason, amount_refunded, amount_refunding,
       fee_refunded, fee_refunding, refunds, refund_slot_at
  FROM payment
 WHERE home = $1
   AND kind = 'payment'
   AND id < $2
   AND id >= $3
   AND ($4::text IS NULL OR state = $4)
   AND ($5::timestamptz IS NULL OR created_at >= $5)
   AND ($6::timestamptz IS NULL OR created_at < $6)
 ORDER BY id DESC
 LIMIT $7;

-- name: topups
-- A page of top-ups, newest first. A query of its own, for the sake of their index.
SELECT home, id, version, sequence, state, kind, order_id, amount, currency, channel, method, wallet, openid,
       payer_ip, description, metadata, return_url, fee_ppm, fee_on_refund, late_success, created_at, expires_at,
       succeeded_at, closed_at, paid_attempt, failure_code, failure_reason, amount_refunded, amount_refunding,
       fee_refunded, fee_refunding, refunds, refund_slot_at
  FROM payment
 WHERE home = $1
   AND kind = 'topup'
   AND id < $2
   AND id >= $3
   AND ($4::text IS NULL OR state = $4)
   AND ($5::timestamptz IS NULL OR created_at >= $5)
   AND ($6::timestamptz IS NULL OR created_at < $6)
 ORDER BY id DESC
 LIMIT $7;

-- name: kinds_of
-- Which of some roots are payments, and which are top-ups.
SELECT id, kind
  FROM payment
 WHERE home = $1
   AND id = ANY($2::uuid[]);

-- name: attempts
-- The attempts of some payments of one merchant, oldest first.
SELECT home, id, version, root, state, channel, method, openid, payer_ip, created_at, request, channel_id,
       next_action, failure_code, failure_reason, tries, doubt_since, done_at
  FROM attempt
 WHERE home = $1
   AND root = ANY($2::uuid[])
 ORDER BY id;

-- name: refund
-- One refund of a merchant.
SELECT home, id, version, root, state, attempt, refund_id, amount, currency, fee_returned, reason, cause, metadata,
       created_at, request, channel_id, failure_code, failure_reason, tries, doubt_since, succeeded_at
  FROM refund
 WHERE home = $1
   AND id = $2;

-- name: refunds
-- A page of refunds, newest first.
SELECT home, id, version, root, state, attempt, refund_id, amount, currency, fee_returned, reason, cause, metadata,
       created_at, request, channel_id, failure_code, failure_reason, tries, doubt_since, succeeded_at
  FROM refund
 WHERE home = $1
   AND id < $2
   AND id >= $3
   AND ($4::text IS NULL OR state = $4)
   AND ($5::timestamptz IS NULL OR created_at >= $5)
   AND ($6::timestamptz IS NULL OR created_at < $6)
 ORDER BY id DESC
 LIMIT $7;

-- name: refunds_of_payment
-- A page of some payments' refunds, newest first.
SELECT home, id, version, root, state, attempt, refund_id, amount, currency, fee_returned, reason, cause, metadata,
       created_at, request, channel_id, failure_code, failure_reason, tries, doubt_since, succeeded_at
  FROM refund
 WHERE home = $1
   AND root = ANY($2::uuid[])
   AND id < $3
   AND id >= $4
   AND ($5::text IS NULL OR state = $5)
   AND ($6::timestamptz IS NULL OR created_at >= $6)
   AND ($7::timestamptz IS NULL OR created_at < $7)
 ORDER BY id DESC
 LIMIT $8;

-- name: wallet
-- One wallet of a merchant; its money is the ledger's.
SELECT home, id, version, sequence, state, "user", currency, created_at
  FROM wallet
 WHERE home = $1
   AND id = $2;

-- name: wallet_account
-- The ledger account of a wallet.
SELECT id, limit_side, overdraft, debits_posted, credits_posted, debits_pending, credits_pending, version
  FROM account
 WHERE home = $1
   AND code = $2
   AND owner = $3
   AND currency = $4;

-- name: root_of_attempt
-- The payment that an attempt belongs to.
SELECT root
  FROM attempt
 WHERE home = $1
   AND id = $2;

-- name: root_of_refund
-- The payment that a refund belongs to.
SELECT root
  FROM refund
 WHERE home = $1
   AND id = $2;

-- name: channels_of
-- The channels of some attempts and refunds, by number.
WITH wanted AS MATERIALIZED (SELECT home, id FROM unnest($1::bigint[], $2::uuid[]) AS k (home, id))
SELECT a.id, a.channel
  FROM wanted AS k
  JOIN attempt AS a ON a.home = k.home AND a.id = k.id
 UNION ALL
SELECT r.id, a.channel
  FROM wanted AS k
  JOIN refund AS r ON r.home = k.home AND r.id = k.id
  JOIN attempt AS a ON a.home = r.home AND a.id = r.attempt;

-- name: home_of_payment
-- The merchant's home that a payment or top-up belongs to, for operators who have its id alone.
SELECT home
  FROM payment
 WHERE id = $1;

-- name: unarmed
-- What is not final and has no timer: it would wait for ever. The states are those of states.py; a test compares them.
SELECT DISTINCT open.home, open.root
  FROM (SELECT home, id AS root, id AS entity
          FROM payment
         WHERE state NOT IN ('succeeded', 'closed', 'late_refunded')
           AND state IN ('processing', 'closing', 'late_succeeded')
        UNION ALL
        SELECT home, root, id
          FROM attempt
         WHERE state IN ('new', 'sending', 'pending_payer', 'unknown')
        UNION ALL
        SELECT home, root, id
          FROM refund
         WHERE state IN ('reserved', 'sending', 'processing', 'unknown', 'abnormal')) AS open
 WHERE NOT EXISTS (SELECT FROM timer WHERE timer.entity = open.entity)
 LIMIT $1;

-- name: stuck
-- What is in doubt for longer than it should be, or waits for a person; the oldest first.
SELECT noun, home, root, id, state, since, tries, note
  FROM (SELECT 'attempt' AS noun, home, root, id, state, doubt_since AS since, tries, channel AS note
          FROM attempt
         WHERE doubt_since < $2
        UNION ALL
        SELECT 'refund', home, root, id, state, doubt_since, tries, failure_reason
          FROM refund
         WHERE doubt_since < $2
           AND state NOT IN ('failed', 'reversed')
        UNION ALL
        SELECT 'refund', home, root, id, state, created_at, tries, failure_reason
          FROM refund
         WHERE state IN ('reserved', 'sending', 'processing', 'unknown', 'abnormal')
           AND state = 'abnormal'
        UNION ALL
        SELECT 'refund', home, root, id, state, doubt_since, tries, failure_reason
          FROM refund
         WHERE doubt_since IS NOT NULL
           AND state IN ('failed', 'reversed')
        UNION ALL
        SELECT 'payment', home, id, id, state, created_at, 0, late_success
          FROM payment
         WHERE state NOT IN ('succeeded', 'closed', 'late_refunded')
           AND state = 'held'
        UNION ALL
        SELECT 'exchange', home, root, subject, state, at, 0, text
          FROM exchange
         WHERE state = 'quarantined') AS stuck
 WHERE $1::bigint IS NULL OR home = $1
 ORDER BY since
 LIMIT $3;

-- name: doubts
-- How many attempts and refunds are in doubt, and for how long the oldest one has been.
SELECT 'attempt' AS noun, count(*) AS count, extract(epoch FROM clock_timestamp() - min(doubt_since))::float8 AS oldest_s
  FROM attempt
 WHERE doubt_since IS NOT NULL
UNION ALL
SELECT 'refund', count(*), extract(epoch FROM clock_timestamp() - min(doubt_since))::float8
  FROM refund
 WHERE doubt_since IS NOT NULL;

-- name: births
-- What came into being for a payment: itself, its attempts and its refunds, with their places in the chain.
SELECT kind AS noun, id, created_at AS at, channel AS note, amount, currency, writer, seq, ord
  FROM payment
 WHERE home = $1
   AND id = $2
UNION ALL
SELECT 'attempt', id, created_at, channel || ' ' || method, NULL, NULL, writer, seq, ord
  FROM attempt
 WHERE home = $1
   AND root = $2
UNION ALL
SELECT 'refund', id, created_at, cause, amount, currency, writer, seq, ord
  FROM refund
 WHERE home = $1
   AND root = $2;

-- name: exchanges
-- What was said to and by channels about a payment.
SELECT subject, state, operation, method, path, status, outcome, code, text, at, duration_ms, writer, seq, ord
  FROM exchange
 WHERE home = $1
   AND root = $2;

-- name: moves
-- How a payment and its children moved.
SELECT id, table_number, at, event, from_state, to_state, writer, seq, ord
  FROM move
 WHERE home = $1
   AND root = $2;

-- name: events
-- What a payment told the world.
SELECT sequence, at, type, writer, seq, ord
  FROM event
 WHERE home = $1
   AND root = $2;

-- name: postings
-- The transfers that were made for a payment, found by the changes that it was part of.
SELECT t.at, t.kind, t.code, t.amount, t.hold_amount, d.code AS debit, c.code AS credit, d.currency,
       t.writer, t.seq, t.ord
  FROM transfer t
  JOIN account d ON d.id = t.debit
  JOIN account c ON c.id = t.credit
 WHERE t.seq = ANY($2::bigint[])
   AND t.root = $1;

-- name: due
-- When a payment and its children are looked at again.
SELECT entity, kind, due, tries, last_error
  FROM timer
 WHERE entity = ANY($1::uuid[])
 ORDER BY due;
