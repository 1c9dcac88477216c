-- The first packets of lanes that came to a consumer, of brokers which do not count how often they hand one out: whoever had the lane
-- before may have ended with one of these in hand. How often a lane began so. A crash of the database may forget it.
CREATE UNLOGGED TABLE suspect (
    id uuid PRIMARY KEY,
    handed integer NOT NULL,
    seen_at timestamptz NOT NULL
);
