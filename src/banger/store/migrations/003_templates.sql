-- Machines saved after their boot. As of a VM, when one was last used is a column of its own.

CREATE TABLE templates (
    id         TEXT PRIMARY KEY,
    key        TEXT NOT NULL UNIQUE,
    image_id   TEXT NOT NULL,
    used_at    TEXT NOT NULL,
    record     TEXT NOT NULL CHECK (json_valid(record))
) STRICT;

CREATE INDEX templates_image_id ON templates (image_id);
