-- Where each broker was, and what it carried, when Kassa last ran: none is to get another one's place in the log by its place in the
-- settings.
CREATE TABLE broker (
    name text,
    address text,
    topics text[] NOT NULL,
    seen_at timestamptz NOT NULL,
    PRIMARY KEY (name, address)
);
