-- VMs as they were, for others to be made from.

CREATE TABLE snapshots (
    id         TEXT PRIMARY KEY,
    name       TEXT NOT NULL UNIQUE,
    image_id   TEXT NOT NULL,
    record     TEXT NOT NULL CHECK (json_valid(record))
) STRICT;

CREATE INDEX snapshots_image_id ON snapshots (image_id);
