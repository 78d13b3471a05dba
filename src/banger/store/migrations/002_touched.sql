-- When somebody last used a VM, as ISO 8601 in UTC. A column of its own, not in the record: it is
-- written without the VM's lock, beside whoever replaces the record.

ALTER TABLE vms ADD COLUMN touched_at TEXT;
