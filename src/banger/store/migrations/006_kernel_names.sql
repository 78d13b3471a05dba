-- The kernel that banger builds has the name that `banger kernel build` takes.

UPDATE kernels SET name = 'debian', record = json_set(record, '$.name', 'debian')
    WHERE name = 'debian-cloud';
