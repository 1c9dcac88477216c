-- Of a queue that was nearly empty when PostgreSQL last looked, it believes that sorting what another index finds is as good as the
-- index that is in order, and reads the whole queue ten times for each batch.
ALTER FUNCTION claim_messages(text, bigint, interval) SET enable_sort = off;
