"""Storage: disks of VMs over the read-only files of images."""
