-- name: next_home
-- The home of the next merchant. A number that is not used in the end is no loss.
SELECT nextval('home');

-- name: merchant_by_id
-- One merchant by its id alone, for operators: few rows, so no index of its own. The house (home 0) is none.
SELECT home, id, version, sequence, state, created_at, name, fee_ppm, fee_on_refund, late_success, overdraft
  FROM merchant
 WHERE id = $1
   AND home <> 0;

-- name: merchants
-- All merchants, oldest first. The house (home 0) is none.
SELECT home, id, version, sequence, state, created_at, name, fee_ppm, fee_on_refund, late_success, overdraft
  FROM merchant
 WHERE id > $1
   AND home <> 0
 ORDER BY id
 LIMIT $2;

-- name: keys_of_merchant
-- A merchant's API keys, oldest first.
SELECT home, id, version, root, state, key_hash, label, scopes, shown, created_at, revoked_at
  FROM api_key
 WHERE home = $1
 ORDER BY id;

-- name: key_by_id
-- One API key by its id alone, for operators.
SELECT home, id, version, root, state, key_hash, label, scopes, shown, created_at, revoked_at
  FROM api_key
 WHERE id = $1;

-- name: callers
-- Who the active keys with these hashes belong to, with the merchant's policies as they are now.
SELECT k.key_hash, k.id AS key_id, k.scopes,
       m.home, m.id, m.version, m.sequence, m.state, m.created_at, m.name,
       m.fee_ppm, m.fee_on_refund, m.late_success, m.overdraft
  FROM api_key k
  JOIN merchant m ON m.home = k.home AND m.id = k.root
 WHERE k.key_hash = ANY($1::bytea[])
   AND k.state = 'active'
   AND m.state = 'active';

-- name: channel_account
-- A merchant's account at one channel.
SELECT home, id, version, root, state, channel, created_at, credentials, updated_at
  FROM channel_account
 WHERE home = $1
   AND channel = $2;

-- name: channel_accounts
-- A merchant's accounts at all channels.
SELECT home, id, version, root, state, channel, created_at, credentials, updated_at
  FROM channel_account
 WHERE home = $1
 ORDER BY channel;

-- name: channel_versions
-- Which of the channel accounts that are held in memory are as they were: home, channel and version.
SELECT home, channel, version
  FROM channel_account
 WHERE home = ANY($1::bigint[])
   AND state = 'active';

-- name: announce
-- Tells every process that something about a merchant changed. Only a wake-up: they look by themselves every second.
SELECT pg_notify('kassa_config', $1);
