-- The repository that a VM was given. Beside the record: a transfer does not have the VM's lock.

ALTER TABLE vms ADD COLUMN workspace TEXT CHECK (workspace IS NULL OR json_valid(workspace));
