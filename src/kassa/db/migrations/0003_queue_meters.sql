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
