"""Hypervisors: programs that run a machine."""
