-- name: account
-- One account by its name.
SELECT id, home, code, owner, currency, limit_side, overdraft,
       debits_posted, credits_posted, debits_pending, credits_pending, version
  FROM account
 WHERE home = $1
   AND code = $2
   AND owner = $3
   AND currency = $4;

-- name: accounts_of_owners
-- The accounts of several owners (wallets), in one currency each.
SELECT id, home, code, owner, currency, limit_side, overdraft,
       debits_posted, credits_posted, debits_pending, credits_pending, version
  FROM account
 WHERE home = $1
   AND code = $2
   AND owner = ANY($3::text[]);

-- name: own_accounts
-- The accounts that a home has once per currency; not the wallets, of which there may be millions.
SELECT id, home, code, owner, currency, limit_side, overdraft,
       debits_posted, credits_posted, debits_pending, credits_pending, version
  FROM account
 WHERE home = $1
   AND owner = ''
   AND code = ANY($2::smallint[])
 ORDER BY currency, code;

-- name: statement
-- What happened to one account, newest first, below a version. Each side of a transfer has its own version and balance,
-- so the versions of one account have no gaps.
(SELECT debit_version AS version, debit_balance AS balance, -amount AS amount, hold_amount, at, root, writer, seq, ord, kind, code
   FROM transfer
  WHERE debit = $1
    AND debit_version < $2
  ORDER BY debit_version DESC
  LIMIT $3)
UNION ALL
(SELECT credit_version, credit_balance, amount, hold_amount, at, root, writer, seq, ord, kind, code
   FROM transfer
  WHERE credit = $1
    AND credit_version < $2
  ORDER BY credit_version DESC
  LIMIT $3)
 ORDER BY version DESC
 LIMIT $3;

-- name: balance_at
-- The balance of an account as it was at a time: that of the last transfer until then. Versions and times rise together
-- within one account, because it is locked while a batch is judged.
(SELECT debit_version AS version, debit_balance AS balance
   FROM transfer
  WHERE debit = $1
    AND at <= $2
  ORDER BY debit_version DESC
  LIMIT 1)
UNION ALL
(SELECT credit_version, credit_balance
   FROM transfer
  WHERE credit = $1
    AND at <= $2
  ORDER BY credit_version DESC
  LIMIT 1)
 ORDER BY version DESC
 LIMIT 1;

-- name: trial_balance
-- All accounts by purpose and currency. Debits and credits of a currency are equal, posted and pending alike.
SELECT currency, code,
       sum(debits_posted)::numeric AS debits_posted, sum(credits_posted)::numeric AS credits_posted,
       sum(debits_pending)::numeric AS debits_pending, sum(credits_pending)::numeric AS credits_pending,
       count(*) AS accounts
  FROM account
 GROUP BY currency, code
 ORDER BY currency, code;
