-- name: oldest_transaction
-- For how many seconds the oldest transaction has been open that keeps VACUUM from taking away what was deleted since. Sessions of
-- other roles are seen where ours has the rights of pg_read_all_stats.
SELECT coalesce(extract(epoch FROM clock_timestamp() - min(began)), 0)::float8
FROM (
    SELECT xact_start AS began FROM pg_stat_activity
    WHERE datname = current_database() AND backend_type = 'client backend' AND pid <> pg_backend_pid()
        AND (backend_xmin IS NOT NULL OR backend_xid IS NOT NULL)
    UNION ALL
    SELECT prepared FROM pg_prepared_xacts WHERE database = current_database()
) AS held;
