"""The daemon: the composition root and the dispatch of RPCs to services."""
