-- Packets that came from a broker which does not count how often it hands one out, first of their lane to a new consumer: whoever had
-- them before may have ended with one of them in hand. How often that was. A crash of the database may forget it.
CREATE UNLOGGED TABLE suspect (
    id uuid PRIMARY KEY,
    handed integer NOT NULL,
    seen_at timestamptz NOT NULL
);
