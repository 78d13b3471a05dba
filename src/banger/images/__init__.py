"""Images and kernels: built, checked and kept as files."""
