-- name: expired_holds
-- Open holds whose time is over, with the home they belong to and why they were made.
SELECT h.id, h.part, a.home, t.code
  FROM hold h
  JOIN account a ON a.id = h.debit
  JOIN LATERAL (SELECT code
                  FROM transfer
                 WHERE hold = h.id
                   AND hold_part = h.part
                   AND debit = h.debit
                   AND kind = 2
                 LIMIT 1) t ON true
 WHERE h.state = 'open'
   AND h.expires_at <= now()
 ORDER BY h.expires_at
 LIMIT $1;

-- name: drop_old_answers
-- Some of the answers that were kept long enough. A repeat after that is a new request; order and refund numbers guard on.
DELETE FROM once
 WHERE ctid = ANY(ARRAY(SELECT ctid
                          FROM once
                         WHERE at < now() - $1::interval
                         LIMIT $2));
