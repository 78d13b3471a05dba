-- A VM is one row. What is looked up or must be unique has a column; the rest is the JSON of the
-- record (banger.base.model.Vm and its kin), so that a new field needs no migration.

CREATE TABLE vms (
    id         TEXT PRIMARY KEY,
    name       TEXT NOT NULL UNIQUE,
    image_id   TEXT NOT NULL,
    kernel_id  TEXT NOT NULL,
    record     TEXT NOT NULL CHECK (json_valid(record))
) STRICT;

CREATE INDEX vms_image_id ON vms (image_id);

CREATE TABLE images (
    id         TEXT PRIMARY KEY,
    name       TEXT NOT NULL UNIQUE,
    kernel_id  TEXT NOT NULL,
    record     TEXT NOT NULL CHECK (json_valid(record))
) STRICT;

CREATE TABLE kernels (
    id         TEXT PRIMARY KEY,
    name       TEXT NOT NULL UNIQUE,
    record     TEXT NOT NULL CHECK (json_valid(record))
) STRICT;
